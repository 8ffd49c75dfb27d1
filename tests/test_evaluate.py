"""Measures have the values worked out by hand or by another implementation; reports hold what was measured."""

import importlib
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDED, command_line, randn, tiny_dit

import anchors
import evaluate
from dit import save_dit
from lib.common import UserError, from_cli
from lib.media import VideoWriter
from metrics import (
    drift,
    end_flickering,
    features,
    flickering_ratio,
    frame_changes,
    frechet,
    measure,
    round_trip,
    seam,
    stat,
    temporal_flickering,
)
from toy import tables, world
from toy.causality import with_wrong_past
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
    """Per boundary: frames 4i-1 -> 4i below, 4i -> 4i+1 above; the two other changes of the latent play no role."""
    steps = torch.rand(32, generator=torch.Generator().manual_seed(0)) / 50 + 0.01
    ratio = flickering_ratio(with_steps(*steps.tolist()))[0]
    for i in range(1, 8):
        assert ratio[i - 1].item() == pytest.approx(
            (steps[4 * i] / steps[4 * i - 1]).item(), rel=1e-3
        )


def test_plan_splits_inter_and_intra():
    """Blocks of three: boundaries 2|3 and 5|6 of nine latents are inter-block. Seams there leave intra at 1."""
    steps = [0.01] * 32
    steps[4 * 2] = steps[4 * 5] = 0.03
    table = measure(with_steps(*steps), FORWARD)
    assert table["FR inter"].mean == pytest.approx(3, rel=1e-3) and table[
        "FR intra"
    ].mean == pytest.approx(1, rel=1e-3)
    other = measure(with_steps(*steps), anchors.backward(9, 6, 0, head=3))
    assert other["FR inter"].mean == pytest.approx(3, rel=1e-3) and other[
        "FR intra"
    ].mean == pytest.approx(8 / 6, rel=1e-3)


def test_vanishing_denominators_are_counted_and_dropped():
    steps = [0.01] * 32
    steps[4 * 2 - 1] = 0.0
    table = measure(with_steps(*steps), FORWARD)
    assert (
        table["FR inter"].dropped == 1
        and table["FR inter"].mean == pytest.approx(1, rel=1e-3)
        and table["FR intra"].dropped == 0
    )


def test_toy_world_has_ratio_one():
    """Exact clips have no seams: 1 within three standard errors; swapping blocks between clips shows at once."""
    captions = world.random_captions(16, torch.Generator().manual_seed(0))
    video, plan = world.render(captions, range(16)), anchors.forward(21)
    table = measure(video, plan, captions)
    assert (
        abs(table["FR inter"].mean - 1) < 3 * table["FR inter"].se + 0.02
        and table["caption"].mean == 1
    )
    swapped = video.clone()
    for start in range(9, 81, 24):
        swapped[:, :, start : start + 12] = video.roll(1, 0)[:, :, start : start + 12]
    assert measure(swapped, plan)["FR inter"].mean > 2


@pytest.mark.parametrize(
    "frames,says",
    [(7, "cut the video to 9"), (82, "cut the video to 81"), (1, "cut the video to 9")],
)
def test_wrong_number_of_frames_says_how_to_cut(frames, says):
    with pytest.raises(UserError, match=says):
        flickering_ratio(brightness(*[0.0] * frames))


def test_static_video_is_a_user_error():
    with pytest.raises(UserError, match="does not move"):
        measure(brightness(*[0.5] * 33), FORWARD)


# ---------------------------------------------------------------- the other measures
def test_statistics_by_hand():
    """Mean over all values, standard error over clips' means: std of 1 and 4 is 2.1213, over sqrt 2 is 1.5."""
    s = stat(torch.tensor([[0.0, 2.0, math.nan], [4.0, 4.0, 4.0]]))
    assert (s.mean, s.median, s.clips, s.dropped) == (
        pytest.approx(2.8),
        4.0,
        2,
        1,
    ) and s.se == pytest.approx(1.5)
    assert str(s) == "2.800 ± 1.500"


def test_temporal_flickering_by_hand():
    """From black to white and back is 0; a standstill is 1; a tenth of the range is .9, up to 8-bit rounding."""
    assert (
        temporal_flickering(brightness(-1, 1, -1)).item() == 0
        and temporal_flickering(brightness(0.3, 0.3)).item() == 1
    )
    assert temporal_flickering(brightness(0, 0.2, 0)).item() == pytest.approx(0.9, abs=0.005)


