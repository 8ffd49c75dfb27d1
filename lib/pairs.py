"""Pairs on disk: states of a teacher's ODE at a student's noise levels, and the end points.

    states [S, K+1, T, C, h, w]         a trajectory per latent, noisiest first, the end point last
or  clean [S, T, C, h, w] and plan0, plan1 ... [S, K+1, slots, C, h, w]
                                        an autoregressive teacher's (zoo/causal_ode.py): one per
                                        slot of each plan's layout, after clean context

A shard pairs-000064.safetensors holds the pairs from number 64 on, of one entry of the mix of
plans, and says how it was made. Pair n belongs to prompt n and to noise n, whatever else is in the
folder. What is there is compared with what is asked for; what does not fit is named. Who makes
pairs, and what learns from them, is not known here.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lib.common import UserError, atomic, stop_signals
from lib.weights import read_json, read_tensors, write_safetensors

GOLDEN = 0.6180339887498949  # multiples of it mod 1 fill [0, 1) evenly, however many there are


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Names a network by its weights, whatever file they lie in: name, shape, ends of each."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        flat = x.flatten()
        ends = torch.cat([flat[:1024], flat[-1024:]]).float().numpy().tobytes()
        digest.update(f"{name}{tuple(x.shape)}".encode() + ends)
    return digest.hexdigest()[:16]


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


@dataclass(frozen=True)
class Where:
    """A folder of pairs, and what its shards must be.

    settings: how they are made, as plain values"""

    folder: Path
    pairs: int
    shard: int
    settings: dict
    entry_of: Callable[[float], int]  # a number in [0, 1) -> the mix's entry that a shard is of
    words: Callable[[int], str]  # pair -> its prompt

    def ranges(self) -> list[range]:
        return [range(s, min(s + self.shard, self.pairs)) for s in range(0, self.pairs, self.shard)]

    def path(self, numbers: range) -> Path:
        return self.folder / f"pairs-{numbers.start:06d}.safetensors"

    def entry(self, numbers: range) -> int:
        return self.entry_of((0.5 + GOLDEN * (numbers.start // self.shard)) % 1)

    def record(self, numbers: range) -> dict:
        """What a shard says about itself."""
        words = "\n".join(self.words(n) for n in numbers)
        return self.settings | {
            "first": numbers.start,
            "count": len(numbers),
            "entry": self.entry(numbers),
            "words": hashlib.sha256(words.encode()).hexdigest()[:16],
        }


def difference(made: dict | None, asked: dict, keys: Sequence[str] | None = None) -> str:
    """What differs between how something was made and what is asked for now; "" if nothing does."""
    made, asked = json.loads(json.dumps(made or {})), json.loads(json.dumps(asked))
    differ = [k for k in keys or asked if made.get(k) != asked[k]]
    return ", ".join(f"{k} is {made.get(k)!r}, not {asked[k]!r}" for k in differ)


# ---------------------------------------------------------------- making
Make = Callable[[int, range], dict[str, Tensor]]  # (entry of the mix, pairs) -> tensors


def missing_shards(where: Where) -> list[range]:
    """The shards that are not there or not whole. raises: UserError for one of another run"""
    listed, todo = {where.path(numbers) for numbers in where.ranges()}, []
    for path in shard_files(where.folder):
        if path not in listed:
            raise UserError(
                f"{path} is not one of {where.pairs} pairs in shards of {where.shard}: give the "
                "--pairs and --shard it was made with (--pairs may grow), or another --data"
            )
    for numbers in where.ranges():
        path = where.path(numbers)
        if not path.exists():
            todo.append(numbers)
            continue
        made, asked = read_tensors(path)[1] or {}, where.record(numbers)
        if wrong := difference(made, asked, list(where.settings)):
            raise UserError(f"{path} was made otherwise: {wrong}; delete it, or use another --data")
        if wrong := difference(made, asked):
            print(f"{path.name} is made again: {wrong}", flush=True)
            todo.append(numbers)
    return todo


def shard_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("pairs-*.safetensors") if not p.name.startswith("."))


def write_pairs(where: Where, todo: list[range], make: Make, micro: int, bar: tqdm) -> bool:
    """Make and write these shards, `micro` pairs at a time; False if a signal ended it."""
    with stop_signals() as stop:
        for numbers in todo:
            parts = []
            for a in range(numbers.start, numbers.stop, micro):
                some = range(a, min(a + micro, numbers.stop))
                made = make(where.entry(numbers), some)
                parts.append({name: x.half().cpu() for name, x in made.items()})
                bar.update(len(some))
                if stop() and some.stop < numbers.stop:
                    break
            else:
                _write_shard(where, numbers, parts)
            if stop():
                print(f"stopped; {where.folder} keeps its whole shards, run it again to go on")
                return False
    return True


def _write_shard(where: Where, numbers: range, parts: list[dict[str, Tensor]]) -> None:
    """raises: FloatingPointError for what a float16 does not hold"""
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise FloatingPointError(
                f"the teacher's {name} of pairs {numbers.start} to {numbers.stop - 1} are not "
                "finite; nothing was written for them"
            )
    write_safetensors(where.path(numbers), tensors, where.record(numbers))


def write_index(where: Where) -> None:
    """index.json: the hash of each shard."""
    shards = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in shard_files(where.folder)
    }
    with atomic(where.folder / "index.json") as tmp:
        tmp.write_text(json.dumps({"pairs": where.pairs, "shards": shards}, indent=1))
    print(f"wrote {len(shards)} shards and {where.folder / 'index.json'}")


# ---------------------------------------------------------------- reading
@dataclass(frozen=True)
class Pair:
    """Where a pair lies: its number, its shard's tensors (memory-mapped) and its row there."""

    number: int
    shard: dict[str, Tensor]
    row: int
    file: str


