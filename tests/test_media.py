"""Video files come and go whole; sheets show the frames they say."""
import json
import os

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from common import UserError
from media import VideoWriter, read_frames, to_uint8, write_curves, write_sheet


def ramp(frames, height, width):
    """A smooth clip [3, F, H, W] in [-1, 1]: every frame, side and channel is another."""
    f, h, w = (torch.linspace(-0.9, 0.9, n) for n in (frames, height, width))
    shape = frames, height, width
    return torch.stack([f.view(-1, 1, 1).expand(shape), h.view(1, -1, 1).expand(shape), w.view(1, 1, -1).expand(shape)])


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
@pytest.mark.parametrize("frames, height, width", [(9, 32, 32), (5, 48, 80), (5, 24, 40), (1, 32, 32)])  # multiples of 8, not all of 16
def test_video_comes_back(tmp_path, name, frames, height, width):
    """Frame count, size and the order of frames, sides and channels are exact; pixels are in [-1, 1] and close."""
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
    """H.264 needs even sides; other sizes are refused, never silently changed, and no file is left."""
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
    with pytest.raises(UserError, match=r"x\.avi must end in \.mp4 or \.gif"):
        VideoWriter(tmp_path / "x.avi")


def test_unreadable_clip_is_a_user_error(tmp_path):
    """Absent, empty, garbage files, and pictures without colour, are the user's mistakes."""
    import imageio.v3 as iio
    iio.imwrite(tmp_path / "gray.png", np.zeros((32, 32), np.uint8))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "garbage.gif").write_bytes(bytes(range(256)))
    for name in ("absent.mp4", "empty.mp4", "garbage.gif", "gray.png"):
        with pytest.raises(UserError, match=name):
            read_frames(tmp_path / name)


def test_to_uint8_covers_the_range():
    """-1, 0 and 1 are 0, 128 and 255, beyond is clamped, and channels go last."""
    pixels = to_uint8(torch.tensor([-1.0, 0.0, 1.0, -9.0, 9.0]).view(1, 5, 1, 1).expand(3, 5, 1, 1))
    assert pixels.shape == (5, 1, 1, 3) and pixels[:, 0, 0, 2].tolist() == [0, 128, 255, 0, 255]


@pytest.mark.parametrize("clips, frames, height, width, size", [
    (2, 9, 32, 48, (192, 5 * 144)),   # enlarged three times
    (1, 9, 128, 96, (128, 5 * 96)),
    (3, 2, 96, 64, (288, 2 * 64))])   # fewer frames than columns
def test_sheet_has_a_row_per_clip(tmp_path, clips, frames, height, width, size):
    """The PNG shows the first, the last and evenly spaced frames of each clip, side by side."""
    import imageio.v3 as iio
    batch = torch.stack([ramp(frames, height, width).flip(1) if b else ramp(frames, height, width) for b in range(clips)])
    write_sheet(tmp_path / "s.png", batch, columns=5)
    sheet = iio.imread(tmp_path / "s.png")
    assert sheet.shape == (*size, 3) and os.listdir(tmp_path) == ["s.png"]
    red = sheet[0, ::size[1] // min(frames, 5), 0].tolist()
    assert red == sorted(set(red)) and red[0] == 13 and red[-1] == 242  # the ramp over time


def test_curves_show_every_number(tmp_path):
    """One strip per logged number; a rising curve goes from the lower left to the upper right."""
    (tmp_path / "log").write_text("".join(json.dumps({"step": i, "loss": float(i), "other": 1.0}) + "\n" for i in range(20)))
    write_curves(tmp_path / "c.png", tmp_path / "log")
    image = iio.imread(tmp_path / "c.png")
    assert image.shape == (120, 600, 3)
    dark = (image[:60] == (40, 90, 160)).all(2)
    assert dark[-10:, 0].any() and dark[:10, -1].any() and not dark[:10, 0].any() and dark.any(0).all()
