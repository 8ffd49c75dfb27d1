"""When do anchors help? If the first latent of a block has the wrong past, which measure sees it?

No model is trained or sampled. True clips are encoded; the first latent of each block is replaced
by what the encoder makes of the same frames after another clip's past, of which the last p latents
are still its own. That is the mistake the paper ascribes to backward generation without anchors, in
its purest form: right content, wrong past, p latents of it right. If PSNR falls while p is small,
latents depend on their past; which of FR and round trip notices tells what can show it.

FR is a jump over the motion before it, so a fast world hides what a slow one shows: --speed 0.25
renders the same clips in slow motion. Another clip's past is a larger mistake than a student makes:
this bounds what can be seen, it does not predict a student.

    python -m toy.causality --clips 16 --speed 1 0.6 0.4 0.25 0.12
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
from evaluate import decoded, encoded, measure, round_trip, summary
from lib import report
from lib.common import run, start
from lib.statistics import Stat
from lib.world import numbers_of
from toy import world
from vae import VAE, load_vae

PASTS = (0, 1, 2, 3)  # how many latents of the past are right


@dataclass
class Config:
    """Measure how the toy VAE's latents depend on their past, and which measure notices."""

    RANGES = {"clips": (2, 10**6), "block": (1, 20), "speed": (0.001, 100)}
    weights: str = "toy/weights"
    clips: int = 16
    block: int = 3
    speed: tuple[float, ...] = (1.0,)  # of the world; a table's rows for each
    out: str = ""  # also write the table as .json
    device: str = "auto"


@torch.no_grad()
def with_wrong_past(vae: VAE, video: Tensor, firsts: list[int], p: int) -> Tensor:
    """Latents [B, T, C, h, w] of video [B, 3, F, H, W], of which `firsts` saw the next clip's past.

    p: how many latents before each are its own all the same"""
    z, other, time = vae.encode(video, chunk=99), video.roll(1, 0), vae.config.time
    for i in firsts:
        own = max((i - p) * time - time + 1, 0)  # first frame of latent i - p
        glued = torch.cat([other[:, :, :own], video[:, :, own : i * time + 1]], dim=2)
        z[:, i] = vae.encode(glued, chunk=99)[:, i]
    return z


def latents_of(vae: VAE, video: Tensor, firsts: list[int], p: int | None) -> Tensor:
    """Latents of all clips, each with the past of the one before it; p None: with its own."""
    if p is None:
        return encoded(vae, video, chunk=99)
    pairs = [torch.stack([video[n], video[n - 1]]) for n in range(len(video))]
    return torch.cat([with_wrong_past(vae, pair, firsts, p)[:1] for pair in pairs])


def psnr(made: Tensor, video: Tensor, latents: list[int]) -> Tensor:
    """In dB, [B], of the frames of these latents: made, video [B, 3, F, H, W] in [-1, 1]."""
    frames = [f for i in latents for f in range(4 * i - 3, 4 * i + 1)]
    error = (made - video)[:, :, frames].square().mean((1, 2, 3, 4))
    return -10 * (error / 4).log10()


@torch.no_grad()
def rows_of(
    config: Config, vae: VAE, device: torch.device
) -> Iterator[tuple[str, dict[str, Stat]]]:
    """Yield name and row for each speed and each length of right past."""
    numbers = numbers_of(config.clips)
    captions = [world.caption(number) for number in numbers]
    plan = anchors.forward(anchors.HORIZON, config.block)
    firsts = [i + 1 for i, inter in enumerate(plan.boundaries()) if inter]
    for speed in config.speed:
        video = world.render(captions, numbers, speed=speed).to(device)
        for p in (None, *PASTS):
            z = latents_of(vae, video, firsts, p)
            made = decoded(vae, z, chunk=99).to(device)
            again = encoded(vae, made)
            found = {"PSNR of those latents": psnr(made, video, firsts)} | measure(made, plan)
            found["round trip"] = round_trip(z, again, plan)
            right = "all of the past is right" if p is None else f"{p} latents of it are"
            yield f"speed {speed:g}, {right}", summary(found)


def main(config: Config) -> None:
    device = start(config.device)[2]
    vae = load_vae(config.weights, device=device)
    total = len(config.speed) * (1 + len(PASTS))
    rows = dict(tqdm(rows_of(config, vae, device), total=total, unit="row"))
    report.show(rows, config.out)


if __name__ == "__main__":
    run(main, Config)
