"""Is it true? The measures, pure functions of clips and of their plan; and a small command line.

Flickering ratio (paper Eq. 4): how much the picture changes where one latent's frames end and the
next one's begin, over the change just before, inside the latent. Latent i decodes to frames
4i-3 .. 4i, so for the boundary between latents i and i+1

    FR_i = |x[4i+1] - x[4i]| / |x[4i] - x[4i-1]|       about 1 in natural video; 1.4 is a flash

The plan says which boundaries lie between two steps (inter-block) and which inside one (intra). A
VAE may show a cut later than at once: `FR max` [ours] reads all four changes inside the next latent
and reports the largest mean. Print motion beside it: a blurred, slow video has a beautiful FR.

Latent round trip [ours]: decode, encode again; the squared change of the first latent of each block
over that of the others. A latent that does not fit its past does not come back. About 1 if all do.

What was made first, and what last, is asked of the plan, not read off the clock: backward order
makes the last seconds first. What a clip shows is asked of a world (lib/world.py).

    python evaluate.py --clips 32                # the student in toy/weights
    python evaluate.py --video clip.mp4          # or a folder of videos
    python evaluate.py --weights FOLDER --prompts prompts.safetensors      # without a world
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
from anchors import HORIZON, Plan, View
from dit import load_dit
from generate import Maker, decoded, frame_size, load_models
from lib import report, text
from lib.changes import STATIC, frame_changes, frames_of, temporal_flickering
from lib.common import UserError, check_out, dtype_of, run, start
from lib.recipe import recipe_of
from lib.shapes import check_ratio_frames
from lib.statistics import Stat, Values, features, joined, stat, summary
from lib.videos import rows_of_videos
from lib.world import OTHER, World, find_world, measure_words, numbers_of
from plans import plans_of
from vae import VAE

BATCH = 16  # clips at a time


# ---------------------------------------------------------------- flickering
def change_ratios(video: Tensor, time: int = 4) -> Tensor:
    """The changes to frames 4i+1 .. 4i+4 over that to frame 4i, for i = 1 .. T-2: [B, T-2, 4].

    video: [B, 3, F, H, W];  NaN where the denominator vanishes
    raises: UserError if the frames are not 1 + time * k, or fewer than three latents"""
    check_ratio_frames(video.shape[2], time)
    change = frame_changes(video)  # (B, F-1)
    before = change[:, time - 1 : -1 : time, None]  # (B, T-2, 1)
    inside = change[:, time:].unflatten(1, (-1, time))  # (B, T-2, 4)
    return torch.where(before > STATIC, inside / before, torch.nan)


def flickering_ratio(video: Tensor, time: int = 4) -> Tensor:
    """FR_i of video [B, 3, F, H, W] between latents i and i+1, i = 1 .. T-2: [B, T-2] (Eq. 4)."""
    return change_ratios(video, time)[..., 0]


def measure(video: Tensor, plan: Plan) -> Values:
    """What pixels [B, 3, F, H, W] alone tell: FR at a plan's boundaries, motion of what it made."""
    ratios = change_ratios(video)
    inter = torch.tensor(plan.boundaries()[1:])
    if ratios.shape[1] != len(inter):
        raise UserError(f"{video.shape[2]} frames do not fit {plan.name!r}, {plan.length} latents")
    into = [frame - 1 for frame in frames_of(plan.made) if frame]
    return {
        "FR inter": ratios[:, inter],  # (B, boundaries, 4)
        "FR intra": ratios[:, ~inter],
        "motion": frame_changes(video)[:, into],
    }


# ---------------------------------------------------------------- latents
def round_trip(z: Tensor, again: Tensor, plan: Plan) -> Tensor:
    """Change of the first latent of each block over that of the others: [B].

    z, again: [B, T, C, h, w], latents before and after decoding and encoding.
    Latent 0, an image, counts on neither side."""
    change = (again - z).square().mean((2, 3, 4))[:, 1:]  # (B, T-1)
    first = torch.tensor(plan.boundaries())
    return change[:, first].mean(1) / change[:, ~first].mean(1)


