"""Hostile input: what users and disks do to files, folders and flags, given to whatever takes it.

    files     good files of every kind the project reads, mutated, given to their readers
    flags     odd values for every flag that is a number, given to the scripts that train and encode
    folders   a job done again in its folder with other settings: it is refused, or what is there
              afterwards is, byte for byte, what the new settings make in a new folder

Input may be accepted or refused in one sentence (UserError, OSError, FloatingPointError; for flags
also --help's exit). Anything else is a finding: another exception, more than 10 seconds (120 for a
run), more than 2 GiB. Every input follows from (seed, number), so a finding can be made again.

    python -m tests.fuzz --inputs 10000          # a few minutes; --only NUMBER repeats one file
"""

import io
import json
import random
import resource
import shutil
import signal
import tempfile
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

import clips
import evaluate
import generate
import train_dmd
import train_ode
from dit import load_dit, save_dit
from lib import states, text
from lib.clips import Clips
from lib.common import UserError, from_cli, run
from lib.media import load_clip, read_frames
from lib.pairs import read_pairs
from lib.recipe import Recipe
from lib.states import load_state, save_state
from lib.tensors import read_tensors
from lib.text import Prompts, read_embeddings
from lib.weights import read_umt5
from tests.tiny import WORDED, tiny_checkpoints, tiny_dit
from tools import encode
from toy import train_vae
from vae import load_vae
from zoo import ar_teacher

SCENES = [
    {"start": 0, "clip": "clip.mp4", "prompt": "a red disc moves up over a blue wave"},
    {"start": 4, "seconds": 1.5, "prompt": "a cyan ring moves down over a red wave", "bridge": "a"},
]
FLAGS = "--prompt a red disc --order backward --seconds 2.5 --size 32 32 --latent 21 4 4 --lr 1e-3"
TOY = Prompts("toy", 64, 12)
SCRIPTS = (generate, evaluate, encode, text, states, ar_teacher, train_dmd, train_ode, train_vae)
ODD = ("0", "-1", "0.5", "-0.0", "nan", "inf", "1e999", "1e-320", "9" * 23, "", "x", "1 2 3 4")
ODD_JSON = [None, True, -1, 0, 0.5, 1e308, float("nan"), 10**30, "", "x" * 5000, [], {}, [[]]]
ODD_JSON += ["../../etc", "\ud800"]
ODD_BYTES = [b"\0" * 8, b"\xff" * 8, "\u202e\U0001f600".encode(), b"--", b"\n\n"]
Tries = Iterator[tuple[str, Callable[[], object]]]  # what is tried, and an action that tries it


# ---------------------------------------------------------------- good files and their readers
def story(path: Path) -> object:
    """Read a story as generate.py does."""
    given = clips.Given(load_vae(path.parent / "vae.safetensors"), torch.device("cpu"))
    return clips.Around(generate.Config(story=str(path)), Recipe(), (32, 32), given).plan()


def folder_of_pairs(path: Path) -> object:
    """Read pairs whose shard or index was changed."""
    teacher = str(path.parents[1] / "teacher.safetensors")
    config = train_ode.Config(data=str(path.parent), teacher=teacher, latent=(6, 4, 4))
    kind = train_ode.Trajectories(config, (), 2, TOY)
    lengths = read_pairs(kind)
    return [x.float().sum() for some in lengths.values() for x in some[0].shard.values()]


def trained() -> dict[str, tuple]:
    """A tiny model and its optimiser, as a resume state holds them."""
    model = tiny_dit(2, **WORDED).requires_grad_(True)
    return {"dit": (model, torch.optim.AdamW(model.parameters()))}


def flags(path: Path) -> object:
    """The words of a file as the flags of a script; their number says which."""
    words = path.read_text(errors="replace").replace("\0", "").split()
    return from_cli(SCRIPTS[len(words) % len(SCRIPTS)].Config, words)


READERS: dict[str, Callable[[Path], object]] = {  # of good files, by name
    "student.safetensors": load_dit,
    "vae.safetensors": load_vae,
    "self/forcing.pt": load_dit,
    "diffusers/config.json": lambda path: load_dit(path.parent),
    "sharded/model.safetensors.index.json": read_tensors,
    "umt5.pth": read_umt5,
    "run/state.pt": lambda path: load_state(path, {"lr": 1.0}, trained()),
    "latents/latents-*": lambda path: Clips(str(path.parent), (6, 4, 4), 2, TOY)[0],
    "pairs/*": folder_of_pairs,
    "clip.*": lambda path: (load_clip(path, (32, 32)), read_frames(path)),
    "picture.*": lambda path: load_clip(path, (32, 32), frames=1),
    "story.json": story,
    "prompts.txt": lambda path: Prompts(str(path), 64, 12)([0, 1]),
    "embedded.safetensors": lambda path: [x.sum() for _, x, _ in read_embeddings(path)],
    "flags.txt": flags,
}


