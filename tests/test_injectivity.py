"""Why an autoregressive teacher (Causal Forcing), in closed form; run it alone, it takes seconds.

Latents of a clip as a Gaussian chain: variance 1, correlation rho^|i-j|, a block a latent. For data
of covariance S the flow's ODE carries noise n to S^(1/2) n: each end point hangs on the noise of
*all* latents. A student that sees only some of it can at best answer the conditional mean, which
has too little variance: the rest is what it blurs, or jumps by.
"""

import pytest
import torch
from torch import Tensor, nn

import anchors
from lib.noise import noise_from
from sampler import many_steps

RHO, LENGTH = 0.8, 4
S = RHO ** (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs().double()


def root(S: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(S)
    return vectors @ values.sqrt().diag() @ vectors.T


class Gaussian(nn.Module):
    """The exact velocity E[noise - x0 | x_t] for latents x0 ~ N(mean, S)."""

    def __init__(self, S: Tensor, mean: Tensor | float = 0.0):
        super().__init__()
        self.S, self.mean, self.patch_embedding = S, mean, nn.Linear(1, 1)

    def text_kv(self, prompt):
        return prompt

    def forward(self, x, t, prompt, pos, past=None):
        s, eye = t[0, 0].double() / 1000, torch.eye(len(self.S)).double()
        gain = (s * eye - (1 - s) * self.S) @ torch.linalg.inv((1 - s) ** 2 * self.S + s**2 * eye)
        return ((x.flatten(1) - (1 - s) * self.mean) @ gain - self.mean).view_as(x)


def end_points(teacher: Gaussian, noise: Tensor, steps: int = 1000) -> Tensor:
    """Where the ODE carries rows of noise [B, T], by `sampler.many_steps`, extrapolated from two
    step sizes."""
    B, T = noise.shape
    start = noise_from(noise.view(B, T, 1, 1, 1))
    step = anchors.forward(T, T).steps[0]
    ends = []
    for n in (steps, 2 * steps):
        solve = many_steps(teacher, [torch.zeros(2 * B, 1, 1)], start, 1.0, steps=n)
        ends.append(solve(0, step, None, None, None).view(B, T))
    return 2 * ends[1] - ends[0]


def left_over(target: Tensor, seen: Tensor) -> float:
    """Variance of target @ n that knowing seen @ n leaves, n standard normal: what a regression on
    `seen` cannot tell.

    target: [noise], seen: [things, noise]"""
    return (target - torch.linalg.lstsq(seen.T, target).solution @ seen).square().sum().item()


def test_the_bidirectional_ode_mixes_the_noise_of_all_latents():
    """Its end points are S^(1/2) n: every one depends on every latent's noise."""
    M = end_points(Gaussian(S), torch.eye(LENGTH).double())
    assert (M - root(S)).abs().max() <= 1e-4 and M.abs().min() > 0.01


def test_a_causal_student_of_a_bidirectional_teacher_learns_a_mean():
    """Two latents: the first end point is a n1 + b n2, the student sees n1. It answers a n1, and
    the variance b^2 is lost:
    (1 - sqrt(1 - rho^2)) / 2, a fifth at rho = 0.8."""
    (a, b), _ = end_points(Gaussian(S[:2, :2]), torch.eye(2).double())
    lost = left_over(torch.stack([a, b]), torch.tensor([[1.0, 0.0]]).double())
    assert (
        lost
        == pytest.approx(b.item() ** 2, abs=1e-12)
        == pytest.approx((1 - (1 - RHO**2) ** 0.5) / 2, abs=1e-4)
    )
    assert a**2 + lost == pytest.approx(1, abs=1e-4)


def test_a_causal_student_of_an_autoregressive_teacher_learns_the_flow():
    """The same chain block after block: x1 = n1, then x2 = rho x1 + sqrt(1 - rho^2) n2. Each end
    point is a function of
    what the student sees, nothing is left over, and the pair has the covariance of the data."""
    first = end_points(Gaussian(S[:1, :1]), torch.eye(1).double())[0, 0]
    assert first == pytest.approx(1, abs=1e-4)
    for x1 in (-1.0, 0.5, 2.0):  # the teacher after clean context x1
        after = Gaussian(torch.tensor([[1 - RHO**2]]).double(), RHO * x1)
        zero, one = end_points(after, torch.tensor([[0.0], [1.0]]).double()).flatten().tolist()
        assert zero == pytest.approx(RHO * x1, abs=1e-4) and one - zero == pytest.approx(
            (1 - RHO**2) ** 0.5, abs=1e-4
        )
    M = torch.tensor(
        [[1, 0], [RHO, (1 - RHO**2) ** 0.5]], dtype=torch.float64
    )  # rows: what the student answers, from n1 and n2
    assert (M @ M.T - S[:2, :2]).abs().max() <= 1e-12


def bidirectional_loss(block: int, seen: range, context: range) -> float:
    """What a student of the bidirectional teacher misses of latent `block`, seeing the noise of
    `seen` (its block and anchors)
    and the clean end points of `context`."""
    M, eye = root(S), torch.eye(LENGTH).double()
    return left_over(M[block], torch.cat([eye[list(seen)], M[list(context)]]))


def test_clean_context_helps_later_blocks_only():
    """Forward: what the past tells of the unseen noise is not lost. The first block has no past and
    loses most; the last one
    has no unseen future and loses nothing."""
    lost = [bidirectional_loss(i, range(i, i + 1), range(i)) for i in range(LENGTH)]
    blind = [bidirectional_loss(i, range(i, i + 1), range(0)) for i in range(LENGTH)]
    assert (
        all(a < b - 0.1 for a, b in zip(lost[1:], blind[1:]))
        and lost[0] == blind[0] > 0.15
        and lost[-1] <= 1e-12
    )


def test_anchors_show_the_student_the_noise_it_misses():
    """Backward, the block at the end: each anchor before it shows the noise of one more latent, and
    the loss falls with P:
    anchors mend for the bidirectional teacher what an autoregressive teacher does not have to
    mend."""
    lost = [
        bidirectional_loss(LENGTH - 1, range(LENGTH - 1 - P, LENGTH), range(0)) for P in range(4)
    ]
    assert (
        lost[0] > 0.25
        and all(later < 0.4 * earlier for earlier, later in zip(lost, lost[1:]))
        and lost[3] <= 1e-12
    )
