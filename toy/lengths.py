"""At every length, in both orders, alone and beside a given clip: does it still hold?

A student trained at one length can fail at all others, and no measure of a whole clip notices:
latent 0 comes out as a video latent, in other colours, for a few frames. So frame 0 is read
alone, and captions in the 5 s made first and in the 5 s made last. A length counts the latents that
are made; a given clip adds 12. Beyond 21 a window of two blocks and both sinks stay in view, as in
generate.py. Captions are held out: no training stream has them; --known adds new clips of known
ones. To compare with: true clips through the VAE, and the teacher.

    python -m toy.lengths --clips 64
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
from anchors import EVERYTHING, HORIZON, Plan, View
from dit import load_dit
from evaluate import BATCH, Maker, decoded, encoded, measure, measure_words, summary
from generate import frame_size, load_models
from lib import report
from lib.common import UserError, run, start
from lib.recipe import Recipe, recipe_of
from lib.statistics import Stat, Values, joined
from lib.world import numbers_of
from plans import both_directions, timeline, with_given
from toy import world
from vae import VAE

GIVEN = 12  # latents of a clip that is given: 3 s
WHOLE = anchors.forward(HORIZON)  # where boundaries lie in true clips and the teacher's
COLUMNS = (
    "frame 0: colours",
    "frame 0: shape",
    "shape changes",
    "outline",
    "caption",
    "caption, last made",
    "motion",
    "ball seen",
    "lost: ball",
    "lost: ground",
    "FR inter",
    "FR inter max",
)


@dataclass
class Config:
    """Measure a student at every length, in both orders, alone and beside a given clip."""

    weights: str = "toy/weights"  # a folder with student and VAE, and perhaps the teacher
    clips: int = 64  # captions
    known: bool = False  # also new clips of captions that training has seen
    lengths: tuple[int, ...] = (6, 9, 12, 15, 18, 21, 24, 42, 123)  # latents to make
    teacher: str = ""  # default: teacher.safetensors in the folder, if it is there
    guidance: float = 3.0  # of the teacher
    share_noise: str = ""  # of anchors and targets: none, start or all; default: as trained
    seed: int = 0  # of captions, clips and noise
    out: str = ""  # also write the table as .json
    device: str = "auto"


def plan_of(latents: int, direction: str, given: int, recipe: Recipe) -> Plan:
    """Make so many latents, forward after `given` ones or backward before them, as generate.py."""
    length, block = latents + given, recipe.block
    if not given and length <= HORIZON:
        pair = both_directions(length, block, recipe.anchors, recipe.head)
        return pair[direction == "backward"]
    window = 2 * block if length > HORIZON else None
    if not given:
        return anchors.long(length, direction, block, recipe.anchors, window, "both")
    scene = (0, given) if direction == "forward" else (latents, length)
    view = View(window, True, True) if window else EVERYTHING
    plan = timeline(length, [scene], block, recipe.anchors, view)
    return replace(with_given(plan, range(*scene)), name=f"{direction}, given")


def given_latents(plan: Plan, z: Tensor) -> dict[int, Tensor]:
    """What the plan says is given, latent -> [B, C, h, w]: the head or tail of true latents z."""
    latents = sorted(set(range(plan.length)) - set(plan.made))
    part = z[:, : len(latents)] if 0 in latents else z[:, z.shape[1] - len(latents) :]
    return dict(zip(latents, part.unbind(1)))


def shape_changes(video: Tensor) -> Tensor:
    """How often the shape read in video [B, 3, F, H, W] differs from one look to the next: [B]."""
    picks = torch.linspace(0, video.shape[2] - 1, world.LOOKS).round().long()
    stills = video[:, :, picks].transpose(1, 2).flatten(0, 1)[:, :, None]  # (B * 16, 3, 1, H, W)
    names = [*world.SHAPES, "none"]
    shapes = torch.tensor([names.index(seen["shape"]) for seen in world.measure(stills)])
    shapes = shapes.view(-1, world.LOOKS)  # (B, 16)
    return (shapes[:, 1:] != shapes[:, :-1]).float().mean(1)


def ball_seen(video: Tensor) -> Tensor:
    """In how many frames of video [B, 3, F, H, W] a third of the pale ball is seen: [B], 0..1.

    It alone has no channel below .3: edges of sprites, over any ground, have one [measured]."""
    pale = video.float().cpu().amin(1) > 2 * 0.3 - 1  # (B, F, H, W)
    whole = math.pi * (world.BALL_RADIUS / world.UNITS) ** 2  # of the frame
    return (pale.float().mean((-2, -1)) > whole / 3).float().mean(1)


def measured(video: Tensor, plan: Plan, captions: Sequence[str]) -> Values:
    """All columns of clips [B, 3, F, H, W]."""
    found = measure(video, plan) | measure_words(world, video, plan, captions)
    found |= {"shape changes": shape_changes(video)}
    return found | {"outline": world.outline(video, captions), "ball seen": ball_seen(video)}


def row_of(values: Values, true: Values, plan: Plan) -> dict[str, Stat | str]:
    """The columns of a row; a frame 0 that was given is not the student's."""
    found = summary(values, true)
    row: dict[str, Stat | str] = {name: found[name] for name in COLUMNS if name in found}
    if 0 not in plan.made:
        row |= {"frame 0: colours": "given", "frame 0: shape": "given"}
    return row


