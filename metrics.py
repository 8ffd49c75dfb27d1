"""Measures on videos and latents; the plan says where to look.

Flickering ratio (paper Eq. 4): how much the picture changes where one latent's frames end and the next one's begin, over
the change just before, inside the latent. Latent i decodes to frames 4i-3 .. 4i, so for the boundary between i and i+1

    FR_i = |x[4i+1] - x[4i]| / |x[4i] - x[4i-1]|           about 1 in natural video; 1.4 is a visible flash

The plan says which boundaries lie between two steps (*inter*-block) and which inside one (*intra*). Print motion beside
it: a blurred, slow video has a beautiful FR.

Latent round trip (ours, not the paper's): decode, encode again; the squared change of the first latent of each block over
that of the others. A latent that does not fit its past does not come back. About 1 for real latents and the teacher's.

    python -c "import media, metrics; print(metrics.flickering_ratio(media.read_frames('clip.mp4')))"
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anchors import Plan
from lib.common import UserError
from toy import world
from vae import VAE

STATIC = 2e-3  # a frame that changes by less than this, a quarter of a grey level of 255, has no ratio [ours]


def frame_changes(video: Tensor) -> Tensor:
    """Mean |x[f+1] - x[f]| of video [B, 3, F, H, W] in [-1, 1]: float32 [B, F-1], a frame at a time to save memory."""
    frames = video.unbind(2)
    return torch.stack(
        [(b.float() - a.float()).abs().mean((1, 2, 3)) for a, b in zip(frames, frames[1:])], dim=1
    )


def flickering_ratio(video: Tensor, time: int = 4) -> Tensor:
    """FR_i of the boundaries between latents i and i+1, i = 1 .. T-2: [B, T-2]; NaN where the denominator vanishes.

    raises: UserError if the frames are not 1 + time * k, or fewer than three latents."""
    frames = video.shape[2]
    if (frames - 1) % time or frames < 1 + 2 * time:
        raise UserError(
            f"the flickering ratio needs 1 + {time}k frames and at least {1 + 2 * time}, not {frames}; "
            f"cut the video to {max((frames - 1) // time, 2) * time + 1}"
        )
    change = frame_changes(video)
    after, before = change[:, time::time], change[:, time - 1 : -1 : time]
    return torch.where(before > STATIC, after / before, torch.nan)


def temporal_flickering(video: Tensor) -> Tensor:
    """VBench's score of video [B, 3, F, H, W]: 1 - mean change from frame to frame in 8-bit grey levels over 255: [B]."""
    eight = ((video.float().clamp(-1, 1) + 1) * 127.5).round()
    return 1 - frame_changes(eight).mean(1) / 255


def end_flickering(video: Tensor, given: Tensor, tail: bool = False) -> Tensor:
    """1 - mean |difference| (of 0..1) between the first or last frames of video and the given ones: [B] (paper A.2, Table 4)."""
    n = given.shape[2]
    return (
        1 - (video[:, :, -n:] if tail else video[:, :, :n]).sub(given).abs().mean((1, 2, 3, 4)) / 2
    )


def seam(video: Tensor, frame: int) -> dict[str, Tensor]:
    """How a cut just before `frame` shows, each [B]. colour offset: largest change of a channel's mean, in grey levels of 255;
    jump: change of the picture over the mean of the changes before and after; sharpness: mean gradient after over before.

    raises: UserError unless two frames lie on either side."""
    if not 2 <= frame <= video.shape[2] - 2:
        raise UserError(
            f"a seam before frame {frame} needs two frames on either side, but the video has {video.shape[2]}"
        )
    four = video[:, :, frame - 2 : frame + 2].float()
    change, mean = frame_changes(four), four.mean((3, 4))
    gradient = four.diff(dim=3).abs().mean((1, 3, 4)) + four.diff(dim=4).abs().mean((1, 3, 4))
    return {
        "colour offset": (mean[:, :, 2] - mean[:, :, 1]).abs().amax(1) * 127.5,
        "jump": change[:, 1] / (0.5 * (change[:, 0] + change[:, 2])).clamp_min(STATIC),
        "sharpness": gradient[:, 2] / gradient[:, 1].clamp_min(1e-6),
    }


