"""Small models with random weights, and one plan of every kind. Shared by the tests; no test
here."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import anchors
import plans
from anchors import Step, View
from dit import DiT, DiTConfig, Visible, save_dit
from lib.common import run
from lib.tensors import read_tensors
from plans import any_mix
from vae import VAE, VAEConfig, save_vae

ROOT = Path(__file__).resolve().parent.parent
SINKS = ("none", "past", "future", "both")
PLANS = {
    "forward": anchors.forward(9),
    "forward, ragged window": anchors.forward(12, view=View(4, True, True)),
    **{f"backward P={p}": anchors.backward(9, anchors=p) for p in range(4)},
    "backward, dummy": anchors.backward(9, anchors=0, dummy=True),
    "backward, B=6, head 3": anchors.backward(15, block=6, anchors=0, head=3),
    "inbetween": anchors.inbetween(12),
    "inbetween, given": anchors.inbetween(12, given=True),
    "loop": anchors.loop(9),
    "transition": plans.transition(15, gap=3),
    "story": plans.story(18, gap=3),
    "timeline, middle of a shot": plans.timeline(15, [(6, 9)]),
    "timeline, held latents": plans.with_given(plans.timeline(11, [(2, 5), (6, 8)]), [0, 3, 6, 7]),
    "timeline, one shot": plans.with_given(
        plans.timeline(12, [(0, 3), (7, 12)], joined=True), [*range(3), *range(7, 12)]
    ),
    "timeline, in another order": plans.switch(
        plans.timeline(13, [(1, 4), (6, 9), (9, 12)], order=(2, 0, 1)), (3, 9)
    ),
    "timeline, wide gap": plans.timeline(22, [(0, 1), (19, 22)], block=2, anchors=2),
    "timeline, long": plans.timeline(27, [(9, 15)], view=View(6, True, True)),
    "forward, held latent": plans.with_given(anchors.forward(9), [0]),
    **{f"long forward, {s} sink": anchors.long(18, "forward", sink=s) for s in SINKS},
    **{f"long backward, {s} sink": anchors.long(18, "backward", sink=s) for s in SINKS},
    "long backward, as trained": anchors.long(18, "backward", as_trained=True),
}
# what training draws from, each plan once
MIXED = {
    f"mix {n}, {plan.name}": plan
    for n, plan in enumerate(dict.fromkeys(p for _, plans in any_mix(15) for p in plans))
}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, the zero-initialised and constant ones too, so that no path is
    multiplied away."""
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
    sizes = {
        "dim": 48,
        "num_heads": 4,
        "ffn_dim": 96,
        "num_layers": 2,
        "freq_dim": 32,
        "text_dim": 32,
        "text_len": 8,
        "in_dim": 4,
        "out_dim": 4,
    }
    return randomise(DiT(DiTConfig(**sizes | changes)), seed)


def distance(a: Tensor | Iterable[Tensor], b: Tensor | Iterable[Tensor]) -> float:
    """Largest absolute difference of two tensors (or lists of them) of equal shapes; NaN counts as
    infinite."""
    if not isinstance(a, Tensor):
        return max(distance(x, y) for x, y in zip(a, b, strict=True))
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max().item()


def side_by_side(steps: Iterable[Step]) -> tuple[list[int], list[int], Visible]:
    """The obvious way to see a plan as one sequence, independent of `anchors.layout`: every step
    has its own keys.

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
    return subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


# ---------------------------------------------------------------- for the training scripts
WORDED = {
    "dim": 24,
    "num_heads": 2,
    "ffn_dim": 48,
    "num_layers": 2,
    "freq_dim": 16,
    "text_dim": 64,
    "text_len": 12,
    "in_dim": 2,
    "out_dim": 2,
}
WORKER = """import importlib, json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from lib import common
for name, changes in json.load(open(sys.argv[2])):
    script = importlib.import_module(name)
    if changes.pop("sigterm_in_step_0", False):
        def step(*args, real=script.apply_gradients):
            if os.environ["RANK"] == "1" and args[3].startswith("step 0"):
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)
        script.apply_gradients = step
    try:
        script.main(script.Config(**changes | {"latent": tuple(changes["latent"])}))
    except SystemExit:  # stopped by the signal
        pass
common.leave()
"""


def tiny_checkpoints(folder: Path) -> dict[str, str]:
    """What training starts from, as small as can be and in the toy world's words: another random
    teacher and student, and a VAE."""
    paths = {name: str(folder / f"{name}.safetensors") for name in ("teacher", "student", "vae")}
    save_dit(tiny_dit(1, **WORDED), paths["teacher"])
    save_dit(tiny_dit(2, **WORDED), paths["student"])
    save_vae(VAE(VAEConfig(dim=4, z_dim=2, num_res_blocks=1)), paths["vae"])
    return paths


def two_processes(folder: Path, *runs: tuple[str, dict], timeout: float = 200) -> str:
    """Run `main(Config(**changes))` of the named scripts, one after the other, in two processes
    under torchrun; what they printed.

    sigterm_in_step_0 among the changes: only process 1 gets the signal."""
    (folder / "worker.py").write_text(WORKER)
    (folder / "runs.json").write_text(json.dumps(runs))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += [folder / "worker.py", ROOT, folder / "runs.json"]
    with subprocess.Popen(
        [str(w) for w in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for child in workers_of(process.pid):
                os.kill(child, signal.SIGKILL)
            raise
    assert process.returncode == 0, err[-3000:]
    return out


def workers_of(pid: int) -> list[int]:
    """A process and its children, which torchrun puts into groups of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*map(int, children), pid]


def rows(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """The log of a run, without the time it took."""
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / name).read_text().splitlines()
    ]


def saved(folder: Path, name: str = "state.pt") -> dict[str, Tensor]:
    """All tensors and numbers of a resume state: step, weights, optimisers, averages, flat."""
    flat, todo = {}, list(torch.load(folder / name, weights_only=True).items())
    while todo:
        key, value = todo.pop()
        if isinstance(value, (dict, list, tuple)):
            todo += [
                (f"{key}/{k}", v)
                for k, v in (value.items() if isinstance(value, dict) else enumerate(value))
            ]
        elif key != "config":
            flat[key] = value
    return flat


def same(a: dict, b: dict) -> bool:
    """Equal, bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


def apart(a: Path, b: Path, name: str = "student") -> float:
    """The largest difference between the weights that two runs wrote."""
    x, y = (read_tensors(folder / f"{name}.safetensors")[0] for folder in (a, b))
    assert x.keys() == y.keys()
    return distance(x.values(), y.values())


def at_call(monkeypatch, module, name: str, number: int, action: Callable[[], object]) -> None:
    """Do something just before the given call of a function of a module."""
    real, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    """What no code of ours catches: the out-of-memory killer, in process."""
    raise MemoryError


def command_line(monkeypatch, capsys, script, *switches: str, **flags: object) -> tuple[int, str]:
    """Run a script's `run(main, Config)` with flags as typed; exit code and the line of its
    error."""
    words = [
        str(w) for k, v in flags.items() for w in (f"--{k}", *(v if isinstance(v, tuple) else (v,)))
    ]
    monkeypatch.setattr(sys, "argv", [script.__name__, *switches, *words])
    try:
        run(script.main, script.Config)
    except SystemExit as stop:
        errors = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")
        ]
        assert len(errors) == 1
        return stop.code, errors[0]
    return 0, ""
