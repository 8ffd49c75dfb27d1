"""Speed as ratios, in one process, on equal threads: ours against diffusers', cached against
recomputed.

The contestants take turns, so a slow minute of the machine slows both; medians of the turns are
compared. Random weights: speed does not depend on them. Not a test (a busy machine would make it
fail); docs/speed.md quotes its output.

    python -m tests.speed
"""

import copy
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import anchors
import vae as vae_module
from anchors import Plan, layout
from dit import PRESETS, DiTConfig
from generate import decode_in_order, load_models, make_blocks, write_video
from lib import cpu
from lib.noise import noise_from
from plans import rows_of
from sampler import generate, student_sigmas
from tools.bench import Clock, autoencoder, matmul_rate, medians, of_diffusers, processor
from tools.memory import network
from toy.train_teacher import teacher_loss
from train_ode import ode_loss
from vae import VAEConfig

CPU = torch.device("cpu")
CLOCK = Clock(CPU)


def race(name: str, ours: Callable, other: Callable, turns: int = 9) -> None:
    """Print the median times and how many times faster ours is."""
    a, b = medians(CLOCK, turns, ours, other)
    print(f"| {name} | {a * 1e3:.0f} ms | {b * 1e3:.0f} ms | {b / a:.2f} |", flush=True)


def products() -> None:
    """Print the rate of large matrix products, by oneDNN (`lib/cpu.py`) and by torch's choice."""
    rate = matmul_rate(CLOCK, torch.float32) / 1e9
    with mock.patch.object(cpu, "ONEDNN", False):
        own = matmul_rate(CLOCK, torch.float32) / 1e9
    print(f"matrix products: oneDNN {rate:.0f}, torch's choice {own:.0f} GFLOP/s\n")


def longer(way: str) -> None:
    """How time and memory of a toy video grow from 10 s to 100 s, in one process."""
    dit, vae = load_models("random", torch.float32, CPU)
    times, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        for length in (42, 42, 402):  # the first turn warms up
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
            began = CLOCK.now()
            plan = anchors.long(length, way)
            blocks = make_blocks(dit, plan, ["a red disc moves up over a blue wave"], (4, 4))
            write_video(f"{folder}/clip.mp4", decode_in_order(vae, plan, blocks))
            times.append(CLOCK.now() - began)
            status = Path("/proc/self/status").read_text()
            peaks.append(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20)
    (_, short, long), (_, small, large) = times, peaks
    print(
        f"| 100 s of toy video, {way}, against 10 s | {long:.1f} s | {short:.1f} s | time x "
        f"{long / short:.2f}, peak memory {small:.2f} -> {large:.2f} GiB "
        f"(+ {100 * (large / small - 1):.1f} %) |",
        flush=True,
    )


def floor(run: Callable) -> Callable:
    """The matrix products, attention calls and convolutions of a run, all of them and nothing else.

    Each shape is run on one and the same input, which the caches of the machine then hold."""
    calls, inputs = [], {}

    def recorded(call: Callable) -> Callable:
        def noted(*args, **more):
            same = []
            for x in args:
                is_input = type(x) is torch.Tensor  # no parameter
                same.append(inputs.setdefault((x.shape, x.stride()), x) if is_input else x)
            calls.append((call, same, more))
            return call(*args, **more)

        return noted

    with ExitStack() as stack:
        for where, name in (
            (cpu, "_product"),
            (F, "linear"),
            (F, "scaled_dot_product_attention"),
            (torch.nn.Conv3d, "_conv_forward"),
            (vae_module, "conv3d"),
        ):
            new = recorded(getattr(where, name))
            stack.enter_context(mock.patch.object(where, name, new))
        run()
    assert calls
    return lambda: [call(*args, **more) for call, args, more in calls]


def transformers(name: str, c: DiTConfig, latents: int) -> None:
    """A forward pass against diffusers' of this size, and both against their floors."""
    dit = network(c, torch.float32, CPU)
    theirs, _ = of_diffusers(c, VAEConfig(dim=4), torch.float32, CPU)
    z, text = torch.randn(1, latents, 16, 16, 16), torch.randn(1, 512, c.text_dim)
    zt, t = z.transpose(1, 2).contiguous(), torch.full((1, latents), 500.0)

    def ours() -> torch.Tensor:
        return dit(z, t, text, torch.arange(latents))

    def other() -> object:
        return theirs(zt, t[:, 0], text)

    with mock.patch.object(cpu, "ONEDNN", False):
        torchs = floor(ours)
    race(f"DiT forward, {name}, against diffusers", ours, other)
    race(f"DiT forward, {name}, against its floor", ours, floor(ours))
    race(f"DiT forward, {name}, against that floor with torch's matrix products", ours, torchs)
    race("diffusers' against the floor with torch's matrix products", other, torchs)


