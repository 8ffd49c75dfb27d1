"""Causal ODE pairs (Causal Forcing, stage 2): regress an autoregressive teacher's end points.

A bidirectional teacher's end point depends on noise that a causal student never sees, so the
student learns a mean over it; an autoregressive teacher's end point is a function of what the
student sees (tests/test_injectivity.py shows both in closed form). Its ODE runs block by block,
each block after the clean latents of a *real clip*; stage 1 then shows the student the same:

    pairs     clean [S, T, ...] and, for each plan, states at every slot (an anchor has its own)
    training  train_ode.py's, with all context clean: [clean | noisy]

    python -m zoo.causal_ode --generate && python -m zoo.causal_ode     # after zoo/ar_teacher.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import train_ode
from anchors import Plan, layout
from dit import DiT, load_dit
from lib import presets
from lib.clips import Clips
from lib.common import UserError, dtype_of, run, start
from lib.pairs import (
    MADE_BY,
    PLANS,
    Pair,
    check_shards,
    kept_states,
    pair_noise,
    pairs_where,
    read_pairs,
    write_missing,
    wrong_states,
)
from lib.text import Prompts
from plans import Mix, draw, rows_of
from sampler import Noise, cache_for, clean_pass, many_steps, noise_from, rollout
from train_ode import mix_of, recipe_of, train


@dataclass
class Config(train_ode.Config):
    """Stage 1 from an autoregressive teacher: make causal pairs (--generate, --check), or train."""

    PRESETS = presets.CAUSAL_ODE
    RANGES = {"preset": tuple(PRESETS)}
    UNREAD = ("clips",)  # training reads the pairs
    preset: str = "toy"  # toy, toy64, wan or wan-framewise: the published numbers
    teacher: str = "out/ar/teacher.safetensors"  # makes the pairs (zoo/ar_teacher.py)
    weights: str = "out/ar/teacher.safetensors"  # what the student starts from
    clips: str = "out/latents"  # folder of real clips' latents (tools/encode.py)
    data: str = "out/causal-pairs"  # folder of the pairs
    out: str = "out/causal"  # folder of student.safetensors, log.jsonl and the resume state


def plan_states(
    dit: DiT,
    plan: Plan,
    cond_uncond: list,
    noise: Noise,
    clean: Tensor,
    keep: list[int],
    config: train_ode.Config,
) -> Tensor:
    """The teacher's states at every noisy slot of a plan: [B, K+1, slots, C, h, w].

    clean: real latents [B, T, C, h, w], which later steps read instead of what is made here"""
    states: dict[tuple[int, int], Tensor] = {}  # (step, state) -> (B, own, C, h, w)
    cache = cache_for(dit, plan, noise, copies=2)
    remember = clean_pass(dit, plan, [cond_uncond], cache, copies=2)

    def record(n: int, k: int, x: Tensor) -> None:
        if k in keep:
            states[n, k] = x

    def remember_the_clip(n, step, own, past):
        real = clean[:, [i if i >= 0 else ~i for i in step.targets]]
        remember(n, step, torch.cat([own[:, : len(step.anchors)], real], dim=1), past)

    solve = many_steps(
        dit, [cond_uncond], noise, config.guidance, config.shift, config.share_noise, record
    )
    given = dict(enumerate(clean.unbind(1)))
    for _ in rollout(plan, solve, remember_the_clip, cache, given):
        pass
    lay, parts = layout(plan, teacher_forcing=True), []
    for n, latent, is_clean in zip(lay.step, lay.latent, lay.is_clean):
        if not is_clean:
            j = plan.steps[n].own.index(latent)
            parts.append(torch.stack([states[n, k][:, j] for k in keep], dim=1))
    return torch.stack(parts, dim=2)


def make_pairs(config: Config, mix: Mix, rank: int, world: int, device: torch.device) -> None:
    """Real clips and, for each plan of the shard's entry, the teacher's states after them."""
    teacher = load_dit(config.teacher, dtype_of(config.dtype), device)
    c = teacher.config
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    clips = Clips(config.clips, config.latent, c.in_dim, source)
    if len(clips) < config.pairs:
        raise UserError(
            f"{config.clips} holds {len(clips)} clips; use --pairs {len(clips)}, or encode more "
            "with tools/encode.py"
        )
    negative = source.embed([config.negative]).to(device)
    keep = kept_states(config.denoising)

    def make(entry: int, numbers: range) -> dict[str, Tensor]:
        plans = mix[entry][1]
        T = plans[0].length
        prompt = source(numbers).to(device)
        text = teacher.text_kv(torch.cat([prompt, negative.expand_as(prompt)]))
        start_noise = torch.stack(
            [pair_noise(config, c.in_dim, n, rows_of(plans)) for n in numbers]
        )
        noise = noise_from(start_noise.to(device), length=config.latent[0])
        clean = torch.stack([clips[n][:T] for n in numbers]).to(device)
        made = {"clean": clean}
        for d, plan in enumerate(plans):
            made[f"plan{d}"] = plan_states(teacher, plan, text, noise, clean, keep, config)
        return made

    where = pairs_where(
        config, source.words, lambda u: draw(mix, u), MADE_BY + PLANS, clips.made_of.__getitem__
    )
    write_missing(
        where, make, causal_shapes(config, mix, c.in_dim), config.micro, rank, world, device
    )


def causal_shapes(config: Config, mix: Mix, channels: int) -> Callable[[int], dict]:
    """entry -> what an autoregressive teacher leaves of each pair."""
    levels, grid = len(config.denoising) + 1, (channels, *config.latent[1:])

    def shapes(entry: int) -> dict[str, tuple[int, ...]]:
        plans = mix[entry][1]
        want = {"clean": (plans[0].length, *grid)}
        for d, plan in enumerate(plans):
            noisy = layout(plan, teacher_forcing=True).is_clean.count(False)
            want[f"plan{d}"] = (levels, noisy, *grid)
        return want

    return shapes


def check_pair(config: Config, mix: Mix, channels: int) -> Callable[[int, Pair], str]:
    """What can be wrong with a causal pair: its states start elsewhere, or do not fall."""

    def check(entry: int, pair: Pair) -> str:
        plans = mix[entry][1]
        rows = pair_noise(config, channels, pair.number, rows_of(plans))[None]
        noise = noise_from(rows, length=config.latent[0])
        share = "all" if config.share_noise == "all" else "none"
        for d, plan in enumerate(plans):
            lay = layout(plan, teacher_forcing=True)
            numbers = []
            for n, latent, clean in zip(lay.step, lay.latent, lay.is_clean):
                if not clean:
                    step = plan.steps[n]
                    numbers.append(step.noise(share, 0)[step.own.index(latent)])
            start_noise = noise(0, tuple(numbers))
            states = pair.shard[f"plan{d}"][pair.row]
            if wrong := wrong_states(states, start_noise, config.seed):
                return f"{plan.name}: {wrong}"
        return ""

    return check


def main(config: Config) -> None:
    rank, world, device = start(config.device)
    mix = mix_of(config)
    recipe_of(config)  # impossible levels are refused before any work
    if config.generate:
        make_pairs(config, mix, rank, world, device)
        return
    c = load_dit(config.teacher, None).config
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    pairs = read_pairs(config, source.words, causal_shapes(config, mix, c.in_dim), MADE_BY + PLANS)
    if config.check:
        check_shards(Path(config.data), pairs, check_pair(config, mix, c.in_dim))
        print(f"{sum(map(len, pairs.values()))} pairs of {len(pairs)} entries are good")
        return
    train(config, mix, pairs, lambda entry: entry, True, rank, world, device)


if __name__ == "__main__":
    run(main, Config)
