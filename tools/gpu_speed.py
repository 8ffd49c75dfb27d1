"""The first hour on a GPU: how fast is it, what does it need, where does the time go?

One small function a part, run by `tools/gpu.py`. A part takes a `Room` (where it measures, and how
large) and returns `Found`: one line, some numbers, perhaps a table. It raises `Skipped` with a
reason where it cannot run, and `Wrong` where what must be equal is not. Everything runs on a CPU
too, at toy size; what needs a GPU is marked `# GPU:` with its reason, and a test finds lines that
are neither run nor marked. The parts that check are `tests/gpu_checks.py`.
"""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from tqdm import tqdm

import anchors
import train_dmd
from anchors import Plan
from dit import DiT, DiTConfig
from lib.states import write_network
from lib.text import NEGATIVE, write_rows
from plans import both_directions
from tools import bench
from tools.count import ORDERS, size_of
from tools.memory import GIB, Meter, estimate, network, trainable, updates
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent.parent


class Skipped(Exception):
    """Why a part does not run here."""


class Wrong(Exception):
    """What is not as it must be."""


@dataclass
class Found:
    """What a part found: a line for the terminal, numbers by name, the rows of a table."""

    line: str
    values: dict[str, float] = field(default_factory=dict)
    table: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Room:
    """Where a part measures: the device, the sizes, and the folder for what it writes."""

    device: torch.device
    out: Path
    c: DiTConfig
    teacher: DiTConfig  # the large one
    vae: VAEConfig
    size: tuple[int, int]  # of a frame, (height, width)
    runs: int
    latents: int  # latents of a clip in training

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def cells(self) -> tuple[int, int]:
        return self.size[0] // self.vae.space, self.size[1] // self.vae.space

    def clock(self) -> bench.Clock:
        return bench.Clock(self.device)

    def randn(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=g, device=self.device, dtype=dtype)

    def text(self) -> Tensor:
        return self.randn(1, self.c.text_len, self.c.text_dim)

    def timed(self, vae_dtype: torch.dtype, dit: DiT | None = None) -> bench.Timed:
        """Fresh networks of these sizes (or this one) for the stopwatch."""
        dit = dit or network(self.c, self.dtype, self.device)
        vae = bench.autoencoder(self.vae, vae_dtype, self.device)
        return bench.Timed(self.clock(), dit, vae, self.text(), self.cells, self.dtype, self.runs)


def demand(holds: bool, sentence: str) -> None:
    """Raise `Wrong` with the sentence unless it holds."""
    if not holds:
        raise Wrong(sentence)


# ---------------------------------------------------------------- speed
def machine(room: Room) -> Found:
    """What machine this is, and the ceilings that all else is compared with."""
    clock = room.clock()
    rate, copied = bench.matmul_rate(clock, room.dtype), bench.copy_rate(clock)
    name = f"{bench.name_of(room.device)}, torch {torch.__version__}"
    if room.cuda:  # GPU: asks nvidia-smi
        name += f", {driver()}"
    values = {"matmul TFLOP/s": rate / 1e12, "copy GB/s": copied / 1e9}
    kind, (flops, bytes_) = str(room.dtype).removeprefix("torch."), values.values()
    return Found(f"{name}; {kind} products {flops:.3g} TFLOP/s, copies {bytes_:.3g} GB/s", values)


def driver() -> str:  # GPU: no nvidia-smi without one
    """Driver, power limit and clock, as nvidia-smi tells them."""
    what = "driver_version,power.limit,clocks.max.sm,memory.total"
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return f"CUDA {torch.version.cuda}, {done.stdout.splitlines()[0]}"


def step(room: Room) -> Found:
    """The parts of a block, and the denoising step's share of the matmul rate."""
    timed = room.timed(torch.float32)
    found = bench.parts(timed)
    share = 100 * bench.share_of_rate(timed, found, bench.matmul_rate(timed.clock, room.dtype))
    rows = {name: {"ms": 1e3 * seconds} for name, seconds in found.items()}
    line = f"a denoising step takes {rows[bench.LAST]['ms']:.3g} ms"
    values = by_name(rows) | {"share of the matmul rate %": share}
    return Found(f"{line}, {share:.0f} % of the matmul rate", values, rows)


