"""AR-Diffusion's scheduler (also SkyReels-V2, MAGI-1): noise never falls from a latent to the next.

Between denoising a clip at once and latent after latent lies a pipeline: latent i may be ahead of
latent i + 1 by `lag` of K steps, no more. Lag 0 is the whole clip at once, lag K one latent after
the other; a pass moves every latent that may move by one step, so there are K + lag (T - 1).

On this backbone it is an ODE whose latents stand at different levels; it needs a teacher that knows
such inputs (zoo/vector_time.py). Everything is seen by everything: the future is there, only
noisier. A student's version, with a causal cache and four levels, is zoo/rolling_forcing.py.
Left open here: AR-Diffusion draws its training levels so that they never fall (FoPP), vector_time
draws them independently, which contains those; a causal mask in time is the paper's, not ours.
Here: no better than at once, and a teacher that never saw such inputs runs it as well; after
vector_time, lag 12 keeps the ground better (zoo/README.md). A lag of 0 is the plain ODE.

    python -c "from zoo.staggered import schedule; print(schedule(3, 4, 2))"
"""

import torch
from torch import Tensor

from dit import DiT
from lib.common import UserError
from lib.noise import Noise
from sampler import cfg_velocity, ode_sigmas

State = tuple[int, ...]  # the number of steps that each latent has taken


def schedule(latents: int, steps: int, lag: int) -> list[State]:
    """The states from all noise to all clean; 3 latents, 2 steps, lag 1:
    (0, 0, 0), (1, 0, 0), (2, 1, 0), (2, 2, 1), (2, 2, 2)."""
    if latents < 1 or not 0 <= lag <= steps:
        raise UserError(f"a lag of {lag} is not from 0 to the {steps} steps")
    total = steps + lag * (latents - 1)
    return [
        tuple(min(max(now - lag * i, 0), steps) for i in range(latents)) for now in range(total + 1)
    ]


@torch.no_grad()
def generate(
    teacher: DiT,
    length: int,
    prompt: Tensor,
    negative: Tensor,
    noise: Noise,
    guidance: float,
    lag: int,
    steps: int = 48,
    shift: float = 5.0,
) -> Tensor:
    """Latents [B, length, C, h, w] by Euler steps with guidance, each latent at its own level."""
    cond_uncond = teacher.text_kv(torch.cat([prompt, negative.expand_as(prompt)]))
    x = noise(0, tuple(range(length)))
    pos = torch.arange(length, device=x.device)
    levels = torch.tensor(ode_sigmas(steps, shift), device=x.device)
    states = schedule(length, steps, lag)
    for before, after in zip(states, states[1:]):
        sigma, below = levels[torch.tensor(before)], levels[torch.tensor(after)]  # (T,)
        t = (1000 * sigma).expand(x.shape[:2])
        v = cfg_velocity(teacher, x, t, cond_uncond, pos, guidance)
        x = x + (below - sigma).view(1, -1, 1, 1, 1) * v  # zero where nothing moves
    return x
