"""Pixels in and out: any clip or picture becomes what a model reads, and frames become a file as
they are made.

Videos are float tensors [B, 3, F, H, W] in [-1, 1] everywhere inside the project; bytes and files
exist only here. Reading goes by content, not by name: Pillow (through imageio) for pictures and
animations, the ffmpeg program that comes with imageio for videos. What a file says about its
picture is followed, and said.

    python -c "from lib.media import load_clip; print(load_clip('clip.mp4', (32, 32))[1])"
"""

import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import imageio
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.common import UserError, atomic

# What counts as a video in a folder. A file that is named is judged by its content.
VIDEOS = (
    ".mp4 .m4v .f4v .mov .qt .mkv .webm .avi .divx .mpg .mpeg .m1v .m2v .vob .ts .mts .m2ts .mxf"
    " .ogv .ogg .wmv .asf .flv .3gp .3g2 .dv .y4m .nut .mjpeg .mjpg .gif .apng"
).split()
# The containers that ffmpeg may open: no text, no playlists that name other files, no network.
CONTAINERS = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,mxf,ogg,flv,asf,h264,hevc,vvc,av1,obu,ivf,m4v,dv,nut,"
    "wtv,gxf,yuv4mpegpipe,mjpeg,rm,swf"
)
ALPHA = ("rgba", "bgra", "argb", "abgr", "yuva", "gbrap", "ya8", "ya16", "pal8")
HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
# High dynamic range, 100 nits being white [guess, as in most recipes]: to linear light, to BT.709's
# colours, as it is up to 0.8 of white, brighter parts rolled off, back to a picture.
TONE_MAP = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,"
    "tonemap=mobius:param=0.8:desat=0,zscale=t=bt709:m=bt709:r=tv,format=yuv444p"
)


# ---------------------------------------------------------------- what a file says of itself
@dataclass
class About:
    """What a file says about its picture, and what had to be converted."""

    fps: float
    seconds: float = 0.0  # of picture that the file promises; 0 where it does not say
    has_sound: bool = False
    notes: list[str] = field(default_factory=list)

    def note(self, words: str) -> None:
        if words not in self.notes:
            self.notes.append(words)

    def damage(self, seconds: float) -> str:
        """What to say where there are so many seconds of picture, and more were promised."""
        if seconds >= 0.9 * self.seconds - 0.125:
            return ""
        return (
            f", although the file promises {self.seconds:.1f} s: it is damaged, or its sound is"
            " longer than its picture"
        )


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


