"""What does distribution matching see of a student's jumps? Its teacher and critic are asked.

A student's clips jump from block to block more than the teacher's (FR, evaluate.py). Stage 2 sets
the teacher's score against the critic's, so it can only mend what these two tell apart:

- *Who makes jumps:* clips of the student, and clips that teacher and critic make as diffusion
  models, 48 steps, no guidance. A critic that knows the student jumps like it.
- *At which level:* the student's clips noised to sigma, and denoised by the teacher. What is left
  of the jump was not decided below that level.
- *Which way the gradient points:* the student's clips moved by a tenth of their size against the
  DMD gradient, its mean over some noises, from levels in a band of sigma.

Beside FR, how much the picture changes in the first, second ... latent of a block, over the clip's
mean. With --fit the critic is not the run's: it begins as the teacher and learns from nothing but
the student's forward clips; with --places it is told where in its block each latent stands.

    torchrun --nproc_per_node=1 train_dmd.py --sheet_every 0
    python -m toy.critic --run out/dmd
    python -m toy.critic --run out/dmd --fit 3000 --places true
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import anchors
import sampler
from anchors import HORIZON, Plan
from dit import DiT, load_dit
from evaluate import BATCH, Maker, decoded, measure
from generate import frame_size
from lib import report, text
from lib.changes import frame_changes
from lib.common import Stream, UserError, check_out, generator, read_pickle, run, start
from lib.noise import noise_seeded
from lib.statistics import Stat, Values, stat
from lib.world import numbers_of
from sampler import ode_sigmas
from toy import world
from train_dmd import Score, critic_loss, dmd_gradient, scores
from vae import load_vae

LEVELS = (0.1, 0.25, 0.5, 0.7, 0.85, 0.95)  # sigmas from which the teacher denoises
BANDS = ((0.02, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.98))  # of the gradient's sigmas
ROWS = 3 + len(LEVELS) + len(BANDS)
FITTED, BATCHED = 2048, 8  # clips that a critic of --fit learns from, and how many in an update
LR, LR_PLACES = 2e-4, 2e-3  # of that critic, and of what tells it places [ours]
STEP = 0.1  # against the gradient, in root mean squares of the latents


@dataclass
class Config:
    """Ask a run's teacher and critic about its student's jumps."""

    RANGES = {"clips": (2, 10**6), "draws": (1, 10**4), "fit": (0, 10**6)}
    run: str = "out/dmd"  # folder of a finished train_dmd.py: student.safetensors and state.pt
    teacher: str = "toy/weights/teacher.safetensors"
    vae: str = "toy/weights/vae.safetensors"
    clips: int = 64  # held-out captions
    draws: int = 8  # noises that a gradient is the mean of
    fit: int = 0  # ask a critic after so many updates on forward clips alone; 0: the run's
    places: bool = False  # of --fit: a learned vector for each place in a block, zero at first
    seed: int = 0  # of captions, clips and noise
    out: str = ""  # also write the table as .json
    device: str = "auto"


def critic_of(folder: Path, teacher: DiT) -> DiT:
    """The critic in a run's state, a network like the teacher. raises: UserError"""
    state = read_pickle(folder / "state.pt")
    critic = DiT(teacher.config).to(teacher.patch_embedding.weight.device)
    try:
        critic.load_state_dict(state["critic0"])
    except (KeyError, TypeError, RuntimeError):
        what = "no critic like --teacher in it; give --run a folder that train_dmd.py wrote"
        raise UserError(f"{folder / 'state.pt'} has {what}") from None
    return critic.eval().requires_grad_(False)


def tell_places(critic: DiT, block: int) -> nn.Parameter:
    """The critic adds a vector to each latent from now on, by its place in a block; zero yet."""
    dim, device = critic.config.dim, critic.patch_embedding.weight.device
    critic.places = nn.Parameter(torch.zeros(block, dim, device=device))

    def add(module: nn.Module, args: tuple, x: Tensor) -> Tensor:  # (B, E, T, rows, columns)
        at = critic.places[torch.arange(x.shape[2], device=device) % block]  # (T, E)
        return x + at.T[:, :, None, None]

    critic.patch_embedding.register_forward_hook(add)
    return critic.places


def fitted(config: Config, dit: DiT, plan: Plan, size: tuple[int, int]) -> DiT:
    """A critic that has learned from the student's clips, latents of this size, and no others."""
    c, device = dit.config, dit.patch_embedding.weight.device
    captions = [world.caption(n) for n in numbers_of(FITTED, config.seed, known=True)]
    prompts = text.embed(captions, c.text_dim, c.text_len).to(device)
    clips = []
    for a in tqdm(range(0, FITTED, BATCH), desc="clips"):
        asked = config.clips  # their noise comes first
        seeds = [(config.seed, asked + n, 0) for n in range(a, a + BATCH)]
        noise = noise_seeded(seeds, (c.in_dim, *size), device)
        clips.append(sampler.generate(dit, plan, [prompts[a : a + BATCH]], noise))
    clips = torch.cat(clips)  # (FITTED, T, C, h, w)
    critic = load_dit(config.teacher, torch.float32, device).requires_grad_(True).train()
    groups = [{"params": list(critic.parameters())}]
    if config.places:
        own = len(plan.steps[0].targets)
        groups.append({"params": [tell_places(critic, own)], "lr": LR_PLACES})
    optimiser = torch.optim.AdamW(groups, lr=LR, betas=(0.0, 0.999))
    for step in tqdm(range(config.fit), desc="critic"):
        g = generator(config.seed, Stream.CRITIC, step)
        n = torch.randint(FITTED, (BATCHED,), generator=g)
        u = torch.rand(BATCHED, generator=g).to(device)
        noise = torch.randn(BATCHED, *clips.shape[1:], generator=g).to(device)
        at = Score(u, noise, prompts[n], prompts[:0], guidance=1.0, shift=1.0)
        with torch.enable_grad():
            critic_loss(critic, clips[n], at).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return critic.eval().requires_grad_(False)


