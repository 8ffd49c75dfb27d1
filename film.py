"""Making a plan's video: decoding in order, writing, the command line for every order (to be merged into generate.py)."""

import math
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
from anchors import HORIZON, Plan
from dit import PRESETS, DiT, load_dit
from kvcache import KVCache
from lib import text
from lib.common import UserError, dtype_of, run, start
from lib.media import VideoWriter, write_sheet
from lib.weights import find
from sampler import FPS, noise_seeded, rollout, student_sigmas
from vae import PRESETS as VAE_PRESETS
from vae import VAE, load_vae


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside the one in use; None where there are none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def decode_in_order(
    vae: VAE,
    plan: Plan,
    finished: Iterable[tuple[int, Tensor]],
    chunk: int = 0,
    waiting: dict[int, Tensor] | None = None,
) -> Iterator[Tensor]:
    """Decode latents as soon as all earlier ones are there, in one stream; yield video [B, 3, F, H, W] piece by piece, on the CPU.

    Forward order decodes after every block; backward order once, at the end (its past is made last).
    chunk: how many latents at a time at most, 0: `vae.at_once`
    waiting: where finished latents wait, for a caller who wants to see them
    On CUDA a stream of its own decodes while the next block is made: that one is asked for before the pieces of this one are handed
    on, but for the video's first piece, which nothing delays; no more pieces are held than the block has latents."""
    waiting = {} if waiting is None else waiting
    state, at, pieces, held, aside = None, 0, deque(), 0, side_stream(vae.conv2.weight.device)

    def next_piece() -> Tensor:
        with torch.cuda.stream(
            aside
        ):  # waits for the decoding alone; with None this line does nothing
            return pieces.popleft().cpu()

    for n, x0 in finished:
        while pieces:
            yield next_piece()
        chunk = chunk or vae.at_once(*x0.shape[3:])
        waiting.update(
            zip(plan.steps[n].targets, x0.clone().unbind(1))
        )  # a copy, or the anchors beside it would stay alive
        if aside:
            aside.wait_stream(torch.cuda.current_stream(x0.device))
        while at in waiting:
            part = []
            while at in waiting and len(part) < chunk:
                part.append(waiting.pop(at))
                at += 1
                if aside:
                    part[-1].record_stream(
                        aside
                    )  # its memory is not free before the decoding has read it
            with torch.cuda.stream(aside):
                video, state = vae.decode_chunk(torch.stack(part, dim=1), state, inplace=True)
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

    prompt: tuple[str, ...]  # what to show; one for all, or one per scene or --switch
    switch: tuple[
        float, ...
    ] = ()  # seconds at which the next --prompt takes over, with the next block
    out: str = "out/clip.mp4"  # .mp4, .gif, or .mkv (lossless); after Ctrl-C what is done by then is in clip.part.mp4
    sheet: str = ""  # also write a contact sheet: a .png
    preview: str = (
        ""  # a folder: backward blocks, each as a clip as soon as the block before it is made
    )
    weights: str = (
        "toy/weights"  # a folder with student and VAE (Wan2.1-T2V-1.3B layout works), or: random
    )
    embeddings: str = (
        ""  # what text.py made of the prompts; without it, Wan's text encoder beside the weights
    )
    seed: int = 0  # same seed, same clip
    block: int = 3  # latents made at a time [paper]
    anchors: int = 3  # latents imagined before a backward block, 0 to block [paper: 3]
    sink: str = "both"  # beyond 21 latents: past, future, both or none stays in view
    window: int = 0  # how many neighbours stay in view; 0: all within 21 latents, 6 beyond [paper]
    size: tuple[int, ...] = ()  # height width; default 480 832 for Wan's VAE, 32 32 for the toy's
    steps: tuple[float, ...] = (1000, 750, 500, 250)  # denoising steps before the shift [paper]
    first_steps: tuple[
        float, ...
    ] = ()  # other ones for the block that is made first (students of one or two steps)
    shift: float = 5.0  # of the noise levels [paper]
    commit_anchors: bool = False  # let anchors be seen while their block is written to the cache
    warm: int = (
        0  # backward: start blocks from the anchors already imagined for them, this many steps on
    )
    device: str = "auto"  # cpu, cuda or auto
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    vae_dtype: str = "float32"  # of the VAE; bfloat16 is up to twice as fast
    compile: bool = False  # torch.compile the transformer's blocks (CUDA; minutes on first use)


