"""What is wrong with a video, with latents or with a plan, and what would do instead."""

from collections.abc import Sequence

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


def frame_size(size: tuple[int, ...], dit, vae) -> tuple[int, int]:
    """Height and width of frames: --size, or what suits the VAE. raises: UserError if they, or the
    two models, do not fit"""
    size = size or ((480, 832) if vae.config.dim == 96 else (32, 32))
    unit = [vae.config.space * p for p in dit.config.patch_size[1:]]
    if len(size) != 2 or min(size) < 1 or size[0] % unit[0] or size[1] % unit[1]:
        shown, sides = " ".join(map(str, size)), "a height and a width divisible by"
        raise UserError(f"--size {shown} must be {sides} {unit[0]} and {unit[1]}")
    made, read = vae.config.z_dim, dit.config.in_dim
    if made != read:
        raise UserError(
            f"the VAE makes {made} channels but the transformer reads {read}; use a matching pair"
        )
    return size


def check_transformer(config) -> None:
    """raises: UserError for patches or heads that a transformer cannot have"""
    if len(config.patch_size) != 3 or config.patch_size[0] != 1:
        raise UserError(f"patch_size {config.patch_size} must be (1, height, width)")
    if config.dim % config.num_heads or config.head_dim % 2 or config.head_dim < 6:
        sizes = f"dim {config.dim} / num_heads {config.num_heads}"
        raise UserError(f"{sizes} must be an even whole number of at least 6")


def check_vae(config) -> None:
    """raises: UserError for numbers of stages or of channels that contradict each other"""
    if len(config.temporal_downsample) != len(config.dim_mult) - 1:
        short = f"temporal_downsample {config.temporal_downsample}"
        raise UserError(f"{short} needs one entry less than dim_mult {config.dim_mult}")
    mean, std = config.mean, config.std
    if not len(mean) == len(std) == config.z_dim:
        raise UserError(f"mean {mean} and std {std} must have z_dim {config.z_dim} numbers each")


def check_text(text: Tensor, most: int, width: int) -> None:
    """Embeddings are [B, L, width], of at most so many words. raises: UserError"""
    if text.ndim != 3 or text.shape[1] > most or text.shape[2] != width:
        want = f"[B, <= {most}, {width}]"
        raise UserError(f"text embeddings of shape {tuple(text.shape)} are not {want}")


def check_noisy(z: Tensor, t: Tensor, pos: Tensor, config) -> None:
    """Latents [B, T, C, h, w] fit a transformer, times t [B, T] and positions [T] fit them.

    raises: UserError"""
    B, T, C, h, w = z.shape
    ph, pw = config.patch_size[1:]
    if C != config.in_dim or h % ph or w % pw:
        raise UserError(
            f"latents of {C} channels and {h}x{w} cells do not fit in_dim {config.in_dim}"
            f" and patches of {ph}x{pw} (the frame's sides: multiples of 16 with an 8x VAE)"
        )
    if t.shape != (B, T) or pos.shape != (T,):
        given = f"t {tuple(t.shape)} and pos {tuple(pos.shape)}"
        raise UserError(f"{given} must be {(B, T)} and {(T,)} for z {tuple(z.shape)}")


def check_ratio_frames(frames: int, time: int) -> None:
    """A flickering ratio needs 1 + time * k frames, of three latents at least. raises: UserError"""
    least = 1 + 2 * time
    if frames < least or (frames - 1) % time:
        whole = max((frames - 1) // time, 2) * time + 1
        raise UserError(
            f"the flickering ratio needs 1 + {time}k frames and at least {least}, not {frames};"
            f" cut the video to {whole}"
        )


def check_levels(levels: Sequence[float]) -> None:
    """raises: UserError for noise levels (of 1000) that a student cannot have"""
    falling = list(levels) == sorted(set(levels), reverse=True)
    if not levels or not falling or levels[0] > 1000 or levels[-1] <= 0:
        shown = " ".join(map(str, levels))
        flags = "--denoising (or --first_denoising)"
        raise UserError(f"{flags} {shown} must fall from at most 1000 and stay above 0")


# ---------------------------------------------------------------- plans
def check_step(step, finished: set[int], horizon: int, where: str) -> None:
    """raises: UserError for a step that cannot be executed after these latents are finished."""
    unread = [i for i, _ in step.reads if i not in finished]
    if unread:
        raise UserError(f"{where} reads latents {unread} before they are finished")
    again = sorted(finished.intersection(step.targets))
    if again:
        raise UserError(f"{where} finishes latents {again} a second time")
    if len(set(step.own)) < len(step.own):
        raise UserError(f"{where} has latents twice in {step.anchors} and {step.targets}")
    if set(step.given) - set(step.own) or (step.commits and step.anchors):
        makes = f"makes {step.targets} with anchors {step.anchors}"
        raise UserError(f"{where} is given {step.given} but {makes}")
    places = [*step.pos, *(p for _, p in step.reads)]
    if len(step.pos) != len(step.own) or len(set(places)) < len(places):
        latents = f"{len(step.own)} latents and {len(step.reads)} reads"
        raise UserError(f"{where} puts {latents} on positions {sorted(places)}")
    span = max(places) - min(places) + 1
    if span > horizon:
        advice = "shorten the window, gap or block"
        raise UserError(f"{where} spans {span} positions, over the horizon of {horizon}: {advice}")


def check_anchors(anchors: int, block: int) -> None:
    """raises: UserError for a number of anchors that the block cannot have"""
    if block < 1 or not 0 <= anchors <= block:
        raise UserError(f"{anchors} anchors do not fit the block {block}; use 0 to {block}")


def check_blocks(length: int, block: int, head: int) -> None:
    """raises: UserError for a length that is not a head and whole blocks"""
    if block < 1 or head < 1:
        raise UserError(f"block {block} and head {head} must be at least 1")
    rest = length - head
    if rest < 0 or rest % block:
        below = length - rest % block if rest > 0 else head
        behind = f" behind a head of {head}" if head != block else ""
        use = f"use {below} or {below + block}"
        raise UserError(f"{length} latents are not whole blocks of {block}{behind}; {use}")


def check_inbetween(length: int, block: int, anchors: int, gap: int) -> None:
    """raises: UserError for latents without a gap between two ends"""
    if block < 1 or gap < 1 or not 0 <= anchors <= gap:
        parts = f"two ends of {block}, a gap between them and {anchors} anchors in it"
        raise UserError(f"{length} latents have no room for {parts}")


def check_loop(length: int, head: int, gap: int) -> None:
    """raises: UserError for latents without a head and a gap"""
    if gap < 1 or length - gap < head:
        parts = f"a first block of {head} and a gap of at least 1, got {gap}"
        raise UserError(f"a loop of {length} latents needs room for {parts}")


def check_long(direction: str, window: int, sink: str) -> None:
    """raises: UserError for a direction, window or sink that there is not"""
    if sink not in ("past", "future", "both", "none"):
        raise UserError(f"unknown sink {sink!r}; use past, future, both or none")
    if direction not in ("forward", "backward"):
        raise UserError(f"unknown direction {direction!r}; use forward or backward")
    if window < 0:
        raise UserError(f"window {window} must be at least 0")
