"""Hostile input: what users and disks do to files, folders and flags, given to whatever takes it.

    files     good files of every kind the project reads, mutated, given to their readers
    flags     odd values for every flag that is a number, given to the scripts that train and encode
    folders   a job done again in its folder with other settings: it is refused, or what is there
              afterwards is, byte for byte, what the new settings make in a new folder

Input may be accepted or refused in one sentence (UserError, OSError, FloatingPointError; for flags
also --help's exit). Anything else is a finding: another exception, more than 10 seconds (120 for a
run), more than
2 GiB. Every input follows from (seed, number), so a finding can be made again.

    python -m tools.fuzz --inputs 10000          # a few minutes; --only NUMBER repeats one file
"""

import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
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
from lib.states import load_state, save_state
from lib.text import Prompts, read_embeddings
from lib.weights import read_tensors, read_umt5
from sampler import Recipe
from tests.tiny import WORDED, tiny_checkpoints, tiny_dit
from tools import encode
from toy import train_vae
from vae import VAE, VAEConfig, load_vae, save_vae
from zoo import ar_teacher

STORY = {
    "scenes": [
        {"start": 0, "clip": "clip.mp4", "prompt": "a red disc moves up over a blue wave"},
        {
            "start": 4,
            "seconds": 1.5,
            "prompt": "a cyan ring moves down over a red wave",
            "bridge": "a",
        },
    ],
    "order": [1, 0],
}
SCRIPTS = (
    generate,
    evaluate,
    encode,
    text,
    states,
    ar_teacher,
    train_dmd,
    train_ode,
    train_vae,
)
ODD = ("0", "-1", "0.5", "-0.0", "nan", "inf", "1e999", "1e-320", "9" * 23, "", "x", "1 2 3 4")


def story(path: Path) -> object:
    """Read a story as generate.py does."""
    given = clips.Given(load_vae(path.parent / "vae.safetensors"), torch.device("cpu"))
    return clips.Around(generate.Config(story=str(path)), Recipe(), (32, 32), given).plan()


def folder_of_pairs(path: Path) -> object:
    """Read pairs whose shard or index was changed."""
    config = train_ode.Config(
        data=str(path.parent),
        teacher=str(path.parents[1] / "teacher.safetensors"),
        latent=(6, 4, 4),
    )
    words = Prompts("toy", 64, 12).words
    lengths = read_pairs(config, words, train_ode.trajectory_shapes(config, 2))
    return [x.float().sum() for some in lengths.values() for x in some[0].shard.values()]


def folder_of_latents(path: Path) -> object:
    """Read clips whose shard was changed."""
    return Clips(str(path.parent), (6, 4, 4), 2, Prompts("toy", 64, 12))[0]


def state(path: Path) -> object:
    """Read a resume state."""
    model = tiny_dit(2, **WORDED).requires_grad_(True)
    return load_state(path, {"lr": 1.0}, {"dit": (model, torch.optim.AdamW(model.parameters()))})


def flags(path: Path) -> object:
    """The words of a file as the flags of a script; the first says which."""
    words = path.read_text(errors="replace").replace("\0", "").split()
    return from_cli(SCRIPTS[len(words) % len(SCRIPTS)].Config, words)