def frame_size(size: tuple[int, ...], dit: DiT, vae: VAE) -> tuple[int, int]:
    """Height and width of frames: --size, or 480 x 832 for Wan's VAE and 32 x 32 for the toy's.

    raises: UserError"""
    size = size or ((480, 832) if vae.config.dim == 96 else (32, 32))
    unit = [vae.config.space * p for p in dit.config.patch_size[1:]]
    if len(size) != 2 or min(size) < 1 or size[0] % unit[0] or size[1] % unit[1]:
        raise UserError(
            f"--size {' '.join(map(str, size))} must be a height and a width "
            f"divisible by {unit[0]} and {unit[1]}"
        )
    return size


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
        raise UserError(
            f"--warm {config.warm} must be from 0 to {len(config.steps) - 1}, the --steps of a block less one"
        )
    device = start(config.device)[2]
    dit, vae = load_models(
        config.weights,
        dtype_of(config.dtype, device),
        device,
        dtype_of(config.vae_dtype, device, "vae_dtype"),
    )
    size = frame_size(config.size, dit, vae)
    if vae.config.z_dim != dit.config.in_dim:
        raise UserError(
            f"the VAE makes {vae.config.z_dim} channels but the transformer reads {dit.config.in_dim}; use a matching pair"
        )
    return dit, vae, size


def prompted(
    plan: Plan, prompts: Sequence[str], seconds: Sequence[float] = (), time: int = 4
) -> Plan:
    """The plan with a prompt for each step: one for all, one for each that the plan knows, or changing at these seconds."""
    if not prompts or not all(p.strip() for p in prompts):
        raise UserError(
            '--prompt is empty; say what to show, for instance --prompt "a red square moves left over a green wave"'
        )
    if not seconds:
        if len(prompts) not in (1, plan.prompts()):
            raise UserError(
                f"{len(prompts)} prompts for a plan with {plan.prompts()}; give one, or one per scene"
            )
        return plan if len(prompts) > 1 else anchors.switch(plan, ())
    if (
        len(prompts) != len(seconds) + 1
        or list(seconds) != sorted(set(seconds))
        or not seconds[0] > 0
    ):
        raise UserError(
            f"--switch {' '.join(map(str, seconds))} needs rising times above 0 and {len(seconds) + 1} prompts, "
            f"got {len(prompts)}"
        )
    plan = anchors.switch(plan, [math.ceil(s * FPS / time) for s in seconds])
    if idle := set(range(len(prompts))) - {s.prompt for s in plan.steps}:
        raise UserError(
            f"prompt {min(idle) + 1} is never followed: no block begins at its time; move --switch"
        )
    return plan


