"""The first hour on a GPU, first half: is everything right there? (`tools/gpu.py` runs it,
`tools/gpu_speed.py` goes on.)

One small function a part. A part takes a `Room` (where it measures, and how large) and returns
`Found`: one line, some numbers, perhaps a table. It raises `Skipped` with a reason where it cannot
run, and `Wrong` where what must be equal is not. Everything runs on a CPU too, at toy size; a line
that needs a GPU is marked `# GPU:` with its reason, and a test finds lines that are neither run nor
marked."""

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import anchors
from anchors import Plan, layout
from dit import DiT, DiTConfig, Visible, attend
from plans import both_directions
from sampler import generate, noise_seeded
from tools import bench
from tools.memory import network
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent.parent


class Skipped(Exception):
    """Why a part does not run here."""


class Wrong(Exception):
    """What is not as it must be."""


@dataclass
class Found:
    """What a part found: a line for the terminal, numbers by name, and the rows of a
    table."""

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
    toy64: tuple[float, int, tuple[str, ...]]  # seconds, pixels, and how the toy's VAE is trained

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
    rate, copied = bench.matmul_rate(clock, room.dtype), bench.copy_rate(clock)
    name = f"{bench.name_of(room.device)}, torch {torch.__version__}"
    if room.cuda:
        name += f", {driver()}"  # GPU: asks nvidia-smi
    values = {"matmul TFLOP/s": rate / 1e12, "copy GB/s": copied / 1e9}
    kind, (flops, bytes_) = str(room.dtype).removeprefix("torch."), values.values()
    return Found(f"{name}; {kind} products {flops:.3g} TFLOP/s, copies {bytes_:.3g} GB/s", values)


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
    """The realisations of attention agree on the plans that train a student: spans, dense, and flex
    on CUDA."""
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
    return Found(f"{ways} to {worst:.1g}", {"attention difference": worst}, rows)


def agreement(room: Room, visible: Visible, tokens: int = 60) -> dict[str, float]:
    """The largest difference of outputs and gradients in float32, at few tokens a latent (dense
    would not fit at all)."""
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
    n, heads = room.c.tokens(*room.cells), room.c.num_heads  # GPU: there are not two ways on a CPU
    slots, keys = visible.dense().shape  # GPU: likewise
    shape = (heads, room.c.dim // heads)  # GPU: likewise
    sizes = (slots, keys, keys)  # GPU: likewise
    q, k, v = (
        room.randn(1, i * n, *shape, dtype=room.dtype).requires_grad_() for i in sizes
    )  # GPU: likewise
    weight = room.randn(*q.shape, dtype=room.dtype)  # GPU: likewise

    def update(how: Visible) -> None:
        with torch.enable_grad():  # GPU: likewise
            grads(attend(q, k, v, how), (q, k, v), weight)  # GPU: likewise

    ways = partial(update, visible.prepare(n, room.device)), partial(update, visible)  # GPU: same
    found = bench.medians(room.clock(), room.runs, *ways)  # GPU: likewise
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
    kinds = torch.bfloat16, torch.float32
    decoders = [bench.autoencoder(room.vae, d, room.device) for d in kinds]
    decoders[0].load_state_dict(decoders[1].state_dict())
    z = room.randn(1, 3, room.vae.z_dim, h, w)
    values["VAE"] = spread(*(vae.decode(z) for vae in decoders))
    demand(values["pass"] < 0.1, f"bfloat16 differs by {values['pass']:.2g} of v's size, over 0.1")
    line = ", ".join(f"{name} {100 * x:.2g} %" for name, x in values.items())
    values = {f"spread, {name}": x for name, x in values.items()}
    return Found(f"bfloat16 against float32: {line}", values)


def clip(room: Room, dit: DiT, plan: Plan) -> Tensor:
    """The latents [1, T, C, h, w] of a plan."""
    noise = noise_seeded([(0, 0, 0)], (room.c.in_dim, *room.cells), room.device)
    return generate(dit, plan, [dit.text_kv(room.text())], noise)


def compiled(room: Room) -> Found:
    """Compiled blocks equal eager ones, and a second clip compiles nothing; then, on CUDA, what it
    gains."""
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


def gain(room: Room) -> float:
    """How many times as fast a denoising step is with compiled blocks."""
    fast = network(room.c, room.dtype, room.device).compile_blocks()  # GPU: see above
    both = room.timed(room.dtype), room.timed(room.dtype, fast)  # GPU: likewise
    steps = [timed.last_block()[bench.LAST] for timed in both]  # GPU: likewise
    slow, quick = bench.medians(room.clock(), room.runs, *steps)  # GPU: likewise
    return slow / quick  # GPU: likewise


# ---------------------------------------------------------------- two streams
def streams(room: Room) -> Found:
    """Decode a block while the next is denoised: the loop on one stream, and with the VAE on a
    second one.

    (The product decodes on one stream; this says whether the other is worth its lines.)"""
    timed, blocks = room.timed(room.dtype), 4
    vae, clock, one_step = timed.vae, timed.clock, timed.last_block()[bench.LAST]
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
    loop = partial(interleaved, vae, one_step, blocks)  # GPU: likewise
    loops = partial(loop, None), partial(loop, aside)  # GPU: likewise
    first, second = bench.medians(clock, room.runs, *loops)  # GPU: likewise
    values = {"one stream s": first, "two streams s": second}  # GPU: likewise
    return Found(f"two streams are {first / second:.3f} x as fast as one", values)  # GPU: likewise


def interleaved(
    vae: VAE, one_step: Callable[[], Tensor], blocks: int, aside: "torch.cuda.Stream | None"
) -> Tensor:
    """Denoise and decode so many blocks; with a second stream, decode there. The last frames [B, 3,
    F, H, W]."""
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