def decoding(room: Room) -> Found:
    """The VAE alone, in both types: seconds of a clip of 81 frames, and memory."""
    z, rows = room.randn(1, 21, room.vae.z_dim, *room.cells), {}
    for dtype in (torch.float32, torch.bfloat16):
        vae = bench.autoencoder(room.vae, dtype, room.device)
        with bench.peak_of(room.device) as peak:
            seconds = bench.median_of(room.clock(), room.runs, lambda vae=vae: decoded(vae, z))
            name = "VAE " + str(dtype).removeprefix("torch.")
            rows[name] = {"81 frames s": seconds, "FPS": 81 / seconds, "peak GiB": peak()}
    a, b = (row["81 frames s"] for row in rows.values())
    line = f"81 frames in {a:.3g} s in float32, {b:.3g} s in bfloat16"
    return Found(line, by_name(rows), rows)


def decoded(vae: VAE, z: Tensor) -> None:
    """Decode a clip [B, T, C, h, w] as a stream, keeping none of it."""
    state = None
    for part in z.split(vae.at_once(*z.shape[3:]), dim=1):
        _, state = vae.decode_chunk(part, state, inplace=True)


def table_7(
    room: Room, plans: dict[str, Plan], vae_dtype: torch.dtype, runs: int
) -> dict[str, dict[str, float]]:
    """Rows of the paper's Table 7, with the VAE in this type."""
    timed, rows = replace(room.timed(vae_dtype), runs=runs), {}
    for name, plan in plans.items():
        rows[name] = bench.measure(timed, plan)
        print(name, rows[name], flush=True)
    return rows


