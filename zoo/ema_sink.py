"""A compressed past: what leaves the window is not lost (Reward Forcing's EMA sink, ConvKV).

A sink of the first frames keeps a video's beginning for ever, and the middle is forgotten. Reward
Forcing lets every block that leaves the window leak into the sink, key by key: k <- a k + (1-a) k'.
ConvKV (SoulX-LiveAct) makes a few latents that leave into one slot of its own, by their mean or a
depthwise convolution that starts as the mean.

On this backbone both are caches: keys lie unrotated, so that their mean is meant whatever position
they are read at, and `evict` is the moment of leaving. The plan says what is read: window and sink,
or window and the first latent of every group, whose slot holds the mean from then on.
Left open: a is .99 in the paper's table and .009 in its text; groups are 5 in ConvKV, 3 here, a
block. Its convolution would need training. Only forward here for groups; the sink runs either way.
Here: no difference to the plain long plans; nothing drifts that a sink could hold.

    python -m zoo.run ema_sink --latents 63
"""

from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from anchors import Plan, forward, forward_step
from dit import DiT
from kvcache import KVCache
from lib.noise import Noise
from lib.recipe import Recipe
from sampler import Text, few_steps, gather, rollout, sigmas_of
from zoo.common import PAPER, Method, long_backward, long_forward, memory


class LeakySink(KVCache):
    """What leaves leaks into the sink, slot by slot."""

    def __init__(self, *sizes, sink: tuple[int, ...], keep: float) -> None:
        super().__init__(*sizes)
        self.sink, self.keep = sink, keep

    def evict(self, latents: Iterable[int]) -> None:
        for i in latents:
            into = self.sink[i % len(self.sink)]
            if i in self.sink or into not in self.slot or i not in self.slot:
                continue
            for layer in self.layers:
                for buffer in layer:  # keys, then values [B, slots, N, A, D]
                    left = buffer[:, self.slot[i]]
                    buffer[:, self.slot[into]].mul_(self.keep).add_(left, alpha=1 - self.keep)
        super().evict(latents)


class Grouped(KVCache):
    """What leaves goes into the mean of its group, which lies in the slot of the group's first."""

    def __init__(self, *sizes, group: int) -> None:
        super().__init__(*sizes)
        self.group = group

    def evict(self, latents: Iterable[int]) -> None:
        leaving = set(latents)
        for first in sorted({i - i % self.group for i in leaving} - leaving):
            members = [i for i in range(first, first + self.group) if i in self.slot]
            if not {*members} - {first}:
                continue
            slots = [self.slot[i] for i in members]
            for layer in self.layers:
                for buffer in layer:
                    buffer[:, self.slot[first]] = buffer[:, slots].mean(1)
        super().evict(latents)


def grouped(length: int = 21, block: int = 3, window: int = 6, group: int = 3) -> Plan:
    """A window, and before it the first latent of every group that has left it."""
    steps = []
    for step in forward(length, block).steps:
        begin = step.targets[0]
        seen = [i for i in range(begin) if i >= begin - window or i % group == 0]
        steps.append(forward_step(range(begin, begin + block), seen))
    return Plan("forward, grouped past", length, tuple(steps))


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    keep: float = 0.99,
    group: int = 0,
    **options,
) -> Tensor:
    """As `sampler.generate`. keep: of the sink's keys, a block; group: latents in a mean instead"""
    sink = plan.steps[0].targets
    kind = partial(Grouped, group=group) if group else partial(LeakySink, sink=sink, keep=keep)
    cache, remember = memory(dit, plan, texts, noise, kind=kind, **options)
    denoise = few_steps(dit, texts, noise, sigmas_of(recipe), share_noise=recipe.share_noise)
    return gather(plan, rollout(plan, denoise, remember, cache, given))


def _grouped(length: int, block: int, anchors: int) -> Plan:
    return grouped(length, block, 2 * block, group=block)


METHODS = {
    "ema_sink": Method(long_forward, generate, "long-forward", length=63),
    "ema_sink-backward": Method(long_backward, generate, "long-backward", length=63),
    "conv_kv": Method(_grouped, partial(generate, group=3)),
}
