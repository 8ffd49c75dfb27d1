"""Generative View Stitching: a long video at once, each part denoised between its neighbours.

Beyond its length a model can only go on from what it has, and errors and loops are found too late.
Here all parts of the video fall through the noise levels together: at each level every part is
denoised in a window with its left and its right neighbour, as noisy as itself, and only the part in
the middle is written back. If the last part's right neighbour is the first, the video is a loop.

On this backbone a part is 7 latents, so that a window of three is what the teacher was trained on;
the first latent of a window is taken for a picture, so it is well that a neighbour has it. Omni
guidance pushes away from what would be said to strangers: v + g (v - v with both neighbours pure
noise) [our reading], which needs a teacher that knows such inputs (zoo/vector_time.py); 0 does not.
Left open by the abstract: g, and how much noise is added again at each level (none here). Without
a loop the ends have one neighbour.
Here: 42 latents in windows of 21, round trip .90 at once, 1.01 stitched; omni guidance of 1 does
harm (zoo/README.md). One part alone is the plain ODE.

    python -c "from zoo.stitching import neighbours; print(neighbours(4, loop=True))"
"""

import torch
from torch import Tensor

from dit import DiT
from lib.common import UserError
from lib.noise import Noise
from sampler import cfg_velocity, ode_sigmas

PART = 7  # latents [ours]


def neighbours(parts: int, loop: bool) -> list[list[int]]:
    """The parts of every window, its own in the middle where it has two neighbours."""
    windows = []
    for p in range(parts):
        around = [p - 1, p, p + 1]
        windows.append([q % parts for q in around] if loop else [q for q in around if q < parts])
        if not loop:
            windows[-1] = [q for q in windows[-1] if q >= 0]
    return windows


def windowed(
    teacher: DiT, x: Tensor, window: list[int], own: int, ask: tuple, strange: Tensor | None
) -> Tensor:
    """The velocity [B, PART, C, h, w] of part `own` among the parts of a window.

    x: [B, parts, PART, C, h, w];  strange: like x, pure noise in the neighbours' place"""
    sigma, cond_uncond, guidance = ask
    shown = [x[:, q] if q == own or strange is None else strange[:, q] for q in window]
    z = torch.cat(shown, dim=1)  # (B, parts of the window * PART, C, h, w)
    t = torch.full(z.shape[:2], 1000 * sigma, device=z.device).unflatten(1, (len(window), -1))
    if strange is not None:
        others = torch.tensor([q != own for q in window], device=z.device)
        t = t.masked_fill(others.view(1, -1, 1), 1000.0)
    pos = torch.arange(z.shape[1], device=z.device)
    v = cfg_velocity(teacher, z, t.flatten(1), cond_uncond, pos, guidance)
    return v.unflatten(1, (len(window), -1))[:, window.index(own)]


@torch.no_grad()
def generate(
    teacher: DiT,
    length: int,
    prompt: Tensor,
    negative: Tensor,
    noise: Noise,
    guidance: float,
    loop: bool = False,
    omni: float = 0.0,
    part: int = PART,
    steps: int = 48,
    shift: float = 5.0,
) -> Tensor:
    """Latents [B, length, C, h, w]; with loop the last part leads back to the first."""
    parts = length // part
    if length % part or (loop and parts < 3):
        raise UserError(f"{length} latents are not parts of {part}, at least 3 of them for a loop")
    cond_uncond = teacher.text_kv(torch.cat([prompt, negative.expand_as(prompt)]))
    numbers = tuple(range(length))
    x = noise(0, numbers).unflatten(1, (parts, part))  # (B, parts, PART, C, h, w)
    sigmas = ode_sigmas(steps, shift)
    for k, (sigma, below) in enumerate(zip(sigmas, sigmas[1:])):
        strange = noise(k + 1, numbers).unflatten(1, (parts, part)) if omni else None
        flows = []
        for own, window in enumerate(neighbours(parts, loop)):
            ask = (sigma, cond_uncond, guidance)
            v = windowed(teacher, x, window, own, ask, None)
            if omni:
                v = v + omni * (v - windowed(teacher, x, window, own, ask, strange))
            flows.append(v)
        x = x + (below - sigma) * torch.stack(flows, dim=1)
    return x.flatten(1, 2)
