"""The first hour on a GPU in one command: is everything right there, how fast is it, where does the
time go?

Parts run in order, each in a process of its own, so that a crash, a hang or a full memory costs one
part and no more. Every part ends in one line: OK with what was found, skipped with the reason, or
FAILED with one sentence. What is done stays done: run the same command again and it goes on where
it stopped, as long as machine, code and size are the same.

    python -m tools.gpu                        # about 25 minutes on one H100; writes out/gpu
    python -m tools.gpu --only orders          # one part, again
    python -m tools.gpu --size toy             # the same on a CPU, in two minutes
    python -m tools.gpu --fill docs/speed.md --report out/gpu/report.json     # into its table
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dit import PRESETS
from lib.common import UserError, atomic, run, start
from lib.report import markdown
from tests import gpu_checks as checks
from tools import gpu_speed as speed
from tools.bench import name_of
from tools.gpu_speed import ROOT, Found, Room, Skipped, Wrong
from vae import PRESETS as VAES

CELL = re.compile(r"\| *([^|]*?) *<!-- gpu: ([^>]*?) -->")  # a cell that a report fills

PARTS: dict[str, tuple[Callable[[Room], Found], int]] = {  # in order; seconds that each may take
    "machine": (speed.machine, 60),
    "tests": (checks.cuda_tests, 240),
    "attention": (checks.attention, 240),
    "precision": (checks.precision, 90),
    "compile": (checks.compiled, 300),
    "step": (speed.step, 60),
    "vae": (speed.decoding, 90),
    "orders": (speed.orders, 420),
    "long": (speed.long_video, 150),
    "diffusers": (speed.peers, 150),
    "training": (speed.training, 180),
    "training-14b": (partial(speed.training, large=True), 180),
    "script": (speed.script, 240),
    "profile": (speed.profile, 90),
}
SIZES = {
    "full": partial(
        Room,
        c=PRESETS["wan1.3b"],
        teacher=PRESETS["wan14b"],
        vae=VAES["wan"],
        size=(480, 832),
        runs=3,
        latents=21,
    ),
    "toy": partial(
        Room,
        c=replace(PRESETS["toy"], num_layers=2),
        teacher=PRESETS["toy"],
        vae=VAES["toy"],
        size=(32, 32),
        runs=1,
        latents=9,
    ),
}


@dataclass
class Config:
    """Check and measure everything on this machine."""

    RANGES = {"size": ("auto", *SIZES), "only": tuple(PARTS), "runs": (0, 1000)}
    size: str = "auto"  # full (Wan2.1 1.3B, 480 x 832), toy, or auto: full on CUDA
    only: tuple[str, ...] = ()  # these parts alone, done or not
    out: str = "out/gpu"  # report.md, report.json, trace.json.gz, and a log of every part
    runs: int = 0  # timed repetitions; 0: as many as suit the size; 1 takes half the time
    minutes: float = 25.0  # for all parts; what is left over waits for the next call
    device: str = "auto"  # cpu, cuda or auto
    here: bool = False  # run parts in this process instead of one process each
    fill: str = ""  # a page: put the numbers of --report into its table, and run nothing
    report: str = ""  # of --fill: the report.json of a full run


# ---------------------------------------------------------------- what a result belongs to
def room_of(config: Config) -> Room:
    """Device and sizes. raises: UserError for a device that is not here"""
    device = start(config.device)[2]
    auto = "full" if device.type == "cuda" else "toy"
    room = SIZES[auto if config.size == "auto" else config.size](device, Path(config.out))
    return replace(room, runs=config.runs or room.runs)


def code() -> str:
    """Which code this is: a hash of its files, and the commit where git tells it."""
    folders = [ROOT / name for name in ("", "lib", "tools", "toy", "tests")]
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:10]
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return digest  # GPU: no git on some rented machines
    return f"{commit} {digest}".strip()


def key_of(room: Room) -> dict[str, str]:
    """What must be the same for a result to count again."""
    return {
        "machine": f"{name_of(room.device)}, torch {torch.__version__}",
        "code": code(),
        "size": "full" if room.c == PRESETS["wan1.3b"] else "toy",
        "device": room.device.type,
    }


# ---------------------------------------------------------------- one part
def result_of(name: str, room: Room) -> dict:
    """Run a part in this process; whatever happens becomes a result."""
    began = time.perf_counter()
    try:
        with torch.no_grad():
            found, status = PARTS[name][0](room), "OK"
    except Skipped as reason:
        found, status = Found(str(reason)), "skipped"
    except Wrong as sentence:
        found, status = Found(str(sentence)), "FAILED"
    except Exception as error:  # of any kind: it must not cost the other parts
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        found, status = Found(f"{type(error).__name__}: {first}"), "FAILED"
    return {"status": status, "seconds": time.perf_counter() - began, **asdict(found)}


def in_its_own_process(name: str, config: Config, room: Room, limit: float) -> dict:
    """Run a part in a new process, for so many seconds at most, with a log of its own."""
    log, began = room.out / f"{name}.log", time.perf_counter()
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as many as here
    command = [sys.executable, "-m", "tools.gpu", "--here", "--only", name, "--out", config.out]
    command += ["--size", config.size, "--device", config.device, "--runs", str(config.runs)]
    with open(log, "w") as file:
        where = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": env}
        # in a session of its own, so that it can be ended with all that it starts
        process = subprocess.Popen(command, start_new_session=True, **where)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return failed(f"took more than {limit:.0f} s; see {log}", began)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        return failed(f"its process ended with {process.returncode}; see {log}", began)
    return read(room)[name]


def failed(sentence: str, began: float) -> dict:
    """A result that a part could not write itself."""
    row = {"status": "FAILED", "seconds": time.perf_counter() - began}
    return row | asdict(Found(sentence))


# ---------------------------------------------------------------- what is kept
def read(room: Room) -> dict[str, dict]:
    """Results of earlier calls that still count: of this code, machine and size."""
    path, key = room.out / "parts.json", key_of(room)
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text())
        return {name: row for name, row in kept.items() if row["key"] == key}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; move it away to start again") from None


def keep(room: Room, name: str, result: dict) -> None:
    """Write a result beside the others."""
    rows = read(room) | {name: result | {"key": key_of(room)}}
    with atomic(room.out / "parts.json") as tmp:
        tmp.write_text(json.dumps(rows, indent=1))


def line_of(name: str, row: dict) -> str:
    """A part's result in one line."""
    return f"{name:<13} {row['status']:<8} {row['seconds']:6.1f} s   {row['line']}"


