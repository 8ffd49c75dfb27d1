"""SDVG, speculative decoding for video: a cheap drafter makes a block, the target takes it or not.

A draft is judged by its worst frame; if it passes, the target has saved its denoising steps, if
not, it makes the block itself from the same noise. The first block is always the target's: all
others follow from it. The published pair is 1.3B and 14B, ImageReward on decoded frames the judge.

On this backbone a drafter is any student with a cache of its own, by default the target itself with
one level instead of four. The judge is the target, too [ours], in one pass and without decoding:
noise the draft to the lowest level, denoise it, and see how far the target moves its worst latent.
So an accepted block costs 2 passes and a rejected one 6, in place of 4 (clean passes aside).
Left open by the paper: how a reward is normalised from prompt to prompt, hence the threshold. It is
one choice for all clips of a batch: ask for one at a time. A drafter that is the target and takes
all its levels changes nothing, whatever the judge says.
Here: at a lowest level of .25 every draft is taken, which is `first_frame`; at .63 none was.

    python -m zoo.run speculative
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anchors import Plan, Step
from dit import DiT
from lib.noise import Noise
from lib.recipe import Recipe
from sampler import Text, few_steps, gather, hold, rollout, sigmas_of, times
from zoo.common import PAPER, Method, forward_plan, memory

THRESHOLD = 0.1  # mean squared change of a latent whose own variance is about 1 [guess]


def moved(
    dit: DiT, text: Text, noise: Tensor, sigma: float, step: Step, x0: Tensor, past, held
) -> Tensor:
    """How far the target moves the worst latent of a draft x0 [B, own, C, h, w] at sigma: [B]."""
    x = hold((1 - sigma) * x0 + sigma * noise, x0, held)
    pos = torch.tensor(step.pos, device=x.device)
    again = x - sigma * dit(x, times(x, sigma, held), text, pos, past=past)
    targets = (again - x0)[:, len(step.anchors) :]
    return targets.square().mean((2, 3, 4)).amax(1)


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    drafter: DiT | None = None,
    draft_levels: int = 1,
    threshold: float = THRESHOLD,
    **options,
) -> Tensor:
    """As `sampler.generate`; the target is `dit`. With another drafter, texts are embeddings.

    drafter: another student (default: the target itself), of the first `draft_levels` levels"""
    cache, remember = memory(dit, plan, texts, noise, **options)
    own_cache, own_remember = cache, None
    if drafter is not None:
        own_cache, own_remember = memory(drafter, plan, texts, noise, **options)

    def draft_sigmas(n: int) -> list[float]:
        return sigmas_of(recipe)(n)[:draft_levels]

    share = recipe.share_noise
    target = few_steps(dit, texts, noise, sigmas_of(recipe), share_noise=share)
    draft = few_steps(drafter or dit, texts, noise, draft_sigmas, share_noise=share)

    def denoise(n, step, past, clean, held):
        if n == 0:
            return target(n, step, past, clean, held)
        own_past = past if drafter is None else own_cache.read(step.reads)
        x0 = draft(n, step, own_past, clean, held)
        sigmas = sigmas_of(recipe)(n)
        fresh = noise(len(sigmas), step.noise(share, len(sigmas)))  # of a level nobody else uses
        text = texts[step.prompt]
        if moved(dit, text, fresh, sigmas[-1], step, x0, past, held).max() <= threshold:
            return x0
        return target(n, step, past, clean, held)

    def remember_both(n, step, own, past):
        remember(n, step, own, past)
        if own_remember is not None:
            own_past = own_cache.read(step.reads)
            own_cache.evict([i for i in own_cache.slot if not plan.is_read_after(n, i)])
            own_remember(n, step, own, own_past)

    return gather(plan, rollout(plan, denoise, remember_both, cache, given))


METHODS = {"speculative": Method(forward_plan, generate, batch=1)}
