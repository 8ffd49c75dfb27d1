"""Every hack of docs/hacks.md applies to the project as it is, and runs; README counts its lines.

A patch is a ```diff block: `--- file` begins the part for a file, `@@` the next place in it. Lines
without a mark say where, lines with - must be there too. There are no line numbers to go stale. A
file that is not there is made."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from imageio import v3 as iio
from pages import PAGES, README, ROOT, anchors_of, blocks, commands, prose

FEWER = {  # flags of every command that has them, so that it ends soon
    "pairs": 4,
    "shard": 2,
    "steps": 2,
    "batch": 2,
    "sheet_every": 0,
    "frames": 81,
    "parallel": "ddp",
    "device": "cpu",
}


@dataclass(frozen=True)
class Hack:
    """One section of the page."""

    title: str
    text: str

    @property
    def hunks(self) -> list[tuple[str, list[str]]]:
        """(file, lines with their marks) of every place that is patched."""
        found = []
        for block in blocks(self.text, "diff"):
            for part in re.split(r"^--- ", block, flags=re.M)[1:]:
                file, _, rest = part.partition("\n")
                found += [
                    (file, hunk.splitlines()) for hunk in re.split(r"^@@.*\n", rest, flags=re.M)
                ]
        return found

    @property
    def files(self) -> set[str]:
        """The files that it edits."""
        return {file for file, _ in self.hunks}

    @property
    def added(self) -> int:
        """How many lines it adds, empty ones apart."""
        return sum(
            bool(line[1:].strip()) for _, hunk in self.hunks for line in hunk if line[0] == "+"
        )


PAGE = PAGES["hacks.md"]
HACKS = [
    Hack(section.partition("\n")[0].removeprefix("## "), section)
    for section in re.split(r"^(?=## \d)", PAGE, flags=re.M)[1:]
]


def patched(source: str, hunk: list[str]) -> str:
    """The source with one place of a patch applied. raises: AssertionError if it is not there."""
    before = "".join(line[1:] + "\n" for line in hunk if line[0] in " -")
    after = "".join(line[1:] + "\n" for line in hunk if line[0] in " +")
    if not source:
        assert not before, "a new file has nothing to be found in it"
        return after
    assert before.strip(), "the patch does not say where"
    assert source.count(before) == 1, f"found {source.count(before)} times:\n{before}"
    return source.replace(before, after)


def test_a_patch_is_applied():
    """The place is found by its lines, nothing else changes; a place that is gone is an error."""
    assert patched("a\nb\nc\n", [" a", "-b", "+B", "+x"]) == "a\nB\nx\nc\n"
    assert patched("", ["+a", "+b"]) == "a\nb\n"
    for source, hunk, says in (
        ("a\nc\n", [" a", "-b", "+B"], "found 0 times"),
        ("a\na\n", [" a", "+B"], "found 2 times"),
        ("a\n", ["+B"], "does not say where"),
        ("", [" a", "+B"], "new file"),
    ):
        with pytest.raises(AssertionError, match=says):
            patched(source, hunk)


def test_there_are_five_and_readme_counts_them():
    """README's table has each with the lines it adds and the files it edits, and links to it."""
    assert len(HACKS) == 5
    row = re.compile(r"^\| \[.*?\]\(docs/hacks\.md#(\S+)\) \| (\d+) \| (\d+) \|$", re.M)
    said = {link: (int(lines), int(files)) for link, lines, files in row.findall(README)}
    true = {min(anchors_of(h.text), key=len): (h.added, len(h.files)) for h in HACKS}
    assert said == true


@pytest.mark.parametrize("hack", HACKS, ids=lambda h: h.title)
def test_a_hack_is_small(hack):
    """At most 15 lines in at most 2 files, none of them in lib/; and a command or code to run."""
    assert hack.added <= 15
    assert len(hack.files) <= 2 and not any(file.startswith("lib/") for file in hack.files)
    assert commands(hack.text) or blocks(hack.text, "python")
    assert len(prose(hack.text).split()) > 15, "say what it does, and why it works"


# ---------------------------------------------------------------- applied and run
@pytest.fixture
def copy(tmp_path) -> Path:
    """The project without its tests, where it may be edited; with a folder of somebody's clips."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    for file in listed.stdout.splitlines():
        if not file.startswith("tests/") and (ROOT / file).exists():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "toy" / "weights").symlink_to(ROOT / "toy" / "weights")
    (tmp_path / "my_clips").mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        clip = rng.integers(0, 255, (81, 32, 32, 3), np.uint8)
        iio.imwrite(tmp_path / "my_clips" / f"{name}.mp4", clip, fps=16)
        (tmp_path / "my_clips" / f"{name}.txt").write_text("a red disc moves up over a blue wave")
    return tmp_path


def smaller(command: str, folder: Path) -> list[str]:
    """A command of the page as words, its counts smaller where its script has such a flag."""
    words = shlex.split(command)
    script = folder / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
    config = re.split(r"^def ", script.read_text().partition("class Config")[2], flags=re.M)[0]
    for name, value in FEWER.items():
        if f"--{name}" in words:
            words[words.index(f"--{name}") + 1] = str(value)
        elif re.search(rf"^    {name}: ", config, re.M):
            words += [f"--{name}", str(value)]
    return words


def ran(words: list[str], folder: Path) -> str:
    """What a program printed. raises: AssertionError with the end of its errors if it failed"""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("hack", HACKS, ids=lambda h: h.title)
def test_a_hack_applies_and_runs(hack, copy):
    """The patch fits the project as it is; its commands and its Python run, and leave files."""
    for file, hunk in hack.hunks:
        path = copy / file
        path.write_text(patched(path.read_text() if path.exists() else "", hunk))
    for command in commands(hack.text):
        if command.startswith("cp "):
            shutil.copy(*(copy / name for name in command.split()[1:]))
            continue
        words = smaller(command, copy)
        ran(words[1:], copy)
        if "--out" in words:
            assert (copy / words[words.index("--out") + 1]).exists(), f"{command} left nothing"
    for code in blocks(hack.text, "python"):
        ran(["-c", code], copy)
