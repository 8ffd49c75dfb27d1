"""Is it true? What is measured on videos, and the plan that says where to look.

Flickering ratio (paper Eq. 4): how much the picture changes where one latent's frames end and the next one's begin, over
the change just before, inside the latent. Latent i decodes to frames 4i-3 .. 4i, so for the boundary between i and i+1

    FR_i = |x[4i+1] - x[4i]| / |x[4i] - x[4i-1]|           about 1 in natural video; 1.4 is a visible flash

The plan says which boundaries lie between two steps (*inter*-block) and which inside one (*intra*). Print motion beside
it: a blurred, slow video has a beautiful FR.

Latent round trip (ours, not the paper's): decode, encode again; the squared change of the first latent of each block over
that of the others. A latent that does not fit its past does not come back. About 1 for real latents and the teacher's.

    python evaluate.py --clips 32                  # the student in toy/weights: caption accuracy, motion, FR, round trip
    python evaluate.py --video clip.mp4 --order backward
    python evaluate.py --clips 8 --report out/report   # the same and more, as a page to look at
"""
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
import report
import text
from anchors import Plan
from common import UserError, atomic, dtype_of, run, start
from dit import DiT, load_dit
from media import VideoWriter, read_frames, write_sheet
from sampler import generate, load_models, noise_seeded
from text import Prompts
from toy import world
from train_ode import trajectory
from vae import VAE

STATIC = 2e-3  # a frame that changes by less than this, a quarter of a grey level of 255, has no ratio [ours]


# ---------------------------------------------------------------- measures
def frame_changes(video: Tensor) -> Tensor:
    """Mean |x[f+1] - x[f]| of video [B, 3, F, H, W] in [-1, 1]: float32 [B, F-1], a frame at a time to save memory."""
    frames = video.unbind(2)
    return torch.stack([(b.float() - a.float()).abs().mean((1, 2, 3)) for a, b in zip(frames, frames[1:])], dim=1)


def flickering_ratio(video: Tensor, time: int = 4) -> Tensor:
    """FR_i of the boundaries between latents i and i+1, i = 1 .. T-2: [B, T-2]; NaN where the denominator vanishes.

    raises: UserError if the frames are not 1 + time * k, or fewer than three latents."""
    frames = video.shape[2]
    if (frames - 1) % time or frames < 1 + 2 * time:
        raise UserError(f"the flickering ratio needs 1 + {time}k frames and at least {1 + 2 * time}, not {frames}; "
                        f"cut the video to {max((frames - 1) // time, 2) * time + 1}")
    change = frame_changes(video)
    after, before = change[:, time::time], change[:, time - 1:-1:time]
    return torch.where(before > STATIC, after / before, torch.nan)


def temporal_flickering(video: Tensor) -> Tensor:
    """VBench's score of video [B, 3, F, H, W]: 1 - mean change from frame to frame in 8-bit grey levels over 255: [B]."""
    eight = ((video.float().clamp(-1, 1) + 1) * 127.5).round()
    return 1 - frame_changes(eight).mean(1) / 255


def end_flickering(video: Tensor, given: Tensor, tail: bool = False) -> Tensor:
    """1 - mean |difference| (of 0..1) between the first or last frames of video and the given ones: [B] (paper A.2, Table 4)."""
    n = given.shape[2]
    return 1 - (video[:, :, -n:] if tail else video[:, :, :n]).sub(given).abs().mean((1, 2, 3, 4)) / 2


def seam(video: Tensor, frame: int) -> dict[str, Tensor]:
    """How a cut just before `frame` shows, each [B]. colour offset: largest change of a channel's mean, in grey levels of 255;
    jump: change of the picture over the mean of the changes before and after; sharpness: mean gradient after over before.

    raises: UserError unless two frames lie on either side."""
    if not 2 <= frame <= video.shape[2] - 2:
        raise UserError(f"a seam before frame {frame} needs two frames on either side, but the video has {video.shape[2]}")
    four = video[:, :, frame - 2:frame + 2].float()
    change, mean = frame_changes(four), four.mean((3, 4))
    gradient = four.diff(dim=3).abs().mean((1, 3, 4)) + four.diff(dim=4).abs().mean((1, 3, 4))
    return {"colour offset": (mean[:, :, 2] - mean[:, :, 1]).abs().amax(1) * 127.5,
            "jump": change[:, 1] / (0.5 * (change[:, 0] + change[:, 2])).clamp_min(STATIC),
            "sharpness": gradient[:, 2] / gradient[:, 1].clamp_min(1e-6)}


