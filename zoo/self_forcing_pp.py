"""Self-Forcing++: train on windows of rollouts far longer than the teacher can score.

A student trained on 5 s has never read its own 30th second. So let it roll on, with a cache that
moves along, and score any 21 latents of the result: the teacher knows what 5 s look like wherever
they stand. Where the window lies is drawn for each rollout; only its blocks have gradients.

On this backbone it is `train_dmd.main` with long plans, forward and backward [ours], and a rollout
that hands out a window; that a block stops with a gradient or without is `exit_at` of its step.
Inside a clip there is no image latent, but what the teacher scores begins with one: so the window's
first latent becomes the picture it shows, encoded alone [Self Forcing beyond 21 latents; the paper
does not say]. Exit at the last level, as published; lengths up to 100 s there, 15 s here.
Left open here: the paper's reward stage on optical flow is not here.
Here: no difference; nothing drifts in 63 latents that it could repair (zoo/README.md).

    python -m zoo.self_forcing_pp --rolled 63        to measure: python -m zoo.table --weights ...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import anchors
import train_dmd
from anchors import HORIZON, Plan
from dit import DiT
from lib.common import UserError, run, start
from lib.noise import Noise
from lib.recipe import Recipe
from plans import Mix
from sampler import Text, student_blocks
from vae import VAE, load_vae
from zoo.common import PAPER


@dataclass
class Config(train_dmd.Config):
    """Stage 2 on windows of long rollouts."""

    rolled: int = 63  # latents of a rollout, of which a window of 21 is scored
    out: str = "out/self_forcing_pp"  # folder of student.safetensors, log.jsonl, curves.png, sheets


def drawn_window(plan: Plan, noise: Noise) -> range:
    """Which steps of the plan make the window: any, as the noise of latent 0 says."""
    count = HORIZON // len(plan.steps[0].targets)
    bits = int(noise(0, (0,)).flatten()[0].item() * (1 << 20))
    first = bits % (len(plan.steps) - count + 1)
    return range(first, first + count)


@torch.no_grad()
def as_picture(vae: VAE, z: Tensor, at: int) -> Tensor:
    """Latent `at` of z [B, T, C, h, w] as an image latent [B, 1, C, h, w] of its last frame."""
    before = z[:, max(at - 3, 0) : at + 1].float()
    return vae.encode(vae.decode(before)[:, :, -1:]).to(z)


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    exit_at: Callable[[int], int | None] = lambda n: None,
    vae: VAE | None = None,
    **options,
) -> Tensor:
    """A window [B, 21, C, h, w] of the plan's video; with a VAE it begins with an image latent."""
    window = drawn_window(plan, noise)
    last = len(recipe.levels) - 1

    def exit_inside(n: int) -> int | None:
        return last if n in window and exit_at(n) is not None else None

    made: dict[int, Tensor] = {}
    rolled = student_blocks(dit, plan, texts, noise, recipe, given, exit_inside, **options)
    for n, x0 in rolled:
        made.update(zip(plan.steps[n].targets, x0.unbind(1)))
    latents = sorted(i for n in window for i in plan.steps[n].targets)
    z = torch.stack([made[i] for i in range(latents[-1] + 1)], dim=1)
    x = z[:, latents[0] :]
    if vae is None or latents[0] == 0:
        return x
    return torch.cat([as_picture(vae, z.detach(), latents[0]), x[:, 1:]], dim=1)


def long_mix(length: int, block: int, imagined: int) -> Mix:
    """As much as the horizon holds is read: 18 latents forward, 15 backward."""
    ahead = anchors.long(length, "forward", block, window=HORIZON - block, sink="none")
    room = HORIZON - block - imagined
    back = anchors.long(length, "backward", block, imagined, window=room, sink="none")
    return ((1.0, (ahead, back)),)


def main(config: Config) -> None:
    if config.rolled < HORIZON or HORIZON % config.block or config.rolled % config.block:
        raise UserError(
            f"--rolled {config.rolled} must be blocks of {config.block}, at least {HORIZON} latents"
        )
    vae = load_vae(config.vae, device=start(config.device)[2])
    mix = long_mix(config.rolled, config.block, config.anchors)
    train_dmd.main(config, partial(generate, vae=vae), mix)


if __name__ == "__main__":
    run(main, Config)
