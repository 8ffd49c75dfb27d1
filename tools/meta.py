"""Real passes at full size on the meta device: shapes and types are real, nothing is computed.

Two ways to look at every operation as it passes by: a `Ledger` counts kernels and the bytes that
they read and write, a `Meter` the bytes that are alive. What is one kernel on a GPU and several on
the meta device is replaced while they look.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

import dit
import vae
from dit import PRESETS, DiT
from kvcache import KVCache

H, W = 60, 104  # cells of a latent at 480 x 832


def tensors_of(tree: object) -> list[Tensor]:
    """All tensors in lists, tuples and dicts of such."""
    return [x for x in tree_iter(tree) if isinstance(x, Tensor)]


# ---------------------------------------------------------------- kernels and what they move
class Ledger(TorchDispatchMode):
    """Count launches and bytes by family: every operation that is no view is a kernel, and reads
    and writes each tensor once. It begins anew whenever it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.family = ""  # of what runs now; "": told by the operation's name
        self.launches, self.bytes = Counter(), Counter()

    def __enter__(self) -> "Ledger":
        self.launches, self.bytes = Counter(), Counter()
        return super().__enter__()

    def add(self, family: str, *tensors: Tensor) -> None:
        self.launches[family] += 1
        self.bytes[family] += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "_unsafe_view")):
            family = self.family or FAMILIES.get(name, "activations, residuals, casts")
            self.add(family, *tensors_of((args, kwargs, out)))
        return out

    def within(self, family: str, call: Callable) -> Callable:
        """The same function, all of whose kernels belong to a family."""

        def told(*args, **more):
            outer, self.family = self.family, family
            out = call(*args, **more)
            self.family = outer
            return out

        return told

    def one(self, family: str, x: Tensor, *others: Tensor) -> Tensor:
        """In place of what is one kernel on a GPU and several on the meta device: as large as x."""
        out = torch.empty_like(x)
        self.add(family, x, *others, out)
        return out


JOINED = "rows joined: past and own"
NORMS = "norms, modulation"
FAMILIES = {"mm": "linear layers", "addmm": "linear layers", "convolution": "convolutions"}
FAMILIES |= {"native_layer_norm": NORMS, "cat": JOINED, "clone": "copies", "copy_": "copies"}
BUSY = ("linear layers", "attention", "convolutions")  # what arithmetic bounds


@contextmanager
def on_meta(*patches: tuple[object, str, Callable]) -> Iterator[None]:
    """The meta device, without gradient, with these functions replaced."""
    with torch.device("meta"), torch.no_grad(), ExitStack() as stack:
        for where, name, new in patches:
            stack.enter_context(mock.patch.object(where, name, new))
        yield


@cache
def ledger(own: int, seen: int) -> Ledger:
    """Of one denoising pass of the 1.3B, in bfloat16: `own` latents that see `seen` in all."""
    c, past, book = PRESETS["wan1.3b"], seen - own, Ledger()
    with on_meta(
        (dit, "attend", lambda q, k, v, visible=None: book.one("attention", q, k, v)),
        (dit, "rotate", book.within("RoPE", dit.rotate)),
        (dit, "modulate", book.within(NORMS, dit.modulate)),
        (F, "rms_norm", lambda x, shape, weight, eps: book.one(NORMS, x, weight)),
    ):
        model = DiT(c).to(torch.bfloat16)
        text = model.text_kv(torch.empty(1, c.text_len, c.text_dim))
        cache = KVCache(c, 1, max(past, 1), H, W, torch.bfloat16, "meta")
        cache.slot = {i: i for i in range(past)}
        read = cache.read(tuple((i, i) for i in range(past)))
        x, t = torch.empty(1, own, c.in_dim, H, W), torch.empty(1, own)
        with book:
            model(x, t, text, torch.arange(past, seen), past=read)
    return book


def decode_in(mode: TorchDispatchMode, latents: int, first: bool, kind: torch.dtype) -> None:
    """Decode so many latents of a stream (first: its image latent) inside `mode`."""
    model = vae.VAE().to(kind)
    z = torch.empty(1, latents, model.config.z_dim, H, W)
    state = None if first else model.decode_chunk(z[:, :1])[1]
    with mode:
        model.decode_chunk(z, state)


@cache
def vae_flops(latents: int, first: bool = False) -> float:
    """Of decoding so many latents, counted by torch from the real network."""
    counter = FlopCounterMode(display=False)
    with on_meta():
        decode_in(counter, latents, first, torch.float32)
    return counter.get_total_flops()


@cache
def vae_ledger() -> Ledger:
    """Launches and bytes of decoding three latents in the middle of a stream, in bfloat16.

    A convolution keeps the layout of its input, as cuDNN's does; the meta device forgets it, and
    every one would count a copy."""
    book, conv3d = Ledger(), vae.conv3d

    def channels_last(*args, **more) -> Tensor:
        return torch.empty_like(conv3d(*args, **more), memory_format=vae.LAYOUT)

    with on_meta(
        (F, "scaled_dot_product_attention", lambda q, k, v: book.one("attention", q, k, v)),
        (vae, "conv3d", channels_last),
        (vae.RMSNorm, "forward", book.within(NORMS, vae.RMSNorm.forward)),
    ):
        decode_in(book, 3, False, torch.bfloat16)
    return book


# ---------------------------------------------------------------- bytes that are alive
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
