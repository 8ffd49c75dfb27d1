"""Hostile input: good files of every kind the project reads, mutated, given to their readers.

A reader may accept a file or refuse it in one sentence (UserError, OSError; for flags also --help's exit). Anything else is
a finding: another exception, more than 10 seconds, more than 2 GiB. Every input follows from (seed, number), so a finding
can be made again.

    PYTHONPATH=. python tests/fuzz.py --inputs 10000          # a few minutes; --only NUMBER repeats one
"""

import io
import json
import os
import random
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable
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
from lib import text
from lib.common import UserError, from_cli, run
from lib.media import load_clip, read_frames
from lib.pairs import read_pairs
from lib.text import Prompts, read_embeddings
from lib.training import load_state, save_state
from lib.weights import read_tensors, read_umt5
from sampler import Recipe
from tests.tiny import WORDED, tiny_dit
from tools import encode as latents
from vae import VAE, VAEConfig, load_vae, save_vae
from zoo import causal_forcing as train_ar

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
SCRIPTS = (generate, evaluate, latents, text, train_ar, train_dmd, train_ode)


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
    return [x.float().sum() for shard in read_pairs(config)[0] for x in shard.values()]


def folder_of_latents(path: Path) -> object:
    """Read clips whose shard was changed."""
    return latents.Clips(str(path.parent), (6, 4, 4), 2, Prompts("toy", 64, 12))[0]


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
    latents.encode(
        latents.Config(
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
        "--prompt a red disc --order backward --seconds 2.5 --size 32 32 --latent 21 4 4 --steps 10 "
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


class Late(BaseException):
    """The alarm; no reader catches it."""


def attempt(path: Path, reader: Callable[[Path], object]) -> str:
    """What a reader does with a file: accepted, refused, or what went wrong."""

    def late(*_):
        raise Late

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            reader(path)
        result = "accepted"
    except Late:
        return "it took more than 10 seconds"
    except (UserError, OSError) as error:
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
    """Mutate and read."""

    inputs: int = 10000
    seed: int = 0
    only: int = -1  # do this number again, and keep the file
    minutes: float = 60.0


def main(config: Config) -> None:
    counts: dict[str, int] = {}
    findings = []
    with tempfile.TemporaryDirectory() as name:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            good = files(Path(name))
        for path, reader in good:
            if (result := attempt(path, reader)) != "accepted" and path.name not in (
                "flags.txt",
                "umt5.pth",
                "index.json",
            ):
                print(f"the unchanged {path.name} is not accepted: {result}")
        originals = {path: path.read_bytes() for path, _ in good}
        os.chdir(name)
        for number in range(config.inputs) if config.only < 0 else [config.only]:
            r = random.Random(config.seed * 10**9 + number)
            path, reader = good[number % len(good)]
            path.write_bytes(mutate(originals[path], path.suffix, r))
            result = attempt(path, reader)
            if config.only >= 0:
                print(result)
            if result not in ("accepted", "refused"):
                findings.append((number, path.name, result))
                print(
                    f"input {number}, {path.name}: {result.strip().splitlines()[-1][:200]}",
                    flush=True,
                )
            counts[result if result in ("accepted", "refused") else "findings"] = (
                counts.get(result if result in ("accepted", "refused") else "findings", 0) + 1
            )
            path.write_bytes(originals[path])
    print(", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    if findings:
        raise UserError(f"{len(findings)} findings; see one with --only {findings[0][0]}")


if __name__ == "__main__":
    run(main, Config)
