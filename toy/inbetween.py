"""The paper's Table 4: the first 9 and last 12 frames of true clips are given; what lies between?

Four ways to fill the 60 frames: the true clip through the VAE, linear blending, the bidirectional
teacher with its ends held, and the student by `anchors.inbetween`. Head and tail say how much of
the given frames is kept, the jumps how the two seams show (lib/changes.py:seam); caption and motion
are of what lies between.

    python -m toy.inbetween --clips 32
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import anchors
from dit import DiT, load_dit
from evaluate import Maker, decoded, encoded, features, measure, measure_words, summary
from generate import load_models
from lib import report
from lib.changes import seam, temporal_flickering
from lib.common import run, start
from lib.noise import noise_seeded
from lib.statistics import Stat
from lib.text import embed
from lib.world import OTHER, numbers_of
from sampler import cfg_velocity, ode_sigmas
from toy import world

HEAD, TAIL = 9, 69  # frames before HEAD and from TAIL on are given
PLAN = anchors.inbetween(given=True)


@dataclass
class Config:
    """Fill the middle of true clips in four ways (paper Table 4)."""

    RANGES = {"clips": (2, 10**6)}  # a standard error needs two
    weights: str = "toy/weights"  # a folder with student, VAE and teacher
    teacher: str = ""  # default: teacher.safetensors in the folder
    guidance: float = 3.0  # of the teacher
    clips: int = 32  # held-out captions
    seed: int = 0  # of captions, clips and noise
    out: str = ""  # also write the table as .json
    device: str = "auto"


def end_flickering(video: Tensor, true: Tensor) -> dict[str, Tensor]:
    """1 - mean |difference| (of 0..1) of given frames from the true ones: [B] (paper A.2).

    video, true: [B, 3, F, H, W]"""
    error = (video - true).abs().mean((1, 3, 4)) / 2  # (B, F)
    return {"head": 1 - error[:, :HEAD].mean(1), "tail": 1 - error[:, TAIL:].mean(1)}


def blended(true: Tensor) -> Tensor:
    """Linear blending of the last frame of the head into the first of the tail: [B, 3, F, H, W]."""
    before, after = true[:, :, HEAD - 1 : HEAD], true[:, :, TAIL : TAIL + 1]
    share = torch.linspace(0, 1, TAIL - HEAD + 2)[1:-1].view(1, 1, -1, 1, 1)
    video = true.clone()
    video[:, :, HEAD:TAIL] = (1 - share) * before + share * after
    return video


@torch.no_grad()
def fill_in(
    teacher: DiT, prompts: Tensor, z: Tensor, known: list[int], noise: Tensor, guidance: float
) -> Tensor:
    """The bidirectional teacher between given latents z[:, known], in 48 steps: [B, T, C, h, w].

    Before each step the known ones are set to themselves with noise of that step's level."""
    x, pos = noise.clone(), torch.arange(z.shape[1], device=z.device)
    cond_uncond = torch.cat([prompts, torch.zeros_like(prompts)])  # (2B, L, text_dim)
    sigmas = ode_sigmas()
    for sigma, below in zip(sigmas[:-1], sigmas[1:]):
        x[:, known] = (1 - sigma) * z[:, known] + sigma * noise[:, known]
        t = torch.full(x.shape[:2], 1000 * sigma, device=x.device)
        v = cfg_velocity(teacher, x, t, cond_uncond, pos, guidance)
        x = x + (below - sigma) * v
    x[:, known] = z[:, known]
    return x


@torch.no_grad()
def videos_of(
    config: Config, student: Maker, teacher: DiT, true: Tensor, z: Tensor, captions: list[str]
) -> dict[str, Tensor]:
    """The four ways, pixels [B, 3, F, H, W] each, of true clips and their latents z."""
    vae, c = student.vae, student.dit.config
    prompts = embed(captions, c.text_dim, c.text_len).to(z.device)
    known = [i for step in PLAN.steps for i in step.given]
    seeds = [(config.seed, n, 0) for n in range(len(captions))]
    start_noise = noise_seeded(seeds, z.shape[2:], z.device)(0, tuple(range(PLAN.length)))
    filled = fill_in(teacher, prompts, z, known, start_noise, config.guidance)
    return {
        "true clip, through the VAE": decoded(vae, z),
        "linear blending of frames 8 and 69": blended(true),
        "teacher, 48 steps, ends held": decoded(vae, filled),
        "student": student.make(PLAN, captions, given={i: z[:, i] for i in known})[1],
    }


@torch.no_grad()
def table(config: Config, device: torch.device) -> dict[str, dict[str, Stat]]:
    """The rows, and a last one with the Fréchet distance of other true clips, its floor."""
    dit, vae = load_models(config.weights, torch.float32, device)
    path = config.teacher or f"{config.weights}/teacher.safetensors"
    teacher = load_dit(path, torch.float32, device)
    numbers = numbers_of(config.clips, config.seed)
    captions = [world.caption(number) for number in numbers]
    true = world.render(captions, numbers)
    z = encoded(vae, true)
    shown = {"features": features(z).cpu()}
    student = Maker(dit, vae, (32, 32), config.seed)
    rows = {}
    for name, video in videos_of(config, student, teacher, true, z, captions).items():
        found = {"caption": measure_words(world, video, PLAN, captions)["caption"]}
        found["motion"] = measure(video, PLAN)["motion"]
        for frame in (HEAD, TAIL):
            change = seam(video, frame)
            found |= {f"{name} at {frame}": change[name] for name in ("jump", "jump max")}
        found["flicker (VBench)"] = temporal_flickering(video)
        found["features"] = features(encoded(vae, video)).cpu()
        rows[name] = summary(end_flickering(video, true) | found, shown)
    others = world.render(captions, [number + OTHER for number in numbers])
    rows["other true clips"] = summary({"features": features(encoded(vae, others)).cpu()}, shown)
    return rows


def main(config: Config) -> None:
    report.show(table(config, start(config.device)[2]), config.out)


if __name__ == "__main__":
    run(main, Config)
