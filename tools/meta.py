"""Real passes at full size on the meta device: shapes and types are real, nothing is computed.

A `Meter` looks at every operation as it passes by and counts the bytes that are alive; what is one
kernel on a GPU and several on the meta device, attention, is replaced while it looks (`Fused`).
"""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def tensors_of(tree: object) -> list[Tensor]:
    """All tensors in lists, tuples and dicts of such."""
    return [x for x in tree_iter(tree) if isinstance(x, Tensor)]


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
