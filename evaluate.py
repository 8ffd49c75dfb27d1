"""Is it true? Makes clips with students and teachers, or reads yours, and measures them (`metrics.py`).

python evaluate.py --clips 32                        # the student in toy/weights: captions, motion, FR, round trip
python evaluate.py --clips 8 --report out/report     # the same and more, as a page to look at
python evaluate.py --video clip.mp4                  # or a folder of videos
python evaluate.py --table 1                         # a table of the paper, from students of `python -m toy.tables`
python evaluate.py --vbench out/vbench --prompts prompts.txt
"""

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
from anchors import Plan
from dit import DiT, load_dit
from generate import load_models
from lib import report, text
from lib.common import UserError, atomic, dtype_of, run, start
from lib.media import VideoWriter, read_frames, write_sheet
from lib.pairs import is_causal, many_steps, teacher_file
from metrics import (
    Stat,
    drift,
    end_flickering,
    features,
    flickering_ratio,
    frame_changes,
    frechet,
    measure,
    round_trip,
    seam,
    stat,
    temporal_flickering,
)
from sampler import generate, guided, noise_seeded, ode_sigmas
from toy import tables, world
from vae import VAE, load_vae

# ---------------------------------------------------------------- clips to measure
PLANS = {  # the rows of a student's table
    "forward": anchors.forward(21, 3),
    "backward": anchors.backward(21, 3, 3),
    "backward, anchors as output": anchors.backward(21, 6, 0, head=3),
}
SHOWN = {  # the clips of a report
    "forward": (PLANS["forward"], "From left to right."),
    "backward": (
        PLANS["backward"],
        "From the end to the beginning, each block with three imagined latents before it.",
    ),
    "backward, anchors as output": (
        PLANS["backward, anchors as output"],
        "The imagined latents are kept: blocks of six.",
    ),
    "inbetween": (anchors.inbetween(), "Both ends first, then all between them."),
    "loop": (anchors.loop(), "The last block reads the first one as its future."),
    "story": (anchors.story((9, 9), 3), "Two scenes, then the gap."),
}


def latent_shape(vae: VAE, size: tuple[int, ...]) -> tuple[int, int, int]:
    """[C, h, w] of a latent of frames of this height and width."""
    if len(size) != 2 or min(size) < 1 or any(s % (2 * vae.config.space) for s in size):
        raise UserError(
            f"--size {' '.join(map(str, size))} must be a height and a width divisible by {2 * vae.config.space}"
        )
    return vae.config.z_dim, size[0] // vae.config.space, size[1] // vae.config.space


@torch.no_grad()
def make(
    dit: DiT,
    vae: VAE,
    plan: Plan | None,
    captions: Sequence[str | Sequence[str]],
    size: tuple[int, ...] = (32, 32),
    seed: int = 0,
    guidance: float | None = None,
    batch: int = 16,
    warm: int = 0,
) -> tuple[Tensor, Tensor]:
    """Latents [B, T, C, h, w] and pixels [B, 3, F, H, W] of clips with the noise (seed, n, 0); captions: one a clip, or one for
    each prompt of the plan. With guidance the model is a teacher: 48 steps a block, or without a plan all latents at once."""
    device, c, prompts = (
        dit.patch_embedding.weight.device,
        dit.config,
        plan.prompts() if plan else 1,
    )
    said = [[caption] * prompts if isinstance(caption, str) else caption for caption in captions]
    embedded, latents = (
        [text.embed(words, c.text_dim, c.text_len).to(device) for words in zip(*said)],
        [],
    )
    for a in tqdm(
        range(0, len(captions), batch), desc=plan.name if plan else "teacher", leave=False
    ):
        texts = [e[a : a + batch] for e in embedded]
        noise = noise_seeded(
            [(seed, a + n, 0) for n in range(len(texts[0]))], latent_shape(vae, size), device
        )
        latents.append(
            generate(dit, plan, texts, noise, warm=warm)
            if guidance is None
            else many_steps(dit, plan, texts[0], torch.zeros_like(texts[0]), noise, guidance)
        )
    z = torch.cat(latents)
    return z, torch.cat([vae.decode(x[None]).cpu() for x in z])


