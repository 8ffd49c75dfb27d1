"""Rolling Forcing: all blocks of a window at once, each at its own noise level.

A student of K levels makes a block in K passes. Here the window holds K blocks, the oldest nearly
clean, the newest pure noise; one pass lowers each by a level, the oldest leaves, a new one enters.
So N blocks take N + K - 1 passes instead of N * (K + 1), and a block sees a sketch of its future.

    pass  0  1  2  3  4  5  6        every = 1: block b enters at pass b
    b0    0  1  2  3                 every = K: it enters when the one before is done, which is the
    b1       0  1  2  3              plain rollout; between them is a pipeline of any depth
    b2          0  1  2  3

On this backbone only the execution rolls: a window is consecutive steps of the plan made into one,
at the positions and with the reads of the oldest; backward, too [ours], with the newest's anchors.
Left open by the paper: whether the context is noised (its code: no). Here K is 4, there 5; a window
and its reads must fit the horizon; one prompt a pass, the oldest block's.
Training: a block counts at the pass with w mod K = exit, so blocks of a window count at all levels.
Here: FR 1.11 to 1.01, half the passes; backward the round trip falls from 1.13 to 1.06.

    python -m zoo.run rolling_forcing
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anchors import HORIZON, Plan, Step, View, backward, forward
from dit import DiT
from lib.common import UserError
from lib.noise import Noise
from lib.recipe import Recipe
from lib.shapes import check_step
from sampler import Text, gather, student_sigmas, times
from zoo.common import PAPER, Method, memory


def window(plan: Plan, oldest: int, newest: int) -> Step:
    """Consecutive steps of a plan as one, which finishes the oldest block and keeps the others."""
    first, last = plan.steps[oldest], plan.steps[newest]
    waiting = [i for n in range(newest, oldest, -1) for i in plan.steps[n].targets]
    others = (*last.anchors, *waiting)
    offset = first.pos[-1] - first.targets[-1]
    pos = tuple(i + offset for i in (*others, *first.targets))
    step = Step(first.targets, pos, others, first.reads, first.prompt)
    where = f"a window of steps {oldest} to {newest} of {plan.name!r}"
    check_step(step, {i for i, _ in first.reads}, plan.horizon, where)
    return step


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    exit_at: Callable[[int], int | None] = lambda n: None,
    every: int = 1,
    **options,
) -> Tensor:
    """As `sampler.generate`, of a plan whose blocks follow one another; nothing may be given.

    every: passes between two blocks' entering, 1 to the number of levels"""
    steps, sigmas = plan.steps, student_sigmas(recipe.levels, recipe.shift)
    N, K, exit_level = len(steps), len(sigmas), exit_at(len(steps) - 1)
    if any(step.given for step in steps) or not 1 <= every <= K:
        raise UserError(f"a window rolls over nothing given, every 1 to {K} passes, not {every}")
    cache, remember = memory(dit, plan, texts, noise, **options)
    x0: dict[int, Tensor] = {}  # step -> the newest estimate of its latents, anchors first
    result: dict[int, Tensor] = {}  # step -> its targets, as they are or as a loss sees them

    def shown(n: int, level: int, skip: int) -> Tensor:
        fresh = noise(level, steps[n].noise(recipe.share_noise, level)[skip:])
        if level == 0:
            return fresh
        return (1 - sigmas[level]) * x0[n][:, -fresh.shape[1] :] + sigmas[level] * fresh

    for w in range(every * (N - 1) + K):
        oldest, newest = max((w - K) // every + 1, 0), min(w // every, N - 1)
        step = window(plan, oldest, newest)
        past = cache.read(step.reads)
        levels = {n: w - every * n for n in range(newest, oldest - 1, -1)}
        x, t = [], []
        for n, level in levels.items():
            x.append(shown(n, level, 0 if n == newest else len(steps[n].anchors)))
            t.append(times(x[-1], sigmas[level], None))
        pos = torch.tensor(step.pos, device=x[0].device)
        is_exit = exit_level is not None and w % K == exit_level
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_exit):
            v = dit(torch.cat(x, 1), torch.cat(t, 1), texts[step.prompt], pos, past=past)
        flows = v.split([part.shape[1] for part in x], dim=1)
        for (n, level), part, flow in zip(levels.items(), x, flows):
            x0[n] = part - sigmas[level] * flow
            if is_exit or exit_level is None:
                result[n] = x0[n][:, -len(steps[n].targets) :]
            x0[n] = x0[n].detach()
        if w == every * oldest + K - 1:
            cache.evict([i for i in cache.slot if not plan.is_read_after(oldest, i)])
            block = replace(steps[oldest], anchors=(), pos=step.pos[-len(step.targets) :])
            remember(oldest, block, x0.pop(oldest)[:, -len(step.targets) :], past)
    return gather(plan, iter(result.items()))


def forward_plan(length: int, block: int, anchors: int) -> Plan:
    """Beyond the horizon: two blocks and the first one are seen beside a window of four."""
    return forward(length, block, View(2 * block, past_sink=True) if length > HORIZON else View())


def backward_plan(length: int, block: int, anchors: int) -> Plan:
    """The same with room for anchors."""
    view = View(block, future_sink=True) if length > HORIZON else View()
    return backward(length, block, anchors, view)


METHODS = {
    "rolling_forcing": Method(forward_plan, generate),
    "rolling_forcing-backward": Method(backward_plan, generate, against="backward"),
}
