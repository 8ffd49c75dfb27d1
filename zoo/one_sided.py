"""Generative Inbetweening (GI) and Time Reversal Fusion (TRF): two one-sided predictions, blended.

An image-to-video model knows how to go on from a first frame, and, reversed, how to lead to a last
one. Denoise the gap with both, each blind to the other's end, and blend the two velocities in every
step; the gap then leaves the one and arrives at the other.

On this backbone one network knows both directions, so the second prediction is the same network
reading the tail alone; GI fine-tunes a second one with turned attention, TRF turns the frames.
`anchors.inbetween` sees both ends at once: that is what to compare with, at half the passes.
Left open: the weights. TRF: half and half; here also falling linearly in time [ours]. GI's noise
injection (blend, noise, denoise again, in the early steps) is left out.
Here: blending at the half makes a seam (2.0 against 1.1); linear blending equals one block.

    python -m zoo.run one_sided-linear
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from anchors import Plan, Reads, Step, inbetween
from dit import DiT
from lib.noise import Noise
from lib.recipe import Recipe
from sampler import Text, few_steps, gather, rollout, sigmas_of
from zoo.common import PAPER, Method, memory

Weights = Callable[[int], Tensor]  # latents in the gap -> the head's share of each [T]


def half(count: int) -> Tensor:
    """Both sides count alike, for all latents: [count]."""
    return torch.full((count,), 0.5)


def linear(count: int) -> Tensor:
    """3 latents: 3/4, 1/2, 1/4."""
    return torch.linspace(1, 0, count + 2)[1:-1]


def sides(step: Step) -> tuple[Reads, Reads]:
    """What a step reads before it and after it."""
    before = tuple((i, p) for i, p in step.reads if p < min(step.pos))
    after = tuple((i, p) for i, p in step.reads if p > max(step.pos))
    return before, after


def blended(dit: DiT, weights: Weights) -> Callable[..., Tensor]:
    """A network whose past is two: it answers for each, and the answers are blended."""

    def velocity(x, t, text, pos, past):
        head, tail = past
        share = weights(x.shape[1]).to(x).view(1, -1, 1, 1, 1)
        from_head = dit(x, t, text, pos, past=head)
        from_tail = dit(x, t, text, pos, past=tail)
        return share * from_head + (1 - share) * from_tail

    return velocity


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    weights: Weights = half,
    **options,
) -> Tensor:
    """As `sampler.generate`; a step that reads on both sides of itself is made from each alone."""
    cache, remember = memory(dit, plan, texts, noise, **options)
    few = few_steps(dit, texts, noise, sigmas_of(recipe), share_noise=recipe.share_noise)
    fused = few_steps(
        blended(dit, weights), texts, noise, sigmas_of(recipe), share_noise=recipe.share_noise
    )

    def denoise(n, step, past, clean, held):
        before, after = sides(step)
        if not before or not after:
            return few(n, step, past, clean, held)
        return fused(n, step, (cache.read(before), cache.read(after)), clean, held)

    return gather(plan, rollout(plan, denoise, remember, cache, given))


METHODS = {
    "inbetween": Method(inbetween, against=""),
    "one_sided-half": Method(inbetween, generate, against="inbetween"),
    "one_sided-linear": Method(inbetween, partial(generate, weights=linear), against="inbetween"),
}
