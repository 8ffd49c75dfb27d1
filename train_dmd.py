"""Stage 2: the student learns from its own rollouts by distribution matching (DMD).

Three networks of one class: the *student* G generates block by block with its cache; the frozen
*teacher* f_real and the trained *critic* f_fake score whole videos, seeing everything. An iteration
draws an entry of the mix of plans (the paper's: forward, backward with anchors):

    every 5th:  for each plan:
                    x  = rollout of G, stopped at a random level, gradient only there       (Fig. 9)
                    xt = (1 - sigma) x + sigma noise
                    x_real = x0 by f_real(xt) with guidance,   x_fake = x0 by f_fake(xt)
                    gradient of G's loss in x:  (x_fake - x_real) / mean |x - x_real|        (Eq. 2)
    always:     for each plan:
                    x  = rollout of G, without gradient
                    f_fake learns to denoise it:  |f_fake(xt) - (noise - x)|^2               (Eq. 3)

x holds the targets only; anchors are never in a loss, they learn through the targets that see them.
The plans run one after the other and their gradients add up. Exit levels depend on (seed,
iteration, plan), so all processes agree without talking. Every random number is a function of such
numbers: 2 processes equal 1, and a run goes on exactly: run the same command again.
Guidance is uncond + w (cond - uncond); the "3.0" of public DMD code is w = 4.

    torchrun --nproc_per_node=1 train_dmd.py
    torchrun --nnodes=8 --nproc_per_node=8 train_dmd.py --preset wan
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import sampler
from anchors import Plan
from dit import DiT, load_dit
from lib import presets
from lib.clips import Clips
from lib.common import Stream, dtype_of, generator, is_first, run, start
from lib.media import write_sheet
from lib.noise import noise_from
from lib.recipe import remember, trained_as
from lib.states import EMA, write_network
from lib.text import Prompts
from lib.training import (
    Training,
    apply_gradients,
    computing,
    finite_means,
    inference,
    prepare,
    split_batch,
    training_steps,
)
from plans import Mix, draw_entry, mix_of, possible, rows_of, without_given
from sampler import cfg_velocity, shift_sigma
from vae import load_vae


@dataclass
class Config(Training):
    """Stage 2: distribution matching on the student's own rollouts, in every order."""

    PRESETS = presets.DMD
    RANGES = {
        "first_denoising": (1e-3, 1000),
        "ratio": (1, 10**6),
        "lr_critic": (0, 1),
        "ema_start": (0, 10**9),
        "sheet_every": (0, 10**9),
    }
    FREE = ("lr", "lr_critic", "weight_decay", "clip", "guidance", "ema")  # when a run goes on
    preset: str = "toy"  # toy, toy64, wan (the paper's), wan-any ... (lib/presets.py)
    student: str = "toy/weights/ode.safetensors"  # what the student starts from: stage 1
    teacher: str = "toy/weights/teacher.safetensors"  # the frozen real score
    critic: str = "toy/weights/teacher.safetensors"  # what the fake score starts from
    vae: str = "toy/weights/vae.safetensors"  # for the sample sheets
    prompts: str = "toy"  # toy: captions without end; or what lib/text.py wrote; or a text file
    clips: str = ""  # folder of real clips' latents (tools/encode.py), for plans around given clips
    out: str = "out/dmd"  # folder of student.safetensors, log.jsonl, curves.png, sheets, state.pt
    steps: int = 500  # iterations: critic updates [paper: 600]
    ratio: int = 5  # critic updates a student update [paper]
    batch: int = 8  # samples an update and plan, over all processes [paper: 64]
    lr: float = 5e-5  # of the student, AdamW [paper: 2e-6]
    lr_critic: float = 2e-4  # of the critic [paper: 4e-7]
    betas: tuple[float, ...] = (0.0, 0.999)  # [paper]
    shift: float = 1.0  # of all levels: little noise hides a small picture [ours; paper: 5]
    ema: float = 0.95  # of the student [paper: 0.99]
    ema_start: int = 100  # iteration from which it averages [paper: 200]
    guidance: float = 1.5  # of the real score, conventional w [ours; paper's code: 4]
    negative: str = ""  # prompt of the real score's unconditional pass
    denoising: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)  # noise levels, unshifted [paper]
    first_denoising: tuple[float, ...] = ()  # of the block made first, if others [Causal Forcing++]
    commit_anchors: bool = False  # let anchors be seen while their block is written to the cache
    shared_student: bool = True  # false: one student a direction (ablation, Table 2)
    shared_critic: bool = True  # false: one critic a direction (ablation, Table 2)
    save_every: int = 50  # iterations between resume states; 0: one at the end
    sheet_every: int = 100  # iterations between sample sheets; 0: none


