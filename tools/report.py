"""A page to look at: a student's clips in every order, its table, curves in time, and an A/B test.

evaluate.py measures, lib/report.py writes HTML; this puts them together.

    python -m tools.report --clips 8 --out out/report         # then open out/report/index.html
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import anchors
from anchors import Plan
from dit import load_dit
from evaluate import Maker, flickering_ratio, measure, measure_all, measure_true, summary
from generate import frame_size, load_models, looped
from lib import report
from lib.common import check_out, run, start
from lib.media import VideoWriter, write_sheet
from lib.recipe import recipe_of
from lib.statistics import Stat
from lib.world import find_world, numbers_of
from plans import plans_of
from tools.plan import write_picture
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
    "loop": "The last block reads the first one as its future; the clip begins after that.",
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
RATIOS = "Mean over clips at each boundary between latents; grey bands lie between blocks."
AGAINST = {
    WITHOUT: "With anchors against without any, as in the paper's Table 9.",
    KEPT: "Anchors dropped against anchors kept as output. The paper's Table 9 compares with a "
    "student that has none, which is not here: `python -m toy.students --students exp1 --seeds 0`.",
}
PAIRS = 20  # of the A/B test


@dataclass
class Config:
    """Write a page with a student's clips, plans, table and curves, and an A/B test beside it."""

    RANGES = {"clips": (2, 1000)}  # two, for a standard error
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


def measured(config: Config, student: Maker, captions: Sequence[str]) -> Shown:
    """Measure clips by every plan of both students; the other orders are only shown."""
    world = find_world(config.world, student.dit.config.text_dim)
    vae, plans = student.vae, plans_of(recipe_of(student.dit))
    makers = dict.fromkeys(plans, student)
    if without := student_without(config, student):
        plans[WITHOUT], makers[WITHOUT] = DUMMY, without
    shown = Shown(plans)
    numbers = numbers_of(len(captions), config.seed)
    true, decoded = measure_true(vae, student.size[0], plans["forward"], captions, world, numbers)
    shown.rows["true clips, decoded"] = summary(decoded, true)
    for name, plan in plans.items():
        z, shown.videos[name] = makers[name].make(plan, captions)
        values = measure_all(vae, z, shown.videos[name], plan, world, captions)
        shown.rows[name] = summary(values, true)
    for name in [name for name in anchors.ORDERS if name not in plans]:
        shown.plans[name] = anchors.ORDERS[name]()
        z = student.make(shown.plans[name], captions[:1])[0]
        shown.videos[name] = looped(vae, shown.plans[name], z)
    return shown


def write_clip(path: Path, video: Tensor) -> str:
    """Write video [3, F, H, W] as .mp4; its name."""
    with VideoWriter(path) as writer:
        writer.write(video)
    return path.name


def clips_section(out: Path, shown: Shown, caption: str) -> str:
    """Write a clip, a sheet and a picture of the plan for each name; what the page says of them."""
    cards = []
    for name, video in shown.videos.items():
        file = re.sub(r"\W+", "-", name)
        write_picture(out / f"plan-{file}.png", shown.plans[name])
        write_sheet(out / f"{file}.png", video[:6], columns=11)
        clip = write_clip(out / f"{file}.mp4", video[0])
        cards.append((name, clip, f"plan-{file}.png", f"{WORDS.get(name, '')} “{caption}”"))
    return report.paragraph(LEGEND) + report.clips(cards)


def ab_section(out: Path, shown: Shown) -> str:
    """Write ab.html, with against without anchors (paper Table 9); what the page says of it.

    Where no student was trained without them: anchors dropped against anchors kept."""
    a, b = "backward", WITHOUT if WITHOUT in shown.videos else KEPT
    if b not in shown.videos:
        return report.paragraph("There is nothing to compare with.")
    pairs = []
    for n, videos in enumerate(zip(shown.videos[a][:PAIRS], shown.videos[b])):
        pair = {}
        for side, name, video in zip("ab", (a, b), videos):
            pair[side] = write_clip(out / f"pair-{n}-{side}.mp4", video)
            ratio = summary(measure(video[None], shown.plans[name]))["FR inter"]
            pair[f"fr_{side}"] = ratio.mean
        pairs.append(pair)
    report.write_ab(out / "ab.html", (a, b), pairs)
    return "<p><a href=ab.html>Look at pairs and choose</a></p>" + report.paragraph(AGAINST[b])


def ratios_section(shown: Shown) -> str:
    """FR at every boundary, mean over clips, of the plans that were measured."""
    curves = {}
    for name in [name for name in shown.plans if name in shown.rows]:
        curves[name] = flickering_ratio(shown.videos[name]).nanmean(0).tolist()
    both = [shown.plans[name].boundaries() for name in ("forward", "backward")]
    marked = [i for i, inter in enumerate(zip(*both)) if i and all(inter)]
    return report.timeline(curves, marked) + report.paragraph(RATIOS)


@torch.no_grad()
def main(config: Config) -> None:
    out, device = check_out(config.out, folder=True), start(config.device)[2]
    dit, vae = load_models(config.weights, torch.float32, device)
    student = Maker(dit, vae, frame_size((), dit, vae), config.seed)
    world = find_world(config.world, dit.config.text_dim)
    captions = [world.caption(n) for n in numbers_of(config.clips, config.seed)]
    shown = measured(config, student, captions)
    numbers = report.table(shown.rows) + report.paragraph(COLUMNS)
    sections = [
        ("Clips", clips_section(out, shown, captions[0])),
        (f"{len(captions)} held-out captions", numbers),
        ("Flickering ratio along time", ratios_section(shown)),
        ("Which one flickers less?", ab_section(out, shown)),
    ]
    report.write_page(out / "index.html", "Any order", sections)
    print(report.markdown(shown.rows))
    print(f"look at {out / 'index.html'}")


if __name__ == "__main__":
    run(main, Config)
