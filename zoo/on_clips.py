"""Learning from real clips: what an iteration draws of them, and flow matching on it.

Stage 1 as it is in train_ode.py learns from pairs, which a teacher made. Four methods of the zoo
learn from latents of real clips (tools/encode.py): ar_teacher, resampling, vector_time and
consistency. Every latent of a clip may stand at a noise level of its own:

    x = (1 - sigma) x0 + sigma noise             loss = w(sigma) |v(x, sigma) - (noise - x0)|^2

    python -c "import zoo.on_clips; help(zoo.on_clips)"
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit import DiT, Visible
from lib.clips import Clips
from lib.common import Stream, generator
from plans import Mix
from sampler import shift_sigma
from train_ode import Part, Setup


class Drawn(NamedTuple):
    """The samples of a part: clips, and what they are shown with.

    x0, noise: [B, slots, C, h, w];  level: [B, ...] as drawn;  prompt: [B, L, text_dim]"""

    x0: Tensor
    noise: Tensor
    level: Tensor
    prompt: Tensor

    def at(self, sigma: Tensor) -> Tensor:
        """The clips at a noise level for each slot: sigma [B, slots]."""
        sigma = sigma[..., None, None, None]
        return (1 - sigma) * self.x0 + sigma * self.noise


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
    ) -> Drawn:
        """Any clips, each with noise and levels of its own, and its prompt or the empty one.

        latent: which one of the clip each slot shows"""
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
        return Drawn(*(x.to(self.device) for x in drawn))


def timestep_weight(sigma: Tensor, shift: float) -> Tensor:
    """exp(-2 (sigma - 1/2)^2), lowered to vanish at sigma 1 and scaled to mean 1 over the 1000
    shifted levels; with shift 5: 0.03 at the smallest, 2.08 at 1/2 [Wan's; Causal Forcing]."""
    table = shift_sigma(torch.arange(1, 1001, dtype=torch.float64) / 1000, shift)
    height = (-2 * (table - 0.5).square()).exp()
    weight = (-2 * (sigma.double() - 0.5).square()).exp() - height.min()
    return (weight.clamp_min(0) / (height - height.min()).mean()).float()


def flow_error(
    dit: DiT,
    clips: Drawn,
    sigma: Tensor,
    pos: Sequence[int],
    shift: float,
    visible: Visible | None = None,
) -> Tensor:
    """The weighted error of flow matching at every slot: [B, slots, C, h, w].

    sigma: [B, slots];  shift: of all levels that are trained, for the mean of the weights"""
    places = torch.tensor(pos, device=sigma.device)
    v = dit(clips.at(sigma), 1000 * sigma, clips.prompt, places, visible)
    weight = timestep_weight(sigma, shift)[..., None, None, None]
    return weight * (v - (clips.noise - clips.x0)).square()
