"""Plumbing, no ideas: what every script needs and no reader comes here to learn.

- `run(main, Config)`     a user's mistake is one sentence and exit code 2 (the flags: cli.py)
- `start()`               device and torchrun: a script runs as one process or as many
- `generator`             randomness as a function of numbers
- `check_out`, `atomic`   a bad place for output is refused first; files are whole or absent
- `fingerprint`           what a network is, whatever file it lies in

No model, loss, sampler or training loop lives here, and nothing is imported for its cleverness.
Checkpoints of models are in weights.py, what training loops share is in training.py.

    python -c "import lib.common; help(lib.common)"
"""

import argparse
import gc
import glob
import hashlib
import os
import pathlib
import re
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from lib.cli import UserError, from_cli

# how torch says so
NO_MEMORY = "out of memory|not enough memory|can't allocate memory|size calculation overflowed"


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it interrupts as Ctrl-C does."""


def run(main: Callable, cls: type) -> None:
    """Run a script: parse the flags, call `main(config)`; what goes wrong is one line.

    Exit codes: 2 for UserError and OSError, 1 for numbers that are not finite and for too little
    memory, 130 for Ctrl-C, 143 for SIGTERM. Any other exception is a bug, with its traceback."""
    code = None  # exceptions end here, for a traceback would keep networks from `leave`
    if hasattr(sys.stdout, "reconfigure"):  # no letter that a terminal lacks ends a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(from_cli(cls))
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        code = 143 if isinstance(stop, Terminated) else 130
    except (UserError, OSError) as error:
        code = _fail(str(error), 2)
    except FloatingPointError as error:
        code = _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        advice = "a smaller --batch, --micro, --size or --latent needs less"
        code = _fail(f"out of memory; {advice}. {str(error)[:200]}", 1)
    finally:
        leave()
    if code is not None:
        raise SystemExit(code)


def _fail(sentence: str, code: int) -> int:
    """Say what went wrong, in one line; the exit code."""
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return code


# ---------------------------------------------------------------- devices, processes, randomness
def leave() -> None:
    """Leave the process group, if in one.

    Sharded modules hold it in reference cycles: collected only at exit, they let gloo's threads
    outlive it and abort the process, once in a dozen runs [measured]."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is process 0, which writes and speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(sentence: str) -> None:
    """Print a line once, whatever the number of processes."""
    if is_first():
        print(sentence, flush=True)


def launched() -> bool:
    """Whether torchrun started this process: all of its variables are there. raises: UserError

    Schedulers set some of them for purposes of their own: those are named and not believed."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    there = [name for name in names if os.environ.get(name)]
    absent = [name for name in names if name not in there]
    if absent:
        if there:
            sets = f"{', '.join(there)} set but {', '.join(absent)} not"
            say(f"note: {sets}, so this is no job of torchrun; running as one process")
        return False
    for name in ("MASTER_PORT", "LOCAL_RANK"):
        if not (os.environ.get(name) or "0").isdecimal():
            raise UserError(f"{name}={os.environ[name]} is no number; unset it")
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(f"RANK={rank} and WORLD_SIZE={world} name no process of a job; unset them")
    return True


MEETING = timedelta(minutes=5)  # how long the processes of a job wait for one another


def meet() -> tuple[dist.Store, int, int]:
    """The store of torchrun's job, this process's rank, and their number. raises: UserError"""
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
    except (dist.DistError, ValueError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        job = " ".join(f"{name}={os.environ[name]}" for name in names)
        why = str(error).splitlines()[0]
        raise UserError(f"{job}: the processes of this job do not meet ({why})") from None
    store.set_timeout(dist.default_pg_timeout)
    return store, rank, world


def start(device: str = "auto") -> tuple[int, int, torch.device]:
    """Return (rank, world size, device); join the process group if torchrun is there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device} must be cpu, cuda or auto")
    if device != "cpu" and int(device[5:] or 0) >= gpus:
        raise UserError(f"--device {device}: torch sees {gpus or 'no'} GPU; use --device cpu")
    many = launched()
    rank = int(os.environ["RANK"]) if many else 0
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK") or rank % gpus) if many else 0
        if local >= gpus:
            raise UserError(f"LOCAL_RANK={local}, but torch sees {gpus} GPU; start fewer processes")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if not many:
        return 0, 1, torch.device(device)
    if not dist.is_initialized():
        # torchrun restarts with the store of before: what was left there hangs the new attempt
        # [measured], so that each attempt gets names of its own
        store, rank, world = meet()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt {attempt}", store)
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def dtype_of(name: str, device: torch.device | str = "cpu", flag: str = "dtype") -> torch.dtype:
    """float32, bfloat16, or auto: bfloat16 on CUDA. Never float16: on a CPU it crawls.

    raises: UserError"""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--{flag} {name!r} must be float32, bfloat16 or auto")
    on_cuda = torch.device(device).type == "cuda"
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and on_cuda) else torch.float32