def drift(video: Tensor, piece: int = 81) -> dict[str, Tensor]:
    """What changes over a long video, each [B, pieces], pieces of so many frames: colour offset from the first piece
    (grey levels of 255), and contrast, sharpness and motion over those of the first piece."""
    parts = [p.float() for p in video.split(piece, dim=2) if p.shape[2] > piece // 2]
    colour = torch.stack([p.mean((2, 3, 4)) for p in parts], 1)  # (B, pieces, 3)
    spread = {"contrast": [p.std((3, 4)).mean((1, 2)) for p in parts],
              "sharpness": [p.diff(dim=4).abs().mean((1, 2, 3, 4)) for p in parts],
              "motion": [frame_changes(p).mean(1) for p in parts]}
    ratios = {k: torch.stack(v, 1) / v[0][:, None].clamp_min(1e-6) for k, v in spread.items()}
    return {"colour offset": (colour - colour[:, :1]).abs().amax(2) * 127.5} | ratios


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features [N, D] and [M, D]: |mu_a - mu_b|^2 + tr(A + B - 2 sqrt(A B)).

    In float64; sqrt(A B) through the symmetric square root of A. raises: UserError for fewer than two rows or unequal D."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(f"features {tuple(a.shape)} and {tuple(b.shape)} must be [N, D] and [M, D] with at least two rows each")
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    A, B = A.view(a.shape[1], -1), B.view(a.shape[1], -1)  # D = 1 gives a scalar
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


@torch.no_grad()
def features(video: Tensor, network: VAE | torch.nn.Module) -> Tensor:
    """One row a clip [B, D]: of a user's TorchScript network such as I3D, called with [1, 3, F, H, W] in [-1, 1]; or, with
    the VAE, the mean and the spread of each latent channel and of its change from latent to latent (ours)."""
    if not isinstance(network, VAE):
        return torch.cat([network(v[None]).float().flatten(1) for v in video])
    z = torch.cat([network.encode(v[None]) for v in video])
    parts = [y.mean((1, 3, 4)) if mean else y.std((1, 3, 4)) for y, mean in ((z, True), (z, False), (z.diff(dim=1), False))]
    return torch.cat(parts, dim=1)


def round_trip(vae: VAE, z: Tensor, plan: Plan) -> Tensor:
    """Change of the first latent of each block over that of the others when z [B, T, C, h, w] is decoded and encoded: [B].

    Latent 0, an image, counts on neither side."""
    back = torch.cat([vae.encode(vae.decode(x[None])) for x in z])
    change, first = (back - z).square().mean((2, 3, 4))[:, 1:], torch.tensor(plan.boundaries())
    return change[:, first].mean(1) / change[:, ~first].mean(1)


@dataclass(frozen=True)
class Stat:
    """Mean and median over all values, standard error over clips; dropped: values that could not be measured."""
    mean: float
    se: float
    median: float
    clips: int
    dropped: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.se:.3f}"


def stat(values: Tensor) -> Stat:
    """values: [clips] or [clips, k], NaN where there is none. raises: UserError if there is none at all."""
    values = values.float().reshape(len(values), -1)
    good, per_clip = values[~values.isnan()], values.nanmean(1)
    per_clip = per_clip[~per_clip.isnan()]
    if not len(good):
        raise UserError("nothing to measure: the video does not move, so no flickering ratio exists")
    se = per_clip.std().item() / len(per_clip) ** 0.5 if len(per_clip) > 1 else float("nan")
    return Stat(good.mean().item(), se, good.median().item(), len(per_clip), values.numel() - len(good))


