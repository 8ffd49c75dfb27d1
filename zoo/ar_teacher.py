"""An autoregressive teacher (Causal Forcing, stage 1): flow matching by teacher forcing.

A bidirectional teacher's end point depends on the future, which a causal student does not see;
regressing it gives a mean of what might come, and jumps between blocks. So first make a teacher
that sees what the student will see, in every order that the student shall know:

    sequence = [clean | noisy]                       one masked pass a plan (`anchors.layout`)
    a noisy block sees the clean latents its step reads, and its own block with its anchors
    one time per step of the plan, independent; loss = w(t) |v - (noise - x0)|^2

Data are latents of real clips (tools/encode.py); it starts from the bidirectional teacher. Its end
points are what zoo/causal_ode.py regresses and zoo/consistency.py follows.
What the paper leaves open: anchors and dummies get a loss here, since its ODE moves them, too
[ours].

    python -m tools.encode && python -m zoo.ar_teacher
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anchors import Layout
from dit import DiT
from lib.clips import Clips
from lib.common import Stream, generator, run, start
from lib.media import write_sheet
from lib.text import HELD_OUT, Prompts
from mixes import Mix
from sampler import gather, noise_seeded, shift_sigma, teacher_blocks
from train_ode import fit, mean_over, mix_of, network, per_slot, prepared_layouts, scored_slots
from vae import load_vae


@dataclass
class Config:
    """Train the autoregressive teacher on latents of real clips."""

    PRESETS = {
        "toy": {},
        "toy64": {"latent": (21, 8, 8)},
        "wan": {  # [Causal Forcing]
            "weights": "Wan2.1-T2V-1.3B",
            "vae": "",
            "prompts": "out/latents/prompts.safetensors",
            "latent": (21, 60, 104),
            "plans": "paper",
            "steps": 2000,
            "batch": 64,
            "micro": 1,
            "lr": 2e-6,
            "warmup": 0,
            "decay": 0.0,
            "betas": (0.0, 0.999),
            "dropout": 0.0,
            "shift": 5.0,
            "parallel": "fsdp",
            "checkpointing": True,
        },
    }
    PRESETS["wan-framewise"] = PRESETS["wan"] | {"block": 1, "anchors": 1}
    preset: str = "toy"  # toy, toy64 (64 pixels), wan or wan-framewise: the published numbers
    weights: str = "toy/weights/teacher.safetensors"  # the bidirectional teacher it starts from
    clips: str = "out/latents"  # folder of real clips' latents, made by tools/encode.py
    prompts: str = "toy"  # toy; or the prompts.txt beside the latents (or its embeddings)
    vae: str = "toy/weights/vae.safetensors"  # for the sheet of samples at the end; empty: none
    guidance: float = 2.0  # of these samples
    out: str = "out/ar"  # folder of teacher.safetensors, its sheet, log.jsonl and the resume state
    latent: tuple[int, ...] = (21, 4, 4)  # latents, height and width of the grid
    plans: str = "any"  # which plans are trained: paper (two, 21 latents), any (mixes.py) [ours]
    shift: float = 3.0  # of the training times [ours; Causal Forcing: 5]
    dropout: float = 0.1  # share of prompts replaced by the empty one [Causal Forcing: 0]
    loss_on_anchors: bool = True  # and on dummies: the teacher's ODE moves them, too
    steps: int = 2000  # training iterations [Causal Forcing: 2000 or more]
    batch: int = 16  # samples an iteration, over all processes [Causal Forcing: 64]
    micro: int = 0  # samples a forward pass, the rest is accumulated; 0: all of a process's share
    lr: float = 5e-4  # AdamW, constant between warm-up and decay [Causal Forcing: 2e-6]
    warmup: int = 50  # iterations
    decay: float = 0.5  # share of the steps, at the end, while the rate falls to zero
    betas: tuple[float, ...] = (0.9, 0.999)  # [Causal Forcing: 0, 0.999]
    weight_decay: float = 0.01  # [Causal Forcing]
    clip: float = 10.0  # gradient norm
    block: int = 3  # B: latents a step
    anchors: int = 3  # P: anchors before each backward block; 0 uses the dummy block
    head: int = 0  # size of the block of latent 0 if not --block
    share_noise: str = "none"  # of the sheet's anchors with their latents: none or all
    seed: int = 0
    save_every: int = 200  # iterations between resume states
    parallel: str = "ddp"  # ddp, or fsdp: shard the model
    checkpointing: bool = False  # recompute activations in the backward pass
    compile: bool = False  # torch.compile the blocks: faster steps, after minutes
    dtype: str = "bfloat16"  # of computation; trained weights, optimiser and sums are float32
    device: str = "auto"


def timestep_weight(sigma: Tensor, shift: float) -> Tensor:
    """exp(-2 (sigma - 1/2)^2), lowered to vanish at sigma 1 and scaled to mean 1 over the 1000
    shifted levels; with shift 5: 0.03 at the smallest, 2.08 at 1/2 [Wan's; Causal Forcing]."""
    table = shift_sigma(torch.arange(1, 1001, dtype=torch.float64) / 1000, shift)
    height = (-2 * (table - 0.5).square()).exp()
    weight = (-2 * (sigma.double() - 0.5).square()).exp() - height.min()
    return (weight.clamp_min(0) / (height - height.min()).mean()).float()


def ar_loss(
    dit: DiT,
    lay: Layout,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    prompt: Tensor,
    shift: float,
    loss_on_anchors: bool = True,
) -> Tensor:
    """Weighted flow matching after clean context.

    x0, noise: [B, slots, C, h, w];  sigma: [B, steps of the plan].  returns: [B]"""
    at = per_slot(lay, sigma, 0.0)  # (B, slots)
    mix = at[..., None, None, None]
    x = (1 - mix) * x0 + mix * noise
    v = dit(x, 1000 * at, prompt, torch.tensor(lay.pos, device=x.device), lay.visible)
    weight = timestep_weight(at, shift)[..., None, None, None]
    error = weight * (v - (noise - x0)).square()
    return mean_over(error, scored_slots(lay, loss_on_anchors, dummies=loss_on_anchors))


def clip_at_slots(clips: Clips, numbers: list[int], lay: Layout) -> Tensor:
    """The latents of real clips at every slot of a layout: [B, slots, C, h, w]."""
    latent = [i if i >= 0 else ~i for i in lay.latent]
    return torch.stack([clips[n][latent] for n in numbers])


@torch.no_grad()
def sheet(config: Config, mix: Mix, dit: DiT, source: Prompts, rank: int, count: int = 4) -> None:
    """teacher.png: a few held-out prompts by each plan of the mix's first entry."""
    _, h, w = config.latent
    device = dit.patch_embedding.weight.device
    prompt = source(range(HELD_OUT, HELD_OUT + count)).to(device)
    negative = source.embed([""]).to(device)
    seeds = [(config.seed, n, 0) for n in range(count)]
    noise = noise_seeded(seeds, (dit.config.in_dim, h, w), device)
    z = []
    for plan in mix[0][1]:
        made = teacher_blocks(
            dit.eval(),
            plan,
            [prompt],
            negative,
            noise,
            config.guidance,
            share_noise=config.share_noise,
        )
        z.append(gather(plan, made))
    if rank == 0:
        vae = load_vae(config.vae, device=device)
        videos = torch.cat([vae.decode(x[None]) for x in torch.cat(z)])
        write_sheet(Path(config.out) / "teacher.png", videos, columns=11)


def main(config: Config) -> None:
    rank, world, device = start(config.device)
    mix = mix_of(config)
    dit = network(config, config.weights, device, trained=True)
    c = dit.config
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    clips = Clips(config.clips, config.latent, c.in_dim, source)
    nothing = source.embed([""])
    layouts = prepared_layouts(config, mix, dit, True, device)

    def loss_of(step: int, samples: list[int], entry: int, d: int) -> Tensor:
        """Sample j of an iteration: a clip, its noise in each slot, and a time per step."""
        lay, numbers, sigma, noise, told = layouts(entry)[d], [], [], [], []
        for j in samples:
            g = generator(config.seed, Stream.AR, step, j, d)
            numbers.append(int(torch.randint(len(clips), (1,), generator=g)))
            u = torch.rand(len(mix[entry][1][d].steps), generator=g)
            sigma.append(shift_sigma(u, config.shift))
            noise.append(torch.randn(len(lay.latent), *clips[0].shape[1:], generator=g))
            told.append(float(torch.rand(1, generator=g)) >= config.dropout)
        prompt = torch.where(torch.tensor(told).view(-1, 1, 1), source(numbers), nothing)
        x0 = clip_at_slots(clips, numbers, lay).to(device)
        return ar_loss(
            dit,
            lay,
            x0,
            torch.stack(noise).to(device),
            torch.stack(sigma).to(device),
            prompt.to(device),
            config.shift,
            config.loss_on_anchors,
        )

    fit(config, dit, mix, loss_of, rank, world, device, "teacher")
    if config.vae:
        sheet(config, mix, dit, source, rank)


if __name__ == "__main__":
    run(main, Config)
