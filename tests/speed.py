"""Speed as ratios, in one process, on equal threads: ours against diffusers', cached against recomputed.

The contestants take turns, so a slow minute of the machine slows both; medians of the turns are compared. Random
weights: speed does not depend on them. Not a test (a busy machine would make it fail); the README quotes its output.

    make bench
"""
import contextlib
import io
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

import anchors
from anchors import Plan, layout
from dit import DiT, DiTConfig
from sampler import Settings, film, generate, load_models, noise_from, student_sigmas
from vae import VAE, VAEConfig


def race(name: str, ours: Callable, other: Callable, turns: int = 9) -> None:
    """Print the median times and how many times faster ours is."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(turns + 1):  # the first turn warms up
        for who, run in enumerate((ours, other)):
            start = time.perf_counter()
            run()
            if turn:
                times[who].append(time.perf_counter() - start)
    a, b = (statistics.median(t) for t in times.values())
    pairs = statistics.median(y / x for x, y in zip(*times.values()))
    print(f"| {name} | {a * 1e3:.0f} ms | {b * 1e3:.0f} ms | {pairs:.2f} |", flush=True)


def longer(way: str) -> None:
    """How time and memory of a toy video on disk grow from 10 s to 100 s: in one process, the short one first."""
    dit, vae = load_models("random", torch.float32, torch.device("cpu"))
    times, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        for length in (42, 42, 402):  # the first turn warms up
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
            start = time.perf_counter()
            config = Settings(("a red disc moves up over a blue wave",), out=f"{folder}/clip.mp4")
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                film(config, anchors.long(length, way), config.prompt, dit, vae, (32, 32))
            times.append(time.perf_counter() - start)
            peaks.append(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20)
    print(f"| 100 s of toy video, {way}, against 10 s | {times[2]:.1f} s | {times[1]:.1f} s | time x {times[2] / times[1]:.2f}, "
          f"peak memory {peaks[1]:.2f} -> {peaks[2]:.2f} GiB (+ {100 * (peaks[2] / peaks[1] - 1):.1f} %) |", flush=True)


@torch.no_grad()
def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print("| what | ours | other | other / ours |\n|---|---|---|---|")
    for way in ("forward", "backward"):
        longer(way)
    config = DiTConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=8, text_dim=512)
    dit = DiT(config).eval()
    theirs = WanTransformer3DModel(num_attention_heads=6, attention_head_dim=64, ffn_dim=1536, num_layers=8, text_dim=512).eval()
    z, text, t, pos = torch.randn(1, 21, 16, 16, 16), torch.randn(1, 512, 512), torch.full((1,), 500.0), torch.arange(21)
    zt = z.transpose(1, 2).contiguous()
    race("DiT forward, 21x64 tokens, against diffusers", lambda: dit(z, t[:, None].expand(1, 21), text, pos), lambda: theirs(zt, t, text))

    vae, their_vae = VAE(VAEConfig(dim=32)).eval(), AutoencoderKLWan(base_dim=32).eval()
    z = torch.randn(1, 5, 16, 16, 16)
    zt = z.transpose(1, 2).contiguous()
    video = torch.rand(1, 3, 17, 128, 128) * 2 - 1
    race("VAE decode, dim 32, 17x128x128, against diffusers", lambda: vae.decode(z), lambda: their_vae.decode(zt))
    race("VAE encode, dim 32, 17x128x128, against diffusers", lambda: vae.encode(video), lambda: their_vae.encode(video))

    plan = anchors.forward(21)
    text_kv = dit.text_kv(text)
    noise, renoise = torch.randn(1, 21, 16, 16, 16), torch.randn(3, 1, 21, 16, 16, 16)

    def recompute() -> None:
        """Every denoising step runs all earlier blocks again, clean, and the current one: what a cache saves."""
        for n in range(len(plan.steps)):
            visible = layout(Plan("prefix", plan.steps[n].targets[-1] + 1, plan.steps[:n + 1])).visible
            latents = plan.steps[n].targets[-1] + 1
            for sigma in student_sigmas():
                t = torch.zeros(1, latents)
                t[:, -3:] = 1000 * sigma
                dit(noise[:, :latents], t, text_kv, pos[:latents], visible)
    race("rollout of 21 latents, cached against recomputed",
         lambda: generate(dit, plan, [text_kv], noise_from(noise, renoise)), recompute, turns=3)


if __name__ == "__main__":
    main()
