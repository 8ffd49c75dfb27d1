"""Where results go: places are looked at before any work, and a clip's settings are kept beside
it."""

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from lib.common import UserError, atomic


def check_output(
    path: str, flag: str, suffixes: Sequence[str], inputs: Iterable[str | Path] = ()
) -> Path:
    """A file that can be written, with `~` expanded.

    raises: UserError for an empty name, a folder, another suffix, a place that is read-only, or a
    file that is also read: nothing of the user's is replaced by what is made of it"""
    ends = ", ".join(suffixes[:-1]) + " or " * (len(suffixes) > 1) + suffixes[-1]
    if not path:
        raise UserError(f"{flag} is empty; name a file that ends in {ends}")
    file = Path(path).expanduser()
    if file.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path} must end in {ends}")
    if file.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file in it")
    for given in inputs:
        if given and file.resolve() == Path(given).expanduser().resolve():
            raise UserError(f"{flag} {path} is also read; choose another name for the result")
    check_writable(file.parent, flag, path)
    return file


def check_places(
    read: Sequence[str], out: str, suffixes: Sequence[str], sheet: str = "", preview: str = ""
) -> None:
    """Whether all that is read is there, and what is made of it has a place. raises: UserError"""
    for path in read:
        if not Path(path).expanduser().is_file():
            raise UserError(f"{path} does not exist, or is a folder")
    clip = check_output(out, "--out", suffixes, read)
    check_output(str(sidecar(clip)), "--out", (".json",), read)
    if sheet:
        check_output(sheet, "--sheet", (".png",), [*read, clip])
    if preview:
        check_folder(preview, "--preview")


def check_folder(path: str, flag: str) -> Path:
    """A folder that is there or can be made, with `~` expanded. raises: UserError"""
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {path} is a file, not a folder")
    check_writable(folder, flag, path)
    return folder


def check_writable(folder: Path, flag: str, path: str) -> None:
    """Whether files can be made in this folder, or it can be made. raises: UserError"""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{flag} {path} lies in {there}, which is a file and not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} cannot be written: {there} is read-only")


def fingerprint(path: str | Path) -> str:
    """The first 16 digits of a file's SHA-256, or of those of all weights in a folder."""
    path = Path(path).expanduser()
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    kinds = (".safetensors", ".pt", ".pth", ".bin")
    parts = [fingerprint(p) for p in sorted(path.iterdir()) if p.suffix in kinds]
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

    sources: the files that were read -> their fingerprints;  recipe: None for a teacher"""
    return {
        "prompt": list(prompts),
        "seed": seed,
        "plan": {
            "order": plan.name,
            "latents": plan.length,
            "frames": frames,
            "made": [list(step.targets) for step in plan.steps],
        },
        "recipe": recipe,
        "sources": sources,
        "flags": {name: value for name, value in asdict(config).items() if name not in NO_MATTER},
    }


def sidecar(clip: Path) -> Path:
    """clip.mp4 -> clip.mp4.json"""
    return clip.with_name(clip.name + ".json")


def write_sidecar(clip: Path, about: dict) -> None:
    """Keep what a clip was made of beside it, with the clip's own fingerprint."""
    about = about | {"clip": fingerprint(clip)}
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
    return found == json.loads(json.dumps(about)) | {"clip": fingerprint(clip)}


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
