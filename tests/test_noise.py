"""Whose noise an anchor has, in closed form: only noise of its own samples the true distribution.

Latents of a clip as a Gaussian chain: variance 1, correlation rho^|i-j|, one number a latent. For
it the flow of a block, given the latents it reads, is known exactly, so a network that has learned
it without error is a small matrix. The project's own sampler runs it. All is linear, so one clip
of the batch is the answer to one noise: the batch holds how each latent hangs on each noise, and
the covariance of what would be sampled is a product. No random number is drawn here.

Plans whose positions lie cannot be exact and are left out: a loop reads its head in the future as
well, and sinks stand nearer than they are. A window without sinks loses nothing: the chain is
Markov. Scenes are blind to each other on purpose."""

import pytest
import torch
from torch import Tensor, nn

import anchors
import sampler
from anchors import Plan
from lib.recipe import Recipe
from plans import any_mix, timeline
from sampler import few_steps, gather, many_steps, ode_sigmas, rollout, sigmas_of

RHO, LENGTH = 0.8, 21
TO_THE_END = dict.fromkeys(sampler.student_sigmas(), 0.0)
TO_THE_NEXT = dict(zip(ode_sigmas()[:-1], ode_sigmas()[1:]))


def chain(a: Tensor, b: Tensor) -> Tensor:
    """The covariance of latents at times a and b."""
    return RHO ** (a[:, None] - b).abs().double()


TRUE = chain(torch.arange(LENGTH), torch.arange(LENGTH))