@contextmanager
def _one_sentence(path: pathlib.Path) -> Iterator[None]:
    """Decoders raise what they like: it becomes a UserError that names the file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        words = (str(error) or type(error).__name__).splitlines()[-1][-120:]
        raise UserError(f"{path} cannot be read as a video or picture ({words})") from None


def open_frames(path: pathlib.Path, fps: int = 0) -> tuple[About, Iterator[Tensor]]:
    """What a file says of itself, and its frames, uint8 [3, H, W], at 0, 1/fps, 2/fps ... seconds;
    fps 0: as stored. raises: UserError, at once or while frames are read"""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no file"
        raise UserError(f"{path} {what if path.exists() else 'does not exist'}")
    readers = [_open_picture, _open_video]
    if path.suffix.lower() in VIDEOS:  # some look like pictures, too
        readers.reverse()

    def frames() -> Iterator[Tensor]:
        with _one_sentence(path):
            for frame in found:
                yield torch.from_numpy(frame.copy()).permute(2, 0, 1)

    with _one_sentence(path):
        why = None
        for reader in readers:
            try:
                about, found = reader(path, fps)
                break
            except Exception as error:  # the first says why, but where it knows no such files
                why = why if why and "given uri" not in str(why) else error
        else:
            raise why
    return about, frames()


# ---------------------------------------------------------------- pictures and animations
def _open_picture(path: pathlib.Path, fps: int) -> tuple[About, Iterator[np.ndarray]]:
    about = About(fps=fps or 1)
    with iio.imopen(path, "r", plugin="pillow") as file:
        _read_picture(file, 0, about)  # some videos look like pictures until they are read
        metadata, count = file.metadata(index=0), file.properties(index=...).n_images
    moves = "duration" in metadata or "version" in metadata  # a .gif may have no durations
    if count > 1 and not moves:
        about.note(f"the first of its {count} pictures")
        count = 1
    profile = metadata.get("icc_profile") or b""
    if profile and b"sRGB" not in profile and b"s\0R\0G\0B" not in profile:
        about.note("its colour profile is not applied")
    return about, _picture_frames(path, count, fps, about)


def _picture_frames(path: pathlib.Path, count: int, fps: int, about: About) -> Iterator[np.ndarray]:
    """Each picture of an animation as often as its time needs."""
    shown = 0
    with iio.imopen(path, "r", plugin="pillow") as file:
        for i in range(count):
            frame = _read_picture(file, i, about)
            due = i + 1  # frames until this one ends
            if count > 1:
                delay = file.metadata(index=i).get("duration", 0) / 1000
                if delay <= 0.01:
                    delay = 0.1
                    about.note("frames without a duration shown for 0.1 s, as browsers do")
                about.seconds += delay
                about.fps = due / about.seconds
                if fps:  # the last one stays up to half a frame longer
                    ends = about.seconds * fps
                    due = max(round(ends), 1) if due == count else math.ceil(ends)
            yield from [frame] * (due - shown)
            shown = due


def _read_picture(file, index: int, about: About) -> np.ndarray:
    """A picture as uint8 [H, W, 3], upright."""
    if file.metadata(index=index)["mode"].startswith(("I", "F")):  # more than 8 bits
        return _eight_bits(file.read(index=index, rotate=True), about)
    return _over_black(file.read(index=index, mode="RGBA", rotate=True), about)


def _eight_bits(values: np.ndarray, about: About) -> np.ndarray:
    """16 bit or float values [H, W] as uint8 [H, W, 3]."""
    highest = values.max()
    if not np.isfinite(values).all():
        raise ValueError("it holds pixels that are not numbers")
    if highest > 65535:
        raise ValueError(f"it holds pixels up to {highest}; save it with 8 or 16 bits")
    if values.dtype == np.uint16 or highest > 255:
        white = 65535
    else:
        white = 255 if highest > 1 else 1
    about.note(f"values of 0 to {white} scaled to 8 bits")
    scaled = np.clip(np.round(values.astype(np.float64) * (255 / white)), 0, 255).astype(np.uint8)
    return np.stack([scaled] * 3, axis=-1)


def _over_black(rgba: np.ndarray, about: About) -> np.ndarray:
    """uint8 [H, W, 4] over black: what is transparent has a colour in the file, but nobody was
    meant to see it."""
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min() == 255:
        return colour
    about.note("transparent parts over black")
    return ((colour.astype(np.uint32) * alpha + 127) // 255).astype(np.uint8)


# ---------------------------------------------------------------- videos, by ffmpeg
def _ffmpeg(path: pathlib.Path, *after: str, decoder: str = "") -> list[str]:
    """The command that reads this file; -xerror: a damaged picture ends the video, none is
    guessed."""
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin"]
    words += ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS]
    words += ["-xerror", "-err_detect", "explode"]
    words += ["-c:v", decoder] if decoder else []
    return [*words, "-i", f"file:{path}", *after]


def _open_video(path: pathlib.Path, fps: int) -> tuple[About, Iterator[np.ndarray]]:
    asked = subprocess.run(_ffmpeg(path), capture_output=True, stdin=subprocess.DEVNULL)
    says = asked.stderr.decode(errors="replace")
    streams = re.findall(r"^\s*Stream #.*Video: .*", says, re.M)
    streams = [line for line in streams if "(attached pic)" not in line]  # the cover of a song
    if not streams and "Audio: " in says:
        raise UserError(f"{path} has sound but no picture; name a video")
    if not streams:
        raise ValueError(says.splitlines()[-1])
    if "Tile Grid" in says:
        raise UserError(f"{path} is a picture in tiles, as phones make; save it as .png or .jpg")
    stream = streams[0]
    about = About(_number(r"([\d.]+) fps", stream) or _number(r"([\d.]+) tbr", stream) or 1.0)
    about.has_sound = "Audio: " in says
    if promise := re.search(r"Duration: (\d+):(\d+):([\d.]+).*? start: ([-\d.]+)", says):
        hours, minutes, seconds, begin = map(float, promise.groups())
        late = max(_number(r", start ([\d.]+)", stream) - begin, 0.0)
        about.seconds = 3600 * hours + 60 * minutes + seconds - late
        if "matroska" in says:  # there the duration is the time of the end
            about.seconds -= begin
        if late > 0.1:
            about.note(f"its picture begins {late:.2f} s after its sound")
    codec, kind = re.search(r"Video: (\w+).*?, (\w+)", stream).groups()
    hidden_alpha = "alpha_mode" in says and codec in ("vp8", "vp9")
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[codec] if hidden_alpha else ""
    has_alpha = hidden_alpha or kind.startswith(ALPHA)
    after = ["-map", "0:V:0", "-vf", ",".join(_filters(stream, fps, about))]
    after += ["-fps_mode", "passthrough", "-pix_fmt", "rgba" if has_alpha else "rgb24"]
    after += ["-c:v", "pam", "-f", "image2pipe", "-v", "error", "pipe:1"]
    return about, _video_frames(_ffmpeg(path, *after, decoder=decoder), about)


def _number(pattern: str, words: str) -> float:
    found = re.search(pattern, words)
    return float(found[1]) if found else 0.0


def _filters(stream: str, fps: int, about: About) -> list[str]:
    """What ffmpeg does to the pictures, from what it says about the stream."""
    filters = ["setpts=PTS-STARTPTS"]  # the first picture is at 0, whenever the file begins
    if re.search(r"(top|bottom) (coded )?first", stream):
        filters.append("bwdif=mode=send_frame:deint=interlaced")
        about.note("deinterlaced")
    if fps:
        filters.append(f"fps={fps}")
    is_tagged = "unknown" not in stream  # else zscale does not know what to convert from
    transfer = next((name for name in HDR if name in stream), None)
    wide = re.search(r"/(bt2020|smpte43[12])\b", stream)
    if transfer:
        bt2020 = [] if is_tagged else ["setparams=color_primaries=bt2020:colorspace=bt2020nc"]
        filters += [*bt2020, TONE_MAP]
        about.note(f"high dynamic range ({HDR[transfer]}) tone-mapped")
    elif wide and is_tagged:
        filters.append("zscale=p=bt709:t=bt709:m=bt709")
        about.note(f"wide colours ({wide[1]}) made those of BT.709")
    elif wide:
        about.note(f"wide colours ({wide[1]}) taken for those of BT.709")
    ratios = re.findall(r"SAR (\d+):(\d+)", stream)  # the codec's, then the file's, which wins
    if ratios and ratios[-1][0] != ratios[-1][1]:
        filters.append("scale='if(gt(sar,1),iw*sar,iw)':'if(gt(sar,1),ih,ih/sar)',setsar=1")
        about.note(f"pixels of {':'.join(ratios[-1])} made square")
    return filters


def _video_frames(command: list[str], about: About) -> Iterator[np.ndarray]:
    """Frames from ffmpeg's pipe: each comes with a header that says its size."""
    count = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL
        )
        try:
            while (frame := _read_pam(process.stdout)) is not None:
                count += 1
                yield _over_black(frame, about) if frame.shape[2] == 4 else frame
            process.wait()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        if not count:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines() or ["it has no frames"]
            raise ValueError(lines[0].rpartition("] ")[2])


