"""Pixels in and out: read a video, write one as it is made, lay out contact sheets, draw curves.

Videos are float tensors [B, 3, F, H, W] in [-1, 1] everywhere inside the project; bytes and files exist only here.

    python -c "import media; print(media.read_frames('clip.mp4').shape)"
"""
import json
import os
import pathlib
import sys

import imageio
import imageio.v3 as iio
import numpy as np
import torch
from torch import Tensor

from common import UserError, atomic


def read_frames(path: str | os.PathLike) -> Tensor:
    """Read a video file: float32 [1, 3, F, H, W] in [-1, 1]. raises: UserError if it cannot be decoded."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    try:
        frames = np.stack([f[..., :3] for f in iio.imiter(path)])
        if frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"it has no colour: frames of shape {frames.shape[1:]}")
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{path} cannot be read as a video ({str(error).splitlines()[0][:120]})") from None
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1)


def to_uint8(video: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


class VideoWriter:
    """Write frames as they come, at 16 fps [Wan]; the file takes its name only when the block ends without error.

    An .mp4 keeps every frame; a .gif merges equal neighbours."""

    def __init__(self, path: str | os.PathLike, fps: int = 16) -> None:
        self.path, self.fps, self.count = pathlib.Path(path), fps, 0
        if self.path.suffix.lower() not in (".mp4", ".gif"):
            raise UserError(f"--out {path} must end in .mp4 or .gif")

    def __enter__(self) -> "VideoWriter":
        self._atomic = atomic(self.path)
        tmp = self._atomic.__enter__()
        options = {"fps": self.fps, "macro_block_size": 2, "quality": 8} if tmp.suffix.lower() == ".mp4" else {
            "duration": 1000 / self.fps, "loop": 0}
        self._writer = imageio.get_writer(str(tmp), **options)
        return self

    def write(self, video: Tensor) -> None:
        """Append frames [3, F, H, W] in [-1, 1]. raises: UserError for odd sides in an .mp4."""
        if self.path.suffix.lower() == ".mp4" and (video.shape[-2] % 2 or video.shape[-1] % 2):
            raise UserError(f"{self.path}: an .mp4 needs even sides, not {video.shape[-2]}x{video.shape[-1]}; use .gif or crop it")
        for frame in to_uint8(video):
            self._writer.append_data(frame)
            self.count += 1

    def __exit__(self, *error) -> None:
        try:
            self._writer.close()
        except BaseException:
            self._atomic.__exit__(*sys.exc_info())
            raise
        self._atomic.__exit__(*error)


def write_sheet(path: str | os.PathLike, video: Tensor, columns: int = 7) -> None:
    """Write `columns` evenly spaced frames of each clip [B, 3, F, H, W] as one PNG, a row per clip."""
    picks = torch.linspace(0, video.shape[2] - 1, min(columns, video.shape[2])).round().long()
    rows = [np.concatenate(list(to_uint8(clip[:, picks.to(clip.device)])), axis=1) for clip in video]
    sheet = np.concatenate(rows)
    scale = max(1, 96 // video.shape[-2])  # toy clips are enlarged to be seen
    with atomic(path) as tmp:
        iio.imwrite(tmp, sheet.repeat(scale, 0).repeat(scale, 1))


def write_curves(path: str | os.PathLike, log: str | os.PathLike) -> None:
    """Draw every number of a JSONL log against its `step`, one strip each, as a PNG; the log holds the values."""
    rows = [json.loads(line) for line in pathlib.Path(log).read_text().splitlines()]
    names = sorted({k for row in rows for k in row} - {"step"})
    height, width, strips = 60, 600, []
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row and np.isfinite(row[name])]
        strip = np.full((height, width, 3), 255, np.uint8)
        strip[-1] = 200
        if len(points) > 1:
            x, y = np.array(points, float).T
            grid = np.linspace(x[0], x[-1], width)
            level = np.interp(grid, x, y)
            at = ((level.max() - level) / max(np.ptp(level), 1e-12) * (height - 8) + 3).astype(int)
            for i in range(width):  # join neighbours, so that the curve has no holes
                low, high = sorted((at[max(i - 1, 0)], at[i]))
                strip[low:high + 1, i] = (40, 90, 160)
        strips.append(strip)
    with atomic(path) as tmp:
        iio.imwrite(tmp, np.concatenate(strips) if strips else np.full((height, width, 3), 255, np.uint8))
