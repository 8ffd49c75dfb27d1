"""Speed as ratios, in one process, on equal threads: ours against diffusers', cached against
recomputed.

The contestants take turns, so a slow minute of the machine slows both; medians of the turns are
compared. Random weights: speed does not depend on them. Not a test (a busy machine would make it
fail); docs/speed.md quotes its output.

    python -m tools.speed
"""

import copy
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel

import anchors
import vae as vae_module
from anchors import Plan, layout
from dit import PRESETS, DiT, DiTConfig
from generate import decode_in_order, load_models, make_blocks, write_video
from lib import cpu
from sampler import generate, noise_from, student_sigmas
from tools.bench import Clock, matmul_rate, medians, processor
from vae import VAE, VAEConfig

CLOCK = Clock(torch.device("cpu"))


def race(name: str, ours: Callable, other: Callable, turns: int = 9) -> None:
    """Print the median times and how many times faster ours is."""
    a, b = medians(CLOCK, turns, ours, other)
    print(f"| {name} | {a * 1e3:.0f} ms | {b * 1e3:.0f} ms | {b / a:.2f} |", flush=True)


def products() -> None:
    """Print the rate of large matrix products, by oneDNN (what `lib/cpu.py` takes) and by torch's
    own choice."""
    rate = matmul_rate(CLOCK, torch.float32) / 1e9
    with mock.patch.object(cpu, "ONEDNN", False):
        own = matmul_rate(CLOCK, torch.float32) / 1e9
    print(f"matrix products: oneDNN {rate:.0f}, torch's choice {own:.0f} GFLOP/s\n")


def longer(way: str) -> None:
    """How time and memory of a toy video on disk grow from 10 s to 100 s: in one process, the short
    one first."""
    dit, vae = load_models("random", torch.float32, torch.device("cpu"))
    times, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        for length in (42, 42, 402):  # the first turn warms up
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
            start = time.perf_counter()
            plan = anchors.long(length, way)
            blocks = make_blocks(dit, plan, ["a red disc moves up over a blue wave"], (4, 4))
            write_video(f"{folder}/clip.mp4", decode_in_order(vae, plan, blocks))
            times.append(time.perf_counter() - start)
            peaks.append(
                int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
            )
    print(
        f"| 100 s of toy video, {way}, against 10 s | {times[2]:.1f} s | {times[1]:.1f} s | "
        f"time x {times[2] / times[1]:.2f}, peak memory {peaks[1]:.2f} -> {peaks[2]:.2f} GiB "
        f"(+ {100 * (peaks[2] / peaks[1] - 1):.1f} %) |",
        flush=True,
    )


def transformers(
    dim: int, ffn: int, heads: int, layers: int, latents: int
) -> tuple[DiT, Callable, Callable]:
    """Our transformer; a forward pass of it, and of diffusers' of this size."""
    config = DiTConfig(dim=dim, ffn_dim=ffn, num_heads=heads, num_layers=layers, text_dim=512)
    dit = DiT(config).eval().requires_grad_(False)
    theirs = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        ffn_dim=ffn,
        num_layers=layers,
        text_dim=512,
    ).eval()
    z, text, t, pos = (
        torch.randn(1, latents, 16, 16, 16),
        torch.randn(1, 512, 512),
        torch.full((1,), 500.0),
        torch.arange(latents),
    )
    zt = z.transpose(1, 2).contiguous()
    return (
        dit,
        lambda: dit(z, t[:, None].expand(1, latents), text, pos),
        lambda: theirs(zt, t, text),
    )


def floor(run: Callable) -> Callable:
    """The matrix products, attention calls and convolutions of a run, all of them and nothing else.

    Each shape is run on one and the same input, which the caches of the machine then hold."""
    calls, inputs = [], {}
    real = {
        (where, name): getattr(where, name)
        for where, name in (
            (cpu, "_product"),
            (F, "linear"),
            (F, "scaled_dot_product_attention"),
            (torch.nn.Conv3d, "_conv_forward"),
            (vae_module, "conv3d"),
        )
    }

    def recorded(call: Callable) -> Callable:
        def noted(*args, **more):
            same = [
                inputs.setdefault((x.shape, x.stride()), x) if type(x) is torch.Tensor else x
                for x in args
            ]  # not parameters
            calls.append((call, same, more))
            return call(*args, **more)

        return noted

    try:
        for (where, name), call in real.items():
            setattr(where, name, recorded(call))
        run()
    finally:
        for (where, name), call in real.items():
            setattr(where, name, call)
    assert calls
    return lambda: [call(*args, **more) for call, args, more in calls]