class Stream(IntEnum):
    """What random numbers are for, so that no two uses meet.

    It is the second of the numbers that `generator` gets, behind the seed."""

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
    """A CPU generator that depends on all the numbers: (seed, stream, index, ...).

    Their order counts: generator(0, 1) != generator(1, 0). Zeros at the end do not,
    generator(1) == generator(1, 0): give one kind of thing tuples of one length."""
    state = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within the block SIGINT and SIGTERM are only noted.

    The loop asks `stop()`, the signal or 0, and ends where it may, by `end_stopped` if its work is
    not done. A second Ctrl-C is a KeyboardInterrupt at once; what comes within a second is no
    second one: torchrun hands the terminal's on to processes that have had it already."""
    caught = []  # the first signal and when it came

    def note(number: int, frame: object) -> None:
        if not caught:
            caught.extend((number, time.monotonic()))
            os.write(2, b"\nfinishing what is at hand, then stopping; Ctrl-C stops at once\n")
        elif number == signal.SIGINT and time.monotonic() - caught[1] > 1:
            raise KeyboardInterrupt

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def end_stopped(number: int) -> NoReturn:
    """End with the exit code of a command that a signal stopped, 128 + number: what `make` or a
    script does next would find the work half done. 0: another process of the run had the signal."""
    raise SystemExit(128 + (number or signal.SIGTERM))


# ---------------------------------------------------------------- files that are whole or absent
def check_out(
    path: str | os.PathLike,
    flag: str = "out",
    folder: bool = False,
    inputs: Iterable[str | os.PathLike] = (),
) -> pathlib.Path:
    """Refuse a place for output that cannot be one; to be called before any work, writes nothing.

    folder: a folder is wanted, not a file;  inputs: files that are read and must not be replaced
    returns: the path, `~` expanded.  raises: UserError"""
    if not str(path).strip():
        raise UserError(f"--{flag} is empty; name a {'folder' if folder else 'file'}")
    path = pathlib.Path(path).expanduser()
    if folder and path.exists() and not path.is_dir():
        raise UserError(f"--{flag} {path} is a file; name a folder")
    if not folder and (path.is_dir() or not path.name):
        raise UserError(f"--{flag} {path} is a folder; name a file in it")
    for other in inputs:
        other = pathlib.Path(other).expanduser()
        if path.exists() and other.exists() and path.samefile(other):
            raise UserError(f"--{flag} {path} is also what is read; name another file")
    place = path if folder else path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"--{flag} {path} cannot be made: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--{flag} {path} cannot be written: {place} is Read-only or not yours")
    return path


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give a temporary name in the same folder; on success flush it and rename it to `path`.

    On failure it is removed; what a killed process left of the same file is removed, too."""
    path = pathlib.Path(path).expanduser()
    if path.is_dir() or not path.name:
        raise UserError(f"{path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_temporaries(path.parent, path.stem, path.suffix)
    # the suffix stays, for video writers read it
    tmp = path.with_name(f".{path.stem[:100]}.{HOST}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.umask(mask := os.umask(0))  # it can only be read by setting it
        with suppress(OSError):  # some mounts refuse
            os.chmod(tmp, 0o666 & ~mask)  # safetensors writes 0600
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


HOST = re.sub(r"\W", "-", socket.gethostname())[:40]


def clear_temporaries(folder: pathlib.Path, stem: str = "", suffix: str = "") -> None:
    """Remove what `atomic` left in killed processes of this host, of one file or of all."""
    name = glob.escape(stem[:100]) if stem else "*"
    for old in folder.glob(f".{name}.{HOST}.*.tmp{glob.escape(suffix) or '*'}"):
        process = old.name[: old.name.rindex(".tmp")].rpartition(".")[2]
        if not process.isdecimal():
            continue
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            old.unlink(missing_ok=True)
        except OSError:
            pass  # it runs, and is somebody else's


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Name a network by its weights, whatever file they lie in and in whatever order.

    It looks at some thousand numbers of a large tensor: any training changes them."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        some = x.detach().reshape(-1)[:: max(1, x.numel() // 1024)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# what many training scripts put beside their tensors: settings, and numpy's numbers and arrays
NUMPY = [
    (getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
    for name in ("scalar", "_reconstruct")
    for core in ("core", "_core")  # before numpy 2, and since
]
KINDS = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
PLAIN = [argparse.Namespace, np.ndarray, np.dtype, *KINDS, *NUMPY]


def read_pickle(path: str | os.PathLike) -> dict:
    """Read a .pt or .pth file that holds a dictionary, without running what it may contain.

    Tensors stay memory-mapped. raises: UserError naming the file when it is missing, damaged, or
    holds more than tensors and plain values."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals(PLAIN):
            mapped = zipfile.is_zipfile(path)
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or hostile pickle may raise anything; it does not run
        why = f"{type(error).__name__}; copy it again or convert it to safetensors"
        if code := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            why = f"it holds {code[1]}, that is, code that would run; save its tensors alone"
        raise UserError(
            f"{path} is not a checkpoint that loads with weights_only=True: {why}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not a dictionary of tensors")
    return tree
