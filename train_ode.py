"""Stage 1: teach the student the teacher's ODE, block by block, in both directions.

    --generate   the teacher integrates noise to video in 48 steps; the states at the student's four noise levels and
                 the end point x0 are kept: one *pair* per prompt
    (default)    the student predicts x0 from these states in one masked pass (paper Eq. 1, App. A.1 and B.1):

        for plan in forward, backward with anchors:            both in every iteration
            one noise level k per step of the plan             "diffusion forcing"; anchors share their step's level
            x = state k of the latent, for every slot          a latent that is anchor and target is there twice
            loss = |G(x, t_k) - x0|^2 on targets               anchors get no loss, they only see and are seen

Every random number is a function of (seed, step, sample), so the result does not depend on the number of processes and
an interrupted run goes on exactly: run the same command again. No rollout and no cache here: see train_dmd.py.

    python train_ode.py --generate --pairs 512 && python train_ode.py
    torchrun --nproc_per_node=8 train_ode.py --preset wan --teacher Wan2.1-T2V-14B --weights Wan2.1-T2V-1.3B
"""
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm, trange

from anchors import Layout, both_directions, layout
from common import (
    UserError,
    atomic,
    clip_gradients,
    computing,
    distribute,
    dtype_of,
    generator,
    load_state,
    log_row,
    mean_over_processes,
    read_tensors,
    run,
    save_state,
    split_batch,
    start,
    stop_signals,
    sync_gradients,
    trim_log,
    whole_state,
    write_safetensors,
)
from dit import DiT, load_dit
from sampler import ode_sigmas, student_sigmas
from text import Prompts

KEEP = (0, 12, 24, 36, 48)  # of the 49 states: the student's four levels, exactly, and the end point [Self-Forcing]


@dataclass
class Config:
    """Stage 1: make ODE pairs (--generate, --check), or train on them."""
    PRESETS = {"toy": {}, "toy64": {"latent": (21, 8, 8)}, "wan": {  # [paper App. A.1]
        "teacher": "Wan2.1-T2V-14B", "weights": "Wan2.1-T2V-1.3B", "prompts": "prompts.txt", "latent": (21, 60, 104), "pairs": 16000,
        "guidance": 3.0, "shard": 16, "steps": 6000, "batch": 128, "micro": 1, "lr": 2e-6, "warmup": 0, "decay": 0.0,
        "parallel": "fsdp", "checkpointing": True}}
    preset: str = "toy"              # toy, toy64 (64 pixels), or wan: the paper's numbers
    teacher: str = "toy/weights/teacher.safetensors"  # makes the pairs
    weights: str = "toy/weights/teacher.safetensors"  # what the student starts from
    prompts: str = "toy"             # toy: captions without end; or a text file, a prompt a line
    data: str = "out/pairs"          # folder of the pairs
    out: str = "out/ode"             # folder of student.safetensors, log.jsonl and the resume state
    generate: bool = False           # make pairs instead of training
    check: bool = False              # check the pairs instead of training
    pairs: int = 1024                # how many pairs [paper: 16000]
    shard: int = 64                  # pairs a file
    latent: tuple[int, ...] = (21, 4, 4)  # latents, height and width of the grid
    guidance: float = 2.0            # conventional: uncond + w (cond - uncond) [paper: 3]
    negative: str = ""               # prompt of the unconditional pass
    shift: float = 5.0               # of the noise levels [paper]
    steps: int = 1000                # training iterations [paper: 6000]
    batch: int = 16                  # samples an iteration, over all processes [paper: 128]
    micro: int = 0                   # samples a forward pass, the rest is accumulated; 0: all of a process's share
    lr: float = 3e-4                 # AdamW, constant between warm-up and decay [paper: 2e-6]
    warmup: int = 50                 # iterations
    decay: float = 0.5               # share of the steps, at the end, over which the rate falls to zero [paper: 0]
    betas: tuple[float, ...] = (0.9, 0.999)  # [paper]
    weight_decay: float = 0.01       # [paper]
    clip: float = 10.0               # gradient norm [Self-Forcing]
    block: int = 3                   # B: latents a step [paper]
    anchors: int = 3                 # P: anchors before each backward block [paper]; 0 uses the dummy block
    head: int = 0                    # size of the block of latent 0 if not --block (--block 6 --anchors 0 --head 3: Fig. 8c)
    loss_on_anchors: bool = False    # ablation of the paper's Table 5
    clean: float = 0.0               # share of steps at t = 0, without loss: clean context [paper: 0]
    seed: int = 0
    save_every: int = 200            # iterations between resume states
    parallel: str = "ddp"            # ddp, or fsdp: shard the model [paper]
    checkpointing: bool = False      # recompute activations in the backward pass
    dtype: str = "bfloat16"          # of computation; trained weights, optimiser, sums and the ODE's state are float32
    device: str = "auto"


