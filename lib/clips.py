"""Real clips on disk: a folder of videos with their prompts, and a folder of their latents.

Videos: CLIP.mp4 (or any other kind) with its prompt in CLIP.txt. Latents, made of them by
tools/encode.py: shards [clips, T, C, h, w] in float16 and, last, prompts.txt, a line a clip.
A shard says how it was made, by which VAE, of which frames, and what each of its clips was: where
one of these is no longer so, it is not taken.

    python -c "import lib.clips; help(lib.clips)"
"""

import hashlib
import json
from pathlib import Path

from torch import Tensor

from lib.common import UserError
from lib.tensors import read_tensors
from lib.text import Prompts


# ---------------------------------------------------------------- videos
def prompt_beside(video: Path) -> str:
    """The prompt in the text file beside a video. raises: UserError naming a video without one"""
    path = video.with_suffix(".txt")
    try:
        prompt = " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        prompt = ""
    if not prompt:
        raise UserError(f"{video} has no prompt; write what it shows into {path.name}, as UTF-8")
    return prompt


def describe(video: Path, prompt: str, before: dict | None = None) -> dict:
    """What a clip is: its name, prompt and content, so that an edited one is known again as such.

    before: an earlier description; the file is only read where its size or time is another"""
    stat = video.stat()
    now = {"name": video.name, "prompt": prompt, "bytes": stat.st_size, "time": stat.st_mtime_ns}
    if before and all(before.get(k) == now[k] for k in ("name", "bytes", "time")):
        return now | {"sha256": before.get("sha256")}
    with open(video, "rb") as file:
        return now | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_same(one: dict, other: dict) -> bool:
    """Whether two descriptions are of the same clip: when it was last written does not matter."""
    return {**one, "time": 0} == {**other, "time": 0}


# ---------------------------------------------------------------- latents
def read_shard(path: Path) -> tuple[Tensor, dict]:
    """Latents [clips, T, C, h, w], memory-mapped, and how they were made. raises: UserError"""
    tensors, made = read_tensors(path)
    x, clips = tensors.get("latents"), (made or {}).get("clips")
    whole = x is not None and x.ndim == 5 and isinstance(clips, list) and len(clips) == len(x)
    if not whole or not all(isinstance(c, dict) and "prompt" in c for c in clips):
        raise UserError(f"{path} holds no latents of clips; delete it and run encode.py again")
    return x, made


class Clips:
    """The latents in a folder, memory-mapped: clips[n] is [T, C, h, w] float32, of prompt n.

    latent: their number, height and width.  made_of: what each clip is, and the VAE, as words
    raises: UserError if they are not of this size, not of one VAE, not of these prompts, not all"""

    def __init__(
        self, folder: str, latent: tuple[int, ...], channels: int, source: Prompts
    ) -> None:
        paths = sorted(Path(folder).glob("latents-*.safetensors"))
        if not paths:
            raise UserError(
                f"{folder} holds no latents; make them with python -m tools.encode --out {folder}"
            )
        self.where: list[tuple[Tensor, int]] = []
        self.vae, self.made_of = "", []
        want = (latent[0], channels, *latent[1:])
        for path in paths:
            x, made = read_shard(path)
            if tuple(x.shape[1:]) != want:
                raise UserError(
                    f"{path} holds latents of shape {tuple(x.shape[1:])}, but the model and "
                    f"--latent ask for {want}: other clips or another VAE"
                )
            self.vae = self.vae or str(made.get("vae"))
            if made.get("vae") != self.vae:
                raise UserError(f"{path} was made by another VAE than {paths[0].name}; delete it")
            self._check_prompts(path, made, source)
            self.where += [(x, i) for i in range(len(x))]
            self.made_of += [json.dumps([self.vae, {**c, "time": 0}]) for c in made["clips"]]
        listed = Path(folder) / "prompts.txt"
        count = listed.read_text(encoding="utf-8").count("\n") if listed.is_file() else "no"
        if count != len(self):
            raise UserError(
                f"{folder} holds {len(self)} clips but {count} lines of prompts.txt: its encoding "
                "was not finished; run the same encode.py again"
            )

    def _check_prompts(self, path: Path, made: dict, source: Prompts) -> None:
        """raises: UserError naming the first clip of a shard that is not that of its prompt"""
        if made.get("first") != len(self):
            raise UserError(
                f"{path} begins with clip {made.get('first')}, but clip {len(self)} comes next: "
                "a shard is missing; run the same encode.py again"
            )
        for n, clip in enumerate(made["clips"], len(self)):
            if clip["prompt"] != source.words(n):
                raise UserError(
                    f"clip {n}, in {path}, shows {clip['prompt'][:60]!r}, but prompt {n} of "
                    f"{source.source} is {source.words(n)[:60]!r}; "
                    f"use --prompts {path.parent / 'prompts.txt'}"
                )

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, number: int) -> Tensor:
        shard, i = self.where[number]
        return shard[i].float()