def _read_pam(pipe) -> np.ndarray | None:
    """The next picture of a stream of .pam files, uint8 [H, W, 3 or 4]; None at its end."""
    sizes = {}
    while (line := pipe.readline().split()) != [b"ENDHDR"]:
        if not line:
            return None
        sizes[line[0]] = line[-1]
    shape = tuple(int(sizes[name]) for name in (b"HEIGHT", b"WIDTH", b"DEPTH"))
    data = pipe.read(int(np.prod(shape)))
    return np.frombuffer(data, np.uint8).reshape(shape) if len(data) == np.prod(shape) else None


# ---------------------------------------------------------------- clips for a model
def _fit(frame: Tensor, height: int, width: int, fit: str) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width]: resized (bicubic, antialiased) to cover it and
    cropped, or padded."""
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
    """Every frame of a video or picture as it is stored: float32 [1, 3, F, H, W] in [-1, 1].
    raises: UserError"""
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
    """Write frames as they come, at 16 fps [Wan]; the file takes its name only when the block ends
    without error.

    After Ctrl-C what was written by then is a whole, playable file: `self.part`, clip.part.mp4 for
    clip.mp4. An .mkv is lossless and exact to the bit; an .mp4 keeps every frame; a .gif merges
    equal neighbours; a .png holds one frame. comment: kept in the metadata of an .mp4 or .mkv."""

    def __init__(self, path: str | os.PathLike, fps: int = 16, comment: str = "") -> None:
        self.path, self.fps, self.count = pathlib.Path(path).expanduser(), fps, 0
        self.part = self.path.with_suffix(f".part{self.path.suffix}")
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
            if error[0] is KeyboardInterrupt and self.count:
                os.replace(self._tmp, self.part)
        except BaseException:
            self._atomic.__exit__(*sys.exc_info())
            raise
        self._atomic.__exit__(*error)


def write_sheet(path: str | os.PathLike, video: Tensor, columns: int = 7) -> None:
    """Write `columns` evenly spaced frames of each clip [B, 3, F, H, W] as one PNG, a row per
    clip."""
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
