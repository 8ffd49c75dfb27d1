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
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
from anchors import HORIZON, Plan
from dit import KV, PRESETS, DiT, Past, load_dit
from kvcache import KVCache
from lib import text
from lib.common import UserError, dtype_of, generator, run, start
from lib.media import VideoWriter, write_sheet
from lib.weights import find
from vae import PRESETS as VAE_PRESETS
from vae import VAE, load_vae

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


def guided(dit: DiT, x: Tensor, t: Tensor, both: Tensor | list[KV], pos: Tensor, w: float, **seen: object) -> Tensor:
    """A teacher's velocity [B, T, C, h, w] with guidance, uncond + w (cond - uncond), in one pass of twice the batch.

    both: embeddings of the B prompts, then of the B unconditional ones [2B, L, text_dim], or `text_kv` of them;  t: [B, T]
    seen: `visible` or `past`, as `DiT.forward` takes them, for 2B samples"""
    cond, uncond = dit(torch.cat([x, x]), torch.cat([t, t]), both, pos, **seen).chunk(2)
    return uncond + w * (cond - uncond)


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
                            for s in seeds]).to(device, non_blocking=True)
    return draw


# ---------------------------------------------------------------- rollout
def rollout(dit: DiT, plan: Plan, texts: Sequence[Tensor | list[KV]], noise: Noise, sigmas: Sequence[float],
            cache: KVCache, given: dict[int, Tensor] | None = None, exit_at: int | None = None, commit_anchors: bool = False,
            first: tuple[Sequence[float], int | None] | None = None, warm: int = 0) -> Iterator[tuple[int, Tensor]]:
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
        past = cache.read(step.reads, room=0 if torch.is_grad_enabled() else len(step.own))  # gradients keep the past: no slack
        own = step.own
        skip = len(own) - len(step.targets)  # anchors come first
        pos, prompt = torch.tensor(step.pos).to(device, non_blocking=True), texts[step.prompt]  # no GPU waits for the host
        held = [j for j, i in enumerate(own) if i in step.given]
        if held:
            mine = torch.stack([given[own[j]] for j in held], dim=1)
        if step.commits:
            x0 = mine
        else:
            x, levels = noise(0, own), levels[:None if last is None else last + 1]
            start = warm if imagined.keys() == set(step.targets) else 0
            for k, sigma in enumerate(levels[start:], start):
                t = torch.full(x.shape[:2], 1000 * sigma, device=device)
                if k > start:
                    x = (1 - sigma) * x0 + sigma * noise(k, own)
                elif start:  # targets go on from what their neighbour imagined, their own anchors begin
                    guess = torch.stack([imagined[i] for i in step.targets], dim=1)
                    x[:, skip:] = (1 - sigma) * guess + sigma * noise(k, step.targets)
                    t[:, :skip] = 1000 * levels[0]
                if held:
                    x[:, held], t[:, held] = mine, 0
                # of anchors the last step's result is not needed
                need = len(step.targets) if skip and k + 1 == len(levels) and not (held or commit_anchors or warm) else len(own)
                with torch.set_grad_enabled(torch.is_grad_enabled() and k == last):
                    x0 = x[:, -need:] - sigma * dit(x, t, prompt, pos, past=past, need=need)
                if held:
                    x0[:, held] = mine
        imagined = dict(zip(own[:skip], x0.unbind(1))) if warm else {}
        seen = 0 if commit_anchors else skip
        commit(dit, cache, plan, n, own[seen:], x0[:, seen - len(own):].detach(), pos[seen:], prompt, past)
        yield n, x0[:, -len(step.targets):]


@torch.no_grad()
def commit(dit: DiT, cache: KVCache, plan: Plan, n: int, latents: tuple[int, ...], clean: Tensor, pos: Tensor,
           prompt: Tensor | list[KV], past: list[Past] | None) -> None:
    """After step n: forget what no later step reads, and write the keys and values of its targets that one does.

    latents, pos: numbers and positions of clean [B, len(latents), C, h, w]; those that are not targets are only seen"""
    keep = {i for i in plan.steps[n].targets if plan.last_read.get(i, -1) > n}
    cache.evict([i for i in cache.slot if plan.last_read.get(i, -1) <= n])
    if keep:
        kv = dit(clean, clean.new_zeros(clean.shape[:2]), prompt, pos, past=past, need=0)
        cache.write(tuple(i if i in keep else None for i in latents), kv)


