"""Latents of real clips on disk, as tools/encode.py writes them."""

from pathlib import Path

from torch import Tensor

from lib.common import UserError
from lib.text import Prompts
from lib.weights import read_tensors


class Clips:
    """The latents in a folder, memory-mapped: clips[n] is [T, C, h, w] float32, the clip of prompt n.

    raises: UserError if they are not of this size, not of one VAE, or not of these prompts"""

    def __init__(
        self, folder: str, latent: tuple[int, ...], channels: int, source: Prompts
    ) -> None:
        shards, self.where, self.vae = sorted(Path(folder).glob("latents-*.safetensors")), [], ""
        if not shards:
            raise UserError(
                f"{folder} holds no latents; make them with python latents.py --out {folder}"
            )
        for path in shards:
            tensors, made = read_tensors(path)
            if (
                "latents" not in tensors
                or not made
                or {type(made.get(k)) for k in ("vae", "prompt")} != {str}
            ):
                raise UserError(
                    f"{path} holds no latents of clips; delete it and run latents.py again"
                )
            x, want, vae = tensors["latents"], (latent[0], channels, *latent[1:]), made["vae"]
            if tuple(x.shape[1:]) != want:
                raise UserError(
                    f"{path} holds latents of shape {tuple(x.shape[1:])}, but the model and --latent ask for {want}: other "
                    "clips or another VAE"
                )
            self.vae = self.vae or vae
            if vae != self.vae:
                raise UserError(
                    f"{path} was made by another VAE than {shards[0].name}; delete it and run latents.py again"
                )
            if (
                made.get("first") != len(self.where)
                or source.words(len(self.where)) != made["prompt"]
            ):
                raise UserError(
                    f"{path} begins with clip {made.get('first')}, {made['prompt'][:60]!r}, but prompt {len(self.where)} of "
                    f"these is {source.words(len(self.where))[:60]!r}; use --prompts {Path(folder) / 'prompts.txt'}"
                )
            self.where += [(x, i) for i in range(len(x))]

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, number: int) -> Tensor:
        shard, i = self.where[number]
        return shard[i].float()
