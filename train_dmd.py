"""Stage 2: the student learns from its own rollouts, in both directions, by distribution matching (DMD).

Three networks of one class: the *student* G generates block by block with its cache; the frozen *teacher* f_real and the
trained *critic* f_fake score whole videos, seeing everything. One iteration:

    every 5th:  for plan in forward, backward with anchors:
                    x  = rollout of G, stopped at one random denoising step, gradient only there      (Fig. 9)
                    xt = (1 - sigma) x + sigma noise
                    x_real = x0 by f_real(xt) with guidance,   x_fake = x0 by f_fake(xt)
                    gradient of G's loss in x:  (x_fake - x_real) / mean |x - x_real|                  (Eq. 2)
    always:     for plan in forward, backward:
                    x  = rollout of G, without gradient
                    f_fake learns to denoise it:  |f_fake(xt) - (noise - x)|^2                         (Eq. 3)

x holds the targets only; anchors are never in a loss, they learn through the targets that see them. Both directions
run one after the other and their gradients add up. Exit steps are drawn from (seed, step, direction), so all processes
agree without talking. Every random number is a function of such numbers: 2 processes equal 1, and a run continues
exactly from its last state: run the same command again. Guidance is uncond + w (cond - uncond); the "3.0" of public DMD code is w = 4.

    torchrun --nproc_per_node=1 train_dmd.py
    torchrun --nnodes=8 --nproc_per_node=8 train_dmd.py --preset wan
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from anchors import both_directions
from dit import DiT, load_dit
from lib.common import UserError, dtype_of, generator, run, start
from lib.media import write_sheet
from lib.pairs import dummies_of
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
from lib.weights import read_dit, write_safetensors
from sampler import generate, guided, noise_from, shift_sigma, student_sigmas
from vae import load_vae


@dataclass
class Config:
    """Stage 2: distribution matching on the student's own rollouts, in both directions."""

    PRESETS = {
        "toy": {},
        "toy64": {"latent": (21, 8, 8)},
        "wan": {  # [paper App. A.1]
            "student": "out/ode/student.safetensors",
            "teacher": "Wan2.1-T2V-14B",
            "critic": "Wan2.1-T2V-1.3B",
            "vae": "Wan2.1-T2V-1.3B",
            "prompts": "prompts.safetensors",
            "negative": NEGATIVE,
            "latent": (21, 60, 104),
            "guidance": 4.0,
            "steps": 600,
            "batch": 64,
            "micro": 1,
            "lr": 2e-6,
            "lr_critic": 4e-7,
            "ratio": 5,
            "ema": 0.99,
            "ema_start": 200,
            "parallel": "fsdp",
            "checkpointing": True,
        },
    }
    PRESETS["wan-small-teacher"] = PRESETS["wan"] | {
        "teacher": "Wan2.1-T2V-1.3B"
    }  # for fewer or smaller GPUs
    PRESETS["wan-framewise"] = PRESETS["wan"] | {"block": 1, "anchors": 1}  # [Causal Forcing]
    PRESETS["wan-2step"] = PRESETS[
        "wan-framewise"
    ] | {  # [Causal Forcing++]: the first block still takes four
        "denoising": (1000.0, 500.0),
        "first_denoising": (1000.0, 750.0, 500.0, 250.0),
    }
    PRESETS["wan-1step"] = PRESETS["wan-2step"] | {"denoising": (1000.0,)}
    preset: str = "toy"  # toy, toy64 (64 pixels), wan (the paper's), wan-small-teacher, wan-framewise, -2step, -1step
    student: str = "toy/weights/ode.safetensors"  # what the student starts from: stage 1
    teacher: str = "toy/weights/teacher.safetensors"  # the frozen real score
    critic: str = "toy/weights/teacher.safetensors"  # what the fake score starts from
    vae: str = "toy/weights/vae.safetensors"  # for the sample sheets
    prompts: str = (
        "toy"  # toy: captions without end; or what text.py wrote; or a text file of toy captions
    )
    out: str = (
        "out/dmd"  # folder of student.safetensors, log.jsonl, curves.png, sheets and state.pt
    )
    latent: tuple[int, ...] = (21, 4, 4)  # latents, height and width of the grid
    steps: int = 500  # iterations: critic updates [paper: 600]
    ratio: int = 5  # critic updates a student update [paper]
    batch: int = 8  # samples an update and direction, over all processes [paper: 64]
    micro: int = 0  # samples a rollout, the rest is accumulated; 0: all of a process's share
    lr: float = 5e-5  # of the student, AdamW [paper: 2e-6]
    lr_critic: float = 2e-4  # of the critic [paper: 4e-7]
    betas: tuple[float, ...] = (0.0, 0.999)  # [paper]
    weight_decay: float = 0.01  # [paper]
    clip: float = 10.0  # gradient norm [Self-Forcing]
    ema: float = 0.95  # of the student [paper: 0.99]
    ema_start: int = 100  # iteration from which it averages [paper: 200]
    guidance: float = 2.0  # of the real score, conventional w [paper's code: 4]
    negative: str = ""  # prompt of the real score's unconditional pass
    denoising: tuple[float, ...] = (
        1000,
        750,
        500,
        250,
    )  # the student's steps, before the shift [paper]
    first_denoising: tuple[
        float, ...
    ] = ()  # of the block that is made first, if others [Causal Forcing++: all four of them]
    shift: float = 5.0  # of all noise levels [paper]
    block: int = 3  # B: latents a step [paper]
    anchors: int = 3  # P: anchors before each backward block [paper]; 0 uses the dummy block
    head: int = (
        0  # size of the block of latent 0 if not --block (--block 6 --anchors 0 --head 3: Fig. 9c)
    )
    commit_anchors: bool = False  # let anchors be seen while their block is written to the cache
    shared_student: bool = True  # false: one student a direction (ablation, Table 2)
    shared_critic: bool = True  # false: one critic a direction (ablation, Table 2)
    seed: int = 0
    save_every: int = 50  # iterations between resume states
    sheet_every: int = 100  # iterations between sample sheets; 0: none
    parallel: str = "ddp"  # ddp, or fsdp: shard all three networks [paper]
    checkpointing: bool = False  # recompute activations in the backward pass
    compile: bool = False  # torch.compile the blocks: faster steps, after minutes
    dtype: str = "bfloat16"  # of computation and of the teacher; trained weights, optimisers and sums are float32
    device: str = "auto"


