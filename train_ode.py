"""Stage 1: teach the student the teacher's ODE, block by block, in every order it shall know.

    --generate   the teacher integrates noise to video in 48 steps; the states at the student's
                 noise levels and the end point x0 are kept: one *pair* per prompt (lib/pairs.py)
    (default)    the student predicts x0 from these states in one masked pass a plan
                 (paper Eq. 1, App. A.1 and B.1):

        for plan in an entry of the mix:              the paper's: forward, backward with anchors
            one noise level k per step of the plan    "diffusion forcing"; anchors share the step's
            x = state k of the latent, for each slot  a latent that is anchor and target has two
            loss = |G(x, t_k) - x0|^2 on targets      anchors get no loss, they see and are seen

Every random number is a function of (seed, iteration, sample), so the result does not depend on the
number of processes, and an interrupted run goes on exactly: run the same command again. No rollout,
no cache: see train_dmd.py. Other ways to begin: zoo/causal_ode.py, zoo/consistency.py.

    python train_ode.py --generate --pairs 512 && python train_ode.py
    torchrun --nproc_per_node=8 train_ode.py --preset wan
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anchors import Layout, Plan, forward, layout
from dit import DiT, load_dit
from lib import presets
from lib.common import Stream, dtype_of, generator, run, start
from lib.noise import noise_from
from lib.pairs import Kind, Pair, check_shards, read_pairs, slot_states, with_pairs, write_missing
from lib.recipe import trained_as
from lib.states import EMA, write_network
from lib.text import Prompts
from lib.training import (
    Training,
    apply_gradients,
    computing,
    finite_means,
    optimisers_of,
    prepare,
    split_batch,
    training_steps,
    trapezoid,
)
from plans import Mix, draw, draw_entry, mix_of
from sampler import Text, many_steps, student_sigmas


@dataclass
class Config(Training):
    """Stage 1: make ODE pairs (--generate, --check), or train on them."""

    PRESETS = presets.ODE
    RANGES = {"pairs": (1, 10**9), "clean": (0, 1)}
    FREE = ("lr", "weight_decay", "clip", "clean")  # what may change when a run goes on
    preset: str = "toy"  # toy, toy64 (64 pixels), wan (the paper's numbers), wan-any (every length)
    teacher: str = "toy/weights/teacher.safetensors"  # makes the pairs
    weights: str = "toy/weights/teacher.safetensors"  # what the student starts from
    prompts: str = "toy"  # toy: captions without end; or what lib/text.py wrote; or a text file
    data: str = "out/pairs"  # folder of the pairs
    out: str = "out/ode"  # folder of student.safetensors, log.jsonl and the resume state
    generate: bool = False  # make pairs instead of training
    check: bool = False  # check the pairs instead of training
    pairs: int = 1024  # how many pairs [paper: 16000]
    shard: int = 32  # pairs a file, all of one entry of the mix
    guidance: float = 3.0  # conventional: uncond + w (cond - uncond) [paper: 3]
    negative: str = ""  # prompt of the unconditional pass
    denoising: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)  # noise levels, unshifted [paper]
    steps: int = 1000  # training iterations [paper: 6000]
    schedule_steps: int = 0  # iterations that the rate is planned over, if not --steps
    batch: int = 16  # samples an iteration, over all processes [paper: 128]
    lr: float = 3e-4  # AdamW, constant between warm-up and decay [paper: 2e-6]
    lr_matrices: float = 0.0  # Muon, of the blocks' matrices, likewise; 0: AdamW for them, too
    warmup: int = 50  # iterations
    decay: float = 0.5  # share of the steps, at the end, while the rate falls to zero [paper: 0]
    loss_on_anchors: bool = False  # ablation of the paper's Table 5
    clean: float = 0.0  # share of steps at t = 0, without loss: clean context [paper: 0]
    teacher_forcing: bool = False  # all context clean: [clean | noisy]


# ---------------------------------------------------------------- the loss
def per_slot(lay: Layout, by_step: Tensor, clean: float) -> Tensor:
    """Values [B, steps of the plan] -> [B, slots]; `clean` for clean context and what is given."""
    value = by_step[:, torch.tensor(lay.step, device=by_step.device)]
    known = torch.tensor(lay.is_clean) | torch.tensor(lay.is_given)
    return value.masked_fill(known.to(value.device), clean)


def scored_slots(lay: Layout, anchors: bool = False, dummies: bool = False) -> Tensor:
    """Which slots [slots] a loss is over: targets, never what is known; and what else is asked."""
    target, latent = torch.tensor(lay.is_target), torch.tensor(lay.latent)
    known = torch.tensor(lay.is_clean) | torch.tensor(lay.is_given)
    return ~known & (target | anchors) & ((latent >= 0) | dummies)


def mean_over(error: Tensor, scored: Tensor) -> Tensor:
    """Mean [B] of an error [B, slots, C, h, w] over the scored slots, [slots] or [B, slots]."""
    scored = scored.to(error.device).expand(error.shape[:2])
    total = (error.flatten(2).mean(2) * scored).sum(1)
    return total / scored.sum(1).clamp_min(1)


def denoise(dit: DiT, lay: Layout, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
    """x0 as the network sees it from every slot: x [B, slots, C, h, w], sigma [B, slots]."""
    v = dit(x, 1000 * sigma, prompt, torch.tensor(lay.pos, device=x.device), lay.visible)
    return x - sigma[..., None, None, None] * v


def ode_loss(
    dit: DiT,
    lay: Layout,
    states: Tensor,
    levels: Tensor,
    sigmas: Tensor,
    prompt: Tensor,
    loss_on_anchors: bool = False,
) -> Tensor:
    """Regress the end point from every slot's state, in one masked pass (paper Eq. 1).

    states: [B, K+1, slots, C, h, w], noisiest first, the end point last
    levels: [B, steps of the plan], in 0 .. K, where K is clean context without loss
    sigmas: [K+1], the last is 0
    returns: the mean squared error of each sample [B]"""
    level = per_slot(lay, levels, len(sigmas) - 1)  # (B, slots)
    batch = torch.arange(len(level), device=states.device)[:, None]
    slot = torch.arange(level.shape[1], device=states.device)
    x = states[batch, level, slot]  # (B, slots, C, h, w)
    sigma = sigmas[level]
    error = (denoise(dit, lay, x, sigma, prompt) - states[:, -1]).square()
    scored = scored_slots(lay, anchors=loss_on_anchors).to(sigma.device)
    return mean_over(error, scored & (sigma > 0))


# ---------------------------------------------------------------- pairs
class Trajectories(Kind):
    """The pairs of this stage: the bidirectional teacher makes all latents of a plan at once.

    Entries of the mix whose plans make as many latents share their pairs: these are a group.
    zoo/causal_ode.py has another kind."""

    draw = staticmethod(draw)

    def make(self, teacher: DiT, text: Text, group: int, numbers: range) -> dict[str, Tensor]:
        """The teacher's states. text: of the prompts, then of as many unconditional ones"""
        config, states = self.config, {}

        def record(_: int, k: int, x: Tensor) -> None:
            if k in self.keep:
                states[k] = x

        noise = noise_from(self.noise(numbers, group).to(teacher.patch_embedding.weight.device))
        solve = many_steps(teacher, [text], noise, config.guidance, config.shift, record=record)
        solve(0, forward(group, group).steps[0], None, None, None)
        return {"states": torch.stack([states[k] for k in self.keep], dim=1)}