# ---------------------------------------------------------------- along the order of generation
def drift(video: Tensor, plan: Plan, piece: int = HORIZON) -> Values:
    """What changes while a video [B, 3, F, H, W] is made, for each 5 s as made: [B, pieces].

    colour offset: from what was there first, in grey levels of 255
    contrast, sharpness, motion: over those of what was there first
    A last piece of less than half the length is left out."""
    order = plan.order
    parts = [frames_of(order[a : a + piece]) for a in range(0, len(order), piece)]
    parts = [part for part in parts if 2 * len(part) >= len(parts[0])]
    video = video.float()

    def means(values: Tensor) -> Tensor:
        return torch.stack([values[:, part].nanmean(1) for part in parts], 1)  # (B, pieces, ...)

    colour = means(video.mean((3, 4)).transpose(1, 2))  # (B, pieces, 3)
    into = torch.nn.functional.pad(frame_changes(video), (1, 0), value=torch.nan)  # (B, F)
    spread = {
        "contrast": means(video.std((3, 4)).mean(1)),
        "sharpness": means(video.diff(dim=4).abs().mean((1, 3, 4))),
        "motion": means(into),
    }
    offset = (colour - colour[:, :1]).abs().amax(2) * 127.5
    return {"colour offset": offset} | {k: v / v[:, :1].clamp_min(1e-6) for k, v in spread.items()}


# ---------------------------------------------------------------- whose clips
def encoded(vae: VAE, video: Tensor, chunk: int = 0) -> Tensor:
    """Latents [B, T, C, h, w] of pixels [B, 3, F, H, W], a clip at a time."""
    device = vae.conv2.weight.device
    return torch.cat([vae.encode(clip[None].to(device), chunk) for clip in video])


def measure_all(
    vae: VAE, z: Tensor, video: Tensor, plan: Plan, world: World | None, captions: Sequence[str]
) -> Values:
    """All there is to measure of clips: latents z [B, T, C, h, w] and pixels [B, 3, F, H, W]."""
    again = encoded(vae, video)
    found = measure(video, plan)
    found |= {"round trip": round_trip(z, again, plan).cpu(), "features": features(again).cpu()}
    return found | (measure_words(world, video, plan, captions) if world else {})


def measure_made(
    maker: Maker, plan: Plan, captions: Sequence[str], world: World | None, seen: Plan | None = None
) -> Values:
    """Make and measure a clip a caption. seen: whose boundaries count, if not the plan's."""
    parts = []
    for a in tqdm(range(0, len(captions), BATCH), desc=plan.name, leave=False):
        some = captions[a : a + BATCH]
        z, video = maker.make(plan, some, a)
        parts.append(measure_all(maker.vae, z, video, seen or plan, world, some))
    return joined(parts)


@torch.no_grad()
def measure_true(
    vae: VAE, size: int, plan: Plan, captions: Sequence[str], world: World, seeds: Sequence[int]
) -> tuple[Values, Values]:
    """The world's own clips, to compare with: as they are, and through the VAE."""
    true, after = [], []
    for a in tqdm(range(0, len(seeds), BATCH), desc="true clips", leave=False):
        some = captions[a : a + BATCH]
        video = world.render(some, seeds[a : a + BATCH], size, 4 * plan.length - 3)
        z = encoded(vae, video)
        shown = measure_words(world, video, plan, some)
        true.append(shown | {"features": features(z).cpu()})
        after.append(measure_all(vae, z, decoded(vae, z), plan, world, some))
    return joined(true), joined(after)


