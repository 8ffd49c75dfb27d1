"""What changes from frame to frame: in a whole video, and at a cut. Pixels in, numbers out."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lib.common import UserError

STATIC = 2e-3  # a smaller change, a quarter of a grey level of 255, is none: no ratio to it [ours]


def frame_changes(video: Tensor) -> Tensor:
    """Mean |x[f+1] - x[f]| of video [B, 3, F, H, W] in [-1, 1]: float32 [B, F-1].

    raises: FloatingPointError for pixels that are not numbers, which means would leave out"""
    frames = video.unbind(2)  # a frame at a time, to save memory
    changes = [(b.float() - a.float()).abs().mean((1, 2, 3)) for a, b in zip(frames, frames[1:])]
    if not all(change.isfinite().all() for change in changes):
        raise FloatingPointError(
            "the video holds NaN: check the weights of the student and the VAE"
        )
    return torch.stack(changes, dim=1)


def temporal_flickering(video: Tensor) -> Tensor:
    """VBench's score, [B], of video [B, 3, F, H, W]: 1 - mean change in 8-bit levels over 255."""
    eight_bit = ((video.float().clamp(-1, 1) + 1) * 127.5).round()
    return 1 - frame_changes(eight_bit).mean(1) / 255


def seam(video: Tensor, frame: int) -> dict[str, Tensor]:
    """How a cut just before `frame` shows in video [B, 3, F, H, W]; each value is [B].

    colour offset: largest change of a channel's mean over the cut, in grey levels of 255
    jump: change over the cut, over the mean of the changes just before and just after it
    jump max: largest of the four changes from the cut on (a latent's frames: the toy VAE shows a
        hard cut at the second), over the mean of the changes just before and just after these four
    sharpness: mean gradient after the cut over that before

    raises: UserError unless two frames lie on either side."""
    if not 2 <= frame <= video.shape[2] - 2:
        raise UserError(
            f"a seam before frame {frame} needs two frames on either side, "
            f"but the video has {video.shape[2]}"
        )
    near = video[:, :, frame - 2 : frame + 5].float()  # (B, 3, up to 7, H, W)
    change, mean = frame_changes(near), near.mean((3, 4))
    gradient = near.diff(dim=3).abs().mean((1, 3, 4)) + near.diff(dim=4).abs().mean((1, 3, 4))
    around = 0.5 * (change[:, 0] + change[:, 2])
    around_four = 0.5 * (change[:, 0] + change[:, -1])
    return {
        "colour offset": (mean[:, :, 2] - mean[:, :, 1]).abs().amax(1) * 127.5,
        "jump": change[:, 1] / around.clamp_min(STATIC),
        "jump max": change[:, 1:-1].amax(1) / around_four.clamp_min(STATIC),
        "sharpness": gradient[:, 2] / gradient[:, 1].clamp_min(1e-6),
    }


def frames_of(latents: Iterable[int], time: int = 4) -> list[int]:
    """The frames that latents decode to, in time: frames_of([2, 0]) is [0, 5, 6, 7, 8]."""
    starts = {i: max(time * (i - 1) + 1, 0) for i in sorted(latents)}
    return [frame for i, start in starts.items() for frame in range(start, time * i + 1)]
