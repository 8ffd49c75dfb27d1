"""Three operations that torch leaves slow on some CPUs.

In float32 oneDNN, inside torch, is faster: matrix products go to MKL, which keeps to older
instructions on processors that are not Intel's; convolutions of one small clip go to torch's own
loops. In bfloat16 the gradient of attention takes .07 ms a head and sample at least, however small
it is [measured], in float32 a tenth of it. How much is gained depends on the processor.
Values differ from torch's by rounding alone, and all else (a GPU, another type, a torch without
oneDNN; what is compiled; products that are small or under autocast) is torch's own.
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


def attention(q: Tensor, k: Tensor, v: Tensor, spans: tuple) -> Tensor:
    """Attention by torch's fused kernel, span by span: q [B, A, L, D], k, v [B, A, K, D] -> like q.

    spans: of all queries in turn (q0, q1, ranges (k0, k1) of the keys that they see)
    Where it is trained in bfloat16, it is computed in float32."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else q.dtype
    training = torch.is_grad_enabled() and dtype == torch.bfloat16
    if not (ONEDNN and q.device.type == "cpu" and training) or torch.compiler.is_compiling():
        runs = []
        for q0, q1, ranges in spans:
            seen = _pick(k, ranges), _pick(v, ranges)
            runs.append(F.scaled_dot_product_attention(q[:, :, q0:q1], *seen))
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=2)
    with torch.autocast("cpu", enabled=False):
        whole = (x.float().contiguous().flatten(0, 1) for x in (q, k, v))  # (B * A, L or K, D)
        return _Attention.apply(*whole, spans).view(q.shape).to(dtype)


def _pick(x: Tensor, ranges: tuple) -> Tensor:
    parts = [x[..., k0:k1, :] for k0, k1 in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)  # one range needs no copy


class _Attention(torch.autograd.Function):
    """The same of q [N, L, D], k, v [N, K, D], float32.

    Its gradient touches what a span sees; torch's fills, copies and adds up gradients of all keys
    for every range of them."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, spans: tuple) -> Tensor:
        q = q * q.shape[2] ** -0.5
        out, weights = torch.empty_like(q), []
        for q0, q1, ranges in spans:
            logits = torch.bmm(q[:, q0:q1], _pick(k, ranges).transpose(1, 2))  # (N, run, seen)
            weights.append(logits.softmax(2))
            out[:, q0:q1] = torch.bmm(weights[-1], _pick(v, ranges))
        ctx.save_for_backward(q, k, v, out, *weights)
        ctx.spans = spans
        return out

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        mean = (grad * out).sum(2, keepdim=True)  # (N, L, 1): softmax takes it off each row
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (q0, q1, ranges), weight in zip(ctx.spans, weights):
            g, at = grad[:, q0:q1], 0
            dweight = torch.bmm(g, _pick(v, ranges).transpose(1, 2))  # (N, run, seen)
            dlogits = dweight.sub_(mean[:, q0:q1]).mul_(weight)
            dq[:, q0:q1] = torch.bmm(dlogits, _pick(k, ranges))
            dkeys = torch.bmm(dlogits.transpose(1, 2), q[:, q0:q1])  # (N, seen, D)
            dvalues = torch.bmm(weight.transpose(1, 2), g)
            for k0, k1 in ranges:
                dk[:, k0:k1] += dkeys[:, at : at + k1 - k0]
                dv[:, k0:k1] += dvalues[:, at : at + k1 - k0]
                at += k1 - k0
        return dq * q.shape[2] ** -0.5, dk, dv, None


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
