"""Real clips become latents: what an autoregressive teacher is trained on, and the context of its pairs.

    python latents.py --clips 2048                                            # the toy world's
    python latents.py --data my_clips --vae Wan2.1-T2V-1.3B --size 480 832    # yours: CLIP.mp4 and its prompt in CLIP.txt

The folder it writes holds shards of latents [clips, T, C, h, w], float16, which say by which VAE they were made, and
prompts.txt, a line a clip: clip n shows prompt n. Shards are whole or absent; run again to go on; processes share them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lib.clips import Clips  # noqa: F401
from lib.common import UserError, atomic, run, start, stop_signals
from lib.media import load_clip
from lib.text import toy_caption
from lib.weights import read_tensors, write_safetensors
from toy import world
from vae import load_vae

VIDEOS = (".mp4", ".gif", ".mov", ".webm", ".mkv", ".avi")


def fingerprint(path: str | Path) -> str:
    """Names a VAE by its weights, whatever file they lie in."""
    digest = hashlib.sha256()
    for name, x in sorted(load_vae(path, None).state_dict().items()):
        digest.update(name.encode() + x.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def listed(folder: str) -> tuple[list[Path], list[str]]:
    """The videos of a folder and their prompts. raises: UserError naming a video without one"""
    files = (
        sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in VIDEOS)
        if Path(folder).is_dir()
        else []
    )
    if not files:
        raise UserError(f"--data {folder} is not a folder with videos ({', '.join(VIDEOS)})")
    prompts = []
    for file in files:
        try:
            prompts.append(" ".join(file.with_suffix(".txt").read_text(encoding="utf-8").split()))
        except (OSError, UnicodeDecodeError):
            prompts.append("")
        if not prompts[-1]:
            raise UserError(
                f"{file} has no prompt; write what it shows into {file.with_suffix('.txt').name}, as UTF-8"
            )
    return files, prompts


@dataclass
class Config:
    """Encode clips into latents."""

    data: str = "toy"  # toy: the procedural world; or a folder of videos, each with its prompt in a .txt beside it
    vae: str = "toy/weights"  # a VAE file or a folder with one
    out: str = "out/latents"
    clips: int = 2048  # how many of the toy world's; a folder is taken whole
    frames: int = 81  # from the start of each video, at 16 frames a second
    size: tuple[int, ...] = (32, 32)  # height width; videos are scaled and cropped to it
    shard: int = 64  # clips a file
    device: str = "auto"


@torch.no_grad()
def encode(
    config: Config, rank: int = 0, processes: int = 1, device: torch.device | str = "cpu"
) -> None:
    """Write the missing shards and prompts.txt. raises: UserError before anything is written where a prompt is missing."""
    files, prompts = (
        listed(config.data)
        if config.data != "toy"
        else ([], [toy_caption(n) for n in range(config.clips)])
    )
    vae, out, made_by = (
        load_vae(config.vae, device=device),
        Path(config.out),
        fingerprint(config.vae),
    )
    shards = {
        out / f"latents-{s:06d}.safetensors": range(s, min(s + config.shard, len(prompts)))
        for s in range(0, len(prompts), config.shard)
    }
    if others := sorted(set(out.glob("latents-*.safetensors")) - shards.keys()):
        raise UserError(
            f"{others[0]} is not one of {len(prompts)} clips in shards of {config.shard}; use another --out"
        )
    todo = [
        (path, numbers)
        for n, (path, numbers) in enumerate(shards.items())
        if n % processes == rank
        and not (path.exists() and len(read_tensors(path)[0]["latents"]) == len(numbers))
    ]
    with (
        tqdm(total=sum(len(numbers) for _, numbers in todo), desc="encode", unit="clip") as bar,
        stop_signals() as stop,
    ):
        for path, numbers in todo:
            parts = []
            for n in numbers:
                if files:
                    video = load_clip(files[n], config.size, frames=config.frames)[0]
                else:
                    video = world.render([prompts[n]], [n], config.size[0], config.frames)
                parts.append(vae.encode(video.to(device)).half().cpu())
                bar.update()
                if stop():
                    return print(
                        f"stopped; {out} keeps its whole shards, run the same command to go on"
                    )
            write_safetensors(
                path,
                {"latents": torch.cat(parts)},
                {"vae": made_by, "first": numbers[0], "prompt": prompts[numbers[0]]},
            )
    if rank == 0:
        with atomic(out / "prompts.txt") as tmp:
            tmp.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        print(f"{len(prompts)} clips in {out}; their prompts: {out / 'prompts.txt'}")


def main(config: Config) -> None:
    encode(config, *start(config.device))


if __name__ == "__main__":
    run(main, Config)
