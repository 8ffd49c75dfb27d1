"""Causal ODE pairs (Causal Forcing, stage 2): regress an autoregressive teacher's end points.

A bidirectional teacher's end point depends on noise that a causal student never sees, so the
student learns a mean over it, and jumps between blocks; an autoregressive teacher's end point is a
function of what the student sees (tests/test_injectivity.py shows both in closed form). Its ODE
runs block by block, each after the clean latents of a *real clip*; the student is shown the same:

    pairs     a clip and, for each plan, states at every slot of its own (zoo/clip_pairs.py)
    training  train_ode.py's, with all context clean: [clean | noisy]

On this backbone the teacher walks any plan, so there are pairs for backward, too [ours]. All plans
of an iteration share clip and noise.
Left open by the paper: what an anchor's end point is; here where the teacher's ODE takes it.
Here: after stage 1, beside clean context without such pairs, FR forward is the same (1.16), round
trip backward 1.11 for 1.16, of one seed (docs/results.md; earlier weights: docs/results-more.md).

    python -m zoo.causal_ode --generate && python -m zoo.causal_ode     # after zoo/ar_teacher.py
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import train_ode
from anchors import Plan
from dit import DiT
from lib import presets
from lib.common import run
from lib.noise import Noise
from sampler import Text, cache_for, clean_pass, many_steps, rollout
from zoo.clip_pairs import ClipPairs, noisy_slots


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


def plan_states(
    dit: DiT, plan: Plan, text: Text, noise: Noise, clean: Tensor, keep: list[int], config: Config
) -> Tensor:
    """The teacher's states at every noisy slot of a plan: [B, K+1, slots, C, h, w].

    text: of the B prompts, then of the B unconditional ones;  keep: which states of the ODE
    clean: real latents [B, T, C, h, w], which later steps read instead of what is made here"""
    states = defaultdict(list)  # step -> its states, each [B, own, C, h, w]

    def record(n: int, k: int, x: Tensor) -> None:
        if k in keep:
            states[n].append(x)

    how = (config.guidance, config.shift, config.share_noise)
    solve = many_steps(dit, [text], noise, *how, record)
    cache = cache_for(dit, plan, noise, copies=2)
    remember = clean_pass(dit, plan, [text], cache, copies=2)

    def remember_the_clip(n, step, own, past):
        real = [i if i >= 0 else ~i for i in step.own]  # a dummy stands at a latent
        remember(n, step, clean[:, real], past)

    for _ in rollout(plan, solve, remember_the_clip, cache, dict(enumerate(clean.unbind(1)))):
        pass
    made = {n: torch.stack(some, dim=1) for n, some in states.items()}  # (B, K+1, own, C, h, w)
    return torch.stack([made[n][:, :, j] for n, j in noisy_slots(plan)], dim=2)


class CausalPairs(ClipPairs):
    """The teacher's states after real clips."""

    def make(self, teacher: DiT, text: Text, group: int, numbers: range) -> dict[str, Tensor]:
        plans, device = self.mix[group][1], teacher.patch_embedding.weight.device
        noise = self.start(group, numbers, device)
        clean = torch.stack([self.clips[n][: plans[0].length] for n in numbers]).to(device)
        made = {"clean": clean}
        for d, plan in enumerate(plans):
            states = plan_states(teacher, plan, text, noise, clean, self.keep, self.config)
            made[f"plan{d}"] = states
        return made


main = partial(train_ode.main, kind=CausalPairs)

if __name__ == "__main__":
    run(main, Config)
