"""Stage 1: teach the student the teacher's ODE, block by block, in both directions.

    --generate   the teacher integrates noise to video in 48 steps; the states at the student's four noise levels and
                 the end point x0 are kept: one *pair* per prompt (pairs.py)
    (default)    the student predicts x0 from these states in one masked pass (paper Eq. 1, App. A.1 and B.1):

        for plan in forward, backward with anchors:            both in every iteration
            one noise level k per step of the plan             "diffusion forcing"; anchors share their step's level
            x = state k of the latent, for every slot          a latent that is anchor and target is there twice
            loss = |G(x, t_k) - x0|^2 on targets               anchors get no loss, they only see and are seen

Two more ways to begin, from Causal Forcing, in both directions here; the loop is the same:

    --teacher ar     pairs of the autoregressive teacher (train_ar.py), read after clean latents of real clips
    --method cd      no pairs: the student at one level of the 48 must agree with its own average one level lower, where
                     one step of the autoregressive teacher leads (causal consistency distillation)

Every random number is a function of (seed, step, sample), so the result does not depend on the number of processes and
an interrupted run goes on exactly: run the same command again. No rollout and no cache here: see train_dmd.py.

    python train_ode.py --generate --pairs 512 && python train_ode.py
    torchrun --nproc_per_node=8 train_ode.py --preset wan --teacher Wan2.1-T2V-14B --weights Wan2.1-T2V-1.3B
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from anchors import Layout, both_directions, layout
from dit import DiT, load_dit
from lib.clips import Clips
from lib.common import UserError, dtype_of, generator, run, start
from lib.pairs import (
    KEEP,
    check_pairs,
    generate_pairs,
    is_causal,
    pairs_in,
    read_pairs,
    slot_states,
    teacher_file,
)
from lib.states import whole_state
from lib.text import NEGATIVE, Prompts
from lib.training import (
    EMA,
    clip_gradients,
    computing,
    distribute,
    finite_means,
    inference,
    split_batch,
    sync_gradients,
    training_steps,
)
from lib.weights import write_safetensors
from sampler import guided, ode_sigmas, student_sigmas


@dataclass
class Config:
    """Stage 1: make ODE pairs (--generate, --check), or train on them."""

    PRESETS = {
        "toy": {},
        "toy64": {"latent": (21, 8, 8)},
        "wan": {  # [paper App. A.1]
            "teacher": "Wan2.1-T2V-14B",
            "weights": "Wan2.1-T2V-1.3B",
            "prompts": "prompts.safetensors",
            "negative": NEGATIVE,
            "latent": (21, 60, 104),
            "pairs": 16000,
            "guidance": 3.0,
            "shard": 16,
            "steps": 6000,
            "batch": 128,
            "micro": 1,
            "lr": 2e-6,
            "warmup": 0,
            "decay": 0.0,
            "parallel": "fsdp",
            "checkpointing": True,
        },
    }
    PRESETS["wan-causal"] = PRESETS["wan"] | {  # [Causal Forcing]
        "teacher": "ar",
        "weights": "out/ar/teacher.safetensors",
        "prompts": "out/latents/prompts.safetensors",
        "guidance": 6.0,
        "steps": 1000,
        "batch": 64,
    }
    PRESETS["wan-cd"] = PRESETS["wan-causal"] | {
        "method": "cd",
        "guidance": 3.0,
        "steps": 3000,
        "betas": (0.0, 0.999),
    }  # [and its ++]
    preset: str = "toy"  # toy, toy64 (64 pixels), wan (the paper's numbers), wan-causal or wan-cd (Causal Forcing's)
    method: str = (
        "ode"  # ode: regress end points; cd: causal consistency distillation, without pairs
    )
    teacher: str = "toy/weights/teacher.safetensors"  # makes the pairs; or ar:FILE, one of train_ar.py (ar: out/ar)
    weights: str = "toy/weights/teacher.safetensors"  # what the student starts from
    prompts: str = (
        "toy"  # toy: captions without end; or what text.py wrote; or a text file of toy captions
    )
    data: str = "out/pairs"  # folder of the pairs
    latents: str = "out/latents"  # folder of real clips (latents.py), for an autoregressive teacher
    out: str = "out/ode"  # folder of student.safetensors, log.jsonl and the resume state
    generate: bool = False  # make pairs instead of training
    check: bool = False  # check the pairs instead of training
    pairs: int = 1024  # how many pairs [paper: 16000]
    shard: int = 64  # pairs a file
    latent: tuple[int, ...] = (21, 4, 4)  # latents, height and width of the grid
    guidance: float = 2.0  # conventional: uncond + w (cond - uncond) [paper: 3]
    negative: str = ""  # prompt of the unconditional pass
    shift: float = 5.0  # of the noise levels [paper]
    steps: int = 1000  # training iterations [paper: 6000]
    batch: int = 16  # samples an iteration, over all processes [paper: 128]
    micro: int = 0  # samples a forward pass, the rest is accumulated; 0: all of a process's share
    lr: float = 3e-4  # AdamW, constant between warm-up and decay [paper: 2e-6]
    warmup: int = 50  # iterations
    decay: float = (
        0.5  # share of the steps, at the end, over which the rate falls to zero [paper: 0]
    )
    betas: tuple[float, ...] = (0.9, 0.999)  # [paper]
    weight_decay: float = 0.01  # [paper]
    clip: float = 10.0  # gradient norm [Self-Forcing]
    block: int = 3  # B: latents a step [paper]
    anchors: int = 3  # P: anchors before each backward block [paper]; 0 uses the dummy block
    head: int = (
        0  # size of the block of latent 0 if not --block (--block 6 --anchors 0 --head 3: Fig. 8c)
    )
    loss_on_anchors: bool = False  # ablation of the paper's Table 5
    clean: float = 0.0  # share of steps at t = 0, without loss: clean context [paper: 0]
    teacher_forcing: bool = (
        False  # all context clean, [clean | noisy]; always so with an autoregressive teacher
    )
    ema: float = 0.99  # of --method cd: the average that is agreed with [Causal Forcing++]
    seed: int = 0
    save_every: int = 200  # iterations between resume states
    parallel: str = "ddp"  # ddp, or fsdp: shard the model [paper]
    checkpointing: bool = False  # recompute activations in the backward pass
    compile: bool = False  # torch.compile the blocks: faster steps, after minutes
    dtype: str = "bfloat16"  # of computation; trained weights, optimiser, sums and the ODE's state are float32
    device: str = "auto"


# ---------------------------------------------------------------- the losses
def per_slot(lay: Layout, by_step: Tensor, clean: float) -> Tensor:
    """Values [B, steps of the plan] -> [B, slots]; `clean` where the slot is clean context."""
    device = by_step.device
    value = by_step[:, torch.tensor(lay.step, device=device)]
    return value.masked_fill(torch.tensor(lay.is_clean, device=device), clean)


def mean_over(
    lay: Layout,
    error: Tensor,
    with_anchors: bool = False,
    with_dummies: bool = False,
    scored: Tensor | None = None,
) -> Tensor:
    """Mean [B] of each sample's squared error [B, slots, C, h, w] over its targets and what else is asked for.

    Never over clean context. scored: the slots [B, slots] that may count at all."""
    counts = torch.tensor(
        [
            not c and (i >= 0 or with_dummies) and (t or with_anchors)
            for i, t, c in zip(lay.latent, lay.is_target, lay.is_clean)
        ],
        device=error.device,
    )
    counts = counts.expand(error.shape[:2]) if scored is None else counts & scored
    return (error.flatten(2).mean(2) * counts).sum(1) / counts.sum(1).clamp_min(1)


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

    states: [B, K+1, slots, C, h, w], noisiest first, the end point last;  levels: [B, steps of the plan], in 0 .. K, where
    K is clean context without loss;  sigmas: [K+1], the last is 0.  returns: the mean squared error of each sample [B]"""
    level = per_slot(lay, levels, len(sigmas) - 1)
    batch, slot = (torch.arange(n, device=states.device) for n in level.shape)
    sigma = sigmas[level]
    x0 = denoise(dit, lay, states[batch[:, None], level, slot], sigma, prompt)
    return mean_over(lay, (x0 - states[:, -1]).square(), loss_on_anchors, scored=sigma > 0)


