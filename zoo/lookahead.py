"""Anchors on the other side [ours], and knots between blocks (Knot Forcing).

A forward block does not know where it is going. Let it imagine P latents *after* itself, as a
backward block imagines those before it (paper Sec. 4.1), and drop them: its end is then the middle
of something. A knot keeps the first k of them: they are held, clean, in the block that comes next,
so that it begins where this one wanted to go on; k = 0 is look-ahead alone, P = 0 the plain plan.

On this backbone look-ahead is a plan, and a knot a plan whose next step is *given* what the last
one imagined. The student that is shipped was trained on neither; zoo/ahead.py trains one.
Left open here: Knot Forcing trains for its knots, and averages both versions of the overlap; what
is held at t = 0 comes back as it was, so here the average is what is held. Its reference frame,
which runs ahead of the rollout, is for portraits: see `anchors.View.future_sink`.
Here: FR 1.11 to 1.08 by looking ahead, not on each seed; to 1.00 by a knot, on both.

    python -m zoo.run lookahead-1
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from anchors import Plan
from dit import DiT
from lib.common import UserError
from lib.noise import Noise
from lib.recipe import Recipe
from sampler import Text, few_steps, gather, rollout, sigmas_of
from zoo.common import PAPER, Method, forward_plan, long_forward, memory
from zoo.switch import two_scenes


def looking_ahead(plan: Plan, ahead: int = 1) -> Plan:
    """A forward plan with `ahead` imagined latents after each block, as far as there are any."""
    steps = []
    for step in plan.steps:
        after, at = step.targets[-1] + 1, step.pos[-1] + 1
        imagined = range(after, min(after + ahead, plan.length))
        pos = (*range(at, at + len(imagined)), *step.pos)  # anchors come first in a step
        steps.append(replace(step, anchors=tuple(imagined), pos=pos))
    return replace(plan, name=f"{plan.name}, looking ahead", steps=tuple(steps))


def knotted(plan: Plan, k: int = 1) -> Plan:
    """The same; each block is given the k latents that the one before imagined of it."""
    if not 0 <= k < len(plan.steps[0].targets):
        block = len(plan.steps[0].targets)
        raise UserError(f"a knot of {k} latents leaves nothing to make of a block of {block}")
    ahead = looking_ahead(plan, k)
    steps = [ahead.steps[0]]
    for before, step in zip(ahead.steps, ahead.steps[1:]):
        steps.append(replace(step, given=before.anchors))
    return replace(plan, name=f"{plan.name}, knotted", steps=tuple(steps))


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    **options,
) -> Tensor:
    """As `sampler.generate`; what a step imagines is given to the step that makes it."""
    cache, remember = memory(dit, plan, texts, noise, **options)
    few = few_steps(dit, texts, noise, sigmas_of(recipe), share_noise=recipe.share_noise)
    known = dict(given or {})

    def denoise(n, step, past, clean, held):
        own = few(n, step, past, clean, held)
        known.update(zip(step.anchors, own.unbind(1)))
        return own

    return gather(plan, rollout(plan, denoise, remember, cache, known))


def row(
    of: Callable[[Plan, int], Plan], k: int, base=forward_plan, against="forward", **options
) -> Method:
    """A row of the table: `of` a plain plan, with k imagined latents a block."""
    return Method(lambda *sizes: of(base(*sizes), k), against=against, **options)


KNOT = {"generate": generate}
LONG = {"base": long_forward, "against": "long-forward", "length": 63}
CUT = {"base": two_scenes, "against": "switch"}
METHODS = {
    "lookahead-1": row(looking_ahead, 1),
    "lookahead-2": row(looking_ahead, 2),
    "lookahead-3": row(looking_ahead, 3),
    "lookahead-long": row(looking_ahead, 1, **LONG),
    "lookahead-switch": row(looking_ahead, 1, **CUT),
    "knot": row(knotted, 1, **KNOT),
    "knot-long": row(knotted, 1, **KNOT, **LONG),
    "knot-switch": row(knotted, 1, **KNOT, **CUT),
}
