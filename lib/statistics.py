"""A number and how far to trust it: means with their standard errors, over clips and over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.common import UserError

Values = dict[str, Tensor]  # name -> what is measured of each clip [B, ...], NaN where nothing is


@dataclass(frozen=True)
class Stat:
    """A mean, its standard error over clips, and over training seeds where there are several.

    clips: how many were measured;  dropped: values that could not be"""

    mean: float
    se: float
    clips: int
    dropped: int = 0
    seeds: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        over_clips = "" if math.isnan(self.se) else f" ± {self.se:.3f}"
        over_seeds = "" if math.isnan(self.seeds) else f" (seeds ± {self.seeds:.3f})"
        return f"{self.mean:.3f}{over_clips}{over_seeds}"


def stat(values: Tensor) -> Stat:
    """Mean over all values [B] or [B, ...] that are not NaN, standard error over clips."""
    values = values.float().reshape(len(values), -1)  # (B, k)
    measured = ~values.isnan()
    clips = values.nanmean(1)[measured.any(1)]
    se = clips.std().item() / len(clips) ** 0.5 if len(clips) > 1 else math.nan
    dropped = values.numel() - int(measured.sum())
    return Stat(values[measured].mean().item(), se, len(clips), dropped)


def largest(values: Tensor) -> Stat:
    """Of values [B, n, k], the one of the k columns whose mean is largest."""
    means = values.flatten(0, 1).nanmean(0)  # (k)
    return stat(values[..., means.nan_to_num(-1).argmax()])


def over_runs(runs: Sequence[dict[str, Stat]]) -> dict[str, Stat]:
    """The mean over training seeds, each measured on clips of its own, with both errors."""
    if len(runs) == 1:
        return runs[0]

    def merged(stats: list[Stat]) -> Stat:
        means = torch.tensor([s.mean for s in stats])
        over_clips = math.hypot(*(s.se for s in stats)) / len(stats)
        over_seeds = means.std().item() / len(stats) ** 0.5
        clips, dropped = sum(s.clips for s in stats), sum(s.dropped for s in stats)
        return Stat(means.mean().item(), over_clips, clips, dropped, over_seeds)

    return {name: merged([run[name] for run in runs]) for name in runs[0]}


def over_files(rows: Sequence[dict[str, Stat]]) -> dict[str, Stat]:
    """The mean over files, each of which counts as one clip."""
    return {name: stat(torch.tensor([row[name].mean for row in rows])) for name in rows[0]}


def joined(parts: Sequence[Values]) -> Values:
    """The values of all clips from those of batches."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def features(z: Tensor) -> Tensor:
    """A row a clip for `frechet`: mean and spread of each channel, spread of its change [ours].

    z: [B, T, C, h, w];  returns: [B, 3C]"""
    rest = (1, 3, 4)
    return torch.cat([z.mean(rest), z.std(rest), z.diff(dim=1).std(rest)], dim=1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features a [N, D] and b [M, D].

    |mu_a - mu_b|^2 + tr(A + B - 2 sqrt(A B)), with the covariances A and B; in float64, sqrt(A B)
    through the symmetric square root of A.
    raises: UserError for fewer than two rows or unequal D"""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(
            f"features {tuple(a.shape)} and {tuple(b.shape)} must be [N, D] and [M, D] "
            "with at least two rows each"
        )
    a, b, D = a.double(), b.double(), a.shape[1]
    A, B = a.T.cov().view(D, D), b.T.cov().view(D, D)  # D = 1 gives a scalar
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def lost(pairs: Tensor, others: Tensor) -> Tensor:
    """How far the two ends of each clip are apart, over how far different clips are: [B].

    pairs: [B, 2, D];  others: [N, 2, D], of true clips;  0: all is kept, 1: it is another clip"""
    apart = (others[:, None, 0] - others[None, :, 1]).norm(dim=-1)  # (N, N)
    unit = apart[~torch.eye(len(others), dtype=torch.bool)].nanmean()
    return (pairs[:, 0] - pairs[:, 1]).norm(dim=-1) / unit


def summary(values: Values, true: Values | None = None) -> dict[str, Stat]:
    """A row of a table from what was measured of each clip; true: the same of true clips."""
    row, true = {}, true or {}
    for name, x in values.items():
        if name.startswith("FR"):
            row |= {name: stat(x[..., 0]), f"{name} max": largest(x)}
        elif name != "features" and not name.startswith("identity"):
            row[name] = stat(x)
        elif name in true and name == "features":
            row["Fréchet"] = Stat(frechet(x, true[name]), math.nan, len(x))
        elif name in true:
            row[name.replace("identity", "lost")] = stat(lost(x, true[name]))
    return row
