"""Measures have the values worked out by hand or by another implementation; rows hold what was
measured."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDED, command_line, randn, tiny_dit

import anchors
import evaluate
from dit import save_dit
from evaluate import (
    change_ratios,
    drift,
    features,
    flickering_ratio,
    frames_of,
    measure,
    measure_words,
    round_trip,
    summary,
)
from lib.changes import frame_changes, seam, temporal_flickering
from lib.common import UserError
from lib.media import VideoWriter
from lib.recipe import Recipe
from lib.statistics import Stat, frechet, largest, lost, over_runs, stat
from lib.world import ends, find_world, numbers_of
from plans import plans_of, timeline, with_given
from toy import world
from vae import VAE, VAEConfig, save_vae

FORWARD = anchors.forward(9)


def brightness(*levels: float) -> torch.Tensor:
    """A video [1, 3, F, 2, 2] of even frames."""
    return torch.tensor(levels).view(1, 1, -1, 1, 1).expand(1, 3, -1, 2, 2)


def with_steps(*steps: float) -> torch.Tensor:
    """A video whose picture changes by the given amounts from frame to frame."""
    return brightness(*np.concatenate([[-1.0], -1 + np.cumsum(steps)]))


# ---------------------------------------------------------------- flickering ratio
def test_constant_speed_has_ratio_one():
    ratio = flickering_ratio(with_steps(*[0.01] * 32))
    assert ratio.shape == (1, 7) and torch.allclose(ratio, torch.ones(1, 7), atol=1e-3)


@given(st.integers(1, 7), st.floats(1.5, 9))
@settings(max_examples=25, deadline=None)
def test_planted_seam_is_found_at_its_boundary(i, k):
    """k times the change between frames 4i and 4i+1 gives FR_i = k, and no other ratio moves."""
    steps = [0.01] * 32
    steps[4 * i] *= k
    ratio = flickering_ratio(with_steps(*steps))[0]
    assert ratio[i - 1].item() == pytest.approx(k, rel=1e-3)
    assert torch.allclose(ratio[torch.arange(7) != i - 1], torch.ones(6), atol=1e-3)


def test_only_the_boundary_and_the_change_before_it_count():
    """Per boundary: frames 4i-1 -> 4i below, 4i -> 4i+1 above; the two other changes of the latent
    play no role."""
    steps = torch.rand(32, generator=torch.Generator().manual_seed(0)) / 50 + 0.01
    ratio = flickering_ratio(with_steps(*steps.tolist()))[0]
    for i in range(1, 8):
        assert ratio[i - 1].item() == pytest.approx(
            (steps[4 * i] / steps[4 * i - 1]).item(), rel=1e-3
        )


def test_plan_splits_inter_and_intra():
    """Blocks of three: boundaries 2|3 and 5|6 of nine latents are inter-block. Seams there leave
    intra at 1."""
    steps = [0.01] * 32
    steps[4 * 2] = steps[4 * 5] = 0.03
    table = summary(measure(with_steps(*steps), FORWARD))
    assert table["FR inter"].mean == pytest.approx(3, rel=1e-3) and table[
        "FR intra"
    ].mean == pytest.approx(1, rel=1e-3)
    other = summary(measure(with_steps(*steps), anchors.backward(9, 6, 0, head=3)))
    assert other["FR inter"].mean == pytest.approx(3, rel=1e-3) and other[
        "FR intra"
    ].mean == pytest.approx(8 / 6, rel=1e-3)


def test_vanishing_denominators_are_counted_and_dropped():
    steps = [0.01] * 32
    steps[4 * 2 - 1] = 0.0
    table = summary(measure(with_steps(*steps), FORWARD))
    assert (
        table["FR inter"].dropped == 1
        and table["FR inter"].mean == pytest.approx(1, rel=1e-3)
        and table["FR intra"].dropped == 0
    )


def test_toy_world_has_ratio_one():
    """Exact clips have no seams: 1 within three standard errors; swapping blocks between clips
    shows at once."""
    captions = world.random_captions(16, torch.Generator().manual_seed(0))
    video, plan = world.render(captions, range(16)), anchors.forward(21)
    table = summary(measure(video, plan) | measure_words(world, video, plan, captions))
    assert abs(table["FR inter"].mean - 1) < 3 * table["FR inter"].se + 0.02
    assert table["caption"].mean == table["frame 0: colours"].mean == 1
    swapped = video.clone()
    for start in range(9, 81, 24):
        swapped[:, :, start : start + 12] = video.roll(1, 0)[:, :, start : start + 12]
    assert summary(measure(swapped, plan))["FR inter"].mean > 2


@pytest.mark.parametrize(
    "frames,says",
    [(7, "cut the video to 9"), (82, "cut the video to 81"), (1, "cut the video to 9")],
)
def test_wrong_number_of_frames_says_how_to_cut(frames, says):
    with pytest.raises(UserError, match=says):
        flickering_ratio(brightness(*[0.0] * frames))


# ---------------------------------------------------------------- the other measures
def test_statistics_by_hand():
    """Mean over all values, standard error over clips' means: std of 1 and 4 is 2.1213, over sqrt 2
    is 1.5."""
    s = stat(torch.tensor([[0.0, 2.0, math.nan], [4.0, 4.0, 4.0]]))
    assert (s.mean, s.clips, s.dropped) == (pytest.approx(2.8), 2, 1)
    assert s.se == pytest.approx(1.5) and str(s) == "2.800 ± 1.500"
    nothing = stat(torch.full((3, 2), math.nan))
    assert (nothing.clips, nothing.dropped, str(nothing)) == (0, 6, "-")


def test_both_errors_are_told():
    """Seeds of means 1, 3 with errors .3, .4 over clips: mean 2, over clips hypot(.3, .4) / 2, over
    seeds std / sqrt 2 = 1."""
    both = over_runs([{"x": Stat(1.0, 0.3, 8)}, {"x": Stat(3.0, 0.4, 8)}])["x"]
    assert both.mean == 2 and both.se == pytest.approx(0.25) and both.seeds == pytest.approx(1)
    assert both.clips == 16 and str(both) == "2.000 ± 0.250 (seeds ± 1.000)"
    assert over_runs([{"x": Stat(1.0, 0.3, 8)}])["x"] == Stat(1.0, 0.3, 8)


def test_temporal_flickering_by_hand():
    """From black to white and back is 0; a standstill is 1; a tenth of the range is .9, up to 8-bit
    rounding."""
    assert (
        temporal_flickering(brightness(-1, 1, -1)).item() == 0
        and temporal_flickering(brightness(0.3, 0.3)).item() == 1
    )
    assert temporal_flickering(brightness(0, 0.2, 0)).item() == pytest.approx(0.9, abs=0.005)


def test_seam_by_hand():
    """Brighter by .1 (12.75 grey levels) where the neighbours change by .02: a jump of 5; nothing
    changes the sharpness."""
    texture = torch.linspace(-0.3, 0.3, 8).view(1, 1, 1, 1, 8)
    video = brightness(0, 0.02, 0.12, 0.14)[..., :1].expand(1, 3, 4, 2, 8) + texture
    found = {k: v.item() for k, v in seam(video, 2).items()}
    want = {"colour offset": 12.75, "jump": 5, "jump max": 5, "sharpness": 1}
    assert found == {k: pytest.approx(v, rel=1e-3) for k, v in want.items()}
    with pytest.raises(UserError, match="frame 1 "):
        seam(video, 1)


def test_seam_that_shows_later_is_found():
    """Three times the usual change at the second frame after the cut: no jump at the cut, a largest
    one of 3."""
    steps = [0.02] * 9
    steps[3] = 0.06  # the cut is before frame 3: changes 2, 3, 4, 5 are the four from there on
    found = seam(with_steps(*steps), 3)
    assert found["jump max"].item() == pytest.approx(3, rel=1e-3)
    assert found["jump"].item() == pytest.approx(0.02 / (0.5 * (0.02 + 0.06)), rel=1e-3)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_drift_by_hand(way):
    """What was made last is brighter by .2 and of half the contrast and motion, whichever end of
    the video it is."""
    plan = getattr(anchors, way)(6)
    first, last = frames_of(plan.made[:3]), frames_of(plan.made[3:])
    video = randn(0, 1, 3, 21, 4, 8) * 0.1
    mean = video[:, :, last].mean((2, 3, 4), keepdim=True)
    video[:, :, last] = (
        (video[:, :, last] - mean) / 2 + video[:, :, first].mean((2, 3, 4), True) + 0.2
    )
    found = drift(video, plan, piece=3)
    assert found["colour offset"][0].tolist() == pytest.approx([0, 25.5], abs=1e-3)
    for name in ("contrast", "sharpness"):
        ratio = getattr_ratio(video, first, last, name)
        assert found[name][0].tolist() == pytest.approx([1, ratio], rel=1e-4) and ratio < 0.7, name
    change = frame_changes(video)[0]
    motion = [change[[f - 1 for f in part if f]].mean() for part in (first, last)]
    assert found["motion"][0, 1].item() == pytest.approx((motion[1] / motion[0]).item(), rel=1e-4)


def getattr_ratio(video, first, last, name):
    """Contrast or sharpness of the last frames over that of the first, clip by clip."""
    parts = [video[0][:, frames] for frames in (first, last)]
    if name == "contrast":
        values = [part.std((2, 3)).mean() for part in parts]
    else:
        values = [part.diff(dim=3).abs().mean() for part in parts]
    return (values[1] / values[0]).item()


def test_drift_leaves_out_a_short_last_piece():
    """Seven latents in pieces of three: the last one, of four frames, is too short."""
    plan = anchors.forward(7, 1)
    assert drift(randn(0, 2, 3, 25, 4, 4), plan, piece=3)["motion"].shape == (2, 2)


# ---------------------------------------------------------------- both ends
def test_cut_that_shows_late_is_in_the_largest_ratio():
    """k times the change from frame 4i+2 to 4i+3 leaves FR_i at 1; the largest of the four is k."""
    steps = [0.01] * 32
    for i in (2, 5):
        steps[4 * i + 2] *= 5
    row = summary(measure(with_steps(*steps), FORWARD))
    assert row["FR inter"].mean == pytest.approx(1, rel=1e-3)
    assert row["FR inter max"].mean == pytest.approx(5, rel=1e-3)
    assert row["FR intra max"].mean == pytest.approx(1, rel=1e-3)
    ratios = change_ratios(with_steps(*steps))
    assert ratios.shape == (1, 7, 4) and ratios[0, 1].tolist() == pytest.approx(
        [1, 1, 5, 1], rel=1e-3
    )


def test_largest_is_of_means_and_not_of_values():
    """Columns 1, 3 and 2, 2.5: means 2 and 2.25; the largest single value does not count, NaN
    neither."""
    values = torch.tensor([[[1.0, 2.0], [3.0, 2.5]]])
    assert largest(values).mean == 2.25
    values[0, 0, 0] = math.nan
    assert largest(values).mean == 3 and largest(values).dropped == 1


def test_order_is_the_plans():
    """Backward order makes the end first; given latents come first of all and are not made; dummies
    are nothing."""
    assert anchors.backward(9).made == [6, 7, 8, 3, 4, 5, 0, 1, 2]
    plan = with_given(timeline(9, [(6, 9)]), range(6, 9))
    assert plan.order == [6, 7, 8, 3, 4, 5, 0, 1, 2] and plan.made == [3, 4, 5, 0, 1, 2]
    dummy = anchors.backward(9, anchors=0, dummy=True)
    assert dummy.made == anchors.backward(9).made and min(dummy.steps[0].targets) < 0
    assert frames_of([2, 0]) == [0, 5, 6, 7, 8] and len(frames_of(range(21))) == 81


@pytest.mark.parametrize("length,count", [(6, 2), (21, 7), (24, 8), (42, 21), (123, 21)])
def test_ends_are_a_third_or_five_seconds(length, count):
    first, last = ends(anchors.long(length, "backward"))
    order = anchors.long(length, "backward").order
    assert first == order[:count] and last == order[-count:] and max(last) < min(first)


def test_words_are_read_where_they_were_made():
    """A long backward clip whose first-made seconds show one caption and whose end of making shows
    another; frame 0 is a third."""
    said = "a red disc moves left over a blue wave"
    wrong = "a green ring moves up over a cyan wave"
    plan = anchors.long(24, "backward")  # the first 21 made are latents 3 to 23
    video = world.render([said], [1], frames=93)
    other = world.render([wrong], [1], frames=93)
    early = torch.cat([other[:, :, :1], video[:, :, 1:]], 2)
    row = summary(measure_words(world, early, plan, [said]))
    assert row["caption"].mean == 1 and row["caption, last made"].mean == 1
    assert row["frame 0: colours"].mean == row["frame 0: shape"].mean == 0
    late = torch.cat([video[:, :, :49], other[:, :, 49:]], 2)
    row = summary(measure_words(world, late, plan, [said]))
    assert row["caption"].mean == 0 and row["frame 0: colours"].mean == 1


def test_lost_is_nothing_in_true_clips_and_one_in_shuffled_ones():
    """Ball and ground of true clips stay; pieces of different clips are one unit apart, by
    definition."""
    captions = [world.caption(world.HELD_OUT + n) for n in range(16)]
    video, plan = world.render(captions, range(16)), anchors.forward(21)
    true = measure_words(world, video, plan, captions)
    for name in ("identity: ball", "identity: ground"):
        pairs = true[name]
        assert pairs.shape == (16, 2, 2) and not pairs.isnan().any()
        assert lost(pairs, pairs).max() < 0.25 and lost(pairs, pairs).mean() < 0.1, name
        every = torch.cat(
            [torch.stack([pairs[:, 0], pairs[:, 1].roll(k, 0)], 1) for k in range(1, 16)]
        )
        assert lost(every, pairs).mean().item() == pytest.approx(1, rel=1e-4)
    assert {"lost: ball", "lost: ground"} <= summary(true, true).keys()
    assert not {"lost: ball", "lost: ground"} & summary(true).keys()


def test_plans_are_the_students_own():
    """A student of blocks of two without anchors is measured as it was trained: with a dummy,
    nothing to keep."""
    assert list(plans_of(Recipe())) == ["forward", "backward", "backward, anchors as output"]
    own = plans_of(Recipe(block=3, anchors=0))
    assert list(own) == ["forward", "backward"] and own["backward"].steps[0].targets == (-1, -2, -3)
    assert plans_of(Recipe(block=6, anchors=0, head=3))["backward"].steps[-1].targets == (0, 1, 2)


def test_every_seed_has_clips_of_its_own():
    numbers = [numbers_of(4, seed, known) for seed in (0, 1) for known in (False, True)]
    assert len({n for some in numbers for n in some}) == 16
    assert all(world.held_out(world.caption(n)) for n in numbers[0] + numbers[2])
    assert not any(world.held_out(world.caption(n)) for n in numbers[1] + numbers[3])


def test_world_is_handed_in_by_name(monkeypatch):
    """Any module with the four names will do; what is missing is said, and a model that reads other
    words needs one."""
    assert find_world("", 64).__name__ == "toy.world" and find_world("", 64, "prompts.txt") is None
    with pytest.raises(UserError, match="32 wide.*--prompts FILE"):
        find_world("", 32)
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    with pytest.raises(UserError, match="--world mine lacks caption, render, hits"):
        find_world("mine", 32)
    with pytest.raises(UserError, match="--world nowhere cannot be imported"):
        find_world("nowhere", 32)


@pytest.mark.parametrize("dim", [1, 5, 40])
def test_frechet_equals_the_textbook(dim):
    """Against scipy's matrix square root of the product."""
    linalg = pytest.importorskip("scipy.linalg")
    mix = randn(1, dim, dim).double()
    a, b = randn(2, 200, dim).double() @ mix, randn(3, 150, dim).double() + 0.5
    A, B = (np.cov(x.numpy(), rowvar=False).reshape(dim, dim) for x in (a, b))
    want = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(
        A + B - 2 * linalg.sqrtm(A @ B).real
    )
    assert frechet(a, b) == pytest.approx(want, rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6 * np.trace(A))


