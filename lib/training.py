"""What training loops share, and nobody comes to learn: processes, precision, rates, the loop.

    for step, row in training_steps(...):    goes on after whatever ended the last run
        loss = ...                           the loop and its ideas stay in the script
        row["loss"] = ...                    what is logged

Weights, optimisers and averages are float32 whatever the precision of computation. What lies in
the folder of a run, and how to take a student out of it: states.py.

    python -c "import lib.training; help(lib.training)"
"""

import dataclasses
import gc
import json
import math
import os
import pathlib
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import trange

from lib.common import (
    HOST,
    UserError,
    atomic,
    check_out,
    clear_temporaries,
    dtype_of,
    end_stopped,
    is_first,
    say,
    stop_signals,
)
from lib.picture import write_curves
from lib.states import EMA, Trained, contents, load_state, save_state

RANGES = {  # of the flags that trainings share; 0 is "off" for those that may be 0 and count
    "steps": (1, 10**9),
    "schedule_steps": (0, 10**9),
    "batch": (1, 2**20),
    "micro": (0, 2**20),
    "lr": (0, 1),
    "lr_matrices": (0, 1),
    "warmup": (0, 10**9),
    "decay": (0, 1),
    "betas": (0, 0.99999, 2),
    "weight_decay": (0, 1),
    "clip": (0, 1e9),
    "ema": (0, 0.99999),
    "latent": (1, 10000, 3),
    "denoising": (1e-3, 1000),
    "save_every": (0, 10**9),
    "keep": (0, 10**9),
    "parallel": ("ddp", "fsdp"),
    "dtype": ("auto", "bfloat16", "float32"),
}


@dataclasses.dataclass
class Training:
    """The flags of every training on plans; a script's Config adds its own, or other defaults."""

    RANGES = RANGES
    latent: tuple[int, ...] = (21, 4, 4)  # latents, height and width of the grid
    plans: str = "any"  # which plans are trained: paper (two, 21 latents), any (plans.py) [ours]
    block: int = 3  # B: latents a step [paper]
    anchors: int = 3  # P: anchors before each backward block [paper]; 0 uses the dummy block
    head: int = 0  # size of the block of latent 0 if not --block (--block 6 --anchors 0 --head 3)
    share_noise: str = "none"  # at which levels an anchor has its latent's noise: none, start, all
    shift: float = 5.0  # of the noise levels [paper]
    micro: int = 0  # samples a forward pass, the rest is accumulated; 0: all of a process's share
    betas: tuple[float, ...] = (0.9, 0.999)  # of AdamW [paper]
    weight_decay: float = 0.01  # of AdamW [paper]
    clip: float = 10.0  # gradient norm, 0: not clipped [Self-Forcing]
    seed: int = 0
    save_every: int = 200  # iterations between resume states; 0: one at the end
    keep: int = 0  # keep the state of every so many iterations; 0: only the last
    parallel: str = "ddp"  # ddp, or fsdp: shard all networks that are trained [paper]
    checkpointing: bool = False  # recompute activations in the backward pass
    compile: bool = False  # torch.compile the blocks: faster steps, after minutes
    dtype: str = "bfloat16"  # of computation and frozen networks; all else is float32
    device: str = "auto"


# ---------------------------------------------------------------- processes and precision
def prepare(model: nn.Module, config, trained: bool) -> nn.Module:
    """A network as a run asks for it: learning or not, recomputing, compiled, on all processes."""
    model.requires_grad_(trained).train(trained)
    model.checkpointing = config.checkpointing
    if config.compile:
        model.compile_blocks()
    return distribute(model, config.parallel, dtype_of(config.dtype))


def distribute(model: nn.Module, how: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Prepare a model for training on all processes, before its optimiser is made.

    "ddp": every process holds all of it, `sync_gradients` averages. "fsdp": FSDP2 shards each block
    and the rest; float32 masters, computation in `dtype`, gradients reduced in float32. Inputs are
    not cast: t needs its float32."""
    if how == "ddp":
        return model
    if not dist.is_initialized():  # one process without torchrun
        backend = "nccl" if next(model.parameters()).is_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # a block hands out keys and values for a cache, views, and nobody writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


@contextmanager
def computing(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Linear layers, convolutions and attention in dtype, the rest as it is; float32: no change.

    Casts are not cached: a cast made without gradient would be reused with gradient, and the weight
    would get none. Of attention on a CPU, what lib/cpu.py leaves to torch is spelt out: under
    gradients the fused kernel takes twice as long in bfloat16 [measured]."""
    if dtype == torch.float32:
        yield
        return
    spelt_out = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype, cache_enabled=False), spelt_out:
        yield


