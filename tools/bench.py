"""One honest stopwatch: how long each part of generating and training takes, and how near that is to the machine.

Random weights of a preset's size: speed does not depend on them. The clock is read after the device has finished; every
number is a median over --runs after a warm-up, and the machine's own rate of matrix products is measured beside them.

    python bench.py                                        # the toy, here
    python bench.py --preset wan --compile --train         # Wan2.1's sizes, on a GPU
"""

import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import anchors
import train_dmd
import train_ode
from anchors import Plan
from dit import PRESETS, DiT, DiTConfig
from generate import decode_in_order
from kvcache import KVCache
from lib.common import UserError, atomic, dtype_of, run, start
from lib.cpu import linear
from lib.pairs import KEEP, settings
from lib.text import TOY_DIM
from lib.weights import write_safetensors
from sampler import noise_seeded, ode_sigmas, rollout, student_sigmas
from vae import PRESETS as VAES
from vae import VAE

SIZES = {  # transformer, VAE, height, width
    "toy": ("toy", "toy", 32, 32),
    "toy64": ("toy64", "toy", 64, 64),
    "wan": ("wan1.3b", "wan", 480, 832),
}
ORDERS = {  # rows of the table, as the paper's Table 7 has them: plan, and denoising steps left out by a warm start
    "forward": (anchors.forward(21), 0),
    "forward, both sinks": (anchors.forward(21, window=6, past_sink=True, future_sink=True), 0),
    "backward, P = 3": (anchors.backward(21), 0),
    "backward, P = 3, --warm 2": (anchors.backward(21), 2),
    "backward, P = 3, both sinks": (
        anchors.backward(21, window=6, past_sink=True, future_sink=True),
        0,
    ),
    "inbetween, 15 latents": (anchors.inbetween(given=True), 0),
}


@dataclass
class Config:
    """Measure speed and memory."""

    preset: str = "toy"  # toy, toy64 or wan
    runs: int = 5  # timed repetitions, after one that warms up
    compile: bool = False  # torch.compile the transformer's blocks, of --train too
    train: bool = False  # also the steps of both stages
    teacher: str = ""  # of --train: wan14b for the paper's teacher; default: the student's size
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    vae_dtype: str = "float32"  # of the VAE
    device: str = "auto"
    out: str = ""  # also write everything as .json


class Clock:
    """Seconds of what runs inside `with clock(name)`, read when the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.times.setdefault(name, []).append(self.now() - began)


def median_of(clock: Clock, runs: int, what: Callable[[], object]) -> float:
    """Median seconds of a call, after one that warms up."""
    times = []
    for _ in range(runs + 1):
        began = clock.now()
        what()
        times.append(clock.now() - began)
    return statistics.median(times[1:])


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU since the last reset; on a CPU of the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def flops(c: DiTConfig, tokens: int, keys: int) -> float:
    """Floating point operations of one pass over `tokens` that see `keys`, with the text's keys given: two a weight and token
    in the linear layers, four a query, key and channel in attention."""
    linear = 2 * tokens * c.dim * (6 * c.dim + 2 * c.ffn_dim)
    return c.num_layers * (linear + 4 * tokens * (keys + c.text_len) * c.dim)


def matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here."""
    n = 8192 if clock.device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=clock.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_of(clock, 10, lambda: linear(a, b, b[0]))