def test_frechet_of_known_gaussians():
    """In one dimension it is (mean difference)^2 + (difference of standard deviations)^2."""
    x = torch.tensor([[-1.0], [1.0]])
    assert frechet(x, 3 * x + 5) == pytest.approx(25 + (2 * 2**0.5) ** 2)


@pytest.mark.parametrize("a,b", [((3, 2), (3, 4)), ((1, 2), (3, 2)), ((3,), (3, 2))])
def test_features_of_wrong_shape_are_refused(a, b):
    with pytest.raises(UserError, match="two rows"):
        frechet(torch.zeros(a), torch.zeros(b))


def small_vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(dim=4, z_dim=2, num_res_blocks=1)).eval().requires_grad_(False)


def test_round_trip_points_at_the_changed_latents():
    """The firsts of blocks come back changed by 3, the others by 1: a ratio of 9; latent 0 is
    ignored."""
    z = randn(0, 2, 9, 2, 4, 4)
    again = z.clone()
    again[:, 0] += 99
    again[:, [3, 6]] += 3.0
    again[:, [1, 2, 4, 5, 7, 8]] += 1.0
    assert round_trip(z, again, FORWARD).tolist() == pytest.approx([9, 9], rel=1e-4)


def test_features_have_a_row_a_clip():
    """Mean, spread and spread of the change of each channel."""
    z = randn(0, 3, 5, 2, 4, 4)
    z[:, :, 1] = 7 + torch.arange(5).view(1, 5, 1, 1)  # even in space, one more each time
    found = features(z)
    assert found.shape == (3, 6) and found[0, 1].item() == 9 and found[0, 5].item() == 0