def generate(dit: DiT, plan: Plan, texts: Sequence[Tensor | list[KV]], noise: Noise, sigmas: Sequence[float] | None = None,
             given: dict[int, Tensor] | None = None, exit_at: int | None = None, commit_anchors: bool = False,
             first: tuple[Sequence[float], int | None] | None = None, dtype: torch.dtype | None = None, warm: int = 0) -> Tensor:
    """Run a whole rollout: latents [B, plan.length, C, h, w] in temporal order, anchors and dummies dropped.

    dtype: of the cache, where it is not that of the weights (mixed precision under FSDP); the rest as in `rollout`."""
    made: dict[int, Tensor] = {}
    B, _, _, h, w = noise(0, (0,)).shape
    weight = dit.patch_embedding.weight
    cache = KVCache(dit.config, B, plan.capacity, h, w, dtype or weight.dtype, weight.device)
    for n, x0 in rollout(dit, plan, texts, noise, sigmas or student_sigmas(), cache, given, exit_at, commit_anchors, first, warm):
        made.update(zip(plan.steps[n].targets, x0.unbind(1)))
    return torch.stack([made[i] for i in range(plan.length)], dim=1)


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside the one in use; None where there are none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def decode_in_order(vae: VAE, plan: Plan, finished: Iterable[tuple[int, Tensor]], chunk: int = 0,
                    waiting: dict[int, Tensor] | None = None) -> Iterator[Tensor]:
    """Decode latents as soon as all earlier ones are there, in one stream; yield video [B, 3, F, H, W] piece by piece, on the CPU.

    Forward order decodes after every block; backward order once, at the end (its past is made last).
    chunk: how many latents at a time at most, 0: `vae.at_once`
    waiting: where finished latents wait, for a caller who wants to see them
    On CUDA a stream of its own decodes while the next block is made: that one is asked for before the pieces of this one are handed
    on, but for the video's first piece, which nothing delays; no more pieces are held than the block has latents."""
    waiting = {} if waiting is None else waiting
    state, at, pieces, held, aside = None, 0, deque(), 0, side_stream(vae.conv2.weight.device)

    def next_piece() -> Tensor:
        with torch.cuda.stream(aside):  # waits for the decoding alone; with None this line does nothing
            return pieces.popleft().cpu()
    for n, x0 in finished:
        while pieces:
            yield next_piece()
        chunk = chunk or vae.at_once(*x0.shape[3:])
        waiting.update(zip(plan.steps[n].targets, x0.clone().unbind(1)))  # a copy, or the anchors beside it would stay alive
        if aside:
            aside.wait_stream(torch.cuda.current_stream(x0.device))
        while at in waiting:
            part = []
            while at in waiting and len(part) < chunk:
                part.append(waiting.pop(at))
                at += 1
                if aside:
                    part[-1].record_stream(aside)  # its memory is not free before the decoding has read it
            with torch.cuda.stream(aside):
                video, state = vae.decode_chunk(torch.stack(part, dim=1), state, use_up=True)
            pieces.append(video)
            while len(pieces) > held:
                yield next_piece()
            held = len(plan.steps[n].targets) if aside else 0
    while pieces:
        yield next_piece()


# ---------------------------------------------------------------- from a plan to a file
@dataclass
class Settings:
    """How any video is made (what is made is up to the script)."""
    prompt: tuple[str, ...]         # what to show; one for all, or one per scene or --switch
    switch: tuple[float, ...] = ()  # seconds at which the next --prompt takes over, with the next block
    out: str = "out/clip.mp4"       # .mp4, .gif, or .mkv (lossless); after Ctrl-C what is done by then is in clip.part.mp4
    sheet: str = ""                 # also write a contact sheet: a .png
    preview: str = ""               # a folder: backward blocks, each as a clip as soon as the block before it is made
    weights: str = "toy/weights"    # a folder with student and VAE (Wan2.1-T2V-1.3B layout works), or: random
    embeddings: str = ""            # what text.py made of the prompts; without it, Wan's text encoder beside the weights
    seed: int = 0                   # same seed, same clip
    block: int = 3                  # latents made at a time [paper]
    anchors: int = 3                # latents imagined before a backward block, 0 to block [paper: 3]
    sink: str = "both"              # beyond 21 latents: past, future, both or none stays in view
    window: int = 0                 # how many neighbours stay in view; 0: all within 21 latents, 6 beyond [paper]
    size: tuple[int, ...] = ()      # height width; default 480 832 for Wan's VAE, 32 32 for the toy's
    steps: tuple[float, ...] = (1000, 750, 500, 250)  # denoising steps before the shift [paper]
    first_steps: tuple[float, ...] = ()  # other ones for the block that is made first (students of one or two steps)
    shift: float = 5.0              # of the noise levels [paper]
    commit_anchors: bool = False    # let anchors be seen while their block is written to the cache
    warm: int = 0                   # backward: start blocks from the anchors already imagined for them, this many steps on
    device: str = "auto"            # cpu, cuda or auto
    dtype: str = "auto"             # float32 or bfloat16; auto: bfloat16 on CUDA
    vae_dtype: str = "float32"      # of the VAE; bfloat16 is up to twice as fast
    compile: bool = False           # torch.compile the transformer's blocks (CUDA; minutes on first use)


