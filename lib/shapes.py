"""What is wrong with the shape of a video or of latents, and which shape would do."""

import torch
from torch import Tensor

from lib.common import UserError


def check_video(video: Tensor, space: int, time: int, is_start: bool) -> None:
    """A video is [B, 3, F, H, W] of 1 + time * k frames, or later in a stream of time * k, whose
    sides are multiples of `space`. raises: UserError, also for NaN and infinity"""
    if video.ndim != 5 or video.shape[1] != 3:
        shape = tuple(video.shape)
        raise UserError(f"video of shape {shape} is not [B, 3, F, H, W]: 3 colour channels")
    frames, height, width = video.shape[2:]
    least = 1 if is_start else time
    if frames < least or (frames - least) % time:
        below = max(frames - (frames - least) % time, least)
        rule = f"1 + {time}k" if is_start else f"{time}k"
        raise UserError(f"{frames} frames is not {rule}; use {below} or {below + time}")
    if height % space or width % space:
        crop = "x".join(str(max(side // space, 1) * space) for side in (height, width))
        size = f"{height}x{width}"
        raise UserError(f"frame size {size} is not divisible by {space}; make it {crop}")
    if not torch.isfinite(video).all():
        raise UserError("the video holds NaN or infinite pixels; they must be in [-1, 1]")


def check_latents(z: Tensor, channels: int) -> None:
    """Latents are [B, T, C, h, w] of so many channels. raises: UserError"""
    if z.ndim != 5 or z.shape[2] != channels or not z.shape[1]:
        shape = tuple(z.shape)
        raise UserError(f"latents of shape {shape} are not [B, T, {channels}, h, w]")


def check_ratio_frames(frames: int, time: int) -> None:
    """A flickering ratio needs 1 + time * k frames, of three latents at least. raises: UserError"""
    least = 1 + 2 * time
    if frames < least or (frames - 1) % time:
        whole = max((frames - 1) // time, 2) * time + 1
        raise UserError(
            f"the flickering ratio needs 1 + {time}k frames and at least {least}, not {frames};"
            f" cut the video to {whole}"
        )
