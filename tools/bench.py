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
from torch import Tensor, nn

import anchors
import train_dmd
from anchors import Plan
from dit import PRESETS, DiT, DiTConfig
from generate import decode_in_order
from kvcache import KVCache
from lib.common import atomic, dtype_of, run, start
from lib.cpu import linear
from lib.noise import noise_seeded
from lib.recipe import Recipe
from lib.report import markdown
from plans import both_directions
from sampler import clean_pass, few_steps, rollout, sigmas_of
from tools.count import ORDERS, pass_flops
from tools.memory import network, trainable, updates
from vae import PRESETS as VAES
from vae import VAE, VAEConfig

SIZES = {  # transformer, VAE, height, width
    "toy": ("toy", "toy", 32, 32),
    "toy64": ("toy64", "toy", 64, 64),
    "wan": ("wan1.3b", "wan", 480, 832),
}
LAST = "denoising step, 3 latents see 21"  # of the last block of 21 latents


@dataclass
class Config:
    """Measure speed and memory."""

    RANGES = {"preset": tuple(SIZES), "runs": (1, 1000)}
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
    """Median seconds of calls that take turns: a slow minute slows all. The first turn warms up."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(runs + 1):
        for mine, call in zip(times, calls):
            began = clock.now()
            call()
            mine.append(clock.now() - began)
    return [statistics.median(mine[1:]) for mine in times]


@contextmanager
def peak_of(device: torch.device) -> Iterator[Callable[[], float]]:
    """Give what tells the peak GiB: of the GPU in the block, or of the process since its start."""
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


# ---------------------------------------------------------------- what is timed
def autoencoder(c: VAEConfig, dtype: torch.dtype, device: torch.device) -> VAE:
    """A VAE with random weights."""
    with torch.device(device):
        return VAE(c).to(dtype).eval().requires_grad_(False)


def of_diffusers(
    c: DiTConfig, v: VAEConfig, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """diffusers' transformer and VAE of these sizes, where it is installed."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    with torch.device(device):
        transformer = WanTransformer3DModel(
            num_attention_heads=c.num_heads,
            attention_head_dim=c.head_dim,
            ffn_dim=c.ffn_dim,
            num_layers=c.num_layers,
            text_dim=c.text_dim,
            freq_dim=c.freq_dim,
        )
        vae = AutoencoderKLWan(base_dim=v.dim, num_res_blocks=v.num_res_blocks)
    return transformer.to(dtype).eval(), vae.eval()


@dataclass
class Timed:
    """Networks with random weights, and where and how often they are timed."""

    clock: Clock
    dit: DiT
    vae: VAE
    text: Tensor  # embeddings [1, L, text_dim]
    cells: tuple[int, int]  # of a latent, (h, w)
    dtype: torch.dtype  # of the transformer and its cache
    runs: int

    def randn(self, latents: int) -> Tensor:
        """Noise as latents, [1, T, C, h, w]."""
        return torch.randn(
            1, latents, self.dit.config.in_dim, *self.cells, device=self.clock.device
        )

    def last_block(self) -> dict[str, Callable[[], object]]:
        """What is done with three latents that see 18 before them, each to be called."""
        device, dit, kv = self.clock.device, self.dit, self.dit.text_kv(self.text)
        cache = KVCache(dit.config, 1, 18, *self.cells, self.dtype, device)
        zero, pos = torch.zeros(1, 18, device=device), torch.arange(21, device=device)
        clean = dit(self.randn(18), zero, kv, pos[:18], keys_only=True)
        cache.write(tuple(range(18)), clean)
        reads = tuple((i, i) for i in range(18))
        past, x, t = cache.read(reads), self.randn(3), torch.full((1, 3), 625.0, device=device)
        return {
            "cache: turn 18 latents' keys, once a block": lambda: cache.read(reads),
            LAST: lambda: dit(x, t, kv, pos[18:], past=past),
            "commit pass": lambda: dit(x, 0 * t, kv, pos[18:], past=past, keys_only=True),
        }

    def blocks(self, plan: Plan) -> Iterator[tuple[int, Tensor]]:
        """Run a plan as `sampler.generate` does, a block at a time; what is given is zero."""
        c, device = self.dit.config, self.clock.device
        noise = noise_seeded([(0, 0, 0)], (c.in_dim, *self.cells), device)
        cache = KVCache(c, 1, plan.capacity, *self.cells, self.dtype, device)
        zero = torch.zeros(1, c.in_dim, *self.cells, device=device)
        given = {i: zero for step in plan.steps for i in step.given}
        texts = [self.dit.text_kv(self.text)]
        denoise = few_steps(self.dit, texts, noise, sigmas_of(Recipe()))
        return rollout(plan, denoise, clean_pass(self.dit, plan, texts, cache), cache, given)


def parts(timed: Timed) -> dict[str, float]:
    """Seconds of the parts of forward generation, in the last block of 21 latents."""
    dit, vae, z = timed.dit, timed.vae, timed.randn(3)
    _, state = vae.decode_chunk(z[:, :1], None)
    calls = {"text: keys and values, once a prompt": lambda: dit.text_kv(timed.text)}
    calls |= timed.last_block() | {"VAE, 3 latents": lambda: vae.decode_chunk(z, state)}
    return {name: median_of(timed.clock, timed.runs, call) for name, call in calls.items()}


