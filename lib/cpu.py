"""Two operations that torch leaves slow on a CPU in float32; oneDNN, which torch brings along, has the same ones faster.

Matrix products go to MKL, which keeps to older instructions on processors that are not Intel's; convolutions of one small
clip to torch's own loops. All else (a GPU, another type, a torch without oneDNN; products also where they are small, under
autocast or torch.compile) is passed on as it is. Values differ from torch's by rounding alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SMALL = 2**21  # multiplications below which MKL is as fast: 64 x 192 x 192 [measured]


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1, 1),
    padding: tuple[int, ...] = (0, 0, 0),
) -> Tensor:
    """F.conv3d of x [B, C, T, H, W]; small inputs of one clip two to ten times as fast [measured]."""
    if ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear: x [..., K], weight [N, K], bias [N] -> [..., N]; on an AMD EPYC up to 2.2 times as fast, gradients too [measured]."""
    if (
        not ONEDNN
        or x.device.type != "cpu"
        or not x.dtype == weight.dtype == torch.float32
        or x.numel() * len(weight) < SMALL
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):  # inductor takes the weights for constants
        return F.linear(x, weight, bias)
    return (
        _Linear.apply(x.contiguous(), weight, bias)
        if torch.is_grad_enabled()
        else _product(x.contiguous(), weight, bias)
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, "none", [], ""
    )  # gaps between rows: a thousand times slower


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (need_x, need_weight, need_bias) = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad.contiguous()
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if need_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
