"""Plumbing, no ideas: what every script needs and no reader comes here to learn.

- `run(main, Config)`   a typed dataclass is the command line; a user's mistake is one sentence and exit code 2
- `start()`             device and torchrun: the same script runs as one process or as many
- `atomic`, `read_pickle`   files that are whole or absent (checkpoints of models: weights.py)
- `generator`, `EMA`, `save_state`, `distribute`, `log_row`: what training loops share

No model, loss, sampler or training loop lives here, and nothing here is imported for its cleverness.

    python -c "import common; help(common)"
"""
import dataclasses
import difflib
import gc
import inspect
import json
import math
import os
import pathlib
import re
import signal
import sys
import types
import typing
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class UserError(ValueError):
    """A mistake the user can mend: its text is one sentence with the offending value and the fix."""


def within(config: object, what: str, **most: int) -> None:
    """Sizes of a network, often read from a stranger's file, are whole numbers (or tuples of them) from 1 to these.

    raises: UserError naming the first that is not, before anything is built from it"""
    for name, limit in most.items():
        value = getattr(config, name)
        for x in value if isinstance(value, tuple) else (value,):
            if not isinstance(x, int) or isinstance(x, bool) or not 1 <= x <= limit:
                raise UserError(f"the {what} config's {name} is {str(value)[:60]}; it must be from 1 to {limit}")


# ---------------------------------------------------------------- command line
def _convert(name: str, kind: type, words: list[str]):
    """Turn the words after a flag into a value of the field's type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # `str | None`
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:                           # `tuple[int, ...]`, `tuple[str, ...]`
        return tuple(_convert(name, typing.get_args(kind)[0], [w]) for w in words)
    if kind is bool and not words:
        return True
    if len(words) != 1:
        raise UserError(f"--{name} takes one value, got {len(words)}: {' '.join(words) or 'nothing'}")
    if kind is bool:
        if words[0].lower() not in ("true", "false"):
            raise UserError(f"--{name} is true or false, got {words[0]!r}")
        return words[0].lower() == "true"
    try:
        return kind(words[0])
    except ValueError:
        raise UserError(f"--{name} needs {'a whole number' if kind is int else 'a number'}, got {words[0]!r}") from None


def _help(cls: type) -> str:
    """The dataclass's own source is the help: one line per field, the trailing comment is its text; its own fields come first."""
    rows = []
    source = "".join(inspect.getsource(c) for c in cls.__mro__[-2::-1])
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", source, re.M))
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__):
        default = "required" if f.default is dataclasses.MISSING else f.default
        rows.append(f"  --{f.name:<18} {comments.get(f.name, '')}  [{default}]")
    return f"usage: python {os.path.basename(sys.argv[0])} [--flag value ...]\n\n{inspect.getdoc(cls)}\n\n" + "\n".join(rows)


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
            raise UserError(f"unknown flag {word.split('=')[0]!r}" + (f"; did you mean --{near[0]}?" if near else "")
                            + " (--help lists all flags)")
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
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in given]
    if missing:
        raise UserError("missing " + ", ".join(f"--{m}" for m in missing))
    return cls(**given)


def run(main: Callable, cls: type) -> None:
    """Run a script: parse the flags, call `main(config)`; UserError and OSError become one line and exit code 2,
    numbers that are not finite (FloatingPointError) one line and exit code 1."""
    try:
        main(from_cli(cls))
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        leave()


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
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, torch.device(device)


def dtype_of(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """float32, bfloat16, or auto: bfloat16 on CUDA. Never float16: on a CPU it crawls. raises: UserError"""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {name!r} must be float32, bfloat16 or auto")
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and torch.device(device).type == "cuda") else torch.float32