def test_end_flickering_by_hand():
    """Half the range away at one of two given frames: 0.75; at the other end nothing is different."""
    video = brightness(0, 0, 0.5, 0.5)
    assert end_flickering(video, brightness(0, 1)).item() == 0.75
    assert end_flickering(video, brightness(0.5, 0.5), tail=True).item() == 1


def test_seam_by_hand():
    """Brighter by .1 (12.75 grey levels) where the neighbours change by .02: a jump of 5; nothing changes the sharpness."""
    texture = torch.linspace(-0.3, 0.3, 8).view(1, 1, 1, 1, 8)
    video = brightness(0, 0.02, 0.12, 0.14)[..., :1].expand(1, 3, 4, 2, 8) + texture
    found = {k: v.item() for k, v in seam(video, 2).items()}
    want = {"colour offset": 12.75, "jump": 5, "sharpness": 1}
    assert found == {k: pytest.approx(v, rel=1e-3) for k, v in want.items()}
    with pytest.raises(UserError, match="frame 1 "):
        seam(video, 1)


def test_drift_by_hand():
    """A second piece that is brighter by .2 and of half the contrast and motion."""
    first = randn(0, 1, 3, 10, 4, 8) * 0.1
    second = (
        first / 2
        - first.mean((2, 3, 4), keepdim=True) / 2
        + first.mean((2, 3, 4), keepdim=True)
        + 0.2
    )
    found = drift(torch.cat([first, second], 2), piece=10)
    assert found["colour offset"][0].tolist() == pytest.approx([0, 25.5], abs=1e-3)
    for name in ("contrast", "sharpness", "motion"):
        assert found[name][0].tolist() == pytest.approx([1, 0.5], rel=1e-4), name


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
    """With an encoder that returns what was decoded but for the firsts of blocks, the ratio is the planted one; latent 0 is ignored."""

    class Known:
        def decode(self, z):
            return z

        def encode(self, z):
            z = z.clone()
            z[:, 0] += 99
            z[:, [3, 6]] += 3.0
            z[:, [1, 2, 4, 5, 7, 8]] += 1.0
            return z

    assert round_trip(Known(), randn(0, 2, 9, 2, 4, 4), FORWARD).tolist() == pytest.approx(
        [9, 9], rel=1e-4
    )


def test_features_have_a_row_a_clip():
    video = randn(0, 3, 3, 9, 16, 16)
    assert features(video, small_vae()).shape == (3, 6)
    script = torch.jit.script(
        torch.nn.Sequential(torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten())
    )
    assert torch.allclose(features(video, script), video.mean((2, 3, 4)), atol=1e-6)


def test_frame_changes_do_not_depend_on_precision():
    video = (randn(0, 1, 3, 5, 4, 4) * 0.5).half()
    assert torch.equal(frame_changes(video), frame_changes(video.float()))


# ---------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_dit(tiny_dit(1, **WORDED), folder / "student.safetensors")
    save_vae(small_vae(), folder / "vae.safetensors")
    return folder


def test_student_is_measured_and_shown(weights, tmp_path, monkeypatch, capsys):
    """The table on screen is the one in the .json and in the page; every clip, plan and pair that the pages name is there."""
    (tmp_path / "exp1-0").mkdir()
    save_dit(
        tiny_dit(5, **WORDED), tmp_path / "exp1-0" / "student.safetensors"
    )  # a student without anchors to compare with
    code, _ = command_line(
        monkeypatch,
        capsys,
        evaluate,
        weights=weights,
        clips=2,
        report=tmp_path / "r",
        out=tmp_path / "t.json",
        runs=tmp_path,
    )
    rows = json.loads((tmp_path / "t.json").read_text())
    assert code == 0 and list(rows) == ["real clips, decoded", *evaluate.PLANS]
    assert {"FR inter", "FR intra", "round trip", "caption"} <= set(rows["forward"])
    page, ab = ((tmp_path / "r" / name).read_text() for name in ("index.html", "ab.html"))
    for name, row in rows.items():
        for column, s in row.items():
            assert f"{s['mean']:.3f} ± {s['se']:.3f}" in page, (name, column)
    named = {part.split("'")[0] for text in (page,) for part in text.split("src='")[1:]} | set(
        json.loads(ab.split("const pairs=")[1].split(", names=")[0])[1].values()
    ) - {None}
    files = {x for x in named if isinstance(x, str)}
    assert (
        len(files) >= 16
        and "backward-P-0.mp4" in files
        and all((tmp_path / "r" / x).stat().st_size for x in files)
    )