# ---------------------------------------------------------------- pairs
@torch.no_grad()
def trajectory(teacher: DiT, prompt: Tensor, negative: Tensor, noise: Tensor, guidance: float, shift: float,
               bar: tqdm | None = None) -> Tensor:
    """Euler on the 48-step grid with guidance on the velocity: noise [B, T, C, h, w] -> states [B, 5, T, C, h, w]."""
    sigmas, x, kept = ode_sigmas(KEEP[-1], shift), noise, [noise]
    both, pos = torch.cat([prompt, negative]), torch.arange(noise.shape[1], device=noise.device)
    for i, (sigma, below) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        t = torch.full((2 * len(x), x.shape[1]), 1000 * sigma, device=x.device)
        cond, uncond = teacher(torch.cat([x, x]), t, both, pos).chunk(2)
        x = x + (below - sigma) * (uncond + guidance * (cond - uncond))
        if i + 1 in KEEP:
            kept.append(x)
        if bar is not None:
            bar.update(len(x))
    return torch.stack(kept, dim=1)


def pair_noise(config: Config, channels: int, number: int) -> Tensor:
    """The noise [T, C, h, w] from which pair `number` starts."""
    T, h, w = config.latent
    return torch.randn(T, channels, h, w, generator=generator(config.seed, 3, number))


def generate_pairs(config: Config, rank: int, world: int, device: torch.device) -> None:
    """Write the missing shards; process r makes shards r, r + world, ...; at the end rank 0 writes the index."""
    folder, dtype = Path(config.data), dtype_of(config.dtype)
    shards = range(0, config.pairs, config.shard)
    todo = [s for n, s in enumerate(shards) if n % world == rank and not (folder / f"pairs-{s:06d}.safetensors").exists()]
    teacher = load_dit(config.teacher, dtype, device)
    c, (T, h, w) = teacher.config, config.latent
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    negative = source.embed([config.negative]).to(device)
    micro = config.micro or 16
    shapes = (torch.zeros(2 * micro, T, c.in_dim, h, w, device=device), torch.zeros(2 * micro, T, device=device))
    for _ in range(2):  # the first pass warms up
        began = time.perf_counter()
        teacher(*shapes, negative.expand(2 * micro, -1, -1), torch.arange(T, device=device)).sum().item()
    cost = timedelta(seconds=round((time.perf_counter() - began) * KEEP[-1] * len(todo) * config.shard / micro))
    print(f"{config.pairs} pairs in {len(shards)} shards, {len(todo)} to make here: about {cost} (h:mm:ss) and "
          f"{config.pairs * len(KEEP) * T * c.in_dim * h * w * 2 / 1e9:.2g} GB on disk in all", flush=True)
    with tqdm(total=len(todo) * config.shard * KEEP[-1], desc=f"pairs {rank}", unit="step") as bar, stop_signals() as stop:
        for s in todo:
            states, numbers = [], range(s, min(s + config.shard, config.pairs))
            for a in range(s, numbers.stop, micro):
                some = range(a, min(a + micro, numbers.stop))
                noise = torch.stack([pair_noise(config, c.in_dim, i) for i in some]).to(device)
                prompt = source(some).to(device)
                states.append(trajectory(teacher, prompt, negative.expand_as(prompt), noise, config.guidance, config.shift, bar).cpu())
                if stop():
                    return print(f"stopped; {folder} keeps its whole shards, run the same command to go on")
            sigmas = torch.tensor([ode_sigmas(KEEP[-1], config.shift)[k] for k in KEEP])
            write_safetensors(folder / f"pairs-{s:06d}.safetensors", {"states": torch.cat(states).half(), "sigmas": sigmas},
                              {k: asdict(config)[k] for k in ("teacher", "prompts", "guidance", "negative", "shift", "seed", "latent")})
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        names = sorted(p.name for p in folder.glob("pairs-*.safetensors"))
        index = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
        with atomic(folder / "index.json") as tmp:
            tmp.write_text(json.dumps({"pairs": config.pairs, "shard": config.shard, "shards": index}, indent=1))
        print(f"wrote {len(index)} shards and {folder / 'index.json'}")