def measure(video: Tensor, plan: Plan, captions: Sequence[str] | None = None) -> dict[str, Stat]:
    """All that pixels [B, 3, F, H, W] tell about clips made by a plan: FR, motion and, in the toy world, caption accuracy."""
    ratio, inter = flickering_ratio(video), torch.tensor(plan.boundaries()[1:])
    if ratio.shape[1] != len(inter):
        raise UserError(f"a video of {video.shape[2]} frames does not fit the plan {plan.name!r} of {plan.length} latents")
    table = {"FR inter": stat(ratio[:, inter]), "FR intra": stat(ratio[:, ~inter]), "motion": stat(frame_changes(video))}
    if captions is not None:
        right = [[seen[k] == said[k] for k in seen] for seen, said in zip(world.measure(video), map(world.parse, captions))]
        words = torch.tensor(right).float()  # colour, shape, direction, ground
        table |= {name: stat(words[:, n]) for n, name in enumerate(("colour", "shape", "direction", "ground"))}
        table["caption"] = stat(words[:, :3].prod(1))
    return table


# ---------------------------------------------------------------- clips to measure
PLANS = {  # the rows of a student's table
    "forward": anchors.forward(21, 3),
    "backward": anchors.backward(21, 3, 3),
    "backward, anchors as output": anchors.backward(21, 6, 0, head=3),
}


SHOWN = {  # the clips of a report
    "forward": (PLANS["forward"], "From left to right."),
    "backward": (PLANS["backward"], "From the end to the beginning, each block with three imagined latents before it."),
    "backward, anchors as output": (PLANS["backward, anchors as output"], "The imagined latents are kept: blocks of six."),
    "inbetween": (anchors.inbetween(), "Both ends first, then all between them."),
    "loop": (anchors.loop(), "The last block reads the first one as its future."),
    "story": (anchors.story((9, 9), 3), "Two scenes, then the gap."),
}


def latent_shape(vae: VAE, size: tuple[int, ...]) -> tuple[int, int, int]:
    """[C, h, w] of a latent of frames of this height and width."""
    if len(size) != 2 or min(size) < 1 or any(s % (2 * vae.config.space) for s in size):
        raise UserError(f"--size {' '.join(map(str, size))} must be a height and a width divisible by {2 * vae.config.space}")
    return vae.config.z_dim, size[0] // vae.config.space, size[1] // vae.config.space


