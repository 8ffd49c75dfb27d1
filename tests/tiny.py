"""Small models with random weights, and one plan of every kind. Shared by the tests; no test here."""
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import anchors
from anchors import Step
from dit import DiT, DiTConfig, Visible

ROOT = Path(__file__).resolve().parent.parent
SINKS = ("none", "past", "future", "both")
PLANS = {
    "forward": anchors.forward(9),
    "forward, ragged window": anchors.forward(12, window=4, past_sink=True, future_sink=True),
    **{f"backward P={p}": anchors.backward(9, anchors=p) for p in range(4)},
    "backward, dummy": anchors.backward(9, anchors=0, dummy=True),
    "backward, B=6, head 3": anchors.backward(15, block=6, anchors=0, head=3),
    "inbetween": anchors.inbetween(3, 6, 3),
    "inbetween, given": anchors.inbetween(3, 6, 3, given=True),
    "loop": anchors.loop(9),
    "transition": anchors.transition(6, 3, 6),
    "story": anchors.story((3, 6, 3), gap=3),
    **{f"long forward, {s} sink": anchors.long(18, "forward", sink=s) for s in SINKS},
    **{f"long backward, {s} sink": anchors.long(18, "backward", sink=s) for s in SINKS},
}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, the zero-initialised and constant ones too, so that no path is multiplied away."""
    for n, (name, p) in enumerate(model.named_parameters()):
        noise = randn(1000 * seed + n, *p.shape)
        if name.endswith("modulation") or name.endswith("scale_shift_table"):
            p.data = 0.5 * noise
        elif p.ndim > 1:
            p.data = noise / p[0].numel() ** 0.5
        else:
            p.data = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


def tiny_dit(seed: int = 0, **changes: int) -> DiT:
    """86 thousand parameters; head_dim 12, so that time, height and width turn 4 channels each."""
    sizes = {"dim": 48, "num_heads": 4, "ffn_dim": 96, "num_layers": 2, "freq_dim": 32, "text_dim": 32, "text_len": 8, "in_dim": 4,
             "out_dim": 4}
    return randomise(DiT(DiTConfig(**sizes | changes)), seed)


def distance(a: Tensor | Iterable[Tensor], b: Tensor | Iterable[Tensor]) -> float:
    """Largest absolute difference of two tensors (or lists of them) of equal shapes; NaN counts as infinite."""
    if not isinstance(a, Tensor):
        return max(distance(x, y) for x, y in zip(a, b, strict=True))
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max().item()


def side_by_side(steps: Iterable[Step]) -> tuple[list[int], list[int], Visible]:
    """The obvious way to see a plan as one sequence, independent of `anchors.layout`: every step has its own keys.

    returns: step of each slot, position of each slot, who sees whom."""
    owner, pos, keys, spans, home = [], [], [], [], {}
    for n, step in enumerate(steps):
        q, k = len(pos), len(keys)
        home |= {i: q + len(step.anchors) + j for j, i in enumerate(step.targets)}
        keys += [(q + j, p) for j, p in enumerate(step.pos)] + [(home[i], p) for i, p in step.reads]
        owner += [n] * len(step.own)
        pos += step.pos
        spans.append((q, len(pos), ((k, len(keys)),)))
    return owner, pos, Visible(tuple(spans), *(torch.tensor(x) for x in zip(*keys)))


def script(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user does."""
    return subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
