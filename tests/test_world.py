"""The toy world draws what the caption says, the same way every time, and `measure` reads it back.

python -m pytest tests/test_world.py
"""

import pytest
import torch
import torch.nn.functional as F

from toy import world
from toy.world import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    KNOWN,
    SHAPES,
    accuracy,
    hits,
    identity,
    measure,
    outline,
    parse,
    random_captions,
    render,
)

KEYS = ("colour", "shape", "direction", "ground", "caption")


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
    assert max(found.values()) <= 0.4 and found["caption"] <= 0.05, (
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
        ("a red dog moves left over a blue wave", ["'dog'", "disc, square, triangle, ring"]),
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


# ---------------------------------------------------------------- held out
def test_captions_are_held_out_by_number():
    """One caption in eight is held out; clips between the two numbers have those and no others have
    them."""
    share = len(world.captions_of("new")) / len(world.captions_of("all"))
    assert 0.08 < share < 0.17
    for number, out in (
        (0, False),
        (7, False),
        (HELD_OUT, True),
        (KNOWN - 1, True),
        (KNOWN, False),
    ):
        assert world.held_out(world.caption(number)) == out, number
        assert world.caption(number) == world.caption(number)
    assert len({world.caption(HELD_OUT + n) for n in range(40)}) > 20


def test_hits_are_the_words_that_show(video, captions):
    """Clip by clip what `accuracy` is the mean of; a clip under another's caption misses the words
    in which they differ."""
    right, wrong = hits(video[:9], captions[:9]), hits(video[:9], captions[1:10])
    assert set(right) == set(KEYS) and all(
        hit.dtype == torch.bool and hit.all() for hit in right.values()
    )
    for key in KEYS[:4]:
        same = [parse(a)[key] == parse(b)[key] for a, b in zip(captions, captions[1:10])]
        assert wrong[key].tolist() == same
    assert torch.equal(right["caption"], right["colour"] & right["shape"] & right["direction"])


# ---------------------------------------------------------------- outlines
@pytest.mark.parametrize("size", [32, 64])
def test_a_true_clip_fills_its_outline_and_no_other(size):
    """At any angle and place, over any ground and with the ball before it."""
    captions = [
        f"a {c} {shape} moves up over a {g} wave"
        for c in COLOURS
        for g in COLOURS
        for shape in SHAPES
        if c != g
    ]
    video = render(captions, range(len(captions)), size)
    assert outline(video, captions).min() > 0.94
    for other in SHAPES:
        named = [" ".join([*c.split()[:2], other, *c.split()[3:]]) for c in captions]
        wrong = torch.tensor([parse(c)["shape"] != other for c in captions])
        assert outline(video, named)[wrong].max() < 0.8


@pytest.mark.parametrize("half, radius", [(6.0, 99.0), (5.3, 6.2), (5.3, 5.8)])
def test_what_a_square_lacks_or_has_too_much_costs_outline_though_it_still_is_read(half, radius):
    """By hand, at 128 pixels: squares of half a side `half` whose corners end at `radius`."""
    place = (torch.arange(128) + 0.5) / 4 - 16
    across, down = place.abs()[None], place.abs()[:, None]
    true = torch.maximum(across, down) < 5.3
    drawn = (torch.maximum(across, down) < half) & (across**2 + down**2 < radius**2)
    video = torch.full((1, 3, 1, 128, 128), 0.10)
    video[:, 2] = 0.34  # a blue ground without waves
    video[0, :, 0, drawn] = torch.tensor([0.98, 0.04, 0.04])[:, None]
    expected = (true & drawn).sum() / (true | drawn).sum()
    assert measure(2 * video - 1)[0]["shape"] == "square" and expected < 0.97
    found = outline(2 * video - 1, ["a red square moves left over a blue wave"])
    assert found.item() == pytest.approx(expected.item(), abs=0.02)


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0, float("nan")])
def test_nothing_has_no_outline(level):
    nothing = torch.full((1, 3, 9, 32, 32), level)
    assert outline(nothing, ["a red disc moves up over a blue wave"]) < 0.1


# ---------------------------------------------------------------- speed
def test_slow_motion_is_the_same_clip():
    """At a quarter of the speed every fourth frame is one of the clip at full speed; at 1 nothing
    changes."""
    captions = ["a red disc moves left over a blue wave", "a cyan ring moves up over a red wave"]
    slow = render(captions, [3, 4], frames=33, speed=0.25)
    assert torch.allclose(slow[:, :, ::4], render(captions, [3, 4], frames=9), atol=1e-6)
    assert torch.equal(render(captions, [3, 4], speed=1.0), render(captions, [3, 4]))


# ---------------------------------------------------------------- what no word says
def apart(a, b):
    """Mean distance of the features of the same clips, over that of different clips in `b`: per
    thing."""
    found = {}
    for key in a:
        every = torch.cdist(b[key], b[key])
        unit = every[~torch.eye(len(every), dtype=torch.bool)].nanmean()
        same = (a[key] - b[key]).norm(dim=1)
        assert same.isnan().float().mean() < 0.05, key  # the ball may hide behind the sprite
        found[key] = (same.nanmean() / unit).item()
    return found


def test_identity_stays_in_a_clip(video):
    """First and last third of 5 s, frame by frame other pictures: the same ball and ground; those
    of other clips are not."""
    first, last = (identity(video[:48, :, part]) for part in (slice(0, 27), slice(54, 81)))
    assert all(
        x.shape == (48, 2) and not x.isnan().any() for x in (*first.values(), *last.values())
    )
    found = apart(first, last)
    assert found["ball"] < 0.1 and found["ground"] < 0.01, found
    shuffled = apart({k: x.roll(1, 0) for k, x in first.items()}, last)
    assert 0.7 < shuffled["ball"] < 1.3 and 0.7 < shuffled["ground"] < 1.3, shuffled


@pytest.mark.parametrize("degrade", [halved, boxed, smeared])
def test_identity_survives_a_blurry_decoder(degrade, video):
    """Blur pales both a little, as it does everywhere: pieces of one clip stay far nearer than
    clips are."""
    blurred = degrade(video[:48])
    first, last = (identity(blurred[:, :, part]) for part in (slice(0, 27), slice(54, 81)))
    assert max(apart(first, last).values()) < 0.2
    assert max(apart(identity(blurred), identity(video[:48])).values()) < 0.5


def test_pan_is_in_pixels_a_frame_at_any_size():
    """Pan is .5 to .8 by construction; slow motion halves it; a larger picture does not change
    it."""
    captions = random_captions(12, torch.Generator().manual_seed(1))
    pan = identity(render(captions, range(12), frames=41))["ground"]
    assert 0.49 < pan.norm(dim=1).min() and pan.norm(dim=1).max() < 0.81
    slow = identity(render(captions, range(12), frames=41, speed=0.5))["ground"]
    large = identity(render(captions, range(12), size=64, frames=41))["ground"]
    assert (slow - pan / 2).norm(dim=1).max() < 0.01 and (large - pan).norm(dim=1).max() < 0.02


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("frames", [1, 9])
def test_nothing_has_no_identity(level, frames):
    found = identity(torch.full((2, 3, frames, 32, 32), level))
    assert all(x.shape == (2, 2) and x.isnan().all() for x in found.values())