def write_networks(folder: Path) -> dict[str, str]:
    """Checkpoints in every layout, and a resume state; the paths of `tiny_checkpoints`."""
    paths, dit = tiny_checkpoints(folder), tiny_dit(2, **WORDED)
    for name in ("self", "sharded", "run"):
        (folder / name).mkdir()
    names = {"model." + k: v for k, v in dit.state_dict().items()}
    torch.save({"generator_ema": names}, folder / "self" / "forcing.pt")
    (folder / "self" / "config.json").write_text(json.dumps(asdict(dit.config)))
    save_dit(dit, folder / "diffusers", to="diffusers")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(paths["vae"], folder / "sharded" / "one.safetensors")
    umt5 = {"blocks.0.attn.q.weight": (4, 4), "token_embedding.weight": (8, 4)}
    torch.save({name: torch.zeros(shape) for name, shape in umt5.items()}, folder / "umt5.pth")
    save_state(folder / "run" / "state.pt", 3, {"lr": 1.0}, trained())
    return paths


def write_files(folder: Path) -> list[tuple[Path, Callable[[Path], object]]]:
    """Good files of every kind, small, each with its reader."""
    paths = write_networks(folder)
    shape = {"clips": 2, "frames": 21, "shard": 2}
    encode.encode(encode.Config(vae=paths["vae"], out=str(folder / "latents"), **shape))
    data = {"teacher": paths["teacher"], "data": str(folder / "pairs"), "latent": (6, 4, 4)}
    train_ode.main(train_ode.Config(generate=True, pairs=1, dtype="float32", **data))
    frames = (np.random.default_rng(0).random((21, 32, 32, 3)) * 255).astype(np.uint8)
    for name in ("clip.mp4", "clip.gif", "clip.mkv"):
        codec = {"codec": "ffv1"} if name.endswith("mkv") else {}
        iio.imwrite(folder / name, frames, **codec)
    for name in ("picture.png", "picture.jpg"):
        iio.imwrite(folder / name, frames[0])
    (folder / "story.json").write_text(json.dumps({"scenes": SCENES, "order": [1, 0]}))
    prompts = folder / "prompts.txt"
    prompts.write_text("a red disc moves up over a blue wave\na cyan ring\n")
    embedded = str(folder / "embedded.safetensors")
    text.main(text.Config(prompts=str(prompts), out=embedded, weights="toy"))
    (folder / "flags.txt").write_text(FLAGS)
    return [(path, READERS[name]) for name in READERS for path in sorted(folder.glob(name))]


