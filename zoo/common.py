"""What the methods of the zoo share: what a method is, and three small pieces.

An order is a plan, a schedule is a way to denoise, a memory is a cache; so a method of the zoo is a
plan, or a function with the signature of `sampler.generate` that puts the core's pieces together in
another way. Each file ends with METHODS, name -> Method; zoo/run.py has all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anchors import Plan, forward, long
from dit import KV, DiT, Past
from kvcache import KVCache
from lib.noise import Noise
from lib.recipe import Recipe
from sampler import Remember, Text, cache_for, clean_pass
from sampler import generate as block_by_block

PAPER = Recipe()  # of a student whose checkpoint says nothing else


@dataclass(frozen=True)
class Method:
    """A row of the table.

    plan: (latents, block, anchors) -> the plan
    generate: who executes it, called as `sampler.generate` is
    against: the row of the table to compare it with
    length: latents of its row
    batch: the most clips at once; 1 where a choice is made for each clip"""

    plan: Callable[[int, int, int], Plan]
    generate: Callable[..., Tensor] = block_by_block
    against: str = "forward"
    length: int = 21
    batch: int = 16


def memory(
    dit: DiT,
    plan: Plan,
    texts: list[Text],
    noise: Noise,
    commit_anchors: bool = False,
    dtype=None,
    kind: Callable[..., KVCache] = KVCache,
) -> tuple[KVCache, Remember]:
    """An empty cache and the clean pass that fills it; options as for `sampler.student_blocks`."""
    cache = cache_for(dit, plan, noise, dtype=dtype, kind=kind)
    return cache, clean_pass(dit, plan, texts, cache, commit_anchors)


def read_later(plan: Plan, n: int) -> tuple[int | None, ...]:
    """The latents of step n as a cache is told them: None for those that no later step reads."""
    step = plan.steps[n]
    later = {i for i in step.targets if plan.is_read_after(n, i)}
    return tuple(i if i in later else None for i in step.own)


@torch.no_grad()
def commit(
    dit: DiT,
    cache: KVCache,
    latents: tuple[int | None, ...],
    x: Tensor,
    pos: Tensor,
    text: Text,
    past: list[Past] | None,
    sigma: float = 0.0,
) -> None:
    """Write the keys and values of latents x [B, T, C, h, w]; a None in `latents` is only seen.

    sigma: the level they are shown at; x must be noised accordingly"""
    t = torch.full(x.shape[:2], 1000 * sigma, device=x.device)
    kv = dit(x, t, text, pos, past=past, keys_only=True)
    cache.write(latents, kv)


def forward_plan(length: int, block: int, anchors: int) -> Plan:
    """The plain forward plan, which has no anchors."""
    return forward(length, block)


def long_forward(length: int, block: int, anchors: int) -> Plan:
    """Beyond the horizon: the last two blocks and, before them, the first one."""
    return long(length, "forward", block, anchors, 2 * block, sink="past")


def long_backward(length: int, block: int, anchors: int) -> Plan:
    """The same from the end."""
    return long(length, "backward", block, anchors, 2 * block, sink="future")


class Overheard:
    """A network that keeps the keys and values of its latest pass: no clean pass is needed then."""

    def __init__(self, dit: DiT) -> None:
        self.dit = dit
        self.kv: list[KV] = []

    def __call__(self, x: Tensor, t: Tensor, text: Text, pos: Tensor, past=None) -> Tensor:
        v, self.kv = self.dit(x, t, text, pos, past=past, return_kv=True)
        return v

    def remember(self, plan: Plan, cache: KVCache, clean: Remember) -> Remember:
        """Write what was overheard, as noisy as it was; a clean pass is for what is given alone."""

        def remember(n, step, own, past):
            if step.commits:
                clean(n, step, own, past)
                return
            cache.write(read_later(plan, n), self.kv)

        return remember
