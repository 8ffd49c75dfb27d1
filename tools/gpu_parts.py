"""What is measured in the first hour on a GPU: one small function a part, in the order in which `tools/gpu.py` runs them.

A part takes a `Room` (where it measures, and how large) and returns `Found`: one line, some numbers, perhaps a table. It
raises `Skipped` with a reason where it cannot run, and `Wrong` where what must be equal is not. Everything runs on a CPU
too, at toy size; a line that needs a GPU is marked `# GPU:` with its reason, and a test finds lines that are neither run
nor marked.
"""

import importlib.util
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import anchors
import train_dmd
from anchors import Plan, both_directions, layout
from dit import DiT, DiTConfig, Visible, attend
from sampler import generate, noise_seeded, student_sigmas
from tools.bench import (
    ORDERS,
    Clock,
    autoencoder,
    context,
    copy_rate,
    markdown,
    matmul_rate,
    measure,
    median_of,
    medians,
    name_of,
    parts,
    peak_of,
    share_of_rate,
)
from tools.memory import GIB, Meter, estimate, network, size_of, stage_1, stage_2, trainable
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent.parent


class Skipped(Exception):
    """Why a part does not run here."""


class Wrong(Exception):
    """What is not as it must be."""


@dataclass
class Found:
    """What a part found: a line for the terminal, numbers by name, and a table in Markdown."""

    line: str
    values: dict[str, float] = field(default_factory=dict)
    table: str = ""


@dataclass(frozen=True)
class Room:
    """Where a part measures: the device, the sizes, and the folder for what it writes."""

    device: torch.device
    out: Path
    c: DiTConfig
    teacher: DiTConfig  # the large one
    vae: VAEConfig
    height: int
    width: int
    runs: int
    latents: int  # latents of a clip in training
    toy64: tuple[float, int, tuple[str, ...]]  # seconds, pixels, and how the toy's VAE is trained

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def cells(self) -> tuple[int, int]:
        return self.height // self.vae.space, self.width // self.vae.space

    @property
    def tokens(self) -> int:
        return self.c.tokens(*self.cells)

    def clock(self) -> Clock:
        return Clock(self.device)

    def randn(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=g, device=self.device, dtype=dtype)

    def text(self) -> Tensor:
        return self.randn(1, self.c.text_len, self.c.text_dim)


def demand(holds: bool, sentence: str) -> None:
    """Raise `Wrong` with the sentence unless it holds."""
    if not holds:
        raise Wrong(sentence)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, over the largest value of b (any shape, both alike)."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def spread(a: Tensor, b: Tensor) -> float:
    """The root mean square of the difference over that of b (any shape, both alike)."""
    return ((a.float() - b.float()).square().mean() / b.float().square().mean()).sqrt().item()


# ---------------------------------------------------------------- the machine and its tests
def machine(room: Room) -> Found:
    """What machine this is, and the ceilings that all else is compared with."""
    clock = room.clock()
    rate, copied = matmul_rate(clock, room.dtype), copy_rate(clock)
    name = f"{name_of(room.device)}, torch {torch.__version__}"
    if room.cuda:
        name += f", {driver()}"  # GPU: asks nvidia-smi
    values = {"matmul TFLOP/s": rate / 1e12, "copy GB/s": copied / 1e9}
    kind = str(room.dtype).removeprefix("torch.")
    return Found(
        f"{name}; {kind} products {rate / 1e12:.3g} TFLOP/s, copies {copied / 1e9:.3g} GB/s", values
    )


def driver() -> str:
    """Driver, power limit and clock, as nvidia-smi tells them."""
    what = "driver_version,power.limit,clocks.max.sm,memory.total"  # GPU: no nvidia-smi without one
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]  # GPU: likewise
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # GPU: likewise
    return f"CUDA {torch.version.cuda}, {done.stdout.splitlines()[0]}"  # GPU: likewise


