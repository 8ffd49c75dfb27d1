"""The first hour on a GPU: is everything right there? `python -m tools.gpu` runs these parts.

The CUDA tests of this folder; attention, bfloat16 and compiled blocks against the plain way. What
a part is: `tools/gpu_speed.py:Room`.
"""

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import anchors
from anchors import Plan, layout
from dit import DiT, Visible, attend
from lib.noise import noise_seeded
from plans import both_directions
from sampler import generate
from tools import bench
from tools.gpu_speed import ROOT, Found, Room, Skipped, demand
from tools.memory import network


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, over the largest value of b (any shape, both alike)."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def spread(a: Tensor, b: Tensor) -> float:
    """The root mean square of the difference over that of b (any shape, both alike)."""
    return ((a.float() - b.float()).square().mean() / b.float().square().mean()).sqrt().item()


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
    return Found(last_line(done), {"CUDA tests passed": count["passed"]})  # GPU: there they do


def last_line(done: subprocess.CompletedProcess) -> str:
    """What a program said last."""
    lines = (done.stdout + done.stderr).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


# ---------------------------------------------------------------- equal must be equal
def attention(room: Room) -> Found:
    """Attention span by span is that by a dense mask, on the plans that train a student."""
    forward, backward = both_directions(room.latents)
    cases = {
        "forward": layout(forward).visible,
        "backward, P = 3": layout(backward).visible,
        "teacher forcing, forward": layout(forward, teacher_forcing=True).visible,
        "teacher forcing, backward": layout(backward, teacher_forcing=True).visible,
    }
    rows, worst = {}, 0.0
    for name, visible in cases.items():
        rows[name] = {"worst difference": agreement(room, visible)}
        worst = max(worst, rows[name]["worst difference"])
    demand(worst <= 1e-4, f"they differ by {worst:.2g} in float32, more than 1e-4")
    return Found(f"spans == dense to {worst:.1g}", {"attention difference": worst}, rows)


def agreement(room: Room, visible: Visible, tokens: int = 60) -> float:
    """The largest difference of outputs and gradients in float32, at few tokens a latent (dense
    would not fit at all)."""
    mask = visible.dense(tokens).to(room.device)  # [L, K]
    q, k, v = (
        room.randn(1, n, 2, 64, seed=i).requires_grad_()
        for i, n in enumerate((mask.shape[0], mask.shape[1], mask.shape[1]))
    )
    weight, found = room.randn(*q.shape, seed=3), []
    with torch.enable_grad():
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        dense = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
        for out in (attend(q, k, v, visible), dense):  # (1, L, 2, 64)
            found.append([out, *torch.autograd.grad(out, (q, k, v), weight)])
    return max(apart(a, b) for a, b in zip(*found))


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
    if room.cuda:  # GPU: on a CPU nothing was compiled
        values["compiled gain"] = gain(room)
        line += f"; a denoising step {values['compiled gain']:.2f} x as fast"
    return Found(f"{backend}: {line}", values)


def gain(room: Room) -> float:  # GPU: see above
    """How many times as fast a denoising step is with compiled blocks."""
    fast = network(room.c, room.dtype, room.device).compile_blocks()
    both = room.timed(room.dtype), room.timed(room.dtype, fast)
    steps = [timed.last_block()[bench.LAST] for timed in both]
    slow, quick = bench.medians(room.clock(), room.runs, *steps)
    return slow / quick