def read_pairs(config: Config) -> tuple[list[Tensor], dict]:
    """All shards, memory-mapped: states [S, 5, T, C, h, w] each, and their settings. raises: UserError."""
    folder = Path(config.data)
    if not (folder / "index.json").is_file():
        raise UserError(f"{folder / 'index.json'} does not exist: make pairs first with python train_ode.py --generate --data {folder}")
    index, states, first = json.loads((folder / "index.json").read_text()), [], None
    want = torch.tensor([ode_sigmas(KEEP[-1], config.shift)[k] for k in KEEP])
    for name in index["shards"]:
        tensors, made = read_tensors(folder / name)
        if tensors["sigmas"].shape != want.shape or (tensors["sigmas"] - want).abs().max() > 1e-6:
            raise UserError(f"{name} has noise levels {tensors['sigmas'].tolist()}, but shift {config.shift} needs {want.tolist()}")
        if tuple(made["latent"]) != tuple(config.latent):
            raise UserError(f"{name} holds latents {made['latent']}, but --latent is {list(config.latent)}")
        if made["prompts"] != config.prompts:
            raise UserError(f"{name} was made with --prompts {made['prompts']}, not {config.prompts}; use the same prompts")
        if differ := [k for k in made if made[k] != (first := first or made)[k]]:
            raise UserError(f"{name} differs from the other shards in {', '.join(f'{k}={made[k]!r}' for k in differ)}; delete it "
                            "and run --generate again")
        states.append(tensors["states"])
    return states, made


def check_pairs(config: Config) -> None:
    """Validate every shard: its hash, its noise levels, finite numbers, the first state is the seeded noise, and the
    share of noise falls from state to state to the end point."""
    folder = Path(config.data)
    states, made = read_pairs(config)
    index = json.loads((folder / "index.json").read_text())
    for (name, digest), x in zip(index["shards"].items(), tqdm(states, desc="check", unit="shard")):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise UserError(f"{name} is not the file the index names (its hash differs); delete it and run --generate again")
        first = int(name[6:12])
        noise = torch.stack([pair_noise(config, x.shape[3], first + i) for i in range(len(x))]).flatten(1)
        if not torch.isfinite(x).all():
            raise UserError(f"{name} holds NaN or infinite latents; delete it and run --generate again")
        flat = x.float().flatten(2)
        if (flat[:, 0] - noise).abs().max() > 2e-3:
            raise UserError(f"{name} does not start from the noise of seed {config.seed}; was it made with another --seed?")
        share = torch.stack([torch.nn.functional.cosine_similarity(flat[:, k], noise) for k in range(len(KEEP))]).mean(1)
        near = torch.stack([torch.nn.functional.cosine_similarity(flat[:, k], flat[:, -1]) for k in range(len(KEEP))]).mean(1)
        if not (share.diff() < 0).all() or not (near.diff() > 0).all():
            raise UserError(f"{name}: the states do not fall from noise to a clean end (likeness to the noise "
                            f"{share.tolist()}, to the end {near.tolist()})")
    print(f"{sum(map(len, states))} pairs in {len(states)} shards are good: made by {made['teacher']}, guidance {made['guidance']}, "
          f"shift {made['shift']}, likeness to the noise from 1 to {share[-1]:.2f}")


# ---------------------------------------------------------------- the loss
def ode_loss(dit: DiT, lay: Layout, states: Tensor, levels: Tensor, sigmas: Tensor, prompt: Tensor,
             loss_on_anchors: bool = False) -> Tensor:
    """Regress the end point from every slot's state, in one masked pass (paper Eq. 1).

    states: [B, K+1, T, C, h, w], noisiest first, the end point last;  levels: [B, steps of the plan], in 0 .. K, where K
    is clean context without loss;  sigmas: [K+1], the last is 0.  returns: the mean squared error of each sample [B]"""
    device = states.device
    latent = torch.tensor([i if i >= 0 else ~i for i in lay.latent], device=device)
    level = levels[:, torch.tensor(lay.step, device=device)]                        # (B, slots)
    x = states[torch.arange(len(states), device=device)[:, None], level, latent]    # (B, slots, C, h, w)
    sigma = sigmas[level]
    v = dit(x, 1000 * sigma, prompt, torch.tensor(lay.pos, device=device), lay.visible)
    x0 = x - sigma[..., None, None, None] * v
    error = (x0 - states[:, -1, latent]).square().flatten(2).mean(2)                # (B, slots)
    scored = torch.tensor([i >= 0 and (t or loss_on_anchors) for i, t in zip(lay.latent, lay.is_target)], device=device)
    scored = scored & (sigma > 0)
    return (error * scored).sum(1) / scored.sum(1).clamp_min(1)