def cuda_tests(room: Room) -> Found:
    """The tests that need CUDA: those with `on_cuda` or `on_a_gpu` in their names."""
    if not importlib.util.find_spec("pytest"):
        raise Skipped("pytest is not installed; pip install -r requirements-dev.txt")
    names = ("_on_cuda", "_on_a_gpu")
    files = [p for p in sorted(ROOT.glob("tests/test_*.py")) if p.name != "test_gpu.py"]
    files = [str(p) for p in files if any(name in p.read_text() for name in names)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k"]
    done = subprocess.run(
        [*command, " or ".join(names), *files], cwd=ROOT, capture_output=True, text=True
    )
    print(done.stdout + done.stderr)
    count = Counter({word: int(n) for n, word in re.findall(r"(\d+) (\w+)", last_line(done))})
    demand(done.returncode == 0, f"pytest ended with {done.returncode}: {last_line(done)}")
    demand(count["passed"] + count["skipped"] > 0, "no test with on_cuda or on_a_gpu in its name")
    if not count["passed"]:
        raise Skipped(f"{count['skipped']} tests need CUDA, and torch sees no GPU")
    return Found(last_line(done), {"CUDA tests passed": count["passed"]})  # GPU: they pass there


def last_line(done: subprocess.CompletedProcess) -> str:
    """What a program said last."""
    lines = (done.stdout + done.stderr).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


# ---------------------------------------------------------------- equal must be equal
def attention(room: Room) -> Found:
    """The realisations of attention agree on the plans that train a student: spans, dense, and flex on CUDA."""
    forward, backward = both_directions(room.latents)
    cases = {
        "forward": layout(forward).visible,
        "backward, P = 3": layout(backward).visible,
        "teacher forcing, forward": layout(forward, teacher_forcing=True).visible,
        "teacher forcing, backward": layout(backward, teacher_forcing=True).visible,
    }
    rows, worst = {}, 0.0
    for name, visible in cases.items():
        rows[name] = agreement(room, visible)
        worst = max(worst, rows[name]["worst difference"])
        rows[name] |= speeds(room, visible) if room.cuda else {}
    demand(worst <= 1e-4, f"they differ by {worst:.2g} in float32, more than 1e-4")
    ways = "flex == spans == dense" if room.cuda else "spans == dense (flex is CUDA's)"
    return Found(f"{ways} to {worst:.1g}", {"attention difference": worst}, markdown(rows))


def agreement(room: Room, visible: Visible, tokens: int = 60) -> dict[str, float]:
    """The largest difference of outputs and gradients in float32, at few tokens a latent (dense would not fit at all)."""
    mask = visible.dense(tokens).to(room.device)  # [L, K]
    q, k, v = (
        room.randn(1, n, 2, 64, seed=i).requires_grad_()
        for i, n in enumerate((mask.shape[0], mask.shape[1], mask.shape[1]))
    )
    weight = room.randn(*q.shape, seed=3)
    ways: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask
        ).transpose(1, 2),
        "spans": lambda: attend(q, k, v, visible),
    }
    if room.cuda:
        prepared = visible.prepare(tokens, room.device)  # GPU: flex has no gradients on a CPU
        ways["flex"] = lambda: attend(q, k, v, prepared)  # GPU: likewise
    with torch.enable_grad():
        found = {name: (out := way(), *grads(out, (q, k, v), weight)) for name, way in ways.items()}
    pairs = [(a, b) for name in found for a, b in zip(found[name], found["dense"])]
    return {"worst difference": max(apart(a, b) for a, b in pairs)}