# ---------------------------------------------------------------- mutations
def mutate_json(value: object, r: random.Random) -> object:
    """Replace, remove or wrap something anywhere in a JSON value."""
    if isinstance(value, dict) and value and r.random() < 0.8:
        key = r.choice(sorted(value))
        what = r.random()
        if what < 0.2:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.3:
            return value | {r.choice(["x", "__class__", key + key]): r.choice(ODD_JSON)}
        return value | {key: mutate_json(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.8:
        n = r.randrange(len(value))
        return value[:n] + [mutate_json(value[n], r)] * r.choice([0, 1, 1, 2]) + value[n + 1 :]
    return r.choice(ODD_JSON)


def mutate_header(raw: bytes, r: random.Random) -> bytes:
    """Change the head of a .safetensors file: 8 bytes of length, then JSON."""
    size = int.from_bytes(raw[:8], "little")
    good = json.loads(raw[8 : 8 + size])
    header = mutate_json(good, r)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict) and r.random() < 0.3:
        config = json.loads(good["__metadata__"].get("config", "{}"))
        metadata["config"] = json.dumps(mutate_json(config, r))
    new = json.dumps(header).encode()
    length = r.choice([len(new), len(new), len(new), r.getrandbits(63), 0])
    return length.to_bytes(8, "little") + new + raw[8 + size :]


def mutate(raw: bytes, kind: str, r: random.Random) -> bytes:
    """Change a file: its bytes anywhere, its head, its length, or its structure if it has one."""
    if kind == ".json" and r.random() < 0.7:
        return json.dumps(mutate_json(json.loads(raw), r)).encode()
    if kind == ".safetensors" and r.random() < 0.5:
        return mutate_header(raw, r)
    data, what = bytearray(raw), r.random()
    head = min(len(data), r.choice([64, 512, len(data)])) or 1
    if what < 0.5 and data:
        for _ in range(r.choice([1, 1, 2, 8, 64])):
            data[r.randrange(min(head, len(data)))] = r.choice([0, 255, r.randrange(256)])
    elif what < 0.7:
        del data[r.randrange(len(data) + 1) :]
    elif what < 0.85:
        at = r.randrange(head)
        data[at:at] = r.choice([*ODD_BYTES, r.randbytes(32)])
    else:
        a, b = sorted(r.randrange(len(data) + 1) for _ in range(2))
        data = data[:a] + data[a:b] * r.choice([0, 2, 3]) + data[b:]
    return bytes(data)


def mutated(folder: Path, config: "Config") -> Tries:
    """Good files, each changed in turn while its reader is tried."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        good = write_files(folder)
    for path, reader in good:
        result = attempt(lambda path=path, reader=reader: reader(path))
        if result != "accepted" and path.name not in ("flags.txt", "umt5.pth", "index.json"):
            print(f"the unchanged {path.name} is not accepted: {result}")
    originals = {path: path.read_bytes() for path, _ in good}
    for number in range(config.inputs) if config.only < 0 else [config.only]:
        r = random.Random(config.seed * 10**9 + number)
        path, reader = good[number % len(good)]
        path.write_bytes(mutate(originals[path], path.suffix, r))
        yield f"file {number}, {path.name}", lambda path=path, reader=reader: reader(path)
        path.write_bytes(originals[path])


# ---------------------------------------------------------------- odd values of flags
def small_runs(folder: Path) -> dict[object, dict[str, str]]:
    """Scripts, each with flags that make it short."""
    paths, out = tiny_checkpoints(folder), str(folder / "out")
    student, teacher, vae = paths["student"], paths["teacher"], paths["vae"]
    latents, prompts = str(folder / "latents"), folder / "prompts.txt"
    encode.encode(encode.Config(vae=vae, out=latents, clips=2, frames=21))
    prompts.write_text("a red disc\na cyan ring\n")
    sizes = {"latent": "6 4 4", "dtype": "float32", "batch": "2", "steps": "1", "out": out}
    start = sizes | {"teacher": teacher}
    return {
        encode: {"vae": vae, "clips": "2", "frames": "21", "size": "32 32", "out": out},
        text: {"prompts": str(prompts), "out": f"{out}/p.safetensors", "weights": "toy"},
        train_ode: start | {"weights": student, "data": str(folder / "pairs")},
        train_dmd: start | {"student": student, "critic": student, "vae": vae},
        ar_teacher: sizes | {"weights": student, "latents": latents, "vae": ""},
    }


def numbers_of(cls: type) -> list[str]:
    """The flags of a script that are numbers."""
    kinds, wanted = typing.get_type_hints(cls), (int, float, tuple[int, ...], tuple[float, ...])
    return [f.name for f in fields(cls) if kinds[f.name] in wanted]


def words_of(flags: dict[str, str]) -> list[str]:
    """Flags as typed: {"size": "32 32"} -> ["--size", "32", "32"]."""
    return [word for k, v in flags.items() for word in (f"--{k}", *(v.split() or [""]))]


def odd_flags(folder: Path, count: int, r: random.Random) -> Tries:
    """Scripts run with an odd value of one flag, each in a fresh output folder."""
    scripts = small_runs(folder)
    words = ["--generate", "--pairs", "2", *words_of(scripts[train_ode])]
    train_ode.main(from_cli(train_ode.Config, words))
    every = [(s, f, value) for s in scripts for f in numbers_of(s.Config) for value in ODD]
    for script, flag, value in r.sample(every, min(count, len(every))):
        words = words_of(scripts[script] | {flag: value})

        def action(script=script, words=words) -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            script.main(from_cli(script.Config, words))

        yield f"{script.__name__} --{flag} {value!r}", action


# ---------------------------------------------------------------- folders used again
def content(path: Path) -> object:
    """What a file holds; of .safetensors its tensors, for the bytes of headers hang on paths."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    return {k: x.float().tolist() for k, x in read_tensors(path)[0].items()}


def jobs(folder: Path) -> list[tuple[object, tuple[str, str], dict, list[tuple[str, object]]]]:
    """Script, its flag for the place, what is made first, and what changes the second time."""
    paths = tiny_checkpoints(folder)
    save_dit(tiny_dit(5, **WORDED), folder / "other.safetensors")
    for name, letters in (("few", "abc"), ("more", "abcd"), ("edited", "axc")):
        (folder / f"{name}.txt").write_text("".join(f"{letter}\n" for letter in letters))
    latents = {"vae": paths["vae"], "clips": 3, "frames": 9, "size": (16, 16), "shard": 2}
    words = {"prompts": f"{folder}/few.txt", "weights": "toy", "shard": 2}
    pairs = {"generate": True, "teacher": paths["teacher"], "latent": (6, 4, 4), "pairs": 3}
    pairs |= {"dtype": "float32", "shard": 2}
    other_latents = [("clips", 5), ("frames", 17), ("size", (32, 32)), ("shard", 3)]
    other_latents += [("vae", "toy/weights"), ("clips", 2)]
    other_words = [("prompts", f"{folder}/{name}.txt") for name in ("more", "edited")]
    other_words += [("shard", 3), ("negative", "n")]
    other_pairs = [("pairs", 6), ("guidance", 6.0), ("shard", 3), ("shift", 3.0), ("seed", 1)]
    other_pairs += [("negative", "a"), ("pairs", 2), ("teacher", str(folder / "other.safetensors"))]
    return [
        (encode, ("out", "{}"), latents, other_latents),
        (text, ("out", "{}/p.safetensors"), words, other_words),
        (train_ode, ("data", "{}"), pairs, other_pairs),
    ]


def used_again(folder: Path) -> Tries:
    """Jobs that are done in a folder and then, with one setting changed, in it again."""
    again, new = folder / "again", folder / "new"
    for script, (flag, place), first, changes in jobs(folder):
        first, second = ({flag: place.format(where)} | first for where in (again, new))
        for key, value in changes:
            change = {key: value}

            def action(script=script, first=first, second=second, change=change) -> None:
                for where in (again, new):
                    shutil.rmtree(where, ignore_errors=True)
                for settings in (first, second | change, first | change):
                    script.main(script.Config(**settings))
                for path in (p for p in new.rglob("*") if p.is_file()):
                    made = again / path.relative_to(new)
                    if not made.exists() or content(made) != content(path):
                        raise AssertionError(f"{made.name} is not what these settings make")

            yield f"{script.__name__} again with --{key} {value}", action


# ---------------------------------------------------------------- trying
class Late(BaseException):
    """The alarm; no reader catches it."""


def attempt(action: Callable[[], object], seconds: int = 10) -> str:
    """What comes of an action: accepted, refused, or what went wrong."""

    def late(*_):
        raise Late

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            action()
        result = "accepted"
    except Late:
        return f"it took more than {seconds} seconds"
    except (UserError, OSError, FloatingPointError) as error:
        result = "refused" if str(error).strip() else "an error without a word"
    except SystemExit:
        result = "refused"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return result if grown < 2 else f"memory grew by {grown:.1f} GiB"


@dataclass
class Config:
    """Mutate, misuse, and read."""

    RANGES = {"inputs": (0, 10**9), "flags": (0, 10**6), "only": (-1, 10**9)}
    inputs: int = 10000  # mutated files; 0: none
    flags: int = 200  # odd values of flags; 0: none
    folders: bool = True  # folders used again
    seed: int = 0
    only: int = -1  # do this mutated file again, and say what comes of it


def tries(folder: Path, config: Config) -> Tries:
    """All that is tried."""
    for name in ("files", "flags", "folders"):
        (folder / name).mkdir()
    if config.folders and config.only < 0:
        yield from used_again(folder / "folders")
    if config.flags and config.only < 0:
        yield from odd_flags(folder / "flags", config.flags, random.Random(config.seed))
    if config.inputs:
        with chdir(folder / "files"):  # what a mutated name leads to stays in there
            yield from mutated(folder / "files", config)


def main(config: Config) -> None:
    counts = {"accepted": 0, "refused": 0, "findings": 0}
    with tempfile.TemporaryDirectory() as name:
        for what, action in tries(Path(name), config):
            result = attempt(action, 10 if what.startswith("file ") else 120)
            if config.only >= 0:
                print(f"{what}: {result}")
            if result not in counts:
                print(f"{what}: {result.strip().splitlines()[-1][:200]}", flush=True)
                result = "findings"
            counts[result] += 1
    print(", ".join(f"{k} {v}" for k, v in counts.items()))
    if counts["findings"]:
        raise UserError(f"{counts['findings']} findings; see one file's with --only NUMBER")


if __name__ == "__main__":
    run(main, Config)
