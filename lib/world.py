"""A world of captioned clips, handed in by name: it makes captions and true clips, and reads words
back from pixels.

Nothing above `toy` knows what a clip shows. toy/world.py is such a module; yours may be another,
`--world my.module`.
"""

import importlib
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lib.common import UserError

TOY_DIM = 64  # [ours] width of a toy word
OTHER = 1 << 20  # clip n + OTHER is another clip of the caption of clip n


class World(Protocol):
    """What a world's module has."""

    HELD_OUT: int  # clips from this number on are never trained on, nor are their captions
    KNOWN: int  # clips from this number on are new, but of captions that are trained on

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
    name = name or "toy.world"
    try:
        world = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--world {name} cannot be imported ({error})") from None
    needed = ("HELD_OUT", "KNOWN", "caption", "render", "hits", "identity")
    if missing := [n for n in needed if not hasattr(world, n)]:
        raise UserError(f"--world {name} lacks {', '.join(missing)}; toy/world.py has them all")
    return world


def numbers_of(world: World, clips: int, seed: int = 0, known: bool = False) -> list[int]:
    """Numbers of clips to measure: others for each seed; known: of captions that training sees."""
    begin = (world.KNOWN if known else world.HELD_OUT) + seed * clips
    return list(range(begin, begin + clips))
