"""Causal ODE pairs (Causal Forcing, stage 2): regress an autoregressive teacher's end points.

A bidirectional teacher's end point depends on noise that a causal student never sees, so the
student learns a mean over it; an autoregressive teacher's end point is a function of what the
student sees (tests/test_injectivity.py shows both in closed form). Its ODE runs block by block,
each block after the clean latents of a *real clip*; stage 1 then shows the student the same:

    pairs     clean [S, T, ...] and, for each plan, states at every slot (an anchor has its own)
    training  train_ode.py's, with all context clean: [clean | noisy]

    python -m zoo.causal_ode --generate && python -m zoo.causal_ode     # after zoo/ar_teacher.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import train_ode
from anchors import Plan, layout
from dit import DiT
from lib import presets
from lib.clips import Clips
from lib.common import UserError, run
from lib.pairs import MADE_BY, PLANS, Pair, wrong_states
from plans import rows_of
from sampler import Noise, Text, cache_for, clean_pass, many_steps, noise_from, rollout


@dataclass
class Config(train_ode.Config):
    """Stage 1 from an autoregressive teacher: make causal pairs (--generate, --check), or train."""

    PRESETS = presets.CAUSAL_ODE
    UNREAD = ("clips",)  # training reads the pairs
    preset: str = "toy"  # toy, toy64, wan or wan-framewise: the published numbers
    teacher: str = "out/ar/teacher.safetensors"  # makes the pairs (zoo/ar_teacher.py)
    weights: str = "out/ar/teacher.safetensors"  # what the student starts from
    clips: str = "out/latents"  # folder of real clips' latents (tools/encode.py)
    data: str = "out/causal-pairs"  # folder of the pairs
    out: str = "out/causal"  # folder of student.safetensors, log.jsonl and the resume state


def noisy_slots(plan: Plan) -> list[tuple[int, int]]:
    """(step, which of its latents) at each noisy slot of [clean | noisy]."""
    lay, places = layout(plan, teacher_forcing=True), []
    for n, latent, is_clean in zip(lay.step, lay.latent, lay.is_clean):
        if not is_clean:
            places.append((n, plan.steps[n].own.index(latent)))
    return places


def plan_states(
    dit: DiT,
    plan: Plan,
    cond_uncond: Text,
    noise: Noise,
    clean: Tensor,
    keep: list[int],
    config: Config,
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
    parts = []
    for n, j in noisy_slots(plan):
        parts.append(torch.stack([states[n, k][:, j] for k in keep], dim=1))
    return torch.stack(parts, dim=2)


class CausalPairs(train_ode.Trajectories):
    """Real clips and, for each plan of an entry, the teacher's states after them.

    Each entry of the mix has pairs of its own."""

    made_by = MADE_BY + PLANS
    group_is = "entries"

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.teacher_forcing = True  # that is what these pairs are for
        config = self.config
        if not config.generate:
            return  # training reads the pairs alone
        self.clips = Clips(config.clips, config.latent, self.channels, self.source)
        if len(self.clips) < config.pairs:
            raise UserError(
                f"{config.clips} holds {len(self.clips)} clips; use --pairs {len(self.clips)}, or "
                "encode more with tools/encode.py"
            )

    def clip_of(self, number: int) -> str:
        return self.clips.made_of[number]

    def group(self, entry: int) -> int:
        return entry

    def shapes(self, group: int) -> dict[str, tuple[int, ...]]:
        plans, grid = self.mix[group][1], (self.channels, *self.config.latent[1:])
        want = {"clean": (plans[0].length, *grid)}
        for d, plan in enumerate(plans):
            want[f"plan{d}"] = (len(self.keep), len(noisy_slots(plan)), *grid)
        return want

    def start(self, group: int, numbers: Sequence[int], device="cpu") -> Noise:
        """The noise of these pairs, which all plans of an entry share."""
        rows = self.noise(numbers, rows_of(self.mix[group][1]))
        return noise_from(rows.to(device), length=self.config.latent[0])

    def make(self, teacher: DiT, text: Text, group: int, numbers: range) -> dict[str, Tensor]:
        plans, device = self.mix[group][1], teacher.patch_embedding.weight.device
        noise = self.start(group, numbers, device)
        clean = torch.stack([self.clips[n][: plans[0].length] for n in numbers]).to(device)
        made = {"clean": clean}
        for d, plan in enumerate(plans):
            made[f"plan{d}"] = plan_states(
                teacher, plan, text, noise, clean, self.keep, self.config
            )
        return made

    def wrong(self, group: int, pair: Pair) -> str:
        noise = self.start(group, [pair.number])
        share = "all" if self.config.share_noise == "all" else "none"
        for d, plan in enumerate(self.mix[group][1]):
            numbers = [plan.steps[n].noise(share, 0)[j] for n, j in noisy_slots(plan)]
            states = pair.shard[f"plan{d}"][pair.row]
            if wrong := wrong_states(states, noise(0, tuple(numbers)), self.config.seed):
                return f"{plan.name}: {wrong}"
        return ""


main = partial(train_ode.main, kind=CausalPairs)

if __name__ == "__main__":
    run(main, Config)