def drift(video: Tensor, piece: int = 81) -> dict[str, Tensor]:
    """What changes over a long video, each [B, pieces], pieces of so many frames: colour offset from the first piece
    (grey levels of 255), and contrast, sharpness and motion over those of the first piece."""
    parts = [p.float() for p in video.split(piece, dim=2) if p.shape[2] > piece // 2]
    colour = torch.stack([p.mean((2, 3, 4)) for p in parts], 1)  # (B, pieces, 3)
    spread = {
        "contrast": [p.std((3, 4)).mean((1, 2)) for p in parts],
        "sharpness": [p.diff(dim=4).abs().mean((1, 2, 3, 4)) for p in parts],
        "motion": [frame_changes(p).mean(1) for p in parts],
    }
    ratios = {k: torch.stack(v, 1) / v[0][:, None].clamp_min(1e-6) for k, v in spread.items()}
    return {"colour offset": (colour - colour[:, :1]).abs().amax(2) * 127.5} | ratios


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features [N, D] and [M, D]: |mu_a - mu_b|^2 + tr(A + B - 2 sqrt(A B)).

    In float64; sqrt(A B) through the symmetric square root of A. raises: UserError for fewer than two rows or unequal D."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(
            f"features {tuple(a.shape)} and {tuple(b.shape)} must be [N, D] and [M, D] with at least two rows each"
        )
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    A, B = A.view(a.shape[1], -1), B.view(a.shape[1], -1)  # D = 1 gives a scalar
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


@torch.no_grad()
def features(video: Tensor, network: VAE | torch.nn.Module) -> Tensor:
    """One row a clip [B, D]: of a user's TorchScript network such as I3D, called with [1, 3, F, H, W] in [-1, 1]; or, with
    the VAE, the mean and the spread of each latent channel and of its change from latent to latent (ours)."""
    if not isinstance(network, VAE):
        return torch.cat([network(v[None]).float().flatten(1) for v in video])
    z = torch.cat([network.encode(v[None]) for v in video])
    parts = [
        y.mean((1, 3, 4)) if mean else y.std((1, 3, 4))
        for y, mean in ((z, True), (z, False), (z.diff(dim=1), False))
    ]
    return torch.cat(parts, dim=1)


def round_trip(vae: VAE, z: Tensor, plan: Plan) -> Tensor:
    """Change of the first latent of each block over that of the others when z [B, T, C, h, w] is decoded and encoded: [B].

    Latent 0, an image, counts on neither side."""
    back = torch.cat([vae.encode(vae.decode(x[None])) for x in z])
    change, first = (back - z).square().mean((2, 3, 4))[:, 1:], torch.tensor(plan.boundaries())
    return change[:, first].mean(1) / change[:, ~first].mean(1)


@dataclass(frozen=True)
class Stat:
    """Mean and median over all values, standard error over clips; dropped: values that could not be measured."""

    mean: float
    se: float
    median: float
    clips: int
    dropped: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.se:.3f}" if self.se == self.se else "")


def stat(values: Tensor) -> Stat:
    """values: [clips] or [clips, k], NaN where there is none. raises: UserError if there is none at all."""
    values = values.float().reshape(len(values), -1)
    good, per_clip = values[~values.isnan()], values.nanmean(1)
    per_clip = per_clip[~per_clip.isnan()]
    if not len(good):
        raise UserError(
            "nothing to measure: the video does not move, so no flickering ratio exists"
        )
    se = per_clip.std().item() / len(per_clip) ** 0.5 if len(per_clip) > 1 else float("nan")
    return Stat(
        good.mean().item(), se, good.median().item(), len(per_clip), values.numel() - len(good)
    )


def measure(video: Tensor, plan: Plan, captions: Sequence[str] | None = None) -> dict[str, Stat]:
    """All that pixels [B, 3, F, H, W] tell about clips made by a plan: FR, motion and, in the toy world, caption accuracy."""
    ratio, inter = flickering_ratio(video), torch.tensor(plan.boundaries()[1:])
    if ratio.shape[1] != len(inter):
        raise UserError(
            f"a video of {video.shape[2]} frames does not fit the plan {plan.name!r} of {plan.length} latents"
        )
    table = {
        "FR inter": stat(ratio[:, inter]),
        "FR intra": stat(ratio[:, ~inter]),
        "motion": stat(frame_changes(video)),
    }
    if captions is not None:
        right = [
            [seen[k] == said[k] for k in seen]
            for seen, said in zip(world.measure(video), map(world.parse, captions))
        ]
        words = torch.tensor(right).float()  # colour, shape, direction, ground
        table |= {
            name: stat(words[:, n])
            for n, name in enumerate(("colour", "shape", "direction", "ground"))
        }
        table["caption"] = stat(words[:, :3].prod(1))
    return table