def test_frame_changes_do_not_depend_on_precision():
    video = (randn(0, 1, 3, 5, 4, 4) * 0.5).half()
    assert torch.equal(frame_changes(video), frame_changes(video.float()))


def test_nan_is_not_measured():
    """A mean that leaves NaN out would say nothing of a broken clip."""
    video = torch.zeros(2, 3, 9, 4, 4)
    video[1, 0, 8, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        flickering_ratio(video)


# ---------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_dit(tiny_dit(1, **WORDED), folder / "student.safetensors")
    save_vae(small_vae(), folder / "vae.safetensors")
    return folder


def test_student_is_measured(weights, tmp_path, monkeypatch, capsys):
    """True clips and others of the same captions, the teacher, every plan, an order of anchors.py,
    and known captions."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--weights", str(weights), "--clips", "2"])
    sys.argv += ["--teacher", str(weights / "student.safetensors"), "--orders", "loop", "--known"]
    sys.argv += ["--out", str(tmp_path / "t.json")]
    evaluate.run(evaluate.main, evaluate.Config)
    printed, rows = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())
    plans = ["forward", "backward", "backward, anchors as output", "loop"]
    true = ["true clips, decoded", "other true clips, decoded"]
    assert list(rows) == [
        *true,
        "teacher, forward",
        *plans,
        *(f"{p}, known captions" for p in plans),
    ]
    columns = {
        "FR inter",
        "FR inter max",
        "round trip",
        "caption",
        "frame 0: colours",
        "lost: ball",
    }
    assert columns | {"Fréchet"} <= rows["forward"].keys()
    assert "Fréchet" not in rows["forward, known captions"]  # those are other captions
    for row in rows.values():
        assert f"{row['motion']['mean']:.3f} ± {row['motion']['se']:.3f}" in printed


def test_noise_rule_and_seed_change_the_clips(weights, tmp_path, monkeypatch, capsys):
    """--share_noise changes backward clips and not forward ones; another seed changes both."""
    found = []
    for flags in ({"share_noise": "none"}, {"share_noise": "all"}, {"seed": 1}):
        out = tmp_path / "t.json"
        command_line(monkeypatch, capsys, evaluate, weights=weights, clips=2, out=out, **flags)
        rows = json.loads(out.read_text())
        found.append([rows[name]["motion"]["mean"] for name in ("forward", "backward")])
    (forward, backward), (forward_all, backward_all), other = found
    assert forward == forward_all and backward != backward_all
    assert forward != other[0] and backward != other[1]


def test_student_without_a_world(tmp_path, monkeypatch, capsys):
    """A model that reads other words is measured on prompts: what pixels tell, no captions, no true
    clips."""
    save_dit(tiny_dit(1, **WORDED), tmp_path / "student.safetensors")
    save_vae(small_vae(), tmp_path / "vae.safetensors")
    (tmp_path / "prompts.txt").write_text("a red disc\na blue ring\n")
    flags = {"weights": tmp_path, "prompts": tmp_path / "prompts.txt", "out": tmp_path / "t.json"}
    code, _ = command_line(monkeypatch, capsys, evaluate, **flags)
    rows = json.loads((tmp_path / "t.json").read_text())
    assert code == 0 and list(rows) == ["forward", "backward", "backward, anchors as output"]
    assert "FR inter" in rows["forward"] and "caption" not in rows["forward"]
    assert rows["forward"]["motion"]["clips"] == 2


def test_video_file_is_measured(tmp_path, monkeypatch, capsys):
    """A clip from disk, cut to whole blocks, and said so."""
    path = tmp_path / "a.mp4"
    with VideoWriter(path) as writer:
        writer.write(world.render(["a red disc moves left over a blue wave"], [0], 32, 85)[0])
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--video", str(path)])
    evaluate.run(evaluate.main, evaluate.Config)
    out = capsys.readouterr().out
    assert "a.mp4: the first 81 of 85 frames, 21 latents by 3" in out and "| a.mp4 |" in out


def test_long_video_is_measured(tmp_path, monkeypatch, capsys):
    """Beyond the horizon of 21 latents too: 24 latents of 114 frames in blocks of 8."""
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(world.render(["a red disc moves left over a blue wave"], [0], 32, 114)[0])
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "--video", str(tmp_path / "a.mp4"), "--block", "8"]
    )
    evaluate.run(evaluate.main, evaluate.Config)
    assert "the first 93 of 114 frames, 24 latents by 8" in capsys.readouterr().out


def test_folder_of_videos_is_measured(tmp_path, monkeypatch, capsys):
    """A row each and one for all, lossless .mkv too; a clip that stands still is left out; other
    files are no videos."""
    for n, suffix in enumerate((".mp4", ".mkv")):
        with VideoWriter(tmp_path / f"{n}{suffix}") as writer:
            writer.write(world.render(["a red disc moves left over a blue wave"], [n], 32, 33)[0])
    with VideoWriter(tmp_path / "still.mp4") as writer:
        writer.write(torch.zeros(3, 33, 32, 32))
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / ".part.mp4").write_text("no video either")
    code, _ = command_line(monkeypatch, capsys, evaluate, video=tmp_path, out=tmp_path / "t.json")
    rows = json.loads((tmp_path / "t.json").read_text())
    assert code == 0 and list(rows) == ["0.mp4", "1.mkv", "all 2"]
    means = [row["FR inter"]["mean"] for row in rows.values()]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2)
    assert rows["all 2"]["FR inter"]["se"] == pytest.approx(abs(means[0] - means[1]) / 2)
    exact = world.render(["a red disc moves left over a blue wave"], [1], 32, 33)
    whole = ((exact + 1) * 127.5).round() / 127.5 - 1
    lossless = summary(measure(whole, anchors.forward(9)))["FR inter"].mean
    assert rows["1.mkv"]["FR inter"]["mean"] == pytest.approx(lossless, rel=1e-4)


@pytest.mark.parametrize(
    "content,says",
    [
        ({}, "holds no videos"),
        ({"a.mp4": b"no video"}, "cannot be read as a video"),
        ({"a.mp4": torch.zeros(3, 33, 32, 32)}, "does not move"),
        ({"a.mp4": torch.zeros(3, 8, 32, 32)}, "has 8 frames; blocks of 3 latents need 9"),
    ],
)
def test_videos_that_cannot_be_measured(content, says, tmp_path, monkeypatch, capsys):
    for name, data in content.items():
        if isinstance(data, bytes):
            (tmp_path / name).write_bytes(data)
        else:
            with VideoWriter(tmp_path / name) as writer:
                writer.write(data)
    code, line = command_line(
        monkeypatch, capsys, evaluate, video=tmp_path / "a.mp4" if content else tmp_path
    )
    assert code == 2 and says in line


@pytest.mark.parametrize(
    "flags,says",
    [
        ({"video": "missing.mp4"}, "missing.mp4 does not exist"),
        ({"weights": "nowhere"}, "nowhere"),
        ({"clips": 0}, "--clips 0"),
        ({"block": 0}, "--block 0"),
        ({"orders": "sideways"}, "--orders 'sideways' must be forward or backward"),
        ({"share_noise": "some"}, "--share_noise 'some' must be none"),
        ({"weights": "random", "world": "no.such"}, "--world no.such"),
        ({"weights": "random", "size": (32, 20)}, "--size 32 20"),
    ],
)
def test_bad_input_is_one_sentence(flags, says, monkeypatch, capsys):
    code, line = command_line(monkeypatch, capsys, evaluate, **flags)
    assert code == 2 and says in line
