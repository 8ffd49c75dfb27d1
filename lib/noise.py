"""The noise that a rollout draws, as a function (level, latents) -> tensor; drawn, or given.

It depends on (seed, prompt, sample, latent, level) and on nothing else: not on the batch, the
device, the number of processes, or the order of generation. A dummy at latent i has the number ~i,
and an anchor of latent i, whose noise is its own, i + IMAGINED.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib.common import Stream, generator

IMAGINED = 1 << 20  # far beyond any latent
Noise = Callable[[int, tuple[int, ...]], Tensor]  # (level, numbers) -> [B, len(numbers), C, h, w]


def noise_from(noise: Tensor, renoise: Tensor | None = None, length: int | None = None) -> Noise:
    """Noise given as tensors: [B, R, C, h, w] to start from, [K-1, B, R, C, h, w] for later.

    Row i belongs to latent i; behind the video's come rows for dummies (~i: length + i), and, if
    anchors have noise of their own, as many rows again, the anchors' (`anchors.Step.noise`)."""
    rows = noise.shape[1]
    length = rows if length is None else length

    def row(number: int) -> int:
        if number < 0:
            return length + ~number
        return number if number < IMAGINED else rows // 2 + number - IMAGINED

    def pick(level: int, numbers: tuple[int, ...]) -> Tensor:
        if level and renoise is None:
            raise ValueError("this rollout needs renoise: it takes more than one denoising step")
        index = torch.tensor([row(i) for i in numbers], device=noise.device)
        return (renoise[level - 1] if level else noise)[:, index]

    return pick


def noise_seeded(
    seeds: Sequence[tuple[int, ...]], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Noise:
    """Noise as a function of numbers: a tuple (seed, prompt, sample) a clip; shape [C, h, w]."""

    def draw(level: int, numbers: tuple[int, ...]) -> Tensor:
        clips = []
        for seed, *which in seeds:
            gs = [generator(seed, Stream.SAMPLE, *which, i, level) for i in numbers]
            clips.append(torch.stack([torch.randn(shape, generator=g) for g in gs]))
        return torch.stack(clips).to(device, non_blocking=True)  # (B, T, C, h, w)

    return draw
