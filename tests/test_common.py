"""Plumbing: the command line, processes, random numbers, files that are whole or absent."""

import dataclasses
import json
import os
import signal
import socket
import stat
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import common
from lib.common import UserError, atomic, check_out, fingerprint, from_cli, generator
from lib.training import EMA, clip_gradients, computing, cosine, inference, log_row, trapezoid
from tools import reconstruct


# ---------------------------------------------------------------- command line
@dataclasses.dataclass
class Config:
    """A script for these tests."""

    RANGES = {
        "learning_rate": (0, 1),
        "steps": (1, None),
        "size": (1, 64, 2),
        "how": ("ddp", "fsdp"),
    }
    clip: str  # which clip to read
    learning_rate: float = 1e-3  # of the optimizer
    steps: int = 5  # how many
    compile: bool = False  # be fast
    size: tuple[int, ...] = ()  # height width
    prompts: tuple[str, ...] = ()  # what to show
    note: str | None = None  # anything
    how: str = "ddp"  # of two ways
    levels: tuple[int, ...] = (
        3,
        2,
    )  # a broken-up field has its comment here
    seed: int = 0
    shift: float = 5.0
    vae: str = "vae.safetensors"
    out: str = ""


def cli(line, cls=Config):
    return from_cli(cls, line.split())


def refusal(line):
    with pytest.raises(UserError) as error:
        cli(line)
    return str(error.value)


def test_flags_take_the_type_of_their_field():
    """Values arrive as the types the dataclass states, absent ones as its defaults."""
    assert cli("--clip a.mp4") == Config("a.mp4")
    got = cli("--clip 7 --learning-rate 1 --steps 3 --compile --size 32 48 --note 5")
    assert got == Config("7", 1.0, 3, True, (32, 48), note="5")
    kinds = [type(x) for x in (got.learning_rate, got.steps, got.clip, got.note)]
    assert kinds == [float, int, str, str]
    assert cli("--clip a --note -1e-4").note == "-1e-4"


def test_spellings_of_a_flag_are_the_same():
    """`--a-b v`, `--a_b v` and `--a_b=v` mean one thing; only the first `=` separates."""
    assert (
        cli("--clip a --learning-rate 1")
        == cli("--clip a --learning_rate 1")
        == cli("--learning-rate=1 --clip=a")
    )
    assert cli("--clip=b=c").clip == "b=c"
    assert cli("--clip=a --vae=").vae == ""
    assert from_cli(Config, ["--clip=a red square", "--note="]) == Config("a red square", note="")
    assert [
        cli(f"--clip a {f}").compile for f in ("--compile", "--compile true", "--compile=False")
    ] == [True, True, False]


