"""Executing a plan: four denoising steps a block, then one clean pass into the cache.

For each step of the plan, with x_t = (1 - sigma) x0 + sigma noise and v = noise - x0 predicted by the student:

    x = noise                                        of the step's anchors and targets
    for sigma in (1, .9375, .8333, .625):            1000, 750, 500, 250 of 1000, shifted by 5
        x0 = x - sigma * v(x, 1000 sigma)            seeing its own block and the cached latents the step reads
        x = (1 - sigma') x0 + sigma' * fresh noise   unless this was the last
    keep x0 of the targets; run them once more at t = 0, without gradient, to write their keys and values

Any order works, since the plan says who reads whom; latents are decoded in temporal order as soon as no earlier one is
missing. The noise of a latent depends on (seed, prompt, sample, latent, denoising step) and on nothing else: not on the
batch, the device, the number of processes, or the order of generation.

    python sampler.py --weights random --order backward --prompt "a red disc moves left over a green wave" --out out/clip.mp4
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anchors import Plan
from dit import KV, DiT, Past
from kvcache import KVCache
from lib.common import UserError, generator

FPS = 16  # [Wan]


@dataclass(frozen=True)
class Recipe:
    """How a student was trained, and so how it is run."""

    levels: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    first_levels: tuple[float, ...] = ()
    shift: float = 5.0
    block: int = 3
    anchors: int = 3
    head: int = 0
    share_noise: str = "none"
    plans: str = "paper"


# ---------------------------------------------------------------- the flow schedule
def shift_sigma(u: float | Tensor, shift: float = 5.0) -> float | Tensor:
    """Move noise levels u in [0, 1] towards noise: 5u / (1 + 4u) [Wan]; .75 -> .9375."""
    return shift * u / (1 + (shift - 1) * u)


def student_sigmas(
    steps: Sequence[float] = (1000, 750, 500, 250), shift: float = 5.0
) -> list[float]:
    """The student's noise levels; the default is 1, .9375, .83333, .625, i.e. t = 1000, 937.5, 833.33, 625 [paper]."""
    if (
        not steps
        or any(not 0 < s <= 1000 for s in steps)
        or list(steps) != sorted(steps, reverse=True)
    ):
        raise UserError(
            f"denoising steps {tuple(steps)} must fall from at most 1000 and stay above 0"
        )
    return [shift_sigma(s / 1000, shift) for s in steps]


def ode_sigmas(steps: int = 48, shift: float = 5.0) -> list[float]:
    """Noise levels of a many-step ODE solver, from 1 to 0 (both included). With 48 steps, every 12th is a student's
    level, exactly, for any shift: that is why ODE pairs are made with 48 [Self-Forcing]."""
    return [shift_sigma(1 - i / steps, shift) for i in range(steps)] + [0.0]


def guided(
    dit: DiT, x: Tensor, t: Tensor, both: Tensor | list[KV], pos: Tensor, w: float, **seen: object
) -> Tensor:
    """A teacher's velocity [B, T, C, h, w] with guidance, uncond + w (cond - uncond), in one pass of twice the batch.

    both: embeddings of the B prompts, then of the B unconditional ones [2B, L, text_dim], or `text_kv` of them;  t: [B, T]
    seen: `visible` or `past`, as `DiT.forward` takes them, for 2B samples"""
    cond, uncond = dit(torch.cat([x, x]), torch.cat([t, t]), both, pos, **seen).chunk(2)
    return uncond + w * (cond - uncond)


# ---------------------------------------------------------------- noise
Noise = Callable[
    [int, tuple[int, ...]], Tensor
]  # (denoising step, latents) -> [B, len(latents), C, h, w]


def noise_from(noise: Tensor, renoise: Tensor | None = None, length: int | None = None) -> Noise:
    """Noise given as tensors: noise [B, R, C, h, w] to start from, renoise [K-1, B, R, C, h, w] for the later steps.

    Row i belongs to latent i; dummies (~i) have the rows length + i, behind those of the video."""
    length = noise.shape[1] if length is None else length

    def rows(k: int, latents: tuple[int, ...]) -> Tensor:
        if k and renoise is None:
            raise ValueError("this rollout needs renoise: it takes more than one denoising step")
        index = torch.tensor([i if i >= 0 else length + ~i for i in latents], device=noise.device)
        return (renoise[k - 1] if k else noise)[:, index]

    return rows


