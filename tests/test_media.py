"""Video files come and go whole; sheets show the frames they say."""

import json
import os
import subprocess

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from lib.common import UserError
from lib.media import VideoWriter, load_clip, read_frames, to_uint8, videos_in, write_sheet
from lib.picture import write_curves


def ramp(frames, height, width):
    """A smooth clip [3, F, H, W] in [-1, 1]: every frame, side and channel is another."""
    f, h, w = (torch.linspace(-0.9, 0.9, n) for n in (frames, height, width))
    shape = frames, height, width
    return torch.stack(
        [
            f.view(-1, 1, 1).expand(shape),
            h.view(1, -1, 1).expand(shape),
            w.view(1, 1, -1).expand(shape),
        ]
    )


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
@pytest.mark.parametrize(
    "frames, height, width", [(9, 32, 32), (5, 48, 80), (5, 24, 40), (1, 32, 32)]
)  # multiples of 8, not all of 16
def test_video_comes_back(tmp_path, name, frames, height, width):
    """Frame count, size and the order of frames, sides and channels are exact; pixels are in [-1,
    1] and close."""
    clip = ramp(frames, height, width)
    with VideoWriter(tmp_path / name) as writer:
        for part in clip.split(2, dim=1):
            writer.write(part)
    back = read_frames(tmp_path / name)
    assert writer.count == frames and os.listdir(tmp_path) == [name]
    assert back.shape == (1, 3, frames, height, width) and back.dtype == torch.float32
    assert back.min() >= -1 and back.max() <= 1
    assert (back[0] - clip).abs().mean() < 0.04  # lossy; the steps between frames are 0.2 and more


def test_mp4_of_odd_size_is_not_resized(tmp_path):
    """H.264 needs even sides; other sizes are refused, never silently changed, and no file is
    left."""
    with pytest.raises(UserError, match="31x34"):
        with VideoWriter(tmp_path / "a.mp4") as writer:
            writer.write(ramp(3, 31, 34))
    assert os.listdir(tmp_path) == []


def test_video_is_absent_after_a_failure(tmp_path):
    """A clip that was not finished does not take the name, nor the place of an older one."""
    for old in (False, True):
        if old:
            (tmp_path / "a.mp4").write_text("old")
        with pytest.raises(ZeroDivisionError):
            with VideoWriter(tmp_path / "a.mp4") as writer:
                writer.write(ramp(3, 32, 32))
                raise ZeroDivisionError
        assert os.listdir(tmp_path) == ["a.mp4"] * old
    assert (tmp_path / "a.mp4").read_text() == "old"


def test_writer_refuses_other_formats(tmp_path):
    """The name is checked before any work."""
    with pytest.raises(UserError, match=r"x\.avi must end in \.mp4, \.gif or \.mkv"):
        VideoWriter(tmp_path / "x.avi")


def test_unreadable_clip_is_a_user_error(tmp_path):
    """Absent, empty and garbage files, and folders, are the user's mistakes; grey pictures are
    none."""
    iio.imwrite(tmp_path / "gray.png", np.full((32, 32), 7, np.uint8))
    assert to_uint8(read_frames(tmp_path / "gray.png")[0]).tolist() == [[[[7] * 3] * 32] * 32]
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "garbage.gif").write_bytes(bytes(range(256)))
    for name in ("absent.mp4", "empty.mp4", "garbage.gif", "folder.mp4"):
        with pytest.raises(UserError, match=name):
            read_frames(tmp_path / name)


def test_to_uint8_covers_the_range():
    """-1, 0 and 1 are 0, 128 and 255, beyond is clamped, and channels go last."""
    pixels = to_uint8(torch.tensor([-1.0, 0.0, 1.0, -9.0, 9.0]).view(1, 5, 1, 1).expand(3, 5, 1, 1))
    assert pixels.shape == (5, 1, 1, 3) and pixels[:, 0, 0, 2].tolist() == [0, 128, 255, 0, 255]