def test_tuple_field_takes_words_up_to_the_next_flag():
    """`--size 32 48 --steps 1` gives two numbers to size and one to steps."""
    assert cli("--clip a --size 32 48 --steps 1") == Config("a", steps=1, size=(32, 48))
    words = ["--clip", "a", "--prompts", "a red square", "a wave"]
    assert from_cli(Config, words).prompts == ("a red square", "a wave")
    assert cli("--clip a --prompts=one").prompts == ("one",)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--clip a --step 3", ["'--step'", "did you mean --steps?"]),
        ("--clip a --learning-rat=3", ["'--learning-rat'", "did you mean --learning_rate?"]),
        ("--clip a --zzzzzz 1", ["'--zzzzzz'", "--help"]),
        ("a.mp4", ["'a.mp4'", "--help"]),
        ("--clip a --steps 1 --steps 2", ["--steps is given twice"]),
        ("--clip a --learning-rate 1 --learning_rate=2", ["--learning_rate is given twice"]),
        ("--clip a --steps many", ["--steps", "whole number", "'many'"]),
        ("--clip a --steps 2.5", ["--steps", "whole number", "'2.5'"]),
        ("--clip a --learning-rate fast", ["--learning_rate", "needs a number", "'fast'"]),
        ("--clip a --compile maybe", ["--compile is true or false", "'maybe'"]),
        ("--clip a --size 32 x", ["--size", "whole number", "'x'"]),
        ("--clip a --steps 1 2", ["--steps takes one value, got 2: 1 2"]),
        ("--clip --steps 1", ["--clip takes one value, got 0"]),
        ("--steps 1", ["missing --clip"]),
        ("--clip a --steps 0", ["--steps 0 must be at least 1"]),
        ("--clip a --learning-rate -1e-3", ["--learning_rate -0.001 must be from 0 to 1"]),
        ("--clip a --learning-rate nan", ["--learning_rate nan must be finite"]),
        ("--clip a --learning-rate 1e999", ["--learning_rate inf must be finite"]),
        ("--clip a --size 32 0", ["--size 32 0 must be from 1 to 64"]),
        ("--clip a --size 32 65", ["--size 32 65 must be from 1 to 64"]),
        ("--clip a --size 32", ["--size takes 2 numbers, got 1: 32"]),
        ("--clip a --size", ["--size takes 2 numbers, got 0: nothing"]),
        ("--clip a --prompts", ["--prompts is empty; give it a value"]),
        ("--clip a --how dpp", ["--how 'dpp' must be ddp or fsdp"]),
        ("--clip=", ["--clip is empty; give it a value"]),
        ("--clip a --out=", ["--out is empty; give it a value"]),
        ("--clip a --shift 0", ["--shift 0.0 must be from 0.1 to 100"]),
        ("--clip a --seed -1", ["--seed -1 must be from 0 to 4294967295"]),
        ("--clip a --seed 4294967296", ["--seed 4294967296 must be from 0 to 4294967295"]),
    ],
)
def test_mistaken_flag_is_named_with_its_value(line, words):
    """A mistake on the command line names the flag, what was given and the nearest right thing."""
    text = refusal(line)
    assert all(w in text for w in words) and "\n" not in text


def test_home_is_expanded_where_a_shell_leaves_it(monkeypatch):
    """`--clip=~/a.mp4` is a file at home; a `~` elsewhere is the user's."""
    monkeypatch.setenv("HOME", "/somewhere/mine")
    assert cli("--clip=~/a.mp4 --note=a~/b").clip == "/somewhere/mine/a.mp4"
    assert cli("--clip=x --note=a~/b").note == "a~/b"


WORDS = [
    "--clip",
    "--clip=",
    "--steps",
    "--size",
    "--compile",
    "--note",
    "--",
    "--=",
    "-1",
    "a",
    "1e999",
    "nan",
    "",
    "-h",
]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=6))
def test_any_command_line_is_a_config_or_a_user_error(words):
    """No words give a traceback."""
    try:
        assert isinstance(from_cli(Config, words), Config)
    except UserError:
        pass
    except SystemExit:
        assert {"-h", "--help"} & set(words)


