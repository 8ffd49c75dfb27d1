"""The picture on top of README: small, made by its script, backward, and its anchors vanish."""

import imageio.v3 as iio
import numpy as np
import pytest
from pages import ROOT

import anchors
from lib.common import UserError, from_cli
from tools import hero
from tools.plan import COLOURS

YELLOW, GREEN = COLOURS["a"], COLOURS["T"]


def area(picture: np.ndarray, colour: tuple[int, ...]) -> int:
    """How many pixels of a picture have this colour."""
    return int((picture == np.array(colour, np.uint8)).all(-1).sum())


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """The animation of a backward plan of nine latents whose frames are plain red."""
    frames = [np.full((8, 8, 3), (255, 0, 0), np.uint8)] * 9
    return hero.film_of(anchors.backward(9), frames)[0]


def test_anchors_appear_and_vanish(pictures):
    """Yellow while a step is denoised, gone when it is done; the last step has none."""
    shown = [area(picture, YELLOW) for picture in pictures]
    done = [n for n in range(1, len(shown), 2)]
    assert len({shown[n] for n in done} | {shown[-2]}) == 1, "only the legend's square is left"
    assert shown[0] > shown[1] and shown[2] > shown[1]


def test_frames_appear_backward(pictures):
    """Each step adds three frames, and they stand before those that are there."""
    red = [(picture == (255, 0, 0)).all(-1) for picture in pictures[1::2]]
    amounts = [int(mask.sum()) for mask in red]
    assert amounts[0] > 0 and amounts == [amounts[0] * n for n in (1, 2, 3)]
    for before, after in zip(red, red[1:]):
        assert (after & before).sum() == before.sum(), "a frame that was shown is gone"


def test_wrong_input_is_said():
    """An order that is no direction, or a file that is no GIF, is refused before any work."""
    with pytest.raises(UserError, match="forward or backward"):
        from_cli(hero.Config, ["--order", "sideways"])
    with pytest.raises(UserError, match=r"\.gif"):
        hero.main(hero.Config(out="hero.mp4", weights="nowhere"))


def test_readme_picture_is_small():
    """The picture that README shows is there, animated, and at most 1 MB."""
    path = ROOT / "assets" / "hero.gif"
    assert path.stat().st_size <= 1_000_000
    assert len(iio.imread(path)) == 2 * len(anchors.backward(21).steps)
