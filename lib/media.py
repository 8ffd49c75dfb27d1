"""Pixels in and out: a clip becomes what a model reads, and frames become a file as they are made.

Videos are float tensors [B, 3, F, H, W] in [-1, 1] everywhere inside the project; bytes and files
exist only here and in decode.py, which opens any file that holds a picture.

    python -c "from lib.media import load_clip; print(load_clip('clip.mp4', (32, 32))[1])"
"""

import os
import pathlib
import sys
from collections import deque
from itertools import islice

import imageio
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.common import UserError, atomic
from lib.decode import VIDEOS, open_frames
from lib.outputs import part

FPS = 16  # [Wan]


# ---------------------------------------------------------------- clips for a model
def videos_in(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The videos of a folder by name, without hidden files (`._clip.mp4` is none); what else lies
    there, but for notes, is said. raises: UserError where there are none"""
    path = pathlib.Path(folder).expanduser()
    inside = sorted(path.iterdir()) if path.is_dir() and str(folder) else []
    files = [p for p in inside if p.name[0] != "."]
    videos = [p for p in files if p.is_file() and p.suffix.lower() in VIDEOS]
    if not videos:
        what = "holds no videos (.mp4, .mkv ...)" if path.is_dir() else "is no folder of videos"
        raise UserError(f"{str(folder)!r} {what}")
    others = [p.name for p in files if p not in videos and p.suffix not in (".txt", ".json")]
    if others:
        more = " ..." if len(others) > 3 else ""
        print(f"{folder}: {len(others)} left out, no video by name: {', '.join(others[:3])}{more}")
    return videos


def _fit(frame: Tensor, height: int, width: int, fit: str) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width]: resized, then cropped or padded."""
    H, W = frame.shape[1:]
    if (H, W) == (height, width):
        return frame
    outer = max if fit == "crop" else min
    scale = outer(height / H, width / W)
    h, w = outer(max(round(H * scale), 1), height), outer(max(round(W * scale), 1), width)
    frame = F.interpolate(frame[None].float(), (h, w), mode="bicubic", antialias=True)[0]
    frame = frame.round().clamp(0, 255).to(torch.uint8)  # (3, h, w)
    top, left = int((height - h) / 2), int((width - w) / 2)
    return F.pad(frame, (left, width - w - left, top, height - h - top))  # below 0 it crops


def _floats(frames: list[Tensor]) -> Tensor:
    """uint8 [3, H, W] each -> float32 [1, 3, F, H, W] in [-1, 1]."""
    return torch.stack(frames, dim=1)[None].float().div_(127.5).sub_(1)


def read_frames(path: str | os.PathLike) -> Tensor:
    """Every frame as it is stored: float32 [1, 3, F, H, W] in [-1, 1]. raises: UserError"""
    path = pathlib.Path(path).expanduser()
    about, found = open_frames(path)
    frames = list(found)
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} has frames of more than one size; cut it where the size changes")
    words = ", ".join(about.notes) + about.damage(len(frames) / about.fps)
    if words:
        print(f"{path.name}: {words.lstrip(', ')}")
    return _floats(frames)


def load_clip(
    path: str | os.PathLike,
    size: tuple[int, int],
    fps: int = 16,
    fit: str = "crop",
    frames: int | None = None,
    last: bool = False,
    least: int | None = None,
) -> tuple[Tensor, str]:
    """Read any video or picture as a model wants it: resampled to `fps`, fitted to `size` (height,
    width), cut to `frames`. A video is read frame by frame: only what is kept costs memory.

    fit: crop or pad (with black) to keep the proportions;  last: keep the last frames, not the
    first;  least: how many must be there (default: all `frames`)
    returns: float32 [1, 3, F, H, W] in [-1, 1], every value one of 256 levels, so that lossless
    files hold them exactly; and a sentence saying what was done.  raises: UserError if it cannot be
    read, has no picture, or is too short"""
    path = pathlib.Path(path).expanduser()
    if fit not in ("crop", "pad"):
        raise UserError(f"--fit {fit!r} must be crop or pad")
    about, found = open_frames(path, fps)
    kept, read, stored = deque(maxlen=frames if last else None), 0, ()
    for frame in islice(found, None if last else frames):
        stored, read = tuple(frame.shape[1:]), read + 1
        kept.append(_fit(frame, *size, fit))
    found.close()
    damage = "" if not last and read == frames else about.damage(read / fps)
    wanted = least or frames or 1
    if read < wanted:
        raise UserError(
            f"{path} has {read} frame{'s' * (read != 1)} ({read / fps:.2f} s) at {fps} fps, but"
            f" {wanted} ({wanted / fps:.2f} s) are needed{damage}"
        )
    fitted = "" if stored == tuple(size) else f" to {size[0]}x{size[1]} ({fit})"
    words = [f"{path.name}: {stored[0]}x{stored[1]}{fitted}", *about.notes]
    if abs(about.fps - fps) >= 0.01:
        words.append(f"{about.fps:.4g} to {fps} fps")
    part = "" if not frames else "the last " if last else "the first "
    count = f"{len(kept)} frame{'s' * (len(kept) != 1)}"
    words.append(f"{part}{count} ({len(kept) / fps:.2f} s){damage}")
    if about.has_sound:
        words.append("its sound is not kept")
    return _floats(list(kept)), ", ".join(words)