def write_report(room: Room) -> None:
    """report.md and report.json, of all parts that count, in their order."""
    rows, key = read(room), key_of(room)
    rows = {name: rows[name] for name in PARTS if name in rows}
    values = {k: v for row in rows.values() for k, v in row["values"].items()}
    with atomic(room.out / "report.json") as tmp:
        tmp.write_text(json.dumps(key | {"values": values, "parts": rows}, indent=1))
    shown = {
        name: {"result": row["status"], "s": f"{row['seconds']:.0f}", "found": row["line"]}
        for name, row in rows.items()
    }
    lines = ["# What this machine does", "", f"{key['machine']}; code {key['code']}; {key['size']}"]
    lines += ["", markdown(shown)]
    for name, row in rows.items():
        lines += ["", f"## {name}", "", markdown(row["table"])] if row["table"] else []
    with atomic(room.out / "report.md") as tmp:
        tmp.write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------- filling a page
def fill(page: str, report: str) -> None:
    """Put a full report's numbers into the cells of a page that are marked `<!-- gpu: name -->`.

    raises: UserError for a report that is not of a GPU at full size, or a page without cells"""
    for path in (page, report):
        if not Path(path).is_file():
            raise UserError(f"{path or '--report'} is not a file; give --fill PAGE --report JSON")
    try:
        found = json.loads(Path(report).read_text())
        size, device, values = found["size"], found["device"], found["values"]
        values |= {"machine": found["machine"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{report} is not a report of tools.gpu") from None
    if (size, device) != ("full", "cuda"):
        raise UserError(f"{report} is of size {size} on {device}; the table is for full on cuda")
    text, done, left = Path(page).read_text(), [], []

    def cell(match: re.Match) -> str:
        old, name = match.groups()
        (done if name in values else left).append(name)
        value = values.get(name, old)
        value = f"{value:.3g}" if isinstance(value, float | int) else value
        return f"| {value} <!-- gpu: {name} -->"

    text = CELL.sub(cell, text)
    if not done + left:
        raise UserError(f"{page} has no cells marked <!-- gpu: name -->")
    with atomic(page) as tmp:
        tmp.write_text(text)
    print(f"filled {len(done)} cells of {page}; without a number: {', '.join(left) or 'none'}")


# ---------------------------------------------------------------- all of it
def main(config: Config) -> None:
    if config.fill or config.report:
        fill(config.fill, config.report)
        return
    room, began = room_of(config), time.perf_counter()
    room.out.mkdir(parents=True, exist_ok=True)
    for name in config.only or PARTS:
        earlier = read(room).get(name, {"status": ""})
        if earlier["status"] == "OK" and not config.only:
            print(line_of(name, earlier) + " (from an earlier call)")
            continue
        left = 60 * config.minutes - (time.perf_counter() - began)
        if left < 10:
            print(f"{name:<13} not begun: {config.minutes:g} minutes are over; run it again")
            continue
        if config.here:
            result = result_of(name, room)
        else:
            result = in_its_own_process(name, config, room, min(left, PARTS[name][1]))
        keep(room, name, result)
        print(line_of(name, result), flush=True)
    write_report(room)
    print(f"wrote {room.out / 'report.md'}")


if __name__ == "__main__":
    run(main, Config)