def grads(out: Tensor, wrt: tuple[Tensor, ...], weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the weighted sum of out (both of one shape [B, L, A, D])."""
    return torch.autograd.grad(out, wrt, weight)


def speeds(room: Room, visible: Visible) -> dict[str, float]:
    """Milliseconds, forward and backward, at full size: which realisation should train?"""
    n, heads = room.tokens, room.c.num_heads  # GPU: there are not two ways on a CPU
    slots, keys = visible.dense().shape  # GPU: likewise
    shape = (heads, room.c.dim // heads)  # GPU: likewise
    sizes = (slots, keys, keys)  # GPU: likewise
    q, k, v = (
        room.randn(1, i * n, *shape, dtype=room.dtype).requires_grad_() for i in sizes
    )  # GPU: likewise
    weight = room.randn(*q.shape, dtype=room.dtype)  # GPU: likewise
    prepared = visible.prepare(n, room.device)  # GPU: likewise

    def update(how: Visible) -> None:
        with torch.enable_grad():  # GPU: likewise
            grads(attend(q, k, v, how), (q, k, v), weight)  # GPU: likewise

    ways = (lambda: update(prepared)), (lambda: update(visible))  # GPU: likewise
    found = medians(room.clock(), room.runs, *ways)  # GPU: likewise
    return {"flex ms": 1e3 * found[0], "spans ms": 1e3 * found[1]}  # GPU: likewise


def precision(room: Room) -> Found:
    """How far bfloat16 is from float32: one pass, two rollouts of nine latents, and the decoder."""
    exact = network(room.c, torch.float32, room.device)
    rough = network(room.c, torch.bfloat16, room.device)
    rough.load_state_dict(exact.state_dict())
    h, w = room.cells
    x, pos = room.randn(1, 3, room.c.in_dim, h, w), torch.arange(3, device=room.device)
    t = torch.full((1, 3), 625.0, device=room.device)
    values = {"pass": spread(*(dit(x, t, room.text(), pos) for dit in (rough, exact)))}
    for plan in (anchors.forward(9), anchors.backward(9)):
        clips = [clip(room, dit, plan) for dit in (rough, exact)]
        values[f"rollout, {plan.name}"] = spread(*clips)
    decoders = [autoencoder(room.vae, d, room.device) for d in (torch.bfloat16, torch.float32)]
    decoders[0].load_state_dict(decoders[1].state_dict())
    z = room.randn(1, 3, room.vae.z_dim, h, w)
    values["VAE"] = spread(*(vae.decode(z) for vae in decoders))
    demand(values["pass"] < 0.1, f"bfloat16 differs by {values['pass']:.2g} of v's size, over 0.1")
    line = ", ".join(f"{name} {100 * x:.2g} %" for name, x in values.items())
    return Found(
        f"bfloat16 against float32: {line}", {f"spread, {k}": x for k, x in values.items()}
    )


def clip(room: Room, dit: DiT, plan: Plan) -> Tensor:
    """The latents [1, T, C, h, w] of a plan."""
    noise = noise_seeded([(0, 0, 0)], (room.c.in_dim, *room.cells), room.device)
    return generate(dit, plan, [dit.text_kv(room.text())], noise, student_sigmas())


def compiled(room: Room) -> Found:
    """Compiled blocks equal eager ones, and a second clip compiles nothing; then, on CUDA, what it gains."""
    small = replace(room.c, num_layers=2)
    eager, fast = (network(small, torch.float32, room.device) for _ in range(2))
    fast.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = "inductor" if room.cuda else "eager"  # a CPU may have no compiler: graphs alone
    fast.compile_blocks(backend)
    worst, graphs = 0.0, []
    for _ in range(2):
        for plan in (anchors.forward(9), anchors.backward(9)):
            worst = max(worst, apart(clip(room, fast, plan), clip(room, eager, plan)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    demand(worst <= 1e-3, f"compiled and eager differ by {worst:.2g} in float32, over 1e-3")
    demand(graphs[1] == graphs[0], f"the second clip compiled {graphs[1] - graphs[0]} graphs more")
    values = {"compiled difference": worst, "graphs": graphs[0]}
    line = f"equal to {worst:.1g}; {graphs[0]} graphs for two orders, none for the second clip"
    if room.cuda:
        values["compiled gain"] = gain(room)  # GPU: on a CPU nothing was compiled
        line += f"; a denoising step {values['compiled gain']:.2f} x as fast"  # GPU: likewise
    return Found(f"{backend}: {line}", values)


def last_block(room: Room, dit: DiT) -> Callable[[], Tensor]:
    """A denoising step of the last block: three latents that see 21."""
    h, w = room.cells
    kv = dit.text_kv(room.text())
    cache, reads = context(dit, kv, 18, h, w, room.dtype)
    past, pos = cache.read(reads), torch.arange(18, 21, device=room.device)
    x, t = room.randn(1, 3, room.c.in_dim, h, w), torch.full((1, 3), 625.0, device=room.device)
    return lambda: dit(x, t, kv, pos, past=past)


def gain(room: Room) -> float:
    """How many times as fast a denoising step is with compiled blocks."""
    eager, fast = (network(room.c, room.dtype, room.device) for _ in range(2))  # GPU: see above
    steps = last_block(room, eager), last_block(room, fast.compile_blocks())  # GPU: likewise
    slow, quick = medians(room.clock(), room.runs, *steps)  # GPU: likewise
    return slow / quick  # GPU: likewise


# ---------------------------------------------------------------- two streams
def streams(room: Room) -> Found:
    """Decode a block while the next is denoised: the loop on one stream, and with the VAE on a second one.

    (The product decodes on one stream; this says whether the other is worth its lines.)"""
    dit = network(room.c, room.dtype, room.device)
    vae = autoencoder(room.vae, room.dtype, room.device)
    one_step, clock, blocks = last_block(room, dit), room.clock(), 4
    began = clock.now()
    alone = interleaved(vae, one_step, blocks, None)
    seconds = clock.now() - began
    if not room.cuda:
        raise Skipped(f"a CPU has no second stream; on one, {blocks} blocks took {seconds:.2g} s")
    aside = torch.cuda.Stream(room.device)  # GPU: streams are CUDA's
    both = interleaved(vae, one_step, blocks, aside)  # GPU: likewise
    clock.now()  # GPU: likewise
    same = torch.equal(alone, both)  # GPU: likewise
    demand(same, "the video of two streams is not that of one")  # GPU: likewise
    loops = [
        lambda s=s: interleaved(vae, one_step, blocks, s) for s in (None, aside)
    ]  # GPU: see above
    first, second = medians(clock, room.runs, *loops)  # GPU: likewise
    values = {"one stream s": first, "two streams s": second}  # GPU: likewise
    return Found(f"two streams are {first / second:.3f} x as fast as one", values)  # GPU: likewise


def interleaved(
    vae: VAE, one_step: Callable[[], Tensor], blocks: int, aside: "torch.cuda.Stream | None"
) -> Tensor:
    """Denoise and decode so many blocks; with a second stream, decode there. The last frames [B, 3, F, H, W]."""
    state = None
    for _ in range(blocks):
        for _ in range(4):
            x0 = one_step()
        if aside:
            aside.wait_stream(torch.cuda.current_stream())  # GPU: streams are CUDA's
            x0.record_stream(aside)  # GPU: likewise; its memory is not free before it is read
        with torch.cuda.stream(aside):  # None: this line does nothing
            video, state = vae.decode_chunk(x0, state)
    return video


# ---------------------------------------------------------------- speed
def step(room: Room) -> Found:
    """The parts of a block, and the denoising step's share of the matmul rate."""
    dit, clock = network(room.c, room.dtype, room.device), room.clock()
    vae = autoencoder(room.vae, torch.float32, room.device)
    found = parts(clock, dit, vae, room.text(), *room.cells, room.runs, room.dtype)
    share = share_of_rate(room.c, room.tokens, found, matmul_rate(clock, room.dtype))
    values = {f"{name} ms": 1e3 * s for name, s in found.items()}
    values["share of the matmul rate %"] = 100 * share
    line = f"a denoising step takes {1e3 * found['denoising step, 3 latents see 21']:.3g} ms"
    table = markdown({name: {"ms": 1e3 * s} for name, s in found.items()})
    return Found(f"{line}, {100 * share:.0f} % of the matmul rate", values, table)


def decoding(room: Room) -> Found:
    """The VAE alone, in both types: seconds of a clip of 81 frames, and memory."""
    z, rows = room.randn(1, 21, room.vae.z_dim, *room.cells), {}
    for dtype in (torch.float32, torch.bfloat16):
        vae = autoencoder(room.vae, dtype, room.device)
        with peak_of(room.device) as peak:
            seconds = median_of(room.clock(), room.runs, lambda vae=vae: decoded(vae, z))
            name = str(dtype).removeprefix("torch.")
            rows[name] = {"81 frames s": seconds, "FPS": 81 / seconds, "peak GiB": peak()}
    values = {f"VAE {name} {k}": x for name, row in rows.items() for k, x in row.items()}
    a, b = (row["81 frames s"] for row in rows.values())
    return Found(
        f"81 frames in {a:.3g} s in float32, {b:.3g} s in bfloat16", values, markdown(rows)
    )


def decoded(vae: VAE, z: Tensor) -> None:
    """Decode a clip [B, T, C, h, w] as a stream, keeping none of it."""
    state = None
    for part in z.split(vae.at_once(*z.shape[3:]), dim=1):
        _, state = vae.decode_chunk(part, state, use_up=True)


def table_7(
    room: Room, plans: dict[str, Plan], vae_dtype: torch.dtype, runs: int
) -> dict[str, dict[str, float]]:
    """Rows of the paper's Table 7, with the VAE in this type."""
    dit = network(room.c, room.dtype, room.device)
    vae, rows = autoencoder(room.vae, vae_dtype, room.device), {}
    for name, plan in plans.items():
        where = room.clock(), dit, vae, plan, room.text(), *room.cells
        rows[name] = measure(*where, runs, room.dtype)
        print(name, rows[name], flush=True)
    return rows


def orders(room: Room) -> Found:
    """Whole clips in every order, end to end; forward and backward also with the VAE in bfloat16."""
    runs = max(room.runs - 1, 1)
    rows = table_7(room, ORDERS, torch.float32, runs)
    twice = {name: ORDERS[name] for name in ("forward", "backward, P = 3")}
    for name, row in table_7(room, twice, torch.bfloat16, runs).items():
        rows[f"{name}, VAE bf16"] = row
    values = {f"{name} {k}": x for name, row in rows.items() for k, x in row.items()}
    values["peak GiB"] = max(row["peak GiB"] for row in rows.values())
    forward, backward = rows["forward"], rows["backward, P = 3"]
    line = f"forward {forward['FPS']:.3g}, backward {backward['FPS']:.3g} FPS"
    return Found(f"{line}, first frame {forward['first frame s']:.2g} s", values, markdown(rows))


def long_video(room: Room) -> Found:
    """30 s forward, both sinks: does the speed hold, and the memory?"""
    rows = table_7(room, {"30 s": anchors.long(120)}, torch.float32, 1)
    values = {f"{name} {k}": x for name, row in rows.items() for k, x in row.items()}
    row = rows["30 s"]
    line = f"30 s in {row['clip s']:.3g} s, {row['FPS']:.3g} FPS, {row['peak GiB']:.3g} GiB"
    return Found(line, values, markdown(rows))


def peers(room: Room) -> Found:
    """diffusers' Wan beside ours, in turns: a pass of 21 latents that see each other, and decoding 21 latents."""
    if not importlib.util.find_spec("diffusers"):
        raise Skipped("diffusers is not installed; pip install diffusers")
    c, device, clock = room.c, room.device, room.clock()
    ours, mine = network(c, room.dtype, device), autoencoder(room.vae, torch.float32, device)
    theirs, other = of_diffusers(room)
    z, t = room.randn(1, 21, c.in_dim, *room.cells), torch.full((1,), 625.0, device=device)
    pos, per_latent, text = torch.arange(21, device=device), t[:, None].expand(1, 21), room.text()
    zt, words = z.transpose(1, 2).contiguous(), text.to(room.dtype)
    short = zt.to(room.dtype)
    transformers = (lambda: ours(z, per_latent, text, pos)), (lambda: theirs(short, t, words))
    decoders = (lambda: decoded(mine, z)), (lambda: other.decode(zt))
    rows = {
        "transformer, 21 latents": medians(clock, room.runs, *transformers),
        "VAE, 81 frames, float32": medians(clock, room.runs, *decoders),
    }
    table = {k: {"ours s": a, "diffusers s": b, "ratio": b / a} for k, (a, b) in rows.items()}
    values = {f"{k}, times diffusers": row["ratio"] for k, row in table.items()}
    line = ", ".join(f"{k} {row['ratio']:.2f} x" for k, row in table.items())
    return Found(f"as fast as diffusers: {line}", values, markdown(table))


def of_diffusers(room: Room) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Its transformer and VAE, of our sizes."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    c = room.c
    with torch.device(room.device):
        transformer = WanTransformer3DModel(
            num_attention_heads=c.num_heads,
            attention_head_dim=c.dim // c.num_heads,
            ffn_dim=c.ffn_dim,
            num_layers=c.num_layers,
            text_dim=c.text_dim,
            freq_dim=c.freq_dim,
        )
        vae = AutoencoderKLWan(base_dim=room.vae.dim, num_res_blocks=room.vae.num_res_blocks)
    return transformer.to(room.dtype).eval(), vae.eval()


# ---------------------------------------------------------------- training
def training(room: Room) -> Found:
    """An update of both stages beside a teacher of the student's size, against the memory estimate."""
    return updates(room, room.c)


def training_14b(room: Room) -> Found:
    """The same beside the large teacher, if memory allows."""
    return updates(room, room.teacher)


def updates(room: Room, teacher: DiTConfig) -> Found:
    """Time and memory of stage 1's, the student's and the critic's update, without an optimiser."""
    kind = str(room.dtype).removeprefix("torch.")
    latent = (room.latents, *room.cells)
    config = train_dmd.Config(latent=latent, micro=1, checkpointing=True, dtype=kind)
    plans = both_directions(room.latents)
    said = [estimate(config, room.c, teacher, d) for d in range(2)]
    needed = (2 * size_of(room.c) + size_of(teacher)) * room.dtype.itemsize / GIB
    needed += max(max(row.values()) for row in said)
    if room.cuda:
        free = torch.cuda.mem_get_info(room.device)[0] / GIB  # GPU: a CPU does not tell
        if free < needed:  # GPU: likewise
            raise Skipped(f"needs {needed:.1f} GiB, {free:.1f} are free")  # GPU: likewise
    g, f_fake = (trainable(network(room.c, room.dtype, room.device), True) for _ in range(2))
    f_real, rows = network(teacher, room.dtype, room.device), {}
    for plan, memory in zip(plans, said):
        found = stage_2(g, f_fake, f_real, plan, config, 1, room.device)
        halves = found.pop("rollout"), found["critic"]
        found["critic"] = lambda halves=halves: [half() for half in halves]
        found["stage 1"] = stage_1(g, plan, latent, 1, room.device)
        for what, update in found.items():
            row = {"estimated GiB": memory[what]} | update_cost(room, update)
            rows[f"{what}, {plan.name}"] = row
    values = {f"{name} {k}": x for name, row in rows.items() for k, x in row.items()}
    worst = max(row["measured GiB"] / row["estimated GiB"] for row in rows.values())
    seconds = {what: sum(rows[f"{what}, {p.name}"]["s"] for p in plans) for what in found}
    values |= {f"{what} s": s for what, s in seconds.items()}
    line = ", ".join(f"{what} {s:.3g} s" for what, s in seconds.items())
    return Found(f"{line}; memory at most {worst:.2f} x the estimate", values, markdown(rows))


@torch.enable_grad()
def update_cost(room: Room, update: Callable[[], object]) -> dict[str, float]:
    """Seconds of an update, and the GiB that it takes beyond the weights."""
    if room.cuda:
        update()  # GPU: kernels are chosen and compiled in the first call
        before = torch.cuda.memory_allocated(room.device) / GIB  # GPU: a CPU has no such counter
        with peak_of(room.device) as peak:  # GPU: likewise
            seconds = median_of(room.clock(), 1, update)  # GPU: likewise
            return {"measured GiB": peak() - before, "s": seconds}  # GPU: likewise
    with Meter() as meter:
        update()
    return {"measured GiB": meter.peak / GIB, "s": median_of(room.clock(), 1, update)}


# ---------------------------------------------------------------- where the time goes
KERNELS = {  # words in the names of CUDA's kernels and of torch's operations, looked for in this order
    "attention": r"flash|fmha|attention|sdpa",
    "convolutions": r"conv|cudnn",
    "matrix products": r"gemm|nvjet|cutlass|xmma|addmm|linear|\bmm\b|bmm|mkldnn",
    "norms": r"norm|mean|rsqrt|pow",
    "copies": r"copy|cat|mem(cpy|set)|clone|index|fill|zero",
    "elementwise": r"elementwise|add|mul|sub|div|gelu|silu|clamp|complex|triton|vectorized|upsample",
}


def family(kernel: str) -> str:
    """To which family a kernel belongs, by its name: `flash_fwd_kernel` -> attention."""
    return next((k for k, words in KERNELS.items() if re.search(words, kernel.lower())), "other")


def profile(room: Room) -> Found:
    """One block of three latents that sees 18 before it: five passes and its decoding, by kernel family; the trace is kept."""
    dit = network(room.c, room.dtype, room.device)
    vae, one_step = autoencoder(room.vae, room.dtype, room.device), last_block(room, dit)

    def block() -> None:
        for _ in range(5):
            x0 = one_step()
        vae.decode_chunk(x0)

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
    return Found(f"a block, {total:.3g} ms: {line}; trace.json.gz", values, markdown(rows))


def kernels(profiler: torch.profiler.profile, cuda: bool) -> Iterator[tuple[str, float, int]]:
    """Name, microseconds and calls: of the GPU's kernels, or of torch's operations on a CPU."""
    for row in profiler.key_averages():
        if cuda:
            if row.device_type == DeviceType.CUDA:  # GPU: its kernels are the rows
                yield row.key, row.self_device_time_total, row.count  # GPU: likewise
        elif row.self_cpu_time_total:
            yield row.key, row.self_cpu_time_total, row.count


# ---------------------------------------------------------------- and it learns
def toy64(room: Room) -> Found:
    """The toy world at 64 pixels: its VAE for a few steps, then its teacher until the time is up. Does the loss fall?"""
    (seconds, pixels, flags), began = room.toy64, time.perf_counter()
    out = room.out / "toy64"
    shutil.rmtree(out, ignore_errors=True)  # what an earlier call left there would go on
    common = ["--out", str(out), "--size", str(pixels), "--device", room.device.type]
    run_toy("toy.train_vae", [*common, *flags], seconds)
    few = ["--preset", "toy64", "--clips", "64", "--batch", "4", "--pictures", "4"]
    left, log = seconds - (time.perf_counter() - began), out / "teacher.log.jsonl"
    run_toy("toy.train_teacher", [*common, *few], left, log)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [row["clip"] for row in rows]
    demand(max(losses) < 100, f"the teacher's loss reached {max(losses):.3g}")
    values = {"teacher steps": rows[-1]["step"] + 1, "teacher s a step": rows[-1]["seconds"]}
    tail = statistics.mean(losses[-5:])
    line = f"{values['teacher steps']} steps of the teacher, loss {losses[0]:.3g} -> {tail:.3g}"
    return Found(line, values)


def run_toy(script: str, flags: list[str], seconds: float, log: Path | None = None) -> None:
    """Run a script of the toy world to its end; with a log, stop it as Ctrl-C does when the time is up and it has logged."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", script, *flags], cwd=ROOT) as process:
        try:
            while process.poll() is None:
                spent = time.perf_counter() - began
                if log and log.exists() and spent > seconds:
                    process.send_signal(signal.SIGINT)
                    log = None
                demand(spent < 2 * seconds + 120, f"{script} is not done after {spent:.0f} s")
                time.sleep(0.2)
        finally:
            process.kill()  # nothing, if it has ended
    demand(process.returncode == 0, f"{script} ended with {process.returncode}")


PARTS: dict[str, tuple[Callable[[Room], Found], int]] = {  # in order; seconds that each may take
    "machine": (machine, 60),
    "tests": (cuda_tests, 240),
    "attention": (attention, 240),
    "precision": (precision, 90),
    "compile": (compiled, 300),
    "streams": (streams, 90),
    "step": (step, 60),
    "vae": (decoding, 90),
    "orders": (orders, 420),
    "long": (long_video, 150),
    "diffusers": (peers, 150),
    "training": (training, 180),
    "training-14b": (training_14b, 180),
    "profile": (profile, 90),
    "toy64": (toy64, 360),
}
