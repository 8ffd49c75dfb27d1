"""Causal consistency distillation (Causal Forcing++): stage 1 without pairs.

The student at one of 48 levels must agree with its own average one level lower, where one step of
the autoregressive teacher's ODE leads, after clean context of real clips:

    x_k = (1 - sigma_k) x0 + sigma_k noise            x_(k+1) = one guided Euler step of the teacher
    loss = |G(x_k) - G_average(x_(k+1))|^2

What is handed on is the average, as published. Costs a teacher pass an iteration, needs no disk.
On this backbone G walks any plan, and k is drawn for each of its steps (the paper: for each clip).
Left open by the paper: anchors, which it has not; here they have no loss but by --loss_on_anchors.
Here: FR forward 1.14 after stage 2, where causal pairs reach 1.17; round trip backward 1.08, where
they reach 1.05; a step costs twice as much (earlier weights, docs/results-more.md).

    python -m zoo.consistency            # after tools/encode.py and zoo/ar_teacher.py
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from anchors import Layout
from dit import DiT, load_dit
from lib import presets
from lib.common import Stream, UserError, dtype_of, run
from lib.recipe import trained_as
from lib.training import EMA, inference, prepare
from sampler import ODE_STEPS, cfg_velocity, ode_sigmas
from train_ode import (
    Part,
    denoise,
    fit,
    mean_over,
    mix_of,
    per_slot,
    scored_slots,
)
from zoo import causal_ode
from zoo.on_clips import Drawn, OnClips


@dataclass
class Config(causal_ode.Config):
    """Stage 1 by consistency distillation from an autoregressive teacher, without pairs."""

    PRESETS = presets.CONSISTENCY
    UNREAD = ("data",)  # there are no pairs
    preset: str = "toy"  # toy, toy64 or wan: the published numbers
    out: str = "out/cd"  # folder of student.safetensors, log.jsonl and the resume state
    ema: float = 0.99  # of the average that is agreed with, and handed on [Causal Forcing++]


def cd_loss(
    dit: DiT,
    average: DiT,
    teacher: DiT,
    lay: Layout,
    clips: Drawn,
    grid: Tensor,
    negative: Tensor,
    guidance: float,
    loss_on_anchors: bool = False,
) -> Tensor:
    """Agree with the average one level lower on the teacher's ODE, after clean context: [B].

    clips: with an index in 0 .. K-2 for each step of the plan [B, steps]
    grid: [K+1] noise levels from 1 to 0;  negative: [1, L, text_dim]"""
    sigma = per_slot(lay, grid[clips.level], 0.0)  # (B, slots)
    below = per_slot(lay, grid[clips.level + 1], 0.0)
    x, prompt = clips.at(sigma), clips.prompt
    with inference():
        pos = torch.tensor(lay.pos, device=x.device)
        cond_uncond = torch.cat([prompt, negative.expand_as(prompt)])
        v = cfg_velocity(teacher, x, 1000 * sigma, cond_uncond, pos, guidance, visible=lay.visible)
        euler = x + (below - sigma)[..., None, None, None] * v
        target = denoise(average, lay, euler, below, prompt)
    error = (denoise(dit, lay, x, sigma, prompt) - target).square()
    return mean_over(error, scored_slots(lay, loss_on_anchors))


def clip_loss(setup: OnClips, average: DiT, teacher: DiT, part: Part) -> Tensor:
    """The loss [B] of samples: a clip, and a level per step of the plan."""
    config, lay, steps = setup.config, setup.layout(part), len(setup.plan(part).steps)
    grid = torch.tensor(ode_sigmas(ODE_STEPS, config.shift), device=setup.device)

    def levels(g: torch.Generator) -> Tensor:
        return torch.randint(len(grid) - 2, (steps,), generator=g)

    clips = setup.draw(part, Stream.CD, lay.latent, levels)
    negative = setup.source.embed([config.negative]).to(setup.device)
    how = (grid, negative, config.guidance, config.loss_on_anchors)
    return cd_loss(setup.dit, average, teacher, lay, clips, *how)


def main(config: Config) -> None:
    if config.generate or config.check:
        raise UserError("consistency distillation has no pairs: leave out --generate and --check")
    mix = mix_of(config)
    trained_as(config)  # impossible levels are refused before any work
    setup = OnClips(config, mix, teacher_forcing=True)
    average = prepare(load_dit(config.weights, device=setup.device), config, trained=False)
    dtype = dtype_of(config.dtype)
    teacher = prepare(load_dit(config.teacher, dtype, setup.device), config, trained=False)
    loss_of = partial(clip_loss, setup, average, teacher)
    fit(setup, loss_of, "student", (EMA(setup.dit, config.ema), average))


if __name__ == "__main__":
    run(main, Config)