@pytest.mark.parametrize("cls", [Config, reconstruct.Config])
def test_help_lists_every_field_with_its_comment(cls, capsys):
    """--help is whole: purpose, and for each flag its comment and its default."""
    with pytest.raises(SystemExit) as stop:
        from_cli(cls, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and cls.__doc__ in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  --")}
    for f in dataclasses.fields(cls):
        end = "[required]" if f.default is dataclasses.MISSING else f"[{f.default}]"
        comment = rows[f"--{f.name}"].removeprefix(f"  --{f.name}").removesuffix(end)
        assert comment.strip() or f.name in ("seed", "shift", "vae", "out"), f.name
    if cls is Config:
        assert "of the optimizer  [0.001]" in text and "which clip to read  [required]" in text
        assert "a broken-up field has its comment here  [(3, 2)]" in text


def raises(error):
    def main(config):
        raise error

    return main


@pytest.mark.parametrize(
    "main, argv, code, line",
    [
        (lambda c: None, ["--clip", "a"], None, ""),
        (lambda c: None, [], 2, "error: missing --clip\n"),
        (raises(UserError("first\nsecond")), ["--clip", "a"], 2, "error: first second\n"),
        (
            raises(FileNotFoundError(2, "No such file", "x.mp4")),
            ["--clip", "a"],
            2,
            "error: [Errno 2] No such file: 'x.mp4'\n",
        ),
        (raises(KeyboardInterrupt()), ["--clip", "a"], 130, "interrupted\n"),
        (raises(common.Terminated()), ["--clip", "a"], 143, "interrupted\n"),
        (
            raises(FloatingPointError("the loss\nis nan")),
            ["--clip", "a"],
            1,
            "error: the loss is nan\n",
        ),
    ],
)
def test_run_turns_a_mistake_into_one_line_and_a_code(main, argv, code, line, monkeypatch, capsys):
    """The user's mistakes end with code 2 and one line, Ctrl-C with 130, SIGTERM with 143."""
    monkeypatch.setattr("sys.argv", ["script.py", *argv])
    if code is None:
        common.run(main, Config)
    else:
        with pytest.raises(SystemExit) as stop:
            common.run(main, Config)
        assert stop.value.code == code
    assert capsys.readouterr().err == line


def no_memory(config):
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("main", [no_memory, raises(MemoryError()), lambda c: torch.empty(1 << 62)])
def test_too_little_memory_is_one_line(main, monkeypatch, capsys):
    """What does not fit ends with code 1 and what to make smaller."""
    monkeypatch.setattr("sys.argv", ["script.py", "--clip", "a"])
    with pytest.raises(SystemExit) as stop:
        common.run(main, Config)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("error: out of memory; a smaller --batch")


def test_run_does_not_hide_a_bug(monkeypatch):
    """What is not the user's mistake keeps its traceback."""
    monkeypatch.setattr("sys.argv", ["script.py", "--clip", "a"])
    with pytest.raises(ZeroDivisionError):
        common.run(lambda config: 1 / 0, Config)


# ---------------------------------------------------------------- processes, randomness
@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_one_process_is_rank_0_of_1(alone):
    """Without torchrun a script is a world of one and joins no process group."""
    assert common.start() == common.start("cpu") == (0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "names",
    ["RANK=0", "RANK=", "WORLD_SIZE=2", "RANK=0 WORLD_SIZE=2", "MASTER_ADDR=a MASTER_PORT=1"],
)
def test_some_of_torchruns_variables_are_not_believed(names, alone, monkeypatch, capsys):
    """Schedulers set some of them: what is set is named, and the script is one process."""
    there = dict(word.split("=") for word in names.split())
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert common.start() == (0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    said = capsys.readouterr().out
    assert all(name in said for name in there if there[name]) and bool(said) == (names != "RANK=")


@pytest.mark.parametrize("rank, world", [("2", "2"), ("x", "2"), ("0", "-1"), ("0", "0")])
def test_variables_of_no_job_are_refused(rank, world, alone, monkeypatch):
    """All there, but they name no process of a job."""
    values = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"RANK={rank} and WORLD_SIZE={world} name no process"):
        common.start()


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("MASTER_PORT", "ib0", "MASTER_PORT=ib0 is no number; unset it"),
        ("LOCAL_RANK", "x", "LOCAL_RANK=x is no number; unset it"),
        ("LOCAL_RANK", "3", "LOCAL_RANK=3, but torch sees 2 GPU; start fewer processes"),
    ],
)
def test_other_variables_are_checked_too(name, value, says, alone, monkeypatch):
    """What is no number; more processes than GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    values = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, text in (values | {name: value}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(UserError, match=says):
        common.start()


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("RANK", "0", "do not meet .*1/2 clients joined"),
        ("RANK", "1", "do not meet .*timed out"),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999: the processes of this job do not meet"),
    ],
)
def test_a_job_whose_processes_do_not_meet(name, value, says, alone, monkeypatch):
    """Nobody else comes, or nobody answers: one sentence after a while, with what was set."""
    monkeypatch.setattr(common, "MEETING", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, text in (values | {name: value}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(UserError, match=says):
        common.start("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "gpu"])
def test_absent_device_is_a_user_error(alone, device):
    """A device that does not exist is named, with one that does."""
    with pytest.raises(UserError, match=f"{device}.*cpu"):
        common.start(device)


def draw(*numbers):
    return torch.randn(4, generator=generator(*numbers)).tolist()


def test_generator_is_a_function_of_its_numbers():
    """The same numbers give the same draws, whatever the global state."""
    torch.manual_seed(1)
    first = draw(3, 1, 4)
    torch.manual_seed(2)
    assert draw(3, 1, 4) == first
    assert generator(0).initial_seed() >= 0 and draw(~2, 0) != draw(2, 0)  # dummies are negative


def test_generator_depends_on_every_number_and_the_order():
    """No two of 5 ** 4 short tuples and their permutations share a stream."""
    seeds = {
        generator(a, b, c, d).initial_seed()
        for a in range(-2, 3)
        for b in range(5)
        for c in range(5)
        for d in range(5)
    }
    assert len(seeds) == 5**4
    assert len({generator(*[7 * (i == j) for j in range(6)]).initial_seed() for i in range(6)}) == 6


def test_generator_depends_on_how_many_numbers():
    """Numbers at the end make another stream, unless they are zero (which the docstring says)."""
    assert (
        draw(1) != draw(1, 1) != draw(1, 1, 1)
        and draw(1, 2, 3, 4, 0) != draw(1, 2, 3, 4)
        and draw(1, 0) == draw(1)
    )


def test_signal_is_a_flag_within_the_block():
    """SIGINT and SIGTERM let the step finish; afterwards the old handlers are back."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for s in (signal.SIGINT, signal.SIGTERM):
        with common.stop_signals() as stop:
            assert not stop()
            os.kill(os.getpid(), s)
            assert stop() == s
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_stopped_command_ends_with_its_signal():
    """128 and the signal, as a shell has it; another process's signal counts as SIGTERM."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (0, 143)):
        with pytest.raises(SystemExit, match=f"^{code}$"):
            common.end_stopped(number)


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    """The first lets what is at hand finish, the second does not; SIGTERM may come often, and what
    comes within a second (torchrun hands the terminal's on) is the first again."""
    now = [5.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    with common.stop_signals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 0.9
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == signal.SIGTERM
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# ---------------------------------------------------------------- files that are whole or absent
def test_atomic_replaces_on_success(tmp_path):
    """The old content stays until the block ends; then the new is there, and nothing else."""
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with atomic(path) as tmp:
            assert tmp.parent == path.parent and tmp.suffix == ".txt"
            tmp.write_text(text)
            assert not path.exists() if text == "one" else path.read_text() == "one"
    assert path.read_text() == "two" and os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_atomic_respects_the_umask(mask, mode, tmp_path):
    """A file's rights are those that the user's umask leaves."""
    old = os.umask(mask)
    try:
        with atomic(tmp_path / "a") as tmp:
            tmp.write_text("x")
            tmp.chmod(0o600)  # as safetensors does
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_atomic_where_rights_cannot_be_set(tmp_path, monkeypatch):
    """Some mounts refuse chmod: the file is there all the same."""

    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    with atomic(tmp_path / "a") as tmp:
        tmp.write_text("x")
    assert (tmp_path / "a").read_text() == "x"


def test_atomic_removes_what_a_killed_process_left(tmp_path):
    """Temporaries of processes that are gone go, of this file alone; those of living ones stay."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / f".a [1].{common.HOST}.{gone.pid}.tmp.pt").touch()
    stay = {f".a [1].{common.HOST}.{os.getppid()}.tmp.pt", f".b.{common.HOST}.{gone.pid}.tmp.pt"}
    stay |= {f".a [1].elsewhere.{gone.pid}.tmp.pt"}
    for name in stay:
        (tmp_path / name).touch()
    with atomic(tmp_path / "a [1].pt") as tmp:
        tmp.write_text("x")
    assert {p.name for p in tmp_path.iterdir()} == stay | {"a [1].pt"}


@pytest.mark.parametrize(
    "path, options, says",
    [
        ("", {}, "--out is empty; name a file"),
        (" ", {"folder": True}, "--out is empty; name a folder"),
        ("folder", {}, "--out .*folder is a folder; name a file in it"),
        ("file", {"folder": True}, "--out .*file is a file; name a folder"),
        ("file/a/b.mp4", {}, "cannot be made: .*file is a file, not a folder"),
        ("file", {"inputs": ["~/file"]}, "is also what is read; name another file"),
        ("file", {"inputs": ["link"]}, "is also what is read; name another file"),
        ("closed/new/a.mp4", {"flag": "sheet"}, "--sheet .*closed is Read-only or not yours"),
    ],
)
def test_a_place_that_cannot_be_one_is_refused_first(path, options, says, tmp_path, monkeypatch):
    """Folders, the empty name, the input itself, what may not be written: before any work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("folder", "closed"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    monkeypatch.setattr(
        os, "access", lambda place, how: place.name != "closed"
    )  # tests may be root
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says):
        check_out(path, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_can_be_one_is_left_alone(tmp_path, monkeypatch):
    """New files in new folders, old files, old folders; `~` is home; nothing is made yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "old").touch()
    for path, folder in (("~/new/deep/a.mp4", False), ("~/old", False), ("~/x", True), ("~", True)):
        assert check_out(path, folder=folder) == Path(path.replace("~", str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_fingerprint_is_of_the_weights_alone():
    """Order and memory do not matter; another training, shape, type or name does."""
    a = {"x": torch.randn(3000, 2, generator=generator(1)), "y": torch.tensor(1.0)}
    same = [dict(reversed(a.items())), {"y": a["y"], "x": a["x"].t().contiguous().t()}]
    other = [
        {"x": a["x"] + 1e-6, "y": a["y"]},
        {"x": a["x"].view(2, 3000), "y": a["y"]},
        {"x": a["x"].half(), "y": a["y"]},
        {"x": a["x"], "z": a["y"]},
    ]
    assert all(fingerprint(b) == fingerprint(a) for b in same)
    assert len({fingerprint(b) for b in (a, *other)}) == 5


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_failure_leaves_what_was_there(tmp_path, error):
    """A failed write leaves no file, or the old one, and no temporary."""
    for old in (None, "old"):
        if old:
            (tmp_path / "a.txt").write_text(old)
        with pytest.raises(error):
            with atomic(tmp_path / "a.txt") as tmp:
                tmp.write_text("half")
                raise error
        assert os.listdir(tmp_path) == (["a.txt"] if old else [])
        assert not old or (tmp_path / "a.txt").read_text() == old


# ---------------------------------------------------------------- training helpers
def test_ema_does_not_lose_a_tiny_update():
    """The average of a bfloat16 parameter is the float32 formula, though a step is far below
    bfloat16's resolution."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    ema, expected = EMA(model, 0.999), 1.0
    torch.nn.init.constant_(model.weight, 1 + 2**-7)  # the next bfloat16
    for _ in range(100):
        ema.update(model)
        expected = 0.999 * expected + 0.001 * (1 + 2**-7)
    shadow = ema.shadow["weight"]
    assert (
        shadow.dtype == torch.float32
        and abs(shadow.item() - expected) < 1e-6
        and expected - 1 > 7e-4
    )
    assert not shadow.requires_grad and model.weight.item() == 1 + 2**-7  # the model is only read


def test_rates_by_hand():
    """Warm-up over 2 of 8 steps, constant, falling over the last half; beyond the plan the last."""
    made = [trapezoid(step, 8, 1.0, 2, 0.5) for step in range(10)]
    assert made == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert [trapezoid(step, 4, 2.0, 0, 0.0) for step in range(4)] == [2.0] * 4
    assert cosine(0, 100, 1.0, 10) == 0.1 and cosine(50, 100, 1.0, 10) == pytest.approx(0.5)
    assert cosine(200, 100, 1.0, 10) == 0.0


@pytest.mark.parametrize("limit, after", [(1.0, 1.0), (0.0, 5.0), (10.0, 5.0)])
def test_gradients_are_clipped_unless_the_limit_is_0(limit, after):
    """A gradient of norm 5: clipped to 1; not at all; not reached."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(layer, limit, "step 0") == 5.0
    assert layer.weight.grad.norm().item() == pytest.approx(after, rel=1e-5)


def test_log_row_appends_lines_of_json(tmp_path):
    """Each row is one JSON line behind the earlier ones."""
    rows = [{"step": 1, "loss": 0.5, "what": "two\nlines"}, {"step": 2, "loss": 1e-9}]
    for row in rows:
        log_row(tmp_path / "log.jsonl", **row)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows


def test_inference_casts_once_and_leaves_nothing_behind():
    """Within it a weight is cast once; after it the same weight gets its gradient, which a cast
    that was kept would swallow."""
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with computing(torch.bfloat16, torch.device("cpu")):
        with inference():
            y = layer(x)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                assert torch.equal(layer(x), y) and not y.requires_grad
        assert not torch.is_autocast_cache_enabled()
        layer(x).sum().backward()
    assert sum(e.count for e in seen.key_averages() if e.key == "aten::_to_copy") == 1  # of x alone
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