def prepare(config: Settings) -> tuple[DiT, VAE, tuple[int, int]]:
    """The models, and the size (height, width) of the video. raises: UserError for what cannot work, before any work"""
    VideoWriter(config.out)
    student_sigmas(config.steps, config.shift)
    student_sigmas(config.first_steps or config.steps, config.shift)
    if config.sink not in ("past", "future", "both", "none"):
        raise UserError(f"unknown sink {config.sink!r}; use past, future, both or none")
    if config.block < 1:
        raise UserError(f"--block {config.block} must be at least 1")
    if not 0 <= config.warm < len(config.steps):
        raise UserError(f"--warm {config.warm} must be from 0 to {len(config.steps) - 1}, the --steps of a block less one")
    device = start(config.device)[2]
    dit, vae = load_models(config.weights, dtype_of(config.dtype, device), device, dtype_of(config.vae_dtype, device, "vae_dtype"))
    size = config.size or ((480, 832) if vae.config.dim == 96 else (32, 32))
    unit = [vae.config.space * p for p in dit.config.patch_size[1:]]
    if len(size) != 2 or min(size) < 1 or size[0] % unit[0] or size[1] % unit[1]:
        raise UserError(f"--size {' '.join(map(str, size))} must be a height and a width divisible by {unit[0]} and {unit[1]}")
    if vae.config.z_dim != dit.config.in_dim:
        raise UserError(f"the VAE makes {vae.config.z_dim} channels but the transformer reads {dit.config.in_dim}; use a matching pair")
    return dit, vae, size


def prompted(plan: Plan, prompts: Sequence[str], seconds: Sequence[float] = (), time: int = 4) -> Plan:
    """The plan with a prompt for each step: one for all, one for each that the plan knows, or changing at these seconds."""
    if not prompts or not all(p.strip() for p in prompts):
        raise UserError('--prompt is empty; say what to show, for instance --prompt "a red square moves left over a green wave"')
    if not seconds:
        if len(prompts) not in (1, plan.prompts()):
            raise UserError(f"{len(prompts)} prompts for a plan with {plan.prompts()}; give one, or one per scene")
        return plan if len(prompts) > 1 else anchors.switch(plan, ())
    if len(prompts) != len(seconds) + 1 or list(seconds) != sorted(set(seconds)) or not seconds[0] > 0:
        raise UserError(f"--switch {' '.join(map(str, seconds))} needs rising times above 0 and {len(seconds) + 1} prompts, "
                        f"got {len(prompts)}")
    plan = anchors.switch(plan, [math.ceil(s * FPS / time) for s in seconds])
    if idle := set(range(len(prompts))) - {s.prompt for s in plan.steps}:
        raise UserError(f"prompt {min(idle) + 1} is never followed: no block begins at its time; move --switch")
    return plan