def by_name(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """{"forward": {"FPS": 9}} -> {"forward FPS": 9}"""
    return {f"{name} {k}": x for name, row in rows.items() for k, x in row.items()}


def orders(room: Room) -> Found:
    """Whole clips in every order; forward and backward also with the VAE in bfloat16."""
    runs = max(room.runs - 1, 1)
    rows = table_7(room, ORDERS, torch.float32, runs)
    twice = {name: ORDERS[name] for name in ("forward", "backward, P = 3")}
    for name, row in table_7(room, twice, torch.bfloat16, runs).items():
        rows[f"{name}, VAE bf16"] = row
    values = by_name(rows) | {"peak GiB": max(row["peak GiB"] for row in rows.values())}
    forward, backward = rows["forward"], rows["backward, P = 3"]
    line = f"forward {forward['FPS']:.3g}, backward {backward['FPS']:.3g} FPS"
    return Found(f"{line}, first frame {forward['first frame s']:.2g} s", values, rows)


def long_video(room: Room) -> Found:
    """30 s forward, both sinks: does the speed hold, and the memory?"""
    rows = table_7(room, {"30 s": anchors.long(120)}, torch.float32, 1)
    row = rows["30 s"]
    line = f"30 s in {row['clip s']:.3g} s, {row['FPS']:.3g} FPS, {row['peak GiB']:.3g} GiB"
    return Found(line, by_name(rows), rows)


def peers(room: Room) -> Found:
    """diffusers' Wan and ours in turns: one pass of 21 latents, and decoding them."""
    if not importlib.util.find_spec("diffusers"):
        raise Skipped("diffusers is not installed; pip install diffusers")
    c, device, clock = room.c, room.device, room.clock()
    ours, mine = network(c, room.dtype, device), bench.autoencoder(room.vae, torch.float32, device)
    theirs, other = bench.of_diffusers(c, room.vae, room.dtype, device)
    z, t = room.randn(1, 21, c.in_dim, *room.cells), torch.full((1, 21), 625.0, device=device)
    pos, text, zt = torch.arange(21, device=device), room.text(), z.transpose(1, 2).contiguous()
    short, words = zt.to(room.dtype), text.to(room.dtype)
    passes = (lambda: ours(z, t, text, pos)), (lambda: theirs(short, t[:, 0], words))
    decoders = (lambda: decoded(mine, z)), (lambda: other.decode(zt))
    rows = {
        "transformer, 21 latents": bench.medians(clock, room.runs, *passes),
        "VAE, 81 frames, float32": bench.medians(clock, room.runs, *decoders),
    }
    table = {k: {"ours s": a, "diffusers s": b, "ratio": b / a} for k, (a, b) in rows.items()}
    values = {f"{k}, times diffusers": row["ratio"] for k, row in table.items()}
    line = ", ".join(f"{k} {row['ratio']:.2f} x" for k, row in table.items())
    return Found(f"as fast as diffusers: {line}", values, table)


# ---------------------------------------------------------------- training
def training(room: Room, large: bool = False) -> Found:
    """Time and memory of both stages' updates beside the estimate, without an optimiser.

    large: beside the 14B teacher, if memory allows, not beside one of the student's size"""
    teacher, name = (room.teacher, "14B") if large else (room.c, "1.3B")
    latent, kind = (room.latents, *room.cells), str(room.dtype).removeprefix("torch.")
    config = train_dmd.Config(latent=latent, micro=1, checkpointing=True, dtype=kind)
    plans = both_directions(room.latents)
    said = [estimate(config, room.c, teacher, d) for d in range(2)]
    needed = (2 * size_of(room.c) + size_of(teacher)) * room.dtype.itemsize / GIB
    needed += max(max(row.values()) for row in said)
    if room.cuda:  # GPU: a CPU does not tell
        free = torch.cuda.mem_get_info(room.device)[0] / GIB
        if free < needed:
            raise Skipped(f"needs {needed:.1f} GiB, {free:.1f} are free")
    g, f_fake = (trainable(network(room.c, room.dtype, room.device), True) for _ in range(2))
    f_real, rows = network(teacher, room.dtype, room.device), {}
    for plan, memory in zip(plans, said):
        found = updates(g, f_fake, f_real, plan, config, 1, room.device)
        halves = found.pop("rollout"), found["critic"]
        found["critic"] = lambda halves=halves: [half() for half in halves]
        for what, update in found.items():
            row = {"estimated GiB": memory[what]} | update_cost(room, update)
            rows[f"{what}, {plan.name}"] = row
    worst = max(row["measured GiB"] / row["estimated GiB"] for row in rows.values())
    seconds = {what: sum(rows[f"{what}, {p.name}"]["s"] for p in plans) for what in found}
    values = by_name(rows) | {f"{what} s": s for what, s in seconds.items()}
    values = {f"{name} teacher, {k}": x for k, x in values.items()}
    line = ", ".join(f"{what} {s:.3g} s" for what, s in seconds.items())
    return Found(f"{line}; memory at most {worst:.2f} x the estimate", values, rows)


@torch.enable_grad()
def update_cost(room: Room, update: Callable[[], object]) -> dict[str, float]:
    """Seconds of an update, and the GiB that it takes beyond the weights."""
    if room.cuda:  # GPU: a CPU has no such counter
        update()  # kernels are chosen and compiled in the first call
        before = torch.cuda.memory_allocated(room.device) / GIB
        with bench.peak_of(room.device) as peak:
            seconds = bench.median_of(room.clock(), 1, update)
            return {"measured GiB": peak() - before, "s": seconds}
    with Meter() as meter:
        update()
    return {"measured GiB": meter.peak / GIB, "s": bench.median_of(room.clock(), 1, update)}


def script(room: Room) -> Found:
    """Stage 2's script as one types it, on short clips, beside a teacher of the student's size:
    loading, sharding, a few iterations with and without the student's update, the log."""
    folder, latents = room.out / "script", 9  # more is more memory than 80 GB [computed]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights, prompts = folder / "wan.safetensors", folder / "prompts.safetensors"
    write_network(weights, network(room.c, room.dtype, room.device))
    random_prompts(room, prompts)
    command = [sys.executable, "train_dmd.py", "--preset", "wan-small-teacher", "--batch", "1"]
    command += ["--latent", *map(str, (latents, *room.cells)), "--prompts", prompts.resolve()]
    for name in ("student", "teacher", "critic"):
        command += [f"--{name}", weights.resolve()]
    command += ["--device", room.device.type, "--out", (folder / "dmd").resolve()]
    command += ["--ratio", "2", "--sheet_every", "0", "--save_every", "0"]
    rows, peak = logged(room, command, folder / "dmd" / "log.jsonl", 4)
    shutil.rmtree(folder)  # gigabytes
    sizes = [row[k] for row in rows for k in row if k.startswith(("dmd_", "critic_", "norm_"))]
    demand(all(map(math.isfinite, sizes)), f"a loss or a gradient is not finite: {sizes}")
    values = {"both updates s": rows[2]["seconds"], "critic alone s": rows[3]["seconds"]}
    line = f"{latents} latents: " + ", ".join(f"{k[:-2]} {s:.3g} s" for k, s in values.items())
    if room.cuda:  # GPU: a CPU does not tell
        values["GiB"] = peak
        line += f", {peak:.1f} GiB of the GPU in all"
    return Found(line, {f"train_dmd.py, {k}": x for k, x in values.items()})


def random_prompts(room: Room, path: Path) -> None:
    """A file of embeddings as lib/text.py writes it: one prompt, the negative one and none."""
    shard, said = path.with_name("prompts-0.safetensors"), [NEGATIVE, ""]
    with tqdm(disable=True) as bar:
        rows = partial(embedding, room)
        write_rows(shard, rows, ["a prompt"], {"prompts": ["a prompt"]}, bar)
        write_rows(path, rows, said, {"prompts": said, "shards": [shard.name]}, bar)


def embedding(room: Room, prompt: str) -> Tensor:
    """What stands for a prompt's embedding [L, text_dim]."""
    return room.randn(min(30, room.c.text_len), room.c.text_dim, seed=len(prompt))


def logged(room: Room, command: list, log: Path, count: int) -> tuple[list[dict], float]:
    """Run a script until it has logged so many rows; these, and the GiB in use on the GPU."""
    rows, used = [], 0.0
    with subprocess.Popen([*map(str, command)], cwd=ROOT) as process:
        try:
            while len(rows) < count:
                code = process.poll()
                demand(code is None, f"{command[1]} ended with {code} after {len(rows)} iterations")
                time.sleep(0.05)
                rows = log.read_text().splitlines()[:count] if log.exists() else []
                if room.cuda:  # GPU: a CPU does not tell
                    free, total = torch.cuda.mem_get_info(room.device)
                    used = max(used, (total - free) / GIB)
        finally:
            process.kill()
    return [json.loads(row) for row in rows], used


# ---------------------------------------------------------------- where the time goes
KERNELS = {  # words in the names of CUDA's kernels and torch's operations; the first that fits
    "attention": r"flash|fmha|attention|sdpa",
    "convolutions": r"conv|cudnn",
    "matrix products": r"gemm|nvjet|cutlass|xmma|addmm|linear|\bmm\b|bmm|mkldnn",
    "norms": r"norm|mean|rsqrt|pow",
    "copies": r"copy|cat|mem(cpy|set)|clone|index|fill|zero",
    "elementwise": r"elementwise|add|mul|sub|div|gelu|silu|clamp|complex|triton|upsample",
}


def family(kernel: str) -> str:
    """To which family a kernel belongs, by its name: `flash_fwd_kernel` -> attention."""
    return next((k for k, words in KERNELS.items() if re.search(words, kernel.lower())), "other")


def profile(room: Room) -> Found:
    """A block of three latents that sees 18, and its decoding, by kernel family; with a trace."""
    timed = room.timed(room.dtype)
    vae, one_step = timed.vae, timed.last_block()[bench.LAST]
    _, state = vae.decode_chunk(one_step()[:, :1])  # a block in the middle of the video follows

    def block() -> None:
        for _ in range(5):
            x0 = one_step()
        vae.decode_chunk(x0, state)

    block()
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * room.cuda]
    with torch.profiler.profile(activities=kinds) as profiler:
        block()
        room.clock().now()
    room.out.mkdir(parents=True, exist_ok=True)
    whole = room.out / "trace.json.gz"
    profiler.export_chrome_trace(str(part := whole.with_name(".trace.json.gz")))
    part.replace(whole)
    spent, calls = Counter(), Counter()
    for name, microseconds, count in kernels(profiler, room.cuda):
        spent[family(name)] += microseconds / 1e3
        calls[family(name)] += count
    total = sum(spent.values())
    rows = {
        name: {"ms": ms, "%": 100 * ms / total, "kernels": calls[name]}
        for name, ms in spent.most_common()
    }
    line = ", ".join(f"{name} {row['%']:.0f} %" for name, row in list(rows.items())[:4])
    values = {f"profile {name} %": row["%"] for name, row in rows.items()}
    return Found(f"a block, {total:.3g} ms: {line}; trace.json.gz", values, rows)


def kernels(profiler: torch.profiler.profile, cuda: bool) -> Iterator[tuple[str, float, int]]:
    """Name, microseconds and calls: of the GPU's kernels, or of torch's operations on a CPU."""
    for row in profiler.key_averages():
        if cuda:
            if row.device_type == DeviceType.CUDA:  # GPU: its kernels are the rows
                yield row.key, row.self_device_time_total, row.count
        elif row.self_cpu_time_total:
            yield row.key, row.self_cpu_time_total, row.count
