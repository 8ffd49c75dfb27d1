"""The students that the paper's tables compare, and the commands that train them.

A student is a stage-1 run and a stage-2 run that starts from it; names follow the paper's Table 5.
All share teacher, VAE and ODE pairs and differ only in the flags written here. toy/tables.py
measures them.

    python -m toy.students --seeds 0 1 2 --jobs 2    # one thread a job; stop and go on at will
"""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.common import UserError, end_stopped, from_cli, read_pickle, run, stop_signals
from lib.pairs import difference
from lib.states import contents

STAGE1 = {  # flags of train_ode.py
    "p0": "--anchors 0",
    "p1": "--anchors 1",
    "p2": "--anchors 2",
    "p3": "--anchors 3",
    "b6": "--block 6 --anchors 0 --head 3",
    "p3-loss": "--anchors 3 --loss_on_anchors",
    "clean-p3": "--anchors 3 --teacher_forcing",
    "clean-p0": "--anchors 0 --teacher_forcing",
}
AR = {3: "out/ar", 0: "out/ar0"}  # P: an autoregressive teacher's folder; its pairs in .../pairs
CAUSAL1 = {}  # stages 1 of Causal Forcing (zoo/), whole commands
for P, ar in AR.items():
    teacher = f"--anchors {P} --teacher {ar}/teacher.safetensors --weights {ar}/teacher.safetensors"
    CAUSAL1[f"causal-p{P}"] = f"-m zoo.causal_ode {teacher} --data {ar}/pairs"
    CAUSAL1[f"cd-p{P}"] = f"-m zoo.consistency {teacher}"
STAGE2 = {  # student: (its stage 1, flags of train_dmd.py)
    "exp1": ("p0", "--anchors 0"),
    "exp3": ("b6", STAGE1["b6"]),
    "exp5": ("b6", "--anchors 3"),
    "exp7": ("p3", "--anchors 3"),
    "exp9": ("p3", STAGE1["b6"]),
    "loss": ("p3-loss", "--anchors 3"),
    "exp10": ("p1", "--anchors 1"),
    "exp11": ("p2", "--anchors 2"),
    "separate": ("p3", "--anchors 3 --shared_student false --shared_critic false"),
    "separate-critic": ("p3", "--anchors 3 --shared_critic false"),
}
CAUSAL = {
    f"{way}{P}": (f"{way}-p{P}", f"--anchors {P}")
    for way in ("clean", "causal", "cd")
    for P in (3, 0)
}
BUDGET = (  # the paper's two plans, for as long as a laptop can [ours]
    "--plans paper --steps 300 --batch 16 --lr 5e-4",
    "--plans paper --steps 120 --ratio 2 --batch 8 --lr 2e-5 --ema_start 60 --sheet_every 0",
)


def folder(root: str, name: str, seed: int) -> Path:
    """Where the run of this name and seed lies."""
    return Path(root) / f"{name}-{seed}"


def stage_1(root: str, weights: str, pairs: str, name: str, seed: int) -> str:
    """The command of a stage-1 run."""
    teacher = f"{weights}/teacher.safetensors"
    start = f"train_ode.py --teacher {teacher} --weights {teacher} --data {pairs}"
    what = CAUSAL1.get(name) or f"{start} {STAGE1[name]}"
    return f"{what} --out {folder(root, name, seed)} --seed {seed} {BUDGET[0]}"


def stage_2(root: str, weights: str, name: str, seed: int) -> str:
    """The command of a stage-2 run."""
    first, flags = (STAGE2 | CAUSAL)[name]
    teacher, student = f"{weights}/teacher.safetensors", folder(root, first, seed)
    return (
        f"train_dmd.py --student {student / 'student.safetensors'} --teacher {teacher} "
        f"--critic {teacher} --vae {weights}/vae.safetensors --out {folder(root, name, seed)} "
        f"--seed {seed} {BUDGET[1]} {flags}"
    )


