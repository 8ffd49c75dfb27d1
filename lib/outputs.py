"""Where results go: places are looked at before any work; a clip's settings are kept beside it."""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from lib.common import UserError, atomic, check_out


def check_read(read: Iterable[str]) -> None:
    """Whether all that is read is there. raises: UserError"""
    for path in read:
        if not Path(path).expanduser().is_file():
            raise UserError(f"{path} does not exist, or is a folder")


def check_file(
    path: str | Path, flag: str, suffixes: Sequence[str], read: Iterable[str] = ()
) -> Path:
    """A file that can be written and is not one of those read, `~` expanded. raises: UserError"""
    file = check_out(path, flag, inputs=read)
    if file.suffix.lower() not in suffixes:
        raise UserError(f"--{flag} {path} must end in {' or '.join(suffixes)}")
    return file


def check_places(
    read: Sequence[str], out: str, suffixes: Sequence[str], sheet: str = "", preview: str = ""
) -> None:
    """Whether what is made has a place, where nothing of the user's lies. raises: UserError"""
    clip = check_file(out, "out", suffixes, read)
    check_out(sidecar(clip), inputs=read)
    check_out(part(clip), inputs=read)
    if sheet and check_file(sheet, "sheet", (".png",), read).resolve() == clip.resolve():
        raise UserError(f"--sheet {sheet} is also --out; name another file")
    if preview:
        folder = check_out(preview, "preview", folder=True).resolve()
        for path in read:
            if Path(path).expanduser().resolve().parent == folder:
                raise UserError(f"--preview {preview} holds {path}; name another folder")


def part(clip: Path) -> Path:
    """clip.mp4 -> clip.part.mp4: what was done when a run was stopped."""
    return clip.with_suffix(f".part{clip.suffix}")


def sidecar(clip: Path) -> Path:
    """clip.mp4 -> clip.mp4.json"""
    return clip.with_name(clip.name + ".json")


def digest(path: str | Path) -> str:
    """The first 16 digits of a file's SHA-256, or of those of all weights in a folder."""
    path = Path(path).expanduser()
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    kinds = (".safetensors", ".pt", ".pth", ".bin")
    parts = [digest(p) for p in sorted(path.iterdir()) if p.suffix in kinds]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


NO_MATTER = ("prompts", "out", "sheet", "preview", "device", "compile", "seed", "weights")


def describe(
    config,
    plan,
    frames: int,
    prompts: Sequence[str],
    seed: int,
    recipe: dict | None,
    sources: dict[str, str],
) -> dict:
    """All that a clip depends on: kept beside it, and compared before it is made again.

    sources: the files that were read -> their digests;  recipe: None for a teacher"""
    made = [list(step.targets) for step in plan.steps]
    return {
        "prompt": list(prompts),
        "seed": seed,
        "plan": {"order": plan.name, "latents": plan.length, "frames": frames, "made": made},
        "recipe": recipe,
        "sources": sources,
        "flags": {name: value for name, value in asdict(config).items() if name not in NO_MATTER},
    }


def write_sidecar(clip: Path, about: dict) -> None:
    """Keep what a clip was made of beside it, with the clip's own digest."""
    about = about | {"clip": digest(clip)}
    with atomic(sidecar(clip)) as tmp:
        words = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        tmp.write_text(words, encoding="utf-8", errors="backslashreplace")  # odd file names


def is_made(clip: Path, about: dict) -> bool:
    """Whether the clip is there, and the file beside it says that it was made in just this way."""
    if not clip.is_file() or not sidecar(clip).is_file():
        return False
    try:
        found = json.loads(sidecar(clip).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return found == json.loads(json.dumps(about)) | {"clip": digest(clip)}


def safe_name(number: int, prompt: str) -> str:
    """(3, "A cat, running!") -> "0003-a-cat-running": a name for every file system."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{number:04d}-{words}" if words else f"{number:04d}"


def read_seed(words: str) -> int:
    """The seed as a number; a random one is printed, so that the clip can be made again."""
    if words == "random":
        seed = random.SystemRandom().randrange(2**32)
        print(f"--seed {seed}")
        return seed
    if not str(words).isdecimal() or int(words) >= 2**32:
        raise UserError(f"--seed {words} must be a whole number below 2^32, or random")
    return int(words)
