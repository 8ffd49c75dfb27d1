"""How much memory a training step needs, before you rent it.

The updates of both stages run at full size on the meta device: every shape and dtype is real,
nothing is computed, and each tensor's bytes are counted from its birth to its death. The peak is
what activations, cache and scratch tensors need on each GPU; weights, masters, optimisers and
averages are added by arithmetic, sharded over the GPUs as FSDP2 does. What is not counted: the
workspace of kernels and of NCCL, and the allocator's fragmentation. `tools/gpu.py` runs the same
updates on a GPU and puts what they took beside what is said here.

    python -m tools.memory --preset wan --gpus 1 8 64
    python -m tools.memory --write docs/many-gpus.md          # and put the tables there
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import train_dmd
from anchors import Plan, layout
from dit import PRESETS, DiT, DiTConfig
from lib.common import UserError, dtype_of, run
from lib.noise import noise_from
from lib.recipe import trained_as
from plans import both_directions, rows_of
from sampler import generate, student_sigmas
from tools.count import BFLOAT, put, size_of, table
from train_ode import ode_loss

GIB = 2**30
TRAINED = 16  # bytes a parameter: float32 master, gradient, Adam's two moments


# ---------------------------------------------------------------- bytes that are alive
def tensors_of(tree: object) -> list[Tensor]:
    """All tensors in lists, tuples and dicts of such."""
    return [x for x in tree_iter(tree) if isinstance(x, Tensor)]


class Meter(TorchDispatchMode):
    """Count the bytes of all tensors made inside the block that are alive; remember the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        # what works in place returns an input, a weight for instance
        given = {x.untyped_storage()._cdata for x in tensors_of((args, kwargs))}
        for x in tensors_of(out):
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known | given:
                self.known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key, size)
        return out


class Fused(torch.autograd.Function):
    """The memory of fused attention: it keeps q, k, v, its output and one float a query.

    On the meta device torch would take the unfused path and count scores that no GPU ever holds."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


# ---------------------------------------------------------------- networks and their updates
def network(c: DiTConfig, dtype: torch.dtype, device: torch.device | str = "meta") -> DiT:
    """A transformer with random weights, made in its own type: 14B in float32 would take 57 GB."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            dit = DiT(c)
            torch.nn.init.normal_(dit.head.head.weight, std=0.02)  # else v = 0
    finally:
        torch.set_default_dtype(usual)
    return dit.eval().requires_grad_(False)


def trainable(dit: DiT, checkpointing: bool) -> DiT:
    """The same with gradients that vanish when complete, as after FSDP's reduce-scatter."""
    dit.checkpointing = checkpointing
    for p in dit.requires_grad_(True).parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return dit


def stage_1(
    g: DiT, plan: Plan, latent: tuple[int, int, int], B: int, device: torch.device | str
) -> Callable[[], None]:
    """Stage 1's update of B samples, forward and backward, in one direction: call it to run it."""
    c, (_, h, w) = g.config, latent
    lay = layout(plan)
    sigmas = torch.tensor([*student_sigmas(), 0.0], device=device)
    states = torch.randn(B, len(sigmas), len(lay.latent), c.in_dim, h, w, device=device)
    levels = torch.zeros(B, len(plan.steps), dtype=torch.long, device=device)
    text = torch.randn(B, c.text_len, c.text_dim, device=device)
    return lambda: ode_loss(g, lay, states, levels, sigmas, text).mean().backward()


def updates(
    g: DiT,
    f_fake: DiT,
    f_real: DiT,
    plan: Plan,
    config: train_dmd.Config,
    B: int,
    device: torch.device | str,
) -> dict[str, Callable[[], None]]:
    """What a training step of B samples runs in one direction, each to be called: the student's
    update (all denoising steps), the critic's in its two halves, and stage 1's."""
    c, (T, h, w) = g.config, config.latent
    levels = len(config.denoising)
    text = torch.randn(B, c.text_len, c.text_dim, device=device)
    noise = torch.randn(levels, B, rows_of([plan]), c.in_dim, h, w, device=device)
    score, u = torch.randn(B, T, c.in_dim, h, w, device=device), torch.rand(B, device=device)
    at = train_dmd.Score(u, score, text, text, config.guidance, config.shift)

    def generated() -> Tensor:
        start = noise_from(noise[0], noise[1:], T)
        recipe = trained_as(config)
        return generate(g, plan, [text], start, recipe=recipe, exit_at=lambda n: levels - 1)

    @torch.no_grad()
    def rollout() -> Tensor:
        return generated()

    def student() -> None:
        x = generated()
        x_real, x_fake = train_dmd.scores(f_real, f_fake, x.detach(), at)
        gradient = train_dmd.dmd_gradient(x.detach(), x_real, x_fake)
        train_dmd.dmd_loss(x, gradient).mean().backward()

    def critic() -> None:
        x = torch.randn_like(score)
        train_dmd.critic_loss(f_fake, x, at).mean().backward()

    of_stage_1 = stage_1(g, plan, config.latent, B, device)
    return {"student": student, "rollout": rollout, "critic": critic, "stage 1": of_stage_1}


