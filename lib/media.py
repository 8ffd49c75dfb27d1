"""Pixels in and out: read a video, fit any clip to a model, write one as it is made, lay out contact sheets, draw curves.

Videos are float tensors [B, 3, F, H, W] in [-1, 1] everywhere inside the project; bytes and files exist only here.

    python -c "import media; print(media.read_frames('clip.mp4').shape)"
"""

import json
import os
import pathlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence

import imageio
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.common import UserError, atomic


def read_frames(path: str | os.PathLike) -> Tensor:
    """Read a video file: float32 [1, 3, F, H, W] in [-1, 1]. raises: UserError if it cannot be decoded."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    try:
        frames = np.stack([f[..., :3] for f in iio.imiter(path)])
        if frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"it has no colour: frames of shape {frames.shape[1:]}")
    except Exception as error:  # decoders raise what they like
        raise UserError(
            f"{path} cannot be read as a video ({(str(error) or type(error).__name__).splitlines()[0][:120]})"
        ) from None
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1)


VIDEOS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def _frames_at(path: pathlib.Path, fps: int) -> Iterator[dict | np.ndarray]:
    """First what the file says of itself ("fps", "duration"), then uint8 [H, W, 3] at 0, 1/fps, 2/fps ... seconds.

    Timestamps count where the container has them (variable frame rate), else its rate; frames of a .gif have durations."""
    if path.suffix.lower() in PICTURES:
        with iio.imopen(path, "r", plugin="pillow") as file:
            count = file.properties(index=...).shape[0]
            ends = np.cumsum(
                [file.metadata(index=i).get("duration", 0) / 1000 or 1 / fps for i in range(count)]
            )
            yield {"fps": count / ends[-1], "duration": ends[-1]}
            for i in np.searchsorted(
                ends, np.arange(max(round(ends[-1] * fps), 1)) / fps, side="right"
            ):
                yield file.read(index=int(i), mode="RGB", rotate=True)
    else:  # -xerror: damaged pictures end the video; none is guessed
        with imageio.get_reader(
            str(path),
            format="ffmpeg",
            input_params=["-xerror", "-err_detect", "explode"],
            output_params=["-vf", f"fps={fps}"],
        ) as reader:
            yield reader.get_meta_data()
            yield from reader


def _fit(frame: Tensor, height: int, width: int, fit: str) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width]: resized (bicubic, antialiased) to cover it and cropped, or to fit in and padded."""
    H, W = frame.shape[1:]
    if (H, W) == (height, width):
        return frame
    scale = (max if fit == "crop" else min)(height / H, width / W)
    h, w = max(round(H * scale), 1), max(round(W * scale), 1)
    h, w = (max(h, height), max(w, width)) if fit == "crop" else (min(h, height), min(w, width))
    frame = (
        F.interpolate(frame[None].float(), (h, w), mode="bicubic", antialias=True)[0]
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
    )
    top, left = abs(h - height) // 2, abs(w - width) // 2
    if fit == "crop":
        return frame[:, top : top + height, left : left + width]
    return F.pad(frame, (left, width - w - left, top, height - h - top))


