"""Real clips become latents: what an autoregressive teacher learns, and context of its pairs.

    python -m tools.encode --clips 2048                                  # the toy world's
    python -m tools.encode --data my_clips --vae Wan2.1-T2V-1.3B --size 480 832

A folder of yours holds CLIP.mp4 and its prompt in CLIP.txt. What is written: `lib/clips.py`. Run it
again to go on after a stop, or after more clips were added or some edited: what is still right
stays. Several processes (torchrun) share the shards.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lib.clips import describe, is_same, prompt_beside, read_shard
from lib.common import (
    UserError,
    atomic,
    check_out,
    clear_temporaries,
    end_stopped,
    fingerprint,
    run,
    start,
    stop_signals,
)
from lib.media import load_clip, videos_in
from lib.tensors import write_safetensors
from toy import world
from vae import VAE, load_vae


@dataclass
class Config:
    """Encode clips into latents."""

    RANGES = {"clips": (1, 10**6), "frames": (1, 10**5), "size": (1, 16384, 2)}
    data: str = "toy"  # toy: the procedural world; or a folder of videos with prompts beside them
    vae: str = "toy/weights"  # a VAE file or a folder with one
    out: str = "out/latents"
    clips: int = 2048  # how many of the toy world's; a folder is taken whole
    frames: int = 81  # from the start of each video, at 16 frames a second
    size: tuple[int, ...] = (32, 32)  # height width; videos are scaled and cropped to it
    skip_bad: bool = False  # leave out, by name, what cannot be read, is too short, has no prompt
    shard: int = 64  # clips a file
    device: str = "auto"


class Source:
    """Numbered clips and their prompts, of the toy world or of a folder of videos.

    raises: UserError naming a bad clip, unless those are skipped"""

    def __init__(self, config: Config, quiet: bool = False) -> None:
        self.config, self.files, self.prompts, self.name = config, [], [], "files"
        if config.data == "toy":
            if config.size[0] != config.size[1]:
                raise UserError(f"--size {config.size[0]} {config.size[1]}: the toy's are square")
            self.prompts = [world.caption(n) for n in range(config.clips)]
            drawn = world.render([world.caption(n) for n in range(4)], range(4), 32, 5)
            self.name = f"toy {fingerprint({'': drawn})}"  # another one where it draws otherwise
            return
        for video in videos_in(config.data):
            try:
                prompt = prompt_beside(video)
                if config.skip_bad:
                    load_clip(video, config.size, frames=config.frames)
            except UserError as error:
                if not config.skip_bad:
                    raise
                if not quiet:
                    print(f"skipped: {error}")
                continue
            self.files.append(video)
            self.prompts.append(prompt)
        if not self.files:
            raise UserError(f"--data {config.data}: every video was skipped")

    def describe(self, n: int, before: dict | None = None) -> dict:
        """What clip n is; before: an earlier description."""
        if self.files:
            return describe(self.files[n], self.prompts[n], before)
        return {"name": f"toy {n}", "prompt": self.prompts[n]}

    def pixels(self, n: int) -> Tensor:
        """Its frames [1, 3, F, H, W]; what was done to a video of yours is said."""
        size, frames = self.config.size, self.config.frames
        if self.files:
            video, says = load_clip(self.files[n], size, frames=frames)
            tqdm.write(says)
            return video
        return world.render([self.prompts[n]], [n], size[0], frames)


def usable(
    path: Path, settings: dict, source: Source, numbers: range
) -> tuple[list[Tensor], list[dict], bool]:
    """What can stay of a shard: its first latents that are still right, their descriptions, and
    whether that is all of it. raises: UserError if it was made in another way"""
    if not path.exists():
        return [], [], False
    x, made = read_shard(path)
    for key, value in settings.items():
        if made.get(key) != value:
            raise UserError(
                f"{path} was made with another {key} ({made.get(key)}, now {value}); "
                "use another --out, or delete it"
            )
    kept: list[dict] = []
    for n, before in zip(numbers, made["clips"]):
        now = source.describe(n, before)
        if not is_same(now, before):
            print(f"{path.name}: {now['name']} or its prompt is not what it was; made again")
            break
        kept.append(now)
    whole = len(kept) == len(x) == len(numbers) and made.get("first") == numbers[0]
    return list(x[: len(kept), None]), kept, whole


def encode_clip(vae: VAE, source: Source, number: int, device: torch.device | str) -> Tensor:
    """Latents [1, T, C, h, w] in float16. raises: FloatingPointError naming the clip"""
    z = vae.encode(source.pixels(number).to(device)).half().cpu()
    if not z.isfinite().all():
        raise FloatingPointError(
            f"the VAE makes of {source.describe(number)['name']} what is not finite"
        )
    return z


@torch.no_grad()
def encode(
    config: Config, rank: int = 0, processes: int = 1, device: torch.device | str = "cpu"
) -> None:
    """Write what is missing of the shards, then prompts.txt.

    raises: UserError before anything is written where a clip has no prompt"""
    out = check_out(config.out, folder=True)
    source = Source(config, quiet=rank > 0)
    vae, count = load_vae(config.vae, device=device), len(source.prompts)
    settings = {
        "vae": fingerprint(load_vae(config.vae, None).state_dict()),
        "data": source.name,
        "frames": config.frames,
        "size": list(config.size),
    }
    shards = {
        out / f"latents-{a:06d}.safetensors": range(a, min(a + config.shard, count))
        for a in range(0, count, config.shard)
    }
    if others := sorted(set(out.glob("latents-*.safetensors")) - shards.keys()):
        raise UserError(
            f"{others[0]} is not one of {count} clips in shards of {config.shard}; "
            "use another --out, or delete it"
        )
    todo = {}
    for path, numbers in list(shards.items())[rank::processes]:
        z, clips, whole = usable(path, settings, source, numbers)
        if not whole:
            todo[path] = z, clips, numbers
    if rank == 0:
        clear_temporaries(out)
        if todo:
            (out / "prompts.txt").unlink(missing_ok=True)  # written last: where it is, all is
    total = sum(len(numbers) - len(z) for z, _, numbers in todo.values())
    with tqdm(total=total, desc="encode", unit="clip") as bar, stop_signals() as stop:
        for path, (z, clips, numbers) in todo.items():
            for n in numbers[len(z) :]:
                if stop():
                    break
                clips.append(source.describe(n))
                z.append(encode_clip(vae, source, n, device))
                bar.update()
            if z:
                made = settings | {"first": numbers[0], "clips": clips}
                write_safetensors(path, {"latents": torch.cat(z)}, made)
            if stop():
                bar.close()
                print(f"stopped; {out} keeps what is done, run the same command to go on")
                end_stopped(stop())
    if rank == 0:
        with atomic(out / "prompts.txt") as tmp:
            tmp.write_text("".join(f"{prompt}\n" for prompt in source.prompts), encoding="utf-8")
        print(f"{count} clips in {out}; their prompts: {out / 'prompts.txt'}")


def main(config: Config) -> None:
    encode(config, *start(config.device))


if __name__ == "__main__":
    run(main, Config)