# ---------------------------------------------------------------- training
def train(config: Config, rank: int, world: int, device: torch.device) -> None:
    micro, rounds = split_batch(config.batch, config.micro, rank, world)
    states, _ = read_pairs(config)
    where = [(s, i) for s, shard in enumerate(states) for i in range(len(shard))]
    dit = load_dit(config.weights, torch.float32, device).train().requires_grad_(True)
    dit.checkpointing = config.checkpointing
    distribute(dit, config.parallel, dtype_of(config.dtype))
    source = Prompts(config.prompts, dit.config.text_dim, dit.config.text_len)
    sigmas = torch.tensor([*student_sigmas(shift=config.shift), 0.0], device=device)
    layouts = [layout(plan) for plan in both_directions(config.latent[0], config.block, config.anchors, config.head)]
    tokens = dit.config.tokens(*config.latent[1:])
    visibles = [lay.visible.prepare(tokens, device) for lay in layouts]
    layouts = [Layout(lay.latent, lay.step, lay.pos, lay.is_target, visible) for lay, visible in zip(layouts, visibles)]
    optimiser = torch.optim.AdamW(dit.parameters(), config.lr, config.betas, weight_decay=config.weight_decay)
    out, first = Path(config.out), 0
    state, log = out / "state.pt", out / "log.jsonl"
    if state.exists():
        first = load_state(state, asdict(config), {"dit": (dit, optimiser)})
        trim_log(log, first)
    out.mkdir(parents=True, exist_ok=True)

    def sample(step: int, j: int) -> tuple[int, list[Tensor]]:
        """Sample j of an iteration: a pair and, for each plan, a noise level per step."""
        g = generator(config.seed, 4, step, j)
        number = int(torch.randint(len(where), (1,), generator=g))
        levels = [torch.randint(len(sigmas) - 1, (max(lay.step) + 1,), generator=g) for lay in layouts]
        clean = [torch.rand(len(k), generator=g) < config.clean for k in levels]
        return number, [k.masked_fill(c, len(sigmas) - 1) for k, c in zip(levels, clean)]

    dtype = dtype_of(config.dtype if config.parallel == "ddp" else "float32")  # FSDP2 casts by itself
    with (stop_signals() as stop, computing(dtype, device),
          trange(first, config.steps, initial=first, total=config.steps, desc="stage 1", disable=rank > 0) as bar):
        for step in bar:
            for group in optimiser.param_groups:
                group["lr"] = config.lr * min(1.0, (step + 1) / max(config.warmup, 1),
                                              (config.steps - step) / max(config.steps * config.decay, 1))
            losses = [0.0] * len(layouts)
            for r in range(rounds):
                drawn = [sample(step, (r * world + rank) * micro + m) for m in range(micro)]
                numbers = [n for n, _ in drawn]
                x = torch.stack([states[where[n][0]][where[n][1]].float() for n in numbers]).to(device)
                prompt = source(numbers).to(device)
                for d, lay in enumerate(layouts):
                    levels = torch.stack([k[d] for _, k in drawn]).to(device)
                    loss = ode_loss(dit, lay, x, levels, sigmas, prompt, config.loss_on_anchors).mean() / rounds
                    loss.backward()
                    losses[d] += loss.item()
            sync_gradients(dit, config.parallel)
            losses = [mean_over_processes(x, device) for x in losses]
            if not all(map(math.isfinite, losses)):
                raise FloatingPointError(f"step {step}: the loss is {losses} (forward, backward); the last saved state is good")
            norm = clip_gradients(dit, config.clip, f"step {step}")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            last, stopping = step + 1 == config.steps, mean_over_processes(float(stop()), device) > 0
            if rank == 0:
                log_row(log, step=step, forward=losses[0], backward=losses[1], norm=norm)
                bar.set_postfix(forward=f"{losses[0]:.4f}", backward=f"{losses[1]:.4f}")
            if (step + 1) % config.save_every == 0 or last or stopping:
                save_state(state, step + 1, asdict(config), {"dit": (dit, optimiser)})
                if stopping and not last:
                    return print(f"stopped at step {step + 1}; run the same command to go on") if rank == 0 else None
    weights = whole_state(dit)
    if rank == 0:
        write_safetensors(out / "student.safetensors", weights, asdict(dit.config))
        print(f"wrote {out / 'student.safetensors'}")


def main(config: Config) -> None:
    rank, world, device = start(config.device)
    if len(config.latent) != 3 or min(config.latent) < 1:
        raise UserError(f"--latent {config.latent} must be three numbers: latents, height, width")
    if config.check:
        check_pairs(config)
    elif config.generate:
        generate_pairs(config, rank, world, device)
    else:
        train(config, rank, world, device)


if __name__ == "__main__":
    run(main, Config)
