"""The house stays small and its doors open one way: sizes, arrows, formatting."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from house import BESIDE, METHOD, ROOT, house, nested_comprehensions, python_files
from pages import PAGES

FILES = [file for file in python_files() if not file.startswith("tests/")]
MODULES = {file.removesuffix(".py").replace("/", "."): file for file in FILES}
PACKAGES = {"torch", "numpy", "tqdm", "imageio", "imageio_ffmpeg", "safetensors"}
FOR_TESTS = {"diffusers", "tests"}  # what tools/ may compare with, and the checks it runs
MAY_IMPORT = {  # room -> the rooms it may know
    "lib": {"lib"},
    "top": {"lib", "top"},
    "zoo": {"lib", "top", "zoo"},
    "toy": {"lib", "top", "zoo", "toy", "tools"},
    "tools": {"lib", "top", "zoo", "toy", "tools"},
}


def kept() -> list[str]:
    """Every file that git keeps, as a path from the root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.splitlines()


def room(file: str) -> str:
    """lib, zoo, toy or tools; top for the files at top level."""
    return file.split("/")[0] if "/" in file else "top"


def imports(file: str) -> set[str]:
    """Every module that a file imports, at top level or inside a function: {"torch.nn", "dit"}."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            # "from lib import text" names a module, "from dit import DiT" does not
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return found


# ---------------------------------------------------------------- sizes
def test_few_files_at_the_top():
    """Top level holds the eight files of the method, three beside them, and what git keeps of
    others is a short list."""
    assert {file for file in python_files() if "/" not in file} == {*METHOD, *BESIDE}
    papers = {".gitignore", "LICENSE", "Makefile", "README.md", "pyproject.toml"}
    papers |= {"requirements.txt", "requirements-dev.txt"}
    assert {file for file in kept() if "/" not in file} == {*METHOD, *BESIDE, *papers}


def test_only_weights_are_large():
    """What git keeps outside toy/weights has at most 500 kB a file."""
    others = [f for f in kept() if not f.startswith("toy/weights/") and (ROOT / f).exists()]
    assert [file for file in others if (ROOT / file).stat().st_size > 500_000] == []


def test_the_method_is_an_afternoon():
    """The eight files that make the method are at most 3,010 lines; README says how many."""
    assert house()["lines of the eight"] <= 3010


def test_the_whole_does_not_grow():
    """Everything but tests and zoo is at most 13,650 lines; docs/files.md says how many."""
    whole = house()["lines of all, without tests and zoo"]
    assert whole <= 13650
    said = re.search(r"without tests and zoo: ([\d,]+) lines", PAGES["files.md"])[1]
    assert abs(int(said.replace(",", "")) - whole) <= 100


def test_sentences_are_not_packed():
    """In the eight, a comprehension inside a comprehension is rare: 0.3 in 100 lines."""
    assert house()["nested comprehensions in 100 lines of the eight"] <= 0.3


def test_what_counts_as_nested():
    """Two comprehensions beside each other are not nested; one in another's source is."""
    assert nested_comprehensions("[x for x in y]; {x for x in y}") == 0
    assert nested_comprehensions("[sum(x for x in y) for y in z]") == 1
    assert nested_comprehensions("[[[x for x in y] for y in z] for z in w]") == 2


def test_readme_is_short():
    """README is at most 220 lines and 2,500 words."""
    assert house()["lines of README"] <= 220
    assert house()["words of README"] <= 2500


def test_formatted():
    """Every file is as `ruff format` writes it, so that packing lines buys nothing."""
    words = [sys.executable, "-m", "ruff", "format", "--check", "--no-cache", "."]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- arrows
@pytest.mark.parametrize("file", FILES)
def test_imports_point_up(file):
    """A file knows its own room and those above; else the five packages, and Python itself."""
    for module in imports(file):
        if module in MODULES:
            known = MAY_IMPORT[room(file)]
            assert room(MODULES[module]) in known, f"{file} imports {module}, which is below it"
        else:
            package = module.split(".")[0]
            allowed = PACKAGES | set(sys.stdlib_module_names)
            allowed |= FOR_TESTS if room(file) == "tools" else set()
            assert package in allowed, f"{file} imports {package}: requirements.txt lacks it"


def test_imports_go_one_way():
    """No file imports one that imports it, directly or through others."""
    ours = {file: {MODULES[m] for m in imports(file) if m in MODULES} for file in FILES}
    order = list(TopologicalSorter(ours).static_order())  # raises CycleError, which names the ring
    assert set(order) == set(FILES)


def test_comfort_is_no_idea():
    """Of the eight, only evaluate.py asks generate.py for models, and none needs clips.py."""
    users = [file for file in METHOD if imports(file) & {"generate", "clips"}]
    assert users == ["evaluate.py"] and "clips" not in imports("evaluate.py")


def test_a_missing_module_is_no_package():
    """`from zoo import gone` is found: a room is no package, and what it names must be a file."""
    assert not {room(file) for file in FILES} & (PACKAGES | FOR_TESTS)