@contextmanager
def inference() -> Iterator[None]:
    """No gradient, and what that allows within `computing`.

    Each weight is cast once, until the end of the block, and attention on a CPU is the fused one
    again: the faster as long as nothing is differentiated [measured: 1.4 times]."""
    cached = torch.is_autocast_cache_enabled()
    with (
        torch.no_grad(),
        sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    ):
        torch.set_autocast_cache_enabled(True)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            torch.clear_autocast_cache()


def split_batch(batch: int, micro: int, rank: int, world: int) -> list[list[int]]:
    """The numbers of this process's samples, a list for each forward pass; prints how many.

    micro: samples a pass, 0: the whole share of a process at once
    raises: UserError if processes and passes do not share the batch evenly"""
    micro = micro or max(batch // world, 1)
    if batch % (micro * world):
        raise UserError(
            f"--batch {batch} is not a multiple of --micro {micro} times {world} processes"
        )
    rounds = batch // (micro * world)
    product = f"{world} processes x {rounds} accumulated x {micro} = {batch}"
    say(f"{product} samples a step, in each direction")
    firsts = [(r * world + rank) * micro for r in range(rounds)]
    return [list(range(first, first + micro)) for first in firsts]


def sync_gradients(model: nn.Module, how: str) -> None:
    """Average the gradients over the processes (FSDP has done so in its backward pass)."""
    if how != "ddp" or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    for g, part in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))


def clip_gradients(model: nn.Module, limit: float, where: str) -> float:
    """Clip the gradient to this norm, 0: not at all; return the norm before.

    raises: FloatingPointError saying `where` if it is not finite"""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"{where}: the gradient has norm {norm}; the last saved state is good"
        )
    return norm


def apply_gradients(
    model: nn.Module, optimisers: Iterable[torch.optim.Optimizer], config, where: str
) -> float:
    """Average the gradient over the processes, clip it, step; return its norm before clipping."""
    sync_gradients(model, config.parallel)
    norm = clip_gradients(model, config.clip, where)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return norm


def mean_over_processes(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Average named numbers over the processes: losses for the log, or who was asked to stop."""
    if not dist.is_initialized():
        return values
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    x = torch.tensor(list(values.values()), dtype=dtype, device=device)
    dist.all_reduce(x)
    return dict(zip(values, (x / dist.get_world_size()).tolist()))


def finite_means(
    losses: dict[str, list[Tensor]], rounds: list[list[int]], what: str, device: torch.device
) -> dict[str, float]:
    """The mean over rounds and processes of each named loss, a tensor [B] a round.

    rounds: the samples whose losses they are (`split_batch`)
    raises: FloatingPointError, on all processes, that names the losses and the samples"""
    means = {k: sum(x.mean().item() / len(rounds) for x in xs) for k, xs in losses.items()}
    means = mean_over_processes(means, device)
    if all(map(math.isfinite, means.values())):
        return means
    shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
    lost = []
    for parts in losses.values():
        for samples, x in zip(rounds, parts):
            lost += [j for j, good in zip(samples, x.isfinite().tolist()) if not good]
    where = f"sample {', '.join(map(str, lost))}" if lost else "a sample of another process"
    raise FloatingPointError(f"{what} is {shown}, through {where}; the last saved state is good")


# ---------------------------------------------------------------- optimisers and their rates
def optimisers_of(
    dit: nn.Module, lr: float, lr_matrices: float, betas: tuple[float, float], decay: float
) -> dict[torch.optim.Optimizer, float]:
    """AdamW, and Muon for the matrices of the blocks, if it has a rate; each with its rate."""
    matrices = [p for p in dit.blocks.parameters() if p.ndim == 2 and lr_matrices]
    chosen = set(matrices)
    rest = [p for p in dit.parameters() if p not in chosen]
    rates = {torch.optim.AdamW(rest, lr, betas, weight_decay=decay): lr}
    if matrices:
        rates[torch.optim.Muon(matrices, lr_matrices, weight_decay=decay)] = lr_matrices
    return rates


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine to zero."""
    share = min(step / steps, 1.0)
    return peak * min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * share)) / 2


