"""An autoregressive teacher (Causal Forcing, stage 1): flow matching by teacher forcing.

What a student regresses must be a function of what it sees (zoo/causal_ode.py). So first make a
teacher that sees what the student will see, in every order that the student shall know:

    sequence = [clean | noisy]                       one masked pass a plan (`anchors.layout`)
    a noisy block sees the clean latents its step reads, and its own block with its anchors
    one time per step of the plan, independent; loss = w(t) |v - (noise - x0)|^2

On this backbone the data are latents of real clips; it starts from the bidirectional teacher.
Left open by the paper: anchors and dummies get a loss here, as its ODE moves them too [ours].
Here: FR forward 1.14 after 2,000 steps, the bidirectional teacher's is 1.03 (docs/results.md).

    python -m tools.encode && python -m zoo.ar_teacher
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from anchors import Layout
from dit import DiT
from lib import presets
from lib.common import Stream, run
from lib.media import write_sheet
from lib.noise import noise_seeded
from lib.text import HELD_OUT
from lib.training import Training
from sampler import gather, shift_sigma, teacher_blocks
from train_ode import Part, fit, mean_over, mix_of, per_slot, scored_slots
from vae import load_vae
from zoo.on_clips import Drawn, OnClips, flow_error


@dataclass
class Config(Training):
    """Train the autoregressive teacher on latents of real clips."""

    PRESETS = presets.AR_TEACHER
    RANGES = {"share_noise": ("none", "all"), "dropout": (0, 1)}
    FREE = ("lr", "weight_decay", "clip", "dropout")  # what may change when a run goes on
    preset: str = "toy"  # toy, toy64 (64 pixels), wan or wan-framewise: the published numbers
    weights: str = "toy/weights/teacher.safetensors"  # the bidirectional teacher it starts from
    clips: str = "out/latents"  # folder of real clips' latents, made by tools/encode.py
    prompts: str = "toy"  # toy; or the prompts.txt beside the latents (or its embeddings)
    vae: str = "toy/weights/vae.safetensors"  # for the sheet of samples at the end; empty: none
    guidance: float = 3.0  # of these samples
    out: str = "out/ar"  # folder of teacher.safetensors, its sheet, log.jsonl and the resume state
    shift: float = 3.0  # of the training times [ours; Causal Forcing: 5]
    dropout: float = 0.1  # share of prompts replaced by the empty one [Causal Forcing: 0]
    loss_on_anchors: bool = True  # and on dummies: the teacher's ODE moves them, too
    steps: int = 2000  # training iterations [Causal Forcing: 2000 or more]
    schedule_steps: int = 0  # iterations that the rate is planned over, if not --steps
    batch: int = 16  # samples an iteration, over all processes [Causal Forcing: 64]
    lr: float = 5e-4  # AdamW, constant between warm-up and decay [Causal Forcing: 2e-6]
    lr_matrices: float = 0.0  # Muon, of the blocks' matrices, likewise; 0: AdamW for them, too
    warmup: int = 50  # iterations
    decay: float = 0.5  # share of the steps, at the end, while the rate falls to zero
    betas: tuple[float, ...] = (0.9, 0.999)  # [Causal Forcing: 0, 0.999]
    share_noise: str = "none"  # of the sheet's anchors with their latents: none or all


def ar_loss(
    dit: DiT, lay: Layout, clips: Drawn, shift: float, loss_on_anchors: bool = True
) -> Tensor:
    """Weighted flow matching after clean context: [B].

    clips: in the slots of the layout, with a level for each step of the plan [B, steps]"""
    sigma = per_slot(lay, clips.level, 0.0)  # (B, slots)
    error = flow_error(dit, clips, sigma, lay.pos, shift, lay.visible)  # (B, slots, C, h, w)
    return mean_over(error, scored_slots(lay, loss_on_anchors, dummies=loss_on_anchors))


History = Callable[[OnClips, Part, Drawn], Drawn]  # other clips in the clean slots


def clip_loss(setup: OnClips, history: History, part: Part) -> Tensor:
    """The loss [B] of samples: a clip, and a time per step of the plan."""
    config, lay, steps = setup.config, setup.layout(part), len(setup.plan(part).steps)

    def times(g: torch.Generator) -> Tensor:
        return shift_sigma(torch.rand(steps, generator=g), config.shift)

    clips = history(setup, part, setup.draw(part, Stream.AR, lay.latent, times, config.dropout))
    return ar_loss(setup.dit, lay, clips, config.shift, config.loss_on_anchors)


@torch.no_grad()
def sheet(setup: OnClips, count: int = 4) -> None:
    """teacher.png: a few held-out prompts by each plan of the mix's first entry."""
    config, source, device = setup.config, setup.source, setup.device
    prompt = source(range(HELD_OUT, HELD_OUT + count)).to(device)
    negative = source.embed([""]).to(device)
    seeds = [(config.seed, n, 0) for n in range(count)]
    noise = noise_seeded(seeds, (setup.dit.config.in_dim, *config.latent[1:]), device)
    z, share = [], {"share_noise": config.share_noise}
    for plan in setup.mix[0][1]:
        made = teacher_blocks(setup.dit, plan, [prompt], negative, noise, config.guidance, **share)
        z += gather(plan, made)
    if setup.rank == 0:
        vae = load_vae(config.vae, device=device)
        videos = torch.cat([vae.decode(clip[None]) for clip in z])
        write_sheet(f"{config.out}/teacher.png", videos, columns=11)


def main(config: Config, history: History = lambda setup, part, clips: clips) -> None:
    if config.vae:
        load_vae(config.vae)  # a file that cannot be read is named now, not after the training
    setup = OnClips(config, mix_of(config), teacher_forcing=True)
    fit(setup, partial(clip_loss, setup, history), "teacher")
    if config.vae:
        sheet(setup)


if __name__ == "__main__":
    run(main, Config)
