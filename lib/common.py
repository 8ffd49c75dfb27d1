"""Plumbing, no ideas: what every script needs and no reader comes here to learn.

- `run(main, Config)`   a typed dataclass is the command line; a user's mistake is one sentence and exit code 2
- `start()`             device and torchrun: the same script runs as one process or as many
- `atomic`, `read_pickle`   files that are whole or absent (checkpoints of models: weights.py)
- `generator`             randomness as a function of numbers

No model, loss, sampler or training loop lives here, and nothing here is imported for its cleverness. What training
loops share is in training.py.

    python -c "import common; help(common)"
"""

import argparse
import dataclasses
import difflib
import gc
import inspect
import os
import pathlib
import re
import signal
import sys
import types
import typing
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake the user can mend: its text is one sentence with the offending value and the fix."""


# ---------------------------------------------------------------- command line
def _convert(name: str, kind: type, words: list[str]):
    """Turn the words after a flag into a value of the field's type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # `str | None`
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:  # `tuple[int, ...]`, `tuple[str, ...]`
        return tuple(_convert(name, typing.get_args(kind)[0], [w]) for w in words)
    if kind is bool and not words:
        return True
    if len(words) != 1:
        raise UserError(
            f"--{name} takes one value, got {len(words)}: {' '.join(words) or 'nothing'}"
        )
    if kind is bool:
        if words[0].lower() not in ("true", "false"):
            raise UserError(f"--{name} is true or false, got {words[0]!r}")
        return words[0].lower() == "true"
    try:
        return kind(words[0])
    except ValueError:
        raise UserError(
            f"--{name} needs {'a whole number' if kind is int else 'a number'}, got {words[0]!r}"
        ) from None


def _help(cls: type) -> str:
    """The dataclass's own source is the help: one line per field, the trailing comment is its text; its own fields come first."""
    rows = []
    source = "".join(inspect.getsource(c) for c in cls.__mro__[-2::-1])
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", source, re.M))
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__):
        default = "required" if f.default is dataclasses.MISSING else f.default
        rows.append(f"  --{f.name:<18} {comments.get(f.name, '')}  [{default}]")
    return (
        f"usage: python {os.path.basename(sys.argv[0])} [--flag value ...]\n\n{inspect.getdoc(cls)}\n\n"
        + "\n".join(rows)
    )


