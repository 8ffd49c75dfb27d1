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
number of processes, and an interrupted run goes on exactly: run the same command again. No rollout
and no cache in training here: see train_dmd.py. Other ways to begin: zoo/causal_ode.py,
zoo/consistency.py.

    python train_ode.py --generate --pairs 512 && python train_ode.py
    torchrun --nproc_per_node=8 train_ode.py --preset wan
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from anchors import Layout, Plan, forward, layout
from dit import DiT, load_dit
from lib import presets
from lib.common import Stream, dtype_of, generator, run, say, start
from lib.pairs import (
    Pair,
    check_shards,
    kept_states,
    pair_noise,
    pairs_where,
    read_pairs,
    slot_states,
    write_missing,
    wrong_states,
)
from lib.states import EMA, write_network
from lib.text import Prompts
from lib.training import (
    Training,
    clip_gradients,
    computing,
    distribute,
    finite_means,
    split_batch,
    sync_gradients,
    training_steps,
    trapezoid,
)
from plans import MIXES, Mix, draw
from sampler import Recipe, many_steps, noise_from, student_sigmas


@dataclass
class Config(Training):
    """Stage 1: make ODE pairs (--generate, --check), or train on them."""

    PRESETS = presets.ODE
    RANGES = {
        "preset": tuple(PRESETS),
        "plans": tuple(MIXES),
        "pairs": (1, 10**9),
        "shard": (1, 10**6),
        "clean": (0, 1),
    }
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
    latent: tuple[int, ...] = (21, 4, 4)  # latents, height and width of the grid
    plans: str = "any"  # which plans are trained: paper (two, 21 latents), any (plans.py) [ours]
    guidance: float = 2.0  # conventional: uncond + w (cond - uncond) [paper: 3]
    negative: str = ""  # prompt of the unconditional pass
    denoising: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)  # noise levels, unshifted [paper]
    shift: float = 5.0  # of the noise levels [paper]
    steps: int = 1000  # training iterations [paper: 6000]
    schedule_steps: int = 0  # iterations that the rate is planned over, if not --steps
    batch: int = 16  # samples an iteration, over all processes [paper: 128]
    lr: float = 3e-4  # AdamW, constant between warm-up and decay [paper: 2e-6]
    warmup: int = 50  # iterations
    decay: float = 0.5  # share of the steps, at the end, while the rate falls to zero [paper: 0]
    betas: tuple[float, ...] = (0.9, 0.999)  # [paper]
    block: int = 3  # B: latents a step [paper]
    anchors: int = 3  # P: anchors before each backward block [paper]; 0 uses the dummy block
    head: int = 0  # size of the block of latent 0 if not --block (--block 6 --anchors 0 --head 3)
    loss_on_anchors: bool = False  # ablation of the paper's Table 5
    clean: float = 0.0  # share of steps at t = 0, without loss: clean context [paper: 0]
    teacher_forcing: bool = False  # all context clean: [clean | noisy]
    share_noise: str = "none"  # none, start or all: of an anchor with its latent, in the recipe


def mix_of(config) -> Mix:
    """The plans that a script trains on. raises: UserError for sizes that do not fit"""
    return MIXES[config.plans](config.latent[0], config.block, config.anchors, config.head)


def recipe_of(config) -> Recipe:
    """What a student must remember of its training."""
    values = {k: getattr(config, k) for k in ("shift", "block", "anchors", "head", "share_noise")}
    first = getattr(config, "first_denoising", ())
    return Recipe(tuple(config.denoising), tuple(first), plans=config.plans, **values)


# ---------------------------------------------------------------- the loss
def per_slot(lay: Layout, by_step: Tensor, clean: float) -> Tensor:
    """Values [B, steps of the plan] -> [B, slots]; `clean` where the slot is clean context."""
    device = by_step.device
    value = by_step[:, torch.tensor(lay.step, device=device)]
    return value.masked_fill(torch.tensor(lay.is_clean, device=device), clean)


def scored_slots(lay: Layout, anchors: bool = False, dummies: bool = False) -> Tensor:
    """Which slots [slots] a loss is over: targets, never clean context; and what else is asked."""
    counts = [
        not clean and (latent >= 0 or dummies) and (target or anchors)
        for latent, target, clean in zip(lay.latent, lay.is_target, lay.is_clean)
    ]
    return torch.tensor(counts)


def mean_over(error: Tensor, scored: Tensor) -> Tensor:
    """Mean [B] of an error [B, slots, C, h, w] over the scored slots, [slots] or [B, slots]."""
    scored = scored.to(error.device).expand(error.shape[:2])
    total = (error.flatten(2).mean(2) * scored).sum(1)
    return total / scored.sum(1).clamp_min(1)


