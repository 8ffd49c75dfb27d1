"""Clips for VBench: named as it wants them, the same however many processes, and scored as it
does."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import WORDED, command_line, tiny_dit

from dit import save_dit
from lib.common import UserError
from lib.media import read_frames
from tools import vbench
from vae import VAE, VAEConfig, save_vae

CPU = torch.device("cpu")
EVERY = vbench.QUALITY | vbench.SEMANTIC


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_dit(tiny_dit(1, **WORDED), folder / "student.safetensors")
    torch.manual_seed(0)
    save_vae(VAE(VAEConfig(dim=4, z_dim=2, num_res_blocks=1)), folder / "vae.safetensors")
    return folder


def config_of(weights, folder, **changes):
    """Three prompts, two clips each; what the model is told differs from what the files are
    called."""
    (folder / "prompts.txt").write_text("one\ntwo words\nthree\n")
    (folder / "extended.txt").write_text("a red disc\na blue disc\na cyan disc\n")
    usual = {
        "weights": str(weights),
        "out": str(folder / "clips"),
        "prompts": str(folder / "prompts.txt"),
        "extended": str(folder / "extended.txt"),
        "samples": 2,
    }
    return vbench.Config(**usual | changes)


def test_export_names_every_clip_and_does_not_depend_on_processes(weights, tmp_path):
    """Processes 0 and 1 of 2 together write, byte for byte, what one process writes: every prompt,
    every sample, no more."""
    written = []
    for name, world_size in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for rank in reversed(range(world_size)):
            vbench.export(config_of(weights, tmp_path / name), rank, world_size, CPU)
        written.append({p.name: p.read_bytes() for p in (tmp_path / name / "clips").iterdir()})
    assert set(written[0]) == {
        f"{p}-{k}.mp4" for p in ("one", "two words", "three") for k in (0, 1)
    }
    assert written[0] == written[1] and len(set(written[0].values())) == 6


@pytest.mark.parametrize("order", ["backward", "backward, anchors as output"])
def test_every_way_can_be_exported(order, weights, tmp_path):
    """The paper's tables compare these; lossless if asked for."""
    vbench.export(config_of(weights, tmp_path, order=order, samples=1, format=".mkv"), 0, 1, CPU)
    assert read_frames(tmp_path / "clips" / "one-0.mkv").shape == (1, 3, 81, 32, 32)


def judge(scores):
    """A stand-in for the package: it writes a result file of these scores."""

    class Judge:
        def __init__(self, device, info, out):
            self.out = Path(out)

        def build_full_dimension_list(self):
            return list(scores)

        def evaluate(self, videos_path, name, dimension_list):
            self.out.mkdir()
            result = {d: [scores[d], [{"video_path": "x"}]] for d in dimension_list}
            (self.out / f"{name}_eval_results.json").write_text(json.dumps(result))

    return Judge


def test_export_goes_on_and_is_scored_where_vbench_is(weights, tmp_path, monkeypatch, capsys):
    """Clips that are there are not made again; the scores printed are those of VBench's own file,
    and what is missing is said."""
    config = config_of(weights, tmp_path)
    vbench.export(config, 1, 2, CPU)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "clips").iterdir()}
    assert len(before) == 3
    module = types.ModuleType("vbench")
    module.VBench, module.__file__ = judge({"color": 0.25, "scene": 0.5}), __file__
    module.__spec__ = importlib.util.spec_from_loader("vbench", None)
    monkeypatch.setitem(sys.modules, "vbench", module)
    vbench.main(config)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 6
    out = capsys.readouterr().out
    assert "| color | scene |" in out and "| 0.25 | 0.5 |" in out and "no Total without" in out


def test_totals_by_hand(tmp_path, monkeypatch, capsys):
    """All dimensions at the top of their range: 100 each; at the bottom: 0; dynamic degree alone at
    the top: .5 of 6.5, four fifths."""
    top = {name: high for name, (_, high, _) in EVERY.items()}
    bottom = {name: low for name, (low, _, _) in EVERY.items()}
    assert vbench.totals(top) == pytest.approx({"Quality": 100, "Semantic": 100, "Total": 100})
    assert vbench.totals(bottom) == pytest.approx({"Quality": 0, "Semantic": 0, "Total": 0})
    found = vbench.totals(bottom | {"dynamic degree": 1.0})
    assert found["Quality"] == pytest.approx(100 * 0.5 / 6.5)
    assert found["Total"] == pytest.approx(0.8 * 100 * 0.5 / 6.5)
    half = {name: bottom[name] for name in vbench.SEMANTIC}
    assert vbench.totals(half) == pytest.approx({"Semantic": 0})
    result = {name.replace(" ", "_"): [high, []] for name, high in top.items()}
    result["imaging_quality"] = [100.0, []]  # as some versions write it
    (tmp_path / "scores.json").write_text(json.dumps(result))
    monkeypatch.setattr(
        "sys.argv", ["vbench", "--prompts", "x", "--scores", str(tmp_path / "scores.json")]
    )
    vbench.run(vbench.main, vbench.Config)
    assert "| VBench | 100 | 100 | 100 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"order": "backward"}, {"size": (16, 16)}, {"extended": ""}]
)
def test_clips_of_other_settings_are_refused(changes, weights, tmp_path):
    """What is there was made in just this way, or is not taken for it."""
    vbench.export(config_of(weights, tmp_path, samples=1), 0, 1, CPU)
    before = {p: p.read_bytes() for p in (tmp_path / "clips").iterdir()}
    with pytest.raises(UserError, match="clips holds clips of other weights or settings"):
        vbench.export(config_of(weights, tmp_path, **changes), 0, 1, CPU)
    assert {p: p.read_bytes() for p in (tmp_path / "clips").iterdir()} == before


@pytest.mark.parametrize(
    "prompts,extended,says",
    [
        ("a/b\n", "", "cannot be a file name"),
        ("a\nb\n", "c\n", "has 1 prompts but"),
        ("a\nb\na\n", "", "the prompt 'a' twice"),
        ("\n", "", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_exported(prompts, extended, says, weights, tmp_path):
    path = str(tmp_path / "extended.txt") if extended else ""
    config = config_of(weights, tmp_path, extended=path)
    (tmp_path / "prompts.txt").write_text(prompts)
    (tmp_path / "extended.txt").write_text(extended)
    with pytest.raises(UserError, match=says):
        vbench.export(config, 0, 1, CPU)
    assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize(
    "flags,says",
    [
        ({"order": "loop"}, "--order loop"),
        ({"size": (32, 20)}, "32 20"),
        ({"format": ".avi"}, "--format '.avi'"),
        ({}, "--prompts"),
    ],
)
def test_bad_flags_are_one_sentence(flags, says, weights, tmp_path, monkeypatch, capsys):
    config = config_of(weights, tmp_path)
    own = (
        {"weights": weights, "prompts": config.prompts, "extended": config.extended}
        if flags
        else {}
    )
    code, line = command_line(monkeypatch, capsys, vbench, **own | flags)
    assert code == 2 and says in line


@pytest.mark.parametrize("text", ["", "[1]", '{"color": 3}', '{"color": []}'])
def test_damaged_scores_are_a_user_error(text, tmp_path):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(UserError, match="not a result file of VBench"):
        vbench.read_scores(tmp_path / "scores.json")