def files(folder: Path) -> list[tuple[Path, Callable[[Path], object]]]:
    """Good files, small, each with its reader."""
    dit, made = tiny_dit(2, **WORDED), []

    def good(name: str, reader: Callable[[Path], object]) -> Path:
        made.append((folder / name, reader))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        return folder / name

    save_dit(dit, good("student.safetensors", load_dit))
    save_vae(VAE(VAEConfig(dim=4, z_dim=2, num_res_blocks=1)), good("vae.safetensors", load_vae))
    torch.save(
        {"generator_ema": {"model." + k: v for k, v in dit.state_dict().items()}},
        good("self/forcing.pt", load_dit),
    )
    (folder / "self" / "config.json").write_text(json.dumps(asdict(dit.config)))
    save_dit(dit, folder / "diffusers", to="diffusers")
    made.append((folder / "diffusers" / "config.json", lambda path: load_dit(path.parent)))
    (folder / "sharded").mkdir()
    good("sharded/model.safetensors.index.json", lambda path: read_tensors(path)).write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})
    )
    (folder / "sharded" / "one.safetensors").write_bytes((folder / "vae.safetensors").read_bytes())
    torch.save(
        {"blocks.0.attn.q.weight": torch.zeros(4, 4), "token_embedding.weight": torch.zeros(8, 4)},
        good("umt5.pth", read_umt5),
    )
    model = tiny_dit(2, **WORDED).requires_grad_(True)
    save_state(
        good("run/state.pt", state),
        3,
        {"lr": 1.0},
        {"dit": (model, torch.optim.AdamW(model.parameters()))},
    )
    encode.encode(
        encode.Config(
            vae=str(folder / "vae.safetensors"),
            out=str(folder / "latents"),
            clips=2,
            frames=21,
            shard=2,
        )
    )
    made.append((folder / "latents" / "latents-000000.safetensors", folder_of_latents))
    save_dit(tiny_dit(1, **WORDED), folder / "teacher.safetensors")
    train_ode.main(
        train_ode.Config(
            generate=True,
            teacher=str(folder / "teacher.safetensors"),
            data=str(folder / "pairs"),
            latent=(6, 4, 4),
            pairs=1,
            dtype="float32",
        )
    )
    index = json.loads((folder / "pairs" / "index.json").read_text())
    made += [
        (folder / "pairs" / name, folder_of_pairs) for name in ("index.json", *index["shards"])
    ]
    frames = (np.random.default_rng(0).random((21, 32, 32, 3)) * 255).astype(np.uint8)
    for name in ("clip.mp4", "clip.gif", "clip.mkv"):
        options = {"codec": "ffv1"} if name.endswith("mkv") else {}
        iio.imwrite(
            good(name, lambda path: (load_clip(path, (32, 32)), read_frames(path))),
            frames,
            **options,
        )
    for name in ("picture.png", "picture.jpg"):
        iio.imwrite(good(name, lambda path: load_clip(path, (32, 32), frames=1)), frames[0])
    good("story.json", story).write_text(json.dumps(STORY))
    good("prompts.txt", lambda path: Prompts(str(path), 64, 12)([0, 1])).write_text(
        "a red disc moves up over a blue wave\na cyan ring\n"
    )
    with redirect_stdout(io.StringIO()):
        text.main(
            text.Config(
                prompts=str(folder / "prompts.txt"),
                out=str(folder / "embedded.safetensors"),
                weights="toy",
            )
        )
    made.append(
        (
            folder / "embedded.safetensors",
            lambda path: [x.sum() for _, x, _ in read_embeddings(path)],
        )
    )
    good("flags.txt", flags).write_text(
        "--prompt a red disc --order backward --seconds 2.5 --size 32 32 --latent 21 4 4 "
        "--steps 10 "
        "--lr 1e-3"
    )
    return made


# ---------------------------------------------------------------- mutations
def mutate_json(value: object, r: random.Random) -> object:
    """Replace, remove or wrap something anywhere in a JSON value."""
    odd = [
        None,
        True,
        -1,
        0,
        1e308,
        float("nan"),
        10**30,
        "",
        "x" * 5000,
        [],
        {},
        [[]],
        "../../etc",
        0.5,
        "\ud800",
    ]
    if isinstance(value, dict) and value and r.random() < 0.8:
        key = r.choice(sorted(value))
        what = r.random()
        if what < 0.2:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.3:
            return value | {r.choice(["x", "__class__", key + key]): r.choice(odd)}
        return value | {key: mutate_json(value[key], r)}
    if isinstance(value, list) and value and r.random() < 0.8:
        n = r.randrange(len(value))
        return value[:n] + [mutate_json(value[n], r)] * r.choice([0, 1, 1, 2]) + value[n + 1 :]
    return r.choice(odd)