# ---------------------------------------------------------------- command line
@dataclass
class Config:
    """Measure videos, or the clips that a student makes."""

    RANGES = {"clips": (2, 10**6), "block": (1, 10**4), "orders": tuple(anchors.ORDERS)}
    weights: str = "toy/weights"  # a folder with student and VAE
    world: str = ""  # a module of captions and their reader; default: toy.world for a toy student
    prompts: str = ""  # instead of a world: a file of prompts, or what text.py made of it
    clips: int = 32  # how many captions, held out of all training, or prompts
    known: bool = False  # also new clips of captions that training has seen
    orders: tuple[str, ...] = ()  # also these orders of anchors.py, as they are by default
    teacher: str = ""  # also this teacher; an autoregressive one: ar:FILE
    guidance: float = 3.0  # of the teacher
    share_noise: str = ""  # of anchors and targets: none, start or all; default: as trained
    size: tuple[int, ...] = ()  # height width; default 480 832 for Wan's VAE, 32 32 for the toy's
    video: str = ""  # measure this file, or every video in this folder, instead
    block: int = 3  # of --video: latents a block
    seed: int = 0  # of captions, clips and noise
    out: str = ""  # also write the table as .json
    vae_dtype: str = "float32"  # of the VAE: what bfloat16 changes
    device: str = "auto"


def measure_video(video: Tensor, latents: int, block: int) -> dict[str, Stat]:
    """A row for a video [1, 3, F, H, W], of which so many latents are whole blocks."""
    plan = anchors.forward(latents, block, View(window=0))  # who reads what does not matter
    row = summary(measure(video[:, :, : 4 * latents - 3], plan))
    return row | {"flicker (VBench)": stat(temporal_flickering(video))}


def measure_student(config: Config, device: torch.device) -> dict[str, dict[str, Stat]]:
    """A row for true clips, for the teacher, and for each plan of the student."""
    vae_dtype = dtype_of(config.vae_dtype, device, "vae_dtype")
    dit, vae = load_models(config.weights, torch.float32, device, vae_dtype)
    world = find_world(config.world, dit.config.text_dim, config.prompts)
    how = (config.share_noise, config.prompts, config.weights)
    student = Maker(dit, vae, frame_size(config.size, dit, vae), config.seed, None, *how)
    plans = plans_of(recipe_of(dit)) | {name: anchors.ORDERS[name]() for name in config.orders}
    rows, true = {}, None
    if world:
        seeds = numbers_of(config.clips, config.seed)
        captions = [world.caption(number) for number in seeds]
        what = vae, student.size[0], plans["forward"], captions, world
        true, after = measure_true(*what, seeds)
        floor = measure_true(*what, [number + OTHER for number in seeds])[1]
        rows["true clips, decoded"] = summary(after, true)
        rows["other true clips, decoded"] = summary(floor, true)
    else:
        captions = text.lines_of(config.prompts)[: config.clips]
    if config.teacher:
        dit = load_dit(config.teacher.removeprefix("ar:"), torch.float32, device)
        teacher = replace(student, dit=dit, guidance=config.guidance)
        at_once = {"forward": anchors.forward(HORIZON, HORIZON)}
        for name, plan in (plans if config.teacher.startswith("ar:") else at_once).items():
            found = measure_made(teacher, plan, captions, world, plans[name])
            rows[f"teacher, {name}"] = summary(found, true)
    for name, plan in plans.items():
        rows[name] = summary(measure_made(student, plan, captions, world), true)
    if world and config.known:
        known = numbers_of(config.clips, config.seed, known=True)
        captions = [world.caption(number) for number in known]
        del true["features"]  # those of other captions
        for name, plan in plans.items():
            found = measure_made(student, plan, captions, world)
            rows[f"{name}, known captions"] = summary(found, true)
    return rows


def main(config: Config) -> None:
    device = start(config.device)[2]
    if config.out:
        check_out(config.out, inputs=[config.video])
    if config.video:
        rows = rows_of_videos(Path(config.video), config.block, measure_video)
    else:
        rows = measure_student(config, device)
    report.show(rows, config.out)


if __name__ == "__main__":
    run(main, Config)
