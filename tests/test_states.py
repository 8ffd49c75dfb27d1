"""The folder of a run: where it goes on and what changes is said; states are kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from tiny import ROOT, WORDED, command_line, rows, same, saved, tiny_dit

from dit import save_dit
from lib import common, states
from lib.common import UserError
from lib.tensors import read_tensors, write_safetensors
from lib.training import EMA, locked, training_steps, trapezoid


@dataclass
class Config:
    """A run that knows all there is to a run."""

    FREE = ("lr",)
    out: str
    steps: int = 6
    schedule_steps: int = 0
    decay: float = 0.5
    lr: float = 1e-2
    seed: int = 0
    save_every: int = 0
    keep: int = 0


@dataclass
class Files(Config):
    """And reads files."""

    teacher: str = ""
    prompts: str = ""
    data: str = ""
    clips: str = ""


def train(out, stop_at=None, **changes):
    """A run of a tiny transformer towards zero; the folder it wrote.

    stop_at: SIGTERM in this step"""
    config = Config(**{"out": str(out)} | changes)
    model = tiny_dit(2, **WORDED).requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), config.lr)
    average, device = EMA(model, 0.5), torch.device("cpu")
    trained = {"dit": (model, optimiser)}
    try:
        for step, row in training_steps(config, "test", trained, device, {"ema": average}):
            planned = config.schedule_steps or config.steps
            for group in optimiser.param_groups:
                group["lr"] = trapezoid(step, planned, config.lr, 0, config.decay)
            loss = sum(p.square().sum() for p in model.parameters())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            average.update(model)
            row |= {"loss": loss.item(), "lr": group["lr"]}
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        pass
    return out


def test_where_a_run_goes_on_is_said(tmp_path, capsys):
    """At its step; where nothing is left, that; a second run of a finished one changes nothing."""
    train(tmp_path, stop_at=2)
    assert "stopped at step 3; run the same command to go on" in capsys.readouterr().out
    train(tmp_path)
    assert "state.pt: resuming at step 3 of 6\n" in capsys.readouterr().out
    before = saved(tmp_path), rows(tmp_path)
    train(tmp_path)
    assert "resuming at step 6 of 6; nothing left to do" in capsys.readouterr().out
    train(tmp_path, steps=4, schedule_steps=6)
    assert "resuming at step 6 of 4; nothing left to do" in capsys.readouterr().out
    assert same(saved(tmp_path), before[0]) and rows(tmp_path) == before[1]


@pytest.mark.parametrize(
    "first, then, says",
    [
        ({}, {"seed": 1}, r"other settings \(seed=0, now 1\); use them again, or another --out"),
        ({}, {"decay": 0.25}, r"other settings \(decay=0.5, now 0.25\)"),
        ({}, {"steps": 9}, "planned over 6, now over 9.* use --schedule_steps 6"),
        ({}, {"steps": 3}, "planned over 6, now over 3"),
        ({}, {"decay": 0.0, "lr": 1.0}, r"other settings \(decay=0.5, now 0.0\)"),
        (
            {"steps": 3, "schedule_steps": 6},
            {"steps": 6, "schedule_steps": 9},
            "over 6, now over 9",
        ),
    ],
)
def test_what_must_not_change_is_refused(first, then, says, tmp_path):
    """Settings of another run; a number of steps that would have changed rates that are past."""
    train(tmp_path, stop_at=1, **first)
    before = saved(tmp_path)
    with pytest.raises(UserError, match=says):
        train(tmp_path, **first | then)
    assert same(saved(tmp_path), before) and not (tmp_path / "lock").exists()


def edit_teacher(folder):
    save_dit(tiny_dit(5, **WORDED), folder / "teacher.safetensors")


def edit_prompts(folder):
    (folder / "prompts.txt").write_text("a red disc\na blue disc\n")


def edit_pairs(folder):
    (folder / "pairs" / "index.json").write_text('{"shards": 1}')


def edit_clips(folder):
    write_safetensors(folder / "clips" / "latents-0.safetensors", {"latents": torch.ones(3)})


@pytest.mark.parametrize("edit", [edit_teacher, edit_prompts, edit_pairs, edit_clips])
def test_files_that_hold_something_else_are_refused(edit, tmp_path):
    """The flags are the same: a teacher trained again, prompts edited, pairs or clips made anew. A
    state of before contents were kept, and files that are only touched, go on."""

    def run(**changes):
        flags = {"out": str(tmp_path / "run"), "decay": 0.0} | changes
        paths = {"teacher": "teacher.safetensors", "prompts": "prompts.txt"}
        paths |= {"data": "pairs", "clips": "clips"}
        config = Files(**flags, **{k: str(tmp_path / v) for k, v in paths.items()})
        model = tiny_dit(2, **WORDED).requires_grad_(True)
        trained = {"dit": (model, torch.optim.AdamW(model.parameters()))}
        for _ in training_steps(config, "test", trained, torch.device("cpu")):
            sum(p.sum() for p in model.parameters()).backward()
            trained["dit"][1].step()

    save_dit(tiny_dit(3, **WORDED), tmp_path / "teacher.safetensors")
    (tmp_path / "prompts.txt").write_text("a red disc\na red ring\n")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "index.json").write_text("{}")
    write_safetensors(tmp_path / "clips" / "latents-0.safetensors", {"latents": torch.zeros(3)})
    run(steps=1)
    save_dit(tiny_dit(3, **WORDED), tmp_path / "teacher.safetensors")
    run(steps=2)
    edit(tmp_path)
    with pytest.raises(UserError, match=r"other settings \(content of --\w+='\w+', now '\w+'\)"):
        run(steps=3)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    old = {k: v for k, v in json.loads(state["config"]).items() if not k.startswith("content")}
    torch.save(state | {"config": json.dumps(old)}, tmp_path / "run" / "state.pt")
    run(steps=3)


def test_a_run_goes_on_longer_as_planned(tmp_path):
    """3 steps of a plan of 6, then the rest: bit for bit the run of 6. Without decay no plan is
    needed."""
    train(tmp_path / "whole")
    train(tmp_path / "parts", steps=3, schedule_steps=6)
    train(tmp_path / "parts", steps=6)
    train(tmp_path / "flat", decay=0.0)
    train(tmp_path / "flat parts", decay=0.0, steps=2)
    train(tmp_path / "flat parts", decay=0.0)
    for a, b in (("whole", "parts"), ("flat", "flat parts")):
        assert same(saved(tmp_path / a), saved(tmp_path / b))
        assert rows(tmp_path / a) == rows(tmp_path / b)


def test_a_free_setting_changes_from_here_on(tmp_path, capsys):
    """A smaller --lr, constant: said in a line, and what the optimiser does from there on."""
    train(tmp_path / "a", steps=3, decay=0.0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(tmp_path / "a", decay=0.0)
    train(tmp_path / "b", decay=0.0, lr=1e-3)
    assert "state.pt: going on with --lr 0.001 instead of 0.01\n" in capsys.readouterr().out
    assert [r["lr"] for r in rows(tmp_path / "b")] == [1e-2] * 3 + [1e-3] * 3
    assert not same(saved(tmp_path / "a"), saved(tmp_path / "b"))


def test_an_optimiser_takes_the_rate_of_its_run(tmp_path):
    """Scripts with a constant rate set it once, before the state is loaded: it holds afterwards."""
    model = tiny_dit(2, **WORDED).requires_grad_(True)
    for lr in (1e-2, 1e-3):
        optimiser = torch.optim.AdamW(model.parameters(), lr)
        trained = {"dit": (model, optimiser)}
        if (tmp_path / "state.pt").exists():
            states.load_state(tmp_path / "state.pt", {"lr": lr}, trained, ("lr",))
        sum(p.sum() for p in model.parameters()).backward()
        optimiser.step()
        states.save_state(tmp_path / "state.pt", 1, {"lr": lr}, trained)
        optimiser.zero_grad(set_to_none=True)
    assert optimiser.param_groups[0]["lr"] == 1e-3
    assert all(s["step"] == 2 for s in optimiser.state.values())


def test_states_are_kept_and_a_run_goes_back_to_one(tmp_path, capsys):
    """Every 2 steps, beside the last; copied back, the run does the rest again, bit for bit."""
    train(tmp_path, keep=2)
    names = sorted(p.name for p in tmp_path.glob("*.pt"))
    assert names == ["state-000002.pt", "state-000004.pt", "state-000006.pt", "state.pt"]
    assert same(saved(tmp_path), saved(tmp_path, "state-000006.pt"))
    before = saved(tmp_path), rows(tmp_path)
    shutil.copy(tmp_path / "state-000004.pt", tmp_path / "state.pt")
    train(tmp_path)
    assert "resuming at step 4 of 6" in capsys.readouterr().out
    assert same(saved(tmp_path), before[0]) and rows(tmp_path) == before[1]


@pytest.mark.parametrize("named", [{}, {"network": "dit"}])
def test_a_student_is_taken_from_any_state(named, tmp_path, monkeypatch, capsys):
    """The average of that step, with the network's sizes: it loads as what a run writes does."""
    from dit import DiTConfig, load_dit

    train(tmp_path, keep=2)
    flags = {"student": tmp_path / "state-000004.pt", "out": tmp_path / "s.safetensors"}
    code, error = command_line(monkeypatch, capsys, states, **flags, **named)
    assert code == 0, error
    state, tensors = saved(tmp_path, "state-000004.pt"), read_tensors(flags["out"])[0]
    assert all(torch.equal(x, state[f"ema/{k}"]) for k, x in tensors.items())
    assert any(not torch.equal(x, state[f"dit/{k}"]) for k, x in tensors.items())
    assert load_dit(flags["out"]).config == DiTConfig(**WORDED)


