"""The paper's tables again: which student and which plan make each row, and what is measured of it.

Each training seed is measured on captions, clips and noise of its own, so that the error over seeds
holds all there is. Two rows of true clips stand first: what the numbers would be of the real thing,
and of other real clips of the same captions, which is the floor of the Fréchet distance.

    python -m toy.tables --table 1 --clips 48        # students of `python -m toy.students`
    python -m toy.tables --table 1 --share_noise none start all      # each sampled in three ways
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import anchors
from anchors import HORIZON, Plan
from dit import load_dit
from evaluate import Maker, drift, measure_made, measure_true, measure_words, summary
from lib import report
from lib.changes import temporal_flickering
from lib.common import UserError, run, start
from lib.statistics import Stat, Values, joined, over_runs
from lib.world import OTHER, numbers_of
from toy import inbetween, world
from toy.students import CAUSAL, STAGE2, commands, folder, is_done
from vae import VAE, load_vae

FORWARD = anchors.forward(21)
DUMMY = anchors.backward(21, anchors=0, dummy=True)  # no anchors (Fig. 9b)
SIX = anchors.backward(21, block=6, anchors=0, head=3)  # blocks of six, all kept (Fig. 9c)
P1, P2, P3 = (anchors.backward(21, anchors=p) for p in (1, 2, 3))  # anchors dropped (Fig. 9d)


@dataclass(frozen=True)
class Row:
    """One line of a table: a student, the plan by which it generates, what the paper has there.

    seeds: if not all"""

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


# ---------------------------------------------------------------- measuring
@dataclass
class Config:
    """Measure the students of a table."""

    table: int  # 1 to 6, or 10 (the initialisations)
    runs: str = "out/tables"  # where the students are
    weights: str = "toy/weights"  # VAE, and what Table 4 compares
    pairs: str = "out/pairs"  # what the students were trained on, as toy.students was told
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds
    clips: int = 48  # held-out captions, others for each seed
    share_noise: tuple[str, ...] = ()  # sample each with none, start, all; default: as trained
    out: str = ""  # also write the table as .json
    device: str = "auto"


@dataclass
class Setting:
    """What all students of one seed are measured with: captions, and true clips to compare with."""

    seed: int
    captions: list[str]
    true: Values
    decoded: dict[str, Stat]  # rows of true clips, and of others of the same captions
    others: dict[str, Stat]


def setting(config: Config, vae: VAE, seed: int) -> Setting:
    """The captions and true clips of a seed."""
    numbers = numbers_of(config.clips, seed)
    captions = [world.caption(number) for number in numbers]
    true, decoded = measure_true(vae, 32, FORWARD, captions, world, numbers)
    others = [number + OTHER for number in numbers]
    floor = measure_true(vae, 32, FORWARD, captions, world, others)[1]
    return Setting(seed, captions, true, summary(decoded, true), summary(floor, true))


def measure_long(maker: Maker, plan: Plan, captions: list[str], batch: int = 4) -> Values:
    """What is left of long clips in the 5 s made last, against the 5 s made first."""
    parts = []
    for a in range(0, len(captions), batch):
        some = captions[a : a + batch]
        video = maker.make(plan, some, a)[1]
        words = measure_words(world, video, plan, some)
        last = {name: values[:, -1] for name, values in drift(video, plan).items()}
        parts.append(words | {"flicker (VBench)": temporal_flickering(video)} | last)
    return joined(parts)


def columns_of(table: int) -> tuple[str, ...]:
    """What a table shows of each student."""
    if table == 2:
        return ("caption", "motion", "Fréchet")
    if table == 3:
        words = ("caption", "caption, last made", "lost: ball", "lost: ground", "flicker (VBench)")
        return words + ("colour offset", "contrast", "sharpness", "motion")
    ratios = ("FR inter", "FR inter max", "FR intra", "FR intra max")
    return (*ratios, "round trip", "motion", "caption", "frame 0: colours")


def chosen(row: dict[str, Stat], table: int) -> dict[str, Stat]:
    """The columns of a row that a table shows."""
    return {name: row[name] for name in columns_of(table) if name in row}


def student_file(config: Config, row: Row, seed: int) -> Path:
    """The weights of a row's student: those of its direction, where directions have their own."""
    path = folder(config.runs, row.student, seed)
    own = path / f"{'backward' if row.plan.name == 'backward' else 'forward'}.safetensors"
    return own if own.exists() else path / "student.safetensors"