def held_out(clips: int) -> list[str]:
    """Captions that no script trains on."""
    return [text.toy_caption(text.HELD_OUT + n) for n in range(clips)]


def real_clips(config: "Config", device: torch.device) -> Tensor:
    """The true clips [B, 3, 81, H, W] of the held-out captions."""
    return world.render(
        held_out(config.clips), [text.HELD_OUT + n for n in range(config.clips)], config.size[0]
    ).to(device)


def write_clip(path: Path, video: Tensor) -> str:
    """Write video [3, F, H, W] as .mp4; its name."""
    with VideoWriter(path) as writer:
        writer.write(video)
    return path.name


def write_report(
    config: "Config",
    dit: DiT,
    vae: VAE,
    rows: dict[str, dict[str, Stat]],
    made: dict[str, Tensor],
    captions: Sequence[str],
) -> None:
    """index.html and ab.html with their clips: every order, the table, FR along time, drift, pairs with and without anchors."""
    folder, cards, shown = Path(config.report), [], dict(SHOWN)
    path = tables.folder(config.runs, "exp1", config.seeds[0]) / "student.safetensors"
    without = (
        load_dit(path, torch.float32, dit.patch_embedding.weight.device) if path.exists() else None
    )
    if without is not None and without.config == dit.config:
        shown["backward, P = 0"] = (tables.DUMMY, f"No anchors: another student, {path.parent}.")
    for name, (plan, words) in shown.items():
        said = captions[: plan.prompts()]
        student = without if plan is tables.DUMMY else dit
        video = (
            made[name][:1]
            if name in made
            else make(student, vae, plan, [said], config.size, config.seed)[1]
        )
        file = re.sub(r"\W+", "-", name)
        anchors.write_picture(folder / f"plan-{file}.png", plan)
        write_sheet(folder / f"{file}.png", made.get(name, video)[:6], columns=11)
        cards.append(
            (
                name,
                write_clip(folder / f"{file}.mp4", video[0]),
                f"plan-{file}.png",
                f"{words} “{', then '.join(said)}”",
            )
        )
    ratios = {name: flickering_ratio(video).nanmean(0).tolist() for name, video in made.items()}
    ends = [
        [i for i, inter in enumerate(PLANS[name].boundaries()) if inter and i] for name in PLANS
    ]
    a, b = "backward", "backward, anchors as output"
    pairs = [
        {
            "a": write_clip(folder / f"pair-{n}-a.mp4", x),
            "b": write_clip(folder / f"pair-{n}-b.mp4", y),
            "fr_a": measure(x[None], PLANS[a])["FR inter"].mean,
            "fr_b": measure(y[None], PLANS[b])["FR inter"].mean,
        }
        for n, (x, y) in enumerate(zip(made[a][:20], made[b]))
    ]
    long = {
        f"{way}, sink: {sink}": make(
            dit, vae, anchors.long(123, way, sink=sink), captions[:2], config.size, config.seed
        )[1]
        for way in ("forward", "backward")
        for sink in ("none", "both")
    }
    curves = {name: drift(video) for name, video in long.items()}
    report.write_ab(folder / "ab.html", (a, b), pairs)
    report.write_page(
        folder / "index.html",
        "Any order",
        [
            (
                "Clips",
                report.paragraph(
                    "Below each clip its plan: a row a step, a column a latent; green is made, yellow imagined and "
                    "dropped, light green read from the cache."
                )
                + report.clips(cards),
            ),
            (
                f"{len(captions)} held-out captions",
                report.table(rows)
                + report.paragraph(
                    "Caption: colour, shape and direction all right. FR (paper) and round trip (ours) are about 1 in real clips; "
                    "read FR beside motion, since blur has a low FR. ± is one standard error over clips."
                ),
            ),
            (
                "Flickering ratio along time",
                report.timeline(ratios, sorted({*ends[0]} & {*ends[1]}), 1)
                + report.paragraph(
                    "Mean over clips for each boundary between latents; grey bands are boundaries between blocks of three."
                ),
            ),
            (
                "Drift over 30 s",
                "".join(
                    report.paragraph(words)
                    + report.timeline(
                        {name: found[key].mean(0).tolist() for name, found in curves.items()},
                        start=1,
                        rule=rule,
                    )
                    for key, words, rule in (
                        (
                            "colour offset",
                            "Change of the mean colour since the first 5 s, in grey levels, for each 5 s of two clips:",
                            None,
                        ),
                        ("motion", "Motion over that of the first 5 s:", 1.0),
                    )
                ),
            ),
            ("Which one flickers less?", "<p><a href=ab.html>Look at pairs and choose</a></p>"),
        ],
    )


