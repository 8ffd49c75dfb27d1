"""Plumbing: the command line, files that are whole or absent, averages and generators."""

import dataclasses
import json
import os
import signal
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sampler
import vae
from lib import common
from lib.common import UserError, atomic, from_cli, generator
from lib.training import EMA, computing, inference, log_row


# ---------------------------------------------------------------- command line
@dataclasses.dataclass
class Config:
    """A script for these tests."""

    clip: str  # which clip to read
    learning_rate: float = 1e-3  # of the optimizer
    steps: int = 5  # how many
    compile: bool = False  # be fast
    size: tuple[int, ...] = ()  # height width
    note: str | None = None  # anything


def cli(line, cls=Config):
    return from_cli(cls, line.split())


def refusal(line):
    with pytest.raises(UserError) as error:
        cli(line)
    return str(error.value)


def test_flags_take_the_type_of_their_field():
    """Values arrive as the types the dataclass states, absent ones as its defaults."""
    assert cli("--clip a.mp4") == Config("a.mp4")
    got = cli("--clip 7 --learning-rate 2 --steps -3 --compile --size 32 48 --note 5")
    assert got == Config("7", 2.0, -3, True, (32, 48), "5")
    assert (type(got.learning_rate), type(got.steps), type(got.clip), type(got.note)) == (
        float,
        int,
        str,
        str,
    )
    assert cli("--clip a --learning-rate -1e-4").learning_rate == -1e-4


def test_spellings_of_a_flag_are_the_same():
    """`--a-b v`, `--a_b v` and `--a_b=v` mean one thing; only the first `=` separates."""
    assert (
        cli("--clip a --learning-rate 3")
        == cli("--clip a --learning_rate 3")
        == cli("--learning-rate=3 --clip=a")
    )
    assert cli("--clip=b=c").clip == "b=c"
    assert from_cli(Config, ["--clip=a red square", "--note="]) == Config("a red square", note="")
    assert [
        cli(f"--clip a {f}").compile for f in ("--compile", "--compile true", "--compile=False")
    ] == [True, True, False]


def test_tuple_field_takes_words_up_to_the_next_flag():
    """`--size 32 48 --steps 1` gives two numbers to size and one to steps; `--size=32` gives one."""
    assert cli("--clip a --size 32 48 --steps 1") == Config("a", steps=1, size=(32, 48))
    assert cli("--clip a --size=32").size == (32,)
    assert cli("--prompt one --steps 9 8.5", sampler.Config).steps == (9.0, 8.5)
    assert from_cli(sampler.Config, ["--prompt", "a red square", "a wave"]).prompt == (
        "a red square",
        "a wave",
    )


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
    ],
)
def test_mistaken_flag_is_named_with_its_value(line, words):
    """A mistake on the command line names the flag, what was given and the nearest right thing."""
    text = refusal(line)
    assert all(w in text for w in words) and "\n" not in text


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


@pytest.mark.parametrize("cls", [Config, sampler.Config, vae.Config])
def test_help_lists_every_field_with_its_comment(cls, capsys):
    """--help is whole: purpose, and for each flag its comment and its default."""
    with pytest.raises(SystemExit) as stop:
        from_cli(cls, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and cls.__doc__ in text
    for f in dataclasses.fields(cls):
        row = next(line for line in text.splitlines() if line.startswith(f"  --{f.name} "))
        words = row.removeprefix(f"  --{f.name}").removesuffix(
            "required]" if f.default is dataclasses.MISSING else f"{f.default}]"
        )
        assert words.removesuffix("[").strip(), row
    assert (
        cls is not Config
        or "of the optimizer  [0.001]" in text
        and "which clip to read  [required]" in text
    )


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
    ],
)
def test_run_turns_a_mistake_into_one_line_and_a_code(main, argv, code, line, monkeypatch, capsys):
    """The user's mistakes end with code 2 and one line, Ctrl-C with 130."""
    monkeypatch.setattr("sys.argv", ["script.py", *argv])
    if code is None:
        common.run(main, Config)
    else:
        with pytest.raises(SystemExit) as stop:
            common.run(main, Config)
        assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_run_does_not_hide_a_bug(monkeypatch):
    """What is not the user's mistake keeps its traceback."""
    monkeypatch.setattr("sys.argv", ["script.py", "--clip", "a"])
    with pytest.raises(ZeroDivisionError):
        common.run(lambda config: 1 / 0, Config)


# ---------------------------------------------------------------- processes, randomness
@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_one_process_is_rank_0_of_1(alone):
    """Without torchrun a script is a world of one and joins no process group."""
    assert common.start() == common.start("cpu") == (0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()


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
            assert stop()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# ---------------------------------------------------------------- files that are whole or absent
def test_atomic_replaces_on_success(tmp_path):
    """The old content stays until the block ends; then the new is there, readable by others, and nothing else."""
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with atomic(path) as tmp:
            assert tmp.parent == path.parent and tmp.suffix == ".txt"
            tmp.write_text(text)
            tmp.chmod(0o600)  # as safetensors does
            assert not path.exists() if text == "one" else path.read_text() == "one"
    assert path.read_text() == "two" and os.listdir(path.parent) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


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
    """The average of a bfloat16 parameter is the float32 formula, though a step is far below bfloat16's resolution."""
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


def test_log_row_appends_lines_of_json(tmp_path):
    """Each row is one JSON line behind the earlier ones."""
    rows = [{"step": 1, "loss": 0.5, "what": "two\nlines"}, {"step": 2, "loss": 1e-9}]
    for row in rows:
        log_row(tmp_path / "log.jsonl", **row)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows


def test_inference_casts_once_and_leaves_nothing_behind():
    """Within it a weight is cast once; after it the same weight gets its gradient, which a cast kept from there would swallow."""
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