def cd_loss(
    dit: DiT,
    average: DiT,
    teacher: DiT,
    lay: Layout,
    x0: Tensor,
    noise: Tensor,
    index: Tensor,
    grid: Tensor,
    prompt: Tensor,
    negative: Tensor,
    guidance: float,
    loss_on_anchors: bool = False,
) -> Tensor:
    """Agree with the average one level lower on the teacher's ODE (Causal Forcing++), after clean context.

    x0, noise: [B, slots, C, h, w];  index: [B, steps of the plan], in 0 .. K-2;  grid: [K+1] noise levels from 1 to 0"""
    sigma, below = (per_slot(lay, grid[index + k], 0.0) for k in (0, 1))
    high, low = (s[..., None, None, None] for s in (sigma, below))
    x = (1 - high) * x0 + high * noise
    with inference():
        pos = torch.tensor(lay.pos, device=x.device)
        both = torch.cat([prompt, negative.expand_as(prompt)])
        v = guided(teacher, x, 1000 * sigma, both, pos, guidance, visible=lay.visible)
        target = denoise(average, lay, x + (low - high) * v, below, prompt)
    return mean_over(lay, (denoise(dit, lay, x, sigma, prompt) - target).square(), loss_on_anchors)


# ---------------------------------------------------------------- training
Loss = Callable[[int, list[int], int, Layout], Tensor]  # (step, samples, direction, layout) -> [B]