def commands(
    root: str, weights: str, pairs: str, seeds: list[int]
) -> list[tuple[Path, Path | None, str]]:
    """(file a run ends with, file it needs first, command) of every run, stage 1 first."""
    todo: list[tuple[Path, Path | None, str]] = []
    for seed in seeds:
        for name in STAGE1 | CAUSAL1:
            end = folder(root, name, seed) / "student.safetensors"
            todo.append((end, None, stage_1(root, weights, pairs, name, seed)))
        for name, (first, flags) in (STAGE2 | CAUSAL).items():
            last = "backward" if "shared_student false" in flags else "student"
            end = folder(root, name, seed) / f"{last}.safetensors"
            need = folder(root, first, seed) / "student.safetensors"
            todo.append((end, need, stage_2(root, weights, name, seed)))
    return todo


@dataclass
class Config:
    """Train the students of the tables that are missing."""

    out: str = "out/tables"  # a folder a run
    weights: str = "toy/weights"  # teacher and VAE
    pairs: str = "out/pairs"  # made by train_ode.py --generate --plans paper
    seeds: tuple[int, ...] = (0, 1, 2)
    students: tuple[str, ...] = ()  # only these (and what they start from); default: Table 5's
    jobs: int = 2  # runs at a time, one thread each


def is_done(end: Path, line: str) -> bool:
    """Whether a run has ended. raises: UserError if it was of other flags, teacher or pairs"""
    state = end.parent / "state.pt"
    if not end.exists():
        return False
    if not state.exists():
        print(f"note: {end} is taken as it is; no state.pt beside it says how it was trained")
        return True
    module, *words = line.removeprefix("-m ").split()
    cls = importlib.import_module(module.removesuffix(".py")).Config
    asked, made = asdict(from_cli(cls, words)), json.loads(read_pickle(state)["config"])
    asked |= contents(asked, getattr(cls, "UNREAD", ()))
    # what is known by its content may lie elsewhere; the VAE draws sheets
    moved = {k.removeprefix("content of --") for k in made if k.startswith("content of --")}
    asked = {k: v for k, v in asked.items() if k in made.keys() - moved - {"out", "vae"}}
    if wrong := difference(made, asked):
        raise UserError(f"{end} was trained otherwise: {wrong}; delete it, or use another --out")
    return True


def runs_to_go(config: Config) -> list[tuple[Path, Path | None, str]]:
    """The runs that are asked for and not finished, as `commands` has them. raises: UserError"""
    every = STAGE2 | CAUSAL
    unknown = set(config.students) - set(every)
    if unknown:
        raise UserError(f"unknown students {', '.join(sorted(unknown))}; use {', '.join(every)}")
    wanted = set(config.students or STAGE2)
    wanted |= {every[name][0] for name in wanted}
    todo = commands(config.out, config.weights, config.pairs, list(config.seeds))
    return [
        (end, need, line)
        for end, need, line in todo
        if end.parent.name.rsplit("-", 1)[0] in wanted and not is_done(end, line)
    ]


def begin(end: Path, line: str) -> subprocess.Popen:
    """Start a run on one thread; what it prints goes to run.out in its folder."""
    end.parent.mkdir(parents=True, exist_ok=True)
    with open(end.parent / "run.out", "a") as log:
        return subprocess.Popen(
            [sys.executable, *line.split()],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def main(config: Config) -> None:
    todo = runs_to_go(config)
    running: list[tuple[subprocess.Popen, str]] = []
    print(f"{len(todo)} runs to go", flush=True)
    with stop_signals() as stop:
        while (todo or running) and not stop():
            for job, line in [x for x in running if x[0].poll() is not None]:
                running.remove((job, line))
                if job.returncode and not stop():
                    raise UserError(f"a run failed with code {job.returncode}: {line}")
            ready = next((x for x in todo if x[1] is None or x[1].exists()), None)
            if ready is None or len(running) >= config.jobs:
                time.sleep(1)
                continue
            todo.remove(ready)
            end, _, line = ready
            print(f"{len(todo):3} left  {line}", flush=True)
            running.append((begin(end, line), line))
    for job, _ in running:
        job.terminate()  # saves at the end of its step
        job.wait()
    if todo or running:
        end_stopped(stop())


if __name__ == "__main__":
    run(main, Config)
