"""What to remember when the prompt changes: recache (LongLive), flush and cut (Infinity-RoPE).

The cache of a finished block holds the old prompt, mixed in by cross-attention. LongLive re-runs
the last 12 latents clean under the new prompt and goes on from their new keys. Infinity-RoPE
forgets instead: all but the first latent and the last two; and for a hard cut it makes the first
block of the new scene at positions 45-47, farther away than anything the model has seen.

On this backbone flush and cut are plans (a prompt a step, fewer reads, `Plan.horizon` raised), and
recache is one more thing to do when a block is remembered.
Left open: where the blocks after the cut stand; here where they always would, after what they read.
Earlier weights could tell none of these from doing nothing: the text alone steered. The rows are
here because a negative result is one, too.
Here: no difference but that a cut raises the round trip: the text alone steers this student.

    python -m zoo.run switch-recache --prompt ... ...
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anchors import HORIZON, Plan, forward, place
from dit import DiT
from lib.noise import Noise
from lib.recipe import Recipe
from plans import switch
from sampler import Text, few_steps, gather, rollout, sigmas_of
from zoo.common import PAPER, Method, commit, memory

RECACHED = 12  # latents [LongLive]
CUT_AT = 45  # position of a new scene's first latent [Infinity-RoPE]


def two_scenes(length: int = 21, block: int = 3, imagined: int = 0) -> Plan:
    """Forward; the second prompt takes over with the block in the middle."""
    middle = length // block // 2 * block
    return switch(forward(length, block), [middle])


def flushed(plan: Plan, sink: int = 1, last: int = 2, cut_at: int = 0) -> Plan:
    """The same plan, whose new scenes read the first latents, the last of the old scene, and their
    own. cut_at: where the first block of a new scene stands; 0: after what it reads."""
    steps, begins = [], {}
    for step in plan.steps:
        begin = begins.setdefault(step.prompt, step.targets[0])
        if step.prompt > 0:
            seen = [i for i, _ in step.reads if i < sink or i >= begin - last]
            at = cut_at if cut_at and step.targets[0] == begin else len(seen)
            pos = tuple(range(at, at + len(step.own)))
            step = replace(step, reads=place(seen, 0), pos=pos)
        steps.append(step)
    return replace(plan, steps=tuple(steps), horizon=max(HORIZON, cut_at + HORIZON))


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    latents: int = RECACHED,
    **options,
) -> Tensor:
    """As `sampler.generate`; when the next step has another prompt, the newest latents that it
    reads are remembered once more, in one clean pass under it."""
    cache, remember = memory(dit, plan, texts, noise, **options)
    made: dict[int, Tensor] = {}

    def remember_anew(n, step, own, past):
        made.update(zip(step.own, own.unbind(1)))
        remember(n, step, own, past)
        later = plan.steps[n + 1 : n + 2]
        if not latents or not later or later[0].prompt == step.prompt:
            return
        newest = later[0].reads[-latents:]
        others = later[0].reads[:-latents]
        again = tuple(i for i, _ in newest)
        pos = torch.tensor([p for _, p in newest], device=own.device)
        x = torch.stack([made[i] for i in again], dim=1)
        cache.evict(again)
        commit(dit, cache, again, x, pos, texts[later[0].prompt], cache.read(others))

    denoise = few_steps(dit, texts, noise, sigmas_of(recipe), share_noise=recipe.share_noise)
    return gather(plan, rollout(plan, denoise, remember_anew, cache, given))


METHODS = {
    "switch": Method(two_scenes, against=""),
    "switch-recache": Method(two_scenes, generate, against="switch"),
    "switch-flush": Method(lambda *sizes: flushed(two_scenes(*sizes)), against="switch"),
    "switch-cut": Method(
        lambda *sizes: flushed(two_scenes(*sizes), cut_at=CUT_AT), against="switch"
    ),
}
