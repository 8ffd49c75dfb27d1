"""Train the toy teacher: the real DiT, bidirectional, by flow matching on latents of the procedural
world.

Each step draws a length (`plans.prefix_mix`): clips cut to their first n latents, and single
pictures beside them, since latent 0 is an image, of a kind of its own, and one of 21. One noise
level per clip, shifted towards noise; loss |v - (noise - x0)|^2; one prompt in ten is dropped,
which gives the unconditional velocity that guidance needs. Small batches and many steps learn most
per second on a CPU. The exponential moving average is what is kept. Caption accuracy of samples is
read back from their pixels at the end.

    torchrun --nproc_per_node=2 -m toy.train_teacher --out out/toy    # where toy.train_vae wrote
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from anchors import forward
from dit import PRESETS, DiT, load_dit, save_dit
from lib import text
from lib.clips import Clips
from lib.common import Stream, dtype_of, generator, run, start
from lib.media import write_sheet
from lib.noise import noise_from
from lib.training import (
    EMA,
    RANGES,
    clip_gradients,
    computing,
    cosine,
    log_row,
    mean_over_processes,
    optimisers_of,
    sync_gradients,
    training_steps,
)
from plans import draw, prefix_mix
from sampler import gather, shift_sigma, teacher_blocks
from tools import encode
from toy import world
from vae import VAE, load_vae

FRAMES = 81  # [Wan]


@dataclass
class Config:
    """Train the toy teacher."""

    RANGES = RANGES | {"preset": tuple(PRESETS), "size": (8, 4096), "dropout": (0, 1)}
    RANGES |= {
        "clips": (1, 10**9),
        "pictures": (1, 2**20),
        "first": (0, 100),
    }
    out: str = "out/toy"  # has vae.safetensors; gets teacher.safetensors, its log and its state
    preset: str = "toy"  # a DiT preset
    size: int = 32  # pixels
    clips: int = 16384  # training clips, encoded once
    steps: int = 12000
    batch: int = 16  # clips a step, over all processes
    pictures: int = 64  # single pictures a step beside them
    first: float = 5.0  # weight of latent 0 in a clip, an image among latents of four frames [ours]
    init: str = ""  # go on from these weights instead of fresh ones
    lr: float = 1e-3  # AdamW, cosine to zero [ours]
    lr_matrices: float = 0.05  # Muon, of the blocks' matrices, likewise; 0: AdamW for them, too
    shift: float = 3.0  # of the training noise levels [ours]
    dropout: float = 0.1  # share of prompts replaced by the empty one
    ema: float = 0.999
    guidance: float = 3.0  # of the samples at the end
    seed: int = 0
    save_every: int = 500
    dtype: str = "bfloat16"  # of computation; weights, sums and norms stay float32
    device: str = "auto"


def teacher_loss(
    dit: DiT, x0: Tensor, prompts: Tensor, u: Tensor, noise: Tensor, shift: float, first: float = 1
) -> Tensor:
    """Flow matching, per clip: x0, noise [B, T, C, h, w], u [B] in [0, 1] before the shift ->
    [B]."""
    sigma = shift_sigma(u, shift).view(-1, 1, 1, 1, 1)
    t = (1000 * sigma).view(-1, 1).expand(x0.shape[:2])
    pos = torch.arange(x0.shape[1], device=x0.device)
    v = dit((1 - sigma) * x0 + sigma * noise, t, prompts, pos)
    error = (v - (noise - x0)).square().mean((2, 3, 4))  # (B, T)
    weight = torch.ones_like(error[0])  # (T,)
    weight[0] = first
    return (error * weight).sum(1) / weight.sum()


@torch.no_grad()
def report(dit: DiT, vae: VAE, config: Config, sheet: Path, n: int = 64) -> dict[str, float]:
    """Sample n held-out captions, write a sheet of eight, read the captions back."""
    c, device = dit.config, dit.patch_embedding.weight.device
    captions = [world.caption(text.HELD_OUT + i) for i in range(n)]
    prompts = text.embed(captions, c.text_dim, c.text_len).to(device)
    side = config.size // vae.config.space
    streams = [generator(config.seed, Stream.SHEET, i) for i in range(n)]
    noise = torch.stack([torch.randn(21, c.in_dim, side, side, generator=g) for g in streams])
    plan, parts = forward(21, 21), []
    for p, x in zip(prompts.split(16), noise.to(device).split(16)):
        negative = torch.zeros_like(p[:1])
        made = teacher_blocks(dit, plan, [p], negative, noise_from(x), config.guidance)
        parts.append(gather(plan, made))
    video = torch.cat([vae.decode(z[None]).cpu() for z in torch.cat(parts)])
    write_sheet(sheet, video[:8], columns=11)
    return world.accuracy(video, captions) | {"motion": video.diff(dim=2).abs().mean().item()}


def encoded_clips(
    config: Config, vae: VAE, source: text.Prompts, rank: int, processes: int
) -> Clips:
    """The world's clips as latents, encoded once."""
    folder, side = f"{config.out}/latents", config.size // vae.config.space
    job = {"vae": config.out, "out": folder, "clips": config.clips, "frames": FRAMES}
    size = (config.size, config.size)
    encode.encode(encode.Config(size=size, **job), rank, processes, vae.conv2.weight.device)
    if dist.is_initialized():
        dist.barrier()  # until the other processes' clips are there, too
    return Clips(folder, (vae.config.latents(FRAMES), side, side), vae.config.z_dim, source)


