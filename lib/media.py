"""Pixels in and out: any clip or picture becomes what a model reads, and frames become a file as
they are made.

Videos are float tensors [B, 3, F, H, W] in [-1, 1] everywhere inside the project; bytes and files
exist only here. Reading goes by content, not by name: Pillow (through imageio) is asked first, for
pictures and animations, then the ffmpeg program that comes with imageio. What a file says about its
picture is followed, and said: pixels that are not square, interlaced fields, high dynamic range, 16
bit and float values, transparency, a picture that begins late.

    python -c "from lib.media import load_clip; print(load_clip('clip.mp4', (32, 32))[1])"
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import imageio
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.common import UserError, atomic

# What counts as a clip in a folder. A file that is named is judged by its content alone.
PICTURES = (
    ".png .apng .jpg .jpeg .jfif .jpe .webp .avif .jp2 .bmp .tif .tiff .tga .gif .ppm"
).split()
VIDEOS = (
    ".mp4 .m4v .mov .qt .mkv .webm .avi .mpg .mpeg .vob .ts .mts .m2ts .mxf .ogv .ogg .wmv .asf"
    " .flv .3gp .3g2 .dv .y4m"
).split()
# The containers that ffmpeg may open: no text, no playlists that name other files, no network.
CONTAINERS = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,mxf,ogg,flv,asf,h264,hevc,vvc,av1,obu,ivf,m4v,dv,nut,"
    "wtv,gxf,yuv4mpegpipe,mjpeg"
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


def media_in(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The clips and pictures of a folder by name, without hidden files (`._clip.mp4` is no
    clip)."""
    return sorted(
        path
        for path in pathlib.Path(folder).iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix.lower() in (*VIDEOS, *PICTURES)
    )


def open_frames(path: pathlib.Path, fps: int = 0) -> tuple[About, Iterator[np.ndarray]]:
    """What a file says of itself, and its frames, uint8 [H, W, 3], at 0, 1/fps, 2/fps ... seconds;
    fps 0: as stored."""
    try:
        return _open_picture(path, fps)
    except Exception as not_a_picture:  # Pillow raises what it likes, SyntaxError for a broken .png
        try:
            return _open_video(path, fps)
        except ValueError:
            if path.suffix.lower() in PICTURES:
                raise not_a_picture from None
            raise


# ---------------------------------------------------------------- pictures and animations
def _open_picture(path: pathlib.Path, fps: int) -> tuple[About, Iterator[np.ndarray]]:
    with iio.imopen(path, "r", plugin="pillow") as file:
        file.read(index=0)  # some videos look like pictures until they are read
        count = file.properties(index=...).shape[0]
        metadata = [file.metadata(index=i) for i in range(count)]
    about = About(fps=fps or 1)
    if count > 1:
        delays = [row.get("duration", 0) / 1000 for row in metadata]
        if min(delays) <= 0.01:
            about.note("frames without a duration shown for 0.1 s, as browsers do")
        ends = np.cumsum([delay if delay > 0.01 else 0.1 for delay in delays])
        about.fps, about.seconds = count / ends[-1], float(ends[-1])
    profile = metadata[0].get("icc_profile") or b""
    if profile and b"sRGB" not in profile and b"s\0R\0G\0B" not in profile:
        about.note("its colour profile is not applied")
    shown = range(count)
    if fps and count > 1:
        times = np.arange(max(round(about.seconds * fps), 1)) / fps
        shown = np.searchsorted(ends, times, side="right")
    return about, _picture_frames(path, shown, about)


def _picture_frames(path: pathlib.Path, shown, about: About) -> Iterator[np.ndarray]:
    with iio.imopen(path, "r", plugin="pillow") as file:
        for i in shown:
            values = file.read(index=int(i), rotate=True)
            if values.dtype.itemsize > 1:
                yield _eight_bits(values, about)
            else:
                yield _over_black(file.read(index=int(i), mode="RGBA", rotate=True), about)


def _eight_bits(values: np.ndarray, about: About) -> np.ndarray:
    """16 bit or float values, grey [H, W] or colour [H, W, 3], as uint8 [H, W, 3]."""
    if not np.isfinite(values).all():
        raise ValueError("it holds pixels that are not numbers")
    highest = values.max()
    if values.dtype == np.uint16 or highest > 255:
        white = 65535
    else:
        white = 255 if highest > 1 else 1
    about.note(f"values of 0 to {white} scaled to 8 bits")
    scaled = np.clip(np.round(values.astype(np.float64) * (255 / white)), 0, 255).astype(np.uint8)
    return np.stack([scaled] * 3, axis=-1) if scaled.ndim == 2 else scaled[..., :3]


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
    streams = [line for line in says.splitlines() if re.match(r"\s*Stream #.*Video: ", line)]
    streams = [line for line in streams if "(attached pic)" not in line]  # the cover of a song
    if not streams:
        if "Audio: " in says:
            raise ValueError("it has sound but no picture; name a video")
        raise ValueError(says.splitlines()[-1])
    stream = streams[0]
    about = About(_number(r"([\d.]+) fps", stream) or _number(r"([\d.]+) tbr", stream) or 1.0)
    about.has_sound = "Audio: " in says
    about.seconds, late = _times(says, stream)
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