def load_clip(
    path: str | os.PathLike,
    size: tuple[int, int],
    fps: int = 16,
    fit: str = "crop",
    frames: int | None = None,
    last: bool = False,
    least: int | None = None,
) -> tuple[Tensor, str]:
    """Read any video or picture as a model wants it: resampled to `fps`, fitted to `size` (height, width), cut to `frames`.

    fit: crop or pad (with black) to keep the proportions;  last: keep the last frames, not the first;  least: how many must
    be there (default: all `frames`). A video is read frame by frame: only what is kept costs memory.
    returns: float32 [1, 3, F, H, W] in [-1, 1], every value one of 256 levels, so that lossless files hold them exactly;
    and a sentence saying what was done.  raises: UserError if it cannot be read, has no picture, or is too short"""
    path, (height, width) = pathlib.Path(path), size
    if fit not in ("crop", "pad"):
        raise UserError(f"--fit {fit!r} must be crop or pad")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    kept, read, (H, W) = deque(maxlen=frames if last else None), 0, (0, 0)
    source = _frames_at(path, fps)
    try:
        says = next(source)
        for frame in source:
            (H, W), read = frame.shape[:2], read + 1
            kept.append(
                _fit(
                    torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1),
                    height,
                    width,
                    fit,
                )
            )
            if frames and not last and read == frames:
                break
    except Exception as error:  # decoders raise what they like: Pillow SyntaxError for a broken .png, DecompressionBombError ...
        text = str(error) or "it is empty"
        if "Audio: " in text and "Video: " not in text:
            raise UserError(f"{path} has sound but no picture; name a video") from None
        raise UserError(
            f"{path} cannot be read as a video or picture ({text.splitlines()[-1][-120:]})"
        ) from None
    finally:
        source.close()
    wanted, promised, damage = least or frames or 1, says.get("duration", 0), ""
    if read / fps < 0.9 * promised - 2 / fps and (last or read != frames):
        damage = f", although the file promises {promised:.1f} s: it is damaged, or its sound is longer than its picture"
    if read < wanted:
        raise UserError(
            f"{path} has {read} frame{'s' * (read != 1)} ({read / fps:.2f} s) at {fps} fps, but {wanted} "
            f"({wanted / fps:.2f} s) are needed{damage}"
        )
    video = torch.stack(list(kept), dim=1)[None].float().div_(127.5).sub_(1)
    how = "" if (H, W) == (height, width) else f" to {height}x{width} ({fit})"
    rate = "" if abs(says["fps"] - fps) < 0.01 else f", {says['fps']:.4g} to {fps} fps"
    part = "" if not frames else "the last " if last else "the first "
    return video, (
        f"{path.name}: {H}x{W}{how}{rate}, {part}{video.shape[2]} "
        f"frame{'s' * (video.shape[2] != 1)} ({video.shape[2] / fps:.2f} s){damage}"
    )