# ---------------------------------------------------------------- losses
def noised(x: Tensor, u: Tensor, noise: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, sigma [B, 1, 1, 1, 1] and t [B, T] for levels u [B] in [0, 1], shifted and kept in 0.02 .. 0.98 [Self-Forcing]."""
    sigma = shift_sigma(u, shift).clamp(0.02, 0.98).view(-1, 1, 1, 1, 1)
    return (1 - sigma) * x + sigma * noise, sigma, (1000 * sigma).view(-1, 1).expand(x.shape[:2])


@torch.no_grad()
def dmd_gradient(
    teacher: DiT,
    critic: DiT,
    x: Tensor,
    u: Tensor,
    noise: Tensor,
    prompt: Tensor,
    negative: Tensor,
    guidance: float,
    shift: float,
) -> Tensor:
    """The direction in which generated latents x [B, T, C, h, w] are less like the teacher's (Eq. 2), per sample over
    the mean |x - x_real|."""
    xt, sigma, t = noised(x, u, noise, shift)
    pos = torch.arange(x.shape[1], device=x.device)
    x_real = xt - sigma * guided(
        teacher, xt, t, torch.cat([prompt, negative.expand_as(prompt)]), pos, guidance
    )
    x_fake = xt - sigma * critic(xt, t, prompt, pos)
    return (x_fake - x_real) / (x - x_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)


def dmd_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss [B] whose gradient in x, per sample, is `gradient` over the number of its elements."""
    return 0.5 * (x - (x - gradient).detach()).square().flatten(1).mean(1)


def critic_loss(
    critic: DiT, x: Tensor, u: Tensor, noise: Tensor, prompt: Tensor, shift: float
) -> Tensor:
    """Flow matching on the student's videos (Eq. 3, in velocity): [B]."""
    xt, _, t = noised(x, u, noise, shift)
    v = critic(xt, t, prompt, torch.arange(x.shape[1], device=x.device))
    return (v - (noise - x)).square().flatten(1).mean(1)


# ---------------------------------------------------------------- training
def memory_of_weights(
    student: int, critic: int, teacher: int, gpus: int, itemsize: int
) -> dict[str, float]:
    """GiB a process for networks of so many parameters, sharded over the GPUs as FSDP2 does: float32 masters, gradients
    and Adam's two moments are 16 bytes a parameter, the average 4 more; the frozen teacher is kept in computation's type."""
    gib = gpus * 2**30
    return {
        "teacher": teacher * itemsize / gib,
        "student: master, gradient, Adam, average": student * 20 / gib,
        "critic: master, gradient, Adam": critic * 16 / gib,
    }


def main(config: Config) -> None:
    rank, world, device = start(config.device)
    if len(config.latent) != 3 or min(config.latent) < 1:
        raise UserError(f"--latent {config.latent} must be three numbers: latents, height, width")
    dtype, (T, h, w), out = dtype_of(config.dtype), config.latent, Path(config.out)
    micro, rounds = split_batch(config.batch, config.micro, rank, world)
    plans, sigmas = (
        both_directions(T, config.block, config.anchors, config.head),
        student_sigmas(config.denoising, config.shift),
    )
    first_sigmas = student_sigmas(config.first_denoising or config.denoising, config.shift)

    def network(path: str, trained: bool) -> DiT:
        dit = load_dit(path, torch.float32 if trained else dtype, device).requires_grad_(trained)
        dit.checkpointing = config.checkpointing
        if config.compile:
            dit.compile_blocks()
        return distribute(dit, config.parallel, dtype)

    sizes = [
        n * sum(x.numel() for x in read_dit(p)[1].values())
        for p, n in (
            (config.student, 2 - config.shared_student),
            (config.critic, 2 - config.shared_critic),
            (config.teacher, 1),
        )
    ]
    memory = memory_of_weights(*sizes, world if config.parallel == "fsdp" else 1, dtype.itemsize)
    if rank == 0:
        print(
            "memory a process: "
            + ", ".join(f"{k} {v:.2f} GiB" for k, v in memory.items())
            + "; activations and cache come on top (python memory.py)",
            flush=True,
        )
    teacher = network(config.teacher, trained=False)
    students = [
        network(config.student, trained=True) for _ in range(1 if config.shared_student else 2)
    ]
    critics = [
        network(config.critic, trained=True) for _ in range(1 if config.shared_critic else 2)
    ]
    optimisers = {
        id(m): torch.optim.AdamW(
            m.parameters(), rate, config.betas, weight_decay=config.weight_decay
        )
        for models, rate in ((students, config.lr), (critics, config.lr_critic))
        for m in models
    }
    averages = {f"ema{i}": EMA(m, config.ema) for i, m in enumerate(students)}
    trained = {
        f"{name}{i}": (m, optimisers[id(m)])
        for name, models in (("student", students), ("critic", critics))
        for i, m in enumerate(models)
    }
    c = teacher.config
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    negative = source.embed([config.negative]).to(device)
    rows, most = (
        T + dummies_of(plans),
        max(len(sigmas), len(first_sigmas)),
    )  # dummies have noise of their own

    def draw(
        step: int, role: int, r: int, d: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int]]:
        """This process's share of round r: prompts, noise and re-noise of the rollout, level and noise of the score;
        and the exit steps, of the first block and the others, which depend on nothing that differs between processes."""
        gs = [
            generator(config.seed, role, step, (r * world + rank) * micro + m, d)
            for m in range(micro)
        ]
        numbers = [int(torch.randint(1 << 30, (1,), generator=g)) for g in gs]
        noise = torch.stack(
            [torch.randn(most, rows, c.in_dim, h, w, generator=g) for g in gs], 1
        ).to(device)
        u = torch.cat([torch.rand(1, generator=g) for g in gs]).to(device)
        score_noise = torch.stack([torch.randn(T, c.in_dim, h, w, generator=g) for g in gs]).to(
            device
        )
        g = generator(config.seed, role, step, d, 99)
        exit_at = int(torch.randint(len(sigmas), (1,), generator=g))
        exit_first = (
            int(torch.randint(len(first_sigmas), (1,), generator=g))
            if config.first_denoising
            else exit_at
        )
        return (
            source(numbers).to(device),
            noise[0],
            noise[1:],
            u,
            score_noise,
            (exit_first, exit_at),
        )

    def roll(
        d: int, prompt: Tensor, noise: Tensor, renoise: Tensor, exits: tuple[int | None, int | None]
    ) -> Tensor:
        student = students[d % len(students)]
        text = (
            prompt if config.parallel == "fsdp" else student.text_kv(prompt)
        )  # once a rollout; FSDP gathers weights in forward alone
        return generate(
            student,
            plans[d],
            [text],
            noise_from(noise, renoise, T),
            sigmas,
            exit_at=exits[1],
            commit_anchors=config.commit_anchors,
            first=(first_sigmas, exits[0]),
            dtype=dtype if config.parallel == "fsdp" else None,
        )

    def update(models: list[DiT], step: int, what: str) -> float:
        norms = []
        for m in models:
            sync_gradients(m, config.parallel)
            norms.append(clip_gradients(m, config.clip, f"step {step}, {what}"))
            optimisers[id(m)].step()
            optimisers[id(m)].zero_grad(set_to_none=True)
        return max(norms)

    def bad(values: Tensor, r: int) -> list[int]:
        """The samples of round r whose value [micro] is not finite."""
        return [
            (r * world + rank) * micro + m
            for m in (~values.isfinite()).nonzero().flatten().tolist()
        ]

    def student_step(step: int) -> dict[str, float]:
        size, moved, lost = [0.0, 0.0], [0.0, 0.0], []
        for r in range(rounds):
            for d in range(2):
                prompt, noise, renoise, u, score_noise, exits = draw(step, 5, r, d)
                x = roll(d, prompt, noise, renoise, exits)
                with inference():
                    gradient = dmd_gradient(
                        teacher,
                        critics[d % len(critics)],
                        x.detach(),
                        u,
                        score_noise,
                        prompt,
                        negative,
                        config.guidance,
                        config.shift,
                    )
                (dmd_loss(x, gradient).mean() / rounds).backward()
                sizes = gradient.abs().flatten(1).mean(1)
                size[d] += sizes.mean().item() / rounds
                moved[d] += x.detach().diff(dim=1).abs().mean().item() / rounds
                lost += bad(sizes, r)
        named = dict(zip(("dmd_forward", "dmd_backward"), size))
        size = finite_means(named, lost, f"step {step}: the DMD gradient", device)
        norm = update(students, step, "student")
        for average, m in zip(averages.values(), students):
            average.decay = config.ema if step >= config.ema_start else 0.0
            average.update(m)
        return {
            **size,
            "norm_student": norm,
            "motion_forward": moved[0],
            "motion_backward": moved[1],
        }

    def critic_step(step: int) -> dict[str, float]:
        losses, lost = [0.0, 0.0], []
        for r in range(rounds):
            for d in range(2):
                prompt, noise, renoise, u, score_noise, exits = draw(step, 6, r, d)
                with inference():
                    x = roll(d, prompt, noise, renoise, exits)
                loss = (
                    critic_loss(critics[d % len(critics)], x, u, score_noise, prompt, config.shift)
                    / rounds
                )
                loss.mean().backward()
                losses[d] += loss.mean().item()
                lost += bad(loss, r)
        named = dict(zip(("critic_forward", "critic_backward"), losses))
        return finite_means(named, lost, f"step {step}: the critic's loss", device) | {
            "norm_critic": update(critics, step, "critic"),
        }

    def sheet(step: int) -> None:
        """Fixed prompts and noise, all denoising steps: two clips forward, the same two backward."""
        gs = [generator(config.seed, 8, i) for i in range(2)]
        noise = torch.stack(
            [torch.randn(most, rows, c.in_dim, h, w, generator=g) for g in gs], 1
        ).to(device)
        with inference():
            z = torch.cat(
                [
                    roll(d, source(range(2)).to(device), noise[0], noise[1:], (None, None))
                    for d in range(2)
                ]
            )
            if rank == 0:
                vae = load_vae(config.vae, device=device)
                write_sheet(
                    out / f"sheet-{step:05d}.png",
                    torch.cat([vae.decode(x[None]) for x in z]),
                    columns=11,
                )

    with computing(
        dtype if config.parallel == "ddp" else torch.float32, device
    ):  # FSDP2 casts by itself
        for step, row in training_steps(config, "stage 2", trained, device, averages):
            if step % config.ratio == 0:
                row |= student_step(step)
            row |= critic_step(step)
            last = step + 1 == config.steps
            if config.sheet_every and (step % config.sheet_every == 0 or last):
                sheet(step + last)
    for i, (m, average) in enumerate(zip(students, averages.values())):
        average.copy_to(m)
        weights, name = (
            whole_state(m),
            "student" if config.shared_student else ("forward", "backward")[i],
        )
        if rank == 0:
            write_safetensors(out / f"{name}.safetensors", weights, asdict(m.config))
            print(f"wrote {out / name}.safetensors, the average of the student's weights")


if __name__ == "__main__":
    run(main, Config)