def _times(says: str, stream: str) -> tuple[float, float]:
    """Seconds of picture that the file promises (0: it does not say), and by how much the picture
    begins after the file."""
    begin = _number(r"Duration: .*?start: ([\d.]+)", says)
    late = max(_number(r", start ([\d.]+)", stream) - begin, 0.0)
    found = re.search(r"Duration: (\d+):(\d+):([\d.]+)", says)
    if not found:
        return 0.0, late
    hours, minutes, seconds = map(float, found.groups())
    duration = 3600 * hours + 60 * minutes + seconds
    if "matroska" in says:  # there the duration is the time of the end
        duration -= begin
    return duration - late, late


def _filters(stream: str, fps: int, about: About) -> list[str]:
    """What ffmpeg does to the pictures, from what it says about the stream."""
    filters = ["setpts=PTS-STARTPTS"]  # the first picture is at 0, whenever the file begins
    if re.search(r"(top|bottom) (coded )?first", stream):
        filters.append("bwdif=mode=send_frame:deint=interlaced")
        about.note("deinterlaced")
    if fps:
        filters.append(f"fps={fps}")
    transfer = next((name for name in HDR if name in stream), None)
    if transfer:
        filters.append(TONE_MAP)
        about.note(f"high dynamic range ({HDR[transfer]}) tone-mapped")
    ratio = re.search(r"SAR (\d+):(\d+)", stream)
    if ratio and ratio[1] != ratio[2]:
        filters.append("scale='if(gt(sar,1),iw*sar,iw)':'if(gt(sar,1),ih,ih/sar)',setsar=1")
        about.note(f"pixels of {ratio[1]}:{ratio[2]} made square")
    return filters


def _video_frames(command: list[str], about: About) -> Iterator[np.ndarray]:
    """Frames from ffmpeg's pipe: each comes with a header that says its size."""
    count = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL
        )
        try:
            while frame := _read_pam(process.stdout):
                count += 1
                yield _over_black(frame[0], about) if frame[0].shape[2] == 4 else frame[0]
            process.wait()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        if not count:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines()
            raise ValueError(lines[-1] if lines else "it has no frames")


def _read_pam(pipe) -> tuple[np.ndarray] | None:
    """The next picture of a stream of .pam files, uint8 [H, W, 3 or 4], in a tuple; None at its
    end."""
    sizes = {}
    while (line := pipe.readline().split()) != [b"ENDHDR"]:
        if not line:
            return None
        sizes[line[0]] = line[-1]
    shape = tuple(int(sizes[name]) for name in (b"HEIGHT", b"WIDTH", b"DEPTH"))
    data = pipe.read(int(np.prod(shape)))
    return (np.frombuffer(data, np.uint8).reshape(shape),) if len(data) == np.prod(shape) else None


# ---------------------------------------------------------------- clips for a model
def _open(path: pathlib.Path, fps: int = 0) -> tuple[About, Iterator[np.ndarray]]:
    """`open_frames`, with one sentence for whatever a decoder raises, at once or while frames are
    read."""
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is a folder")

    def refused(error: Exception) -> UserError:
        words = (str(error) or type(error).__name__).splitlines()[-1][-120:]
        if words.startswith("it has sound"):
            return UserError(f"{path}: {words[3:]}".replace(": has", " has"))
        return UserError(f"{path} cannot be read as a video or picture ({words})")

    def frames() -> Iterator[np.ndarray]:
        try:
            yield from found
        except (ValueError, OSError, SyntaxError, RuntimeError, KeyError, IndexError) as error:
            raise refused(error) from None

    try:
        about, found = open_frames(path, fps)
    except Exception as error:  # decoders raise what they like
        raise refused(error) from None
    return about, frames()