# ---------------------------------------------------------------- estimates
@torch.enable_grad()
def peaks(
    config: train_dmd.Config, student: DiTConfig, teacher: DiTConfig, direction: int
) -> dict[str, float]:
    """Peak GiB, without weights, of both stages' updates in one direction (`micro` samples)."""
    dtype, B = dtype_of(config.dtype), config.micro or config.batch
    plans = both_directions(config.latent[0], config.block, config.anchors, config.head)
    g, f_fake = (trainable(network(student, dtype), config.checkpointing) for _ in range(2))
    with torch.device("meta"):
        f_real = network(teacher, dtype)
        steps = updates(g, f_fake, f_real, plans[direction], config, B, "meta")
    found = {}
    with mock.patch("dit.attend", lambda q, k, v, visible=None: Fused.apply(q, k, v)):
        for what, update in steps.items():
            with Meter() as meter:
                update()
            found[what] = meter.peak / GIB
    return found


def estimate(
    config: train_dmd.Config, student: DiTConfig, teacher: DiTConfig, direction: int
) -> dict[str, float]:
    """The same from two layers and three, extended, in seconds: every layer more adds the same."""
    two, three = (
        peaks(config, replace(student, num_layers=n), replace(teacher, num_layers=2), direction)
        for n in (2, 3)
    )
    found = {k: two[k] + (student.num_layers - 2) * (three[k] - two[k]) for k in two}
    found["critic"] = max(found.pop("rollout"), found["critic"])  # one after the other
    return found


def gathered(c: DiTConfig) -> float:
    """GiB of the bfloat16 parameters of a sharded network that lie whole on a GPU while it
    computes: all but its blocks, this block and the next."""
    two_blocks = replace(c, num_layers=2)
    return size_of(two_blocks) * BFLOAT / GIB


def weights_1(student: DiTConfig, gpus: int) -> dict[str, float]:
    """GiB a GPU in stage 1: what is sharded, and what is gathered while they compute."""
    sharded = size_of(student) * TRAINED / gpus / GIB
    return {"student: master, gradient, Adam": sharded, "gathered blocks": gathered(student)}


def weights_2(student: DiTConfig, teacher: DiTConfig, gpus: int) -> dict[str, float]:
    """The same in stage 2, with a frozen teacher in bfloat16, and an average of the student."""
    return {
        "teacher": size_of(teacher) * BFLOAT / gpus / GIB,
        "student: master, gradient, Adam, average": size_of(student) * (TRAINED + 4) / gpus / GIB,
        "critic: master, gradient, Adam": size_of(student) * TRAINED / gpus / GIB,
        "gathered blocks": 2 * gathered(student) + gathered(teacher),
    }


def sheet(weights: dict[int, dict[str, float]], active: dict[str, float]) -> str:
    """Markdown: a row for each thing, a column for each number of GPUs, and the peak."""
    names = list(next(iter(weights.values())))
    rows = [[name, *(row[name] for row in weights.values())] for name in names]
    rows += [[f"activations: {name}"] + [gib] * len(weights) for name, gib in active.items()]
    tops = [sum(row.values()) + max(active.values()) for row in weights.values()]
    rows.append(["**peak**", *(f"**{top:.1f}**" for top in tops)])
    gpus = {f"{n} GPU{'s' * (n > 1)}": ".1f" for n in weights}
    return table({"GiB a GPU": ""} | gpus, rows)


def estimated(config: "Config") -> str:
    """Both stages' tables, in Markdown."""
    preset = train_dmd.Config.PRESETS[config.preset] | {"micro": config.micro}
    settings = train_dmd.Config(**preset)
    student = PRESETS["wan1.3b"]
    teacher = PRESETS["wan14b"] if config.preset == "wan" else student
    first, second = {}, {}
    for direction, name in enumerate(("forward", "backward")):
        for what, gib in estimate(settings, student, teacher, direction).items():
            (first if what == "stage 1" else second)[f"{what}, {name}"] = gib
    slots = len(layout(both_directions()[1]).latent)
    tokens = slots * student.tokens(*settings.latent[1:])
    return (
        f"Stage 1 ({slots} latents = {tokens:,} tokens backward):\n\n"
        + sheet({n: weights_1(student, n) for n in config.gpus}, first)
        + "\n\nStage 2:\n\n"
        + sheet({n: weights_2(student, teacher, n) for n in config.gpus}, second)
    )


@dataclass
class Config:
    """Estimate the memory of a training step per GPU, in GiB."""

    RANGES = {"preset": ("wan", "wan-small-teacher"), "gpus": (1, 10**6), "micro": (1, 10**6)}
    preset: str = "wan"  # wan or wan-small-teacher
    gpus: tuple[int, ...] = (1, 8, 64)  # how many share the weights
    micro: int = 1  # samples a GPU
    write: str = ""  # also put the tables into this page, between its marks


def main(config: Config) -> None:
    if not config.gpus:
        raise UserError("--gpus nothing must be one number or more: how many share the weights")
    text = estimated(config)
    print(f"preset {config.preset}, samples a GPU: {config.micro}\n\n{text}")
    if config.write:
        put(config.write, f"python -m tools.memory --preset {config.preset}", text)


if __name__ == "__main__":
    run(main, Config)
