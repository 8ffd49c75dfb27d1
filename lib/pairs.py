"""Pairs on disk: states of a teacher's ODE at a student's noise levels, and the end points.

    states [S, K+1, T, C, h, w]         a trajectory per latent, noisiest first, the end point last
or  clean [S, T, C, h, w] and plan0, plan1 ... [S, K+1, slots, C, h, w]
                                        an autoregressive teacher's (zoo/causal_ode.py): one per
                                        slot of each plan's layout, after clean context

A shard pairs-000064.safetensors holds the pairs from number 64 on, of one group (trajectories: of
one length; causal pairs: of one entry of the mix of plans), and says how it was made. Pair n
belongs to prompt n and to noise n, whatever else is there. What is there is compared with what is
asked for; what does not fit is named. Who makes pairs and what learns from them is not known here.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lib.common import (
    Stream,
    UserError,
    atomic,
    end_stopped,
    fingerprint,
    generator,
    say,
    stop_signals,
)
from lib.tensors import listed, read_json, read_tensors, write_safetensors
from lib.training import mean_over_processes
from lib.weights import read_dit

AGAIN = "delete it and run --generate again"
GOLDEN = 0.6180339887498949  # multiples of it mod 1 fill [0, 1) evenly, however many there are


def kept_states(levels: Sequence[float], steps: int = 48) -> list[int]:
    """Which states of an ODE of so many steps stand at these levels (of 1000), and the end point.

    kept_states((1000, 750, 500, 250)) -> [0, 12, 24, 36, 48]. raises: UserError"""
    places = [steps * (1 - level / 1000) for level in levels]
    if any(abs(place - round(place)) > 1e-6 for place in places):
        raise UserError(
            f"--denoising {' '.join(f'{level:g}' for level in levels)}: a teacher's {steps} steps "
            f"pass through multiples of 1000 / {steps} only"
        )
    return [*map(round, places), steps]


# ---------------------------------------------------------------- what pairs are
MADE_BY = ("prompts", "guidance", "negative", "shift", "seed", "latent", "denoising")
PLANS = ("plans", "block", "anchors", "head", "share_noise")  # what causal pairs depend on, too


def hashed(words: Callable[[int], str], numbers: range) -> str:
    """What tells the words of some pairs from others."""
    return hashlib.sha256("\n".join(map(words, numbers)).encode()).hexdigest()[:16]


class Kind:
    """A kind of pairs: which go together, what is in one, and where its shards lie.

    Who inherits this has `make`, (teacher, text, group, pairs) -> tensors, and `draw`, (mix, a
    number in [0, 1)) -> an entry of the mix. A group: what the pairs of a shard have in common.
    mix: the plans, [(share, plans)] (plans.py);  channels: of a latent;  source: of the prompts"""

    made_by = MADE_BY  # the flags that decide what is in a pair
    group_is = "lengths"
    clip_of = None  # pair -> the real clip in it, of kinds that hold one

    def __init__(self, config, mix, channels: int, source) -> None:
        self.config, self.mix, self.channels, self.source = config, mix, channels, source
        self.keep = kept_states(config.denoising)
        self.teacher_forcing = config.teacher_forcing
        self.folder = Path(config.data)

    def group(self, entry: int) -> int:
        """Of the pairs for an entry of the mix."""
        return self.mix[entry][1][0].length

    def shapes(self, group: int) -> dict[str, tuple[int, ...]]:
        """What the teacher leaves of each pair: tensor -> its shape."""
        return {"states": (len(self.keep), group, self.channels, *self.config.latent[1:])}

    def noise(self, numbers: Sequence[int], rows: int) -> Tensor:
        """What these pairs start from, [B, rows, C, h, w]."""
        return torch.stack([pair_noise(self.config, self.channels, n, rows) for n in numbers])

    def wrong(self, group: int, pair: "Pair") -> str:
        """What is wrong with a pair: it starts elsewhere, or does not fall to its end; or ""."""
        start = self.noise([pair.number], group)[0]
        return wrong_states(pair.shard["states"][pair.row], start, self.config.seed)

    def ranges(self) -> list[range]:
        """The pairs of each shard."""
        pairs, shard = self.config.pairs, self.config.shard
        return [range(s, min(s + shard, pairs)) for s in range(0, pairs, shard)]

    def group_of(self, numbers: range) -> int:
        """Of the pairs of a shard."""
        u = (0.5 + GOLDEN * (numbers.start // self.config.shard)) % 1
        return self.group(self.draw(self.mix, u))

    def path(self, numbers: range) -> Path:
        return self.folder / f"pairs-{numbers.start:06d}.safetensors"

    @cached_property
    def settings(self) -> dict:
        """How pairs are made: what a shard records and a later run is compared with."""
        made = {k: asdict(self.config)[k] for k in self.made_by}
        made["teacher"] = fingerprint(read_dit(self.config.teacher)[1])
        if self.config.prompts.endswith(".safetensors"):  # embeddings: of which encoder
            made["encoder"] = (read_tensors(self.config.prompts)[1] or {}).get("encoder")
        return made

    def record(self, numbers: range) -> dict:
        """What a shard says of itself."""
        counted = {"first": numbers.start, "count": len(numbers), "group": self.group_of(numbers)}
        clips = {"clips": hashed(self.clip_of, numbers)} if self.clip_of else {}
        return self.settings | counted | {"words": hashed(self.source.words, numbers)} | clips


def pair_noise(config, channels: int, number: int, rows: int) -> Tensor:
    """The noise [rows, C, h, w] from which pair `number` starts (`plans.rows_of`)."""
    g = generator(config.seed, Stream.PAIR, number)
    return torch.randn(rows, channels, *config.latent[1:], generator=g)


def difference(made: dict, asked: dict) -> str:
    """What differs between how something was made and what is asked for now; "" if nothing does."""
    asked = json.loads(json.dumps(asked))  # tuples become lists, as in `made`
    differ = [k for k in asked if made.get(k) != asked[k]]
    return ", ".join(f"{k} is {made.get(k)!r}, not {asked[k]!r}" for k in differ)


def shard_files(folder: Path) -> list[Path]:
    """The shards that a folder holds, in the order of their pairs."""
    return listed(folder, "pairs-*.safetensors")


# ---------------------------------------------------------------- making
Make = Callable[[int, range], dict[str, Tensor]]  # (group, pairs) -> tensors


def missing_shards(kind: Kind) -> list[range]:
    """The shards that are not there, or not whole. raises: UserError for one of another run"""
    todo = {kind.path(numbers): numbers for numbers in kind.ranges()}
    for path in shard_files(kind.folder):
        if path not in todo:
            pairs, shard = kind.config.pairs, kind.config.shard
            raise UserError(
                f"{path} is not one of {pairs} pairs in shards of {shard}: give the "
                "--pairs and --shard it was made with (--pairs may grow), or another --data"
            )
        made = read_tensors(path)[1] or {}
        if wrong := difference(made, kind.settings):
            raise UserError(f"{path} was made otherwise: {wrong}; delete it, or use another --data")
        if wrong := difference(made, kind.record(todo[path])):
            print(f"{path.name} is made again: {wrong}", flush=True)
        else:
            del todo[path]
    return list(todo.values())


def write_missing(kind: Kind, make: Make, rank: int, world: int, device: torch.device) -> None:
    """Make what is missing, every process its share; at the end rank 0 writes the index."""
    config, folder = kind.config, kind.folder
    if min(config.pairs, config.shard) < 1:
        raise UserError(f"--pairs {config.pairs} and --shard {config.shard} must be at least 1")
    todo = missing_shards(kind)
    mean_over_processes({"looked": 1.0}, device)  # nobody writes before all have looked
    if rank == 0:
        shards = {r: kind.shapes(kind.group_of(r)).values() for r in kind.ranges()}
        numbers = sum(len(r) * sum(map(math.prod, some)) for r, some in shards.items())
        print(
            f"{config.pairs} pairs in {len(shards)} shards, {len(todo)} to make; "
            f"{2 * numbers / 1e9:.2g} GB in all",
            flush=True,
        )
    mine = todo[rank::world]
    bar = tqdm(total=sum(map(len, mine)), desc=f"pairs {rank}", unit="pair")
    with torch.no_grad(), stop_signals() as stop, bar:
        done = all(write_shard(kind, numbers, make, stop, bar) for numbers in mine)
    # one process that was stopped is enough to leave the index as it is
    done = mean_over_processes({"done": float(done)}, device)["done"] == 1
    if rank == 0 and done:
        digests = {p.name: hashlib.sha256(p.read_bytes()) for p in shard_files(folder)}
        shards = {name: digest.hexdigest() for name, digest in digests.items()}
        with atomic(folder / "index.json") as tmp:
            tmp.write_text(json.dumps({"pairs": config.pairs, "shards": shards}, indent=1))
        print(f"wrote {len(shards)} shards and {folder / 'index.json'}")
    if not done:
        say(f"stopped; {folder} keeps its whole shards, run the same command to go on")
        end_stopped(stop())


def write_shard(kind: Kind, numbers: range, make: Make, stop: Callable[[], int], bar: tqdm) -> bool:
    """Make and write one shard; False if a signal came before it was whole."""
    parts, micro = [], kind.config.micro or 16
    for a in range(numbers.start, numbers.stop, micro):
        if stop():
            return False
        some = range(a, min(a + micro, numbers.stop))
        made = make(kind.group_of(numbers), some)
        parts.append({k: v.half().cpu() for k, v in made.items()})
        bar.update(len(some))
    tensors = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    if lost := [k for k, x in tensors.items() if not x.isfinite().all()]:
        raise FloatingPointError(
            f"the teacher's {lost[0]} of pairs {numbers.start} to {numbers.stop - 1} are not "
            "finite; nothing was written for them"
        )
    write_safetensors(kind.path(numbers), tensors, kind.record(numbers))
    return True


# ---------------------------------------------------------------- reading
@dataclass(frozen=True)
class Pair:
    """Where a pair lies: its number, its shard's tensors (memory-mapped) and its row there."""

    number: int
    shard: dict[str, Tensor]
    row: int
    file: str