def mutate(raw: bytes, kind: str, r: random.Random) -> bytes:
    """Change a file: its bytes anywhere, its head, its length, or its structure if it has one."""
    if kind == ".json" and r.random() < 0.7:
        return json.dumps(mutate_json(json.loads(raw), r)).encode()
    if kind == ".safetensors" and r.random() < 0.5:  # the header: 8 bytes of length, then JSON
        size = int.from_bytes(raw[:8], "little")
        header = mutate_json(json.loads(raw[8 : 8 + size]), r)
        if (
            r.random() < 0.3
            and isinstance(header, dict)
            and isinstance(header.get("__metadata__"), dict)
        ):
            old = json.loads(raw[8 : 8 + size])["__metadata__"].get("config", "{}")
            header["__metadata__"]["config"] = json.dumps(mutate_json(json.loads(old), r))
        new = json.dumps(header).encode()
        length = r.choice([len(new), len(new), len(new), r.getrandbits(63), 0])
        return length.to_bytes(8, "little") + new + raw[8 + size :]
    data, what = bytearray(raw), r.random()
    head = min(len(data), r.choice([64, 512, len(data)])) or 1
    if what < 0.5:
        for _ in range(r.choice([1, 1, 2, 8, 64])):
            if data:
                data[r.randrange(min(head, len(data)))] = r.choice([0, 255, r.randrange(256)])
    elif what < 0.7:
        del data[r.randrange(len(data) + 1) :]
    elif what < 0.85:
        at = r.randrange(head)
        data[at:at] = r.choice(
            [
                b"\0" * 8,
                b"\xff" * 8,
                bytes(r.randrange(256) for _ in range(32)),
                "\u202e\U0001f600".encode(),
                b"--",
                b"\n\n",
            ]
        )
    else:
        a, b = sorted(r.randrange(len(data) + 1) for _ in range(2))
        data = data[:a] + data[a:b] * r.choice([0, 2, 3]) + data[b:]
    return bytes(data)


# ---------------------------------------------------------------- odd values of flags
def small_runs(folder: Path) -> dict[object, dict[str, str]]:
    """Scripts, each with flags that make it short."""
    paths = tiny_checkpoints(folder)
    sizes = {"latent": "6 4 4", "dtype": "float32", "batch": "2", "steps": "1"}
    start = {"teacher": paths["teacher"], "out": str(folder / "out")}
    clips = {"vae": paths["vae"], "clips": "2", "frames": "21"}
    ode = sizes | start | {"weights": paths["student"], "data": str(folder / "pairs")}
    encode.encode(encode.Config(vae=paths["vae"], out=str(folder / "latents"), clips=2, frames=21))
    (folder / "prompts.txt").write_text("a red disc\na cyan ring\n")
    return {
        encode: clips | {"size": "32 32", "out": str(folder / "out")},
        text: {
            "prompts": str(folder / "prompts.txt"),
            "out": str(folder / "out" / "p.safetensors"),
            "weights": "toy",
        },
        train_ode: ode,
        train_dmd: sizes
        | start
        | {"student": paths["student"], "critic": paths["student"], "vae": paths["vae"]},
        ar_teacher: sizes
        | {"weights": paths["student"], "latents": str(folder / "latents"), "vae": ""}
        | {"out": str(folder / "out")},
    }


def numbers_of(cls: type) -> list[str]:
    """The flags of a script that are numbers."""
    kinds = typing.get_type_hints(cls)
    wanted = (int, float, tuple[int, ...], tuple[float, ...])
    return [f.name for f in dataclasses.fields(cls) if kinds[f.name] in wanted]


def odd_flags(folder: Path, count: int, r: random.Random) -> Iterator[tuple[str, Callable]]:
    """What is tried, and an action that tries it in a fresh output folder."""
    scripts = small_runs(folder)
    generate_pairs = [f"--{k}={v}" for k, v in scripts[train_ode].items() if k != "latent"]
    words = ["--generate", "--pairs", "2", "--latent", "6", "4", "4", *generate_pairs]
    train_ode.main(from_cli(train_ode.Config, words))
    tries = [(s, f, value) for s in scripts for f in numbers_of(s.Config) for value in ODD]
    for script, flag, value in r.sample(tries, min(count, len(tries))):
        flags = scripts[script] | {flag: value}
        words = [word for k, v in flags.items() for word in (f"--{k}", *(v.split() or [""]))]

        def action(script=script, words=words) -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            script.main(from_cli(script.Config, words))

        yield f"{script.__name__} --{flag} {value!r}", action