def autoencoders(dim: int) -> None:
    """Decoding and encoding of 17 frames against diffusers' VAE, and against its own convolutions
    alone."""
    vae, theirs = (
        VAE(VAEConfig(dim=dim)).eval().requires_grad_(False),
        AutoencoderKLWan(base_dim=dim).eval(),
    )
    z, video = torch.randn(1, 5, 16, 16, 16), torch.rand(1, 3, 17, 128, 128) * 2 - 1
    zt = z.transpose(1, 2).contiguous()
    for name, ours, other in (
        ("decode", lambda: vae.decode(z), lambda: theirs.decode(zt)),
        ("encode", lambda: vae.encode(video), lambda: theirs.encode(video)),
    ):
        race(f"VAE {name}, dim {dim}, 17x128x128, against diffusers", ours, other, turns=5)
        race(f"VAE {name}, dim {dim}, 17x128x128, against its floor", ours, floor(ours), turns=5)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    race(
        f"VAE decode, dim {dim}, 17x128x128, in bfloat16 against float32",
        lambda: half.decode(z),
        lambda: vae.decode(z),
        turns=5,
    )


def rollouts(name: str, dit: DiT) -> None:
    """A rollout of 21 latents: cached against recomputed, forward against backward; and what fusing
    two passes would save."""
    plans, text = (
        {"forward": anchors.forward(21), "backward": anchors.backward(21)},
        torch.randn(1, 512, 512),
    )
    text_kv = dit.text_kv(text)
    noise, renoise, pos = (
        torch.randn(1, 21, 16, 16, 16),
        torch.randn(3, 1, 21, 16, 16, 16),
        torch.arange(21),
    )

    def cached(way: str) -> None:
        generate(dit, plans[way], [dit.text_kv(text)], noise_from(noise, renoise))

    def recompute(words: torch.Tensor | list) -> None:
        """Every denoising step runs all earlier blocks again, clean, and the current one: what a
        cache saves."""
        plan = plans["forward"]
        for n in range(len(plan.steps)):
            latents = plan.steps[n].targets[-1] + 1
            visible = layout(Plan("prefix", latents, plan.steps[: n + 1])).visible
            for sigma in student_sigmas():
                t = torch.zeros(1, latents)
                t[:, -3:] = 1000 * sigma
                dit(noise[:, :latents], t, words, pos[:latents], visible)

    name = f"rollout of 21 latents, {name}"
    race(
        f"{name}, cached, against nothing cached",
        lambda: cached("forward"),
        lambda: recompute(text),
        turns=3,
    )
    race(
        f"{name}, cached, against only the text cached",
        lambda: cached("forward"),
        lambda: recompute(text_kv),
        turns=3,
    )
    race(
        f"{name}, forward against backward with P = 3",
        lambda: cached("forward"),
        lambda: cached("backward"),
        turns=3,
    )


def fused(name: str, config: DiTConfig, h: int) -> None:
    """What fusing a block's clean pass with the next one's first step would save: one pass of both,
    or one after the other."""
    dit = DiT(config).eval().requires_grad_(False)
    z, t, pos = torch.randn(1, 6, config.in_dim, h, h), torch.zeros(1, 6), torch.arange(6)
    kv = dit.text_kv(torch.randn(1, config.text_len, config.text_dim))
    race(
        f"clean pass and next step in one pass, {name}, 6x{config.tokens(h, h)} tokens, "
        "against one after the other",
        lambda: dit(z, t, kv, pos),
        lambda: (
            dit(z[:, :3], t[:, :3], kv, pos[:3], keys_only=True),
            dit(z[:, 3:], t[:, 3:], kv, pos[3:]),
        ),
    )


@torch.no_grad()
def main() -> None:
    print(f"{processor()}, torch {torch.__version__}, float32")
    products()
    print("| what | ours | other | other / ours |\n|---|---|---|---|")
    for way in ("forward", "backward"):
        longer(way)
    small, wide = transformers(384, 1536, 6, 8, 21), transformers(1536, 8960, 12, 2, 12)
    for name, (ours, theirs) in (
        ("dim 384, 8 layers, 21x64 tokens", small[1:]),
        ("dim 1536, 2 layers, 12x64 tokens", wide[1:]),
    ):
        with mock.patch.object(cpu, "ONEDNN", False):
            torchs = floor(ours)
        race(f"DiT forward, {name}, against diffusers", ours, theirs)
        race(f"DiT forward, {name}, against its floor", ours, floor(ours))
        race(f"DiT forward, {name}, against that floor with torch's matrix products", ours, torchs)
        race("diffusers' against the floor with torch's matrix products", theirs, torchs)
    for dim in (32, 96):
        autoencoders(dim)
    rollouts("dim 384, 8 layers", small[0])
    rollouts("dim 1536, 4 layers", transformers(1536, 8960, 12, 4, 12)[0])
    fused("the toy", PRESETS["toy"], 4)
    fused("1.3B's layers, two of them", replace(PRESETS["wan1.3b"], num_layers=2), 32)


if __name__ == "__main__":
    main()
