"""Diagonal Distillation, and first-frame enhancement: fewer denoising steps, block by block.

The first block has no past and needs all levels; the later ones see clean blocks and need ever
fewer: 4, 3, 2, 2 ... And the clean pass is saved, too: what is remembered of a block are the keys
of its last denoising pass, as noisy as it then was. First-frame enhancement (half of ASD,
adversarial self-distillation) is the first idea alone, at its end: 4 levels, then 1 everywhere.

On this backbone the levels of a step are a function of its number, and the keys are overheard.
The levels are those of the student's recipe, the last one always among them; the paper's are 1000,
933, 733, 357 and 1000, 357, not all of which a student of this project has seen.
Left open here: the paper distils its student so, with a term on motion (the DMD difference of
temporal differences) that in its published code has no gradient to the student.
A student of one step (see zoo/README.md) makes any such schedule look free.
Here: half the latents forward, and nothing measured is worse on both seeds; backward jumps more.

    python -m zoo.run diagonal
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from anchors import Plan, backward
from dit import DiT
from lib.noise import Noise
from lib.recipe import Recipe
from sampler import Text, few_steps, gather, rollout, sigmas_of, student_sigmas
from sampler import generate as block_by_block
from zoo.common import PAPER, Method, Overheard, forward_plan, memory


def falling(recipe: Recipe, n: int) -> list[float]:
    """Noise levels of step n: all of the recipe's, then one fewer each step, at least two."""
    count = max(len(recipe.levels) - n, min(2, len(recipe.levels)))
    levels = recipe.levels[: count - 1] + recipe.levels[-1:]
    return student_sigmas(levels, recipe.shift)


def constant(recipe: Recipe, n: int) -> list[float]:
    """Those of the recipe, whatever the step."""
    return sigmas_of(recipe)(n)


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    exit_at: Callable[[int], int | None] = lambda n: None,
    levels: Callable[[Recipe, int], list[float]] = falling,
    overhear: bool = True,
    **options,
) -> Tensor:
    """As `sampler.generate`, with the levels of each step, and without clean passes.

    overhear: remember the keys of the last noisy pass; false: by a clean pass"""

    def sigmas(n: int) -> list[float]:
        return levels(recipe, n)

    def exit_level(n: int) -> int | None:
        return None if exit_at(n) is None else min(exit_at(n), len(sigmas(n)) - 1)

    cache, remember = memory(dit, plan, texts, noise, **options)
    network = Overheard(dit)
    denoise = few_steps(network, texts, noise, sigmas, exit_level, recipe.share_noise)
    if overhear:
        remember = network.remember(plan, cache, remember)
    return gather(plan, rollout(plan, denoise, remember, cache, given))


def first_enhanced(dit: DiT, plan: Plan, texts: Sequence[Text], noise: Noise, **options) -> Tensor:
    """All levels for the block that is made first, one for the others."""
    recipe = options.pop("recipe", PAPER)
    recipe = replace(recipe, levels=recipe.levels[:1], first_levels=recipe.levels)
    return block_by_block(dit, plan, texts, noise, recipe=recipe, **options)


def one_step(dit: DiT, plan: Plan, texts: Sequence[Text], noise: Noise, **options) -> Tensor:
    """One level everywhere: what fewer steps have to be compared with."""
    recipe = options.pop("recipe", PAPER)
    recipe = replace(recipe, levels=recipe.levels[:1], first_levels=())
    return block_by_block(dit, plan, texts, noise, recipe=recipe, **options)


METHODS = {
    "diagonal": Method(forward_plan, generate),
    "diagonal-backward": Method(backward, generate, against="backward"),
    "diagonal-clean": Method(forward_plan, partial(generate, overhear=False)),
    "noisy_keys": Method(forward_plan, partial(generate, levels=constant)),
    "first_frame": Method(forward_plan, first_enhanced),
    "one_step": Method(forward_plan, one_step),
}