# ---------------------------------------------------------------- writing
def to_uint8(video: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    levels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 3, 0).cpu().numpy()


FORMATS = {
    ".mp4": {"macro_block_size": 2, "quality": 8},
    ".mkv": {"macro_block_size": 1, "codec": "ffv1", "pixelformat": "bgr0"},  # lossless
    ".gif": {"loop": 0},
    ".png": {},  # one frame
}


class VideoWriter:
    """Write frames as they come, at 16 fps [Wan]; the file has its name only when all went well.

    After Ctrl-C what was written by then is a whole, playable file: `self.part`, clip.part.mp4 for
    clip.mp4. An .mkv is lossless and exact to the bit; an .mp4 keeps every frame; a .gif merges
    equal neighbours; a .png holds one frame. comment: kept in the metadata of an .mp4 or .mkv."""

    def __init__(self, path: str | os.PathLike, fps: int = 16, comment: str = "") -> None:
        self.path, self.fps, self.count = pathlib.Path(path).expanduser(), fps, 0
        self.part = part(self.path)
        self.comment = comment
        if self.path.suffix.lower() not in FORMATS:
            raise UserError(f"--out {path} must end in .mp4, .gif or .mkv, or .png for one frame")

    def __enter__(self) -> "VideoWriter":
        self._atomic = atomic(self.path)
        self._tmp = self._atomic.__enter__()
        kind = self._tmp.suffix.lower()
        options = dict(FORMATS[kind])
        if kind == ".gif":
            options["duration"] = 1000 / self.fps
        if kind in (".mp4", ".mkv"):
            options["fps"] = self.fps
            options["output_params"] = ["-metadata", f"comment={self.comment}"]
        self._writer = imageio.get_writer(str(self._tmp), **options)
        return self

    def write(self, video: Tensor) -> None:
        """Append frames [3, F, H, W] in [-1, 1]. raises: UserError for odd sides in an .mp4 or a
        second frame in a .png; FloatingPointError for pixels that are not numbers, which would be
        written as black"""
        kind, (frames, height, width) = self.path.suffix.lower(), video.shape[1:]
        if kind == ".mp4" and (height % 2 or width % 2):
            raise UserError(
                f"{self.path}: an .mp4 needs even sides, not {height}x{width}; use .gif"
            )
        if kind == ".png" and self.count + frames > 1:
            raise UserError(f"{self.path}: a .png holds one frame; ask for --frames 1, or an .mp4")
        if not torch.isfinite(video).all():
            raise FloatingPointError(
                f"frames {self.count} to {self.count + frames - 1} of {self.path} are not numbers:"
                " the decoder gave NaN; try --vae_dtype float32, and check the VAE's weights"
            )
        for frame in to_uint8(video):
            self._writer.append_data(frame)
            self.count += 1

    def __exit__(self, *error) -> None:
        try:
            self._writer.close()
            if isinstance(error[1], KeyboardInterrupt) and self.count:
                os.replace(self._tmp, self.part)
        except BaseException:
            self._atomic.__exit__(*sys.exc_info())
            raise
        self._atomic.__exit__(*error)


def write_sheet(path: str | os.PathLike, video: Tensor, columns: int = 7) -> None:
    """Write `columns` evenly spaced frames of each clip [B, 3, F, H, W] as a PNG, a row a clip."""
    picks = torch.linspace(0, video.shape[2] - 1, min(columns, video.shape[2])).round().long()
    rows = []
    if not video.isfinite().all():
        raise FloatingPointError(f"{path}: the clips to show hold NaN, which would be black")
    for clip in video:
        shown = to_uint8(clip[:, picks.to(clip.device)])  # (columns, H, W, 3)
        rows.append(np.concatenate(list(shown), axis=1))
    sheet = np.concatenate(rows)
    scale = max(1, 96 // video.shape[-2])  # toy clips are enlarged to be seen
    with atomic(path) as tmp:
        iio.imwrite(tmp, sheet.repeat(scale, 0).repeat(scale, 1))