def rows_there(config: Config) -> list[Row]:
    """The rows of --table whose students are all there; the others are named with their command.

    raises: UserError with that command if no row is left, or naming a student trained otherwise"""
    rows, missing = [], set()
    runs = commands(config.runs, config.weights, config.pairs, list(config.seeds))
    shown = {
        folder(config.runs, row.student, s) for row in TABLES[config.table] for s in config.seeds
    }
    for end, _, line in runs:
        if end.parent in shown and (end.parent / "state.pt").exists():
            is_done(end, line)
    for row in TABLES[config.table]:
        seeds = row.seeds or config.seeds
        absent = {(row.student, s) for s in seeds if not student_file(config, row, s).exists()}
        missing |= absent
        rows += [] if absent else [row]
    if missing:
        names = ", ".join(sorted(f"{name}-{seed}" for name, seed in missing))
        seeds = " ".join(sorted({str(seed) for _, seed in missing}))
        finals = " ".join(sorted({name for name, _ in missing} & (STAGE2 | CAUSAL).keys()))
        says = (
            f"students {names} are not trained yet: python -m toy.students --out {config.runs} "
            f"--seeds {seeds} --students {finals}"
        )
        if not rows:
            raise UserError(says)
        print(says)
    return rows


def ways_of(row: Row, share_noise: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(label, noise rule) of each way to sample a row: those asked for, if it has anchors."""
    if share_noise and any(step.anchors for step in row.plan.steps):
        yield from ((f"{row.label}, noise: {share}", share) for share in share_noise)
    else:
        yield row.label, ""


def measure_row(row: Row, maker: Maker, where: Setting) -> dict[str, Stat]:
    """All that is measured of one student by one plan."""
    if row.plan.length > HORIZON:
        return summary(measure_long(maker, row.plan, where.captions), where.true)
    return summary(measure_made(maker, row.plan, where.captions, world), where.true)


@torch.no_grad()
def table(config: Config, device: torch.device) -> dict[str, dict[str, object]]:
    """The rows of --table, measured, after two of true clips. raises: UserError"""
    if config.table not in TABLES:
        raise UserError(f"--table {config.table} must be 1 to 6, or 10 (the initialisations)")
    vae = load_vae(config.weights, device=device)
    rows = rows_there(config)
    seeds = {seed for row in rows for seed in row.seeds or config.seeds}
    settings = {seed: setting(config, vae, seed) for seed in sorted(seeds)}
    truths = {
        "true clips, decoded": [where.decoded for where in settings.values()],
        "other true clips, decoded": [where.others for where in settings.values()],
    }
    result: dict[str, dict[str, object]] = {
        name: chosen(over_runs(found), config.table) for name, found in truths.items()
    }
    for row in tqdm(rows, desc=f"table {config.table}", unit="row"):
        for label, share in ways_of(row, config.share_noise):
            found = []
            for seed in row.seeds or config.seeds:
                dit = load_dit(student_file(config, row, seed), torch.float32, device)
                maker = Maker(dit, vae, (32, 32), seed, None, share)
                found.append(measure_row(row, maker, settings[seed]))
            shown = chosen(over_runs(found), config.table)
            result[label] = ({"paper": row.paper} if row.paper else {}) | shown
    return result


def main(config: Config) -> None:
    if config.clips < 2:
        raise UserError(f"--clips {config.clips} must be at least 2, for a standard error")
    if wrong := set(config.share_noise) - {"none", "start", "all"}:
        raise UserError(f"--share_noise {min(wrong)} must be none, start or all")
    device = start(config.device)[2]
    if config.table == 4:
        rows = inbetween.table(inbetween.Config(config.weights, clips=config.clips), device)
    else:
        rows = table(config, device)
    report.show(rows, config.out)


if __name__ == "__main__":
    run(main, Config)
