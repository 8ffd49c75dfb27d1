"""An autoregressive teacher (Causal Forcing, stage 1): flow matching by teacher forcing.

A bidirectional teacher's end point depends on the future, which a causal student does not see;
regressing it gives a mean of what might come, and jumps between blocks. So first make a teacher
that sees what the student will see, in every order that the student shall know:

    sequence = [clean | noisy]                       one masked pass a plan (`anchors.layout`)
    a noisy block sees the clean latents its step reads, and its own block with its anchors
    one time per step of the plan, independent; loss = w(t) |v - (noise - x0)|^2

Data are latents of real clips (tools/encode.py); it starts from the bidirectional teacher. Its end
points are what zoo/causal_ode.py regresses and zoo/consistency.py follows.
What the paper leaves open: anchors and dummies get a loss here, as its ODE moves them too [ours].

    python -m tools.encode && python -m zoo.ar_teacher
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from anchors import Layout
from dit import DiT
from lib import presets
from lib.clips import Clips
from lib.common import Stream, generator, run
from lib.media import write_sheet
from lib.text import HELD_OUT
from lib.training import Training
from plans import Mix
from sampler import gather, noise_seeded, shift_sigma, teacher_blocks
from train_ode import Part, Setup, fit, mean_over, mix_of, per_slot, scored_slots
from vae import load_vae


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
    guidance: float = 2.0  # of these samples
    out: str = "out/ar"  # folder of teacher.safetensors, its sheet, log.jsonl and the resume state
    shift: float = 3.0  # of the training times [ours; Causal Forcing: 5]
    dropout: float = 0.1  # share of prompts replaced by the empty one [Causal Forcing: 0]
    loss_on_anchors: bool = True  # and on dummies: the teacher's ODE moves them, too
    steps: int = 2000  # training iterations [Causal Forcing: 2000 or more]
    schedule_steps: int = 0  # iterations that the rate is planned over, if not --steps
    batch: int = 16  # samples an iteration, over all processes [Causal Forcing: 64]
    lr: float = 5e-4  # AdamW, constant between warm-up and decay [Causal Forcing: 2e-6]
    warmup: int = 50  # iterations
    decay: float = 0.5  # share of the steps, at the end, while the rate falls to zero
    betas: tuple[float, ...] = (0.9, 0.999)  # [Causal Forcing: 0, 0.999]
    share_noise: str = "none"  # of the sheet's anchors with their latents: none or all


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


class OnClips(Setup):
    """A network that learns from real clips."""

    def __init__(self, config, mix: Mix, teacher_forcing: bool) -> None:
        super().__init__(config, mix, teacher_forcing)
        self.clips = Clips(config.clips, config.latent, self.dit.config.in_dim, self.source)

    def draw(
        self,
        part: Part,
        stream: Stream,
        latent: Sequence[int],
        draw_level: Callable[[torch.Generator], Tensor],
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clips x0 [B, slots, C, h, w], noise like them, levels as drawn, and the prompts, some of
        them the empty one. latent: which one of the clip each slot shows"""
        numbers, noise, level, is_told = [], [], [], []
        for j in part.samples:
            g = generator(self.config.seed, stream, part.step, j, part.d)
            numbers.append(int(torch.randint(len(self.clips), (1,), generator=g)))
            level.append(draw_level(g))
            noise.append(torch.randn(len(latent), *self.clips[0].shape[1:], generator=g))
            is_told.append(float(torch.rand(1, generator=g)) >= dropout)
        real = [i if i >= 0 else ~i for i in latent]  # a dummy stands at a latent
        x0 = torch.stack([self.clips[n][real] for n in numbers])
        told = torch.tensor(is_told).view(-1, 1, 1)
        prompt = torch.where(told, self.source(numbers), self.source.embed([""]))
        drawn = (x0, torch.stack(noise), torch.stack(level), prompt)
        return tuple(x.to(self.device) for x in drawn)


History = Callable[[OnClips, Part, Tensor, Tensor], Tensor]  # (setup, part, x0, prompt) -> x0


def clip_loss(setup: OnClips, history: History | None, part: Part) -> Tensor:
    """The loss [B] of samples: a clip, and a time per step of the plan."""
    config, lay, steps = setup.config, setup.layout(part), len(setup.plan(part).steps)

    def times(g: torch.Generator) -> Tensor:
        return shift_sigma(torch.rand(steps, generator=g), config.shift)

    x0, noise, sigma, prompt = setup.draw(part, Stream.AR, lay.latent, times, config.dropout)
    if history:
        x0 = history(setup, part, x0, prompt)
    on_anchors = config.loss_on_anchors
    return ar_loss(setup.dit, lay, x0, noise, sigma, prompt, config.shift, on_anchors)


@torch.no_grad()
def sheet(setup: Setup, count: int = 4) -> None:
    """teacher.png: a few held-out prompts by each plan of the mix's first entry."""
    config, source, device = setup.config, setup.source, setup.device
    prompt = source(range(HELD_OUT, HELD_OUT + count)).to(device)
    negative = source.embed([""]).to(device)
    seeds = [(config.seed, n, 0) for n in range(count)]
    noise = noise_seeded(seeds, (setup.dit.config.in_dim, *config.latent[1:]), device)
    dit, how = setup.dit.eval(), {"share_noise": config.share_noise}
    z = []
    for plan in setup.mix[0][1]:
        made = teacher_blocks(dit, plan, [prompt], negative, noise, config.guidance, **how)
        z.append(gather(plan, made))
    if setup.rank == 0:
        vae = load_vae(config.vae, device=device)
        videos = torch.cat([vae.decode(x[None]) for x in torch.cat(z)])
        write_sheet(Path(config.out) / "teacher.png", videos, columns=11)


def main(config: Config, history: History | None = None) -> None:
    """history: what stands in the clean slots instead of the real clips, if anything."""
    mix = mix_of(config)
    if config.vae:
        load_vae(config.vae)  # a file that cannot be read is named now, not after the training
    setup = OnClips(config, mix, teacher_forcing=True)
    fit(setup, partial(clip_loss, setup, history), "teacher")
    if config.vae:
        sheet(setup)


if __name__ == "__main__":
    run(main, Config)