def from_cli(cls: type, argv: list[str] | None = None):
    """Build the dataclass `cls` from `--name value`, `--name=value` or a bare `--switch` (true).

    Dashes and underscores in names are the same. A tuple field takes all words up to the next flag. If the class has
    a dict PRESETS, `--preset name` replaces defaults by those of the preset; flags given explicitly win. If it has a
    name FIRST, words before all flags are that flag's.
    raises: UserError for an unknown, repeated, mistyped or missing flag."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(_help(cls))
        raise SystemExit(0)
    if hasattr(cls, "FIRST") and words and not words[0].startswith("--"):
        words.insert(0, "--" + cls.FIRST)
    kinds, given = typing.get_type_hints(cls), {}
    while words:
        word = words.pop(0)
        name, _, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
            raise UserError(
                f"unknown flag {word.split('=')[0]!r}"
                + (f"; did you mean --{near[0]}?" if near else "")
                + " (--help lists all flags)"
            )
        if name in given:
            raise UserError(f"--{name} is given twice; keep one of them")
        values = [value] if "=" in word else []
        while "=" not in word and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        given[name] = _convert(name, kinds[name], values)
    presets = vars(cls).get("PRESETS", {})
    if "preset" in given and presets:
        if given["preset"] not in presets:
            raise UserError(f"unknown preset {given['preset']!r}; use {', '.join(presets)}")
        given = presets[given["preset"]] | given
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.name not in given
    ]
    if missing:
        raise UserError("missing " + ", ".join(f"--{m}" for m in missing))
    return cls(**given)


def run(main: Callable, cls: type) -> None:
    """Run a script: parse the flags, call `main(config)`; UserError and OSError become one line and exit code 2,
    numbers that are not finite (FloatingPointError) one line and exit code 1."""
    code = None
    try:
        main(from_cli(cls))
    except SystemExit as stop:  # kept as a number: its traceback would keep the networks alive, and `leave` wants them gone
        code = stop.code
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    finally:
        leave()
    if code is not None:
        raise SystemExit(code)


# ---------------------------------------------------------------- devices, processes, randomness
def leave() -> None:
    """Leave the process group, if in one. Sharded modules hold it in reference cycles: collected only at exit, they let
    gloo's threads outlive it and abort the process, once in a dozen runs [measured]."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def start(device: str = "auto") -> tuple[int, int, torch.device]:
    """Return (rank, world size, device); join the process group if torchrun set RANK."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device} was asked for but torch sees no GPU; use --device cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {device} must be cpu, cuda or auto")
    rank, world, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world = next(
            dist.rendezvous("env://")
        )  # torchrun restarts with the store of before: what was left there hangs
        store = dist.PrefixStore(
            f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )  # the new attempt [measured]
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            store=store,
            rank=rank,
            world_size=world,
        )
    return rank, world, torch.device(device)


def dtype_of(name: str, device: torch.device | str = "cpu", flag: str = "dtype") -> torch.dtype:
    """float32, bfloat16, or auto: bfloat16 on CUDA. Never float16: on a CPU it crawls. raises: UserError"""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--{flag} {name!r} must be float32, bfloat16 or auto")
    return (
        torch.bfloat16
        if name == "bfloat16" or (name == "auto" and torch.device(device).type == "cuda")
        else torch.float32
    )


class Stream(IntEnum):
    """What random numbers are for: the second number of every tuple that `generator` gets, so that no two uses meet."""

    VAE = 1
    TEACHER = 2
    PAIR = 3  # the noise a pair starts from
    ODE = 4  # stage 1
    STUDENT = 5  # stage 2
    CRITIC = 6
    WORD = 7  # the toy world's word vectors
    SHEET = 8  # samples shown while training
    SAMPLE = 9  # the noise of a clip that is generated
    CAPTION = 11
    CD = 12  # consistency distillation
    AR = 13  # the autoregressive teacher
    PLANS = 14  # which plans an iteration, or a shard of pairs, draws


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on all the numbers (seed, stream, index, ...): generator(0, 1) != generator(1, 0).

    Give one kind of thing tuples of one length: zeros at the end do not count, generator(1) == generator(1, 0)."""
    state = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM only set a flag; the loop asks `stop()` and ends at a step boundary."""
    caught = []
    old = {
        s: signal.signal(s, lambda *_: caught.append(1)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(caught)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------- files that are whole or absent
@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give a temporary name in the same folder; on success flush it and rename it to `path`, on failure remove it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(
        f".{path.stem}.{os.getpid()}.tmp{path.suffix}"
    )  # the suffix stays: video writers read it
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644)  # safetensors writes 0600
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def read_pickle(path: str | os.PathLike) -> dict:
    """Read a .pt or .pth file that holds a dictionary, without running what it may contain; tensors stay memory-mapped.

    raises: UserError naming the file when it is missing, damaged, or holds more than tensors and plain values."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    plain = [argparse.Namespace]  # a bag of settings, which many training scripts put in
    try:
        with torch.serialization.safe_globals(plain):
            tree = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # a damaged or hostile pickle may raise anything; weights_only keeps it from running
        code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        why = (
            f"it holds {code[1]}, that is, code that would run; save its tensors alone, as safetensors"
            if code
            else f"{type(error).__name__}; copy it again or convert it to safetensors"
        )
        raise UserError(
            f"{path} is not a checkpoint that loads with weights_only=True: {why}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not a dictionary of tensors")
    return tree