def read_pairs(
    folder: Path, settings: dict, words: Callable[[int], str], shapes: Callable[[int], dict]
) -> dict[int, list[Pair]]:
    """Entry of the mix -> its pairs.

    settings: those that must agree;  shapes: entry -> tensor -> its shape after the first axis
    raises: UserError where a shard is missing, damaged, or not what is asked for"""
    index = folder / "index.json"
    if not index.is_file():
        raise UserError(
            f"{index} does not exist: make pairs first, with --generate --data {folder}"
        )
    names = read_json(index).get("shards")
    if not names or not isinstance(names, dict) or not all(Path(n).name == n for n in names):
        raise UserError(f"{index} names no shards; delete it and run --generate again")
    if unlisted := {p.name for p in shard_files(folder)} - names.keys():
        raise UserError(f"{index} does not name {sorted(unlisted)[0]}; run --generate again")
    entries: dict[int, list[Pair]] = {}
    for name in sorted(names):
        tensors, made = read_tensors(folder / name)
        if not made or type(made.get("first")) is not int or type(made.get("entry")) is not int:
            raise UserError(f"{name} is not a shard of pairs; delete it and run --generate again")
        if wrong := difference(made, settings):
            raise UserError(
                f"{name} was made otherwise: {wrong}; give the same flags, or --data for others"
            )
        numbers = range(made["first"], made["first"] + made.get("count", 0))
        spoken = hashlib.sha256("\n".join(map(words, numbers)).encode()).hexdigest()[:16]
        if spoken != made.get("words"):
            raise UserError(
                f"{name} was made for other prompts than --prompts has at {numbers.start} to "
                f"{numbers.stop - 1}; give the same ones"
            )
        want = {k: (len(numbers), *shape) for k, shape in shapes(made["entry"]).items()}
        if {k: tuple(x.shape) for k, x in tensors.items()} != want:
            raise UserError(
                f"{name} does not hold what its plans leave behind, {want}; delete it and run "
                "--generate again"
            )
        rows = [Pair(n, tensors, row, name) for row, n in enumerate(numbers)]
        entries.setdefault(made["entry"], []).extend(rows)
    return entries


def check_shards(folder: Path, pairs: dict[int, list[Pair]], check: Callable[[int, Pair], str]):
    """Hashes, finite numbers, and what `check` finds wrong with a pair. raises: UserError"""
    index = read_json(folder / "index.json")["shards"]
    for name, digest in tqdm(index.items(), desc="check", unit="shard"):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise UserError(
                f"{name} is not the file that the index names (its hash differs); delete it and "
                "run --generate again"
            )
    for entry, some in pairs.items():
        for pair in some:
            lost = [k for k, x in pair.shard.items() if not x[pair.row].isfinite().all()]
            wrong = f"its {lost[0]} are not finite" if lost else check(entry, pair)
            if wrong:
                raise UserError(
                    f"pair {pair.number} in {pair.file}: {wrong}; delete that file and run "
                    "--generate again"
                )
