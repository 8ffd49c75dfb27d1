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
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
import text
from anchors import HORIZON, Plan
from common import UserError, dtype_of, generator, run, start
from dit import KV, PRESETS, DiT, load_dit
from kvcache import KVCache
from media import VideoWriter, write_sheet
from vae import PRESETS as VAE_PRESETS
from vae import VAE, load_vae
from weights import find

FPS = 16  # [Wan]


# ---------------------------------------------------------------- the flow schedule
def shift_sigma(u: float | Tensor, shift: float = 5.0) -> float | Tensor:
    """Move noise levels u in [0, 1] towards noise: 5u / (1 + 4u) [Wan]; .75 -> .9375."""
    return shift * u / (1 + (shift - 1) * u)


def student_sigmas(steps: Sequence[float] = (1000, 750, 500, 250), shift: float = 5.0) -> list[float]:
    """The student's noise levels; the default is 1, .9375, .83333, .625, i.e. t = 1000, 937.5, 833.33, 625 [paper]."""
    if not steps or any(not 0 < s <= 1000 for s in steps) or list(steps) != sorted(steps, reverse=True):
        raise UserError(f"denoising steps {tuple(steps)} must fall from at most 1000 and stay above 0")
    return [shift_sigma(s / 1000, shift) for s in steps]


def ode_sigmas(steps: int = 48, shift: float = 5.0) -> list[float]:
    """Noise levels of a many-step ODE solver, from 1 to 0 (both included). With 48 steps, every 12th is a student's
    level, exactly, for any shift: that is why ODE pairs are made with 48 [Self-Forcing]."""
    return [shift_sigma(1 - i / steps, shift) for i in range(steps)] + [0.0]


# ---------------------------------------------------------------- noise
Noise = Callable[[int, tuple[int, ...]], Tensor]  # (denoising step, latents) -> [B, len(latents), C, h, w]


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


def noise_seeded(seeds: Sequence[tuple[int, ...]], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Noise:
    """Noise as a pure function of numbers: one tuple (seed, prompt, sample) per clip; shape [C, h, w]."""
    def draw(k: int, latents: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.stack([torch.randn(shape, generator=generator(*s, i, k)) for i in latents])
                            for s in seeds]).to(device)
    return draw


# ---------------------------------------------------------------- rollout
def rollout(dit: DiT, plan: Plan, texts: Sequence[Tensor | list[KV]], noise: Noise, sigmas: Sequence[float],
            cache: KVCache, given: dict[int, Tensor] | None = None, exit_at: int | None = None,
            commit_anchors: bool = False, first: tuple[Sequence[float], int | None] | None = None) -> Iterator[tuple[int, Tensor]]:
    """Generate block by block; yield (n, x0 [B, len(targets), C, h, w]) as step n of the plan is finished.

    texts: one per prompt of the plan, embeddings [B, L, text_dim] or `dit.text_kv` of them;  sigmas: noise levels
    given: latent -> [B, C, h, w] for the steps that are given;  cache: empty, with `plan.capacity` slots
    exit_at: stop every block after this denoising step (0-based) and yield its x0: stage 2's random exit. Only this
        step runs with gradient (where the caller has gradients enabled), and nothing flows through the cache.
    commit_anchors: let the denoised anchors be seen while their targets' keys are computed (an open choice of the
        paper; they are never stored)
    first: (sigmas, exit_at) of the first step of the plan, where it has noise levels of its own (Causal Forcing++)"""
    device = dit.patch_embedding.weight.device
    for n, step in enumerate(plan.steps):
        levels, last = first if first and n == 0 else (sigmas, exit_at)
        past = cache.read(step.reads, room=0 if torch.is_grad_enabled() else len(step.own))  # gradients keep the past: no slack
        own, places = (step.targets, step.pos[len(step.anchors):]) if step.given else (step.own, step.pos)
        skip = len(own) - len(step.targets)  # anchors come first
        pos, prompt = torch.tensor(places, device=device), texts[step.prompt]
        if step.given:
            x0 = torch.stack([given[i] for i in own], dim=1)
        else:
            x = noise(0, own)
            for k, sigma in enumerate(levels[:None if last is None else last + 1]):
                if k:
                    x = (1 - sigma) * x0 + sigma * noise(k, own)
                t = torch.full(x.shape[:2], 1000 * sigma, device=device)
                with torch.set_grad_enabled(torch.is_grad_enabled() and k == last):
                    x0 = x - sigma * dit(x, t, prompt, pos, past=past)
        keep = {i for i in step.targets if plan.last_read.get(i, -1) > n}
        cache.evict([i for i in cache.slot if plan.last_read.get(i, -1) <= n])
        if keep:
            first = 0 if commit_anchors else skip
            clean = x0[:, first:].detach()
            with torch.no_grad():
                kv = dit(clean, clean.new_zeros(clean.shape[:2]), prompt, pos[first:], past=past, kv_only=True)
            cache.write(tuple(i if i in keep else None for i in own[first:]), kv)
        yield n, x0[:, skip:]


