"""Executing a plan: walk its steps, denoise each block, remember its clean keys.

For each step of the plan, with x_t = (1 - sigma) x0 + sigma noise and v = noise - x0 predicted:

    x = noise                                        of the step's anchors and targets
    for sigma in (1, .9375, .8333, .625):            1000, 750, 500, 250 of 1000, shifted by 5
        x0 = x - sigma * v(x, 1000 sigma)            seeing its own block and the latents it reads
        x = (1 - sigma') x0 + sigma' * fresh noise   unless this was the last
    keep x0 of the targets; run them once more at t = 0, without gradient, to write their keys

Walking (`rollout`) and denoising a block are two functions. There are two ways to denoise: a
student's few steps (above), and a teacher's ODE, many steps with guidance. A method of your own is
a third: a function (n, step, past, clean, held) -> x0. Noise is a function, too (lib/noise.py).

    z = generate(dit, anchors.backward(21), [text], noise_seeded([(0, 0, 0)], (16, 4, 4)))
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from anchors import Plan, Step
from dit import KV, DiT, Past
from kvcache import KVCache
from lib.noise import Noise
from lib.recipe import Recipe, recipe_of
from lib.shapes import check_levels

ODE_STEPS = 48  # of a teacher; every 12th level is a student's, for any shift [Self-Forcing]
Text = Tensor | list[KV]  # embeddings [B, L, text_dim], or `DiT.text_kv` of them


# ---------------------------------------------------------------- noise levels
def shift_sigma(u: float | Tensor, shift: float = 5.0) -> float | Tensor:
    """Move noise levels u in [0, 1] towards noise: 5u / (1 + 4u) [Wan]; .75 -> .9375."""
    return shift * u / (1 + (shift - 1) * u)


def student_sigmas(
    levels: Sequence[float] = (1000, 750, 500, 250), shift: float = 5.0
) -> list[float]:
    """A student's noise levels; by default 1, .9375, .83333, .625 [paper]. raises: UserError"""
    check_levels(levels)
    return [shift_sigma(level / 1000, shift) for level in levels]


def sigmas_of(recipe: Recipe) -> Callable[[int], list[float]]:
    """Block n, in order of generation and no dummy -> the noise levels it was trained with."""
    return lambda n: student_sigmas(recipe.levels_of(n), recipe.shift)


def ode_sigmas(steps: int = ODE_STEPS, shift: float = 5.0) -> list[float]:
    """Noise levels of a many-step ODE solver, from 1 to 0, both included."""
    return [shift_sigma(1 - i / steps, shift) for i in range(steps)] + [0.0]


# ---------------------------------------------------------------- the walk
Denoise = Callable[[int, Step, list[Past] | None, Tensor | None, Tensor | None], Tensor]
Remember = Callable[[int, Step, Tensor, list[Past] | None], None]


