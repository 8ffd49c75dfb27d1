"""Real clips become latents: what an autoregressive teacher learns, and context of its pairs.

    python -m tools.encode --clips 2048                                  # the toy world's
    python -m tools.encode --data my_clips --vae Wan2.1-T2V-1.3B --size 480 832

A folder of yours holds CLIP.mp4 and its prompt in CLIP.txt. What is written: `lib/clips.py`. Run it
again to go on after a stop, or after more clips were added or some edited: what is still right
stays. Several processes (torchrun) share the shards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lib.clips import describe, is_same, list_videos, prompt_beside, read_shard
from lib.common import (
    UserError,
    atomic,
    check_out,
    clear_temporaries,
    fingerprint,
    run,
    start,
    stop_signals,
)
from lib.media import load_clip
from lib.weights import write_safetensors
from toy import world
from vae import VAE, load_vae


@dataclass
class Config:
    """Encode clips into latents."""

    RANGES = {
        "clips": (1, 1 << 30),
        "frames": (1, 100000),
        "size": (1, 16384, 2),
        "shard": (1, 10**6),
    }
    data: str = "toy"  # toy: the procedural world; or a folder of videos with prompts beside them
    vae: str = "toy/weights"  # a VAE file or a folder with one
    out: str = "out/latents"
    clips: int = 2048  # how many of the toy world's; a folder is taken whole
    frames: int = 81  # from the start of each video, at 16 frames a second
    size: tuple[int, ...] = (32, 32)  # height width; videos are scaled and cropped to it
    skip_bad: bool = False  # leave out, by name, what cannot be read, is too short, has no prompt
    shard: int = 64  # clips a file
    device: str = "auto"


@dataclass
class Source:
    """Numbered clips: what each is, and its pixels [1, 3, F, H, W]."""

    name: str  # what tells it from other sources
    prompts: list[str]
    describe: Callable[[int, dict | None], dict]  # (number, an earlier description)
    pixels: Callable[[int], Tensor]


def toy_source(config: Config) -> Source:
    """The toy world's clips; its name changes with how it draws."""
    prompts = [world.caption(n) for n in range(config.clips)]

    def pixels(n: int) -> Tensor:
        return world.render([prompts[n]], [n], config.size[0], config.frames)

    drawn = world.render([world.caption(n) for n in range(4)], range(4), 32, 5)
    return Source(
        f"toy {fingerprint({'': drawn})}",
        prompts,
        lambda n, before: {"name": f"toy {n}", "prompt": prompts[n]},
        pixels,
    )


def folder_source(config: Config, quiet: bool) -> Source:
    """A folder of videos. raises: UserError naming a bad one, unless those are skipped"""
    files, prompts = [], []
    for video in list_videos(config.data):
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
        files.append(video)
        prompts.append(prompt)
    if not files:
        raise UserError(f"--data {config.data}: every video was skipped")
    return Source(
        "files",
        prompts,
        lambda n, before: describe(files[n], prompts[n], before),
        lambda n: load_clip(files[n], config.size, frames=config.frames)[0],
    )


def usable(
    path: Path, settings: dict, source: Source, numbers: range
) -> tuple[list[Tensor], list[dict], bool]:
    """What can stay of a shard: its first latents that are still right, their descriptions, and
    whether that is the whole file.

    raises: UserError if it was made in another way, by name; edited clips are said"""
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
        name = source.describe(number, None)["name"]
        raise FloatingPointError(f"the VAE makes of {name} what is not finite")
    return z


@torch.no_grad()
def encode(
    config: Config, rank: int = 0, processes: int = 1, device: torch.device | str = "cpu"
) -> None:
    """Write what is missing of the shards, then prompts.txt.

    raises: UserError before anything is written where a clip has no prompt"""
    out = check_out(config.out, folder=True)
    toy = config.data == "toy"
    source = toy_source(config) if toy else folder_source(config, quiet=rank > 0)
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
                clips.append(source.describe(n, None))
                z.append(encode_clip(vae, source, n, device))
                bar.update()
            if z:
                made = settings | {"first": numbers[0], "clips": clips}
                write_safetensors(path, {"latents": torch.cat(z)}, made)
            if stop():
                bar.close()
                print(f"stopped; {out} keeps what is done, run the same command to go on")
                return
    if rank == 0:
        with atomic(out / "prompts.txt") as tmp:
            tmp.write_text("".join(f"{prompt}\n" for prompt in source.prompts), encoding="utf-8")
        print(f"{count} clips in {out}; their prompts: {out / 'prompts.txt'}")


def main(config: Config) -> None:
    encode(config, *start(config.device))


if __name__ == "__main__":
    run(main, Config)
