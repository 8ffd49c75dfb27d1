"""Every command of the README runs, in its order, in one folder: the same scripts and flags, only counts are smaller.

Left out: what needs files that are not here (Wan's weights, trained students of the tables) or a GPU (64 pixels); those
commands are parsed by test_docs.py, and their scripts run on small random weights in the other tests. `make` is CI's."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from imageio import v3 as iio
from test_docs import READING_ORDER, README
from tiny import ROOT

from lib import common

FEWER = {
    "pairs": 2,
    "shard": 2,
    "steps": 2,
    "batch": 2,
    "clips": 2,
    "sheet_every": 0,
    "vae": "toy/weights/vae.safetensors",
}
NOT_HERE = (
    "Wan2.1",
    "--preset",
    "64",
    "out/dmd ",
    "toy.tables",
    "--seeds",
    "prompts.safetensors",
    "student.pt",
    "pip install",
)
IN_PLACE = {"train_dmd.py": {"vae": ""}, "train_ar.py": {"vae": ""}}


def commands() -> list[str]:
    """The lines of the README's blocks that are commands and run here."""
    lines = [
        line.split("  #")[0].strip()
        for block in re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
        for line in block.splitlines()
    ]
    lines = [line for line in lines if line.startswith((".venv/bin/", "cp "))]
    return [
        line
        for line in lines
        if not any(word in line.replace("--clips 64", "") for word in NOT_HERE)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the shipped weights, the pictures and clips that the README calls yours, and its story."""
    path = tmp_path_factory.mktemp("readme")
    (path / "toy").mkdir()
    (path / "toy" / "weights").symlink_to(ROOT / "toy" / "weights")
    rng = np.random.default_rng(0)
    for name in ("x.png", "y.png"):
        iio.imwrite(path / name, rng.integers(0, 255, (40, 60, 3), np.uint8))
    for name in ("a.mp4", "b.mov"):
        iio.imwrite(path / name, rng.integers(0, 255, (32, 48, 64, 3), np.uint8), fps=16)
    (path / "story.json").write_text(re.search(r"^```\n(\{.*?)^```", README, re.M | re.S)[1])
    return path


def test_there_are_commands():
    """The filter above leaves most of them."""
    assert len(commands()) >= 25


def run(command: str, folder: Path) -> None:
    """One command, in this process; the file it was asked for is there afterwards."""
    words = shlex.split(command)
    if words[0] == "cp":
        shutil.copy(*words[1:])
        return
    if "--story" in words:
        for name in ("long.mp4", "backward.mp4"):
            shutil.copy(folder / "out" / name, folder)
    while not (words[0].endswith(".py") or words[0] in READING_ORDER):
        words.pop(0)
    script = __import__(words[0].removesuffix(".py"), fromlist=["Config"])
    config = common.from_cli(script.Config, words[1:])
    for name, value in (FEWER | IN_PLACE.get(words[0], {})).items():
        if hasattr(config, name) and not (name == "steps" and isinstance(config.steps, tuple)):
            setattr(config, name, value)
    script.main(config)
    if "--out" in words:
        assert (folder / words[words.index("--out") + 1]).exists(), "it left nothing behind"


def test_readme_commands_run(folder, monkeypatch):
    """Each ends without an error. One test, because they build on each other."""
    monkeypatch.chdir(folder)
    for command in commands():
        try:
            run(command, folder)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{command}\n{type(error).__name__}: {error}") from error
