"""FVDM and Pusa: one time for every latent, so that one model completes anything.

A video model is told how noisy its input is, once for all frames. Tell it for each frame, and train
with all kinds of mixtures: then a frame with time 0 is simply known, wherever it stands, and a
picture, both ends, a beginning or an end are completed by the same weights without being trained
for. MCVD's, RaMViD's and VACE's masks are the case of times that are either 0 or the common one.

On this backbone a latent has a time of its own anyway; what is missing is a teacher that has seen
them differ: the bidirectional one, trained on. FVDM mixes: one time for all in 4 of 5 samples, one
for each in the fifth; Pusa's latents always differ (--together 0). Given latents are then held at
time 0 by `sampler.many_steps` in every step of the ODE.
Left open: FVDM says nothing of a video VAE whose first latent is a picture; here it is one of 21.
Here: beside held ends FR max 1.30 to 1.08, round trip 1.52 to 1.27 (one training seed).

    python -m tools.encode && python -m zoo.vector_time        then zoo.table --methods completed
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from anchors import forward
from dit import DiT
from lib import presets
from lib.common import Stream, run
from lib.noise import Noise
from plans import with_given
from sampler import gather, shift_sigma, teacher_blocks
from train_ode import Part, fit
from zoo import ar_teacher
from zoo.on_clips import Drawn, OnClips, flow_error


@dataclass
class Config(ar_teacher.Config):
    """Train a bidirectional teacher on, with a noise level for each latent."""

    PRESETS = {"toy": {}, "toy64": presets.TOY64}
    preset: str = "toy"  # toy or toy64
    out: str = "out/vector"  # folder of teacher.safetensors, log.jsonl and the resume state
    together: float = 0.8  # share of samples whose latents have one noise level [FVDM; Pusa: 0]
    steps: int = 1500  # training iterations [ours]
    lr: float = 2e-4  # [ours]


def levels(g: torch.Generator, latents: int, together: float, shift: float) -> Tensor:
    """Noise levels [latents] of a sample: one for all, by chance, or one each."""
    each = torch.rand(latents, generator=g)
    alike = torch.rand(1, generator=g) < together
    return shift_sigma(torch.where(alike, each[:1], each), shift)


def vector_loss(dit: DiT, clips: Drawn, shift: float) -> Tensor:
    """Weighted flow matching [B] with a level for each latent: clips.level [B, T]."""
    error = flow_error(dit, clips, clips.level, range(clips.level.shape[1]), shift)
    return error.flatten(1).mean(1)


def complete(
    teacher: DiT,
    known: dict[int, Tensor],
    length: int,
    prompt: Tensor,
    negative: Tensor,
    noise: Noise,
    guidance: float,
) -> Tensor:
    """Latents [B, length, C, h, w] around the known ones, latent -> [B, C, h, w]: no training."""
    plan = with_given(forward(length, length), list(known))
    made = teacher_blocks(teacher, plan, [prompt], negative, noise, guidance, given=known)
    return gather(plan, made)


def clip_loss(setup: OnClips, part: Part) -> Tensor:
    """The loss [B] of samples: a clip, and a level for each of its latents."""
    config, T = setup.config, setup.config.latent[0]

    def draw_levels(g: torch.Generator) -> Tensor:
        return levels(g, T, config.together, config.shift)

    clips = setup.draw(part, Stream.AR, range(T), draw_levels, config.dropout)
    return vector_loss(setup.dit, clips, config.shift)


def main(config: Config) -> None:
    T = config.latent[0]
    setup = OnClips(config, ((1.0, (forward(T, T),)),), teacher_forcing=False)
    fit(setup, partial(clip_loss, setup), "teacher")


if __name__ == "__main__":
    run(main, Config)