def share_of_rate(timed: Timed, found: dict[str, float], rate: float) -> float:
    """What part of the matmul rate the denoising step among `parts` reaches."""
    tokens = timed.dit.config.tokens(*timed.cells)
    return pass_flops(timed.dit.config, 3 * tokens, 21 * tokens) / found[LAST] / rate


def generate_once(timed: Timed, plan: Plan) -> tuple[float, float, list[float]]:
    """A clip, decoded as it is made: seconds in all, until its first frame, and of each block."""
    clock, began, first, blocks = timed.clock, timed.clock.now(), 0.0, []
    for _ in decode_in_order(timed.vae, plan, timed.blocks(plan)):
        first = first or time.perf_counter() - began  # pieces come whole: no need to wait
    total, last = clock.now() - began, clock.now()
    for n, _ in timed.blocks(plan):
        blocks += [clock.now() - last] * (not plan.steps[n].given)
        last = clock.now()
    return total, first, blocks


def measure(timed: Timed, plan: Plan) -> dict[str, float]:
    """One row of the paper's Table 7. In backward order the first frame comes last, so that is
    nearly the whole clip's time; the paper's 0.71 s can only be the first block, which is therefore
    a column of its own here."""
    with peak_of(timed.clock.device) as peak:
        found = [generate_once(timed, plan) for _ in range(timed.runs + 1)][1:]
        totals, firsts, blocks = zip(*found)
        steady = sorted(b for mine in blocks for b in (mine[1:] or mine))
        total = statistics.median(totals)
        return {
            "first block s": statistics.median(mine[0] for mine in blocks),
            "first frame s": statistics.median(firsts),
            "block s, p50": statistics.median(steady),
            "block s, p95": steady[round(0.95 * (len(steady) - 1))],
            "clip s": total,
            "FPS": timed.vae.config.frames(plan.length) / total,
            "peak GiB": peak(),
        }


def long_video(timed: Timed) -> dict[str, float]:
    """Block 100 of a long video against block 10, not decoded: medians of the ten around them."""
    plan, times, clock = anchors.long(330), {10: [], 100: []}, timed.clock
    for _ in range(timed.runs):
        last = clock.now()
        for n, _ in timed.blocks(plan):
            for middle in times:
                times[middle] += [clock.now() - last] * (middle - 5 <= n < middle + 5)
            last = clock.now()
    ten, hundred = map(statistics.median, times.values())
    return {"block 10 s": ten, "block 100 s": hundred, "100 / 10": hundred / ten}


@torch.enable_grad()
def training(timed: Timed, c: DiTConfig) -> dict[str, float]:
    """Seconds of the updates of both stages in both directions, one sample, without optimiser."""
    device, dtype = timed.clock.device, timed.dtype
    g, f_fake = (trainable(network(c, dtype, device), False) for _ in range(2))
    f_real, config = network(c, dtype, device), train_dmd.Config(latent=(21, *timed.cells))
    found = {}
    for plan in both_directions():
        for what, update in updates(g, f_fake, f_real, plan, config, 1, device).items():
            found[f"{what}, {plan.name} s"] = median_of(timed.clock, timed.runs, update)
    return found


# ---------------------------------------------------------------- the report
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
    device = start(config.device)[2]
    dtype, clock = dtype_of(config.dtype, device), Clock(device)
    vae_dtype = dtype_of(config.vae_dtype, device, "vae_dtype")
    size, vae_size, height, width = SIZES[config.preset]
    c, space = PRESETS[size], VAES[vae_size].space
    dit, vae = network(c, dtype, device), autoencoder(VAES[vae_size], vae_dtype, device)
    if config.compile:
        dit.compile_blocks()
    text, cells = (
        torch.randn(1, c.text_len, c.text_dim, device=device),
        (height // space, width // space),
    )
    timed = Timed(clock, dit, vae, text, cells, dtype, config.runs)
    name, rate = name_of(device), matmul_rate(clock, dtype)
    print(
        f"{config.preset}: {size}, {height}x{width}, {c.tokens(*cells)} tokens a latent, {dtype}, "
        f"VAE {vae_dtype}; {name}, torch {torch.__version__}; random weights, medians of "
        f"{config.runs}\n",
        flush=True,
    )
    found = {"machine": name, "torch": torch.__version__, "config": asdict(config)}
    found |= {"matmul FLOP/s": rate, "parts": parts(timed)}
    share = found["share of the matmul rate"] = share_of_rate(timed, found["parts"], rate)
    print(markdown({k: {"ms": 1e3 * v} for k, v in found["parts"].items()}))
    print(
        f"\nThe denoising step runs at {100 * share:.0f} % of this machine's rate for a large "
        f"matrix product, {rate / 1e12:.3g} TFLOP/s.\n"
    )
    found["orders"] = {order: measure(timed, plan) for order, plan in ORDERS.items()}
    print(markdown(found["orders"]) + "\n")
    found["long"] = long_video(timed)
    print(markdown({"a long video": found["long"]}))
    if config.train:
        found["training"] = training(timed, c)
        print("\n" + markdown({what: {"s": s} for what, s in found["training"].items()}))
    if config.out:
        with atomic(config.out) as tmp:
            tmp.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(main, Config)