def _fit(frame: Tensor, height: int, width: int, fit: str) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width]: resized (bicubic, antialiased) to cover it and
    cropped, or padded."""
    H, W = frame.shape[1:]
    if (H, W) == (height, width):
        return frame
    scale = (max if fit == "crop" else min)(height / H, width / W)
    h, w = max(round(H * scale), 1), max(round(W * scale), 1)
    if fit == "crop":
        h, w = max(h, height), max(w, width)
    else:
        h, w = min(h, height), min(w, width)
    frame = F.interpolate(frame[None].float(), (h, w), mode="bicubic", antialias=True)[0]
    frame = frame.round().clamp(0, 255).to(torch.uint8)  # (3, h, w)
    top, left = abs(h - height) // 2, abs(w - width) // 2
    if fit == "crop":
        return frame[:, top : top + height, left : left + width]
    return F.pad(frame, (left, width - w - left, top, height - h - top))


def _floats(frames: list[Tensor]) -> Tensor:
    """uint8 [3, H, W] each -> float32 [1, 3, F, H, W] in [-1, 1]."""
    return torch.stack(frames, dim=1)[None].float().div_(127.5).sub_(1)


def _image(frame: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> [3, H, W]."""
    return torch.from_numpy(np.array(frame)).permute(2, 0, 1)


def _damage(about: About, seconds: float) -> str:
    """What to say where a file promises more picture than there is."""
    if seconds >= 0.9 * about.seconds - 0.125:
        return ""
    return (
        f", although the file promises {about.seconds:.1f} s: it is damaged, or its sound is longer"
        " than its picture"
    )


def read_frames(path: str | os.PathLike) -> Tensor:
    """Every frame of a video or picture as it is stored: float32 [1, 3, F, H, W] in [-1, 1].
    raises: UserError"""
    path = pathlib.Path(path).expanduser()
    about, frames = _open(path)
    video = _floats([_image(frame) for frame in frames])
    words = ", ".join(about.notes) + _damage(about, video.shape[2] / about.fps)
    if words:
        print(f"{path.name}: {words.lstrip(', ')}")
    return video


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
    width), cut to `frames`.

    fit: crop or pad (with black) to keep the proportions;  last: keep the last frames, not the
    first;  least: how many must be there (default: all `frames`). A video is read frame by frame:
    only what is kept costs memory.
    returns: float32 [1, 3, F, H, W] in [-1, 1], every value one of 256 levels, so that lossless
    files hold them exactly; and a sentence saying what was done.  raises: UserError if it cannot be
    read, has no picture, or is too short"""
    path = pathlib.Path(path).expanduser()
    if fit not in ("crop", "pad"):
        raise UserError(f"--fit {fit!r} must be crop or pad")
    about, found = _open(path, fps)
    kept, read, stored = deque(maxlen=frames if last else None), 0, ()
    for frame in found:
        stored, read = frame.shape[:2], read + 1
        kept.append(_fit(_image(frame), *size, fit))
        if frames and not last and read == frames:
            break
    found.close()
    damage = "" if frames and not last and read == frames else _damage(about, read / fps)
    wanted = least or frames or 1
    if read < wanted:
        raise UserError(
            f"{path} has {read} frame{'s' * (read != 1)} ({read / fps:.2f} s) at {fps} fps, but"
            f" {wanted} ({wanted / fps:.2f} s) are needed{damage}"
        )
    part = "" if not frames else "the last " if last else "the first "
    words = [f"{path.name}: {stored[0]}x{stored[1]}" + _fitted(stored, size, fit), *about.notes]
    if abs(about.fps - fps) >= 0.01:
        words.append(f"{about.fps:.4g} to {fps} fps")
    words.append(
        f"{part}{len(kept)} frame{'s' * (len(kept) != 1)} ({len(kept) / fps:.2f} s){damage}"
    )
    if about.has_sound:
        words.append("its sound is not kept")
    return _floats(list(kept)), ", ".join(words)


def _fitted(stored: tuple[int, ...], size: tuple[int, int], fit: str) -> str:
    return "" if tuple(stored) == tuple(size) else f" to {size[0]}x{size[1]} ({fit})"


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
            raise UserError(
                f"--out {path} must end in .mp4, .gif or .mkv (lossless), or .png for one frame"
            )

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
                f"{self.path}: an .mp4 needs even sides, not {height}x{width}; use .gif or crop it"
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
    for clip in video:
        shown = to_uint8(clip[:, picks.to(clip.device)])  # (columns, H, W, 3)
        rows.append(np.concatenate(list(shown), axis=1))
    sheet = np.concatenate(rows)
    scale = max(1, 96 // video.shape[-2])  # toy clips are enlarged to be seen
    with atomic(path) as tmp:
        iio.imwrite(tmp, sheet.repeat(scale, 0).repeat(scale, 1))