@torch.no_grad()
def film(config: Settings, plan: Plan, prompts: Sequence[str], dit: DiT, vae: VAE, size: tuple[int, int],
         given: dict[int, Tensor] | None = None, shown: dict[int, Tensor] | None = None, look: Iterable[int] = ()) -> dict[int, Tensor]:
    """Make a plan's video and write it to --out as it is decoded: memory does not grow with its length.

    given: the user's latents -> [1, C, h, w];  shown: frames -> [3, H, W] in [-1, 1], which replace the decoded ones
    look: numbers of frames to return, {frame: [3, H, W]}, as they were written
    On Ctrl-C or SIGTERM `writer.part` keeps what was decoded; in backward order that is nothing yet, so it keeps the end of
    the video, up to the newest block, which serves as the past of the others and is not shown itself."""
    weight, c, waiting, kept = dit.patch_embedding.weight, dit.config, {}, {}
    writer, frames, time = VideoWriter(config.out, FPS), vae.config.frames(plan.length), vae.config.time
    sheet = torch.linspace(0, frames - 1, min(16, frames)).round().int().tolist() if config.sheet else []
    print(anchors.text_picture(plan) if plan.length <= 64 else f"{plan.name}: too long to draw")
    print(f"{plan.name}: {plan.length} latents in {len(plan.steps)} steps = {frames} frames = {frames / FPS:.2f} s, {size[0]}x{size[1]}")
    if config.compile:
        dit.compile_blocks()
    texts = [dit.text_kv(e[None].to(weight.device)) for e in text.embed(prompts, c.text_dim, c.text_len, config.embeddings, config.weights)]
    h, w = (side // vae.config.space for side in size)
    cache = KVCache(c, 1, plan.capacity, h, w, weight.dtype, weight.device)
    noise = noise_seeded([(config.seed, 0, 0)], (c.in_dim, h, w), weight.device)
    sigmas, first = (student_sigmas(steps, config.shift) for steps in (config.steps, config.first_steps or config.steps))
    made = rollout(dit, plan, texts, noise, sigmas, cache, given, None, config.commit_anchors, (first, None), config.warm)
    done = tqdm(made, desc="blocks", total=len(plan.steps), unit="block")

    def previewed() -> Iterator[tuple[int, Tensor]]:
        last = None
        for n, x0 in done:
            at = plan.steps[n].targets
            if config.preview and n and plan.steps[n - 1].targets[0] == at[-1] + 1:
                with VideoWriter(Path(config.preview) / f"{time * at[-1] + 1:06d}.mp4", FPS) as file:  # named by its first frame
                    file.write(vae.decode(torch.cat([x0, last], dim=1))[0, :, vae.config.frames(len(at)):])
            last = x0
            yield n, x0
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with writer:
            try:
                for video in decode_in_order(vae, plan, previewed(), waiting=waiting):
                    for f, frame in enumerate(video[0].unbind(1), writer.count):
                        if shown and f in shown:
                            frame.copy_(shown[f])
                        if f in look or f in sheet:
                            kept[f] = frame.cpu().clone()
                    writer.write(video[0])
            except KeyboardInterrupt:
                if not writer.count and len(waiting) > config.block:
                    run = [i for i in waiting if all(j in waiting for j in range(i, plan.length))]
                    writer.write(vae.decode(torch.stack([waiting[i] for i in sorted(run)], dim=1))[0, :, vae.config.frames(config.block):])
                raise
    except KeyboardInterrupt:
        done.close()
        print(f"stopped: {f'{writer.part} has {writer.count / FPS:.2f}' if writer.count else 'nothing'} of {frames / FPS:.2f} s")
        raise
    finally:
        signal.signal(signal.SIGTERM, old)
    print(f"wrote {config.out}")
    if config.sheet:
        write_sheet(config.sheet, torch.stack([kept[f] for f in sheet], dim=1)[None], columns=16)
        print(f"wrote {config.sheet}")
    return {f: kept[f] for f in look}


# ---------------------------------------------------------------- command line
@dataclass
class Config(Settings):
    """Generate a video in any temporal order. (To extend, join or loop your own clips: edit.py.)"""
    order: str = "forward"          # forward, backward, inbetween, loop, transition or story
    seconds: float = 5.0            # length at 16 frames a second, rounded up to whole blocks
    frames: int = 0                 # length in frames instead: 1 + 4k, with k + 1 a multiple of the block
    gap: int = 0                    # latents between the ends (inbetween: the rest; loop: 15; story, transition: 6)


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


def load_models(weights: str, dtype: torch.dtype, device: torch.device, vae_dtype: torch.dtype = torch.float32) -> tuple[DiT, VAE]:
    """The student and the VAE in a folder, or a student's file and the VAE beside it; "random" builds toy-sized ones, to try
    plans and to measure speed."""
    if weights != "random":
        if not (path := Path(weights)).exists():
            raise UserError(f"--weights {weights} is not a folder or file; name a folder with a student and a VAE in it, or use random")
        folder, student = (path, find(path, "transformer")) if path.is_dir() else (path.parent, path)
        vae = load_vae(find(folder, "VAE"), vae_dtype, device)
        return load_dit(student, dtype, device), vae
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit, vae = DiT(PRESETS["toy"]), VAE(VAE_PRESETS["toy"])
        torch.nn.init.normal_(dit.head.head.weight, std=0.02)  # else v = 0
    return tuple(m.to(device).eval().requires_grad_(False) for m in (dit.to(dtype), vae.to(vae_dtype)))


def main(config: Config) -> None:
    plan = prompted(replace(make_plan(config), name=config.order), config.prompt, config.switch)
    dit, vae, size = prepare(config)
    film(config, plan, config.prompt, dit, vae, size)


if __name__ == "__main__":
    run(main, Config)