def main(config: Config) -> None:
    rank, processes, device = start(config.device)
    out, c, dtype = Path(config.out), PRESETS[config.preset], dtype_of(config.dtype)
    vae = load_vae(out / "vae.safetensors", device=device)
    source = text.Prompts("toy", c.text_dim, c.text_len)
    clips = encoded_clips(config, vae, source, rank, processes)
    mix, mine = prefix_mix(vae.config.latents(FRAMES)), slice(rank, None, processes)
    torch.manual_seed(config.seed)
    dit = load_dit(config.init).requires_grad_(True) if config.init else DiT(c)
    dit.to(device)
    rates = optimisers_of(dit, config.lr, config.lr_matrices, (0.9, 0.99), 0.01)
    ema = EMA(dit, config.ema)
    trained, averages = {"dit": (dit, tuple(rates))}, {"ema": ema}
    for step, row in training_steps(config, "teacher", trained, device, averages, "teacher."):
        for optimiser, rate in rates.items():
            optimiser.param_groups[0]["lr"] = cosine(step, config.steps, rate)
        g = generator(config.seed, Stream.PLANS, step)
        plans = mix[draw(mix, torch.rand(1, generator=g).item())][1]
        for d, (plan, size) in enumerate(zip(plans, (config.batch, config.pictures))):
            g = generator(config.seed, Stream.TEACHER, step, d)
            pick = torch.randint(config.clips, (size,), generator=g)
            kept = torch.rand(size, 1, 1, generator=g) >= config.dropout
            u = torch.rand(size, generator=g)
            noise = torch.randn(size, plan.length, *clips[0].shape[1:], generator=g)
            numbers = pick[mine].tolist()
            x0 = torch.stack([clips[i][: plan.length] for i in numbers])
            batch = x0, source(numbers) * kept[mine], u[mine], noise[mine]
            with computing(dtype, device):
                losses = teacher_loss(
                    dit, *(x.to(device) for x in batch), config.shift, config.first
                )
            losses.mean().backward()
            if step % 20 == 0:
                row |= mean_over_processes({plan.name: losses.mean().item()}, device)
        sync_gradients(dit, "ddp")
        norm = clip_gradients(dit, 1.0, f"step {step}")
        for optimiser in rates:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        ema.update(dit)
        if step % 20 == 0:
            row |= {"norm": norm, "latents": plans[0].length}
    if rank == 0:
        ema.copy_to(dit)
        dit.eval()
        save_dit(dit, out / "teacher.safetensors")
        scores = report(dit, vae, config, out / "teacher.png")
        log_row(out / "teacher.log.jsonl", step=config.steps, **scores)
        shown = ", ".join(f"{k} {v:.3f}" for k, v in scores.items())
        print(f"wrote {out / 'teacher.safetensors'}; 64 held-out captions: {shown}")


if __name__ == "__main__":
    run(main, Config)
