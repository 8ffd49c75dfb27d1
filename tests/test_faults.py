"""Machines fail: full disks, folders that cannot be written, killed processes, signals, hosts
that join, other thread counts.

The real scripts in processes of their own, at toy size. (Fifty kills at random moments,
checkpoint writing included: tests/kill.py.)"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ROOT, apart, rows, saved, tiny_checkpoints, tiny_dit

import train_dmd
from dit import load_dit

SMALL = {
    "latent": (6, 4, 4),
    "dtype": "float32",
    "batch": 4,
    "sheet_every": 0,
    "save_every": 1,
    "ratio": 2,
}
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny_checkpoints(tmp_path_factory.mktemp("start"))


def words(script: str, *switches: str, **flags: object) -> list[str]:
    """The command line of a script."""
    return [
        str(ROOT / script),
        *switches,
        *(
            str(w)
            for k, v in flags.items()
            for w in (f"--{k}", *(v if isinstance(v, tuple) else (v,)))
        ),
    ]


def dmd(paths: dict[str, str], out: Path, **changes: object) -> list[str]:
    """The command line of a small stage 2."""
    return words(
        "train_dmd.py",
        **SMALL
        | {
            "teacher": paths["teacher"],
            "critic": paths["student"],
            "student": paths["student"],
            "vae": paths["vae"],
            "out": out,
            "steps": 4,
        }
        | changes,
    )


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options]


def ended(
    command: list[str], timeout: float = 120, **settings: object
) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    return subprocess.run(
        [str(w) for w in command],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=timeout,
        **settings,
    )


def one_sentence(run: subprocess.CompletedProcess) -> str:
    """The sentence of a run that failed as it should: exit code 2, no traceback."""
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr[-2000:]
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    return line


# ---------------------------------------------------------------- disks
JOBS = {
    "train_ode.py": ("ode/student.safetensors", {"steps": 30, "save_every": 1}),
    "--generate": ("pairs", {"pairs": 64, "shard": 8}),
    "train_dmd.py": ("dmd/student.safetensors", {"steps": 30}),
}


def job(name: str, paths: dict[str, str], folder: Path, data: Path) -> list[str]:
    """The command of a job that writes into a folder."""
    if name == "train_dmd.py":
        return dmd(paths, folder / "dmd", **JOBS[name][1])
    flags = {
        "latent": (6, 4, 4),
        "dtype": "float32",
        "batch": 4,
        "teacher": paths["teacher"],
        "weights": paths["student"],
        "data": data,
        "out": folder / "ode",
    } | JOBS[name][1]
    return words("train_ode.py", *(["--generate"] if name == "--generate" else []), **flags)


@pytest.mark.parametrize("name", JOBS)
def test_full_disk(name, paths, tmp_path):
    """No file may pass 24 KB: one sentence that names the file, exit code 2, nothing
    half-written. With the limit gone the same command goes on and ends."""
    data = (
        tmp_path / "pairs"
        if name == "--generate"
        else paths["teacher"].replace("teacher.safetensors", "pairs")
    )
    if name == "train_ode.py":
        ended(
            [
                sys.executable,
                *words(
                    "train_ode.py",
                    "--generate",
                    latent=(6, 4, 4),
                    dtype="float32",
                    teacher=paths["teacher"],
                    weights=paths["student"],
                    data=data,
                    pairs=4,
                    shard=2,
                ),
            ]
        )
    command = [sys.executable, *job(name, paths, tmp_path, Path(data))]
    limited = [
        "sh",
        "-c",
        f'ulimit -f {6 if name == "--generate" else 24}; exec "$@"',
        "sh",
        *command,
    ]  # in blocks of 512 or 1024 bytes
    said = one_sentence(ended(limited))
    assert str(tmp_path) in said or "too large" in said.lower(), said
    assert not [
        p for p in tmp_path.rglob("*") if ".tmp" in p.name or p.suffix in (".pt", ".safetensors")
    ]
    assert ended(command).returncode == 0


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs the right to mount in a namespace of its own",
)
def test_full_and_read_only_file_systems(paths, tmp_path):
    """A real tmpfs that fills up while a state is written, then one mounted read-only: one
    sentence, and the last state is intact. Then, with half a line in the log, the same command
    goes on to its end."""
    disk, keep = tmp_path / "disk", tmp_path / "keep"
    disk.mkdir()
    keep.mkdir()
    first, more = (" ".join([sys.executable, *dmd(paths, disk / "dmd", steps=n)]) for n in (2, 9))
    script = f"""mount -t tmpfs -o size=4m tmpfs {disk}
        {first} > {keep}/first 2>&1 && cp -r {disk}/dmd {keep}/good
        head -c 100m /dev/zero > {disk}/ballast 2> /dev/null
        {more} > /dev/null 2> {keep}/full; echo $? >> {keep}/full; cp -r {disk}/dmd {keep}/after
        rm {disk}/ballast; mount -o remount,ro {disk}
        {more} > /dev/null 2> {keep}/readonly; echo $? >> {keep}/readonly
        mount -o remount,rw {disk}
        echo '{{"step": 2, "sec' >> {disk}/dmd/log.jsonl
        {more} > /dev/null && cp -r {disk}/dmd {keep}/end"""
    run = ended(["unshare", "-rm", "sh", "-c", script])
    for name, why in (("full", "No space left"), ("readonly", "Read-only")):
        lines = (keep / name).read_text().splitlines()
        assert lines[-1] == "2" and "Traceback" not in "".join(lines), (lines, run)
        assert [why in line for line in lines if line.startswith("error:")] == [True], lines
    good, after = saved(keep / "good"), saved(keep / "after")
    assert good["step"] == 2 == after["step"] and all(
        torch.equal(x, after[k]) for k, x in good.items() if isinstance(x, torch.Tensor)
    )
    assert not list((keep / "after").glob(".*"))
    assert saved(keep / "end")["step"] == 9 and [r["step"] for r in rows(keep / "end")] == list(
        range(9)
    )


# ---------------------------------------------------------------- processes
def python_workers(pid: int) -> list[int]:
    """The children of torchrun."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.xdist_group("torchrun")