def make_pairs(kind: Trajectories, rank: int, world: int, device: torch.device) -> None:
    """Write the pairs that are missing."""
    config, source = kind.config, kind.source
    teacher = load_dit(config.teacher, dtype_of(config.dtype), device)
    negative = source.embed([config.negative]).to(device)

    def make(group: int, numbers: range) -> dict[str, Tensor]:
        prompt = source(numbers).to(device)
        text = teacher.text_kv(torch.cat([prompt, negative.expand_as(prompt)]))
        return kind.make(teacher, text, group, numbers)

    write_missing(kind, make, rank, world, device)


# ---------------------------------------------------------------- training
class Part(NamedTuple):
    """What one backward pass is for: samples of an iteration, in plan d of an entry of the mix."""

    step: int
    samples: list[int]
    entry: int
    d: int


class Setup:
    """What does not change in a run: a network that learns, and the plans and prompts for it."""

    def __init__(self, config, mix: Mix, teacher_forcing: bool) -> None:
        self.config, self.mix, self.teacher_forcing = config, mix, teacher_forcing
        self.rank, self.world, self.device = start(config.device)
        self.dit = prepare(load_dit(config.weights, device=self.device), config, trained=True)
        c = self.dit.config
        self.source = Prompts(config.prompts, c.text_dim, c.text_len)

    def plan(self, part: Part) -> Plan:
        return self.mix[part.entry][1][part.d]

    def layout(self, part: Part) -> Layout:
        return layout(self.plan(part), self.teacher_forcing)