# ---------------------------------------------------------------- generating
def parts(
    clock: Clock, dit: DiT, vae: VAE, text: Tensor, h: int, w: int, runs: int, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of the parts of forward generation, in the last block of 21 latents: three latents that see eighteen.

    text: embeddings [1, L, text_dim];  h, w: cells of a latent;  dtype: of the cache"""
    c, B = dit.config, 3
    x, pos = (
        torch.randn(1, B, c.in_dim, h, w, device=clock.device),
        torch.arange(18, 21, device=clock.device),
    )
    kv, t = dit.text_kv(text), torch.full((1, B), 625.0, device=clock.device)
    cache = KVCache(c, 1, 18, h, w, dtype, clock.device)
    own = dit(
        torch.randn(1, 18, c.in_dim, h, w, device=clock.device),
        torch.zeros(1, 18, device=clock.device),
        kv,
        torch.arange(18, device=clock.device),
        need=0,
    )
    cache.write(tuple(range(18)), own)
    past = cache.read(tuple((i, i) for i in range(18)), room=B)
    _, state = vae.decode_chunk(x[:, :1], None)
    return {
        "text: keys and values, once a prompt": median_of(clock, runs, lambda: dit.text_kv(text)),
        "cache: turn 18 latents' keys, once a block": median_of(
            clock, runs, lambda: cache.read(tuple((i, i) for i in range(18)))
        ),
        "denoising step, 3 latents see 18": median_of(
            clock, runs, lambda: dit(x, t, kv, pos, past=past)
        ),
        "commit pass": median_of(clock, runs, lambda: dit(x, 0 * t, kv, pos, past=past, need=0)),
        "VAE, 3 latents": median_of(clock, runs, lambda: vae.decode_chunk(x, state)),
    }


def generate_once(
    clock: Clock,
    dit: DiT,
    vae: VAE,
    plan: Plan,
    text: Tensor,
    h: int,
    w: int,
    dtype: torch.dtype,
    warm: int,
) -> dict[str, object]:
    """One clip, decoded as its latents are ready: seconds in all and until the first frame; and again, seconds of each block alone."""
    c, device = dit.config, clock.device
    noise = noise_seeded([(0, 0, 0)], (c.in_dim, h, w), device)
    given = {
        i: torch.zeros(1, c.in_dim, h, w, device=device)
        for step in plan.steps
        if step.given
        for i in step.targets
    }

    def blocks_made() -> Iterator[tuple[int, Tensor]]:
        cache = KVCache(c, 1, plan.capacity, h, w, dtype, device)
        return rollout(
            dit, plan, [dit.text_kv(text)], noise, student_sigmas(), cache, given, warm=warm
        )

    began, first, blocks = clock.now(), 0.0, []
    for _ in decode_in_order(
        vae, plan, blocks_made()
    ):  # pieces come whole: no need to wait for the device
        first = first or time.perf_counter() - began
    total, last = clock.now() - began, clock.now()
    for n, _ in blocks_made():
        blocks += [clock.now() - last] * (not plan.steps[n].given)
        last = clock.now()
    return {"total": total, "first frame": first, "blocks": blocks}


def orders(
    clock: Clock, dit: DiT, vae: VAE, text: Tensor, h: int, w: int, runs: int, dtype: torch.dtype
) -> dict[str, dict]:
    """The rows of the paper's Table 7: clips of 81 frames in several orders."""
    rows = {}
    for name, (plan, warm) in ORDERS.items():
        found = [
            generate_once(clock, dit, vae, plan, text, h, w, dtype, warm) for _ in range(runs + 1)
        ][1:]
        steady = sorted(b for f in found for b in (f["blocks"][1:] or f["blocks"]))
        total = statistics.median(f["total"] for f in found)
        rows[name] = {
            "first frame s": statistics.median(f["first frame"] for f in found),
            "block s, p50": statistics.median(steady),
            "block s, p95": steady[round(0.95 * (len(steady) - 1))],
            "81 frames s": total,
            "FPS": 81 / total,
            "peak GiB": peak_memory(clock.device),
        }
    return rows


def long_video(
    clock: Clock, dit: DiT, text: Tensor, h: int, w: int, runs: int, dtype: torch.dtype
) -> dict[str, float]:
    """Block 100 of a long video against block 10: medians over the blocks around them in all runs, without decoding."""
    plan, times = anchors.long(330), {10: [], 100: []}
    noise = noise_seeded([(0, 0, 0)], (dit.config.in_dim, h, w), clock.device)
    for _ in range(runs):
        cache, last = KVCache(dit.config, 1, plan.capacity, h, w, dtype, clock.device), clock.now()
        for n, _ in rollout(dit, plan, [dit.text_kv(text)], noise, student_sigmas(), cache):
            for middle in times:
                times[middle] += [clock.now() - last] * (middle - 5 <= n < middle + 5)
            last = clock.now()
    ten, hundred = map(statistics.median, times.values())
    return {"block 10 s": ten, "block 100 s": hundred, "100 / 10": hundred / ten}


# ---------------------------------------------------------------- training
def training(
    config: Config, c: DiTConfig, h: int, w: int, device: torch.device
) -> dict[str, float]:
    """Seconds of a step, by running the scripts themselves on random weights and pairs: stage 1 (both directions), the
    generator's and the critic's update of stage 2 (both directions), one sample a step."""
    found, latent = {}, (21, h, w)
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("student", c), ("teacher", PRESETS.get(config.teacher, c))):
            with torch.device(device):
                write_safetensors(
                    f"{folder}/{name}.safetensors",
                    DiT(size).to(torch.bfloat16).state_dict(),
                    asdict(size),
                )
        prompts = "toy" if c.text_dim == TOY_DIM else f"{folder}/prompts.safetensors"
        if prompts != "toy":  # random embeddings of one prompt, and of the empty one
            for name, said, more in (
                ("prompts", [""], {"shards": ["one.safetensors"]}),
                ("one", ["a"], {}),
            ):
                write_safetensors(
                    f"{folder}/{name}.safetensors",
                    {"rows": torch.randn(9, c.text_dim), "lengths": torch.tensor([9])},
                    {"prompts": said} | more,
                )
        usual = {
            "latent": latent,
            "batch": 1,
            "prompts": prompts,
            "dtype": "bfloat16",
            "device": str(device).split(":")[0],
            "checkpointing": config.preset == "wan",
            "compile": config.compile,
        }
        ode = train_ode.Config(
            **usual,
            weights=f"{folder}/student.safetensors",
            data=f"{folder}/pairs",
            out=f"{folder}/ode",
            steps=6,
        )
        sigmas = torch.tensor([ode_sigmas(KEEP[-1], ode.shift)[k] for k in KEEP])
        write_safetensors(
            f"{folder}/pairs/pairs-000000.safetensors",
            {"states": torch.randn(1, 5, 21, c.in_dim, h, w).half(), "sigmas": sigmas},
            settings(ode),
        )
        Path(f"{folder}/pairs/index.json").write_text(
            json.dumps({"shards": {"pairs-000000.safetensors": ""}})
        )
        train_ode.main(ode)
        found["stage-1 step s"] = statistics.median(seconds(f"{folder}/ode")[1:])
        found["stage 1 peak GiB"] = peak_memory(device)
        train_dmd.main(
            train_dmd.Config(
                **usual,
                student=f"{folder}/student.safetensors",
                teacher=f"{folder}/teacher.safetensors",
                critic=f"{folder}/student.safetensors",
                out=f"{folder}/dmd",
                steps=9,
                ratio=3,
                sheet_every=0,
            )
        )
        rows = seconds(f"{folder}/dmd")[3:]
        found["critic step s"] = statistics.median(rows[1::3] + rows[2::3])
        found["generator step s"] = statistics.median(rows[::3]) - found["critic step s"]
        found["stage 2 peak GiB"] = peak_memory(device)
    return found


