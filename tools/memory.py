"""How much memory a DMD step needs, before you rent it.

The step of `train_dmd.py` runs at full size on the meta device: every shape and dtype is real, nothing is computed, and
each tensor's bytes are counted from its birth to its death. The peak is what activations, cache and scratch tensors need
on each GPU; weights, masters, optimisers and averages are added by arithmetic, sharded over the GPUs as FSDP2 does.
What is not counted: the workspace of kernels and of NCCL, and the allocator's fragmentation.

    python memory.py --preset wan --gpus 1 8 64
"""

import weakref
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import dit
import train_dmd
from anchors import both_directions
from dit import PRESETS, DiT
from lib.common import UserError, dtype_of, run
from sampler import generate, noise_from, student_sigmas


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
        before = {
            x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if (
                    storage._cdata not in self.known and storage._cdata not in before
                ):  # not a view, not a weight
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out


class Fused(torch.autograd.Function):
    """The memory of fused attention: it keeps q, k, v, its output and one float a query. (On the meta device torch would
    take the unfused path and count scores that no GPU ever holds.)"""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def network(name: str, dtype: torch.dtype, trained: bool, checkpointing: bool) -> DiT:
    """A transformer without data; gradients vanish as soon as they are complete, as after FSDP's reduce-scatter."""
    with torch.device("meta"):
        model = DiT(PRESETS[name]).to(dtype).requires_grad_(trained)
    model.checkpointing = checkpointing
    for p in model.parameters() if trained else ():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return model


def peaks(config: train_dmd.Config, student: str, teacher: str, direction: int) -> dict[str, float]:
    """Peak GiB of one student and one critic update of `config.micro` samples, in one direction, without weights."""
    dtype, (T, h, w), B = dtype_of(config.dtype), config.latent, config.micro or config.batch
    dit.attend = lambda q, k, v, visible=None: Fused.apply(q, k, v)
    g, f_fake = (network(student, dtype, True, config.checkpointing) for _ in range(2))
    f_real = network(teacher, dtype, False, False)
    plan = both_directions(T, config.block, config.anchors, config.head)[direction]
    c, sigmas = g.config, student_sigmas(shift=config.shift)
    empty = {
        k: torch.empty(s, device="meta")
        for k, s in {
            "text": (B, c.text_len, c.text_dim),
            "u": (B,),
            "noise": (len(sigmas), B, T + config.block, c.in_dim, h, w),
            "score": (B, T, c.in_dim, h, w),
        }.items()
    }
    noise = noise_from(empty["noise"][0], empty["noise"][1:], T)
    result = {}
    for what in ("student", "critic"):
        with Meter() as meter, torch.set_grad_enabled(what == "student"):
            x = generate(g, plan, [empty["text"]], noise, sigmas, exit_at=len(sigmas) - 1)
            if what == "student":
                gradient = train_dmd.dmd_gradient(
                    f_real,
                    f_fake,
                    x.detach(),
                    empty["u"],
                    empty["score"],
                    empty["text"],
                    empty["text"],
                    config.guidance,
                    config.shift,
                )
                train_dmd.dmd_loss(x, gradient).mean().backward()
            else:
                with torch.enable_grad():
                    train_dmd.critic_loss(
                        f_fake, x, empty["u"], empty["score"], empty["text"], config.shift
                    ).mean().backward()
        if x.shape != (B, T, c.in_dim, h, w) or x.dtype != torch.float32:
            raise AssertionError(f"the rollout gave {tuple(x.shape)} {x.dtype}")
        result[what] = meter.peak / 2**30
    return result


def weights(student: str, teacher: str, gpus: int, itemsize: int = 2) -> dict[str, float]:
    """GiB a GPU: what is sharded over the GPUs, and the parts gathered while they compute (this block and the next)."""
    whole, gathered = {}, {}
    for name in {student, teacher}:
        with torch.device("meta"):
            model = DiT(PRESETS[name])
        block = sum(p.numel() for p in model.blocks[0].parameters())
        whole[name] = sum(p.numel() for p in model.parameters())
        gathered[name] = (whole[name] - block * (len(model.blocks) - 2)) * itemsize / 2**30
    return train_dmd.memory_of_weights(
        whole[student], whole[student], whole[teacher], gpus, itemsize
    ) | {"gathered blocks": 2 * gathered[student] + gathered[teacher]}


@dataclass
class Config:
    """Estimate the memory of a DMD step per GPU, in GiB."""

    preset: str = "wan"  # wan or wan-small-teacher
    gpus: tuple[int, ...] = (1, 8, 64)  # how many share the weights
    micro: int = 1  # samples a GPU


def main(config: Config) -> None:
    if config.preset not in ("wan", "wan-small-teacher"):
        raise UserError(f"--preset {config.preset!r} must be wan or wan-small-teacher")
    if not config.gpus or min(config.gpus) < 1:
        raise UserError(
            f"--gpus {' '.join(map(str, config.gpus)) or 'nothing'} must be whole numbers of at least 1"
        )
    settings = train_dmd.Config(
        **{
            **asdict(train_dmd.Config()),
            **train_dmd.Config.PRESETS[config.preset],
            "micro": config.micro,
        }
    )
    student, teacher = "wan1.3b", "wan14b" if config.preset == "wan" else "wan1.3b"
    active = {
        f"{what}, {name}": gib
        for d, name in enumerate(("forward", "backward"))
        for what, gib in peaks(settings, student, teacher, d).items()
    }
    print(
        f"preset {config.preset}, {config.micro} sample a GPU, latents {settings.latent}, {settings.dtype}; GiB a GPU\n"
    )
    print(
        "| what | "
        + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in config.gpus)
        + " |\n|---"
        + "|---" * len(config.gpus)
        + "|"
    )
    table = [weights(student, teacher, n) for n in config.gpus]
    for name in table[0]:
        print(f"| {name} | " + " | ".join(f"{row[name]:.1f}" for row in table) + " |")
    for name, gib in active.items():
        print(
            f"| activations and cache: {name} | "
            + " | ".join([f"{gib:.1f}"] * len(config.gpus))
            + " |"
        )
    print(
        "| **peak** | "
        + " | ".join(f"**{sum(row.values()) + max(active.values()):.1f}**" for row in table)
        + " |"
    )


if __name__ == "__main__":
    run(main, Config)
