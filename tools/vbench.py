"""Clips for the official VBench, named as it wants them; its scores, if the package is here; and
the three numbers that papers print.

One prompt of VBench is one row of clips `{prompt}-{k}.mp4`. What the model is told may be another,
longer prompt (--extended), line by line. Processes share the work, and an interrupted export goes
on: how the clips are made is kept beside their folder, and others are refused.

    python -m tools.vbench --prompts prompts.txt --out out/vbench --weights Wan2.1-T2V-1.3B
"""

import importlib
import importlib.util
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from generate import frame_size, load_models
from lib import report, text
from lib.common import UserError, atomic, check_out, dtype_of, fingerprint, run, start
from lib.media import VideoWriter
from lib.noise import noise_seeded
from lib.recipe import recipe_of
from plans import plans_of
from sampler import generate

# dimension: (lowest, highest, weight), as VBench sums its scores up [VBench scripts/constant.py]
QUALITY = {
    "subject consistency": (0.1462, 1, 1),
    "background consistency": (0.2615, 1, 1),
    "temporal flickering": (0.6293, 1, 1),
    "motion smoothness": (0.706, 0.9975, 1),
    "dynamic degree": (0, 1, 0.5),
    "aesthetic quality": (0, 1, 1),
    "imaging quality": (0, 1, 1),
}
SEMANTIC = {
    "object class": (0, 1, 1),
    "multiple objects": (0, 1, 1),
    "human action": (0, 1, 1),
    "color": (0, 1, 1),
    "spatial relationship": (0, 1, 1),
    "scene": (0, 0.8222, 1),
    "appearance style": (0.0009, 0.2855, 1),
    "temporal style": (0, 0.364, 1),
    "overall consistency": (0, 0.364, 1),
}


@dataclass
class Config:
    """Write clips named as the official VBench wants them, and score them if it is installed."""

    RANGES = {
        "samples": (1, 1000),
        "format": (".mp4", ".mkv", ".gif"),
        "share_noise": ("none", "start", "all"),
    }
    prompts: str  # original prompts, one a line, or what text.py made of them
    out: str = "out/vbench"  # a folder for the clips
    extended: str = ""  # what the model is told instead, line by line
    weights: str = "toy/weights"  # a folder with student and VAE
    order: str = "forward"  # forward; backward; or: backward, anchors as output
    samples: int = 5  # clips a prompt [VBench]
    size: tuple[int, ...] = ()  # height width; default 480 832 for Wan's VAE, 32 32 for the toy's
    format: str = ".mp4"  # or .mkv, lossless, if your scorer reads it
    share_noise: str = ""  # of anchors and targets: none, start or all; default: as trained
    seed: int = 0
    scores: str = ""  # only sum up this result file of VBench
    device: str = "auto"


def checked(config: Config) -> tuple[list[str], list[str]]:
    """The original prompts and what the model is told for each. raises: UserError"""
    original = text.lines_of(config.prompts)
    told = text.lines_of(config.extended) if config.extended else original
    if len(told) != len(original):
        raise UserError(
            f"{config.extended} has {len(told)} prompts but {config.prompts} has {len(original)}; "
            "they go line by line"
        )
    for prompt in original:
        if "/" in prompt or "\0" in prompt or len(prompt.encode()) > 240:
            raise UserError(f"the prompt {prompt[:80]!r} cannot be a file name, as VBench needs")
        if original.count(prompt) > 1:
            raise UserError(f"{config.prompts} has the prompt {prompt[:80]!r} twice: one file name")
    return original, told


def keep_settings(out: Path, settings: dict) -> None:
    """Write beside a folder how its clips are made. raises: UserError where it was another way"""
    kept, words = out.with_name(f"{out.name}.json"), json.dumps(settings, indent=1)
    if kept.is_file() and kept.read_text(errors="replace") == words:
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"{out} holds clips of other weights or settings ({kept} has theirs); "
            "use another --out, or delete them"
        )
    with atomic(kept) as tmp:
        tmp.write_text(words)


