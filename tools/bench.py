"""One honest stopwatch: how long each part of generating and training takes, and how near that is
to the machine.

Random weights of a preset's size: speed does not depend on them. The clock is read after the device
has finished; every number is a median over --runs after a warm-up, and the machine's own rate of
matrix products is measured beside them.

    python -m tools.bench                          # the toy, here
    python -m tools.bench --preset toy64 --train   # a wider one, and the updates of both stages
    python -m tools.gpu                            # Wan2.1's sizes, on a GPU, and much else
"""

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import anchors
import train_dmd
from anchors import Plan, View, both_directions
from dit import PRESETS, DiT, DiTConfig
from generate import decode_in_order
from kvcache import KVCache
from lib.common import UserError, atomic, dtype_of, run, start
from lib.cpu import linear
from sampler import Recipe, clean_pass, few_steps, noise_seeded, rollout
from tools.count import pass_flops
from tools.memory import network, stage_1, stage_2, trainable
from vae import PRESETS as VAES
from vae import VAE, VAEConfig

SIZES = {  # transformer, VAE, height, width
    "toy": ("toy", "toy", 32, 32),
    "toy64": ("toy64", "toy", 64, 64),
    "wan": ("wan1.3b", "wan", 480, 832),
}
SINKS = View(6, True, True)
ORDERS = {  # rows of the table, as the paper's Table 7 has them
    "forward": anchors.forward(21),
    "forward, both sinks": anchors.forward(21, view=SINKS),
    "backward, P = 3": anchors.backward(21),
    "backward, P = 3, both sinks": anchors.backward(21, view=SINKS),
    "inbetween, 15 latents": anchors.inbetween(given=True),
}


@dataclass
class Config:
    """Measure speed and memory."""

    preset: str = "toy"  # toy, toy64 or wan
    runs: int = 5  # timed repetitions, after one that warms up
    compile: bool = False  # torch.compile the transformer's blocks
    train: bool = False  # also the updates of both stages, one sample, without the optimiser
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    vae_dtype: str = "float32"  # of the VAE
    device: str = "auto"
    out: str = ""  # also write everything as .json


# ---------------------------------------------------------------- the clock
class Clock:
    """Seconds, read when the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def median_of(clock: Clock, runs: int, what: Callable[[], object]) -> float:
    """Median seconds of a call, after one that warms up."""
    return medians(clock, runs, what)[0]


def medians(clock: Clock, runs: int, *calls: Callable[[], object]) -> list[float]:
    """Median seconds of each call. They take turns, so that a slow minute slows all; the first turn
    warms up."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(runs + 1):
        for mine, call in zip(times, calls):
            began = clock.now()
            call()
            mine.append(clock.now() - began)
    return [statistics.median(mine[1:]) for mine in times]


@contextmanager
def peak_of(device: torch.device) -> Iterator[Callable[[], float]]:
    """Give a function that tells the peak GiB: of the GPU inside the block; on a CPU of the process
    since its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 2**30
    else:
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here."""
    n = 8192 if clock.device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=clock.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_of(clock, 10, lambda: linear(a, b, b[0]))