def test_video_file_is_measured(tmp_path, monkeypatch, capsys):
    """A clip from disk, cut to whole blocks, and said so."""
    path = tmp_path / "a.mp4"
    with VideoWriter(path) as writer:
        writer.write(world.render(["a red disc moves left over a blue wave"], [0], 32, 85)[0])
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--video", str(path)])
    evaluate.run(evaluate.main, evaluate.Config)
    out = capsys.readouterr().out
    assert "a.mp4: the first 81 of 85 frames, 21 latents" in out and "| a.mp4 |" in out


def test_long_video_is_measured(tmp_path, monkeypatch, capsys):
    """Beyond the horizon of 21 latents too: 24 latents of 114 frames in blocks of 8."""
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(world.render(["a red disc moves left over a blue wave"], [0], 32, 114)[0])
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "--video", str(tmp_path / "a.mp4"), "--block", "8"]
    )
    evaluate.run(evaluate.main, evaluate.Config)
    assert "the first 93 of 114 frames, 24 latents in blocks of 8" in capsys.readouterr().out


def test_folder_of_videos_is_measured(tmp_path, monkeypatch, capsys):
    """A row each and one for all; a clip that stands still is named and left out; other files are no videos."""
    for n in range(2):
        with VideoWriter(tmp_path / f"{n}.mp4") as writer:
            writer.write(world.render(["a red disc moves left over a blue wave"], [n], 32, 33)[0])
    with VideoWriter(tmp_path / "still.mp4") as writer:
        writer.write(torch.zeros(3, 33, 32, 32))
    (tmp_path / "notes.txt").write_text("no video")
    code, _ = command_line(monkeypatch, capsys, evaluate, video=tmp_path, out=tmp_path / "t.json")
    rows = json.loads((tmp_path / "t.json").read_text())
    assert code == 0 and list(rows) == ["0.mp4", "1.mp4", "all 2"]
    assert rows["all 2"]["FR inter"]["mean"] == pytest.approx(
        (rows["0.mp4"]["FR inter"]["mean"] + rows["1.mp4"]["FR inter"]["mean"]) / 2
    )


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


@pytest.fixture
def runs(weights, tmp_path):
    """A student for every name and two seeds; the separate ones have two files."""
    for n, name in enumerate(tables.STAGE2):
        for seed in (0, 1):
            out = tables.folder(str(tmp_path), name, seed)
            out.mkdir()
            files = ("forward", "backward") if name == "separate" else ("student",)
            for k, file in enumerate(files):
                save_dit(tiny_dit(10 * n + 3 * seed + k, **WORDED), out / f"{file}.safetensors")
    return tmp_path


@pytest.mark.parametrize("number", [2, 3, 6])
def test_table_has_its_rows_and_averages_over_seeds(number, runs, weights, monkeypatch, capsys):
    """Each row: the paper's number, and the mean of what each seed alone gives, with the error over seeds."""
    monkeypatch.setitem(tables.TABLES, 2, tables.TABLES[2][1:3])
    monkeypatch.setitem(
        tables.TABLES, 3, (tables.Row("long", "exp7", anchors.long(24, "backward")),)
    )
    one, other, both = (
        evaluate.table(
            evaluate.Config(
                weights=str(weights), runs=str(runs), table=number, seeds=seeds, clips=2
            ),
            torch.device("cpu"),
        )
        for seeds in ((0,), (1,), (0, 1))
    )
    assert list(both) == [row.label for row in tables.TABLES[number]]
    for row in tables.TABLES[number]:
        assert both[row.label].get("paper", "") == row.paper
        for column in set(both[row.label]) - {"paper"}:
            x, y, mean = (t[row.label][column] for t in (one, other, both))
            assert mean.mean == pytest.approx((x.mean + y.mean) / 2, rel=1e-4, abs=1e-6), (
                row.label,
                column,
            )
            assert mean.se == pytest.approx(abs(x.mean - y.mean) / 2, rel=1e-3, abs=1e-6), (
                row.label,
                column,
            )


def test_table_uses_the_student_of_its_direction(runs, weights, monkeypatch):
    """Separate students: the forward row is made by forward.safetensors, the backward row by the other."""
    monkeypatch.setitem(tables.TABLES, 2, tables.TABLES[2][::3])  # separate forward and backward
    config = evaluate.Config(weights=str(weights), runs=str(runs), table=2, seeds=(0,), clips=2)
    before = evaluate.table(config, torch.device("cpu"))
    (runs / "separate-0" / "backward.safetensors").write_bytes(
        (runs / "exp1-0" / "student.safetensors").read_bytes()
    )
    after = evaluate.table(config, torch.device("cpu"))
    changed = {
        label for label in before if before[label]["Fréchet"].mean != after[label]["Fréchet"].mean
    }
    assert changed == {"backward, separate student and critic"}


