"""What runs a teacher, as rows of the table: any teacher, the shipped one or one trained here.

A teacher takes 48 steps with guidance, at once or a block at a time; these rows are not among the
table's own, because its weights are a student's. So name them, and a teacher's file with a VAE
beside it:

    python -m zoo.table --weights toy/weights/teacher.safetensors --methods at_once staggered-2

at_once is the plain ODE; staggered and stitched are of those files. completed holds three latents
at each end of what at_once made, and makes the rest again (zoo/vector_time.py). ar-forward and
ar-backward go a block at a time, for what zoo/ar_teacher.py and zoo/resampling.py train.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from anchors import Plan, backward, inbetween, long
from dit import DiT
from lib.noise import Noise
from sampler import gather, teacher_blocks
from zoo import staggered, stitching, vector_time
from zoo.common import Method, forward_plan

GUIDANCE = 3.0  # [paper, for pairs]
Make = Callable[..., Tensor]  # (teacher, length, prompt, negative, noise, guidance) -> latents


def alone(make: Make) -> Callable[..., Tensor]:
    """What asks a teacher for a whole video, called as `sampler.generate` is."""

    def generate(dit: DiT, plan: Plan, texts: list[Tensor], noise: Noise, recipe=None) -> Tensor:
        negative = torch.zeros_like(texts[0][:1])  # the toy world's empty prompt
        return make(dit, plan.length, texts[0], negative, noise, GUIDANCE)

    return generate


def in_blocks(dit: DiT, plan: Plan, texts: list[Tensor], noise: Noise, recipe=None) -> Tensor:
    """An autoregressive teacher, 48 steps a block; texts: [B, L, text_dim] a prompt of the plan."""
    negative = torch.zeros_like(texts[0][:1])
    return gather(plan, list(teacher_blocks(dit, plan, texts, negative, noise, GUIDANCE)))


def completed(
    dit: DiT, length: int, prompt: Tensor, negative: Tensor, noise: Noise, guidance: float
) -> Tensor:
    """A clip [B, length, C, h, w] of which all but three latents at each end are made anew, from
    other noise."""
    whole = staggered.generate(dit, length, prompt, negative, noise, guidance, lag=0)
    known = {i: whole[:, i] for i in (*range(3), *range(length - 3, length))}
    other: Noise = lambda level, numbers: noise(level + 1, numbers)  # noqa: E731
    return vector_time.complete(dit, known, length, prompt, negative, other, guidance)


def in_parts(length: int, block: int, anchors: int) -> Plan:
    """As stitching cuts a video, to be measured where its parts meet."""
    part = stitching.PART
    return long(length, "forward", part, window=part, sink="none")


PLAIN = alone(partial(staggered.generate, lag=0))
METHODS = {
    "at_once": Method(forward_plan, PLAIN, against=""),
    "staggered-2": Method(forward_plan, alone(partial(staggered.generate, lag=2)), "at_once"),
    "staggered-12": Method(forward_plan, alone(partial(staggered.generate, lag=12)), "at_once"),
    "completed": Method(inbetween, alone(completed), against=""),
    "long-at_once": Method(in_parts, PLAIN, against="", length=42),
    "stitched": Method(in_parts, alone(stitching.generate), "long-at_once", length=42),
    "stitched-omni": Method(
        in_parts, alone(partial(stitching.generate, omni=1.0)), "long-at_once", length=42
    ),
    "ar-forward": Method(forward_plan, in_blocks, against=""),
    "ar-backward": Method(backward, in_blocks, against=""),
}
