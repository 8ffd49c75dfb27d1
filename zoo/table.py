"""All methods of the zoo on the same clips, in one table.

Cost is counted, not timed: passes of the network for a batch of clips, latents through it for each
clip, and latents that the cache must hold. What a plan changes is measured on what it made: the
flickering ratio between blocks (FR, paper Eq. 4) and the largest of it over the four changes inside
the next latent, since a cut may show later than at once; how latents survive decoding and encoding;
motion; the change of colour at a seam in grey levels of 255; whether the words are right, after the
last prompt has taken over. +- is a standard error over clips. Look at a second seed before you
praise a row: `--seeds 0 1` has other captions, clips and noise.

A row that is there is not made again: the same command goes on where it was stopped.

    python -m zoo.table --clips 48
    python -m zoo.table --clips 16 --methods forward rolling_forcing --seeds 0 1
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from anchors import HORIZON, Plan, forward
from dit import DiT, load_dit
from evaluate import measure_all, measure_words, summary
from lib import report, text
from lib.changes import seam
from lib.common import UserError, atomic, fingerprint, run, start
from lib.statistics import Stat, Values, stat
from lib.weights import read_dit
from lib.world import World, find_world, numbers_of
from sampler import noise_seeded
from vae import VAE, load_vae
from zoo.common import Method
from zoo.run import METHODS, find_method, latent_shape, recipe_of

COLUMNS = (
    "FR inter",
    "FR inter max",
    "FR intra",
    "round trip",
    "motion",
    "seam",
    "caption",
    "lost: ball",
    "lost: ground",
)


@dataclass
class Config:
    """Measure every method of the zoo on held-out captions."""

    clips: int = 48  # clips a row
    seeds: tuple[int, ...] = (0,)  # of captions, clips and noise: a table for each
    methods: tuple[str, ...] = ()  # which rows; default: all (python -m zoo.run list)
    weights: str = "toy/weights"  # a folder with student and VAE
    out: str = "out/zoo.json"  # the rows, as they are made
    size: tuple[int, ...] = (32, 32)  # height width
    device: str = "auto"


class Count:
    """How often a network is called, and with how many latents; use as a context."""

    def __init__(self, dit: DiT) -> None:
        self.dit, self.passes, self.latents = dit, 0, 0

    def __enter__(self) -> "Count":
        self.hook = self.dit.register_forward_pre_hook(self._called)
        return self

    def _called(self, _: DiT, inputs: tuple) -> None:
        self.passes += 1
        self.latents += inputs[0].shape[0] * inputs[0].shape[1]

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


# ---------------------------------------------------------------- what is measured
def last_scene(world: World, video: Tensor, plan: Plan, captions: Sequence[str]) -> Tensor:
    """Whether colour, shape and direction are as captioned, from where the last prompt rules: [B]."""
    last = plan.prompts() - 1
    begin = min(i for step in plan.steps if step.prompt == last for i in step.targets)
    return world.hits(video[:, :, 4 * max(begin, 0) :], captions)["caption"]


def measured(
    world: World,
    vae: VAE,
    z: Tensor,
    video: Tensor,
    plan: Plan,
    captions: Sequence[str],
    true: Values,
) -> dict[str, Stat]:
    """What latents z [B, T, C, h, w] and their pixels [B, 3, F, H, W] show; true: of true clips."""
    found = measure_all(vae, z, video, plan, world, captions)
    found["caption"] = last_scene(world, video, plan, captions)
    cuts = [4 * i + 1 for i, inter in enumerate(plan.boundaries()) if inter and i]
    offsets = [seam(video, frame)["colour offset"] for frame in cuts]
    row = summary(found, true) | {"seam": stat(torch.stack(offsets, dim=1))}
    return {column: row[column] for column in COLUMNS if column in row}


def what_is_kept(world: World, config: Config) -> Values:
    """Identity at both ends of true clips: how much clips differ is its unit."""
    numbers = numbers_of(config.clips)
    captions = [world.caption(number) for number in numbers]
    video = world.render(captions, numbers, config.size[0], 81)
    found = measure_words(world, video, forward(HORIZON), captions)
    return {name: values for name, values in found.items() if name.startswith("identity")}


# ---------------------------------------------------------------- rows
def make(
    world: World,
    method: Method,
    plan: Plan,
    dit: DiT,
    vae: VAE,
    config: Config,
    seed: int,
    bar: tqdm,
) -> tuple[Tensor, list[str], dict[str, int]]:
    """Latents [B, T, C, h, w] of every clip, what its last scene shows, and what it cost.

    Prompt p of clip n is caption n + p; a clip's noise depends on the seed and n alone."""
    c, device = dit.config, dit.patch_embedding.weight.device
    first, scenes = text.HELD_OUT + seed * config.clips, plan.prompts()
    words = [world.caption(first + n) for n in range(config.clips + scenes - 1)]
    embedded = text.embed(words, c.text_dim, c.text_len).to(device)
    shape, latents, batches = latent_shape(vae, config.size), [], 0
    with Count(dit) as count:
        for a in range(0, config.clips, method.batch):
            some = range(a, min(a + method.batch, config.clips))
            texts = [embedded[some.start + p : some.stop + p] for p in range(scenes)]
            noise = noise_seeded([(seed, n, 0) for n in some], shape, device)
            latents.append(method.generate(dit, plan, texts, noise, recipe=recipe_of(dit)))
            batches += 1
            bar.update(len(some))
    cost = {
        "passes": round(count.passes / batches, 1),
        "latents": round(count.latents / config.clips, 1),
        "slots": plan.capacity,
    }
    return torch.cat(latents), words[scenes - 1 :], cost


