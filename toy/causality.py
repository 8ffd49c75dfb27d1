"""When do anchors help? Where the first latent of a block has the wrong past, what does each measure see?

No model is trained or sampled. Real clips are encoded; the first latent of each block is replaced by what the encoder
makes of the same frames after *another* clip's past, of which the last p latents are still its own. That is the mistake
the paper ascribes to backward generation without anchors, in its purest form: right content, wrong past, p latents of it
right. If PSNR falls while p is small, latents depend on their past; which of FR and round trip notice tells which of
them can show what anchors are for, with this VAE.

    python -m toy.causality --clips 16
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
from lib import report
from lib.common import UserError, run, start
from lib.text import HELD_OUT
from metrics import flickering_ratio, round_trip, stat
from toy import world
from vae import VAE, load_vae


@dataclass
class Config:
    """Measure how the toy VAE's latents depend on their past, and which measure notices."""

    weights: str = "toy/weights"
    clips: int = 16
    block: int = 3
    device: str = "auto"


@torch.no_grad()
def with_wrong_past(vae: VAE, video: Tensor, firsts: list[int], p: int) -> Tensor:
    """Latents of video [B, 3, F, H, W] whose latents `firsts` were encoded after the next clip's past, but for p latents."""
    z, other, time = vae.encode(video, chunk=99), video.roll(1, 0), vae.config.time
    for i in firsts:
        own = max((i - p) * time - time + 1, 0)  # first frame of latent i - p
        z[:, i] = vae.encode(
            torch.cat([other[:, :, :own], video[:, :, own : i * time + 1]], dim=2), chunk=99
        )[:, i]
    return z


@torch.no_grad()
def main(config: Config) -> None:
    device = start(config.device)[2]
    if config.clips < 2:
        raise UserError(
            f"--clips {config.clips} must be at least 2: each clip lends its past to another"
        )
    vae, numbers = (
        load_vae(config.weights, device=device),
        [HELD_OUT + n for n in range(config.clips)],
    )
    video = world.render([world.caption(n) for n in numbers], numbers).to(device)
    plan = anchors.forward(anchors.HORIZON, config.block)
    inter, rows = torch.tensor(plan.boundaries()), {}
    firsts = [i + 1 for i, b in enumerate(plan.boundaries()) if b]
    for p in tqdm((0, 1, 2, 3, 6)):
        z = torch.cat(
            [
                with_wrong_past(vae, torch.stack([video[n], video[n - 1]]), firsts, p)[:1]
                for n in range(len(video))
            ]
        )
        made = torch.cat([vae.decode(x[None], chunk=99) for x in z])
        shown = torch.cat([(made - video)[:, :, 4 * i - 3 : 4 * i + 1] for i in firsts], 2)
        rows[f"{p} latents of the past are right"] = {
            "PSNR of those latents": stat(-10 * (shown.square().mean((1, 2, 3, 4)) / 4).log10()),
            "FR inter": stat(flickering_ratio(made)[:, inter[1:]]),
            "FR intra": stat(flickering_ratio(made)[:, ~inter[1:]]),
            "round trip": stat(round_trip(vae, z, plan).cpu()),
        }
    print(report.markdown(rows))


if __name__ == "__main__":
    run(main, Config)
