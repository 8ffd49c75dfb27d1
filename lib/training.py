"""What training loops share, and nobody comes to learn: processes, precision, averages, and states to go on from exactly.

    for step, row in training_steps(...):      goes on after whatever ended the last run; saves, logs, stops on signals
        loss = ...                             the loop and its ideas stay in the script
        row["loss"] = ...

Weights, optimisers and averages are float32 whatever the precision of computation; a state is written whole or not at all.

    python -c "import training; help(training)"
"""

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

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
from tqdm import trange

from lib.common import UserError, atomic, read_pickle, stop_signals
from lib.picture import write_curves

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


# ---------------------------------------------------------------- processes and precision
def distribute(model: nn.Module, how: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Prepare a model for training on all processes, before its optimiser is made.

    "ddp": every process holds all of it, `sync_gradients` averages. "fsdp": FSDP2 shards each block and the rest;
    float32 masters, computation in `dtype`, gradients reduced in float32. Inputs are not cast: t needs its float32."""
    if how == "fsdp":
        if not dist.is_initialized():  # one process without torchrun
            cuda = next(model.parameters()).is_cuda
            dist.init_process_group(
                "nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1
            )
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    elif how != "ddp":
        raise UserError(f"--parallel {how!r} must be ddp or fsdp")
    return model


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


@contextmanager
def inference() -> Iterator[None]:
    """No gradient, and what that allows within `computing`: each weight is cast once, until the end of the block, and attention on a
    CPU is the fused one again, which is the faster as long as nothing is differentiated [measured: 1.4 times]."""
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


def split_batch(batch: int, micro: int, rank: int, world: int) -> tuple[int, int]:
    """Samples a forward pass and rounds accumulated, so that micro * rounds * world = batch; prints the product.

    micro = 0: the whole share of a process at once. raises: UserError if it does not divide."""
    micro = micro or max(batch // world, 1)
    if batch % (micro * world):
        raise UserError(
            f"--batch {batch} is not a multiple of --micro {micro} times {world} processes"
        )
    rounds = batch // (micro * world)
    if rank == 0:
        print(
            f"{world} processes x {rounds} accumulated x {micro} = {batch} samples a step, in each direction",
            flush=True,
        )
    return micro, rounds


def sync_gradients(model: nn.Module, how: str) -> None:
    """Average the gradients over the processes (FSDP has done so in its backward pass)."""
    if how == "ddp" and dist.is_initialized() and dist.get_world_size() > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, part in zip(
            grads, flat.div_(dist.get_world_size()).split([g.numel() for g in grads])
        ):
            g.copy_(part.view_as(g))


def clip_gradients(model: nn.Module, limit: float, where: str) -> float:
    """Clip the gradient to this norm; return the norm before. raises: FloatingPointError saying `where` if not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"{where}: the gradient has norm {norm}; the last saved state is good"
        )
    return norm


def mean_over_processes(value: float, device: torch.device) -> float:
    """Average a number over the processes: a loss for the log, or whether anyone was asked to stop."""
    if not dist.is_initialized():
        return value
    x = torch.tensor(
        value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
    )
    dist.all_reduce(x)
    return x.item() / dist.get_world_size()


def finite_means(
    sums: list[float], lost: list[int], what: str, device: torch.device
) -> list[float]:
    """The mean over the processes of each direction's loss, forward and backward.

    lost: this process's samples whose loss is not finite. raises: FloatingPointError, on all processes, that names them"""
    means = [mean_over_processes(x, device) for x in sums]
    if not all(map(math.isfinite, means)):
        where = f"sample {', '.join(map(str, lost))}" if lost else "a sample of another process"
        raise FloatingPointError(
            f"{what} is {means} (forward, backward), through {where}; the last saved state is good"
        )
    return means


# ---------------------------------------------------------------- weights and states
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
        for m in (
            model.modules()
        ):  # FSDP2 leaves parts gathered after a forward pass without a backward one
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


def save_state(
    path: str | os.PathLike,
    step: int,
    config: dict,
    trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
    **averages: "EMA",
) -> None:
    """Write everything a run needs to go on exactly: step, config, models, optimisers, averages. Call it on every process."""
    tree = {"step": step, "config": json.dumps(config)}
    for name, (model, optimiser) in trained.items():
        tree[name] = whole_state(model)
        tree[name + ".optimiser"] = get_optimizer_state_dict(model, optimiser, options=WHOLE)
    for name, average in averages.items():
        tree[name] = {
            k: (v.full_tensor() if hasattr(v, "full_tensor") else v).cpu()
            for k, v in average.shadow.items()
        }
    if not dist.is_initialized() or dist.get_rank() == 0:
        with atomic(path) as tmp:
            try:
                torch.save(tree, tmp)
            except RuntimeError as error:  # how torch reports a full disk
                raise OSError(
                    f"cannot write {path}, is the disk full? The last state is intact ({str(error).splitlines()[0]})"
                ) from None
    if dist.is_initialized():
        dist.barrier()


