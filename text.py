"""Prompts become tensors here and nowhere else.

The toy world speaks a fixed vocabulary of a few dozen words (`toy/world.py`). Each word is a fixed random vector plus a
fixed random vector for its place in the sentence: attention has no order of its own, and "red over green" is not
"green over red". Nothing is learned, so every checkpoint of the toy world reads the same language.

    python -c "import text; print(text.embed(['a red disc moves left over a blue wave'], 64, 12).shape)"
"""
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import UserError, generator
from toy.world import VOCABULARY, random_captions

TOY_DIM = 64        # [ours] width of a toy word
HELD_OUT = 1 << 30  # captions and clips of the toy world from this number on are never trained on


def toy_caption(number: int) -> str:
    """The caption with this number; the clip of the same number shows it (`toy/train_vae.py:clips`)."""
    return random_captions(1, generator(number, 11))[0]


class Prompts:
    """A numbered list of prompts with their embeddings, wherever they come from.

    source: "toy" for the endless captions of the toy world, or a UTF-8 text file with a prompt a line."""

    def __init__(self, source: str, text_dim: int, text_len: int) -> None:
        self.text_dim, self.text_len, self.lines = text_dim, text_len, None
        if source != "toy":
            try:
                self.lines = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
            except UnicodeDecodeError:
                raise UserError(f"{source} is not UTF-8 text; save it as UTF-8, a prompt a line") from None
            if not self.lines:
                raise UserError(f"{source} holds no prompts; write one a line")

    def words(self, number: int) -> str:
        return toy_caption(number) if self.lines is None else self.lines[number % len(self.lines)]

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Embeddings [len(numbers), L, text_dim]; number n of a file of m lines is line n mod m."""
        return self.embed([self.words(n) for n in numbers])

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of any prompts, for the same model."""
        return embed(prompts, self.text_dim, self.text_len)


def embed(prompts: Sequence[str], text_dim: int, text_len: int) -> Tensor:
    """Embed prompts for a model with this text_dim and text_len.

    returns: float32 [len(prompts), L, text_dim], zero where a prompt is shorter than L; "" is all zeros (the
    unconditional prompt of the toy world). raises: UserError naming an unknown word, or a prompt that is too long."""
    if text_dim != TOY_DIM:
        raise UserError(f"this model reads embeddings of width {text_dim} (UMT5-XXL has 4096), but only the toy vocabulary "
                        f"(width {TOY_DIM}) is built in")
    table = torch.randn(len(VOCABULARY) + text_len, TOY_DIM, generator=generator(0, 7))
    out = torch.zeros(len(prompts), text_len, TOY_DIM)
    for row, prompt in zip(out, prompts):
        words = prompt.lower().replace(",", " ").replace(".", " ").split()
        unknown = [w for w in words if w not in VOCABULARY]
        if unknown:
            raise UserError(f"the toy world does not know the word {unknown[0]!r} in {prompt[:80]!r}; "
                            f"it knows {' '.join(VOCABULARY)}")
        if len(words) > text_len:
            raise UserError(f"the prompt {prompt[:80]!r} has {len(words)} words; this model reads at most {text_len}")
        for n, word in enumerate(words):
            row[n] = table[VOCABULARY.index(word)] + table[len(VOCABULARY) + n]
    return out