def test_which_student_must_be_said(tmp_path, monkeypatch, capsys):
    """Of several, one must be named; critics have no average; what is no state is refused."""
    models = {n: tiny_dit(i, **WORDED) for i, n in enumerate(("student0", "student1", "critic0"))}
    trained = {
        n: (m.requires_grad_(True), torch.optim.AdamW(m.parameters())) for n, m in models.items()
    }
    for model, optimiser in trained.values():
        sum(p.sum() for p in model.parameters()).backward()
        optimiser.step()
    average = EMA(models["student0"], 0.5)
    states.save_state(tmp_path / "state.pt", 7, {}, trained, ema1=average)
    torch.save({"step": 3}, tmp_path / "other.pt")
    out = tmp_path / "s.safetensors"
    for flags, says in (
        ({}, "--network none must be student0 or student1 or critic0"),
        ({"network": "ema"}, "--network ema must be student0"),
        ({"student": tmp_path / "other.pt"}, "other.pt is not a state of a training"),
        ({"out": tmp_path / "state.pt"}, "is also what is read"),
    ):
        words = {"student": tmp_path / "state.pt", "out": out} | flags
        code, error = command_line(monkeypatch, capsys, states, **words)
        assert code == 2 and says in error and not out.exists()
    for network, want in (
        ("student0", models["student0"].state_dict()),
        ("student1", average.shadow),
        ("critic0", models["critic0"].state_dict()),
    ):
        states.main(states.Config(str(tmp_path / "state.pt"), str(out), network))
        assert same(read_tensors(out)[0], {k: x.detach() for k, x in want.items()})