def test_teacher_fills_in_between_what_is_held():
    """A teacher of constant velocity 1 (0 without prompt): known latents come back as given, the others are noise - guidance, and
    at every step the known ones were shown at the level of the others."""
    shown = []

    def teacher(x, t, prompts, pos):
        shown.append((x[:1, [0, 3]].clone(), t[0, 0].item() / 1000))
        return prompts.mean((1, 2)).view(-1, 1, 1, 1, 1).expand_as(x)

    z, noise = randn(0, 1, 4, 1, 2, 2), randn(1, 1, 4, 1, 2, 2)
    made = evaluate.fill_in(teacher, torch.ones(1, 2, 3), z, [0, 3], noise, 2.0)
    assert torch.equal(made[:, [0, 3]], z[:, [0, 3]]) and torch.allclose(
        made[:, [1, 2]], noise[:, [1, 2]] - 2, atol=1e-5
    )
    assert len(shown) == 48 and shown[0][1] == 1
    for x, sigma in shown:
        assert torch.allclose(x, (1 - sigma) * z[:, [0, 3]] + sigma * noise[:, [0, 3]], atol=1e-5)


def test_inbetween_table(weights):
    """Four rows; blending keeps the given frames exactly and hardly moves."""
    config = evaluate.Config(
        weights=str(weights), teacher=str(weights / "student.safetensors"), table=4, clips=2
    )
    rows = evaluate.table(config, torch.device("cpu"))
    true, blend, teacher, student = rows.values()
    assert (
        blend["head"].mean == blend["tail"].mean == 1
        and blend["jump at 9"].mean < 0.5
        and blend["motion"].mean < 0.04
    )
    assert (
        true["head"].mean
        == pytest.approx(teacher["head"].mean)
        == pytest.approx(student["head"].mean)
    )  # the same latents, decoded
    assert len({row["Fréchet"].mean for row in rows.values()}) == 4


def test_missing_students_come_with_their_command(weights, tmp_path):
    with pytest.raises(
        UserError, match=r"exp10-0, exp11-0, exp7-0 are not .* --students exp10 exp11 exp7"
    ):
        evaluate.table(
            evaluate.Config(weights=str(weights), runs=str(tmp_path), table=6, seeds=(0,)),
            torch.device("cpu"),
        )


def test_rows_without_students_are_left_out(runs, weights, monkeypatch, capsys):
    """The initialisations: what is not trained is named with its command, the rest is measured; a row may have seeds of its own."""
    monkeypatch.setitem(
        tables.TABLES, 10, tables.TABLES[10][3:12]
    )  # stage 2 of noisy context, and all of clean context
    found = evaluate.table(
        evaluate.Config(weights=str(weights), runs=str(runs), table=10, seeds=(0, 1), clips=2),
        torch.device("cpu"),
    )
    assert list(found) == [
        f"noisy context (UniTemp), stage 2, {name}"
        for name in ("forward", "backward, P = 3", "backward, P = 0")
    ]
    says = capsys.readouterr().out
    assert "clean-p3-1, clean0-0" in says and says.strip().endswith(
        "--seeds 0 1 --students clean0 clean3"
    )


def test_every_student_of_a_table_is_trained_by_some_command():
    """The commands parse, write the file that ends them, and start stage 2 from the stage 1 of the same seed."""
    commands = tables.commands("out", "w", "pairs", [4])
    ends = {end.parent.name for end, _, _ in commands}
    assert {f"{row.student}-4" for table in tables.TABLES.values() for row in table} <= ends
    for end, need, line in commands:
        script, *words = line.split()
        config = from_cli(importlib.import_module(script[:-3]).Config, words)
        assert config.seed == 4 and Path(config.out) == end.parent
        assert need is None or (config.student == str(need) and need in {e for e, _, _ in commands})


def vbench_config(weights, folder, **changes):
    """Three prompts, two clips each; what the model is told differs from what the files are called."""
    (folder / "prompts.txt").write_text("one\ntwo words\nthree\n")
    (folder / "extended.txt").write_text("a red disc\na blue disc\na cyan disc\n")
    return evaluate.Config(
        **{
            "weights": str(weights),
            "vbench": str(folder / "clips"),
            "prompts": str(folder / "prompts.txt"),
            "extended": str(folder / "extended.txt"),
            "samples": 2,
        }
        | changes
    )