def to_uint8(video: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    return (
        ((video.float().clamp(-1, 1) + 1) * 127.5)
        .round()
        .to(torch.uint8)
        .permute(1, 2, 3, 0)
        .cpu()
        .numpy()
    )


# ---------------------------------------------------------------- what changes from frame to frame
STATIC = (
    2e-3  # a change below this, a quarter of a grey level of 255, is none: no ratio to it [ours]
)


def frame_changes(video: Tensor) -> Tensor:
    """Mean |x[f+1] - x[f]| of video [B, 3, F, H, W] in [-1, 1]: float32 [B, F-1]."""
    frames = video.unbind(2)  # a frame at a time, to save memory
    changes = [(b.float() - a.float()).abs().mean((1, 2, 3)) for a, b in zip(frames, frames[1:])]
    return torch.stack(changes, dim=1)


def temporal_flickering(video: Tensor) -> Tensor:
    """VBench's score of video [B, 3, F, H, W]: 1 - mean change in 8-bit grey levels over 255: [B]."""
    eight_bit = ((video.float().clamp(-1, 1) + 1) * 127.5).round()
    return 1 - frame_changes(eight_bit).mean(1) / 255


def seam(video: Tensor, frame: int) -> dict[str, Tensor]:
    """How a cut just before `frame` shows in video [B, 3, F, H, W]; each value is [B].

    colour offset: largest change of a channel's mean over the cut, in grey levels of 255
    jump: change over the cut, over the mean of the changes just before and just after it
    jump max: largest of the four changes from the cut on (a latent's frames: the toy VAE shows a hard
        cut at the second), over the mean of the changes just before and just after these four
    sharpness: mean gradient after the cut over that before

    raises: UserError unless two frames lie on either side."""
    if not 2 <= frame <= video.shape[2] - 2:
        raise UserError(
            f"a seam before frame {frame} needs two frames on either side, "
            f"but the video has {video.shape[2]}"
        )
    near = video[:, :, frame - 2 : frame + 5].float()  # (B, 3, up to 7, H, W)
    change, mean = frame_changes(near), near.mean((3, 4))
    gradient = near.diff(dim=3).abs().mean((1, 3, 4)) + near.diff(dim=4).abs().mean((1, 3, 4))
    around = 0.5 * (change[:, 0] + change[:, 2])
    around_four = 0.5 * (change[:, 0] + change[:, -1])
    return {
        "colour offset": (mean[:, :, 2] - mean[:, :, 1]).abs().amax(1) * 127.5,
        "jump": change[:, 1] / around.clamp_min(STATIC),
        "jump max": change[:, 1:-1].amax(1) / around_four.clamp_min(STATIC),
        "sharpness": gradient[:, 2] / gradient[:, 1].clamp_min(1e-6),
    }


# ---------------------------------------------------------------- writing
FORMATS = {
    ".mp4": {"macro_block_size": 2, "quality": 8},
    ".mkv": {"macro_block_size": 1, "codec": "ffv1", "pixelformat": "bgr0"},  # lossless
    ".gif": {"loop": 0},
}


class VideoWriter:
    """Write frames as they come, at 16 fps [Wan]; the file takes its name only when the block ends without error.

    After Ctrl-C what was written by then is a whole, playable file: `self.part`, clip.part.mp4 for clip.mp4.
    An .mkv is lossless and exact to the bit; an .mp4 keeps every frame; a .gif merges equal neighbours."""

    def __init__(self, path: str | os.PathLike, fps: int = 16) -> None:
        self.path, self.fps, self.count = pathlib.Path(path), fps, 0
        self.part = self.path.with_suffix(f".part{self.path.suffix}")
        if self.path.suffix.lower() not in FORMATS:
            raise UserError(f"--out {path} must end in .mp4, .gif or .mkv (lossless)")

    def __enter__(self) -> "VideoWriter":
        self._atomic = atomic(self.path)
        self._tmp = self._atomic.__enter__()
        kind = self._tmp.suffix.lower()
        rate = {"duration": 1000 / self.fps} if kind == ".gif" else {"fps": self.fps}
        self._writer = imageio.get_writer(str(self._tmp), **FORMATS[kind], **rate)
        return self

    def write(self, video: Tensor) -> None:
        """Append frames [3, F, H, W] in [-1, 1]. raises: UserError for odd sides in an .mp4."""
        if self.path.suffix.lower() == ".mp4" and (video.shape[-2] % 2 or video.shape[-1] % 2):
            raise UserError(
                f"{self.path}: an .mp4 needs even sides, not {video.shape[-2]}x{video.shape[-1]}; use .gif or crop it"
            )
        for frame in to_uint8(video):
            self._writer.append_data(frame)
            self.count += 1

    def __exit__(self, *error) -> None:
        try:
            self._writer.close()
            if error[0] is KeyboardInterrupt and self.count:
                os.replace(self._tmp, self.part)
        except BaseException:
            self._atomic.__exit__(*sys.exc_info())
            raise
        self._atomic.__exit__(*error)


def write_sheet(path: str | os.PathLike, video: Tensor, columns: int = 7) -> None:
    """Write `columns` evenly spaced frames of each clip [B, 3, F, H, W] as one PNG, a row per clip."""
    picks = torch.linspace(0, video.shape[2] - 1, min(columns, video.shape[2])).round().long()
    rows = [
        np.concatenate(list(to_uint8(clip[:, picks.to(clip.device)])), axis=1) for clip in video
    ]
    sheet = np.concatenate(rows)
    scale = max(1, 96 // video.shape[-2])  # toy clips are enlarged to be seen
    with atomic(path) as tmp:
        iio.imwrite(tmp, sheet.repeat(scale, 0).repeat(scale, 1))


# A font [ours] of 3 x 5 pixels, a glyph's fifteen bits in four hexadecimal digits, row by row.
FONT = dict(
    zip(
        "0123456789abcdefghijklmnopqrstuvwxyz_.-+",
        (
            f"{int(bits, 16):015b}"
            for bits in map(
                "".join,
                zip(
                    *[
                        iter(
                            "7b6f2c9773e773cf5bc979cf79ef72927bef7bcf2bed6bae39236b6e79a779a4396b5bed7497126a"
                            "5bad49275fed6b6d2b6a6ba42b7b6bad388e74925b6f5b6a5bfd5aad5a9272a70007000201c005d0"
                        )
                    ]
                    * 4
                ),
            )
        ),
    )
)


def write_text(image: np.ndarray, row: int, column: int, text: str, scale: int = 1) -> None:
    """Write small letters and digits into a picture uint8 [H, W, 3], the first one's corner at (row, column)."""
    for n, glyph in enumerate(text):
        pixels = (
            np.array([*FONT.get(glyph, "0" * 15)]).reshape(5, 3).repeat(scale, 0).repeat(scale, 1)
        )
        left = column + 4 * scale * n
        image[row : row + 5 * scale, left : left + 3 * scale][pixels == "1"] = 60


def draw_grid(
    rows: Sequence[Sequence[str]],
    left: Sequence[str],
    top: Sequence[str],
    colours: dict[str, tuple[int, int, int]],
    cell: int = 16,
) -> np.ndarray:
    """A table as a picture, uint8 [H, W, 3]: a coloured cell for every mark in `rows`, labels beside and above."""
    image = np.full(((len(rows) + 1) * cell, (len(top) + 1) * cell, 3), 255, np.uint8)
    for r, row in enumerate(rows, 1):
        for c, mark in enumerate(row, 1):
            box = image[r * cell : (r + 1) * cell, c * cell : (c + 1) * cell]
            box[1:, 1:] = colours[mark]
            box[0], box[:, 0] = 210, 210
    for r, c, label in [(0, c, x) for c, x in enumerate(top, 1)] + [
        (r, 0, x) for r, x in enumerate(left, 1)
    ]:
        write_text(image, r * cell + 5, c * cell + 1, label)
    return image


def write_curves(path: str | os.PathLike, log: str | os.PathLike) -> None:
    """Draw every number of a JSONL log against its `step`, as a PNG: a strip each, its name, highest and lowest value beside it."""
    rows = [json.loads(line) for line in pathlib.Path(log).read_text().splitlines()]
    names = sorted({k for row in rows for k in row} - {"step"})
    height, width, margin, strips = 60, 600, 130, []
    for name in names:
        points = [
            (row["step"], row[name]) for row in rows if name in row and np.isfinite(row[name])
        ]
        strip = np.full((height, margin + width, 3), 255, np.uint8)
        strip[-1] = 200
        write_text(strip, 24, 4, name, scale=2)
        if len(points) > 1:
            x, y = np.array(points, float).T
            grid = np.linspace(x[0], x[-1], width)
            level = np.interp(grid, x, y)
            at = ((level.max() - level) / max(np.ptp(level), 1e-12) * (height - 8) + 3).astype(int)
            for i in range(width):  # join neighbours, so that the curve has no holes
                low, high = sorted((at[max(i - 1, 0)], at[i]))
                strip[low : high + 1, margin + i] = (40, 90, 160)
            for row, value in ((4, level.max()), (height - 16, level.min())):
                write_text(strip, row, 4, f"{value:.4g}", scale=2)
        strips.append(strip)
    with atomic(path) as tmp:
        iio.imwrite(
            tmp,
            np.concatenate(strips)
            if strips
            else np.full((height, margin + width, 3), 255, np.uint8),
        )