def fit(
    config,
    dit: DiT,
    lays: list[Layout],
    loss_of: Loss,
    rank: int,
    world: int,
    device: torch.device,
    name: str,
    average: tuple[EMA, DiT] | None = None,
) -> None:
    """Train on the mean of `loss_of` in every layout, both in each iteration; write `name`.safetensors.

    config: has what `Config` has from `steps` to `device`;  average: kept up to date, and part of the resume state"""
    micro, rounds = split_batch(config.batch, config.micro, rank, world)
    optimiser = torch.optim.AdamW(
        dit.parameters(), config.lr, config.betas, weight_decay=config.weight_decay
    )
    dtype = dtype_of(
        config.dtype if config.parallel == "ddp" else "float32"
    )  # FSDP2 casts by itself
    with computing(dtype, device):
        for step, row in training_steps(
            config, name, {"dit": (dit, optimiser)}, device, {"ema": average[0]} if average else {}
        ):
            for group in optimiser.param_groups:
                group["lr"] = config.lr * min(
                    1.0,
                    (step + 1) / max(config.warmup, 1),
                    (config.steps - step) / max(config.steps * config.decay, 1),
                )
            if average:
                average[0].copy_to(average[1])
            losses, lost = [0.0] * len(lays), []
            for r in range(rounds):
                samples = [(r * world + rank) * micro + m for m in range(micro)]
                for d, lay in enumerate(lays):
                    loss = loss_of(step, samples, d, lay) / rounds
                    loss.mean().backward()
                    losses[d] += loss.mean().item()
                    lost += [
                        sample for sample, x in zip(samples, loss.tolist()) if not math.isfinite(x)
                    ]
            sync_gradients(dit, config.parallel)
            named = dict(zip(("forward", "backward"), losses))
            row |= finite_means(named, lost, f"step {step}: the loss", device)
            row |= {
                "norm": clip_gradients(dit, config.clip, f"step {step}"),
            }
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if average:
                average[0].update(dit)
    weights, path = whole_state(dit), Path(config.out) / f"{name}.safetensors"
    if rank == 0:
        write_safetensors(path, weights, asdict(dit.config))
        print(f"wrote {path}")


def network(
    config,
    path: str,
    device: torch.device,
    trained: bool = True,
    dtype: torch.dtype = torch.float32,
) -> DiT:
    """Load a network for training, or one that is only asked."""
    dit = load_dit(path, dtype, device).requires_grad_(trained)
    dit.checkpointing = config.checkpointing
    if config.compile:
        dit.compile_blocks()
    return distribute(dit.train(trained), config.parallel, dtype_of(config.dtype))


def layouts(config, dit: DiT, teacher_forcing: bool, device: torch.device) -> list[Layout]:
    """The two directions as masked sequences, their masks on the device."""
    lays = [
        layout(plan, teacher_forcing)
        for plan in both_directions(config.latent[0], config.block, config.anchors, config.head)
    ]
    return [
        replace(lay, visible=lay.visible.prepare(dit.config.tokens(*config.latent[1:]), device))
        for lay in lays
    ]