# ---------------------------------------------------------------- the user's clips
def ffmpeg(*words):
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, words)],
        check=True,
        timeout=60,
    )


def clock(path, *words, fps=30, seconds=2.0, height=20, width=36):
    """A lossless clip whose frame n has the grey level 2n; words: more for ffmpeg."""
    raw = path.with_suffix(".raw")
    np.concatenate(
        [np.full((height, width, 3), 2 * n, np.uint8) for n in range(round(fps * seconds))]
    ).tofile(raw)
    ffmpeg(
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width}x{height}",
        "-r",
        fps,
        "-i",
        raw,
        *words,
        "-c:v",
        "ffv1",
        path,
    )
    raw.unlink()
    return path


def levels(video):
    """The grey level of each frame, as 8 bits."""
    assert video.dtype == torch.float32 and video.shape[:2] == (1, 3)
    return to_uint8(video[0])[:, 8, 8, 0].tolist()


def test_clips_are_resampled_by_their_timestamps(tmp_path):
    """At 30 frames a second and at a variable rate: the last frame up to half a frame later; a .gif
    goes by its durations."""

    def expected(there: list[int], frames: int) -> list[int]:
        return [2 * max(n for n in there if n / 30 < f / 16 + 1 / 32) for f in range(frames)]

    video, says = load_clip(clock(tmp_path / "a.mkv"), (16, 16))
    assert video.shape == (1, 3, 32, 16, 16) and levels(video) == expected(range(60), 32)
    assert says == "a.mkv: 20x36 to 16x16 (crop), 30 to 16 fps, 32 frames (2.00 s)"
    uneven = clock(
        tmp_path / "b.mkv", "-vf", "select='lt(n,15)+not(mod(n,10))'", "-fps_mode", "vfr"
    )
    assert levels(load_clip(uneven, (16, 16))[0]) == expected(
        [*range(15), 20, 30, 40, 50], 27
    )  # the file ends with frame 50
    iio.imwrite(
        tmp_path / "c.gif",
        np.stack([np.full((16, 16, 3), v, np.uint8) for v in (0, 80, 160)]),
        duration=[500, 125, 250],
        loop=0,
    )
    assert levels(load_clip(tmp_path / "c.gif", (16, 16))[0]) == [0] * 8 + [80] * 2 + [160] * 4