def root(S: Tensor, power: float = 0.5) -> Tensor:
    """A power of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(S)
    return vectors @ values.pow(power).diag() @ vectors.T


class ExactFlow(nn.Module):
    """The velocity that carries a block, in one Euler step, as far as its flow does until `below`.

    below: noise level -> the level that the sampler goes to from there: the end, for a student, or
        the teacher's next one. So neither way to denoise has an error of its own"""

    def __init__(self, below: dict[float, float]):
        super().__init__()
        self.below, self.patch_embedding = below, nn.Linear(1, 1)

    def forward(self, x, t, text, pos, past):
        B = len(x)
        high = min(self.below, key=lambda sigma: abs(1000 * sigma - t[0, 0].item()))
        low = self.below[high]
        mean, S = torch.zeros(B, len(pos), dtype=torch.float64), chain(pos, pos)
        if past:
            at = torch.tensor([p for p, _ in past])
            read = torch.stack([z for _, z in past], dim=1).flatten(1)  # (B, reads)
            read = torch.cat([read] * (B // len(read)))  # a teacher's unconditional half reads, too
            gain = chain(pos, at) @ torch.linalg.inv(chain(at, at))
            mean, S = read @ gain.T, S - gain @ chain(at, pos)
        eye = torch.eye(len(pos)).double()
        before, after = ((1 - s) ** 2 * S + s**2 * eye for s in (high, low))
        # The flow keeps a Gaussian's standard coordinates.
        moved = (x.flatten(1) - (1 - high) * mean) @ root(before, -0.5) @ root(after)
        return (x - (moved + (1 - low) * mean).view_as(x)) / (high - low)


class Clean:
    """Finished latents as they are, in the place of a cache of keys."""

    def __init__(self):
        self.slot = {}

    def read(self, reads):
        return [(p, self.slot[i]) for i, p in reads]

    def evict(self, latents):
        for i in latents:
            del self.slot[i]


def sampled(plan: Plan, share_noise: str, way: str = "few") -> Tensor:
    """How each latent hangs on each noise that the sampler asks for: [noises, plan.length]."""
    levels = len(TO_THE_END) if way == "few" else 1
    asked = [
        (i, k) for step in plan.steps for k in range(levels) for i in own(step, share_noise, k)
    ]
    users = sorted({i for step in plan.steps for i in step.given})
    column = {key: n for n, key in enumerate(dict.fromkeys(asked))}
    B = len(column) + len(users)

    def noise(level: int, numbers: tuple[int, ...]) -> Tensor:
        x = torch.zeros(B, len(numbers), 1, 1, 1, dtype=torch.float64)
        for j, i in enumerate(numbers):
            x[column[i, level], j] = 1.0
        return x

    given, cache = {}, Clean()
    if users:  # real clips: a sample of the chain, from noises of its own
        real = torch.zeros(B, len(users), dtype=torch.float64)
        real[len(column) :] = torch.linalg.cholesky(TRUE[users][:, users]).T
        given = {i: x.view(B, 1, 1, 1) for i, x in zip(users, real.unbind(1))}

    def remember(n, step, x0, past):
        cache.slot |= dict(zip(step.own, x0.unbind(1)))
        cache.evict(step.anchors)

    texts = [None] * plan.prompts()
    if way == "few":
        flow = ExactFlow(TO_THE_END)
        denoise = few_steps(flow, texts, noise, sigmas_of(Recipe()), share_noise=share_noise)
    else:
        denoise = many_steps(ExactFlow(TO_THE_NEXT), texts, noise, 1.0, share_noise=share_noise)
    with torch.no_grad():
        return gather(plan, rollout(plan, denoise, remember, cache, given)).flatten(1)


def own(step, share_noise: str, level: int) -> tuple[int, ...]:
    """The noises that a step asks for."""
    return () if step.commits else step.noise(share_noise, level)


def covariance(*how) -> Tensor:
    x = sampled(*how)
    return x.T @ x


def error(*how) -> float:
    """The largest error of the covariance."""
    S = covariance(*how)
    return (S - TRUE[: len(S), : len(S)]).abs().max().item()


def change(plan: Plan, *how) -> tuple[float, float]:
    """E |z[i+1] - z[i]|^2 over its true value: across the boundaries of blocks, and inside."""
    S = covariance(plan, *how)
    step = (S.diagonal()[1:] + S.diagonal()[:-1] - 2 * S.diagonal(1)) / (2 - 2 * RHO)
    across = torch.tensor(plan.boundaries())
    return step[across].mean().item(), step[~across].mean().item()


AHEAD = any_mix(LENGTH)[-1][1]  # after and before a clip of 6
EXACT = {
    "forward": anchors.forward(),
    **{f"backward P={p}": anchors.backward(anchors=p) for p in range(4)},
    "backward, dummy": anchors.backward(anchors=0, dummy=True),
    "backward, B=6, head 3": anchors.backward(block=6, anchors=0, head=3),
    "frame by frame": anchors.backward(block=1, anchors=1),
    "backward of 12": anchors.backward(12),
    "inbetween": anchors.inbetween(),
    "inbetween, given": anchors.inbetween(given=True),
    "middle of a shot": timeline(LENGTH, [(9, 12)]),
    "one shot": timeline(LENGTH, [(0, 6), (12, 21)], joined=True),
    "window forward": anchors.long(LENGTH, "forward", sink="none"),
    "window backward": anchors.long(LENGTH, "backward", sink="none"),
    **{plan.name: plan for plan in AHEAD},
}
IMAGINING = [name for name, plan in EXACT.items() if any(step.anchors for step in plan.steps)]


@pytest.mark.parametrize("way", ["few", "many"])
@pytest.mark.parametrize("plan", EXACT.values(), ids=EXACT)
def test_own_noise_samples_the_true_covariance(plan, way):
    """By a student's four steps and by a teacher's 48, for every plan and every P: the default."""
    assert Recipe().share_noise == "none"
    assert error(plan, "none", way) <= 1e-3


@pytest.mark.parametrize("name", IMAGINING)
def test_a_shared_start_is_nearly_forgotten(name):
    """The start is pure noise: three fresh ones after it leave less than a thousandth of it."""
    assert 0 <= error(EXACT[name], "start") <= 1e-3


def test_nothing_to_share_without_anchors():
    """P = 0 and forward order have no anchors: the rule changes no number."""
    for name in ("forward", "backward P=0", "backward, dummy"):
        assert torch.equal(sampled(EXACT[name], "all"), sampled(EXACT[name], "none"))


@pytest.mark.parametrize(
    "way, off, across, inside", [("few", 0.50, 0.81, 1.01), ("many", 0.52, 0.79, 1.02)]
)
def test_shared_noise_samples_another_distribution(way, off, across, inside):
    """With anchors that share their latent's noise at all levels, a block's noise is already in its
    context: boundaries are smoother than real, variance too high. Without sharing, exact."""
    plan = EXACT["backward P=3"]
    assert error(plan, "all", way) > 0.3
    assert error(plan, "all", way) == pytest.approx(off, abs=0.01)
    assert change(plan, "all", way) == pytest.approx((across, inside), abs=0.01)
    assert change(plan, "none", way) == pytest.approx((1, 1), abs=1e-3)
    assert covariance(plan, "all", way).diagonal().max() > 1.3


@pytest.mark.parametrize("name", ["backward P=1", "backward P=2", "backward P=3", "frame by frame"])
def test_any_shared_anchor_is_too_many(name):
    """So it is for each P."""
    assert error(EXACT[name], "all") > 0.3
