"""The commands of README and docs run, in their order, in one folder; only counts are smaller.

Left out: what needs files that are not here (Wan's weights, trained students of the tables) or a
GPU; those commands are parsed by test_docs.py, and their scripts run on small random weights in
the other tests. `make` is CI's."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from imageio import v3 as iio
from pages import PAGES, README, ROOT, blocks, commands, script_of

from lib import common

RUN = ("README.md", "clips.md", "own-clips.md", "training.md", "real-wan.md", "results.md")
FEWER = {
    "pairs": 2,
    "shard": 2,
    "steps": 2,
    "batch": 2,
    "clips": 2,
    "sheet_every": 0,
    "vae": "toy/weights/vae.safetensors",
}
IN_PLACE = {"train_dmd": {"vae": ""}, "zoo.ar_teacher": {"vae": ""}}
NOT_HERE = (  # words of commands that need what this folder lacks
    *("Wan2.1", "--preset", "--size 64", "out/dmd ", "toy.tables", "toy.students"),
    *("prompts.safetensors", "student.pt", "pip install"),
)
MADE_ELSEWHERE = ("long.mp4", "backward.mp4")  # clips that the story looks for beside itself


def commands_here() -> list[str]:
    """The commands of the pages that run here, each once, in the order of the pages."""
    every = [command for name in RUN for command in commands(PAGES[name])]
    here = [c for c in every if not any(word in c for word in NOT_HERE)]
    return list(dict.fromkeys(here))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the shipped weights, pictures and clips that the pages call yours, a story."""
    path = tmp_path_factory.mktemp("readme")
    (path / "toy").mkdir()
    (path / "toy" / "weights").symlink_to(ROOT / "toy" / "weights")
    rng = np.random.default_rng(0)
    for name in ("x.png", "y.png"):
        iio.imwrite(path / name, rng.integers(0, 255, (40, 60, 3), np.uint8))
    for name in ("a.mp4", "b.mov"):
        iio.imwrite(path / name, rng.integers(0, 255, (32, 48, 64, 3), np.uint8), fps=16)
    story = next(block for block in blocks(PAGES["own-clips.md"]) if block.startswith("{"))
    (path / "story.json").write_text(story)
    return path


def test_there_are_commands():
    """The filter above leaves most of them."""
    assert len(commands_here()) >= 25


def run(command: str, folder: Path) -> None:
    """One command, in this process; the file it was asked for is there afterwards."""
    words = shlex.split(command)
    if words[0] == "cp":
        shutil.copy(*words[1:])
        return
    if "--story" in words:
        for name in MADE_ELSEWHERE:
            shutil.copy(folder / "out" / name, folder)
    module, flags = script_of(command)
    script = importlib.import_module(module)
    config = common.from_cli(script.Config, flags)
    for name, value in (FEWER | IN_PLACE.get(module, {})).items():
        if type(getattr(config, name, None)) is type(value):  # --clips is a number, or a folder
            setattr(config, name, value)
    script.main(config)
    if "--out" in words:
        assert (folder / words[words.index("--out") + 1]).exists(), "it left nothing behind"


def test_commands_run(folder, monkeypatch):
    """Each ends without an error. One test, because they build on each other."""
    monkeypatch.chdir(folder)
    for command in commands_here():
        try:
            run(command, folder)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{command}\n{type(error).__name__}: {error}") from error


# ---------------------------------------------------------------- use it in Python
def python_lines() -> list[str]:
    """The statements of README's Python, imports apart."""
    code = "\n".join(blocks(README, "python"))
    return [line for line in code.splitlines() if line and not re.match("import |from ", line)]


def test_python_is_six_lines():
    """From nothing to a video in at most six lines."""
    assert len(blocks(README, "python")) == 1
    assert 4 <= len(python_lines()) <= 6


def test_python_makes_the_clip_of_the_command_line(tmp_path):
    """README's Python and README's first command give the same frames, bit for bit."""
    section = README[README.index("## Make a clip") :]
    flags = script_of(commands(section)[0])[1]
    flags[flags.index("--out") + 1] = str(tmp_path / "clip.mkv")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "generate.py", *flags]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    ending = (
        f"\nfrom lib.media import to_uint8\nimport numpy\n"
        f"numpy.save({str(tmp_path / 'clip.npy')!r}, to_uint8(video[0]))\n"
    )
    code = blocks(README, "python")[0] + ending
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    frames = np.load(tmp_path / "clip.npy")  # (F, H, W, 3)
    assert frames.std() > 1, "the clip shows nothing"
    assert np.array_equal(frames, iio.imread(tmp_path / "clip.mkv"))