def train_ode(config: Config, rank: int, world: int, device: torch.device) -> None:
    """Regress the end points of stored pairs."""
    shards, _ = read_pairs(config)
    where = [(shard, i) for shard in shards for i in range(pairs_in(shard))]
    dit = network(config, config.weights, device)
    source = Prompts(config.prompts, dit.config.text_dim, dit.config.text_len)
    sigmas = torch.tensor([*student_sigmas(shift=config.shift), 0.0], device=device)
    lays = layouts(config, dit, config.teacher_forcing or is_causal(config), device)

    def loss_of(step: int, samples: list[int], d: int, lay: Layout) -> Tensor:
        """Sample j of an iteration: a pair and, for each plan, a noise level per step."""
        numbers, levels = [], []
        for j in samples:
            g = generator(config.seed, 4, step, j)
            numbers.append(int(torch.randint(len(where), (1,), generator=g)))
            drawn = [
                torch.randint(len(sigmas) - 1, (max(each.step) + 1,), generator=g) for each in lays
            ]
            clean = [torch.rand(len(k), generator=g) < config.clean for k in drawn]
            levels.append(drawn[d].masked_fill(clean[d], len(sigmas) - 1))
        states = torch.stack([slot_states(*where[n], lay, d) for n in numbers]).to(device)
        return ode_loss(
            dit,
            lay,
            states,
            torch.stack(levels).to(device),
            sigmas,
            source(numbers).to(device),
            config.loss_on_anchors,
        )

    fit(config, dit, lays, loss_of, rank, world, device, "student")


def train_cd(config: Config, rank: int, world: int, device: torch.device) -> None:
    """Consistency distillation from an autoregressive teacher, without pairs."""
    if not is_causal(config):
        raise UserError(
            f"--method cd follows an autoregressive teacher, not --teacher {config.teacher}; train one with train_ar.py and "
            "name it as ar:FILE"
        )
    dit, average = (
        network(config, config.weights, device),
        network(config, config.weights, device, trained=False),
    )
    teacher = network(
        config, teacher_file(config), device, trained=False, dtype=dtype_of(config.dtype)
    )
    c = dit.config
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    clips, negative = (
        Clips(config.latents, config.latent, c.in_dim, source),
        source.embed([config.negative]).to(device),
    )
    grid = torch.tensor(ode_sigmas(KEEP[-1], config.shift), device=device)
    lays = layouts(config, dit, True, device)

    def loss_of(step: int, samples: list[int], d: int, lay: Layout) -> Tensor:
        """Sample j of an iteration: a clip, its noise in each slot, and a level of the grid per step."""
        numbers, index, noise = [], [], []
        for j in samples:
            g = generator(config.seed, 12, step, j, d)
            numbers.append(int(torch.randint(len(clips), (1,), generator=g)))
            index.append(torch.randint(len(grid) - 2, (max(lay.step) + 1,), generator=g))
            noise.append(torch.randn(len(lay.latent), *clips[0].shape[1:], generator=g))
        latent = [i if i >= 0 else ~i for i in lay.latent]
        x0 = torch.stack([clips[n][latent] for n in numbers]).to(device)
        return cd_loss(
            dit,
            average,
            teacher,
            lay,
            x0,
            torch.stack(noise).to(device),
            torch.stack(index).to(device),
            grid,
            source(numbers).to(device),
            negative,
            config.guidance,
            config.loss_on_anchors,
        )

    fit(config, dit, lays, loss_of, rank, world, device, "student", (EMA(dit, config.ema), average))


def main(config: Config) -> None:
    rank, world, device = start(config.device)
    if len(config.latent) != 3 or min(config.latent) < 1:
        raise UserError(f"--latent {config.latent} must be three numbers: latents, height, width")
    if config.method not in ("ode", "cd"):
        raise UserError(f"--method {config.method!r} must be ode or cd")
    if config.check:
        check_pairs(config)
    elif config.generate:
        generate_pairs(config, rank, world, device)
    elif config.method == "cd":
        train_cd(config, rank, world, device)
    else:
        train_ode(config, rank, world, device)


if __name__ == "__main__":
    run(main, Config)