def autoencoders(dim: int) -> None:
    """17 frames decoded and encoded, against diffusers' VAE and the floor, and in bfloat16."""
    vae = autoencoder(VAEConfig(dim=dim), torch.float32, CPU)
    _, theirs = of_diffusers(DiTConfig(num_layers=1), vae.config, torch.float32, CPU)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    z, video = torch.randn(1, 5, 16, 16, 16), torch.rand(1, 3, 17, 128, 128) * 2 - 1
    zt = z.transpose(1, 2).contiguous()
    for way, ours, other in (
        ("decode", lambda: vae.decode(z), lambda: theirs.decode(zt)),
        ("encode", lambda: vae.encode(video), lambda: theirs.encode(video)),
    ):
        name = f"VAE {way}, dim {dim}, 17x128x128"
        race(f"{name}, against diffusers", ours, other, turns=5)
        race(f"{name}, against its floor", ours, floor(ours), turns=5)
    name = f"VAE decode, dim {dim}, 17x128x128, in bfloat16 against float32"
    race(name, lambda: half.decode(z), lambda: vae.decode(z), turns=5)


def rollouts(name: str, c: DiTConfig) -> None:
    """A rollout of 21 latents: cached against recomputed, forward against backward."""
    dit, text = network(c, torch.float32, CPU), torch.randn(1, 512, c.text_dim)
    forward, backward, text_kv = anchors.forward(21), anchors.backward(21), dit.text_kv(text)
    rows = rows_of([forward, backward])  # anchors have noise of their own
    noise, renoise = torch.randn(1, rows, 16, 16, 16), torch.randn(3, 1, rows, 16, 16, 16)

    def cached(plan: Plan) -> None:
        generate(dit, plan, [dit.text_kv(text)], noise_from(noise, renoise, 21))

    def recompute(words: torch.Tensor | list) -> None:
        """Every denoising step runs all earlier blocks again, clean: what a cache saves."""
        for n, step in enumerate(forward.steps):
            latents = step.targets[-1] + 1
            visible = layout(Plan("prefix", latents, forward.steps[: n + 1])).visible
            for sigma in student_sigmas():
                t = torch.zeros(1, latents)
                t[:, -3:] = 1000 * sigma
                dit(noise[:, :latents], t, words, torch.arange(latents), visible)

    for against, other in (
        ("cached, against nothing cached", lambda: recompute(text)),
        ("cached, against only the text cached", lambda: recompute(text_kv)),
        ("forward against backward with P = 3", lambda: cached(backward)),
    ):
        whole = f"rollout of 21 latents, {name}, {against}"
        race(whole, lambda: cached(forward), other, turns=3)


def training(c: DiTConfig) -> None:
    """Gradients of the teacher and of stage 1 in bfloat16, against torch's own attention."""
    dit = network(c, torch.float32, CPU).requires_grad_(True)

    def teacher(clips: int, latents: int) -> Tensor:
        z, text = torch.randn(clips, latents, 16, 4, 4), torch.randn(clips, 12, c.text_dim)
        return teacher_loss(dit, z, text, torch.rand(clips), torch.randn_like(z), 3)

    def student(plan: Plan) -> Tensor:
        lay = layout(plan, teacher_forcing=True)
        states = torch.randn(4, 5, len(lay.latent), 16, 4, 4)
        levels = torch.randint(4, (4, len(plan.steps)))
        sigmas, text = torch.tensor([*student_sigmas(), 0.0]), torch.randn(4, 12, c.text_dim)
        return ode_loss(dit, lay, states, levels, sigmas, text)

    @torch.enable_grad()
    def gradient(loss: Callable[[], Tensor], switch: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16), mock.patch.object(cpu, "ONEDNN", switch):
            loss().mean().backward()

    for name, loss in (
        ("8 toy clips of 14 latents, the teacher's", partial(teacher, 8, 14)),
        ("32 toy pictures, the teacher's", partial(teacher, 32, 1)),
        ("4 toy clips, stage 1 forward", partial(student, anchors.forward(21))),
        ("4 toy clips, stage 1 backward", partial(student, anchors.backward(21))),
    ):
        race(f"gradient of {name}, against torch's", *(partial(gradient, loss, x) for x in (1, 0)))


@torch.no_grad()
def main() -> None:
    print(f"{processor()}, torch {torch.__version__}, float32")
    products()
    print("| what | ours | other | other / ours |\n|---|---|---|---|")
    training(PRESETS["toy"])
    for way in ("forward", "backward"):
        longer(way)
    small = DiTConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=8, text_dim=512)
    wide = replace(small, dim=1536, ffn_dim=8960, num_heads=12, num_layers=4)
    transformers("dim 384, 8 layers, 21x64 tokens", small, 21)
    transformers("dim 1536, 2 layers, 12x64 tokens", replace(wide, num_layers=2), 12)
    for dim in (32, 96):
        autoencoders(dim)
    rollouts("dim 384, 8 layers", small)
    rollouts("dim 1536, 4 layers", wide)


if __name__ == "__main__":
    main()