# ---------------------------------------------------------------- losses
def noised(x: Tensor, u: Tensor, noise: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, sigma [B, 1, 1, 1, 1] and t [B, T] for levels u [B] in [0, 1].

    They are shifted and kept in 0.02 .. 0.98 [Self-Forcing]."""
    sigma = shift_sigma(u, shift).clamp(0.02, 0.98).view(-1, 1, 1, 1, 1)
    xt = (1 - sigma) * x + sigma * noise
    return xt, sigma, (1000 * sigma).view(-1, 1).expand(x.shape[:2])


class Score(NamedTuple):
    """What a score is asked with: levels u [B], noise like x, and the prompts [B, L, text_dim]."""

    u: Tensor
    noise: Tensor
    prompt: Tensor
    negative: Tensor
    guidance: float
    shift: float


@torch.no_grad()
def scores(teacher: DiT, critic: DiT, x: Tensor, at: Score) -> tuple[Tensor, Tensor]:
    """x_real, x_fake: what teacher and critic take x [B, T, C, h, w], noised, to have been."""
    noise = at.noise[:, : x.shape[1]]  # a method may hand out a part of the video
    xt, sigma, t = noised(x, at.u, noise, at.shift)
    pos = torch.arange(x.shape[1], device=x.device)
    cond_uncond = torch.cat([at.prompt, at.negative.expand_as(at.prompt)])
    x_real = xt - sigma * cfg_velocity(teacher, xt, t, cond_uncond, pos, at.guidance)
    x_fake = xt - sigma * critic(xt, t, at.prompt, pos)
    return x_real, x_fake


def dmd_gradient(x: Tensor, x_real: Tensor, x_fake: Tensor) -> Tensor:
    """The direction in which x [B, T, C, h, w] is less like the teacher's videos (Eq. 2).

    Another way to match distributions is another function of these three."""
    return (x_fake - x_real) / (x - x_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)


def dmd_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss [B] whose gradient in x, per sample, is `gradient` over its number of elements."""
    return 0.5 * (x - (x - gradient).detach()).square().flatten(1).mean(1)


def critic_loss(critic: DiT, x: Tensor, at: Score) -> Tensor:
    """Flow matching on the student's videos (Eq. 3, in velocity): [B]."""
    noise = at.noise[:, : x.shape[1]]
    xt, _, t = noised(x, at.u, noise, at.shift)
    v = critic(xt, t, at.prompt, torch.arange(x.shape[1], device=x.device))
    return (v - (noise - x)).square().flatten(1).mean(1)


# ---------------------------------------------------------------- what an iteration draws
Generate = Callable[..., Tensor]  # as `sampler.generate`
GradientOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # as `dmd_gradient`


class World(NamedTuple):
    """What does not change in a run."""

    config: Config
    mix: Mix
    source: Prompts
    negative: Tensor
    clips: Clips | None
    channels: int
    rounds: list[list[int]]  # this process's samples, a list a rollout
    device: torch.device
    generate: Generate = sampler.generate
    gradient_of: GradientOf = dmd_gradient

    def levels(self) -> tuple[int, int]:
        """How many levels the first block has, and the others."""
        others = self.config.denoising
        return len(self.config.first_denoising or others), len(others)


class Draw(NamedTuple):
    """This process's share of one rollout and its score."""

    noise: Tensor  # [levels, B, rows, C, h, w]: rows of latents, dummies, and anchors
    exits: tuple[int | None, int | None]  # the levels that end the first block and the others
    given: dict[int, Tensor]  # latent -> [B, C, h, w], of real clips
    score: Score


def draw_round(
    world: World, role: Stream, step: int, samples: list[int], plan: Plan, d: int
) -> Draw:
    """What plan d gets in a round: all is a function of (seed, role, iteration, sample, d)."""
    config, levels = world.config, world.levels()
    grid = (world.channels, *config.latent[1:])
    numbers, noise, u, score_noise = [], [], [], []
    for j in samples:
        g = generator(config.seed, role, step, j, d)
        limit = len(world.clips) if plan.given else 1 << 30
        numbers.append(int(torch.randint(limit, (1,), generator=g)))
        noise.append(torch.randn(max(levels), rows_of([plan]), *grid, generator=g))
        u.append(torch.rand(1, generator=g))
        score_noise.append(torch.randn(plan.length, *grid, generator=g))
    g = generator(config.seed, role, step, d, 1 << 31)  # alike on all processes
    first, others = (int(torch.randint(n, (1,), generator=g)) for n in levels)
    score = Score(
        torch.cat(u).to(world.device),
        torch.stack(score_noise).to(world.device),
        world.source(numbers).to(world.device),
        world.negative,
        config.guidance,
        config.shift,
    )
    exits = (first if config.first_denoising else others, others)
    noise = torch.stack(noise, dim=1).to(world.device)
    return Draw(noise, exits, real_latents(world, plan, numbers), score)


def real_latents(world: World, plan: Plan, numbers: list[int]) -> dict[int, Tensor]:
    """What a plan is given, latent -> [B, C, h, w], of the real clips with these numbers."""
    if not plan.given:
        return {}
    clips = torch.stack([world.clips[n] for n in numbers]).to(world.device)  # (B, T, C, h, w)
    return {i: clips[:, i] for i in plan.given}


def rollout_inputs(world: World, student: DiT, plan: Plan, drawn: Draw) -> dict[str, object]:
    """What `sampler.generate` takes, so that each block stops at its exit level (Fig. 9)."""
    config = world.config
    fsdp = config.parallel == "fsdp"
    prompt = drawn.score.prompt
    text = prompt if fsdp else student.text_kv(prompt)  # FSDP gathers weights in forward alone
    return {
        "texts": [text] * plan.prompts(),
        "noise": noise_from(drawn.noise[0], drawn.noise[1:], plan.length),
        "recipe": trained_as(config),
        "given": drawn.given,
        "exit_at": lambda n: drawn.exits[min(n, 1)],
        "commit_anchors": config.commit_anchors,
        "dtype": dtype_of(config.dtype) if fsdp else None,
    }


# ---------------------------------------------------------------- an iteration
class Trained(NamedTuple):
    """Networks with their optimisers: one, or one a direction (plan d uses d mod their number)."""

    networks: list[DiT]
    optimisers: list[torch.optim.Optimizer]

    def of(self, d: int) -> DiT:
        return self.networks[d % len(self.networks)]

    def named(self, name: str) -> dict[str, tuple[DiT, torch.optim.Optimizer]]:
        return {f"{name}{i}": pair for i, pair in enumerate(zip(*self))}


def student_step(
    world: World, step: int, entry: int, students: Trained, critics: Trained, teacher: DiT
) -> dict[str, float]:
    """Accumulate the DMD gradient of every plan and update the student; rows for the log."""
    sizes, motion = defaultdict(list), defaultdict(float)
    for d, plan in enumerate(world.mix[entry][1]):
        student = students.of(d)
        for samples in world.rounds:
            drawn = draw_round(world, Stream.STUDENT, step, samples, plan, d)
            x = world.generate(student, plan, **rollout_inputs(world, student, plan, drawn))
            with inference():
                x_real, x_fake = scores(teacher, critics.of(d), x.detach(), drawn.score)
                gradient = world.gradient_of(x.detach(), x_real, x_fake)
            (dmd_loss(x, gradient).mean() / len(world.rounds)).backward()
            sizes[f"dmd_{plan.name}"].append(gradient.abs().flatten(1).mean(1))  # (B,)
            change = x.detach().diff(dim=1).abs().mean() if plan.length > 1 else x.new_zeros(())
            motion[f"motion_{plan.name}"] += change.item() / len(world.rounds)
    means = finite_means(sizes, world.rounds, f"step {step}: the DMD gradient", world.device)
    norm = update(world.config, students, f"step {step}, student")
    return means | motion | {"norm_student": norm}


def critic_step(
    world: World, step: int, entry: int, students: Trained, critics: Trained
) -> dict[str, float]:
    """Accumulate the critic's loss on fresh rollouts of every plan and update it."""
    losses = defaultdict(list)
    for d, plan in enumerate(world.mix[entry][1]):
        student = students.of(d)
        for samples in world.rounds:
            drawn = draw_round(world, Stream.CRITIC, step, samples, plan, d)
            with inference():
                x = world.generate(student, plan, **rollout_inputs(world, student, plan, drawn))
            loss = critic_loss(critics.of(d), x, drawn.score)  # (B,)
            (loss.mean() / len(world.rounds)).backward()
            losses[f"critic_{plan.name}"].append(loss.detach())
    means = finite_means(losses, world.rounds, f"step {step}: the critic's loss", world.device)
    return means | {"norm_critic": update(world.config, critics, f"step {step}, critic")}


def update(config: Config, trained: Trained, where: str) -> float:
    """One step of the optimisers; the largest gradient norm."""
    norms = []
    for model, optimiser in zip(*trained):
        if all(p.grad is None for p in model.parameters()):
            continue  # an entry of one plan leaves the other direction's network alone
        norms.append(apply_gradients(model, [optimiser], config, where))
    return max(norms)


def sheet(world: World, students: Trained, step: int) -> None:
    """Fixed prompts and noise, all levels: two clips by each plan of one entry of the mix, the
    first that is given nothing, if there is one."""
    config, drawn = world.config, []
    prompt = world.source(range(2)).to(world.device)
    score = Score(None, None, prompt, world.negative, config.guidance, config.shift)
    for d, plan in enumerate((without_given(world.mix) or world.mix)[0][1]):
        shape = (max(world.levels()), rows_of([plan]), world.channels, *config.latent[1:])
        gs = [generator(config.seed, Stream.SHEET, i) for i in range(2)]
        noise = torch.stack([torch.randn(shape, generator=g) for g in gs], dim=1)
        given = real_latents(world, plan, [0, 1])
        whole = Draw(noise.to(world.device), (None, None), given, score)
        student = students.of(d)
        inputs = rollout_inputs(world, student, plan, whole)
        drawn.append(world.generate(student, plan, **inputs))
    if is_first():
        vae = load_vae(config.vae, device=world.device)
        videos = torch.cat([vae.decode(z[None]) for z in torch.cat(drawn)])
        write_sheet(Path(config.out) / f"sheet-{step:05d}.png", videos, columns=11)


# ---------------------------------------------------------------- a run
def trained(config: Config, path: str, shared: bool, lr: float, device: torch.device) -> Trained:
    """One network for both directions, or one for each, with optimisers."""
    models = [prepare(load_dit(path, device=device), config, True) for _ in range(2 - shared)]
    how = {"lr": lr, "betas": config.betas, "weight_decay": config.weight_decay}
    return Trained(models, [torch.optim.AdamW(m.parameters(), **how) for m in models])


def write_students(config: Config, students: Trained, averages: dict[str, EMA]) -> None:
    """The averages of the students' weights; how they were trained is in `recipe`."""
    names = ["student"] if config.shared_student else ["forward", "backward"]
    for name, student, average in zip(names, students.networks, averages.values()):
        average.copy_to(student)
        write_network(Path(config.out) / f"{name}.safetensors", student)


def main(
    config: Config,
    generate: Generate = sampler.generate,
    mix: Mix | None = None,
    gradient_of: GradientOf | None = None,
) -> None:
    """generate, mix, gradient_of: another method's rollout, plans and loss in the place of ours."""
    rank, processes, device = start(config.device)
    dtype, recipe = dtype_of(config.dtype), trained_as(config)
    mix = possible(config, mix_of(config, mix))
    rounds = split_batch(config.batch, config.micro, rank, processes)
    if config.sheet_every:
        load_vae(config.vae)  # a file that cannot be read is named now, not after a step
    teacher = prepare(load_dit(config.teacher, dtype, device), config, trained=False)
    students = trained(config, config.student, config.shared_student, config.lr, device)
    critics = trained(config, config.critic, config.shared_critic, config.lr_critic, device)
    averages = {f"ema{i}": EMA(m, config.ema) for i, m in enumerate(students.networks)}
    remember(students.networks, recipe)
    c = teacher.config
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    negative = source.embed([config.negative]).to(device)
    clips = Clips(config.clips, config.latent, c.in_dim, source) if config.clips else None
    methods = (generate, gradient_of or dmd_gradient)
    world = World(config, mix, source, negative, clips, c.in_dim, rounds, device, *methods)
    states = students.named("student") | critics.named("critic")
    with computing(dtype if config.parallel == "ddp" else torch.float32, device):  # FSDP2 casts
        for step, row in training_steps(config, "stage 2", states, device, averages):
            entry = draw_entry(config, mix, step)
            row["latents"] = mix[entry][1][0].length
            if step % config.ratio == 0:
                row |= student_step(world, step, entry, students, critics, teacher)
                for average, student in zip(averages.values(), students.networks):
                    average.decay = config.ema if step >= config.ema_start else 0.0
                    average.update(student)
            row |= critic_step(world, step, entry, students, critics)
            last = step + 1 == config.steps
            if config.sheet_every and (step % config.sheet_every == 0 or last):
                with inference():
                    sheet(world, students, step + last)
    write_students(config, students, averages)


if __name__ == "__main__":
    run(main, Config)