def jumps(video: Tensor, plan: Plan) -> Values:
    """FR between blocks of video [B, 3, F, H, W], and the change in each latent of a block."""
    own = len(plan.steps[-1].targets)
    change = frame_changes(video)  # (B, F-1): four a latent, the first is of latent 1
    by_latent = change.unflatten(1, (-1, 4)).mean(2)[:, own - 1 :]  # (B, T - own)
    by_latent = by_latent.unflatten(1, (-1, own)).mean(1)  # (B, own)
    by_latent = by_latent / change.mean(1, keepdim=True)
    found = {"FR inter": measure(video, plan)["FR inter"][..., 0].nanmean(1)}  # (B)
    return found | {f"change in latent {i + 1}": x for i, x in enumerate(by_latent.unbind(1))}


def denoised(teacher: DiT, z: Tensor, prompt: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """z [B, T, C, h, w] noised to sigma and taken down again by the teacher's ODE."""
    x, pos = (1 - sigma) * z + sigma * noise, torch.arange(z.shape[1], device=z.device)
    levels = [sigma] + [level for level in ode_sigmas() if level < sigma]
    for level, below in zip(levels, levels[1:]):
        t = torch.full(z.shape[:2], 1000 * level, device=z.device)
        x = x + (below - level) * teacher(x, t, prompt, pos)
    return x


def moved(z: Tensor, gradient: Tensor) -> Tensor:
    """z [B, T, C, h, w] after a step against the gradient, of one length for every clip."""
    size = gradient.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
    return z - STEP * z.square().mean().sqrt() * gradient / size.clamp_min(1e-12)


def mean_gradient(
    teacher: DiT, critic: DiT, z: Tensor, prompt: Tensor, band: tuple[float, float], config: Config
) -> Tensor:
    """The DMD gradient in z [B, T, C, h, w], over some noises, at levels of a band of sigma."""
    total, (low, high), nothing = torch.zeros_like(z), band, torch.zeros_like(prompt[:1])
    for n in range(config.draws):
        g = generator(config.seed, Stream.SHEET, n)
        u = (low + (high - low) * torch.rand(len(z), generator=g)).to(z.device)
        noise = torch.randn(z.shape, generator=g).to(z.device)
        at = Score(u, noise, prompt, nothing, guidance=1.0, shift=1.0)
        total += dmd_gradient(z, *scores(teacher, critic, z, at))
    return total / config.draws


@torch.no_grad()
def table(config: Config, device: torch.device) -> Iterator[tuple[str, dict[str, Stat]]]:
    """The rows, as they are finished."""
    folder, plan = Path(config.run), anchors.forward(HORIZON)
    dit = load_dit(folder / "student.safetensors", torch.float32, device)
    teacher = load_dit(config.teacher, torch.float32, device)
    vae = load_vae(config.vae, torch.float32, device)
    student = Maker(dit, vae, frame_size((), dit, vae), config.seed)
    size = tuple(side // vae.config.space for side in student.size)
    critic = fitted(config, dit, plan, size) if config.fit else critic_of(folder, teacher)
    captions = [world.caption(number) for number in numbers_of(config.clips, config.seed)]
    prompt = text.embed(captions, dit.config.text_dim, dit.config.text_len).to(device)

    def made(maker: Maker, by: Plan) -> tuple[Tensor, Values]:
        firsts = range(0, len(captions), BATCH)
        parts = [maker.make(by, captions[a : a + BATCH], a) for a in firsts]
        return torch.cat([z for z, _ in parts]), jumps(torch.cat([v for _, v in parts]), plan)

    z, before = made(student, plan)

    def row(found: Values) -> dict[str, Stat]:
        found["FR inter, change"] = found["FR inter"] - before["FR inter"]
        return {name: stat(x) for name, x in found.items()}

    yield "student", {name: stat(x) for name, x in before.items()}
    for name, network in (("teacher", teacher), ("critic", critic)):
        maker = replace(student, dit=network, guidance=1.0)
        yield name, row(made(maker, anchors.forward(HORIZON, HORIZON))[1])
    noise = torch.randn(z.shape, generator=generator(config.seed, Stream.SHEET)).to(device)
    for sigma in LEVELS:
        again = denoised(teacher, z, prompt, noise, sigma)
        yield f"student, denoised from {sigma:g}", row(jumps(decoded(vae, again), plan))
    for low, high in BANDS:
        gradient = mean_gradient(teacher, critic, z, prompt, (low, high), config)
        after = jumps(decoded(vae, moved(z, gradient)), plan)
        yield f"student, against the gradient at {low:g} to {high:g}", row(after)


def main(config: Config) -> None:
    device = start(config.device)[2]
    if config.places and not config.fit:
        raise UserError("--places true is for a critic of --fit; say for how many updates")
    if config.out:
        check_out(config.out)
    rows = table(config, device)
    first = next(rows)  # what cannot be read is named before the bar begins
    found = dict([first, *tqdm(rows, total=ROWS - 1, unit="row")])
    report.show(found, config.out)


if __name__ == "__main__":
    run(main, Config)
