"""Resampling Forcing (also PFVG's Direct Forcing): an autoregressive teacher of degraded histories.

Teacher forcing shows a model perfect pasts, and its own are not. So it makes the history it trains
on: noise each real block up to a level t_s, denoise it after the history made so far, with the
present weights and without gradient, and read that. Little noise keeps the clip and its errors
small, much noise lets it go its own way; what is to be predicted remains the real clip.

On this backbone it is zoo/ar_teacher.py with something else in the clean slots: the clip as a
rollout of the plan remade it, in every order that the student shall know [ours]. One step instead
of a few (--history_levels 1) is Direct Forcing; BAgger's corrections are of the same kind.
Left open by the paper: s of the shift of t_s is only said to be below 1; here 1/2. One t_s for the
samples of a process in an iteration [ours]. No guidance while a history is made.
Here: no difference to clean histories in 21 latents (zoo/README.md).

    python -m tools.encode && python -m zoo.resampling
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anchors import Plan
from dit import DiT
from lib import presets
from lib.common import Stream, UserError, generator, run
from lib.noise import Noise, noise_seeded
from lib.training import inference
from sampler import hold, rollout, shift_sigma, student_sigmas, times
from train_ode import Part
from zoo import ar_teacher
from zoo.common import memory
from zoo.on_clips import Drawn, OnClips


@dataclass
class Config(ar_teacher.Config):
    """Train the autoregressive teacher on histories of its own making."""

    PRESETS = {"toy": {}, "toy64": presets.TOY64}
    preset: str = "toy"  # toy or toy64
    out: str = "out/resampled"  # folder of teacher.safetensors, its sheet, log.jsonl and state
    history_levels: int = 4  # at most so many steps from t_s down; 1: Direct Forcing
    history_shift: float = 0.5  # of t_s, below 1: towards clean [guess]
    begin: int = 500  # iterations of plain teacher forcing before


def drawn_level(g: torch.Generator, shift: float) -> float:
    """t_s in (0, 1): its logit is normal, then it is shifted."""
    return float(shift_sigma(torch.randn(1, generator=g).sigmoid(), shift))


def remade(
    dit: DiT,
    plan: Plan,
    clip: dict[int, Tensor],
    prompt: Tensor,
    noise: Noise,
    down: Sequence[float],
) -> dict[int, Tensor]:
    """The clip, latent -> [B, C, h, w], as these weights make it of its noised self.

    down: levels from t_s to 0"""

    def denoise(n, step, past, clean, held):
        real = torch.stack([clip[i] for i in step.own], dim=1)
        x = (1 - down[0]) * real + down[0] * noise(0, step.own)
        pos = torch.tensor(step.pos, device=x.device)
        for sigma, below in zip(down, down[1:]):
            x = x + (below - sigma) * dit(x, times(x, sigma, held), prompt, pos, past=past)
        return hold(x, clean, held)

    cache, remember = memory(dit, plan, [prompt] * plan.prompts(), noise)
    made = {}
    for n, x0 in rollout(plan, denoise, remember, cache, clip):
        made.update(zip(plan.steps[n].targets, x0.unbind(1)))
    return made


def own_history(setup: OnClips, part: Part, clips: Drawn) -> Drawn:
    """The clips, from --begin on with what the model makes of them in the clean slots."""
    config, lay, x0, step, d = setup.config, setup.layout(part), clips.x0, part.step, part.d
    if step < config.begin:
        return clips
    t_s = drawn_level(generator(config.seed, Stream.AR, step, d, 1 << 31), config.history_shift)
    lower = [s for s in student_sigmas(shift=config.shift) if s < t_s]
    down = [t_s, *lower[: config.history_levels - 1], 0.0]
    clip = dict(zip(lay.latent, x0.unbind(1)))
    seeds = [(config.seed, step, 2 * j + d) for j in part.samples]
    noise = noise_seeded(seeds, tuple(x0.shape[2:]), x0.device)
    with inference():
        made = remade(setup.dit, setup.plan(part), clip, clips.prompt, noise, down)
    slots = [made[i] if c else x for i, c, x in zip(lay.latent, lay.is_clean, x0.unbind(1))]
    return clips._replace(x0=torch.stack(slots, dim=1))


def main(config: Config) -> None:
    if config.history_levels < 1:
        raise UserError(f"--history_levels {config.history_levels} must be at least 1")
    ar_teacher.main(config, own_history)


if __name__ == "__main__":
    run(main, Config)