def given_slots(plan: Plan, lay: Layout) -> Tensor:
    """Which slots [slots] show the user's own latents: held clean, as in a rollout."""
    return torch.tensor([i in plan.steps[n].given for n, i in zip(lay.step, lay.latent)])


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
    given: Tensor | None = None,
) -> Tensor:
    """Regress the end point from every slot's state, in one masked pass (paper Eq. 1).

    states: [B, K+1, slots, C, h, w], noisiest first, the end point last
    levels: [B, steps of the plan], in 0 .. K, where K is clean context without loss
    sigmas: [K+1], the last is 0
    given: slots [slots] that are clean whatever the level of their step (`given_slots`)
    returns: the mean squared error of each sample [B]"""
    level = per_slot(lay, levels, len(sigmas) - 1)  # (B, slots)
    if given is not None:
        level = level.masked_fill(given.to(level.device), len(sigmas) - 1)
    batch = torch.arange(len(level), device=states.device)[:, None]
    slot = torch.arange(level.shape[1], device=states.device)
    x = states[batch, level, slot]  # (B, slots, C, h, w)
    sigma = sigmas[level]
    error = (denoise(dit, lay, x, sigma, prompt) - states[:, -1]).square()
    scored = scored_slots(lay, anchors=loss_on_anchors).to(sigma.device)
    return mean_over(error, scored & (sigma > 0))


# ---------------------------------------------------------------- pairs
def make_pairs(config: Config, mix: Mix, rank: int, world: int, device: torch.device) -> None:
    """The bidirectional teacher's trajectories: one step that makes all latents of a plan."""
    teacher = load_dit(config.teacher, dtype_of(config.dtype), device)
    c = teacher.config
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    negative = source.embed([config.negative]).to(device)
    keep = kept_states(config.denoising)

    def make(T: int, numbers: range) -> dict[str, Tensor]:
        prompt, states = source(numbers).to(device), {}
        noise = torch.stack([pair_noise(config, c.in_dim, n, T) for n in numbers])
        text = teacher.text_kv(torch.cat([prompt, negative.expand_as(prompt)]))

        def record(_: int, k: int, x: Tensor) -> None:
            if k in keep:
                states[k] = x

        noise = noise_from(noise.to(device))
        solve = many_steps(teacher, [text], noise, config.guidance, config.shift, record=record)
        solve(0, forward(T, T).steps[0], None, None, None)
        return {"states": torch.stack([states[k] for k in keep], dim=1)}

    length = length_of(mix)
    where = pairs_where(config, source.words, lambda u: length(draw(mix, u)))
    write_missing(
        where, make, trajectory_shapes(config, c.in_dim), config.micro, rank, world, device
    )


def length_of(mix: Mix) -> Callable[[int], int]:
    """entry of the mix -> how many latents its plans make: a trajectory depends on nothing else."""
    return lambda entry: mix[entry][1][0].length


def trajectory_shapes(config, channels: int) -> Callable[[int], dict]:
    """length -> what the bidirectional teacher leaves of each pair."""
    levels, (_, h, w) = len(config.denoising) + 1, config.latent
    return lambda T: {"states": (levels, T, channels, h, w)}


def check_pair(config, channels: int) -> Callable[[int, Pair], str]:
    """What can be wrong with a trajectory: it starts elsewhere, or does not fall to its end."""

    def check(T: int, pair: Pair) -> str:
        start = pair_noise(config, channels, pair.number, T)
        return wrong_states(pair.shard["states"][pair.row], start, config.seed)

    return check


# ---------------------------------------------------------------- training
def network(
    config, path: str, device: torch.device, trained: bool, dtype: torch.dtype = torch.float32
) -> DiT:
    """Load a network for training, or one that is only asked."""
    dit = load_dit(path, dtype, device).requires_grad_(trained).train(trained)
    dit.checkpointing = config.checkpointing
    if config.compile:
        dit.compile_blocks()
    return distribute(dit, config.parallel, dtype_of(config.dtype))


def prepared_layouts(
    config, mix: Mix, dit: DiT, teacher_forcing: bool, device: torch.device
) -> Callable[[int], list[Layout]]:
    """entry of the mix -> its plans as masked sequences, their masks on the device, kept."""
    tokens = dit.config.tokens(*config.latent[1:])

    @cache
    def layouts(entry: int) -> list[Layout]:
        plain = [layout(plan, teacher_forcing) for plan in mix[entry][1]]
        return [replace(lay, visible=lay.visible.prepare(tokens, device)) for lay in plain]

    return layouts


def draw_entry(config, mix: Mix, step: int) -> int:
    """The entry of the mix that all processes train on in this iteration."""
    return draw(mix, torch.rand(1, generator=generator(config.seed, Stream.PLANS, step)).item())


LossOf = Callable[[int, list[int], int, int], Tensor]  # (step, samples, entry, plan) -> [B]


