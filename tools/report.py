"""A page to look at: a student's clips in every order, its table, curves in time, and an A/B test.

evaluate.py measures, lib/report.py writes HTML; this puts them together.

    python -m tools.report --clips 8 --out out/report         # then open out/report/index.html
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from film import frame_size, load_models
from torch import Tensor

import anchors
from anchors import Plan
from dit import load_dit
from evaluate import (
    Maker,
    drift,
    flickering_ratio,
    measure,
    measure_all,
    measure_true,
    plans_of,
    recipe_of,
    summary,
)
from lib import report
from lib.common import UserError, run, start
from lib.media import VideoWriter, write_sheet
from lib.statistics import Stat
from lib.world import World, find_world, numbers_of
from toy.students import folder
from toy.tables import DUMMY

KEPT = "backward, anchors as output"
WITHOUT = "backward, P = 0"
WORDS = {
    "forward": "From left to right.",
    "backward": "From the end to the beginning, each block with imagined latents before it.",
    KEPT: "The imagined latents are kept: blocks twice as long.",
    WITHOUT: "Another student, which has no anchors.",
    "inbetween": "Both ends first, then all between them.",
    "loop": "The last block reads the first one as its future.",
    "transition": "Two scenes, then the gap.",
    "story": "Scenes, then the gaps.",
}
LEGEND = (
    "Below each clip its plan: a row a step, a column a latent; green is made, yellow imagined and "
    "dropped, light green read from the cache."
)
COLUMNS = (
    "Caption: colour, shape, direction all right. FR (paper) and round trip (ours) are about 1 in "
    "real clips; read FR beside motion: blur has a low FR. Lost: how far what no word says "
    "wanders, 0 not at all, 1 as far as another clip's. ± is one standard error over clips."
)
PAIRS = 20  # of the A/B test


@dataclass
class Config:
    """Write a page with a student's clips, plans, table and curves, and an A/B test beside it."""

    out: str = "out/report"  # a folder
    weights: str = "toy/weights"  # a folder with student and VAE
    runs: str = "out/tables"  # where a student without anchors may be, exp1 of toy.students
    world: str = ""  # a module of captions and their reader; default: toy.world
    clips: int = 8  # how many held-out captions
    seed: int = 0  # of captions, clips and noise
    device: str = "auto"


@dataclass
class Shown:
    """What the page shows: clips by name with their plans, and a table."""

    plans: dict[str, Plan]
    videos: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, dict[str, Stat]] = field(default_factory=dict)


def student_without(config: Config, student: Maker) -> Maker | None:
    """The student of the tables that was trained without anchors, if it is there and alike."""
    path = folder(config.runs, "exp1", 0) / "student.safetensors"
    if not path.exists():
        return None
    dit = load_dit(path, torch.float32, student.dit.patch_embedding.weight.device)
    return replace(student, dit=dit) if dit.config == student.dit.config else None


def measured(config: Config, student: Maker, world: World, captions: Sequence[str]) -> Shown:
    """Make and measure clips by every plan of the student, and of the one without anchors."""
    vae, plans = student.vae, plans_of(recipe_of(student.dit))
    makers = dict.fromkeys(plans, student)
    if without := student_without(config, student):
        plans[WITHOUT], makers[WITHOUT] = DUMMY, without
    shown = Shown(plans)
    numbers = numbers_of(world, len(captions), config.seed)
    true, decoded = measure_true(vae, student.size[0], plans["forward"], captions, world, numbers)
    shown.rows["true clips, decoded"] = summary(decoded, true)
    for name, plan in plans.items():
        z, shown.videos[name] = makers[name].make(plan, captions)
        values = measure_all(vae, z, shown.videos[name], plan, world, captions)
        shown.rows[name] = summary(values, true)
    for name in anchors.ORDERS.keys() - plans.keys() - {"long"}:  # which has no length by default
        shown.plans[name] = anchors.ORDERS[name]()
        shown.videos[name] = student.make(shown.plans[name], captions[:1])[1]
    return shown


def write_clip(path: Path, video: Tensor) -> str:
    """Write video [3, F, H, W] as .mp4; its name."""
    with VideoWriter(path) as writer:
        writer.write(video)
    return path.name