@torch.no_grad()
def export(config: Config, rank: int, world_size: int, device: torch.device) -> None:
    """Write all clips. Process r makes clips r, r + processes, ...

    Clip (n, k) has the noise (seed, n, k) whoever makes it. raises: UserError"""
    out = check_out(config.out, folder=True)
    original, told = checked(config)
    dit, vae = load_models(config.weights, dtype_of("auto", device), device)
    recipe, c = recipe_of(dit), dit.config
    recipe = replace(recipe, share_noise=config.share_noise or recipe.share_noise)
    plans = plans_of(recipe)
    if config.order not in plans:
        raise UserError(f"--order {config.order} must be one of: {'; '.join(plans)}")
    plan = plans[config.order]
    h, w = (side // vae.config.space for side in frame_size(config.size, dit, vae))
    networks = [fingerprint(network.state_dict()) for network in (dit, vae)]
    settings = {"order": config.order, "size": (h, w), "seed": config.seed, "prompts": told}
    keep_settings(out, {"weights": networks, "recipe": asdict(recipe)} | settings)
    source = text.Prompts(config.extended or config.prompts, c.text_dim, c.text_len)
    jobs = [(n, k) for n in range(len(original)) for k in range(config.samples)]
    for n, k in tqdm(jobs[rank::world_size], desc="vbench", disable=rank > 0):
        path = out / f"{original[n]}-{k}{config.format}"
        if path.exists():
            continue
        texts = [source.embed([told[n]]).to(device)] * plan.prompts()
        noise = noise_seeded([(config.seed, n, k)], (c.in_dim, h, w), device)
        z = generate(dit, plan, texts, noise, recipe=recipe)
        with VideoWriter(path) as writer:
            writer.write(vae.decode(z)[0])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if rank == 0:
        print(f"{len(jobs)} clips in {out}")


def judge(folder: Path, device: torch.device) -> Path:
    """Let the package vbench score the clips of a folder; its result file, beside the folder."""
    vbench, out = importlib.import_module("vbench"), folder.with_name(f"{folder.name}-scores")
    info = Path(vbench.__file__).parent / "VBench_full_info.json"
    scorer = vbench.VBench(device, str(info), str(out))
    dimensions = scorer.build_full_dimension_list()
    scorer.evaluate(videos_path=str(folder), name="unitemp", dimension_list=dimensions)
    return out / "unitemp_eval_results.json"


def read_scores(path: Path) -> dict[str, float]:
    """Dimension -> score, 0 to 1, of VBench's file, {dimension: [score, per clip]}.
    raises: UserError"""
    try:
        entries = json.loads(path.read_text()).items()
        found = {name.replace("_", " "): float(entry[0]) for name, entry in entries}
    except (OSError, ValueError, TypeError, IndexError, KeyError, AttributeError):
        raise UserError(
            f"{path} is not a result file of VBench, {{dimension: [score, clips]}}"
        ) from None
    if found.get("imaging quality", 0) > 1:  # some versions give it in percent
        found["imaging quality"] /= 100
    return found


def totals(scores: dict[str, float]) -> dict[str, float]:
    """Quality, Semantic and Total, in percent, of those of which all dimensions are there: means,
    weighted, of dimensions scaled to their ranges."""
    found = {}
    for name, part in (("Quality", QUALITY), ("Semantic", SEMANTIC)):
        if part.keys() <= scores.keys():
            scaled = [w * (scores[d] - low) / (high - low) for d, (low, high, w) in part.items()]
            found[name] = 100 * sum(scaled) / sum(w for _, _, w in part.values())
    if len(found) == 2:
        found["Total"] = 0.8 * found["Quality"] + 0.2 * found["Semantic"]  # 4 to 1 [VBench]
    return found


def main(config: Config) -> None:
    path = Path(config.scores)
    if not config.scores:
        rank, world_size, device = start(config.device)
        export(config, rank, world_size, device)
        if rank:
            return
        if importlib.util.find_spec("vbench") is None:
            print("install the vbench package and run this again to score them")
            return
        path = judge(Path(config.out), device)
    scores = read_scores(path)
    row = totals(scores) | scores
    print(report.markdown({"VBench": {name: f"{value:.4g}" for name, value in row.items()}}))
    if len(totals(scores)) < 3:
        absent = sorted((QUALITY.keys() | SEMANTIC.keys()) - scores.keys())
        print(f"no Total without {', '.join(absent)}")


if __name__ == "__main__":
    run(main, Config)