def fit(
    setup: Setup,
    loss_of: Callable[[Part], Tensor],
    name: str,
    average: tuple[EMA, DiT] | None = None,
) -> None:
    """Train on the mean of `loss_of`, [B], in every plan of an entry; write `name`.safetensors.

    average: an average, and the network that holds it for the loss and is written in the end"""
    config, mix, dit, device = setup.config, setup.mix, setup.dit, setup.device
    rounds = split_batch(config.batch, config.micro, setup.rank, setup.world)
    planned = config.schedule_steps or config.steps
    rates = optimisers_of(dit, config.lr, config.lr_matrices, config.betas, config.weight_decay)
    trained, averages = {"dit": (dit, tuple(rates))}, {"ema": average[0]} if average else {}
    result = average[1] if average else dit
    dit.recipe = result.recipe = trained_as(config).write() if name == "student" else None
    dtype = dtype_of(config.dtype if config.parallel == "ddp" else "float32")  # FSDP2 casts itself
    with computing(dtype, device):
        for step, row in training_steps(config, name, trained, device, averages):
            for optimiser, rate in rates.items():
                rate = trapezoid(step, planned, rate, config.warmup, config.decay)
                optimiser.param_groups[0]["lr"] = rate
            if average:
                average[0].copy_to(average[1])
            entry = draw_entry(config, mix, step)
            plans, losses = mix[entry][1], defaultdict(list)
            for samples in rounds:
                for d, plan in enumerate(plans):
                    loss = loss_of(Part(step, samples, entry, d))  # (B,)
                    (loss / len(rounds)).mean().backward()
                    losses[plan.name].append(loss.detach())
            row |= finite_means(losses, rounds, f"step {step}: the loss", device)
            row["norm"] = apply_gradients(dit, rates, config, f"step {step}")
            row["latents"] = plans[0].length
            if average:
                average[0].update(dit)
    if average:
        average[0].copy_to(average[1])
    write_network(Path(config.out) / f"{name}.safetensors", result)


def pair_loss(setup: Setup, pairs: list[list[Pair]], part: Part) -> Tensor:
    """The loss [B] of samples: a pair of the entry's, and a noise level per step of the plan.

    pairs: of each entry of the mix"""
    config, device, lay = setup.config, setup.device, setup.layout(part)
    noisy, group = len(config.denoising), pairs[part.entry]
    some, levels = [], []
    for j in part.samples:
        g = generator(config.seed, Stream.ODE, part.step, j)
        some.append(group[int(torch.randint(len(group), (1,), generator=g))])
        for plan in setup.mix[part.entry][1][: part.d + 1]:  # plans do not share their levels
            k = torch.randint(noisy, (len(plan.steps),), generator=g)
            is_clean = torch.rand(len(k), generator=g) < config.clean
        levels.append(k.masked_fill(is_clean, noisy))  # the last state is the clean one
    sigmas = [*student_sigmas(config.denoising, config.shift), 0.0]
    return ode_loss(
        setup.dit,
        lay,
        torch.stack([slot_states(pair, lay, part.d) for pair in some]).to(device),
        torch.stack(levels).to(device),
        torch.tensor(sigmas, device=device),
        setup.source([pair.number for pair in some]).to(device),
        config.loss_on_anchors,
    )


def main(config: Config, kind: type[Trajectories] = Trajectories) -> None:
    """kind: which pairs are made, and learned from."""
    rank, world, device = start(config.device)
    mix = mix_of(config)
    trained_as(config)  # impossible levels are refused before any work
    c = load_dit(config.teacher, None).config
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    made = kind(config, mix, c.in_dim, source)
    if config.generate:
        make_pairs(made, rank, world, device)
        return
    groups = read_pairs(made)
    if config.check:
        check_shards(groups, made)
        return
    pairs = [groups.get(made.group(entry), []) for entry in range(len(mix))]
    setup = Setup(config, with_pairs(mix, list(map(bool, pairs))), made.teacher_forcing)
    fit(setup, partial(pair_loss, setup, pairs), "student")


if __name__ == "__main__":
    run(main, Config)