def read_pairs(kind: Kind) -> dict[int, list[Pair]]:
    """Group -> its pairs in --data.

    raises: UserError where a shard is missing, damaged, or not what is asked for"""
    index = kind.folder / "index.json"
    settings = {k: v for k, v in kind.settings.items() if k != "seed"}  # of training: any
    if not index.is_file():
        raise UserError(
            f"{index} does not exist: make pairs first, with --generate --data {kind.folder}"
        )
    files = read_json(index).get("shards")
    if not files or not isinstance(files, dict) or not all(Path(n).name == n for n in files):
        raise UserError(f"{index} names no shards; {AGAIN}")
    if unlisted := {p.name for p in shard_files(index.parent)} - files.keys():
        raise UserError(f"{index} does not name {sorted(unlisted)[0]}; run --generate again")
    groups: dict[int, list[Pair]] = {}
    for name in sorted(files):
        tensors, made = read_tensors(index.parent / name)
        if not made or any(type(made.get(k)) is not int for k in ("first", "count", "group")):
            raise UserError(f"{name} is not a shard of pairs; {AGAIN}")
        if wrong := difference(made, settings):
            raise UserError(
                f"{name} was made otherwise: {wrong}; give the same flags, or another --data"
            )
        numbers = range(made["first"], made["first"] + made["count"])
        if hashed(kind.source.words, numbers) != made.get("words"):
            raise UserError(
                f"{name} was made for other prompts than --prompts has at {numbers.start} to "
                f"{numbers.stop - 1}; give the same ones"
            )
        want = {k: (len(numbers), *shape) for k, shape in kind.shapes(made["group"]).items()}
        if {k: tuple(x.shape) for k, x in tensors.items()} != want:
            raise UserError(f"{name} does not hold what its plans leave behind, {want}; {AGAIN}")
        rows = [Pair(n, tensors, row, name) for row, n in enumerate(numbers)]
        groups.setdefault(made["group"], []).extend(rows)
    return groups


