"""What `lib/cpu.py` computes by another way is what torch computes, to rounding."""

import pytest
import torch
import torch.nn.functional as F

from lib import cpu
from lib.common import generator
from lib.cpu import Linear, attention, conv3d, linear


@pytest.mark.parametrize(
    "shape, weight, stride, padding",
    [
        ((1, 8, 5, 6, 7), (4, 8, 3, 3, 3), (1, 1, 1), (0, 1, 1)),
        ((2, 8, 3, 9, 9), (16, 8, 1, 3, 3), (1, 2, 2), (0, 0, 0)),
        ((1, 8, 5, 2, 3), (8, 8, 3, 1, 1), (2, 1, 1), (0, 0, 0)),
        ((1, 4, 1, 2, 2), (3, 4, 1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_convolution_equals_torchs(shape, weight, stride, padding, layout):
    """Values and gradients of the faster call are those of F.conv3d in float64; other types than
    float32 take torch's own."""
    g = generator(3)
    given = [torch.randn(s, generator=g) for s in (shape, weight, weight[:1])]
    slow, fast = (
        [x.to(dtype).requires_grad_() for x in given] for dtype in (torch.float64, torch.float32)
    )
    results = []
    for (x, w, b), call in (
        (slow, lambda x, w, b: torch.nn.functional.conv3d(x, w, b, stride, padding)),
        (fast, lambda x, w, b: conv3d(x.contiguous(memory_format=layout), w, b, stride, padding)),
    ):
        y = call(x, w, b)
        y.square().sum().backward()
        results.append((y, x.grad, w.grad, b.grad))
    for right, ours in zip(*results):
        assert (right - ours).abs().max() <= 1e-5 * right.abs().max()
    assert torch.equal(conv3d(*slow, stride, padding), results[0][0])


def given(layout: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """x [2, 5, 24] whole, transposed, or with gaps between its rows; weight [7, 24]; bias [7]:
    leaves that want gradients."""
    g = generator(4)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((2, 5, 24), (7, 24), (7,)))
    x = {
        "whole": x,
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "gaps": F.pad(x, (0, 8))[..., :24],
    }[layout]
    return [y.to(dtype).requires_grad_() for y in (x, weight, bias)]


@pytest.mark.parametrize("layout", ["whole", "transposed", "gaps"])
def test_product_equals_torchs(layout, monkeypatch):
    """Values and gradients are those of F.linear in float64, for any layout of input and gradient;
    what oneDNN gets has no gaps."""
    monkeypatch.setattr("lib.cpu.SMALL", 0)
    real, taken = cpu._product, []
    monkeypatch.setattr(
        "lib.cpu._product", lambda x, *more: (taken.append(x.flatten(0, -2)), real(x, *more))[1]
    )
    results = []
    for dtype, call in ((torch.float64, F.linear), (torch.float32, linear)):
        x, weight, bias = given(layout, dtype)
        y = call(x, weight, bias)
        (y.square().sum() + y.sum() + y[..., ::2].sum()).backward()
        results.append((y, x.grad, weight.grad, bias.grad))
    for right, ours in zip(*results):
        assert (right - ours).abs().max() <= 1e-5 * right.abs().max()
    assert len(taken) == 3 and all(x.is_contiguous() or x.t().is_contiguous() for x in taken)
    with torch.no_grad():
        assert torch.equal(linear(*given(layout, torch.float32)), results[1][0])
    assert len(taken) == 4 and taken[3].is_contiguous()


def test_rows_do_not_see_each_other():
    """At a size that oneDNN gets: another row changes no bit of the rest, so nothing leaks through
    a product."""
    g = generator(5)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((2, 48, 192), (256, 192), (256,)))
    assert x.numel() * len(weight) >= cpu.SMALL
    one, other = (
        linear(x, weight, bias),
        linear(x.index_fill(1, torch.tensor([17]), 3.0), weight, bias),
    )
    same = (one == other).all(-1)
    assert same.sum() == 2 * 47 and not same[:, 17].any()


def test_an_expanded_gradient(monkeypatch):
    """A sum hands down one number for all places."""
    monkeypatch.setattr("lib.cpu.SMALL", 0)
    found = []
    for dtype, call in ((torch.float64, F.linear), (torch.float32, linear)):
        x, weight, bias = given("whole", dtype)
        found.append(torch.autograd.grad(call(x, weight, bias).sum(), (x, weight, bias)))
    assert all(torch.allclose(right.float(), ours, atol=1e-5) for right, ours in zip(*found))


def test_what_is_frozen_costs_nothing(monkeypatch):
    """Without a wish for the gradient of the weight, or of the input, its product is left out."""
    monkeypatch.setattr("lib.cpu.SMALL", 0)
    real, calls = cpu._product, []
    monkeypatch.setattr("lib.cpu._product", lambda *args: (calls.append(1), real(*args))[1])
    for frozen in (0, 1, 2):
        leaves = given("whole", torch.float32)
        leaves[frozen].requires_grad_(False)
        calls.clear()
        linear(*leaves).sum().backward()
        assert leaves[frozen].grad is None and len(calls) == (3 if frozen == 2 else 2)


def test_all_else_is_torchs(monkeypatch):
    """Small products, other types, autocast, torch.compile, and a torch without oneDNN take
    F.linear, to the bit."""
    monkeypatch.setattr("lib.cpu._product", None)
    x, weight, bias = given("whole", torch.float32)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    monkeypatch.setattr("lib.cpu.SMALL", 0)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(*given("whole", dtype)), F.linear(*given("whole", dtype)))
    layer = Linear(24, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), F.linear(x, layer.weight, layer.bias))
    monkeypatch.setattr("lib.cpu.ONEDNN", False)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    c = [torch.randn(s, generator=generator(1)) for s in ((1, 2, 3, 4, 4), (2, 2, 1, 1, 1), (2,))]
    assert torch.equal(conv3d(*c), F.conv3d(*c))


def heads(dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries [2, 3, 5, 8], keys and values [2, 3, 7, 8], with gaps between rows as in `attend`."""
    g = generator(6)
    some = [torch.randn(2, n, 3, 8, generator=g).bfloat16().transpose(1, 2) for n in (5, 7, 7)]
    return [x.to(dtype).requires_grad_() for x in some]


SPANS = [
    ((0, 5, ((0, 7),)),),  # all see all
    ((0, 2, ((0, 3),)), (2, 3, ((2, 5),)), (3, 5, ((0, 1), (4, 7)))),
]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: tuple) -> torch.Tensor:
    """torch's own attention with a matrix of who sees whom."""
    sees = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    for q0, q1, ranges in spans:
        for k0, k1 in ranges:
            sees[q0:q1, k0:k1] = True
    return F.scaled_dot_product_attention(q, k, v, sees)


@pytest.mark.parametrize("spans", SPANS, ids=["whole", "spans"])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_equals_torchs(autocast, spans):
    """In bfloat16, by itself or by autocast, values and gradients are nearer to float64 than
    torch's own, and have the types that torch's have; the gradient is taken under autocast, too."""
    dtype, results = torch.float32 if autocast else torch.bfloat16, []
    for kind, call in ((torch.float64, dense), (dtype, dense), (dtype, attention)):
        leaves = heads(kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and kind == dtype):
            y = call(*leaves, spans)
            y.float().square().sum().backward()
        results.append([y, *(x.grad for x in leaves)])
    exact, torchs, ours = results
    for right, theirs, mine in zip(exact, torchs, ours):
        assert mine.dtype == theirs.dtype
        assert (right - mine).abs().max() <= 0.02 * right.abs().max()
    assert [x.dtype for x in ours] == [torch.bfloat16] + 3 * [dtype]
    distances = [sum((a - b).square().sum() for a, b in zip(exact, r)) for r in (torchs, ours)]
    assert distances[1] <= distances[0]


def by_formulas(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: tuple) -> torch.Tensor:
    return cpu._Attention.apply(*(x.flatten(0, 1) for x in (q, k, v)), spans).view(q.shape)


@pytest.mark.parametrize("spans", SPANS, ids=["whole", "spans"])
def test_gradient_of_attention_is_exact(spans):
    """The formulas themselves, in float64: what autograd takes from dense attention."""
    found = []
    for call in (dense, by_formulas):
        leaves = heads(torch.float64)
        y = call(*leaves, spans)
        y.sin().sum().backward()
        found.append([y, *(x.grad for x in leaves)])
    assert all(torch.allclose(right, mine, atol=1e-12) for right, mine in zip(*found))


def test_attention_elsewhere_is_torchs(monkeypatch):
    """Without a gradient, in other types, compiled, and with the switch off, to the bit."""
    monkeypatch.setattr("lib.cpu._Attention", None)
    for dtype in (torch.float32, torch.float64):
        given = heads(dtype)
        assert torch.equal(attention(*given, SPANS[0]), F.scaled_dot_product_attention(*given))
    given = heads(torch.bfloat16)
    right = F.scaled_dot_product_attention(*given)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given, SPANS[0]), right)
    with torch.no_grad():
        found = attention(*given, SPANS[0])
        assert torch.equal(found, F.scaled_dot_product_attention(*given))
    monkeypatch.setattr("lib.cpu.ONEDNN", False)
    assert torch.equal(attention(*given, SPANS[0]), right)
