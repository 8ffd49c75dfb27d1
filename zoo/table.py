"""All methods of the zoo on the same clips, in one table.

Cost is counted, not timed: passes of the network for a batch of clips, latents through it for each
clip, and finished latents that the cache must hold; `against` is the row to compare with. The
measures are those of evaluate.py, at the boundaries of the method's plan: the flickering ratio (FR,
paper Eq. 4) and the largest of it over the four changes inside the next latent, as a cut may show
later than at once; how latents survive decoding and encoding; motion; `seam`, the change of colour
at a boundary in grey levels of 255; what no word says and a clip should keep (`lost`: 0 all kept, 1
another clip); whether the words are right, of the last prompt where there are two. ± is a standard
error over clips. A seed has captions, clips and noise of its own; `*` stands where a row differs
from the one it is compared with by two standard errors on every seed: praise nothing on one.

A row that is there is not made again: the same command goes on where it was stopped.

    python -m zoo.table --clips 48 --seeds 0 1
    python -m zoo.table --clips 16 --methods forward rolling_forcing
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from anchors import Plan, long
from dit import DiT
from evaluate import frames_of, measure_all, measure_true, summary
from generate import frame_size, load_models
from lib import report, text
from lib.changes import seam
from lib.common import UserError, atomic, fingerprint, run, start
from lib.noise import noise_seeded
from lib.recipe import recipe_of
from lib.statistics import Values, joined
from lib.world import World, find_world, numbers_of
from vae import VAE
from zoo.common import Method
from zoo.run import METHODS, find_method

COST = ("against", "passes", "latents", "slots")
SHOWN = ("FR inter", "FR inter max", "round trip", "motion", "seam")
TRUE = "true clips, decoded"


@dataclass
class Config:
    """Measure every method of the zoo on held-out captions."""

    RANGES = {"clips": (2, None), "latents": (0, None)}  # two, for a standard error
    clips: int = 48  # clips a row
    seeds: tuple[int, ...] = (0,)  # of captions, clips and noise: a row for each
    methods: tuple[str, ...] = ()  # which rows; default: all (python -m zoo.run list)
    latents: int = 0  # length of all rows; 0: each method's own
    weights: str = "toy/weights"  # a folder with student and VAE
    world: str = ""  # a module of captions and their reader; default: toy.world
    out: str = "out/zoo.json"  # the rows, as they are made
    size: tuple[int, ...] = ()  # height width; default: what suits the VAE
    device: str = "auto"


@contextmanager
def counted(dit: DiT) -> Iterator[Counter]:
    """How often a network is called meanwhile, and with how many latents."""
    count = Counter()

    def called(_: DiT, inputs: tuple) -> None:
        count["passes"] += 1
        count["latents"] += inputs[0].shape[0] * inputs[0].shape[1]

    hook = dit.register_forward_pre_hook(called)
    try:
        yield count
    finally:
        hook.remove()


@dataclass(eq=False)  # one a run, told apart by identity
class Bench:
    """What all rows share."""

    config: Config
    dit: DiT
    vae: VAE
    world: World

    def captions(self, seed: int, scenes: int = 1) -> list[str]:
        """Prompt p of clip n is caption n + p of these."""
        last = numbers_of(self.config.clips, seed)[-1]
        numbers = range(last + 1 - self.config.clips, last + scenes)
        return [self.world.caption(number) for number in numbers]

    @cache  # noqa: B019  (one bench a run)
    def true(self, seed: int, length: int) -> tuple[Values, Values]:
        """True clips of the captions: as they are, and through the VAE."""
        numbers = numbers_of(self.config.clips, seed)
        size = frame_size(self.config.size, self.dit, self.vae)[0]
        captions = self.captions(seed)
        return measure_true(self.vae, size, long(length), captions, self.world, numbers)


# ---------------------------------------------------------------- a row
def make(bench: Bench, method: Method, plan: Plan, seed: int, bar: tqdm) -> tuple[Tensor, dict]:
    """Latents [B, T, C, h, w] of every clip, and what they cost; noise is that of seed and clip."""
    config, dit, vae = bench.config, bench.dit, bench.vae
    c, device, scenes = dit.config, dit.patch_embedding.weight.device, plan.prompts()
    words = text.embed(bench.captions(seed, scenes), c.text_dim, c.text_len).to(device)
    size = frame_size(config.size, dit, vae)
    shape = (c.in_dim, *(side // vae.config.space for side in size))
    latents = []
    with counted(dit) as count:
        for a in range(0, config.clips, method.batch):
            some = range(a, min(a + method.batch, config.clips))
            texts = [words[a + p : some.stop + p] for p in range(scenes)]
            noise = noise_seeded([(seed, n, 0) for n in some], shape, device)
            latents.append(method.generate(dit, plan, texts, noise, recipe=recipe_of(dit)))
            bar.update(len(some))
    cost = {"passes": count["passes"] / len(latents), "latents": count["latents"] / config.clips}
    return torch.cat(latents), cost | {"slots": plan.capacity, "against": method.against}


def measured(bench: Bench, z: Tensor, plan: Plan, captions: list[str]) -> Values:
    """What latents z [B, T, C, h, w] show; what a plan gives to itself counts as made."""
    plan = replace(plan, steps=tuple(replace(step, given=()) for step in plan.steps))
    scenes, cuts = plan.prompts(), [4 * i + 1 for i, cut in enumerate(plan.boundaries()) if cut]
    last = [i for step in plan.steps if step.prompt == scenes - 1 for i in step.targets if i >= 0]
    parts = []
    for n in range(len(z)):
        video = bench.vae.decode(z[n : n + 1]).cpu()
        told = captions[n + scenes - 1 : n + scenes]
        found = measure_all(bench.vae, z[n : n + 1], video, plan, bench.world, told)
        found["caption"] = bench.world.hits(video[:, :, frames_of(last)], told)["caption"]
        offsets = [seam(video, cut)["colour offset"] for cut in cuts if cut >= 2]
        found["seam"] = torch.stack(offsets, dim=1) if offsets else torch.full((1, 1), math.nan)
        parts.append(found)
    return joined(parts)


def row_of(bench: Bench, name: str, seed: int, bar: tqdm) -> dict:
    """A row as JSON has it: numbers, and [mean, standard error]."""
    if name == TRUE:
        true, found = bench.true(seed, bench.config.latents or 21)
        cost = {}
    else:
        method, recipe = find_method(name), recipe_of(bench.dit)
        length = bench.config.latents or method.length
        plan = method.plan(length, recipe.block, recipe.anchors)
        true = bench.true(seed, length)[0]
        z, cost = make(bench, method, plan, seed, bar)
        found = measured(bench, z, plan, bench.captions(seed, plan.prompts()))
    return cost | {column: [s.mean, s.se] for column, s in summary(found, true).items()}


# ---------------------------------------------------------------- the table
def read_rows(path: Path, settings: dict) -> dict[str, dict]:
    """The rows that are there. raises: UserError if they are of other clips or weights"""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        there, rows = found["settings"], found["rows"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a table of this script; use another --out") from None
    if settings | {"latents": 0} | there != settings:  # older rows do not say these, or which VAE
        raise UserError(f"{path} has rows of {there}, not of {settings}; use another --out")
    return rows


def cell(values: list, others: list) -> str:
    """One measure of a row, a value for each seed: a name, a count, or mean ± standard error.

    others: what the row it is compared with has. `*`: they differ by two errors on every seed"""
    if not isinstance(values[0], list):
        return values[0] if isinstance(values[0], str) else f"{values[0]:g}"
    mean = sum(mean for mean, _ in values) / len(values)
    error = math.hypot(*(error for _, error in values)) / len(values)
    if math.isnan(error):
        return f"{mean:.3f}"
    pairs = list(zip(values, others))
    far = all(abs(a - b) > 2 * math.hypot(ea, eb) for (a, ea), (b, eb) in pairs)
    sure = far and len({a > b for (a, _), (b, _) in pairs}) == 1
    return f"{mean:.3f} ± {error:.3f}{' *' if sure else ''}"


def shown(rows: dict[str, dict], names: Sequence[str], seeds: Sequence[int]) -> str:
    """The table for people: cost and seams, what is lost, words; over all seeds."""
    kept = [name for row in rows.values() for name in row if name.startswith(("lost", "caption"))]
    columns, cells = list(dict.fromkeys([*COST, *SHOWN, *kept])), {}
    for name in names:
        found = [rows[f"{name}, seed {seed}"] for seed in seeds]
        against = [rows.get(f"{found[0].get('against')}, seed {seed}", {}) for seed in seeds]
        cells[name] = {
            k: cell([row[k] for row in found], [row[k] for row in against if k in row])
            for k in columns
            if k in found[0]
        }
    return report.markdown(cells, columns)


@torch.no_grad()
def main(config: Config) -> None:
    names = config.methods or (TRUE, *METHODS)
    for name in set(names) - {TRUE}:
        find_method(name)
    dit, vae = load_models(config.weights, device=start(config.device)[2])
    bench = Bench(config, dit, vae, find_world(config.world, dit.config.text_dim))
    settings = {
        "clips": config.clips,
        "latents": config.latents,
        "size": list(frame_size(config.size, dit, vae)),
    }
    settings |= {"weights": fingerprint(dit.state_dict()), "world": bench.world.__name__}
    settings["vae"] = fingerprint(vae.state_dict())
    settings["recipe"] = json.loads(json.dumps(recipe_of(dit).write()))
    rows = read_rows(Path(config.out), settings)
    wanted = {f"{name}, seed {seed}": (name, seed) for seed in config.seeds for name in names}
    todo = {row: which for row, which in wanted.items() if row not in rows}
    with tqdm(total=len(todo) * config.clips, desc="clips", unit="clip") as bar:
        for row, (name, seed) in todo.items():
            bar.set_postfix_str(row)
            rows[row] = row_of(bench, name, seed, bar)
            with atomic(config.out) as tmp:
                tmp.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    print(shown(rows, names, config.seeds))


if __name__ == "__main__":
    run(main, Config)
