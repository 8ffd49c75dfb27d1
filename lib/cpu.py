"""Three operations that torch leaves slow on some CPUs.

In float32 oneDNN, inside torch, is faster: matrix products go to MKL, which keeps to older
instructions on processors that are not Intel's; convolutions of one small clip go to torch's own
loops. In bfloat16 the gradient of attention takes .07 ms a head and sample at least, however small
it is [measured], in float32 a tenth of it. How much is gained depends on the processor.
Values differ from torch's by rounding alone, and all else (a GPU, another type, a torch without
oneDNN; products that are small, under autocast or compiled) is torch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The one switch: False, and everything here is torch's own.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SMALL = 2**21  # multiplications below which MKL is as fast: 64 x 192 x 192 [measured]


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's own product is taken of x [..., C]: float32 on a CPU."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1, 1),
    padding: tuple[int, ...] = (0, 0, 0),
) -> Tensor:
    """F.conv3d of x [B, C, T, H, W]; small inputs of one clip are where it gains [measured]."""
    if not applies(x, weight):
        return F.conv3d(x, weight, bias, stride, padding)
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    if (
        not applies(x, weight)
        or x.numel() * len(weight) < SMALL
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()  # inductor takes the weights for constants
    ):
        return F.linear(x, weight, bias)
    x = x.contiguous()  # with gaps between the rows oneDNN is a thousand times slower
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The same with a gradient, each part of it only where it is asked for."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        rows = grad.flatten(0, -2)  # (M, N)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dx = _product(grad, weight.t()) if wants_x else None  # (..., K)
        dweight = _product(rows.t(), x.flatten(0, -2).t()) if wants_weight else None  # (N, K)
        return dx, dweight, rows.sum(0) if wants_bias else None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.scaled_dot_product_attention: q [B, A, L, D], k, v [B, A, K, D] -> [B, A, L, D].

    Where it is trained in bfloat16, it is computed in float32."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else q.dtype
    training = torch.is_grad_enabled() and dtype == torch.bfloat16
    if not (ONEDNN and q.device.type == "cpu" and training):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(dtype)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