def test_export_names_every_clip_and_does_not_depend_on_processes(weights, tmp_path):
    """Processes 0 and 1 of 2 together write, byte for byte, what one process writes: every prompt, every sample, no more."""
    cpu, made = torch.device("cpu"), []
    for name, world_size in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for rank in reversed(range(world_size)):
            evaluate.export(vbench_config(weights, tmp_path / name), rank, world_size, cpu)
        made.append({p.name: p.read_bytes() for p in (tmp_path / name / "clips").iterdir()})
    assert set(made[0]) == {f"{p}-{k}.mp4" for p in ("one", "two words", "three") for k in range(2)}
    assert made[0] == made[1] and len(set(made[0].values())) == 6


def test_export_goes_on_and_is_scored_where_vbench_is(weights, tmp_path, monkeypatch, capsys):
    """Clips that are there are not made again; the scores printed are those of VBench's own file."""

    class Judge:
        def __init__(self, device, info, out):
            self.out = Path(out)

        def build_full_dimension_list(self):
            return ["color", "scene"]

        def evaluate(self, videos_path, name, dimension_list):
            self.out.mkdir()
            scores = {
                d: [0.25 * (n + 1), [{"video_path": "x"}]] for n, d in enumerate(dimension_list)
            }
            (self.out / f"{name}_eval_results.json").write_text(json.dumps(scores))

    config = vbench_config(weights, tmp_path)
    evaluate.export(config, 1, 2, torch.device("cpu"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "clips").iterdir()}
    assert len(before) == 3
    module = types.ModuleType("vbench")
    module.VBench, module.__file__, module.__spec__ = (
        Judge,
        __file__,
        importlib.util.spec_from_loader("vbench", None),
    )
    monkeypatch.setitem(sys.modules, "vbench", module)
    evaluate.export(config, 0, 1, torch.device("cpu"))
    assert {p: p.stat().st_mtime_ns for p in before} == before and len(
        list((tmp_path / "clips").glob("*.mp4"))
    ) == 6
    out = capsys.readouterr().out
    assert "| color | scene |" in out and "| 0.25 | 0.5 |" in out


@pytest.mark.parametrize(
    "prompts,extended,says",
    [
        ("a/b\n", "", "cannot be a file name"),
        ("a\nb\n", "c\n", "has 1 prompts but"),
        ("\n", "", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_exported(prompts, extended, says, weights, tmp_path):
    config = vbench_config(
        weights, tmp_path, extended=str(tmp_path / "extended.txt") if extended else ""
    )
    (tmp_path / "prompts.txt").write_text(prompts)
    (tmp_path / "extended.txt").write_text(extended)
    with pytest.raises(UserError, match=says):
        evaluate.export(config, 0, 1, torch.device("cpu"))
    assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize("text", ["", "[1]", '{"color": 3}', '{"color": []}'])
def test_damaged_scores_are_a_user_error(text, tmp_path):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(UserError, match="not a result file of VBench"):
        evaluate.read_vbench(tmp_path / "scores.json")


@pytest.mark.parametrize(
    "flags,says",
    [
        ({"video": "missing.mp4"}, "missing.mp4 does not exist"),
        ({"weights": "nowhere"}, "nowhere"),
        ({"clips": 0}, "--clips 0"),
        ({"vbench": "x"}, "--prompts"),
        ({"order": "loop"}, "--order loop"),
        ({"weights": "random", "size": (32, 20)}, "--size 32 20"),
    ],
)
def test_bad_input_is_one_sentence(flags, says, monkeypatch, capsys):
    code, line = command_line(monkeypatch, capsys, evaluate, **flags)
    assert code == 2 and says in line


# ---------------------------------------------------------------- when do anchors help
@pytest.mark.parametrize("p", [0, 1, 2])
def test_only_the_firsts_of_blocks_get_a_wrong_past(p):
    """Latents 3 and 6 are those of a clip that was glued together at the right frame; all others, and all with their whole past,
    are the plain ones."""
    vae, video = small_vae(), randn(0, 2, 3, 33, 16, 16).clamp(-1, 1)
    plain, made = vae.encode(video, chunk=99), with_wrong_past(vae, video, [3, 6], p)
    same_latents = [i for i in range(9) if i not in (3, 6)]
    assert torch.equal(made[:, same_latents], plain[:, same_latents])
    for i in (3, 6):
        start = 4 * (i - p) - 3  # latent i shows frames 4i-3 .. 4i
        glued = torch.cat([video.roll(1, 0)[:, :, :start], video[:, :, start:]], 2)
        assert torch.allclose(made[:, i], vae.encode(glued)[:, i], atol=1e-5) and not torch.equal(
            made[:, i], plain[:, i]
        )
    assert torch.allclose(with_wrong_past(vae, video, [3, 6], 6), plain, atol=1e-6)