# ---------------------------------------------------------------- folders used again
def contents(folder: Path) -> dict[str, object]:
    """What lies in a folder; of safetensors, what they hold: bytes of headers hang on paths."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            tensors = read_tensors(path)[0]
            found[name] = {k: x.float().tolist() for k, x in tensors.items()}
        else:
            found[name] = path.read_bytes()
    return found


def used_again(folder: Path) -> Iterator[tuple[str, Callable]]:
    """Jobs that are done in a folder and then, with one setting changed, in it again."""
    paths = tiny_checkpoints(folder)
    save_dit(tiny_dit(5, **WORDED), folder / "other.safetensors")
    for name, lines in (("few", "a\nb\nc\n"), ("more", "a\nb\nc\nd\n"), ("edited", "a\nx\nc\n")):
        (folder / f"{name}.txt").write_text(lines)
    jobs = {
        encode: (
            {"vae": paths["vae"], "clips": 3, "frames": 9, "size": (16, 16), "shard": 2},
            {"clips": 5, "frames": 17, "size": (32, 32), "shard": 3, "vae": "toy/weights"},
            {"clips": 2},
        ),
        text: (
            {"prompts": str(folder / "few.txt"), "weights": "toy", "shard": 2},
            {"prompts": str(folder / "more.txt"), "shard": 3, "negative": "n"},
            {"prompts": str(folder / "edited.txt")},
        ),
        train_ode: (
            {
                "generate": True,
                "teacher": paths["teacher"],
                "latent": (6, 4, 4),
                "dtype": "float32",
                "pairs": 3,
                "shard": 2,
            },
            {"pairs": 6, "guidance": 6.0, "shard": 3, "shift": 3.0, "seed": 1, "negative": "a"},
            {"pairs": 2, "teacher": str(folder / "other.safetensors")},
        ),
    }
    places = {encode: ("out", "{}"), text: ("out", "{}/p.safetensors"), train_ode: ("data", "{}")}
    for script, (first, *changes) in jobs.items():
        flag, place = places[script]

        def make(where: Path, settings: dict, script=script, flag=flag, place=place) -> None:
            script.main(script.Config(**settings | {flag: place.format(where)}))

        for key, value in [item for change in changes for item in change.items()]:

            def action(make=make, first=first, key=key, value=value) -> None:
                again, new = folder / "again", folder / "new"
                for where in (again, new):
                    shutil.rmtree(where, ignore_errors=True)
                make(again, first)
                make(new, first | {key: value})
                make(again, first | {key: value})
                made, want = contents(again), contents(new)
                wrong = [k for k in want if made.get(k) != want[k]]
                if wrong:
                    raise AssertionError(f"{wrong[0]} is not what these settings make")

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


def mutated(folder: Path, config: Config) -> Iterator[tuple[str, Callable]]:
    """Good files, each changed in turn while its reader is tried."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        good = files(folder)
    may_be_refused = ("flags.txt", "umt5.pth", "index.json")
    for path, reader in good:
        result = attempt(lambda path=path, reader=reader: reader(path))
        if result != "accepted" and path.name not in may_be_refused:
            print(f"the unchanged {path.name} is not accepted: {result}")
    originals = {path: path.read_bytes() for path, _ in good}
    for number in range(config.inputs) if config.only < 0 else [config.only]:
        r = random.Random(config.seed * 10**9 + number)
        path, reader = good[number % len(good)]
        path.write_bytes(mutate(originals[path], path.suffix, r))
        yield f"file {number}, {path.name}", lambda path=path, reader=reader: reader(path)
        path.write_bytes(originals[path])


def tries(folder: Path, config: Config) -> Iterator[tuple[str, Callable]]:
    """All that is tried, as (what it is, an action)."""
    for name in ("files", "flags", "folders"):
        (folder / name).mkdir()
    if config.folders and config.only < 0:
        yield from used_again(folder / "folders")
    if config.flags and config.only < 0:
        yield from odd_flags(folder / "flags", config.flags, random.Random(config.seed))
    if config.inputs:
        old = os.getcwd()
        os.chdir(folder / "files")  # what a mutated name leads to stays in there
        try:
            yield from mutated(folder / "files", config)
        finally:
            os.chdir(old)


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