def seconds(folder: str) -> list[float]:
    """The time of each step, from a run's log."""
    return [
        json.loads(line)["seconds"] for line in Path(folder, "log.jsonl").read_text().splitlines()
    ]


# ---------------------------------------------------------------- the report
def markdown(rows: dict[str, dict[str, float]]) -> str:
    """A table, a row an entry."""
    columns = list(next(iter(rows.values())))
    return "\n".join(
        [
            "| | " + " | ".join(columns) + " |",
            "|---" * (len(columns) + 1) + "|",
            *(
                f"| {name} | " + " | ".join(f"{row[k]:.3g}" for k in columns) + " |"
                for name, row in rows.items()
            ),
        ]
    )


@torch.no_grad()
def main(config: Config) -> None:
    if config.preset not in SIZES or config.runs < 1:
        raise UserError(
            f"--preset {config.preset} must be one of {', '.join(SIZES)}, and --runs {config.runs} at least 1"
        )
    device = start(config.device)[2]
    dtype, vae_dtype, clock = (
        dtype_of(config.dtype, device),
        dtype_of(config.vae_dtype, device, "vae_dtype"),
        Clock(device),
    )
    size, vae_size, height, width = SIZES[config.preset]
    c = PRESETS[size]
    with torch.device(device):
        dit, vae = (
            DiT(c).to(dtype).eval().requires_grad_(False),
            VAE(VAES[vae_size]).to(vae_dtype).eval().requires_grad_(False),
        )
        torch.nn.init.normal_(dit.head.head.weight, std=0.02)
    if config.compile:
        dit.compile_blocks()
    h, w = height // vae.config.space, width // vae.config.space
    text, tokens = torch.randn(1, c.text_len, c.text_dim, device=device), c.tokens(h, w)
    name = f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(
        f"{config.preset}: {size}, {height}x{width}, {tokens} tokens a latent, {dtype}, VAE {vae_dtype}; {name}, "
        f"torch {torch.__version__}; random weights, medians of {config.runs}\n",
        flush=True,
    )
    found = {"machine": name, "torch": torch.__version__, "config": asdict(config)}
    rate = found["matmul FLOP/s"] = matmul_rate(clock, dtype)
    found["parts"] = parts(clock, dit, vae, text, h, w, config.runs, dtype)
    step = found["parts"]["denoising step, 3 latents see 18"]
    work = flops(c, 3 * tokens, 21 * tokens)
    share = found["share of the matmul rate"] = work / step / rate
    print(
        "| part | ms |\n|---|---|\n"
        + "\n".join(f"| {k} | {1e3 * v:.3g} |" for k, v in found["parts"].items())
    )
    print(
        f"\nThe denoising step does {work / 1e12:.3g} TFLOP at {100 * share:.0f} % of this machine's rate for a large matrix product, "
        f"{rate / 1e12:.3g} TFLOP/s.\n"
    )
    found["orders"] = orders(clock, dit, vae, text, h, w, config.runs, dtype)
    print(markdown(found["orders"]) + "\n")
    found["long"] = long_video(clock, dit, text, h, w, config.runs, dtype)
    print(", ".join(f"{k} {v:.3g}" for k, v in found["long"].items()))
    if config.train:
        del dit, vae
        with torch.enable_grad():
            found["training"] = training(config, c, h, w, device)
        print("\n" + ", ".join(f"{k} {v:.3g}" for k, v in found["training"].items()))
    if config.out:
        with atomic(config.out) as tmp:
            tmp.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(main, Config)