def test_clips_are_cut_at_either_end(tmp_path):
    """`frames` counts from the start, or with `last` from the end; what is there already is exact
    and not touched."""
    path = clock(tmp_path / "a.mkv", fps=16, height=16, width=16)
    assert levels(load_clip(path, (16, 16))[0]) == list(range(0, 64, 2))
    assert levels(load_clip(path, (16, 16), frames=5)[0]) == [0, 2, 4, 6, 8]
    last, says = load_clip(path, (16, 16), frames=5, last=True)
    assert (
        levels(last) == [54, 56, 58, 60, 62] and says == "a.mkv: 16x16, the last 5 frames (0.31 s)"
    )
    assert torch.equal(
        last,
        torch.tensor([54.0, 56, 58, 60, 62])
        .div(127.5)
        .sub(1)
        .view(1, 1, 5, 1, 1)
        .expand(1, 3, 5, 16, 16),
    )


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (33, 35), (7, 9), (16, 24)])
def test_clips_are_fitted(shape, tmp_path):
    """Cropped clips fill the frame, padded ones have black bars; proportions and the middle stay.
    Every value is one of 256."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(y - height / 2 + 0.5, x - width / 2 + 0.5) < min(shape) / 4
    iio.imwrite(tmp_path / "a.png", np.stack([inside] * 3, -1).astype(np.uint8) * 255)
    for fit in ("crop", "pad"):
        video, _ = load_clip(tmp_path / "a.png", (16, 24), fit=fit)
        assert video.shape == (1, 3, 1, 16, 24) and torch.equal(
            video, (((video + 1) * 127.5).round() / 127.5 - 1)
        )
        scale = (max if fit == "crop" else min)(16 / height, 24 / width)
        disc = (video[0, 0, 0] > 0).nonzero().float()
        assert (
            disc.mean(0) - torch.tensor([7.5, 11.5])
        ).abs().max() < 0.6  # a round disc in the middle, as large as it should be
        assert abs(len(disc) - np.pi * (scale * min(shape) / 4) ** 2) < 0.25 * len(disc) + 4
    with pytest.raises(UserError, match="--fit 'squash' must be crop or pad"):
        load_clip(tmp_path / "a.png", (16, 24), fit="squash")


def test_clips_that_cannot_be_used(tmp_path):
    """Sound without picture, broken, empty and foreign files, and too little video: one sentence
    with what is needed and there."""
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "sound.mp4")
    clock(tmp_path / "whole.mkv")
    ffmpeg(
        "-i",
        tmp_path / "whole.mkv",
        "-c:v",
        "libx264",
        "-g",
        "5",
        "-pix_fmt",
        "yuv420p",
        tmp_path / "whole.mp4",
    )
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:1000])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "words.txt").write_text("no video")
    clock(tmp_path / "one.mkv", seconds=1 / 30)
    iio.imwrite(
        tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    )
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    for name, frames, says in (
        ("sound.mp4", None, "sound but no picture"),
        ("cut.mp4", None, "cannot be read"),
        ("empty.mp4", None, "cannot be read"),
        ("words.txt", None, "cannot be read"),
        ("cut.png", None, "cannot be read"),
        ("none.mp4", None, "does not exist"),
        ("one.mkv", 9, r"has 1 frame \(0.06 s\) at 16 fps, but 9 \(0.56 s\) are needed"),
        ("a.png", 13, "has 1 frame"),
        ("whole.mkv", 33, r"has 32 frames \(2.00 s\) at 16 fps, but 33"),
    ):
        for last in (False, True):
            with pytest.raises(UserError, match=says) as error:
                load_clip(tmp_path / name, (16, 16), frames=frames, last=last)
            assert name in str(error.value) and "\n" not in str(error.value)


def test_damaged_clips_end_where_the_damage_is(tmp_path):
    """No guessed pictures: what comes before the damage can be used, and the sentence says that the
    file promised more."""
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "testsrc2=size=64x48:rate=16:duration=4",
        "-g",
        "8",
        "-pix_fmt",
        "yuv420p",
        tmp_path / "a.mp4",
    )
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    half = len(data) // 2
    data[half : half + 2000] = bytes(b ^ 0x5A for b in data[half : half + 2000])
    (tmp_path / "b.mp4").write_bytes(data)
    video, says = load_clip(tmp_path / "b.mp4", (48, 64))
    whole, _ = load_clip(tmp_path / "a.mp4", (48, 64))
    assert 9 <= video.shape[2] < 60 and torch.equal(video, whole[:, :, : video.shape[2]])
    assert "although the file promises 4.0 s: it is damaged" in says
    assert "damaged" not in load_clip(tmp_path / "b.mp4", (48, 64), frames=9)[1]


# ---------------------------------------------------------------- what a file says of itself
def grey(values):
    """[H, W] -> the picture's levels as read."""
    return np.tile(np.asarray(values), (48, 1))


RAMP = np.arange(64, dtype=np.uint8) * 4
DEEP = {  # the same ramp in other types of numbers; white is 252
    "sixteen.png": grey(RAMP).astype(np.uint16) * 257,
    "sixteen.tiff": grey(RAMP).astype(np.uint16) * 257,
    "float.tiff": grey(RAMP).astype(np.float32) / 255,
    "float255.tiff": grey(RAMP).astype(np.float32),
    "eight.bmp": np.stack([grey(RAMP)] * 3, -1),
}