def generate(dit: DiT, plan: Plan, texts: Sequence[Tensor | list[KV]], noise: Noise, sigmas: Sequence[float] | None = None,
             given: dict[int, Tensor] | None = None, exit_at: int | None = None, commit_anchors: bool = False,
             first: tuple[Sequence[float], int | None] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Run a whole rollout: latents [B, plan.length, C, h, w] in temporal order, anchors and dummies dropped.

    dtype: of the cache, where it is not that of the weights (mixed precision under FSDP); the rest as in `rollout`."""
    made: dict[int, Tensor] = {}
    B, _, _, h, w = noise(0, (0,)).shape
    weight = dit.patch_embedding.weight
    cache = KVCache(dit.config, B, plan.capacity, h, w, dtype or weight.dtype, weight.device)
    for n, x0 in rollout(dit, plan, texts, noise, sigmas or student_sigmas(), cache, given, exit_at, commit_anchors, first):
        made.update(zip(plan.steps[n].targets, x0.unbind(1)))
    return torch.stack([made[i] for i in range(plan.length)], dim=1)


def decode_in_order(vae: VAE, plan: Plan, finished: Iterable[tuple[int, Tensor]], chunk: int = 1) -> Iterator[Tensor]:
    """Decode latents as soon as all earlier ones are there, in one stream; yield video [B, 3, F, H, W] piece by piece.

    Forward order decodes after every block; backward order once, at the end (its past is made last)."""
    waiting: dict[int, Tensor] = {}
    state, at = None, 0
    for n, x0 in finished:
        waiting.update(zip(plan.steps[n].targets, x0.unbind(1)))
        while at in waiting:
            part = []
            while at in waiting and len(part) < chunk:
                part.append(waiting.pop(at))
                at += 1
            video, state = vae.decode_chunk(torch.stack(part, dim=1), state, use_up=True)
            yield video


# ---------------------------------------------------------------- command line
@dataclass
class Config:
    """Generate a video in any temporal order."""
    prompt: tuple[str, ...]         # what to show; one for all, or one per scene (transition, story)
    order: str = "forward"          # forward, backward, inbetween, loop, transition or story
    seconds: float = 5.0            # length at 16 frames a second, rounded up to whole blocks
    frames: int = 0                 # length in frames instead: 1 + 4k, with k + 1 a multiple of the block
    out: str = "out/clip.mp4"       # .mp4 or .gif
    sheet: str = ""                 # also write a contact sheet: a .png
    weights: str = "toy/weights"    # a folder with student and VAE (Wan2.1-T2V-1.3B layout works), or: random
    embeddings: str = ""            # what text.py made of the prompts; without it, Wan's text encoder beside the weights
    seed: int = 0                   # same seed, same clip
    block: int = 3                  # latents made at a time [paper]
    anchors: int = 3                # latents imagined before a backward block, 0 to block [paper: 3]
    gap: int = 0                    # latents between the ends (inbetween: the rest; loop: 15; story, transition: 6)
    sink: str = "both"              # beyond 21 latents: past, future, both or none stays in view
    window: int = 0                 # how many neighbours stay in view; 0: all within 21 latents, 6 beyond [paper]
    size: tuple[int, ...] = ()      # height width; default 480 832 for Wan's VAE, 32 32 for the toy's
    steps: tuple[float, ...] = (1000, 750, 500, 250)  # denoising steps before the shift [paper]
    first_steps: tuple[float, ...] = ()  # other ones for the block that is made first (students of one or two steps)
    shift: float = 5.0              # of the noise levels [paper]
    commit_anchors: bool = False    # let anchors be seen while their block is written to the cache
    device: str = "auto"            # cpu, cuda or auto
    dtype: str = "auto"             # float32 or bfloat16; auto: bfloat16 on CUDA
    compile: bool = False           # torch.compile the transformer's blocks (CUDA; minutes on first use)


def make_plan(config: Config, time: int = 4) -> Plan:
    """The plan for --order at the asked length. raises: UserError for lengths and options that do not fit."""
    block = config.block
    if block < 1:
        raise UserError(f"--block {block} must be at least 1")
    unit = time * block  # frames of one block; a video of n blocks has n * unit - (time - 1) frames
    if config.frames:
        if (config.frames + time - 1) % unit or config.frames < 1:
            below = max((config.frames + time - 1) // unit, 1) * unit - time + 1
            raise UserError(f"--frames {config.frames} is not 1 + {time}k frames in whole blocks of {block} latents; "
                            f"use {below} or {below + unit}")
        length = (config.frames + time - 1) // time
    elif 0 < config.seconds < 36000:
        length = math.ceil((config.seconds * FPS + time - 1) / unit) * block
    else:
        raise UserError(f"--seconds {config.seconds} must be above 0 and below 36000")
    plan = _plan_of_length(config, length)
    if config.frames and plan.length != length:
        raise UserError(f"--order {config.order} with --gap {config.gap} makes {plan.length} latents, but --frames {config.frames} "
                        f"is {length}; leave out one of them")
    return plan


def _plan_of_length(config: Config, length: int) -> Plan:
    block = config.block
    if config.order in ("forward", "backward"):
        if length > HORIZON or config.window:
            return anchors.long(length, config.order, block, config.anchors, config.window or 6, config.sink)
        return anchors.forward(length, block) if config.order == "forward" else anchors.backward(length, block, config.anchors)
    if config.order == "inbetween":
        return anchors.inbetween(block, config.gap or length - 2 * block, block, config.anchors)
    if config.order == "loop":
        return anchors.loop(length, block, config.gap or None)
    if config.order in ("transition", "story"):  # the scenes share what the gaps leave
        scenes = 2 if config.order == "transition" or len(config.prompt) == 2 else max(len(config.prompt), 3)
        bridge = config.gap or 2 * block
        blocks = max((length - bridge * (scenes - 1)) // block, scenes)  # to be shared out, the first scenes get one more
        sizes = [(blocks // scenes + (i < blocks % scenes)) * block for i in range(scenes)]
        return anchors.story(sizes, bridge, block, config.anchors)
    raise UserError(f"unknown order {config.order!r}; use forward, backward, inbetween, loop, transition or story")


def load_models(weights: str, dtype: torch.dtype, device: torch.device) -> tuple[DiT, VAE]:
    """The student and the VAE in a folder, or a student's file and the VAE beside it; "random" builds toy-sized ones, to try
    plans and to measure speed."""
    if weights != "random":
        if not (path := Path(weights)).exists():
            raise UserError(f"--weights {weights} is not a folder or file; name a folder with a student and a VAE in it, or use random")
        folder, student = (path, find(path, "transformer")) if path.is_dir() else (path.parent, path)
        vae = load_vae(find(folder, "VAE"), device=device)
        return load_dit(student, dtype, device), vae
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit, vae = DiT(PRESETS["toy"]), VAE(VAE_PRESETS["toy"])
        torch.nn.init.normal_(dit.head.head.weight, std=0.02)  # else v = 0
    return tuple(m.to(device).eval().requires_grad_(False) for m in (dit.to(dtype), vae))


@torch.no_grad()
def main(config: Config) -> None:
    device = start(config.device)[2]
    dtype = dtype_of(config.dtype, device)
    if not any(p.strip() for p in config.prompt):
        raise UserError('--prompt is empty; say what to show, for instance --prompt "a red square moves left over a green wave"')
    plan, sigmas = make_plan(config), student_sigmas(config.steps, config.shift)
    first = student_sigmas(config.first_steps or config.steps, config.shift), None
    writer = VideoWriter(config.out, FPS)
    dit, vae = load_models(config.weights, dtype, device)
    c, space = dit.config, vae.config.space
    height, width = size = config.size or ((480, 832) if vae.config.dim == 96 else (32, 32))
    unit = space * c.patch_size[1], space * c.patch_size[2]
    if len(size) != 2 or min(size) < 1 or height % unit[0] or width % unit[1]:
        raise UserError(f"--size {' '.join(map(str, size))} must be a height and a width divisible by {unit[0]} and {unit[1]}")
    if vae.config.z_dim != c.in_dim:
        raise UserError(f"the VAE makes {vae.config.z_dim} channels but the transformer reads {c.in_dim}; use a matching pair")
    if len(config.prompt) not in (1, plan.prompts()):
        raise UserError(f"{len(config.prompt)} prompts for a plan with {plan.prompts()}; give one, or one per scene")
    prompts = config.prompt if len(config.prompt) > 1 else config.prompt * plan.prompts()
    print(anchors.text_picture(plan))
    frames = vae.config.frames(plan.length)
    print(f"{config.order}: {plan.length} latents in {len(plan.steps)} steps = {frames} frames = {frames / FPS:.2f} s, {height}x{width}")

    if config.compile:
        for block in dit.blocks:
            block.compile()
    texts = [dit.text_kv(e[None].to(device)) for e in text.embed(prompts, c.text_dim, c.text_len, config.embeddings, config.weights)]
    h, w = height // space, width // space
    noise = noise_seeded([(config.seed, 0, 0)], (c.in_dim, h, w), device)
    cache = KVCache(c, 1, plan.capacity, h, w, dtype, device)
    done = tqdm(rollout(dit, plan, texts, noise, sigmas, cache, commit_anchors=config.commit_anchors, first=first),
                desc="blocks", total=len(plan.steps), unit="block")
    kept = []
    with writer:
        for video in decode_in_order(vae, plan, done):
            writer.write(video[0])
            if config.sheet:
                kept.append(video)
    print(f"wrote {config.out}")
    if config.sheet:
        write_sheet(config.sheet, torch.cat(kept, dim=2), columns=16)
        print(f"wrote {config.sheet}")


if __name__ == "__main__":
    run(main, Config)