def fit(
    config,
    dit: DiT,
    mix: Mix,
    loss_of: LossOf,
    rank: int,
    world: int,
    device: torch.device,
    name: str,
    average: tuple[EMA, DiT] | None = None,
) -> None:
    """Train on the mean of `loss_of` in every plan of an entry; write `name`.safetensors.

    average: an average, and the network that holds it for the loss and is written in the end"""
    rounds = split_batch(config.batch, config.micro, rank, world)
    planned = config.schedule_steps or config.steps
    optimiser = torch.optim.AdamW(
        dit.parameters(), config.lr, config.betas, weight_decay=config.weight_decay
    )
    averages = {"ema": average[0]} if average else {}
    result = average[1] if average else dit
    dit.recipe = result.recipe = recipe_of(config).write() if name == "student" else None
    dtype = dtype_of(config.dtype if config.parallel == "ddp" else "float32")  # FSDP2 casts itself
    with computing(dtype, device):
        for step, row in training_steps(config, name, {"dit": (dit, optimiser)}, device, averages):
            for group in optimiser.param_groups:
                group["lr"] = trapezoid(step, planned, config.lr, config.warmup, config.decay)
            if average:
                average[0].copy_to(average[1])
            entry = draw_entry(config, mix, step)
            plans, losses = mix[entry][1], defaultdict(list)
            for samples in rounds:
                for d, plan in enumerate(plans):
                    loss = loss_of(step, samples, entry, d)  # (B,)
                    (loss / len(rounds)).mean().backward()
                    losses[plan.name].append(loss.detach())
            sync_gradients(dit, config.parallel)
            row |= finite_means(losses, rounds, f"step {step}: the loss", device)
            row["norm"] = clip_gradients(dit, config.clip, f"step {step}")
            row["latents"] = plans[0].length
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if average:
                average[0].update(dit)
    if average:
        average[0].copy_to(average[1])
    write_network(Path(config.out) / f"{name}.safetensors", result)


def with_pairs(mix: Mix, there: list[bool]) -> Mix:
    """The mix without the entries that have no pairs: the others keep their shares' ratio."""
    if all(there):
        return mix
    say(f"{there.count(False)} of {len(mix)} kinds of plans have no pairs yet: left out")
    total = sum(share for (share, _), here in zip(mix, there) if here)
    return tuple((share / total * here, plans) for (share, plans), here in zip(mix, there))


def drawn_levels(plans: Sequence[Plan], noisy: int, clean: float, g: torch.Generator) -> list:
    """A level in 0 .. noisy - 1 for each step of each plan, and by chance `noisy`: clean."""
    levels = []
    for plan in plans:
        k = torch.randint(noisy, (len(plan.steps),), generator=g)
        is_clean = torch.rand(len(k), generator=g) < clean
        levels.append(k.masked_fill(is_clean, noisy))
    return levels


def train(
    config,
    mix: Mix,
    pairs: dict[int, list[Pair]],
    group_of: Callable[[int], int],
    teacher_forcing: bool,
    rank: int,
    world: int,
    device: torch.device,
) -> None:
    """Regress the end points of stored pairs. group_of: entry of the mix -> its group of pairs"""
    mix = with_pairs(mix, [group_of(entry) in pairs for entry in range(len(mix))])
    dit = network(config, config.weights, device, trained=True)
    source = Prompts(config.prompts, dit.config.text_dim, dit.config.text_len)
    sigmas = torch.tensor([*student_sigmas(config.denoising, config.shift), 0.0], device=device)
    layouts = prepared_layouts(config, mix, dit, teacher_forcing, device)

    def loss_of(step: int, samples: list[int], entry: int, d: int) -> Tensor:
        """Sample j of an iteration: a pair of the entry's group, and a noise level per step."""
        plans, lay, group = mix[entry][1], layouts(entry)[d], pairs[group_of(entry)]
        some, levels = [], []
        for j in samples:
            g = generator(config.seed, Stream.ODE, step, j)
            some.append(group[int(torch.randint(len(group), (1,), generator=g))])
            levels.append(drawn_levels(plans, len(config.denoising), config.clean, g)[d])
        return ode_loss(
            dit,
            lay,
            torch.stack([slot_states(pair, lay, d) for pair in some]).to(device),
            torch.stack(levels).to(device),
            sigmas,
            source([pair.number for pair in some]).to(device),
            config.loss_on_anchors,
            given_slots(plans[d], lay),
        )

    fit(config, dit, mix, loss_of, rank, world, device, "student")


def main(config: Config) -> None:
    rank, world, device = start(config.device)
    mix = mix_of(config)
    recipe_of(config)  # impossible levels are refused before any work
    if config.generate:
        make_pairs(config, mix, rank, world, device)
        return
    c = load_dit(config.teacher, None).config
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    pairs = read_pairs(config, source.words, trajectory_shapes(config, c.in_dim))
    if config.check:
        check_shards(Path(config.data), pairs, check_pair(config, c.in_dim))
        print(f"{sum(map(len, pairs.values()))} pairs of {len(pairs)} lengths are good")
        return
    train(config, mix, pairs, length_of(mix), config.teacher_forcing, rank, world, device)


if __name__ == "__main__":
    run(main, Config)