def noise_seeded(
    seeds: Sequence[tuple[int, ...]], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Noise:
    """Noise as a pure function of numbers: one tuple (seed, prompt, sample) per clip; shape [C, h, w]."""

    def draw(k: int, latents: tuple[int, ...]) -> Tensor:
        return torch.stack(
            [
                torch.stack([torch.randn(shape, generator=generator(*s, i, k)) for i in latents])
                for s in seeds
            ]
        ).to(device, non_blocking=True)

    return draw


# ---------------------------------------------------------------- rollout
def rollout(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Tensor | list[KV]],
    noise: Noise,
    sigmas: Sequence[float],
    cache: KVCache,
    given: dict[int, Tensor] | None = None,
    exit_at: int | None = None,
    commit_anchors: bool = False,
    first: tuple[Sequence[float], int | None] | None = None,
    warm: int = 0,
    share_noise: str = "all",
) -> Iterator[tuple[int, Tensor]]:
    """Generate block by block; yield (n, x0 [B, len(targets), C, h, w]) as step n of the plan is finished.

    texts: one per prompt of the plan, embeddings [B, L, text_dim] or `dit.text_kv` of them;  sigmas: noise levels
    given: latent -> [B, C, h, w] for the latents that the plan says are given;  cache: empty, with `plan.capacity` slots
    exit_at: stop every block after this denoising step (0-based) and yield its x0: stage 2's random exit. Only this
        step runs with gradient (where the caller has gradients enabled), and nothing flows through the cache.
    commit_anchors: let the denoised anchors be seen while their targets' keys are computed (an open choice of the
        paper; they are never stored)
    first: (sigmas, exit_at) of the first step of the plan, where it has noise levels of its own (Causal Forcing++)
    warm: a block whose targets were the anchors of the step before leaves out so many denoising steps, and goes on from there"""
    device, imagined = dit.patch_embedding.weight.device, {}
    for n, step in enumerate(plan.steps):
        levels, last = first if first and n == 0 else (sigmas, exit_at)
        past = cache.read(
            step.reads, room=0 if torch.is_grad_enabled() else len(step.own)
        )  # gradients keep the past: no slack
        own = step.own
        skip = len(own) - len(step.targets)  # anchors come first
        pos, prompt = (
            torch.tensor(step.pos).to(device, non_blocking=True),
            texts[step.prompt],
        )  # no GPU waits for the host
        held = [j for j, i in enumerate(own) if i in step.given]
        if held:
            mine = torch.stack([given[own[j]] for j in held], dim=1)
        if step.commits:
            x0 = mine
        else:
            x, levels = noise(0, step.noise(share_noise, 0)), levels[: None if last is None else last + 1]
            start = warm if imagined.keys() == set(step.targets) else 0
            for k, sigma in enumerate(levels[start:], start):
                t = torch.full(x.shape[:2], 1000 * sigma, device=device)
                if k > start:
                    x = (1 - sigma) * x0 + sigma * noise(k, step.noise(share_noise, k))
                elif (
                    start
                ):  # targets go on from what their neighbour imagined, their own anchors begin
                    guess = torch.stack([imagined[i] for i in step.targets], dim=1)
                    x[:, skip:] = (1 - sigma) * guess + sigma * noise(k, step.targets)
                    t[:, :skip] = 1000 * levels[0]
                if held:
                    x[:, held], t[:, held] = mine, 0
                # of anchors the last step's result is not needed
                need = (
                    len(step.targets)
                    if skip and k + 1 == len(levels) and not (held or commit_anchors or warm)
                    else len(own)
                )
                with torch.set_grad_enabled(torch.is_grad_enabled() and k == last):
                    x0 = x[:, -need:] - sigma * dit(x, t, prompt, pos, past=past, need=need)
                if held:
                    x0[:, held] = mine
        imagined = dict(zip(own[:skip], x0.unbind(1))) if warm else {}
        seen = 0 if commit_anchors else skip
        commit(
            dit,
            cache,
            plan,
            n,
            own[seen:],
            x0[:, seen - len(own) :].detach(),
            pos[seen:],
            prompt,
            past,
        )
        yield n, x0[:, -len(step.targets) :]


@torch.no_grad()
def commit(
    dit: DiT,
    cache: KVCache,
    plan: Plan,
    n: int,
    latents: tuple[int, ...],
    clean: Tensor,
    pos: Tensor,
    prompt: Tensor | list[KV],
    past: list[Past] | None,
) -> None:
    """After step n: forget what no later step reads, and write the keys and values of its targets that one does.

    latents, pos: numbers and positions of clean [B, len(latents), C, h, w]; those that are not targets are only seen"""
    keep = {i for i in plan.steps[n].targets if plan.last_read.get(i, -1) > n}
    cache.evict([i for i in cache.slot if plan.last_read.get(i, -1) <= n])
    if keep:
        kv = dit(clean, clean.new_zeros(clean.shape[:2]), prompt, pos, past=past, need=0)
        cache.write(tuple(i if i in keep else None for i in latents), kv)


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Tensor | list[KV]],
    noise: Noise,
    sigmas: Sequence[float] | None = None,
    given: dict[int, Tensor] | None = None,
    exit_at: int | None = None,
    commit_anchors: bool = False,
    first: tuple[Sequence[float], int | None] | None = None,
    dtype: torch.dtype | None = None,
    warm: int = 0,
) -> Tensor:
    """Run a whole rollout: latents [B, plan.length, C, h, w] in temporal order, anchors and dummies dropped.

    dtype: of the cache, where it is not that of the weights (mixed precision under FSDP); the rest as in `rollout`."""
    made: dict[int, Tensor] = {}
    B, _, _, h, w = noise(0, (0,)).shape
    weight = dit.patch_embedding.weight
    cache = KVCache(dit.config, B, plan.capacity, h, w, dtype or weight.dtype, weight.device)
    for n, x0 in rollout(
        dit,
        plan,
        texts,
        noise,
        sigmas or student_sigmas(),
        cache,
        given,
        exit_at,
        commit_anchors,
        first,
        warm,
    ):
        made.update(zip(plan.steps[n].targets, x0.unbind(1)))
    return torch.stack([made[i] for i in range(plan.length)], dim=1)
