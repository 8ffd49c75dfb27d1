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

from anchors import Plan, View, forward
from dit import DiT, load_dit
from lib import report, text
from lib.common import UserError, atomic, run, start
from lib.pairs import fingerprint
from lib.weights import read_dit
from metrics import STATIC, Stat, frame_changes, measure, round_trip, seam, stat
from sampler import noise_seeded
from vae import VAE, load_vae
from zoo.common import Method
from zoo.run import METHODS, find_method, latent_shape, recipe_of


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
def largest_ratio(video: Tensor, plan: Plan) -> Stat:
    """FR between blocks, of that change inside the next latent whose mean is largest [ours]."""
    change = frame_changes(video)  # (B, F-1)
    before = change[:, 3:-1:4, None]  # (B, T-2, 1): the last change inside a latent
    inside = change[:, 4:].unflatten(1, (-1, 4))  # (B, T-2, 4): the four of the next
    ratios = torch.where(before > STATIC, inside / before, torch.nan)
    ratios = ratios[:, torch.tensor(plan.boundaries()[1:])]
    means = ratios.flatten(0, 1).nanmean(0)  # (4)
    return stat(ratios[..., means.argmax()])


def words_right(video: Tensor, plan: Plan, captions: Sequence[str]) -> Stat:
    """Whether colour, shape and direction are as captioned, from where the last prompt rules."""
    last = plan.prompts() - 1
    begin = min(i for step in plan.steps if step.prompt == last for i in step.targets)
    scene = forward(plan.length - max(begin, 0), 3, View(window=3))  # blocks do not matter here
    return measure(video[:, :, 4 * max(begin, 0) :], scene, captions)["caption"]


def measured(
    vae: VAE, z: Tensor, video: Tensor, plan: Plan, captions: Sequence[str]
) -> dict[str, Stat]:
    """What latents z [B, T, C, h, w] and their pixels [B, 3, F, H, W] show."""
    found = measure(video, plan)
    cuts = [4 * i + 1 for i, inter in enumerate(plan.boundaries()) if inter and i]
    offsets = torch.stack([seam(video, frame)["colour offset"] for frame in cuts], dim=1)
    return {
        "FR inter": found["FR inter"],
        "FR inter, largest": largest_ratio(video, plan),
        "FR intra": found["FR intra"],
        "round trip": stat(round_trip(vae, z, plan).cpu()),
        "motion": found["motion"],
        "seam": stat(offsets),
        "caption": words_right(video, plan, captions),
    }


# ---------------------------------------------------------------- rows
def make(
    method: Method, plan: Plan, dit: DiT, vae: VAE, config: Config, seed: int, bar: tqdm
) -> tuple[Tensor, list[str], dict[str, int]]:
    """Latents [B, T, C, h, w] of every clip, what its last scene shows, and what it cost.

    Prompt p of clip n is caption n + p; a clip's noise depends on the seed and n alone."""
    c, device = dit.config, dit.patch_embedding.weight.device
    first, scenes = text.HELD_OUT + seed * config.clips, plan.prompts()
    words = [text.toy_caption(first + n) for n in range(config.clips + scenes - 1)]
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


def row_of(name: str, seed: int, dit: DiT, vae: VAE, config: Config, bar: tqdm) -> dict:
    """A row as JSON has it: numbers, and [mean, standard error]."""
    method, recipe = find_method(name), recipe_of(dit)
    plan = method.plan(method.length, recipe.block, recipe.anchors)
    z, captions, cost = make(method, plan, dit, vae, config, seed, bar)
    video = torch.cat([vae.decode(x[None]).cpu() for x in z])
    found = measured(vae, z, video, plan, captions)
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
    with tqdm(total=len(todo) * config.clips, desc="clips", unit="clip") as bar:
        for row, (name, seed) in todo.items():
            bar.set_postfix_str(row)
            rows[row] = row_of(name, seed, dit, vae, config, bar)
            with atomic(config.out) as tmp:
                tmp.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    print(report.markdown(shown({row: rows[row] for row in wanted})))


if __name__ == "__main__":
    run(main, Config)
