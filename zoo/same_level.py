"""HiAR and Neighbor Forcing (SoulX-LiveAct): the context is as noisy as the block itself.

Block by block, a block at any level reads a clean past; early errors are read as if they were true.
Here the loops change places: level by level, and at each level block after block. HiAR shows a
block the ones before it at the *next* level, where they were just led; Neighbor Forcing shows them
at the *same* level, by the keys of the pass that denoised them, so there are no clean passes.

On this backbone: one rollout of the plan for each level, with one pass a block and a cache of its
own. Neighbor Forcing at a level equals one masked pass over the whole plan, the pass that trains
stage 1 (tests/test_zoo.py). Blocks of different levels could run side by side (a pipeline), at the
price of a cache a level; this code keeps one at a time.
Left open by HiAR: its forward KL term, .1 |x0(x_T) - teacher|^2 on the first level, is two-way
in the paper, blockwise in its code, and not here. Training: all blocks share the exit level.
Here: forward `hiar` changes nothing, `neighbor` makes seams; backward both do, round trip 1.37.

    python -m zoo.run hiar
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from anchors import Plan, backward
from dit import DiT
from lib.noise import Noise
from lib.recipe import Recipe
from sampler import Text, gather, hold, rollout, student_sigmas, times
from zoo.common import PAPER, Method, Overheard, commit, forward_plan, memory, read_later


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    exit_at: Callable[[int], int | None] = lambda n: None,
    neighbour: bool = False,
    **options,
) -> Tensor:
    """As `sampler.generate`, level by level.

    neighbour: the context is what was overheard at this level, not shown again at the next"""
    sigmas = [*student_sigmas(recipe.levels, recipe.shift), 0.0]
    exit_level = exit_at(len(plan.steps) - 1)
    last = len(sigmas) - 2 if exit_level is None else exit_level
    network = Overheard(dit)
    ready: dict[int, Tensor] = {}  # step -> its latents, led to the level that comes next

    def level(k: int) -> Tensor:
        cache, _ = memory(dit, plan, texts, noise, **options)

        def denoise(n, step, past, clean, held):
            x = noise(0, step.noise(recipe.share_noise, 0)) if k == 0 else ready[n]
            x = hold(x, clean, held)
            pos = torch.tensor(step.pos, device=x.device)
            v = network(x, times(x, sigmas[k], held), texts[step.prompt], pos, past=past)
            return hold(x - sigmas[k] * v, clean, held)

        def remember(n, step, own, past):
            ready[n] = own
            if sigmas[k + 1]:
                fresh = noise(k + 1, step.noise(recipe.share_noise, k + 1))
                ready[n] = (1 - sigmas[k + 1]) * own + sigmas[k + 1] * fresh
            skip, latents = len(step.anchors), read_later(plan, n)
            if set(latents) == {None}:
                return
            if neighbour and not step.commits:
                cache.write(latents, network.kv)
                return
            shown, pos = ready[n][:, skip:], torch.tensor(step.pos[skip:], device=own.device)
            text, sigma = texts[step.prompt], sigmas[k + 1]
            commit(dit, cache, latents[skip:], shown, pos, text, past, sigma)

        with torch.set_grad_enabled(torch.is_grad_enabled() and k == exit_level):
            return gather(plan, rollout(plan, denoise, remember, cache, given))

    for k in range(last):
        level(k)
    return level(last)


METHODS = {
    "hiar": Method(forward_plan, generate),
    "hiar-backward": Method(backward, generate, against="backward"),
    "neighbor": Method(forward_plan, partial(generate, neighbour=True)),
    "neighbor-backward": Method(backward, partial(generate, neighbour=True), against="backward"),
}