@contextmanager
def computing(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Linear layers, convolutions and attention in dtype, weights and sums as they are (autocast); float32: no change.

    Casts are not cached: a cast made without gradient would be reused with gradient, and the weight would get none.
    On a CPU attention is spelt out: under gradients the fused kernel takes twice as long in bfloat16 [measured]."""
    with ExitStack() as stack:
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype, cache_enabled=False))
            if device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on all the numbers (seed, stream, index, ...): generator(0, 1) != generator(1, 0).

    Give one kind of thing tuples of one length: zeros at the end do not count, generator(1) == generator(1, 0)."""
    state = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM only set a flag; the loop asks `stop()` and ends at a step boundary."""
    caught = []
    old = {s: signal.signal(s, lambda *_: caught.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
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
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # the suffix stays: video writers read it
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
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle may raise anything; weights_only keeps it from running
        raise UserError(f"{path} is not a checkpoint that loads with weights_only=True "
                        f"({type(error).__name__}); copy it again or convert it to safetensors") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not a dictionary of tensors")
    return tree


# ---------------------------------------------------------------- training helpers
def distribute(model: nn.Module, how: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Prepare a model for training on all processes, before its optimiser is made.

    "ddp": every process holds all of it, `sync_gradients` averages. "fsdp": FSDP2 shards each block and the rest;
    float32 masters, computation in `dtype`, gradients reduced in float32. Inputs are not cast: t needs its float32."""
    if how == "fsdp":
        if not dist.is_initialized():  # one process without torchrun
            cuda = next(model.parameters()).is_cuda
            dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    elif how != "ddp":
        raise UserError(f"--parallel {how!r} must be ddp or fsdp")
    return model


def split_batch(batch: int, micro: int, rank: int, world: int) -> tuple[int, int]:
    """Samples a forward pass and rounds accumulated, so that micro * rounds * world = batch; prints the product.

    micro = 0: the whole share of a process at once. raises: UserError if it does not divide."""
    micro = micro or max(batch // world, 1)
    if batch % (micro * world):
        raise UserError(f"--batch {batch} is not a multiple of --micro {micro} times {world} processes")
    rounds = batch // (micro * world)
    if rank == 0:
        print(f"{world} processes x {rounds} accumulated x {micro} = {batch} samples a step, in each direction", flush=True)
    return micro, rounds


def sync_gradients(model: nn.Module, how: str) -> None:
    """Average the gradients over the processes (FSDP has done so in its backward pass)."""
    if how == "ddp" and dist.is_initialized() and dist.get_world_size() > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, part in zip(grads, flat.div_(dist.get_world_size()).split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


def clip_gradients(model: nn.Module, limit: float, where: str) -> float:
    """Clip the gradient to this norm; return the norm before. raises: FloatingPointError saying `where` if not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise FloatingPointError(f"{where}: the gradient has norm {norm}; the last saved state is good")
    return norm


def mean_over_processes(value: float, device: torch.device) -> float:
    """Average a number over the processes: a loss for the log, or whether anyone was asked to stop."""
    if not dist.is_initialized():
        return value
    x = torch.tensor(value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    dist.all_reduce(x)
    return x.item() / dist.get_world_size()


class EMA:
    """Exponential moving average of a model's trainable parameters, kept in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: p.detach().clone().float() for k, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for k, p in model.named_parameters():
            self.shadow[k].lerp_(p.detach().float(), 1 - self.decay)

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Take over another average's values (whole tensors; sharded ones take their part)."""
        for k, mine in self.shadow.items():
            value = shadow[k].to(mine.device)
            if hasattr(mine, "device_mesh"):
                value = distribute_tensor(value, mine.device_mesh, mine.placements)
            mine.copy_(value)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Make the average the model's weights."""
        for m in model.modules():  # FSDP2 leaves parts gathered after a forward pass without a backward one
            if isinstance(m, FSDPModule):
                m.reshard()
        for k, p in model.named_parameters():
            p.copy_(self.shadow[k])


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Learning rate: linear warm-up, then half a cosine to zero."""
    return peak * min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The full state dict on the CPU, gathered if the model is sharded: call it on every process, use it on rank 0."""
    return get_model_state_dict(model, options=WHOLE)


def save_state(path: str | os.PathLike, step: int, config: dict, trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
               **averages: "EMA") -> None:
    """Write everything a run needs to go on exactly: step, config, models, optimisers, averages. Call it on every process."""
    tree = {"step": step, "config": json.dumps(config)}
    for name, (model, optimiser) in trained.items():
        tree[name] = whole_state(model)
        tree[name + ".optimiser"] = get_optimizer_state_dict(model, optimiser, options=WHOLE)
    for name, average in averages.items():
        tree[name] = {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).cpu() for k, v in average.shadow.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        with atomic(path) as tmp:
            torch.save(tree, tmp)
    if dist.is_initialized():
        dist.barrier()


def load_state(path: str | os.PathLike, config: dict, trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
               **averages: "EMA") -> int:
    """Load what `save_state` wrote; return the number of finished steps. The number of processes may differ.

    raises: UserError naming the settings that differ (`steps`, `out`, `save_every`, `micro` and the like may), or a
    damaged file."""
    tree = read_pickle(path)
    free = ("steps", "out", "resume", "save_every", "micro", "device", "parallel", "checkpointing", "sheet_every")
    try:
        then, step = json.loads(tree["config"]), int(tree["step"])
        differ = [k for k, v in json.loads(json.dumps(config)).items() if then.get(k) != v and k not in free]
        if differ:
            raise UserError(f"{path} was written by a run with other settings ({', '.join(f'{k}={then.get(k)!r}' for k in differ)}); "
                            "use them again, or another --out")
        for name, (model, optimiser) in trained.items():
            set_model_state_dict(model, tree[name], options=WHOLE)
            set_optimizer_state_dict(model, optimiser, tree[name + ".optimiser"], options=WHOLE)
        for name, average in averages.items():
            average.load(tree[name])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a whole state of this run ({type(error).__name__}); move it away to start again") from None
    return step


def trim_log(path: str | os.PathLike, step: int) -> None:
    """Drop the rows from this step on: a run that was killed after its last save does these steps again."""
    path = pathlib.Path(path)
    if path.exists() and (not dist.is_initialized() or dist.get_rank() == 0):
        kept = [line for line in path.read_text(encoding="utf-8").splitlines(True) if json.loads(line)["step"] < step]
        with atomic(path) as tmp:
            tmp.write_text("".join(kept), encoding="utf-8")


def log_row(path: str | os.PathLike, **row: float | int | str) -> None:
    """Append one JSON line; a line is complete or absent."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")

