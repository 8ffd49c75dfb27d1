"""Kill tests: SIGKILL at random moments, again and again; the end is that of a run left alone.

Tiny networks, the real scripts, each in a process of its own that is killed after a random time
(start-up included, while pairs and resume states are written, too) until it ends by itself.
Then the weights must equal, bit for bit on a CPU, those of an uninterrupted run, and no
temporary file may be left or taken for good.

    python -m tests.kill --kills 50           # about 5 minutes on two cores
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import typing
from dataclasses import dataclass
from pathlib import Path

from lib.common import UserError, run
from tests.tiny import ROOT, apart, tiny_checkpoints

SMALL = "--latent 6 4 4 --dtype float32 --batch 4"


def jobs(folder: Path) -> dict[str, str]:
    """name -> command. Enough steps that most runs are killed in the middle; a state each step."""
    paths = tiny_checkpoints(Path(folder).parent / "start")
    ode = (
        f"train_ode.py {SMALL} --teacher {paths['teacher']} --weights {paths['student']} "
        f"--data {folder}/pairs --pairs 600 --shard 2"
    )
    dmd = (
        f"train_dmd.py {SMALL} --teacher {paths['teacher']} --critic {paths['student']} "
        f"--student {paths['student']} --vae {paths['vae']} --steps 250 --ratio 2 "
        f"--save_every 1 --sheet_every 0 --out {folder}"
    )
    return {
        "generate": f"{ode} --generate",
        "stage 1": f"{ode} --steps 600 --save_every 1 --out {folder}/ode",
        "stage 2": f"{dmd}/dmd",
        "stage 2, two processes": f"{dmd}/two",
    }


def launch(words: str, processes: int, errors: typing.TextIO) -> subprocess.Popen:
    """Start a script as a group of its own; what it says goes to a file, for a pipe that nobody
    reads fills up."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
    return subprocess.Popen(
        [sys.executable, *torchrun * (processes > 1), *words.split()],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def members(group: int) -> list[int]:
    """All processes that descend from one, itself last: torchrun puts its workers into sessions
    of their own."""
    children = Path(f"/proc/{group}/task/{group}/children")
    found = [int(c) for c in children.read_text().split()] if children.exists() else []
    return [pid for child in found for pid in members(child)] + [group]


def drive(name: str, command: str, done: Path, kill: bool, r: random.Random) -> int:
    """Run a job to its end, killing it 3 to 7 seconds after each start, if at all; how many
    kills it took."""
    struck, processes = 0, 2 if "two" in name else 1
    while not done.exists():
        errors = tempfile.TemporaryFile("w+")
        job = launch(command, processes, errors)
        limit = r.uniform(3, 7) if kill and struck < 40 else 600.0
        began = time.monotonic()
        while job.poll() is None and time.monotonic() - began < limit:
            time.sleep(0.02)
        if job.poll() is None:
            for pid in members(job.pid):
                os.kill(pid, signal.SIGKILL)
            job.wait()
            struck += 1
        elif job.returncode:
            errors.seek(0)
            raise UserError(
                f"{name} failed after {struck} kills: {errors.read().strip().splitlines()[-1]}"
            )
        errors.close()
    return struck


@dataclass
class Config:
    """Kill and go on."""

    kills: int = 50
    seed: int = 0


OUT = {"generate": "pairs", "stage 1": "ode", "stage 2": "dmd", "stage 2, two processes": "two"}


def compare(alone: Path, folder: Path) -> None:
    """Weights and pairs must be those of the run left alone, and nothing else may be left."""
    for name in ("ode", "dmd", "two"):
        if (far := apart(alone / name, folder / name)) > 0:
            raise UserError(f"{name}: the killed run differs by {far} from the one left alone")
    for path in (alone / "pairs").iterdir():
        if path.read_bytes() != (folder / "pairs" / path.name).read_bytes():
            raise UserError(f"{path.name} differs from the one of the run left alone")
    if left := list(folder.rglob(".*.tmp*")):
        raise UserError(f"{left[0]} was left by a process that was killed")


def main(config: Config) -> None:
    r, total, rounds = random.Random(config.seed), 0, 0  # round 0 is left alone
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "start").mkdir()
        while total < config.kills or not rounds:
            folder, kind = Path(root) / str(rounds), "killed" if rounds else "left alone"
            for name, command in jobs(folder).items():
                last = "index.json" if name == "generate" else "student.safetensors"
                struck = drive(name, command, folder / OUT[name] / last, rounds > 0, r)
                total += struck
                print(f"{kind}, {name}: done after {struck} kills", flush=True)
            compare(Path(root) / "0", folder)
            rounds += 1
    print(f"{total} kills; all weights and pairs are those of the runs left alone, bit for bit")


if __name__ == "__main__":
    run(main, Config)