@torch.no_grad()
def make(dit: DiT, vae: VAE, plan: Plan | None, captions: Sequence[str | Sequence[str]], size: tuple[int, ...] = (32, 32),
         seed: int = 0, guidance: float = 2.0, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Latents [B, T, C, h, w] and pixels [B, 3, F, H, W] of clips with the noise (seed, n, 0); captions: one a clip, or one for
    each prompt of the plan. Without a plan the model is the bidirectional teacher: 48 steps of its ODE, with guidance."""
    device, c, prompts = dit.patch_embedding.weight.device, dit.config, plan.prompts() if plan else 1
    said = [[caption] * prompts if isinstance(caption, str) else caption for caption in captions]
    embedded, latents = [text.embed(words, c.text_dim, c.text_len).to(device) for words in zip(*said)], []
    for a in tqdm(range(0, len(captions), batch), desc=plan.name if plan else "teacher", leave=False):
        texts = [e[a:a + batch] for e in embedded]
        noise = noise_seeded([(seed, a + n, 0) for n in range(len(texts[0]))], latent_shape(vae, size), device)
        latents.append(generate(dit, plan, texts, noise) if plan else trajectory(
            dit, texts[0], torch.zeros_like(texts[0]), noise(0, tuple(range(anchors.HORIZON))), guidance, 5.0)[:, -1])
    z = torch.cat(latents)
    return z, torch.cat([vae.decode(x[None], chunk=99).cpu() for x in z])


def held_out(clips: int) -> list[str]:
    """Captions that no script trains on."""
    return [text.toy_caption(text.HELD_OUT + n) for n in range(clips)]


def write_clip(path: Path, video: Tensor) -> str:
    """Write video [3, F, H, W] as .mp4; its name."""
    with VideoWriter(path) as writer:
        writer.write(video)
    return path.name


def write_report(folder: Path, dit: DiT, vae: VAE, rows: dict[str, dict[str, Stat]], made: dict[str, Tensor],
                 captions: Sequence[str], seed: int) -> None:
    """index.html and ab.html with their clips: every order, the table, FR along time, pairs with and without anchors."""
    cards = []
    for name, (plan, words) in SHOWN.items():
        said = captions[:plan.prompts()]
        video = made[name][:1] if name in made else make(dit, vae, plan, [said], seed=seed)[1]
        file = name.replace(", ", "-").replace(" ", "-")
        anchors.write_picture(folder / f"plan-{file}.png", plan)
        write_sheet(folder / f"{file}.png", made.get(name, video)[:6], columns=11)
        cards.append((name, write_clip(folder / f"{file}.mp4", video[0]), f"plan-{file}.png", f"{words} “{', then '.join(said)}”"))
    ratios = {name: flickering_ratio(video).nanmean(0).tolist() for name, video in made.items()}
    ends = [[i for i, inter in enumerate(PLANS[name].boundaries()) if inter and i] for name in PLANS]
    a, b = "backward", "backward, anchors as output"
    pairs = [{"a": write_clip(folder / f"pair-{n}-a.mp4", x), "b": write_clip(folder / f"pair-{n}-b.mp4", y),
              "fr_a": measure(x[None], PLANS[a])["FR inter"].mean, "fr_b": measure(y[None], PLANS[b])["FR inter"].mean}
             for n, (x, y) in enumerate(zip(made[a][:20], made[b]))]
    report.write_ab(folder / "ab.html", (a, b), pairs)
    report.write_page(folder / "index.html", "Any order", [
        ("Clips", report.paragraph("Below each clip its plan: a row a step, a column a latent; green is made, yellow imagined and "
                                   "dropped, light green read from the cache.") + report.clips(cards)),
        (f"{len(captions)} held-out captions", report.table(rows) + report.paragraph(
            "Caption: colour, shape and direction all right. FR and round trip are about 1 in real clips; "
            "read FR beside motion, since blur has a low FR. ± is one standard error over clips.")),
        ("Flickering ratio along time", report.timeline(ratios, sorted({*ends[0]} & {*ends[1]}), 1) + report.paragraph(
            "Mean over clips for each boundary between latents; grey bands are boundaries between blocks of three.")),
        ("Which one flickers less?", "<p><a href=ab.html>Look at pairs and choose</a></p>")])


# ---------------------------------------------------------------- the official VBench
def lines_of(path: str) -> list[str]:
    return Prompts(path, text.TOY_DIM, 0).lines


@torch.no_grad()
def export(config: "Config", rank: int, world_size: int, device: torch.device) -> None:
    """Write `{original prompt}-{k}.mp4`, as VBench wants them, made from the extended prompts; then score them, if vbench is here.

    Process r makes clips r, r + processes, ...; clip (n, k) has the noise (seed, n, k) whoever makes it; those that are
    there already are kept, so an interrupted export goes on. raises: UserError for prompts that cannot be file names."""
    if not config.prompts:
        raise UserError("--vbench needs --prompts FILE: VBench's original prompts, one a line")
    folder, original = Path(config.vbench), lines_of(config.prompts)
    said = lines_of(config.extended) if config.extended else original
    if len(said) != len(original):
        raise UserError(f"{config.extended} has {len(said)} prompts but {config.prompts} has {len(original)}; they go line by line")
    if bad := [p for p in original if "/" in p or "\0" in p or len(p.encode()) > 240]:
        raise UserError(f"the prompt {bad[0][:80]!r} cannot be a file name: VBench names clips after prompts")
    dit, vae = load_models(config.weights, dtype_of("auto", device), device)
    plan = PLANS[config.order]
    jobs = [(n, k) for n in range(len(original)) for k in range(config.samples)]
    for n, k in tqdm(jobs[rank::world_size], desc="vbench", disable=rank > 0):
        path = folder / f"{original[n]}-{k}.mp4"
        if not path.exists():
            texts = [text.embed([said[n]], dit.config.text_dim, dit.config.text_len).to(device)] * plan.prompts()
            noise = noise_seeded([(config.seed, n, k)], latent_shape(vae, config.size), device)
            write_clip(path, vae.decode(generate(dit, plan, texts, noise))[0])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if rank == 0 and importlib.util.find_spec("vbench") is None:
        print(f"{len(jobs)} clips in {folder}; install the vbench package and run this again to score them")
    elif rank == 0:
        vbench = importlib.import_module("vbench")
        judge = vbench.VBench(device, str(Path(vbench.__file__).parent / "VBench_full_info.json"), str(folder / "scores"))
        judge.evaluate(videos_path=str(folder), name="unitemp", dimension_list=judge.build_full_dimension_list())
        print(report.markdown({"VBench": read_vbench(folder / "scores" / "unitemp_eval_results.json")}))


def read_vbench(path: Path) -> dict[str, float]:
    """Dimension -> score of VBench's result file, {dimension: [score, per clip]}. raises: UserError"""
    try:
        return {k: float(v[0]) for k, v in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        raise UserError(f"{path} is not a result file of VBench ({{dimension: [score, clips]}})") from None


# ---------------------------------------------------------------- command line
@dataclass
class Config:
    """Measure videos, or the clips that a student makes."""
    weights: str = "toy/weights"    # a folder with student and VAE
    teacher: str = ""               # also measure this teacher, as if it had made blocks of three
    guidance: float = 2.0           # of the teacher
    size: tuple[int, ...] = (32, 32)  # height width
    clips: int = 32                 # how many held-out captions
    video: str = ""                 # measure this file instead
    order: str = "forward"          # of --video (in blocks of --block) and --vbench: forward or backward
    block: int = 3
    vbench: str = ""                # a folder: write clips named as the official VBench wants them, and score them if it is installed
    prompts: str = ""               # of --vbench: original prompts, one a line
    extended: str = ""              # of --vbench: what the model is told instead, line by line
    samples: int = 5                # clips a prompt [VBench]
    seed: int = 0
    report: str = ""                # a folder: also write a page with clips, plans, curves and an A/B test
    out: str = ""                   # also write the table as .json
    device: str = "auto"


def main(config: Config) -> None:
    rank, world_size, device = start(config.device)
    if config.order not in ("forward", "backward"):
        raise UserError(f"--order {config.order} must be forward or backward")
    if config.vbench:
        export(config, rank, world_size, device)
        return
    if config.video:
        video = read_frames(config.video)
        whole = (video.shape[2] - 1) // 4
        latents = (whole + 1) // config.block * config.block
        if latents < 3:
            raise UserError(f"{config.video} has {video.shape[2]} frames, too few for {max(config.block, 3)} latents: "
                            f"{4 * max(config.block, 3) - 3} or more are needed")
        plan = anchors.forward(latents, config.block) if config.order == "forward" else anchors.backward(latents, config.block)
        used = 4 * latents - 3
        print(f"the first {used} of {video.shape[2]} frames: {latents} latents in blocks of {config.block}, {config.order}")
        rows = {Path(config.video).name: measure(video[:, :, :used], plan)}
    elif config.clips < 2:
        raise UserError(f"--clips {config.clips} must be at least 2, for a standard error")
    else:
        dit, vae = load_models(config.weights, torch.float32, device)
        captions, rows, made = held_out(config.clips), {}, {}

        def add(name: str, plan: Plan, z: Tensor, video: Tensor) -> Tensor:
            rows[name] = measure(video, plan, captions) | {"round trip": stat(round_trip(vae, z, plan).cpu())}
            return video
        if config.teacher:
            teacher = load_dit(config.teacher, torch.float32, device)
            add("teacher", PLANS["forward"], *make(teacher, vae, None, captions, config.size, config.seed, config.guidance))
        for name, plan in PLANS.items():
            made[name] = add(name, plan, *make(dit, vae, plan, captions, config.size, config.seed))
        if config.report:
            write_report(Path(config.report), dit, vae, rows, made, captions, config.seed)
            print(f"look at {Path(config.report) / 'index.html'}")
    print(report.markdown(rows))
    if config.out:
        with atomic(config.out) as tmp:
            tmp.write_text(json.dumps({name: {k: vars(s) for k, s in row.items()} for name, row in rows.items()}, indent=1))


if __name__ == "__main__":
    run(main, Config)