def cards_of(path: Path, shown: Shown, caption: str) -> list[tuple[str, str, str, str]]:
    """Write a clip, a sheet and a picture of the plan for each name; what `report.clips` shows."""
    cards = []
    for name, video in shown.videos.items():
        file = re.sub(r"\W+", "-", name)
        anchors.write_picture(path / f"plan-{file}.png", shown.plans[name])
        write_sheet(path / f"{file}.png", video[:6], columns=11)
        clip = write_clip(path / f"{file}.mp4", video[0])
        cards.append((name, clip, f"plan-{file}.png", f"{WORDS.get(name, '')} “{caption}”"))
    return cards


def ab_test(path: Path, shown: Shown) -> str:
    """Write ab.html, with against without anchors (paper Table 9); what the page says of it.

    Where no student was trained without them: anchors dropped against anchors kept."""
    a, b = "backward", WITHOUT if WITHOUT in shown.videos else KEPT
    if b not in shown.videos:
        return report.paragraph("There is nothing to compare with.")
    pairs = [
        {
            "a": write_clip(path / f"pair-{n}-a.mp4", x),
            "b": write_clip(path / f"pair-{n}-b.mp4", y),
            "fr_a": summary(measure(x[None], shown.plans[a]))["FR inter"].mean,
            "fr_b": summary(measure(y[None], shown.plans[b]))["FR inter"].mean,
        }
        for n, (x, y) in enumerate(zip(shown.videos[a][:PAIRS], shown.videos[b]))
    ]
    report.write_ab(path / "ab.html", (a, b), pairs)
    says = "With anchors against without any, as in the paper's Table 9."
    if b == KEPT:
        says = (
            "Anchors dropped against anchors kept as output. The paper's Table 9 compares with a "
            "student that has none, which is not here: "
            "`python -m toy.students --students exp1 --seeds 0`."
        )
    return "<p><a href=ab.html>Look at pairs and choose</a></p>" + report.paragraph(says)


def ratios_section(shown: Shown) -> str:
    """FR at every boundary, mean over clips, of the plans that were measured."""
    measured_plans = [name for name in shown.plans if name in shown.rows]
    curves = {
        name: flickering_ratio(shown.videos[name]).nanmean(0).tolist() for name in measured_plans
    }
    both = [shown.plans[name].boundaries() for name in ("forward", "backward")]
    marked = [i for i, inter in enumerate(zip(*both)) if i and all(inter)]
    return report.timeline(curves, marked, 1) + report.paragraph(
        "Mean over clips at each boundary between latents; grey bands lie between blocks."
    )


def drift_section(student: Maker, captions: Sequence[str]) -> str:
    """Colour and motion of clips of 30 s against what was made first."""
    curves, recipe = {}, recipe_of(student.dit)
    for direction in ("forward", "backward"):
        for sink in ("none", "both"):
            plan = anchors.long(123, direction, recipe.block, recipe.anchors, sink=sink)
            video = student.make(plan, captions[:2])[1]
            curves[f"{direction}, sink: {sink}"] = drift(video, plan)
    section = report.paragraph("Each 5 s, in the order in which they were made, against the first.")
    for key, words, rule in (
        (
            "colour offset",
            "Change of the mean colour since the 5 s made first, in grey levels:",
            None,
        ),
        ("motion", "Motion over that of then:", 1.0),
    ):
        means = {name: values[key].mean(0).tolist() for name, values in curves.items()}
        section += report.paragraph(words) + report.timeline(means, start=1, rule=rule)
    return section


@torch.no_grad()
def main(config: Config) -> None:
    device = start(config.device)[2]
    if config.clips < 2:
        raise UserError(f"--clips {config.clips} must be at least 2, for a standard error")
    dit, vae = load_models(config.weights, torch.float32, device)
    world = find_world(config.world, dit.config.text_dim)
    student = Maker(dit, vae, frame_size((), dit, vae), config.seed)
    captions = [world.caption(n) for n in numbers_of(world, config.clips, config.seed)]
    path, shown = Path(config.out), measured(config, student, world, captions)
    sections = [
        ("Clips", report.paragraph(LEGEND) + report.clips(cards_of(path, shown, captions[0]))),
        (
            f"{len(captions)} held-out captions",
            report.table(shown.rows) + report.paragraph(COLUMNS),
        ),
        ("Flickering ratio along time", ratios_section(shown)),
        ("Drift over 30 s", drift_section(student, captions)),
        ("Which one flickers less?", ab_test(path, shown)),
    ]
    report.write_page(path / "index.html", "Any order", sections)
    print(report.markdown(shown.rows))
    print(f"look at {path / 'index.html'}")


if __name__ == "__main__":
    run(main, Config)