def trapezoid(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay` of the steps."""
    up = (step + 1) / max(warmup, 1)
    down = max(steps - step, 1) / max(steps * decay, 1)
    return peak * min(1.0, up, down)


# ---------------------------------------------------------------- the folder of a run
@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Hold a lock file; the operating system frees it however the process ends, so none is stale.

    raises: UserError naming the process that holds it"""
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    path, me = pathlib.Path(path), f"process {os.getpid()} on {HOST}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") == me:
        gc.collect()  # a run of this process that ended by an exception, and is not yet gone
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8") or "another run"
            raise UserError(
                f"{path.parent} is in use by {holder} ({path.name}); wait for it, stop it, "
                "or use another --out"
            ) from None
        except OSError as error:
            say(f"note: {path.parent} cannot be locked ({error}); see that no other run writes it")
        file.truncate(0)
        file.write(me)
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def trim_log(path: str | os.PathLike, step: int) -> None:
    """Drop the rows from this step on, and what is no row.

    A run that was killed after its last save does these steps again."""
    path = pathlib.Path(path)
    if not path.exists() or not is_first():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(True):
        with suppress(ValueError, KeyError, TypeError):  # cut off by a full disk
            if json.loads(line)["step"] < step:
                kept.append(line)
    with atomic(path) as tmp:
        tmp.write_text("".join(kept), encoding="utf-8")


def log_row(path: str | os.PathLike, **row: float | int | str) -> None:
    """Append one JSON line; a line is complete or absent."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------- the steps of a run
def training_steps(
    config,
    name: str,
    trained: Trained,
    device: torch.device,
    averages: dict[str, EMA] | None = None,
    prefix: str = "",
) -> Iterator[tuple[int, dict[str, float]]]:
    """The steps of a run that are not done yet, as (step, row); what is put into row is logged.

    config: a dataclass with `out`, `steps`, `save_every` (0: only at the end) and, if it likes,
    `keep`; a tuple FREE of its class names what may change when a run goes on, UNREAD the files
    that training does not read. The folder `out` gets, with the prefix in front, log.jsonl, its
    curves.png, state.pt and, every `keep` steps, a copy such as state-000200.pt; copied back to
    state.pt, a run goes on from there.
    A run goes on from its last state, exactly, however it ended. SIGINT or SIGTERM: the step is
    finished and saved, and the script ends with code 130 or 143. Every process calls this.
    raises: UserError if the folder is in use, or the state damaged or of other settings"""
    out = check_out(config.out, folder=True)
    state, log = out / f"{prefix}state.pt", out / f"{prefix}log.jsonl"
    settings, averages = dataclasses.asdict(config), averages or {}
    settings |= contents(settings, getattr(type(config), "UNREAD", ()))
    every, total = settings.get("keep", 0), config.steps
    with locked(out / f"{prefix}lock") if is_first() else nullcontext(), stop_signals() as stop:
        if is_first():
            clear_temporaries(out)
        first = 0
        if state.exists():
            first = load_state(state, settings, trained, getattr(config, "FREE", ()), **averages)
            trim_log(log, first)
            rest = "" if first < total else "; nothing left to do"
            say(f"{state}: resuming at step {first} of {total}{rest}")
        quiet = not is_first()
        bar = trange(first, total, initial=first, total=total, desc=name, disable=quiet)
        for step in bar:
            began, row = time.perf_counter(), {}
            yield step, row
            done = step + 1
            stopping = mean_over_processes({"stop": float(stop())}, device)["stop"] > 0
            if row and is_first():
                log_row(log, step=step, seconds=round(time.perf_counter() - began, 3), **row)
                hidden = ("norm", "motion")
                bar.set_postfix({k: f"{v:.4f}" for k, v in row.items() if not k.startswith(hidden)})
            keeping = every > 0 and done % every == 0
            saving = config.save_every > 0 and done % config.save_every == 0
            if saving or keeping or stopping or done == total:
                save_state(state, done, settings, trained, **averages)
                if is_first() and log.exists():
                    write_curves(out / f"{prefix}curves.png", log)
                if is_first() and keeping:
                    with atomic(out / f"{prefix}state-{done:06d}.pt") as tmp:
                        shutil.copyfile(state, tmp)
            if stopping and done < total:
                bar.close()
                say(f"stopped at step {done}; run the same command to go on")
                end_stopped(stop())