@dataclass
class Clips:
    """True clips, in batches: captions, latents [B, T, C, h, w], and what was measured of all."""

    captions: list[list[str]]
    latents: list[Tensor]
    true: Values
    decoded: Values


@torch.no_grad()
def true_clips(vae: VAE, size: int, numbers: Sequence[int]) -> Clips:
    """The world's clips with these numbers, as they are and through the VAE."""
    captions, latents, true, after = [], [], [], []
    for a in range(0, len(numbers), BATCH):
        some = numbers[a : a + BATCH]
        words = [world.caption(number) for number in some]
        video = world.render(words, some, size)
        z = encoded(vae, video)
        captions.append(words)
        latents.append(z)
        true.append(measured(video, WHOLE, words))
        after.append(measured(decoded(vae, z), WHOLE, words))
    return Clips(captions, latents, joined(true), joined(after))


def measure_made(maker: Maker, plan: Plan, clips: Clips, seen: Plan | None = None) -> Values:
    """Clips of the same captions, made by a plan. seen: whose boundaries count, if not its."""
    parts = []
    for n, (words, z) in enumerate(zip(clips.captions, clips.latents)):
        _, video = maker.make(plan, words, n * BATCH, given_latents(plan, z))
        parts.append(measured(video, seen or plan, words))
    return joined(parts)


def table(
    student: Maker, teacher: Maker | None, numbers: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[str, dict[str, Stat | str]]]:
    """Yield name and columns of each row, on the captions of the clips with these numbers."""
    clips = true_clips(student.vae, student.size[0], numbers)
    yield "true clips, decoded", row_of(clips.decoded, clips.true, WHOLE)
    if teacher:
        found = measure_made(teacher, anchors.forward(HORIZON, HORIZON), clips, WHOLE)
        yield f"teacher, {HORIZON} latents", row_of(found, clips.true, WHOLE)
    for count, given, direction in product(lengths, (0, GIVEN), ("forward", "backward")):
        plan = plan_of(count, direction, given, recipe_of(student.dit))
        row = row_of(measure_made(student, plan, clips), clips.true, plan)
        yield f"{count}, {direction}, {f'{given} given' if given else 'own'}", row


def main(config: Config) -> None:
    device = start(config.device)[2]
    if config.clips < 2 or not config.lengths:
        raise UserError(f"--clips {config.clips} must be at least 2, and --lengths not empty")
    dit, vae = load_models(config.weights, torch.float32, device)
    for count in config.lengths:  # those that are no multiple of the block are refused here
        plan_of(count, "backward", 0, recipe_of(dit))
    student = Maker(dit, vae, frame_size((), dit, vae), config.seed, None, config.share_noise)
    path = config.teacher or f"{config.weights}/teacher.safetensors"
    teacher = None
    if config.teacher or Path(path).exists():
        dit = load_dit(path, torch.float32, device)
        teacher = replace(student, dit=dit, guidance=config.guidance)
    rows = {}
    print(report.markdown({}, COLUMNS), flush=True)
    streams = {"held out": False} | ({"known": True} if config.known else {})
    total = len(streams) * (1 + bool(teacher) + 4 * len(config.lengths))
    with tqdm(total=total, desc="rows", unit="row") as bar:
        for said, known in streams.items():
            numbers = numbers_of(config.clips, config.seed, known)
            for name, row in table(student, teacher, numbers, config.lengths):
                rows[f"{name}, {said}"] = row
                bar.write(report.markdown_row(f"{name}, {said}", row, COLUMNS))
                bar.update()
    if config.out:
        report.write_json(rows, config.out)


if __name__ == "__main__":
    run(main, Config)