def row_of(
    world: World,
    name: str,
    seed: int,
    dit: DiT,
    vae: VAE,
    config: Config,
    true: Values,
    bar: tqdm,
) -> dict:
    """A row as JSON has it: numbers, and [mean, standard error]."""
    method, recipe = find_method(name), recipe_of(dit)
    plan = method.plan(method.length, recipe.block, recipe.anchors)
    z, captions, cost = make(world, method, plan, dit, vae, config, seed, bar)
    video = torch.cat([vae.decode(x[None]).cpu() for x in z])
    found = measured(world, vae, z, video, plan, captions, true)
    return cost | {column: [s.mean, s.se] for column, s in found.items()}


def read_rows(path: Path, settings: dict) -> dict[str, dict]:
    """The rows that are there. raises: UserError if they are of other clips or weights"""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        there, rows = found["settings"], found["rows"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a table of this script; use another --out") from None
    if there != settings:
        raise UserError(f"{path} has rows of {there}, not of {settings}; use another --out")
    return rows


def shown(rows: dict[str, dict]) -> dict[str, dict[str, str]]:
    """The same for people."""

    def cell(value) -> str:
        return f"{value[0]:.3f} ± {value[1]:.3f}" if isinstance(value, list) else f"{value:g}"

    return {name: {k: cell(v) for k, v in row.items()} for name, row in rows.items()}


@torch.no_grad()
def main(config: Config) -> None:
    names = config.methods or tuple(METHODS)
    for name in names:
        find_method(name)
    if config.clips < 2:
        raise UserError(f"--clips {config.clips} must be at least 2, for a standard error")
    device = start(config.device)[2]
    dit, vae = load_dit(config.weights, device=device), load_vae(config.weights, device=device)
    recipe = json.loads(json.dumps(recipe_of(dit).write()))
    settings = {"clips": config.clips, "size": list(config.size), "recipe": recipe}
    settings["weights"] = fingerprint(read_dit(config.weights)[1])
    rows = read_rows(Path(config.out), settings)
    wanted = {f"{name}, seed {seed}": (name, seed) for seed in config.seeds for name in names}
    todo = {row: which for row, which in wanted.items() if row not in rows}
    world = find_world("", dit.config.text_dim)
    true = what_is_kept(world, config)
    with tqdm(total=len(todo) * config.clips, desc="clips", unit="clip") as bar:
        for row, (name, seed) in todo.items():
            bar.set_postfix_str(row)
            rows[row] = row_of(world, name, seed, dit, vae, config, true, bar)
            with atomic(config.out) as tmp:
                tmp.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    print(report.markdown(shown({row: rows[row] for row in wanted})))


if __name__ == "__main__":
    run(main, Config)
