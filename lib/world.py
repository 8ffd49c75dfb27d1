"""A world of captioned clips, handed in by name: it makes captions and true clips, and reads words
back from pixels.

Nothing above `toy` knows what a clip shows. toy/world.py is such a module; yours may be another,
`--world my.module`.
"""

import importlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lib.changes import frames_of
from lib.common import UserError
from lib.statistics import Values
from lib.text import HELD_OUT, KNOWN, TOY_DIM, WORLDS

FIVE_SECONDS = 21  # latents
OTHER = 1 << 20  # clip n + OTHER is another clip of the caption of clip n


class World(Protocol):
    """What a world's module has."""

    def caption(self, number: int) -> str:
        """The caption of a clip."""

    def render(
        self, captions: Sequence[str], seeds: Sequence[int], size: int, frames: int
    ) -> Tensor:
        """True clips [B, 3, frames, size, size]."""

    def hits(self, video: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Which words show in pixels, bool [B] each: colour, shape, ground ... and `caption`."""

    def identity(self, video: Tensor) -> dict[str, Tensor]:
        """What a clip keeps though no word says it, [B, D] each."""


def find_world(name: str, text_dim: int, prompts: str = "") -> World | None:
    """The module of this name; without a name None where there are prompts instead, else the toy's.

    raises: UserError where neither is named and the model does not read toy words"""
    if not name and prompts:
        return None
    if not name and text_dim != TOY_DIM:
        raise UserError(
            f"this model reads text {text_dim} wide, not the toy's words: give --prompts FILE, or "
            "--world MODULE"
        )
    name = WORLDS.get(name, name) or WORLDS["toy"]
    try:
        world = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--world {name} cannot be imported ({error})") from None
    needed = ("caption", "render", "hits", "identity")
    if missing := [n for n in needed if not hasattr(world, n)]:
        raise UserError(f"--world {name} lacks {', '.join(missing)}; toy/world.py has them all")
    return world


def numbers_of(clips: int, seed: int = 0, known: bool = False) -> list[int]:
    """Numbers of clips to measure: others for each seed; known: of captions that training sees."""
    begin = (KNOWN if known else HELD_OUT) + seed * clips
    return list(range(begin, begin + clips))


def ends(plan) -> tuple[list[int], list[int]]:
    """The latents that were there first, given or made, and last: 5 s each, of less a third."""
    order = plan.order
    count = FIVE_SECONDS if len(order) >= 2 * FIVE_SECONDS else max(len(order) // 3, 1)
    return order[:count], order[-count:]


def measure_words(world: World, video: Tensor, plan, captions: Sequence[str]) -> Values:
    """What a world reads in pixels [B, 3, F, H, W]: words in the 5 s made first, and in frame 0.

    identity: [B, 2, D], as it is in what was made first and in what was made last"""
    order = plan.made
    found = world.hits(video[:, :, frames_of(order[:FIVE_SECONDS])], captions)
    if len(order) > FIVE_SECONDS:
        last = world.hits(video[:, :, frames_of(order[-FIVE_SECONDS:])], captions)
        found["caption, last made"] = last["caption"]
    frame = world.hits(video[:, :, :1], captions)
    found["frame 0: colours"] = frame["colour"] & frame["ground"]
    found["frame 0: shape"] = frame["shape"]
    first, last = (world.identity(video[:, :, frames_of(part)]) for part in ends(plan))
    return found | {f"identity: {k}": torch.stack([first[k], last[k]], 1) for k in first}