@torch.no_grad()
def film(
    config: Settings,
    plan: Plan,
    prompts: Sequence[str],
    dit: DiT,
    vae: VAE,
    size: tuple[int, int],
    given: dict[int, Tensor] | None = None,
    shown: dict[int, Tensor] | None = None,
    look: Iterable[int] = (),
) -> dict[int, Tensor]:
    """Make a plan's video and write it to --out as it is decoded: memory does not grow with its length.

    given: the user's latents -> [1, C, h, w];  shown: frames -> [3, H, W] in [-1, 1], which replace the decoded ones
    look: numbers of frames to return, {frame: [3, H, W]}, as they were written
    On Ctrl-C or SIGTERM `writer.part` keeps what was decoded; in backward order that is nothing yet, so it keeps the end of
    the video, up to the newest block, which serves as the past of the others and is not shown itself."""
    weight, c, waiting, kept = dit.patch_embedding.weight, dit.config, {}, {}
    writer, frames, time = (
        VideoWriter(config.out, FPS),
        vae.config.frames(plan.length),
        vae.config.time,
    )
    sheet = (
        torch.linspace(0, frames - 1, min(16, frames)).round().int().tolist()
        if config.sheet
        else []
    )
    print(anchors.text_picture(plan) if plan.length <= 64 else f"{plan.name}: too long to draw")
    print(
        f"{plan.name}: {plan.length} latents in {len(plan.steps)} steps = {frames} frames = {frames / FPS:.2f} s, {size[0]}x{size[1]}"
    )
    if config.compile:
        dit.compile_blocks()
    texts = [
        dit.text_kv(e[None].to(weight.device))
        for e in text.embed(prompts, c.text_dim, c.text_len, config.embeddings, config.weights)
    ]
    h, w = (side // vae.config.space for side in size)
    cache = KVCache(c, 1, plan.capacity, h, w, weight.dtype, weight.device)
    noise = noise_seeded([(config.seed, 0, 0)], (c.in_dim, h, w), weight.device)
    sigmas, first = (
        student_sigmas(steps, config.shift)
        for steps in (config.steps, config.first_steps or config.steps)
    )
    made = rollout(
        dit,
        plan,
        texts,
        noise,
        sigmas,
        cache,
        given,
        None,
        config.commit_anchors,
        (first, None),
        config.warm,
    )
    done = tqdm(made, desc="blocks", total=len(plan.steps), unit="block")

    def previewed() -> Iterator[tuple[int, Tensor]]:
        last = None
        for n, x0 in done:
            at = plan.steps[n].targets
            if config.preview and n and plan.steps[n - 1].targets[0] == at[-1] + 1:
                with VideoWriter(
                    Path(config.preview) / f"{time * at[-1] + 1:06d}.mp4", FPS
                ) as file:  # named by its first frame
                    file.write(
                        vae.decode(torch.cat([x0, last], dim=1))[0, :, vae.config.frames(len(at)) :]
                    )
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
                    writer.write(
                        vae.decode(torch.stack([waiting[i] for i in sorted(run)], dim=1))[
                            0, :, vae.config.frames(config.block) :
                        ]
                    )
                raise
    except KeyboardInterrupt:
        done.close()
        print(
            f"stopped: {f'{writer.part} has {writer.count / FPS:.2f}' if writer.count else 'nothing'} of {frames / FPS:.2f} s"
        )
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

    order: str = "forward"  # forward, backward, inbetween, loop, transition or story
    seconds: float = 5.0  # length at 16 frames a second, rounded up to whole blocks
    frames: int = 0  # length in frames instead: 1 + 4k, with k + 1 a multiple of the block
    gap: int = 0  # latents between the ends (inbetween: the rest; loop: 15; story, transition: 6)


def make_plan(config: Config, time: int = 4) -> Plan:
    """The plan for --order at the asked length. raises: UserError for lengths and options that do not fit."""
    block = config.block
    if block < 1:
        raise UserError(f"--block {block} must be at least 1")
    unit = time * block  # frames of one block; a video of n blocks has n * unit - (time - 1) frames
    if config.frames:
        if (config.frames + time - 1) % unit or config.frames < 1:
            below = max((config.frames + time - 1) // unit, 1) * unit - time + 1
            raise UserError(
                f"--frames {config.frames} is not 1 + {time}k frames in whole blocks of {block} latents; "
                f"use {below} or {below + unit}"
            )
        length = (config.frames + time - 1) // time
    elif 0 < config.seconds < 36000:
        length = math.ceil((config.seconds * FPS + time - 1) / unit) * block
    else:
        raise UserError(f"--seconds {config.seconds} must be above 0 and below 36000")
    plan = _plan_of_length(config, length)
    if config.frames and plan.length != length:
        raise UserError(
            f"--order {config.order} with --gap {config.gap} makes {plan.length} latents, but --frames {config.frames} "
            f"is {length}; leave out one of them"
        )
    return plan


def _plan_of_length(config: Config, length: int) -> Plan:
    block = config.block
    if config.order in ("forward", "backward"):
        if length > HORIZON or config.window:
            return anchors.long(
                length, config.order, block, config.anchors, config.window or 6, config.sink
            )
        return (
            anchors.forward(length, block)
            if config.order == "forward"
            else anchors.backward(length, block, config.anchors)
        )
    if config.order == "inbetween":
        return anchors.inbetween(block, config.gap or length - 2 * block, block, config.anchors)
    if config.order == "loop":
        return anchors.loop(length, block, config.gap or None)
    if config.order in ("transition", "story"):  # the scenes share what the gaps leave
        scenes = (
            2
            if config.order == "transition" or len(config.prompt) == 2
            else max(len(config.prompt), 3)
        )
        bridge = config.gap or 2 * block
        blocks = max(
            (length - bridge * (scenes - 1)) // block, scenes
        )  # to be shared out, the first scenes get one more
        sizes = [(blocks // scenes + (i < blocks % scenes)) * block for i in range(scenes)]
        return anchors.story(sizes, bridge, block, config.anchors)
    raise UserError(
        f"unknown order {config.order!r}; use forward, backward, inbetween, loop, transition or story"
    )


def load_models(
    weights: str, dtype: torch.dtype, device: torch.device, vae_dtype: torch.dtype = torch.float32
) -> tuple[DiT, VAE]:
    """The student and the VAE in a folder, or a student's file and the VAE beside it; "random" builds toy-sized ones, to try
    plans and to measure speed."""
    if weights != "random":
        if not (path := Path(weights)).exists():
            raise UserError(
                f"--weights {weights} is not a folder or file; name a folder with a student and a VAE in it, or use random"
            )
        folder, student = (
            (path, find(path, "transformer")) if path.is_dir() else (path.parent, path)
        )
        vae = load_vae(find(folder, "VAE"), vae_dtype, device)
        return load_dit(student, dtype, device), vae
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit, vae = DiT(PRESETS["toy"]), VAE(VAE_PRESETS["toy"])
        torch.nn.init.normal_(dit.head.head.weight, std=0.02)  # else v = 0
    return tuple(
        m.to(device).eval().requires_grad_(False) for m in (dit.to(dtype), vae.to(vae_dtype))
    )


def main(config: Config) -> None:
    plan = prompted(replace(make_plan(config), name=config.order), config.prompt, config.switch)
    dit, vae, size = prepare(config)
    film(config, plan, config.prompt, dit, vae, size)


if __name__ == "__main__":
    run(main, Config)