def test_a_recipe_goes_with_the_student(tmp_path):
    """How a student is trained stands in its metadata, also where it is taken from a state."""
    model = tiny_dit(2, **WORDED).requires_grad_(True)
    model.recipe = {"block": 3}
    optimiser = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimiser.step()
    states.save_state(tmp_path / "state.pt", 1, {}, {"dit": (model, optimiser)})
    states.main(states.Config(str(tmp_path / "state.pt"), str(tmp_path / "s.safetensors")))
    assert read_tensors(tmp_path / "s.safetensors")[1]["recipe"] == {"block": 3}


# ---------------------------------------------------------------- one run a folder
def test_two_runs_in_one_folder_are_refused(tmp_path):
    """In one process, taking turns: the second is refused by name, the first goes on unharmed."""
    alone = train(tmp_path / "alone")
    config = Config(str(tmp_path / "b"))
    model = tiny_dit(2, **WORDED).requires_grad_(True)
    trained = {"dit": (model, torch.optim.AdamW(model.parameters()))}
    first = training_steps(config, "first", trained, torch.device("cpu"))
    next(first)
    with pytest.raises(UserError, match=f"b is in use by process {os.getpid()} on .*another --out"):
        train(tmp_path / "b")
    first.close()
    assert same(saved(train(tmp_path / "b")), saved(alone))
    assert not (tmp_path / "b" / "lock").exists()


HOLD = """import sys, time
from lib.training import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    """Another process holds it: refused. Killed: the file is still there and holds nobody up."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on {common.HOST}"):
            train(tmp_path)
        assert not (tmp_path / "state.pt").exists()
        holder.kill()
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "lock").exists()


def test_temporaries_of_a_killed_run_are_cleared_at_start(tmp_path):
    """What a killed save left goes before the first step, not only when it is saved again."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / f".student.{common.HOST}.{gone.pid}.tmp.safetensors"
    left.touch()
    train(tmp_path, steps=1, decay=0.0)
    assert not left.exists()


def test_an_out_that_is_none_is_refused_first(tmp_path):
    """A file, or nothing at all, in place of the folder."""
    (tmp_path / "file").touch()
    for out, says in ((tmp_path / "file", "is a file; name a folder"), ("", "--out is empty")):
        with pytest.raises(UserError, match=says):
            train(out)


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path):
    """The first finishes the step, however long that takes; the second does not wait for it."""
    code = f"""import sys, time, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from lib.common import run
from lib.training import training_steps
from test_states import Config
def main(config):
    for step, row in training_steps(config, "test", {{}}, torch.device("cpu")):
        print("step", flush=True)
        time.sleep(60)
run(main, Config)
"""
    words = [sys.executable, "-c", code, "--out", str(tmp_path)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout.readline() == "step\n"
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Ctrl-C stops at once" in error
    assert "interrupted" in error and "Traceback" not in error