def measure_files(config: "Config") -> dict[str, dict[str, Stat]]:
    """A row for the video --video, or for each in that folder and one for all; each is cut to whole blocks."""
    path = Path(config.video)
    files = (
        sorted(p for p in path.iterdir() if p.suffix.lower() in (".mp4", ".gif", ".mov", ".webm"))
        if path.is_dir()
        else [path]
    )
    if not files:
        raise UserError(f"{path} holds no videos (.mp4, .gif, .mov, .webm)")
    rows, least = {}, -(-3 // config.block) * config.block
    for file in files:
        video = read_frames(file)
        latents = (video.shape[2] + 3) // 4 // config.block * config.block
        if latents < least:
            raise UserError(
                f"{file} has {video.shape[2]} frames; blocks of {config.block} latents need {4 * least - 3} or more"
            )
        print(
            f"{file.name}: the first {4 * latents - 3} of {video.shape[2]} frames, {latents} latents in blocks of {config.block}"
        )
        plan = anchors.forward(
            latents, config.block, window=0
        )  # who read what does not matter, only where blocks end
        try:
            rows[file.name] = measure(video[:, :, : 4 * latents - 3], plan) | {
                "flicker (VBench)": stat(temporal_flickering(video))
            }
        except UserError as error:
            if len(files) == 1:
                raise
            print(f"{file.name} is left out: {error}")
    if not rows:
        raise UserError(f"none of the {len(files)} videos in {path} moves")
    return rows if len(files) == 1 else rows | {f"all {len(rows)}": over_runs(list(rows.values()))}


# ---------------------------------------------------------------- the paper's tables
def over_runs(runs: Sequence[dict[str, Stat]]) -> dict[str, Stat]:
    """Mean over runs (training seeds, files) and its standard error; a single run keeps its error over clips."""
    if len(runs) == 1:
        return runs[0]
    columns = {k: torch.tensor([run[k].mean for run in runs]) for k in runs[0]}
    return {
        k: Stat(
            v.mean().item(),
            v.std().item() / len(v) ** 0.5,
            v.median().item(),
            sum(run[k].clips for run in runs),
            sum(run[k].dropped for run in runs),
        )
        for k, v in columns.items()
    }


def table_row(
    row: tables.Row,
    dit: DiT,
    vae: VAE,
    captions: Sequence[str],
    config: "Config",
    real: Tensor | None,
) -> dict[str, Stat]:
    """What a table says about one student: short clips as in `main`; long ones by what is left of them in their last 5 s."""
    z, video = make(dit, vae, row.plan, captions, config.size, config.seed)
    if row.plan.length > anchors.HORIZON:
        last = {k: stat(v[:, -1]) for k, v in drift(video).items()}
        spoken = measure(video[:, :, -81:], PLANS["forward"], captions)
        return {
            "caption, last 5 s": spoken["caption"],
            "flicker (VBench)": stat(temporal_flickering(video)),
            **last,
        }
    found = measure(video, row.plan, captions) | {
        "round trip": stat(round_trip(vae, z, row.plan).cpu())
    }
    kept = (
        ("caption", "motion")
        if real is not None
        else ("FR inter", "FR intra", "round trip", "motion", "caption")
    )
    distance = (
        {}
        if real is None
        else {
            "Fréchet": Stat(
                frechet(features(video.to(z.device), vae), real), float("nan"), 0.0, len(video)
            )
        }
    )
    return {k: found[k] for k in kept} | distance


@torch.no_grad()
def fill_in(
    teacher: DiT,
    prompts: Tensor,
    z: Tensor,
    known: list[int],
    noise: Tensor,
    guidance: float,
    shift: float = 5.0,
) -> Tensor:
    """The bidirectional teacher between given latents z[:, known]: 48 steps, the known ones set to their noised selves in each."""
    x, pos, sigmas = noise.clone(), torch.arange(z.shape[1], device=z.device), ode_sigmas(48, shift)
    both = torch.cat([prompts, torch.zeros_like(prompts)])
    for sigma, below in zip(sigmas[:-1], sigmas[1:]):
        x[:, known] = (1 - sigma) * z[:, known] + sigma * noise[:, known]
        x = x + (below - sigma) * guided(
            teacher, x, torch.full(x.shape[:2], 1000 * sigma, device=x.device), both, pos, guidance
        )
    x[:, known] = z[:, known]
    return x


@torch.no_grad()
def table_4(config: "Config", device: torch.device) -> dict[str, dict[str, object]]:
    """Inbetween (paper Table 4): the first 9 and last 12 frames of real clips are given, four ways to fill the 60 between."""
    dit, vae = load_models(config.weights, torch.float32, device)
    teacher, captions = (
        load_dit(config.teacher or f"{config.weights}/teacher.safetensors", torch.float32, device),
        held_out(config.clips),
    )
    plan, c = anchors.inbetween(given=True), dit.config
    real = real_clips(config, device)
    z, prompts = (
        torch.cat([vae.encode(x[None]) for x in real]),
        text.embed(captions, c.text_dim, c.text_len).to(device),
    )
    known = [i for step in plan.steps if step.given for i in step.targets]
    noise = noise_seeded(
        [(config.seed, n, 0) for n in range(config.clips)], latent_shape(vae, config.size), device
    )
    blend, share = real.clone(), torch.linspace(0, 1, 62, device=device)[1:-1].view(1, 1, -1, 1, 1)
    blend[:, :, 9:69] = (1 - share) * real[:, :, 8:9] + share * real[:, :, 69:70]

    def decoded(z: Tensor) -> Tensor:
        return torch.cat([vae.decode(x[None]) for x in z])

    filled = fill_in(
        teacher, prompts, z, known, noise(0, tuple(range(plan.length))), config.guidance
    )
    videos = {
        "true clip, through the VAE": decoded(z),
        "linear blending of frames 8 and 69": blend,
        "teacher, 48 steps, ends held": decoded(filled),
        "student, 4 steps": decoded(
            generate(dit, plan, [prompts], noise, given={i: z[:, i] for i in known})
        ),
    }
    return {
        name: {
            "head": stat(end_flickering(video, real[:, :, :9])),
            "tail": stat(end_flickering(video, real[:, :, 69:], tail=True)),
            "jump at 9": stat(seam(video, 9)["jump"]),
            "jump at 69": stat(seam(video, 69)["jump"]),
            "flicker (VBench)": stat(temporal_flickering(video)),
            "motion": stat(frame_changes(video)),
            "caption": measure(video, plan, captions)["caption"],
            "Fréchet": Stat(
                frechet(features(video, vae), features(real, vae)), float("nan"), 0.0, config.clips
            ),
        }
        for name, video in videos.items()
    }


@torch.no_grad()
def table(config: "Config", device: torch.device) -> dict[str, dict[str, object]]:
    """The rows of `toy.tables` number --table, measured; rows without students are left out, with the command that trains them.

    raises: UserError with that command if no row is left."""
    if config.table == 4:
        return table_4(config, device)
    if config.table not in tables.TABLES:
        raise UserError(f"--table {config.table} must be 1 to 6, or 10 (the initialisations)")

    def weights(row: tables.Row, seed: int) -> Path:
        path = tables.folder(config.runs, row.student, seed)
        own = path / f"{'backward' if row.plan.name == 'backward' else 'forward'}.safetensors"
        return own if own.exists() else path / "student.safetensors"

    seeds = {row: row.seeds or config.seeds for row in tables.TABLES[config.table]}
    missing = {
        (row.student, seed)
        for row in seeds
        for seed in seeds[row]
        if not weights(row, seed).exists()
    }
    rows = [row for row in seeds if not any((row.student, seed) in missing for seed in seeds[row])]
    if missing:
        says = (
            f"students {', '.join(sorted(f'{name}-{seed}' for name, seed in missing))} are not trained yet: python -m toy.tables "
            f"--out {config.runs} --seeds {' '.join(sorted({str(s) for _, s in missing}))} --students "
            f"{' '.join(sorted({name for name, _ in missing} & (tables.STAGE2 | tables.CAUSAL).keys()))}"
        )
        if not rows:
            raise UserError(says)
        print(says)
    vae, captions, result = load_vae(config.weights, device=device), held_out(config.clips), {}
    real = features(real_clips(config, device), vae) if config.table == 2 else None
    for row in tqdm(rows, desc=f"table {config.table}"):
        runs = [
            table_row(
                row,
                load_dit(weights(row, seed), torch.float32, device),
                vae,
                captions,
                config,
                real,
            )
            for seed in seeds[row]
        ]
        result[row.label] = ({"paper": row.paper} if row.paper else {}) | over_runs(runs)
    return result


# ---------------------------------------------------------------- the official VBench
@torch.no_grad()
def export(config: "Config", rank: int, world_size: int, device: torch.device) -> None:
    """Write `{original prompt}-{k}.mp4`, as VBench wants them, made from the extended prompts; then score them, if vbench is here.

    Process r makes clips r, r + processes, ...; clip (n, k) has the noise (seed, n, k) whoever makes it; those that are
    there already are kept, so an interrupted export goes on. raises: UserError for prompts that cannot be file names."""
    if not config.prompts:
        raise UserError("--vbench needs --prompts FILE: VBench's original prompts, one a line")
    folder, original = Path(config.vbench), text.lines_of(config.prompts)
    said = text.lines_of(config.extended) if config.extended else original
    if len(said) != len(original):
        raise UserError(
            f"{config.extended} has {len(said)} prompts but {config.prompts} has {len(original)}; they go line by line"
        )
    if bad := [p for p in original if "/" in p or "\0" in p or len(p.encode()) > 240]:
        raise UserError(
            f"the prompt {bad[0][:80]!r} cannot be a file name: VBench names clips after prompts"
        )
    dit, vae = load_models(config.weights, dtype_of("auto", device), device)
    plan, source = (
        PLANS[config.order],
        text.Prompts(config.extended or config.prompts, dit.config.text_dim, dit.config.text_len),
    )
    jobs = [(n, k) for n in range(len(original)) for k in range(config.samples)]
    for n, k in tqdm(jobs[rank::world_size], desc="vbench", disable=rank > 0):
        path = folder / f"{original[n]}-{k}.mp4"
        if not path.exists():
            texts = [source([n]).to(device)] * plan.prompts()
            noise = noise_seeded([(config.seed, n, k)], latent_shape(vae, config.size), device)
            write_clip(path, vae.decode(generate(dit, plan, texts, noise))[0])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if rank == 0 and importlib.util.find_spec("vbench") is None:
        print(
            f"{len(jobs)} clips in {folder}; install the vbench package and run this again to score them"
        )
    elif rank == 0:
        vbench = importlib.import_module("vbench")
        judge = vbench.VBench(
            device,
            str(Path(vbench.__file__).parent / "VBench_full_info.json"),
            str(folder / "scores"),
        )
        judge.evaluate(
            videos_path=str(folder),
            name="unitemp",
            dimension_list=judge.build_full_dimension_list(),
        )
        print(
            report.markdown(
                {"VBench": read_vbench(folder / "scores" / "unitemp_eval_results.json")}
            )
        )


def read_vbench(path: Path) -> dict[str, float]:
    """Dimension -> score of VBench's result file, {dimension: [score, per clip]}. raises: UserError"""
    try:
        return {k: float(v[0]) for k, v in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        raise UserError(
            f"{path} is not a result file of VBench ({{dimension: [score, clips]}})"
        ) from None


# ---------------------------------------------------------------- command line
@dataclass
class Config:
    """Measure videos, or the clips that a student makes."""

    weights: str = "toy/weights"  # a folder with student and VAE
    teacher: str = ""  # also measure this teacher, as if it had made blocks of three; or an autoregressive one: ar:FILE
    guidance: float = 2.0  # of the teacher
    size: tuple[int, ...] = (32, 32)  # height width
    clips: int = 32  # how many held-out captions
    video: str = ""  # measure this file, or every video in this folder, instead
    block: int = 3  # of --video: latents a block
    order: str = "forward"  # of --vbench: forward or backward
    table: int = (
        0  # regenerate this table of the paper from the students in --runs (`python -m toy.tables`)
    )
    runs: str = "out/tables"  # where they are
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds of --table
    vbench: str = ""  # a folder: write clips named as the official VBench wants them, and score them if it is installed
    prompts: str = ""  # of --vbench: original prompts, one a line, or what text.py made of them
    extended: str = ""  # of --vbench: what the model is told instead, line by line
    samples: int = 5  # clips a prompt [VBench]
    seed: int = 0
    report: str = ""  # a folder: also write a page with clips, plans, curves and an A/B test
    out: str = ""  # also write the table as .json
    warm: int = 0  # of the student's rows: start backward blocks so many steps on, from their neighbour's anchors
    vae_dtype: str = "float32"  # of the VAE, in the first table: what bfloat16 changes
    device: str = "auto"


@torch.no_grad()
def main(config: Config) -> None:
    rank, world_size, device = start(config.device)
    if config.order not in ("forward", "backward"):
        raise UserError(f"--order {config.order} must be forward or backward")
    if config.vbench:
        export(config, rank, world_size, device)
        return
    if config.video:
        rows = measure_files(config)
    elif not 0 <= config.warm < 4:
        raise UserError(f"--warm {config.warm} must be from 0 to 3")
    elif config.clips < 2:
        raise UserError(f"--clips {config.clips} must be at least 2, for a standard error")
    elif config.table:
        rows = table(config, device)
    else:
        dit, vae = load_models(
            config.weights, torch.float32, device, dtype_of(config.vae_dtype, device, "vae_dtype")
        )
        captions, rows, made = held_out(config.clips), {}, {}

        def add(name: str, plan: Plan, z: Tensor, video: Tensor) -> Tensor:
            rows[name] = measure(video, plan, captions) | {
                "round trip": stat(round_trip(vae, z, plan).cpu())
            }
            return video

        z = torch.cat([vae.encode(x[None]) for x in real_clips(config, device)])
        add(
            "real clips, decoded",
            PLANS["forward"],
            z,
            torch.cat([vae.decode(x[None]).cpu() for x in z]),
        )
        if config.teacher:
            teacher = load_dit(teacher_file(config), torch.float32, device)
            for name in ("forward", "backward") if is_causal(config) else ("",):
                z, video = make(
                    teacher,
                    vae,
                    PLANS.get(name),
                    captions,
                    config.size,
                    config.seed,
                    config.guidance,
                )
                add(f"teacher {name}".strip(), PLANS[name or "forward"], z, video)
        for name, plan in PLANS.items():
            made[name] = add(
                name,
                plan,
                *make(dit, vae, plan, captions, config.size, config.seed, warm=config.warm),
            )
        if config.report:
            write_report(config, dit, vae, rows, made, captions)
            print(f"look at {Path(config.report) / 'index.html'}")
    print(report.markdown(rows))
    if config.out:
        with atomic(config.out) as tmp:
            tmp.write_text(
                json.dumps(
                    {
                        name: {k: vars(s) if isinstance(s, Stat) else s for k, s in row.items()}
                        for name, row in rows.items()
                    },
                    indent=1,
                )
            )


if __name__ == "__main__":
    run(main, Config)