def test_torchrun_restarts_a_killed_rank_by_itself(paths, tmp_path):
    """One of two ranks is killed in the middle; torchrun --max-restarts begins again, the
    scripts go on from the last state, and the weights are those of a run left alone, bit for
    bit."""
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=2", "--monitor-interval=0.2"]
    assert ended([*torchrun(*options), *dmd(paths, tmp_path / "alone", steps=12)]).returncode == 0
    out = tmp_path / "killed"
    with subprocess.Popen(
        [str(w) for w in (*torchrun(*options), *dmd(paths, out, steps=12))],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (out / "state.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(python_workers(process.pid)[-1], signal.SIGKILL)
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error[-2000:]
    assert apart(tmp_path / "alone", out) == 0


@pytest.mark.xdist_group("torchrun")
def test_two_hosts_are_one_job(paths, tmp_path):
    """Two agents that meet through torchrun's rendezvous, with two processes each, train what
    one process trains."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--nnodes=2",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
        "--rdzv-id=7",
        f"--rdzv-endpoint=127.0.0.1:{port}",
    ]
    agents = [
        subprocess.Popen(
            [str(w) for w in (*torchrun(*options), *dmd(paths, tmp_path / "hosts"))],
            env=ENV,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for agent in agents:
        error = agent.communicate(timeout=150)[1]
        assert agent.returncode == 0, error[-2000:]
    assert ended([sys.executable, *dmd(paths, tmp_path / "one")]).returncode == 0
    assert apart(tmp_path / "hosts", tmp_path / "one") <= 1e-5


@pytest.mark.xdist_group("torchrun")
def test_four_processes_make_the_pairs_of_one_and_go_on_as_one(paths, tmp_path):
    """7 pairs in shards of 2: no process count loses one or changes a byte. A stage-2 state of
    4 processes goes on with 1."""
    for n in (1, 4):
        flags = {
            "latent": (6, 4, 4),
            "dtype": "float32",
            "teacher": paths["teacher"],
            "weights": paths["student"],
            "pairs": 7,
            "shard": 2,
        }
        assert (
            ended(
                [
                    *torchrun("--standalone", f"--nproc_per_node={n}"),
                    *words("train_ode.py", "--generate", **flags, data=tmp_path / f"pairs{n}"),
                ]
            ).returncode
            == 0
        )
    names = sorted(p.name for p in (tmp_path / "pairs1").iterdir())
    assert len(names) == 5 and names == sorted(p.name for p in (tmp_path / "pairs4").iterdir())
    assert all(
        (tmp_path / "pairs1" / n).read_bytes() == (tmp_path / "pairs4" / n).read_bytes()
        for n in names
    )
    assert (
        ended(
            [
                *torchrun("--standalone", "--nproc_per_node=4"),
                *dmd(paths, tmp_path / "run", steps=2),
            ]
        ).returncode
        == 0
    )
    assert ended([sys.executable, *dmd(paths, tmp_path / "run")]).returncode == 0
    assert ended([sys.executable, *dmd(paths, tmp_path / "one")]).returncode == 0
    assert (
        saved(tmp_path / "run")["step"] == 4 and apart(tmp_path / "run", tmp_path / "one") <= 1e-5
    )


def test_sigterm_saves_within_ten_seconds(paths, tmp_path):
    """From the signal to a saved state and the end of the process."""
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, *dmd(paths, out, steps=10**6)],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not (out / "state.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
    assert time.monotonic() - began < 10 and saved(out)["step"] >= 1


# ---------------------------------------------------------------- numbers
def test_same_bits_again_and_on_other_thread_counts():
    """The same seed gives the same bits in another run; with another number of threads,
    rounding at most."""
    dit, threads = tiny_dit(3), torch.get_num_threads()
    z, text = (
        torch.randn(2, 6, dit.config.in_dim, 4, 4, generator=torch.Generator().manual_seed(1)),
        torch.zeros(2, 3, dit.config.text_dim),
    )
    out = {}
    for n in (1, 2, 4, 1):
        torch.set_num_threads(n)
        v = dit(z, torch.full((2, 6), 500.0), text, torch.arange(6))
        assert n not in out or torch.equal(out[n], v)
        out[n] = v
    torch.set_num_threads(threads)
    assert all((out[1] - out[n]).abs().max() <= 1e-6 for n in (2, 4))


def test_a_tiny_update_is_not_lost(paths, tmp_path):
    """Steps of 1e-8 with computation in bfloat16: the float32 masters move, the average too,
    and what is saved has them."""
    flags = SMALL | {
        "teacher": paths["teacher"],
        "critic": paths["student"],
        "student": paths["student"],
        "vae": paths["vae"],
    }
    train_dmd.main(
        train_dmd.Config(
            **flags
            | {
                "out": str(tmp_path),
                "steps": 4,
                "lr": 1e-8,
                "dtype": "bfloat16",
                "weight_decay": 0.0,
            }
        )
    )
    start, state = load_dit(paths["student"]).state_dict(), saved(tmp_path)
    for name, x in start.items():
        if x.abs().max() < 1e-2:  # below that a float32 holds steps of 1e-8 in any entry
            moved = (state[f"student0/{name}"] - x).abs()
            assert state[f"student0/{name}"].dtype == state[f"ema0/{name}"].dtype == torch.float32
            assert moved.max() > 5e-9 or not moved.any() and "cross_attn.k.bias" in name, name
    assert any((state[f"student0/{k}"] != x).any() for k, x in start.items())