def load_state(
    path: str | os.PathLike,
    config: dict,
    trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
    **averages: "EMA",
) -> int:
    """Load what `save_state` wrote; return the number of finished steps. The number of processes may differ.

    raises: UserError naming the settings that differ (`steps`, `out`, `save_every`, `micro` and the like may), or a
    damaged file."""
    tree = read_pickle(path)
    free = (
        "steps",
        "out",
        "save_every",
        "micro",
        "device",
        "parallel",
        "checkpointing",
        "compile",
        "sheet_every",
    )
    try:
        then, step = json.loads(tree["config"]), int(tree["step"])
        differ = [
            k
            for k, v in json.loads(json.dumps(config)).items()
            if then.get(k) != v and k not in free
        ]
        if differ:
            raise UserError(
                f"{path} was written by a run with other settings ({', '.join(f'{k}={then.get(k)!r}' for k in differ)}); "
                "use them again, or another --out"
            )
        for name, (model, optimiser) in trained.items():
            set_model_state_dict(model, tree[name], options=WHOLE)
            set_optimizer_state_dict(model, optimiser, tree[name + ".optimiser"], options=WHOLE)
        for name, average in averages.items():
            average.load(tree[name])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a whole state of this run ({type(error).__name__}); move it away to start again"
        ) from None
    return step


def trim_log(path: str | os.PathLike, step: int) -> None:
    """Drop the rows from this step on, and what is no row: a run that was killed after its last save does these steps again."""
    path = pathlib.Path(path)
    if path.exists() and (not dist.is_initialized() or dist.get_rank() == 0):
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(True):
            with suppress(ValueError):  # cut off by a full disk
                kept += [line] if json.loads(line)["step"] < step else []
        with atomic(path) as tmp:
            tmp.write_text("".join(kept), encoding="utf-8")


def log_row(path: str | os.PathLike, **row: float | int | str) -> None:
    """Append one JSON line; a line is complete or absent."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def training_steps(
    config,
    name: str,
    trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
    device: torch.device,
    averages: dict[str, "EMA"] | None = None,
    prefix: str = "",
) -> Iterator[tuple[int, dict[str, float]]]:
    """The steps of a run that are not done yet, as (step, row): what the body puts into row is logged, with its seconds.

    config: has `out`, `steps` and `save_every`. The folder `out` gets log.jsonl, its curves.png and state.pt (with the prefix in front);
    a run goes on from the last, exactly, wherever and however it ended. SIGINT or SIGTERM: the step is finished and saved, and the script
    ends with code 0. Every process calls this. raises: UserError if the state is damaged or of other settings"""
    out, averages, first = pathlib.Path(config.out), averages or {}, 0
    state, log, rank = (
        out / f"{prefix}state.pt",
        out / f"{prefix}log.jsonl",
        dist.get_rank() if dist.is_initialized() else 0,
    )
    if state.exists():
        first = load_state(state, dataclasses.asdict(config), trained, **averages)
        trim_log(log, first)
    out.mkdir(parents=True, exist_ok=True)
    with (
        stop_signals() as stop,
        trange(
            first, config.steps, initial=first, total=config.steps, desc=name, disable=rank > 0
        ) as bar,
    ):
        for step in bar:
            began, row = time.perf_counter(), {}
            yield step, row
            last, stopping = (
                step + 1 == config.steps,
                mean_over_processes(float(stop()), device) > 0,
            )
            if row and rank == 0:
                log_row(log, step=step, seconds=round(time.perf_counter() - began, 3), **row)
                bar.set_postfix(
                    {k: f"{v:.4f}" for k, v in row.items() if not k.startswith(("norm", "motion"))}
                )
            if (step + 1) % config.save_every == 0 or last or stopping:
                save_state(state, step + 1, dataclasses.asdict(config), trained, **averages)
                if rank == 0:
                    write_curves(out / f"{prefix}curves.png", log)
                if stopping and not last:
                    if rank == 0:
                        print(
                            f"stopped at step {step + 1}; run the same command to go on", flush=True
                        )
                    raise SystemExit(0)