def check_shards(pairs: dict[int, list[Pair]], kind: Kind) -> None:
    """Hashes, finite numbers, and what the kind finds wrong with a pair. raises: UserError"""
    folder = kind.folder
    index = read_json(folder / "index.json")["shards"]
    for name, digest in tqdm(index.items(), desc="check", unit="shard"):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise UserError(
                f"{name} is not the file that the index names (its hash differs); {AGAIN}"
            )
    for group, some in pairs.items():
        for pair in some:
            lost = [k for k, x in pair.shard.items() if not x[pair.row].isfinite().all()]
            wrong = f"its {lost[0]} are not finite" if lost else kind.wrong(group, pair)
            if wrong:
                raise UserError(f"pair {pair.number} in {pair.file}: {wrong}; {AGAIN}")
    print(f"{sum(map(len, pairs.values()))} pairs of {len(pairs)} {kind.group_is} are good")


def with_pairs(mix: tuple, there: list[bool]) -> tuple:
    """The mix without the entries that have no pairs: the others keep their shares' ratio."""
    if all(there):
        return mix
    say(f"{there.count(False)} of {len(mix)} kinds of plans have no pairs yet: left out")
    total = sum(share for (share, _), here in zip(mix, there) if here)
    return tuple((share / total * here, plans) for (share, plans), here in zip(mix, there))


def slot_states(pair: Pair, lay: object, d: int) -> Tensor:
    """What a pair shows at each slot of plan d's layout: [K+1, slots, C, h, w], the end point last.

    lay: an `anchors.Layout`. The clean slots hold the real clip at every level."""
    latent = torch.tensor([i if i >= 0 else ~i for i in lay.latent])
    if "states" in pair.shard:
        return pair.shard["states"][pair.row][:, latent].float()
    noisy = pair.shard[f"plan{d}"][pair.row].float()  # (K+1, noisy slots, C, h, w)
    clean = pair.shard["clean"][pair.row][latent[torch.tensor(lay.is_clean)]].float()
    return torch.cat([clean.expand(len(noisy), *clean.shape), noisy], dim=1)


def wrong_states(states: Tensor, start: Tensor, seed: int) -> str:
    """What is wrong with states [K+1, ...] that should fall from `start` to a clean end; or ""."""
    states, start = states.float().flatten(1), start.flatten()
    if (states[0] - start).abs().max() > 2e-3:
        return f"its states do not start from the noise of seed {seed}"
    noise = torch.cosine_similarity(states, start, dim=1)  # (K+1)
    end = torch.cosine_similarity(states, states[-1:], dim=1)
    if not (noise.diff() < 0).all() or not (end.diff() > 0).all():
        return (
            "its states do not fall from noise to a clean end (likeness to the noise "
            f"{noise.tolist()}, to the end {end.tolist()})"
        )
    return ""
