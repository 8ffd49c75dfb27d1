"""Train the toy teacher: the real DiT, bidirectional, by flow matching on latents of the procedural
world.

Each step draws a length (`anchors.prefix_mix`): clips cut to their first n latents, and single
pictures beside them, since
latent 0 is an image, of a kind of its own, and one of 21. One noise level per clip, shifted towards
noise; loss
|v - (noise - x0)|^2; one prompt in ten is dropped, which gives the unconditional velocity that
guidance needs. Small batches
and many steps learn most per second on a CPU. The exponential moving average is what is kept.
Caption accuracy of samples is
read back from their pixels at the end.

    torchrun --nproc_per_node=2 -m toy.train_teacher --out out/toy          # after toy.train_vae
    with the same --out
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from anchors import forward
from dit import PRESETS, DiT, save_dit
from lib import text
from lib.clips import Clips
from lib.common import Stream, UserError, dtype_of, generator, run, start
from lib.media import write_sheet
from lib.training import (
    EMA,
    clip_gradients,
    computing,
    cosine,
    log_row,
    mean_over_processes,
    sync_gradients,
    training_steps,
)
from plans import draw, prefix_mix
from sampler import gather, noise_from, shift_sigma, teacher_blocks
from tools import encode as latents
from toy import world
from vae import VAE, load_vae

FRAMES = 81  # [Wan]


@dataclass
class Config:
    """Train the toy teacher."""

    # folder with vae.safetensors; teacher.safetensors, its log and the resume state go there
    out: str = "out/toy"
    preset: str = "toy"  # a DiT preset
    size: int = 32  # pixels
    clips: int = 6144  # training clips, encoded once
    steps: int = 20000
    batch: int = 16  # clips a step, over all processes
    pictures: int = 64  # single pictures a step beside them
    lr: float = 1e-3  # AdamW, cosine to zero [ours]
    shift: float = 3.0  # of the training noise levels [ours]
    dropout: float = 0.1  # share of prompts replaced by the empty one
    ema: float = 0.999
    guidance: float = 2.0  # of the samples at the end
    seed: int = 0
    save_every: int = 500
    dtype: str = "bfloat16"  # of computation; weights, sums and norms stay float32
    device: str = "auto"


def teacher_loss(
    dit: DiT, x0: Tensor, prompts: Tensor, u: Tensor, noise: Tensor, shift: float
) -> Tensor:
    """Flow matching, per clip: x0, noise [B, T, C, h, w], u [B] in [0, 1] before the shift ->
    [B]."""
    sigma = shift_sigma(u, shift).view(-1, 1, 1, 1, 1)
    t = (1000 * sigma).view(-1, 1).expand(x0.shape[:2])
    v = dit(
        (1 - sigma) * x0 + sigma * noise, t, prompts, torch.arange(x0.shape[1], device=x0.device)
    )
    return (v - (noise - x0)).square().flatten(1).mean(1)


@torch.no_grad()
def report(dit: DiT, vae: VAE, config: Config, sheet: Path, n: int = 64) -> dict[str, float]:
    """Sample n held-out captions, write a sheet of eight, read the captions back."""
    device = dit.patch_embedding.weight.device
    captions = [world.caption(text.HELD_OUT + i) for i in range(n)]
    side = config.size // vae.config.space
    noise = torch.stack(
        [
            torch.randn(
                21, dit.config.in_dim, side, side, generator=generator(config.seed, Stream.SHEET, i)
            )
            for i in range(n)
        ]
    )
    prompts = text.embed(captions, dit.config.text_dim, dit.config.text_len)
    plan, parts = forward(21, 21), []
    for p, x in zip(prompts.to(device).split(16), noise.to(device).split(16)):
        negative = torch.zeros_like(p[:1])
        made = teacher_blocks(dit, plan, [p], negative, noise_from(x), config.guidance)
        parts.append(gather(plan, made))
    video = torch.cat([vae.decode(z[None]).cpu() for z in torch.cat(parts)])
    write_sheet(sheet, video[:8], columns=11)
    return world.accuracy(video, captions) | {"motion": video.diff(dim=2).abs().mean().item()}


def main(config: Config) -> None:
    rank, world_size, device = start(config.device)
    out, dtype = Path(config.out), dtype_of(config.dtype)
    if config.preset not in PRESETS:
        raise UserError(f"unknown preset {config.preset!r}; use {', '.join(PRESETS)}")
    vae = load_vae(out / "vae.safetensors", device=device)
    latents.encode(
        latents.Config(
            vae=str(out),
            out=str(out / "latents"),
            clips=config.clips,
            frames=FRAMES,
            size=(config.size, config.size),
        ),
        rank,
        world_size,
        device,
    )
    if dist.is_initialized():
        dist.barrier()  # until the other processes' clips are there, too
    torch.manual_seed(config.seed)
    dit = DiT(PRESETS[config.preset]).to(device)
    source, side = (
        text.Prompts("toy", dit.config.text_dim, dit.config.text_len),
        config.size // vae.config.space,
    )
    clips = Clips(
        str(out / "latents"), (vae.config.latents(FRAMES), side, side), vae.config.z_dim, source
    )
    mix, sizes = prefix_mix(vae.config.latents(FRAMES)), (config.batch, config.pictures)
    optimiser = torch.optim.AdamW(
        dit.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    ema = EMA(dit, config.ema)
    for step, row in training_steps(
        config, "teacher", {"dit": (dit, optimiser)}, device, {"ema": ema}, prefix="teacher."
    ):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, config.steps, config.lr)
        plans = mix[
            draw(mix, torch.rand(1, generator=generator(config.seed, Stream.PLANS, step)).item())
        ][1]
        for d, (plan, size) in enumerate(zip(plans, sizes)):
            g = generator(config.seed, Stream.TEACHER, step, d)
            pick = torch.randint(config.clips, (size,), generator=g)
            told = torch.rand(size, 1, 1, generator=g) >= config.dropout
            u, noise = (
                torch.rand(size, generator=g),
                torch.randn(size, plan.length, *clips[0].shape[1:], generator=g),
            )
            mine = slice(rank, None, world_size)
            x0 = torch.stack([clips[i][: plan.length] for i in pick[mine].tolist()]).to(device)
            prompts = (source(pick[mine].tolist()) * told[mine]).to(device)
            with computing(dtype, device):
                losses = teacher_loss(
                    dit, x0, prompts, u[mine].to(device), noise[mine].to(device), config.shift
                )
            losses.mean().backward()
            if step % 20 == 0:
                row |= mean_over_processes({plan.name: losses.mean().item()}, device)
        sync_gradients(dit, "ddp")
        norm = clip_gradients(dit, 1.0, f"step {step}")
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
        print(
            f"wrote {out / 'teacher.safetensors'}; 64 held-out captions: "
            + ", ".join(f"{k} {v:.3f}" for k, v in scores.items())
        )


if __name__ == "__main__":
    run(main, Config)
