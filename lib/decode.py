"""Any picture, animation or video becomes frames, by what it holds and not by its name.

Pillow (through imageio) reads pictures and animations, the ffmpeg program that comes with imageio
reads videos. What a file says about its picture is followed, and said (`About`).
"""

import math
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

from lib.common import UserError

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
    """uint8 [H, W, 4] over black: a transparent pixel's colour was not meant to be seen."""
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min() == 255:
        return colour
    about.note("transparent parts over black")
    return ((colour.astype(np.uint32) * alpha + 127) // 255).astype(np.uint8)


# ---------------------------------------------------------------- videos, by ffmpeg
def _ffmpeg(path: pathlib.Path, *after: str, decoder: str = "") -> list[str]:
    """The command that reads this file; -xerror: a damaged picture ends the video."""
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
