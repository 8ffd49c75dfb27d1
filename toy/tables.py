"""The paper's ablations as data: which students exist, the commands that train them, and which of them a table compares.

A student is a stage-1 run and a stage-2 run that starts from it; names follow the paper's Table 5. All share teacher, VAE
and ODE pairs and differ only in the flags written here. `evaluate.py --table N` reads this and measures.

    python -m toy.tables --seeds 0 1 2 --jobs 2        # train what is missing, one thread a job; stop and go on at will
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import anchors
from anchors import Plan
from lib.common import UserError, run, stop_signals

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
AR = {
    3: "out/ar",
    0: "out/ar0",
}  # folders of the autoregressive teachers (train_ar.py); their causal pairs lie in .../pairs
for P, ar in AR.items():
    teacher = (
        f"--anchors {P} --teacher ar:{ar}/teacher.safetensors --weights {ar}/teacher.safetensors"
    )
    STAGE1 |= {f"causal-p{P}": f"{teacher} --data {ar}/pairs", f"cd-p{P}": f"{teacher} --method cd"}
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
BUDGET = (
    "--steps 300 --batch 16 --lr 5e-4",  # [ours] a laptop's
    "--steps 120 --ratio 2 --batch 8 --lr 2e-5 --ema_start 60 --sheet_every 0",
)

FORWARD = anchors.forward(21)
DUMMY = anchors.backward(21, anchors=0, dummy=True)  # no anchors (Fig. 9b)
SIX = anchors.backward(21, block=6, anchors=0, head=3)  # blocks of six, all kept (Fig. 9c)
P1, P2, P3 = (anchors.backward(21, anchors=p) for p in (1, 2, 3))  # anchors dropped (Fig. 9d)


@dataclass(frozen=True)
class Row:
    """One line of a table: a student, the plan by which it generates, what the paper has there, and the seeds if not all."""

    label: str
    student: str
    plan: Plan
    paper: str = ""
    seeds: tuple[int, ...] = ()


LONG = {
    (way, sink, seconds): numbers
    for way, sink, row in (  # paper's Table 3: VBench's flicker / dynamic degree
        ("forward", "past", ("95.11 / 81.25", "94.53 / 92.97", "94.43 / 87.50")),
        ("forward", "both", ("97.50 / 46.80", "97.00 / 44.50", "96.90 / 44.50")),
        ("backward", "future", ("95.94 / 71.09", "94.93 / 81.25", "94.67 / 85.16")),
        ("backward", "both", ("97.13 / 55.47", "97.04 / 60.16", "97.04 / 56.25")),
    )
    for seconds, numbers in zip((10, 30, 100), row)
}
TABLES = {  # paper: FR inter / intra
    1: (
        Row("forward", "exp7", FORWARD, "1.13 / 0.88"),
        Row("backward, P = 0", "exp1", DUMMY, "1.42 / 0.89"),
        Row("backward, P = 1", "exp10", P1, "1.26 / 0.93"),
        Row("backward, P = 2", "exp11", P2, "1.23 / 0.93"),
        Row("backward, P = 3", "exp7", P3, "1.07 / 0.97"),
        Row("backward, P = 3, anchors as output", "exp7", SIX, "1.46 / 0.99"),
    ),
    5: (
        Row("1: no anchors, B = 3", "exp1", DUMMY, "1.42 / 0.89"),
        Row("2: no anchors, B = 6", "exp3", SIX, "1.48 / 0.98"),
        Row("3: no anchors, B = 6, three dropped", "exp3", P3, "1.08 / 0.98"),
        Row("4: stage 2 only, kept", "exp5", SIX, "1.45 / 1.04"),
        Row("5: stage 2 only", "exp5", P3, "1.17 / 1.03"),
        Row("6: both stages, kept", "exp7", SIX, "1.46 / 0.99"),
        Row("7: both stages", "exp7", P3, "1.07 / 0.97"),
        Row("8: stage 1 only, kept", "exp9", SIX, "1.45 / 0.99"),
        Row("9: stage 1 only", "exp9", P3, "1.37 / 0.95"),
        Row("8': loss on anchors, kept", "loss", SIX, "1.38 / 0.99"),
        Row("9': loss on anchors", "loss", P3, "1.15 / 0.95"),
    ),
    6: (
        Row("10: P = 1", "exp10", P1, "1.26 / 0.93"),
        Row("11: P = 2", "exp11", P2, "1.23 / 0.93"),
        Row("7: P = 3", "exp7", P3, "1.07 / 0.97"),
    ),
    2: tuple(
        Row(f"{way}, {what}", student, plan, paper)
        for way, plan, scores in (
            ("forward", FORWARD, ("83.42", "83.54", "83.81")),
            ("backward", P3, ("84.26", "83.96", "84.23")),
        )
        for what, student, paper in zip(
            ("separate student and critic", "separate critic", "all shared"),
            ("separate", "separate-critic", "exp7"),
            scores,
        )
    ),  # paper: VBench's total
    3: tuple(
        Row(
            f"{way}, {seconds} s, sink: {sink}",
            "exp7",
            anchors.long(latents, way, sink=sink),
            LONG.get((way, sink, seconds), ""),
        )
        for way in ("forward", "backward")
        for seconds, latents in ((10, 42), (30, 123), (100, 402))
        for sink in ("none", "past" if way == "forward" else "future", "both")
    ),
}

WAYS = {
    "noisy context (UniTemp)": (
        "p3",
        "exp7",
        "p0",
        "exp1",
    ),  # the initialisations: stage 1 and 2 with P = 3, with P = 0
    **{
        words: (f"{x}-p3", f"{x}3", f"{x}-p0", f"{x}0")
        for words, x in (("clean context", "clean"), ("causal ODE", "causal"), ("causal CD", "cd"))
    },
}
TABLES[10] = tuple(
    Row(f"{way}, stage {n + 1}, {name}", names[n if P else 2 + n], plan, seeds=() if P else (0,))
    for way, names in WAYS.items()
    for n in (0, 1)
    for name, plan, P in (
        ("forward", FORWARD, 3),
        ("backward, P = 3", P3, 3),
        ("backward, P = 0", DUMMY, 0),
    )
)


def folder(root: str, name: str, seed: int) -> Path:
    """Where the run of this name and seed lies."""
    return Path(root) / f"{name}-{seed}"


def commands(
    root: str, weights: str, pairs: str, seeds: list[int]
) -> list[tuple[Path, Path | None, str]]:
    """(the file a run ends with, the file it needs first, the command) of every run, stage 1 first."""
    todo = []
    for seed in seeds:
        for name, flags in STAGE1.items():
            out, teacher = folder(root, name, seed), f"{weights}/teacher.safetensors"
            start = "" if "--weights" in flags else f"--teacher {teacher} --weights {teacher} "
            data = "" if "--data" in flags else f"--data {pairs} "
            todo.append(
                (
                    out / "student.safetensors",
                    None,
                    f"train_ode.py {start}{data}--out {out} --seed {seed} {BUDGET[0]} {flags}",
                )
            )
        for name, (first, flags) in (STAGE2 | CAUSAL).items():
            out, student = (
                folder(root, name, seed),
                folder(root, first, seed) / "student.safetensors",
            )
            end = out / (
                "backward.safetensors" if "shared_student false" in flags else "student.safetensors"
            )
            teacher = f"{weights}/teacher.safetensors"
            todo.append(
                (
                    end,
                    student,
                    f"train_dmd.py --student {student} --teacher {teacher} --critic {teacher} "
                    f"--vae {weights}/vae.safetensors --out {out} --seed {seed} {BUDGET[1]} {flags}",
                )
            )
    return todo


@dataclass
class Config:
    """Train the students of the tables."""

    out: str = "out/tables"  # a folder a run
    weights: str = "toy/weights"  # teacher and VAE
    pairs: str = "out/pairs"  # made by train_ode.py --generate
    seeds: tuple[int, ...] = (0, 1, 2)
    students: tuple[
        str, ...
    ] = ()  # only these (and the stages 1 they need); default: all of the paper's tables
    jobs: int = 2  # runs at a time, one thread each


def main(config: Config) -> None:
    every = STAGE2 | CAUSAL
    unknown = set(config.students) - set(every)
    if unknown:
        raise UserError(f"unknown students {', '.join(sorted(unknown))}; use {', '.join(every)}")
    wanted = set(config.students or STAGE2)
    wanted |= {every[name][0] for name in wanted}
    todo = [
        (end, need, line)
        for end, need, line in commands(
            config.out, config.weights, config.pairs, list(config.seeds)
        )
        if not end.exists() and end.parent.name.rsplit("-", 1)[0] in wanted
    ]
    running: list[tuple[subprocess.Popen, str]] = []
    print(f"{len(todo)} runs to go", flush=True)
    with stop_signals() as stop:
        while (todo or running) and not stop():
            for job, line in [x for x in running if x[0].poll() is not None]:
                running.remove((job, line))
                if job.returncode:
                    raise UserError(f"a run failed with code {job.returncode}: {line}")
            ready = next((x for x in todo if x[1] is None or x[1].exists()), None)
            if ready and len(running) < config.jobs:
                todo.remove(ready)
                ready[0].parent.mkdir(parents=True, exist_ok=True)
                print(f"{len(todo):3} left  {ready[2]}", flush=True)
                with open(ready[0].parent / "run.out", "a") as log:
                    running.append(
                        (
                            subprocess.Popen(
                                [sys.executable, *ready[2].split()],
                                stdout=log,
                                stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": "1"},
                            ),
                            ready[2],
                        )
                    )
            else:
                time.sleep(1)
    for job, _ in running:
        job.terminate()  # saves at the end of its step
        job.wait()


if __name__ == "__main__":
    run(main, Config)
