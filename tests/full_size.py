"""Wan2.1's sizes on a CPU: how long loading and decoding take, and how much memory. Not a test: it
writes a 5.7 GB file (and removes it), needs 8 GiB of memory and, for the video, an hour or so of a
CPU core. Weights are random: time and memory do not depend on them. Each part runs in a process of
its own and prints its largest resident memory, in which pages of mapped files count.

    python -m tests.full_size
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import trange

from dit import PRESETS, DiT, load_dit
from lib.common import run
from vae import VAE

FILE, GIB = "diffusion_pytorch_model.safetensors", 2**30


@dataclass
class Config:
    """Load 1.3B from the official layout as bfloat16; decode 81 frames of 480 x 832 as a stream."""

    RANGES = {"part": ("all", "write", "load", "decode"), "latents": (1, 10**6)}
    folder: str = ""  # where the checkpoint is written for a while; default: the system's for such
    part: str = "all"  # write, load, decode, or all of them
    latents: int = 21  # how many to decode: 81 frames


def peak() -> float:
    """The most GiB that this process had resident until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write(folder: Path) -> None:
    """`Wan2.1-T2V-1.3B/`'s transformer, float32, not in the page cache when it is done."""
    c = PRESETS["wan1.3b"]
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in DiT(c).state_dict().items()}
    file = folder / FILE
    save_file({k: torch.randn(s).mul_(0.02) for k, s in shapes.items()}, str(file))
    config = {"_class_name": "WanModel", "model_type": "t2v"}
    for name in ("num_layers", "dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads"):
        config[name] = getattr(c, name)
    config |= {"out_dim": c.out_dim, "text_len": c.text_len}
    (folder / "config.json").write_text(json.dumps(config))
    with open(file, "rb+") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path) -> None:
    """Load the transformer in bfloat16; print time and memory."""
    size, began = (folder / FILE).stat().st_size / GIB, time.perf_counter()
    dit = load_dit(folder, torch.bfloat16)
    seconds = time.perf_counter() - began
    assert dit.config == PRESETS["wan1.3b"]
    assert {p.dtype for p in dit.parameters()} == {torch.bfloat16}
    print(
        f"load: {size:.2f} GiB of float32 -> bfloat16 in {seconds:.1f} s, at most {peak():.2f} GiB "
        f"resident = {peak() / size:.2f} x the file"
    )


@torch.no_grad()
def decode(latents: int) -> None:
    """Decode so many latents at 480x832 as a stream; print time and memory."""
    vae, state, frames, began = VAE().eval(), None, 0, time.perf_counter()
    for i in trange(latents, desc="decode", unit="latent"):
        z = torch.randn(1, 1, 16, 60, 104, generator=torch.Generator().manual_seed(i))
        video, state = vae.decode_chunk(z, state, inplace=True)
        assert torch.isfinite(video).all() and video.shape[3:] == (480, 832)
        frames += video.shape[2]
    minutes, busy = (time.perf_counter() - began) / 60, time.process_time() / 60
    print(
        f"decode: {frames} frames of 480 x 832 in {minutes:.1f} minutes ({busy:.1f} minutes of "
        f"CPU, {torch.get_num_threads()} threads), at most {peak():.2f} GiB resident"
    )


def main(config: Config) -> None:
    if config.part == "all":
        command = [sys.executable, "-m", "tests.full_size", "--part"]
        with tempfile.TemporaryDirectory(dir=config.folder or None) as made:
            for part in ("write", "load"):
                subprocess.run([*command, part, "--folder", made], check=True)
        subprocess.run([*command, "decode", "--latents", str(config.latents)], check=True)
    elif config.part == "decode":
        decode(config.latents)
    else:
        (write if config.part == "write" else load)(Path(config.folder))


if __name__ == "__main__":
    run(main, Config)
