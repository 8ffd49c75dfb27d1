"""The toy world draws what the caption says, the same way every time, and `measure` reads it back.

python -m pytest tests/test_world.py
"""

import pytest
import torch
import torch.nn.functional as F

from toy import world
from toy.world import COLOURS, DIRECTIONS, SHAPES, accuracy, measure, parse, random_captions, render

KEYS = ("colour", "shape", "direction", "ground", "all")


@pytest.fixture(scope="module")
def captions():
    return random_captions(200, torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def video(captions):
    return render(captions, range(500, 700))


def halved(video):
    """Half the resolution and back, with noise."""
    small = F.avg_pool3d(video, (1, 2, 2))
    return F.interpolate(small, size=video.shape[2:], mode="trilinear") + 0.03 * torch.randn(
        video.shape, generator=torch.Generator().manual_seed(0)
    )


def boxed(video):
    """A 3 x 3 box blur."""
    return F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)


def smeared(video):
    """A box blur over 3 frames as well, less contrast and some noise."""
    blurred = F.avg_pool3d(boxed(video), (3, 1, 1), 1, (1, 0, 0), count_include_pad=False)
    return 0.85 * blurred + 0.05 * torch.randn(
        video.shape, generator=torch.Generator().manual_seed(0)
    )


def assert_all(found, least):
    assert set(found) == set(KEYS)
    assert min(found.values()) >= least, found


def test_shape_type_and_range(video):
    assert video.shape == (200, 3, 81, 32, 32) and video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1 and video.isfinite().all()
    large = render(["a red disc moves left over a blue wave"], [0], size=64, frames=5)
    assert large.shape == (1, 3, 5, 64, 64)


def test_deterministic_and_independent_of_the_batch(captions, video):
    assert torch.equal(render(captions[:9], range(500, 509)), video[:9])
    assert torch.equal(render(captions[7:8], torch.tensor([507])), video[7:8])
    order = [150, 3, 42, 7, 199]
    assert torch.equal(render([captions[i] for i in order], [500 + i for i in order]), video[order])
    state = torch.get_rng_state()
    render(captions[:1], [1], frames=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("frames", [1, 5, 21, 41])
def test_frames_only_cuts_the_length(captions, video, frames):
    assert torch.equal(
        render(captions[:30], range(500, 530), frames=frames), video[:30, :, :frames]
    )


def test_seed_and_every_word_change_the_clip():
    base = "a red disc moves left over a blue wave"
    others = [
        "a green disc moves left over a blue wave",
        "a red ring moves left over a blue wave",
        "a red disc moves up over a blue wave",
        "a red disc moves left over a cyan wave",
    ]
    clips = render([base, base, *others], [1, 2, 1, 1, 1, 1], frames=9)
    assert all(not torch.equal(clips[0], clip) for clip in clips[1:])


def test_measure_is_exact(captions, video):
    assert_all(accuracy(video, captions), 0.99)


def test_measure_is_exact_at_64(captions):
    assert_all(accuracy(render(captions[:40], range(40), size=64, frames=41), captions[:40]), 0.99)


@pytest.mark.parametrize("frames", [21, 41])
def test_measure_is_exact_on_prefixes(captions, video, frames):
    assert_all(accuracy(video[:, :, :frames], captions), 0.99)


@pytest.mark.parametrize("degrade", [halved, boxed, smeared])
def test_measure_survives_a_blurry_decoder(captions, video, degrade):
    assert_all(accuracy(degrade(video[:, :, :41]), captions), 0.97)


def test_every_word_is_drawn_and_read():
    captions = [
        f"a {c} {s} moves {d} over a {c} wave" for c in COLOURS for s in SHAPES for d in DIRECTIONS
    ]
    assert_all(accuracy(render(captions, range(len(captions)), frames=21), captions), 0.99)


def test_direction_holds_at_any_moment(captions, video):
    for start in (0, 20, 40, 60, 76):
        assert accuracy(video[:, :, start : start + 5], captions)["direction"] >= 0.99


def test_wrong_captions_score_nothing(video, captions):
    def after(words, word):
        return words[(words.index(word) + 1) % len(words)]

    wrong = []
    for said in map(parse, captions):
        colour, ground = after(COLOURS, said["colour"]), after(COLOURS, said["ground"])
        shape = after(SHAPES, said["shape"])
        wrong.append(
            f"a {colour} {shape} moves {after(DIRECTIONS, said['direction'])} over a {ground} wave"
        )
    assert max(accuracy(video[:, :, :21], wrong).values()) <= 0.01


@pytest.mark.parametrize("scale", [0.1, 0.3, 0.6, 1.0])
def test_noise_scores_no_better_than_chance(captions, scale):
    noise = scale * torch.randn(100, 3, 9, 32, 32, generator=torch.Generator().manual_seed(2))
    found = accuracy(noise, captions[:100])
    assert max(found.values()) <= 0.4 and found["all"] <= 0.05, (
        found
    )  # chance is at most 1/4 +- 0.04


@pytest.mark.parametrize("frames", [1, 2, 9])
@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_measure_finds_nothing_in_a_flat_video(frames, level):
    nothing = dict.fromkeys(KEYS[:4], "none")
    assert measure(torch.full((2, 3, frames, 32, 32), level)) == [nothing, nothing]


def test_measure_of_a_still_or_full_or_broken_video():
    still = render(["a red ring moves left over a cyan wave"], [3], frames=1)
    expected = {"colour": "red", "shape": "ring", "direction": "none", "ground": "cyan"}
    assert measure(still) == measure(still.expand(-1, -1, 9, -1, -1)) == [expected]
    full = torch.tensor([1.0, -1, -1]).reshape(1, 3, 1, 1, 1).expand(1, 3, 9, 32, 32)
    assert measure(full)[0]["shape"] == "none"
    assert measure(torch.full((1, 3, 9, 32, 32), float("nan")))[0]["colour"] == "none"


def test_random_captions_parse_and_cover_the_vocabulary(captions):
    assert {word for caption in captions for word in caption.split()} == set(world.VOCABULARY)
    assert len(set(world.VOCABULARY)) == len(world.VOCABULARY)
    assert random_captions(200, torch.Generator().manual_seed(5)) == captions
    said = parse("a cyan ring moves down over a red wave")
    assert said == {"colour": "cyan", "shape": "ring", "direction": "down", "ground": "red"}


@pytest.mark.parametrize(
    "caption, named",
    [
        (
            "a purple disc moves left over a blue wave",
            ["'purple'", "red, green, blue, yellow, magenta, cyan"],
        ),
        ("a red dog moves left over a blue wave", ["'dog'", "disc, square, cross, ring"]),
        ("a red disc moves away over a blue wave", ["'away'", "left, right, up, down"]),
        ("a red disc moves left over a blue", ["word 9", "missing", "wave"]),
        ("a red disc moves left over a blue wave twice", ["'twice'"]),
        ("", ["word 1", "missing"]),
    ],
)
def test_a_caption_outside_the_grammar_is_refused(caption, named):
    with pytest.raises(ValueError) as error:
        parse(caption)
    assert all(name in str(error.value) for name in named)


def test_render_wants_one_seed_per_caption(captions):
    with pytest.raises(ValueError, match="a seed per caption"):
        render(captions[:2], [1])