@pytest.mark.parametrize("name, values", DEEP.items(), ids=DEEP)
def test_deep_pictures_keep_their_levels(name, values, tmp_path):
    """16 bit and float pictures are scaled, not cut, and it is said; the name does not matter, the
    content does."""
    iio.imwrite(tmp_path / name, values)
    (tmp_path / name).rename(tmp_path / "picture.jfif")
    video, says = load_clip(tmp_path / "picture.jfif", (48, 64))
    assert to_uint8(video[0])[0, 7, :, 1].tolist() == RAMP.tolist()
    assert ("scaled to 8 bits" in says) == (values.dtype != np.uint8)
    assert torch.equal(read_frames(tmp_path / "picture.jfif"), video)  # the same reader


def test_what_is_transparent_is_black(tmp_path, capsys):
    """The colour that a file has under alpha 0 was never to be seen; half of it is half, palettes
    and videos alike."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., :3], rgba[:, 8:, 3] = (200, 0, 100), 128
    for name in ("a.png", "a.webp", "a.tga"):
        iio.imwrite(tmp_path / name, rgba, **({"lossless": True} if name == "a.webp" else {}))
        video, says = load_clip(tmp_path / name, (16, 16))
        left, right = to_uint8(video[0])[0, 4, [2, 12]].tolist()
        assert (
            left == [0, 0, 0] and right == [100, 0, 50] and "transparent parts over black" in says
        )
    read_frames(tmp_path / "a.png")
    assert capsys.readouterr().out == "a.png: transparent parts over black\n"
    clear = "color=magenta:s=64x48:r=16:d=0.5,format=rgba,colorchannelmixer=aa=0"
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        clear,
        "-c:v",
        "libvpx-vp9",
        "-pix_fmt",
        "yuva420p",
        tmp_path / "v.webm",
    )
    video, says = load_clip(tmp_path / "v.webm", (48, 64))
    assert to_uint8(video[0]).max() <= 2 and "transparent parts over black" in says


MOVING = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate=16:duration=2")


@pytest.mark.parametrize(
    "name", "a.ts a.mts a.m2ts a.m4v a.3gp a.mxf a.ogv a.flv a.mov a.vob a.wmv bare".split()
)
def test_containers_are_known_by_content(name, tmp_path):
    """Any container that ffmpeg reads, under any name; 32 frames are 32 frames."""
    codec = {"a.mxf": ["-c:v", "mpeg2video", "-r", "25"], "a.ogv": ["-c:v", "libtheora"]}
    codec |= {"a.vob": codec["a.mxf"], "bare": ["-f", "mp4"], "a.3gp": ["-c:v", "libx264"]}
    ffmpeg(*MOVING, "-pix_fmt", "yuv420p", *codec.get(name, []), tmp_path / name)
    video, says = load_clip(tmp_path / name, (48, 64))
    assert video.shape[2] == 32 and video[:, :, 0].std() > 0.3 and "damaged" not in says


def test_text_and_playlists_are_no_videos(tmp_path):
    """ffmpeg would draw a text file as a picture, and follow a playlist to other files; we do
    neither."""
    ffmpeg(*MOVING, tmp_path / "a.ts")
    (tmp_path / "w.txt").write_text("hello\n" * 50)
    (tmp_path / "l.m3u8").write_text("#EXTM3U\n#EXTINF:2,\na.ts\n")
    (tmp_path / "c.ffconcat").write_text("ffconcat version 1.0\nfile a.ts\n")
    for name in ("w.txt", "l.m3u8", "c.ffconcat"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a video or picture"):
            load_clip(tmp_path / name, (48, 64))


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    """A disc stays a disc, whichever side its pixels are stretched to."""
    for name, width, height, ratio in (("a.mp4", 32, 64, "2/1"), ("b.mp4", 64, 32, "1/2")):
        disc = f"hypot((X-{width // 2})*{64 // width},(Y-{height // 2})*{64 // height})"
        drawn = f"color=black:s={width}x{height}:r=16:d=1"
        drawn += f",geq=lum='if(lt({disc},20),255,0)':cb=128:cr=128"
        ffmpeg(
            "-f", "lavfi", "-i", f"{drawn},setsar={ratio}", "-pix_fmt", "yuv420p", tmp_path / name
        )
        video, says = load_clip(tmp_path / name, (64, 64), fit="pad")
        bright = video[0, 0, 3] > 0
        sides = bright.any(1).sum().item(), bright.any(0).sum().item()
        assert all(abs(side - 39) <= 1 for side in sides), sides
        assert f"pixels of {ratio.replace('/', ':')} made square" in says and "64x64" in says


def test_a_picture_that_begins_late_begins_with_its_first_frame(tmp_path):
    """No frozen frames are put before it, and a file whose clock begins at 5 s is not damaged."""
    ffmpeg(*MOVING, "-pix_fmt", "yuv420p", tmp_path / "a.mp4")
    plain = load_clip(tmp_path / "a.mp4", (48, 64))[0]
    sound = ("-f", "lavfi", "-i", "sine=duration=2")
    late = (*sound, "-itsoffset", "1", "-i", tmp_path / "a.mp4", "-map", "1:v", "-map", "0:a")
    ffmpeg(*late, "-c:v", "copy", "-c:a", "aac", tmp_path / "late.mp4")
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-output_ts_offset", "5", tmp_path / "off.mkv")
    for name, words in (
        ("late.mp4", ["its picture begins 1.00 s after its sound", "its sound is not kept"]),
        ("off.mkv", []),
    ):
        video, says = load_clip(tmp_path / name, (48, 64))
        assert torch.equal(video, plain) and "damaged" not in says
        assert all(word in says for word in words)
        assert torch.equal(read_frames(tmp_path / name), plain)


def test_interlaced_fields_are_put_together(tmp_path):
    """A moving edge of an interlaced video has no comb."""
    edge = (
        "color=black:s=64x48:r=50:d=1,drawbox=w=20:h=48:color=white:t=fill,scroll=horizontal=0.06"
    )
    ffmpeg("-f", "lavfi", "-i", f"{edge},interlace=scan=tff:lowpass=off", "-c:v", "mpeg2video",
           "-flags", "+ildct+ilme", "-q:v", "2", tmp_path / "a.mpg")  # fmt: skip
    video, says = load_clip(tmp_path / "a.mpg", (48, 64))
    rows = to_uint8(video[0])[..., 1].astype(float)
    comb = np.abs(rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).mean()
    assert rows.std() > 50 and comb < 0.5 and "deinterlaced" in says


@pytest.mark.parametrize("transfer, name", [("arib-std-b67", "HLG"), ("smpte2084", "PQ")])
def test_high_dynamic_range_is_tone_mapped(transfer, name, tmp_path):
    """Greys of ordinary brightness come back as they were, near white a little darker; it is
    said."""
    for level in (32, 128, 240):
        colour = f"color=0x{level:02x}{level:02x}{level:02x}:s=64x48:r=16:d=0.3"
        tags = "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"
        wide = f"zscale=transfer={transfer}:primaries=bt2020:matrix=bt2020nc,format=yuv420p10le"
        marks = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
        ffmpeg("-f", "lavfi", "-i", colour, "-vf", f"{tags},{wide}", "-c:v", "libx265",
               "-x265-params", marks, tmp_path / "a.mp4")  # fmt: skip
        video, says = load_clip(tmp_path / "a.mp4", (48, 64))
        assert abs(to_uint8(video[0])[2, 20, 20].astype(int) - level).max() <= 4
        assert f"high dynamic range ({name}) tone-mapped" in says


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
@pytest.mark.parametrize(
    "durations, shown, note",
    [([500, 125, 250], [8, 2, 4], ""), (0, [2, 2, 1], "shown for 0.1 s"), (1000, [16] * 3, "")],
)
def test_animations_are_as_long_as_they_say(name, durations, shown, note, tmp_path):
    """Each frame has its own duration, in every format; 0 is a tenth of a second, and said."""
    shades = [np.full((16, 16, 3), v, np.uint8) for v in (0, 80, 160)]
    first, *others = map(Image.fromarray, shades)
    how = {"lossless": True} if name == "a.webp" else {}
    first.save(tmp_path / name, save_all=True, append_images=others, duration=durations, **how)
    video, says = load_clip(tmp_path / name, (16, 16))
    expected = np.repeat([0, 80, 160], shown)
    assert video.shape[2] == len(expected) and np.abs(levels(video) - expected).max() <= 2
    assert note in says and ("0.1 s" in says) == bool(note)
    assert read_frames(tmp_path / name).shape[2] == 3


@pytest.mark.parametrize("name, kind", [("a.jpg", "MPO"), ("a.tif", "TIFF")])
def test_pages_are_no_frames(name, kind, tmp_path):
    """A photo with a preview or gain map behind it, a scan of pages: the first, and it is said."""
    first = Image.fromarray(np.full((48, 64, 3), 80, np.uint8))
    with open(tmp_path / name, "wb") as file:
        if kind == "TIFF":
            iio.imwrite(file, np.stack([np.asarray(first)] * 2), extension=".tif")
        else:
            first.save(file, kind, save_all=True, append_images=[first.resize((32, 24))])
    video, says = load_clip(tmp_path / name, (48, 64))
    assert video.shape[2] == 1 and "the first of its 2 pictures" in says
    assert torch.equal(read_frames(tmp_path / name), video)


LAVFI = ("-f", "lavfi", "-i")
GREY = "color=0x808080:s=64x48:r=16:d=0.3"
TO_BT2020 = (
    "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709,"
    "zscale=transfer=2020_10:primaries=bt2020:matrix=bt2020nc,format=yuv420p10le"
)
SAID = {  # file -> how it is made, and what must be said
    "aspect.mkv": (
        (*MOVING, "-aspect", "8:3", "-c:v", "libx264"),
        "48x128 to 48x64 (crop), pixels of 2:1 made square",
    ),
    "untagged.mkv": (
        (*LAVFI, GREY, "-vf", "setparams=color_trc=smpte2084", "-c:v", "ffv1"),
        "high dynamic range (PQ) tone-mapped",
    ),
    "wide.mkv": (
        (*LAVFI, GREY, "-vf", TO_BT2020, "-c:v", "ffv1"),
        "wide colours (bt2020) made those of BT.709",
    ),
    "film.mjpeg": ((*MOVING, "-c:v", "mjpeg"), "25 to 16 fps, 20 frames"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_converted_is_said(name, tmp_path):
    """A pixel aspect that the container has, colours of other primaries or half described, a bare
    stream of pictures."""
    how, says = SAID[name]
    ffmpeg(*how, tmp_path / name)
    assert says in load_clip(tmp_path / name, (48, 64))[1]


def test_wide_colours_come_back(tmp_path):
    """BT.2020 without high dynamic range is not washed out."""
    drawn = GREY.replace("808080", "804020") + ",format=gbrp"
    to_yuv = "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p10le,"
    ffmpeg(*LAVFI, drawn, "-vf", to_yuv + TO_BT2020, "-c:v", "ffv1", tmp_path / "a.mkv")
    video, _ = load_clip(tmp_path / "a.mkv", (48, 64))
    assert abs(to_uint8(video[0])[2, 20, 20].astype(int) - (128, 64, 32)).max() <= 3


def test_what_is_no_file_or_no_whole_picture_is_refused(tmp_path, monkeypatch):
    """A pipe, numbers beyond 16 bits, and a phone's picture in tiles, of which ffmpeg would show
    one."""
    os.mkfifo(tmp_path / "pipe")
    iio.imwrite(tmp_path / "deep.tiff", np.full((8, 8), 70000, np.int32))
    (tmp_path / "a.heic").write_bytes(b"tiles")
    for name, says in (("pipe", "pipe is no file"), ("deep.tiff", "pixels up to 70000")):
        with pytest.raises(UserError, match=says):
            load_clip(tmp_path / name, (8, 8))
    says = b"Stream group #0:0: Tile Grid: hevc\n  Stream #0:0: Video: hevc, yuv420p, 512x512\n"
    asked = subprocess.CompletedProcess([], 1, stderr=says)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: asked)
    with pytest.raises(UserError, match="a picture in tiles, as phones make; save it as .png"):
        load_clip(tmp_path / "a.heic", (8, 8))


def test_the_videos_of_a_folder(tmp_path, capsys):
    """Hidden files, folders and what is no video by name are none; what is left out is said, but
    for notes."""
    names = "b.mkv a.MP4 c.mts d.gif ._a.mp4 .b.12.tmp.mkv a.txt a.mp4.json sheet.png bare"
    for name in names.split():
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    assert [p.name for p in videos_in(tmp_path)] == ["a.MP4", "b.mkv", "c.mts", "d.gif"]
    assert "3 left out, no video by name: bare, folder.mp4, sheet.png" in capsys.readouterr().out


def test_nan_is_not_written(tmp_path):
    """Pixels that are not numbers would be black: refused, with the frames, and no file."""
    with pytest.raises(FloatingPointError, match="frames 3 to 5 of"):
        with VideoWriter(tmp_path / "a.mkv") as writer:
            writer.write(ramp(3, 16, 16))
            writer.write(ramp(3, 16, 16).log())
    with pytest.raises(FloatingPointError, match="sheet.png: .*NaN"):
        write_sheet(tmp_path / "sheet.png", ramp(3, 16, 16).log()[None])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "clips, frames, height, width, size",
    [
        (2, 9, 32, 48, (192, 5 * 144)),  # enlarged three times
        (1, 9, 128, 96, (128, 5 * 96)),
        (3, 2, 96, 64, (288, 2 * 64)),
    ],
)  # fewer frames than columns
def test_sheet_has_a_row_per_clip(tmp_path, clips, frames, height, width, size):
    """The PNG shows the first, the last and evenly spaced frames of each clip, side by side."""
    import imageio.v3 as iio

    batch = torch.stack(
        [
            ramp(frames, height, width).flip(1) if b else ramp(frames, height, width)
            for b in range(clips)
        ]
    )
    write_sheet(tmp_path / "s.png", batch, columns=5)
    sheet = iio.imread(tmp_path / "s.png")
    assert sheet.shape == (*size, 3) and os.listdir(tmp_path) == ["s.png"]
    red = sheet[0, :: size[1] // min(frames, 5), 0].tolist()
    assert red == sorted(set(red)) and red[0] == 13 and red[-1] == 242  # the ramp over time


def test_curves_show_every_number(tmp_path):
    """One strip per logged number, named; a rising curve goes from the lower left to the upper
    right."""
    (tmp_path / "log").write_text(
        "".join(json.dumps({"step": i, "loss": float(i), "other": 1.0}) + "\n" for i in range(20))
    )
    write_curves(tmp_path / "c.png", tmp_path / "log")
    image = iio.imread(tmp_path / "c.png")
    assert image.shape == (120, 730, 3)
    written = (image == 60).all(2)[:, :130]
    assert (
        written[:60].sum() > 100 < written[60:].sum() and (written[20:40] != written[80:100]).any()
    )  # loss, other
    dark = (image[:60, 130:] == (40, 90, 160)).all(2)
    assert (
        dark[-10:, 0].any() and dark[:10, -1].any() and not dark[:10, 0].any() and dark.any(0).all()
    )