def copy_rate(clock: Clock) -> float:
    """Bytes a second that a large copy reads and writes here."""
    a = torch.ones(2**29 if clock.device.type == "cuda" else 2**25, device=clock.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / median_of(clock, 10, lambda: b.copy_(a))


# ---------------------------------------------------------------- generating
def autoencoder(c: VAEConfig, dtype: torch.dtype, device: torch.device) -> VAE:
    """A VAE with random weights."""
    with torch.device(device):
        return VAE(c).to(dtype).eval().requires_grad_(False)


def context(
    dit: DiT, kv: list, reads: int, h: int, w: int, dtype: torch.dtype
) -> tuple[KVCache, tuple[tuple[int, int], ...]]:
    """A cache that holds the first `reads` latents of a clip, and how to read them all."""
    device = dit.patch_embedding.weight.device
    cache = KVCache(dit.config, 1, reads, h, w, dtype, device)
    x, pos = torch.randn(1, reads, dit.config.in_dim, h, w, device=device), torch.arange(reads)
    clean = dit(x, torch.zeros(1, reads, device=device), kv, pos.to(device), keys_only=True)
    cache.write(tuple(range(reads)), clean)
    return cache, tuple((i, i) for i in range(reads))


def parts(
    clock: Clock, dit: DiT, vae: VAE, text: Tensor, h: int, w: int, runs: int, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of the parts of forward generation, in the last block of 21 latents: three latents
    that see eighteen.

    text: embeddings [1, L, text_dim];  h, w: cells of a latent;  dtype: of the cache"""
    B, kv = 3, dit.text_kv(text)
    cache, reads = context(dit, kv, 18, h, w, dtype)
    past = cache.read(reads)
    x = torch.randn(1, B, dit.config.in_dim, h, w, device=clock.device)
    pos = torch.arange(18, 18 + B, device=clock.device)
    t = torch.full((1, B), 625.0, device=clock.device)
    _, state = vae.decode_chunk(x[:, :1], None)
    calls = {
        "text: keys and values, once a prompt": lambda: dit.text_kv(text),
        "cache: turn 18 latents' keys, once a block": lambda: cache.read(reads),
        "denoising step, 3 latents see 21": lambda: dit(x, t, kv, pos, past=past),
        "commit pass": lambda: dit(x, 0 * t, kv, pos, past=past, keys_only=True),
        "VAE, 3 latents": lambda: vae.decode_chunk(x, state),
    }
    return {name: median_of(clock, runs, call) for name, call in calls.items()}


def share_of_rate(c: DiTConfig, tokens: int, found: dict[str, float], rate: float) -> float:
    """What part of the matmul rate the denoising step among `parts` reaches."""
    work = pass_flops(c, 3 * tokens, 21 * tokens)
    return work / found["denoising step, 3 latents see 21"] / rate


def blocks_of(
    clock: Clock, dit: DiT, plan: Plan, text: Tensor, h: int, w: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Run a plan as `sampler.generate` does, a block at a time; what is given is zero."""
    noise = noise_seeded([(0, 0, 0)], (dit.config.in_dim, h, w), clock.device)
    cache = KVCache(dit.config, 1, plan.capacity, h, w, dtype, clock.device)
    zero = torch.zeros(1, dit.config.in_dim, h, w, device=clock.device)
    given = {i: zero for step in plan.steps for i in step.given}
    texts = [dit.text_kv(text)]
    denoise = few_steps(dit, texts, noise, Recipe().sigmas)
    return rollout(plan, denoise, clean_pass(dit, plan, texts, cache), cache, given)


def generate_once(
    clock: Clock, dit: DiT, vae: VAE, plan: Plan, text: Tensor, h: int, w: int, dtype: torch.dtype
) -> dict[str, object]:
    """One clip, decoded as its latents are ready: seconds in all and until the first frame; and
    again, of each block alone."""
    began, first, blocks = clock.now(), 0.0, []
    for _ in decode_in_order(vae, plan, blocks_of(clock, dit, plan, text, h, w, dtype)):
        first = first or time.perf_counter() - began  # pieces come whole: no need to wait
    total, last = clock.now() - began, clock.now()
    for n, _ in blocks_of(clock, dit, plan, text, h, w, dtype):
        blocks += [clock.now() - last] * (not plan.steps[n].given)
        last = clock.now()
    return {"total": total, "first frame": first, "blocks": blocks}


def measure(
    clock: Clock,
    dit: DiT,
    vae: VAE,
    plan: Plan,
    text: Tensor,
    h: int,
    w: int,
    runs: int,
    dtype: torch.dtype,
) -> dict[str, float]:
    """One row of the paper's Table 7. In backward order the first frame comes last, so that is
    nearly the whole clip's time; the paper's 0.71 s can only be the first block, which is therefore
    a column of its own here."""
    with peak_of(clock.device) as peak:
        turns = range(runs + 1)
        found = [generate_once(clock, dit, vae, plan, text, h, w, dtype) for _ in turns][1:]
        steady = sorted(b for f in found for b in (f["blocks"][1:] or f["blocks"]))
        total = statistics.median(f["total"] for f in found)
        frames = vae.config.frames(plan.length)
        return {
            "first block s": statistics.median(f["blocks"][0] for f in found),
            "first frame s": statistics.median(f["first frame"] for f in found),
            "block s, p50": statistics.median(steady),
            "block s, p95": steady[round(0.95 * (len(steady) - 1))],
            "clip s": total,
            "FPS": frames / total,
            "peak GiB": peak(),
        }


def long_video(
    clock: Clock, dit: DiT, text: Tensor, h: int, w: int, runs: int, dtype: torch.dtype
) -> dict[str, float]:
    """Block 100 of a long video against block 10: medians over the blocks around them in all runs,
    without decoding."""
    plan, times = anchors.long(330), {10: [], 100: []}
    for _ in range(runs):
        last = clock.now()
        for n, _ in blocks_of(clock, dit, plan, text, h, w, dtype):
            for middle in times:
                times[middle] += [clock.now() - last] * (middle - 5 <= n < middle + 5)
            last = clock.now()
    ten, hundred = map(statistics.median, times.values())
    return {"block 10 s": ten, "block 100 s": hundred, "100 / 10": hundred / ten}


# ---------------------------------------------------------------- training
@torch.enable_grad()
def training(clock: Clock, c: DiTConfig, h: int, w: int, runs: int, dtype: torch.dtype) -> dict:
    """Seconds of the updates of both stages, one sample, both directions; neither optimiser nor
    other processes."""
    g, f_fake = (trainable(network(c, dtype, clock.device), False) for _ in range(2))
    config = train_dmd.Config(latent=(21, h, w))
    found = {}
    for plan in both_directions():
        updates = stage_2(g, f_fake, network(c, dtype, clock.device), plan, config, 1, clock.device)
        updates["stage 1"] = stage_1(g, plan, config.latent, 1, clock.device)
        for what, update in updates.items():
            found[f"{what}, {plan.name} s"] = median_of(clock, runs, update)
    return found


# ---------------------------------------------------------------- the report
def markdown(rows: dict[str, dict[str, float]]) -> str:
    """A table, a row an entry."""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[k]:.3g}" for k in columns) + " |")
    return "\n".join(lines)


def listed(numbers: dict[str, float]) -> str:
    """Numbers by name, in one line."""
    return ", ".join(f"{k} {v:.3g}" for k, v in numbers.items())


def processor() -> str:
    """The processor's name and family, where Linux tells them."""
    found = {"model name": platform.processor() or "CPU", "cpu family": "?"}
    try:
        with open("/proc/cpuinfo") as file:
            found |= dict(map(str.strip, line.split(":", 1)) for line in file if ":" in line)
    except OSError:
        pass  # another system
    return f"{found['model name']}, family {found['cpu family']}, {torch.get_num_threads()} threads"


def name_of(device: torch.device) -> str:
    """A device's name: the GPU's, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


@torch.no_grad()
def main(config: Config) -> None:
    if config.preset not in SIZES or config.runs < 1:
        raise UserError(
            f"--preset {config.preset} must be one of {', '.join(SIZES)}, and --runs {config.runs} "
            "at least 1"
        )
    device = start(config.device)[2]
    dtype, clock = dtype_of(config.dtype, device), Clock(device)
    vae_dtype = dtype_of(config.vae_dtype, device, "vae_dtype")
    size, vae_size, height, width = SIZES[config.preset]
    c = PRESETS[size]
    dit, vae = network(c, dtype, device), autoencoder(VAES[vae_size], vae_dtype, device)
    if config.compile:
        dit.compile_blocks()
    h, w, runs = height // vae.config.space, width // vae.config.space, config.runs
    text, tokens = torch.randn(1, c.text_len, c.text_dim, device=device), c.tokens(h, w)
    name, rate = name_of(device), matmul_rate(clock, dtype)
    print(
        f"{config.preset}: {size}, {height}x{width}, {tokens} tokens a latent, {dtype}, VAE "
        f"{vae_dtype}; {name}, torch {torch.__version__}; random weights, medians of {runs}\n",
        flush=True,
    )
    found = {"machine": name, "torch": torch.__version__, "config": asdict(config)}
    found |= {"matmul FLOP/s": rate, "parts": parts(clock, dit, vae, text, h, w, runs, dtype)}
    share = found["share of the matmul rate"] = share_of_rate(c, tokens, found["parts"], rate)
    print(markdown({k: {"ms": 1e3 * v} for k, v in found["parts"].items()}))
    print(
        f"\nThe denoising step runs at {100 * share:.0f} % of this machine's rate for a large "
        f"matrix product, {rate / 1e12:.3g} TFLOP/s.\n"
    )
    found["orders"] = {
        order: measure(clock, dit, vae, plan, text, h, w, runs, dtype)
        for order, plan in ORDERS.items()
    }
    print(markdown(found["orders"]) + "\n")
    found["long"] = long_video(clock, dit, text, h, w, runs, dtype)
    print(listed(found["long"]))
    if config.train:
        del dit, vae
        found["training"] = training(clock, c, h, w, runs, dtype)
        print("\n" + listed(found["training"]))
    if config.out:
        with atomic(config.out) as tmp:
            tmp.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(main, Config)