def rollout(
    plan: Plan,
    denoise: Denoise,
    remember: Remember,
    cache: KVCache,
    given: dict[int, Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Generate block by block: read the past, denoise, drop the anchors, remember the targets.

    denoise: (n, step, past, clean, held) -> x0 [B, own, C, h, w] of its anchors and targets
    remember: (n, step, x0 of its own, past): write what a later step reads into the cache
    cache: empty, with `plan.capacity` slots
    given: latent -> [B, C, h, w], for the latents that the plan says are given
    yields: (n, x0 [B, targets, C, h, w]) as step n of the plan is finished"""
    for n, step in enumerate(plan.steps):
        past = cache.read(step.reads)
        clean, held = user_latents(step, given or {})
        own = clean if step.commits else denoise(n, step, past, clean, held)
        cache.evict([i for i in cache.slot if not plan.is_read_after(n, i)])
        remember(n, step, own.detach(), past)
        yield n, own[:, len(step.anchors) :]


def user_latents(step: Step, given: dict[int, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What is given of a step's latents, zero elsewhere [B, own, C, h, w], and where [own]."""
    if not step.given:
        return None, None
    nothing = torch.zeros_like(given[step.given[0]])
    clean = torch.stack([given[i] if i in step.given else nothing for i in step.own], dim=1)
    return clean, torch.tensor([i in step.given for i in step.own], device=clean.device)


def hold(x: Tensor, clean: Tensor | None, held: Tensor | None) -> Tensor:
    """x [B, own, C, h, w] with the user's latents in their places."""
    return x if held is None else torch.where(held.view(1, -1, 1, 1, 1), clean, x)


def times(x: Tensor, sigma: float, held: Tensor | None) -> Tensor:
    """t [B, own] of latents at a noise level; what is held is clean, t = 0."""
    t = torch.full(x.shape[:2], 1000 * sigma, device=x.device)
    return t if held is None else t.masked_fill(held, 0)


# ---------------------------------------------------------------- two ways to denoise a block
Network = Callable[..., Tensor]  # (x, t, text, pos, past=) -> velocity: a DiT, or made of some


def few_steps(
    dit: Network,
    texts: Sequence[Text],
    noise: Noise,
    sigmas: Callable[[int], Sequence[float]],
    exit_at: Callable[[int], int | None] = lambda n: None,
    share_noise: str = "none",
) -> Denoise:
    """A student: a few steps with fresh noise between them (paper Sec. 3.2).

    texts: one per prompt of the plan;  sigmas: the noise levels of step n of the plan
    exit_at: the level, from 0, after which step n stops: stage 2's random exit. Only this pass runs
        with gradient, where the caller has gradients enabled
    share_noise: see `anchors.Step.noise`"""

    def denoise(n, step, past, clean, held):
        last = exit_at(n)
        levels = sigmas(n) if last is None else sigmas(n)[: last + 1]
        x0 = None
        for k, sigma in enumerate(levels):
            fresh = noise(k, step.noise(share_noise, k))  # (B, own, C, h, w), anchors first
            x = fresh if x0 is None else (1 - sigma) * x0 + sigma * fresh
            x = hold(x, clean, held)
            pos = torch.tensor(step.pos, device=x.device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and k == last):
                v = dit(x, times(x, sigma, held), texts[step.prompt], pos, past=past)
                x0 = hold(x - sigma * v, clean, held)
        return x0

    return denoise


def cfg_velocity(
    dit: DiT, x: Tensor, t: Tensor, cond_uncond: Text, pos: Tensor, w: float, **seen: object
) -> Tensor:
    """A teacher's velocity [B, T, C, h, w] with guidance, uncond + w (cond - uncond), in one pass.

    t: [B, T];  cond_uncond: the text of the B prompts, then of the B unconditional ones
    seen: `visible` or `past`, as `DiT.forward` takes them, for 2B samples"""
    cond, uncond = dit(torch.cat([x, x]), torch.cat([t, t]), cond_uncond, pos, **seen).chunk(2)
    return uncond + w * (cond - uncond)


Record = Callable[[int, int, Tensor], None]  # (step n, state k of the ODE, x [B, own, C, h, w])


def many_steps(
    dit: DiT,
    texts: Sequence[Text],
    noise: Noise,
    guidance: float,
    shift: float = 5.0,
    share_noise: str = "none",
    record: Record = lambda n, k, x: None,
    steps: int = ODE_STEPS,
) -> Denoise:
    """A teacher: many Euler steps of its ODE with guidance.

    texts: one per prompt of the plan, of the B prompts and then the B unconditional ones
    share_noise: an ODE has no noise but its start, so anchors share it only for "all"
    record: is handed every state, the noise first, the end point last"""
    sigmas = ode_sigmas(steps, shift)
    share = "all" if share_noise == "all" else "none"

    def denoise(n, step, past, clean, held):
        x = hold(noise(0, step.noise(share, 0)), clean, held)  # (B, own, C, h, w)
        pos, text = torch.tensor(step.pos, device=x.device), texts[step.prompt]
        record(n, 0, x)
        for k, (sigma, below) in enumerate(zip(sigmas, sigmas[1:]), 1):
            v = cfg_velocity(dit, x, times(x, sigma, held), text, pos, guidance, past=past)
            x = hold(x + (below - sigma) * v, clean, held)
            record(n, k, x)
        return x

    return denoise


# ---------------------------------------------------------------- remembering
def clean_pass(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    cache: KVCache,
    commit_anchors: bool = False,
    copies: int = 1,
) -> Remember:
    """Remember targets by one pass at t = 0, if a later step reads them.

    commit_anchors: let the denoised anchors be seen in it (the paper leaves that open); their own
        keys are never stored.  copies: 2 for a teacher with guidance, whose cache holds both"""

    @torch.no_grad()
    def remember(n, step, own, past):
        keep = [i for i in step.targets if plan.is_read_after(n, i)]
        if not keep:
            return
        skip = 0 if commit_anchors else len(step.anchors)
        pos = torch.tensor(step.pos[skip:], device=own.device)
        latents = tuple(i if i in keep else None for i in step.own[skip:])
        x = own[:, skip:].repeat(copies, 1, 1, 1, 1)
        t = torch.zeros(x.shape[:2], device=x.device)
        kv = dit(x, t, texts[step.prompt], pos, past=past, keys_only=True)
        cache.write(latents, kv)

    return remember


# ---------------------------------------------------------------- whole videos
def student_blocks(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe | None = None,
    given: dict[int, Tensor] | None = None,
    exit_at: Callable[[int], int | None] = lambda n: None,
    commit_anchors: bool = False,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """A student's rollout; yields (n, x0 of the targets) as in `rollout`.

    recipe: how it is run; None: as its checkpoint remembers, or else as in the paper
    dtype: of the cache, where it is not that of the weights (mixed precision under FSDP)"""
    recipe = recipe or recipe_of(dit)
    sigmas = sigmas_of(recipe)
    cache = cache_for(dit, plan, noise, dtype=dtype)
    dummies = sum(step.targets[0] < 0 for step in plan.steps)  # before the blocks that are shown
    denoise = few_steps(
        dit,
        texts,
        noise,
        sigmas=lambda n: sigmas(n - dummies),
        exit_at=lambda n: exit_at(n - dummies),
        share_noise=recipe.share_noise,
    )
    remember = clean_pass(dit, plan, texts, cache, commit_anchors)
    return rollout(plan, denoise, remember, cache, given)


def generate(dit: DiT, plan: Plan, texts: Sequence[Text], noise: Noise, **options) -> Tensor:
    """A student's video: latents [B, plan.length, C, h, w]; options as for `student_blocks`."""
    made = list(student_blocks(dit, plan, texts, noise, **options))
    return gather(plan, made)


def teacher_blocks(
    dit: DiT,
    plan: Plan,
    prompts: Sequence[Tensor],
    negative: Tensor,
    noise: Noise,
    guidance: float,
    given: dict[int, Tensor] | None = None,
    **options,
) -> Iterator[tuple[int, Tensor]]:
    """A teacher's rollout, 48 steps a block. One step that makes everything, forward(21, 21), is
    the bidirectional teacher; with an autoregressive one any plan will do.

    prompts: [B, L, text_dim], one per prompt of the plan;  negative: [1 or B, L, text_dim]
    options: as for `many_steps`"""
    texts = [dit.text_kv(torch.cat([p, negative.expand_as(p)])) for p in prompts]
    cache = cache_for(dit, plan, noise, copies=2)
    denoise = many_steps(dit, texts, noise, guidance, **options)
    remember = clean_pass(dit, plan, texts, cache, copies=2)
    with torch.no_grad():
        yield from rollout(plan, denoise, remember, cache, given)


def cache_for(
    dit: DiT,
    plan: Plan,
    noise: Noise,
    copies: int = 1,
    dtype: torch.dtype | None = None,
    kind: Callable[..., KVCache] = KVCache,
) -> KVCache:
    """An empty cache (of another kind, if asked) for a plan, of the noise's batch and size."""
    B, _, _, h, w = noise(0, (0,)).shape
    weight = dit.patch_embedding.weight
    return kind(dit.config, copies * B, plan.capacity, h, w, dtype or weight.dtype, weight.device)


def gather(plan: Plan, finished: Iterable[tuple[int, Tensor]]) -> Tensor:
    """What a rollout yields, put in time: [B, plan.length, C, h, w]."""
    made: dict[int, Tensor] = {}
    for n, x0 in finished:
        made.update(zip(plan.steps[n].targets, x0.unbind(1)))
    return torch.stack([made[i] for i in range(plan.length)], dim=1)
