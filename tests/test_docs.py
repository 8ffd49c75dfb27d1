"""The documentation is true: commands parse, tables equal the tree, imports are the stated ones and only point up."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lib import common

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
READING_ORDER = [
    "toy.world",
    "common",
    "cpu",
    "media",
    "weights",
    "vae",
    "dit",
    "kvcache",
    "anchors",
    "text",
    "sampler",
    "latents",
    "pairs",
    "training",
    "train_ode",
    "train_ar",
    "train_dmd",
    "memory",
    "metrics",
    "edit",
    "report",
    "toy.tables",
    "evaluate",
    "toy.train_vae",
    "toy.train_teacher",
    "toy.pack",
    "toy.causality",
    "toy.frames",
    "bench",
]


def tracked() -> list[str]:
    return subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def imports(path: Path) -> set[str]:
    """Every module a file imports, at top level or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= (
                {f"toy.{a.name}" for a in node.names} if node.module == "toy" else {node.module}
            )
    return found


def test_the_file_table_is_the_tree():
    """README's table names every top-level file and folder of code, and nothing else; its numbers of lines are about right."""
    named = set(re.findall(r"^\| `(\w+\.py|\w+/)` \|", README, re.M))
    assert named == {
        p.split("/")[0] + ("/" if "/" in p else "") for p in tracked() if p.endswith(".py")
    }
    for file, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M):
        assert abs(int(lines) - len((ROOT / file).read_text().splitlines())) <= 15, (
            f"README says that {file} has {lines} lines"
        )


def test_reading_order_is_complete():
    """Every module of the project has its place in the order of reading."""
    assert {
        p[:-3].replace("/", ".")
        for p in tracked()
        if p.endswith(".py") and not p.startswith("tests/")
    } == set(READING_ORDER)


@pytest.mark.parametrize("module", READING_ORDER)
def test_imports_only_point_up(module):
    """A file imports only files that are read before it, the five packages and the standard library."""
    ours, allowed = (
        set(),
        {"torch", "numpy", "tqdm", "imageio", "safetensors", *sys.stdlib_module_names},
    )
    for name in imports(ROOT / (module.replace(".", "/") + ".py")):
        if name in READING_ORDER:
            ours.add(name)
        else:
            assert name.split(".")[0] in allowed, (
                f"{module} imports {name}, which requirements.txt does not have"
            )
    later = {name for name in ours if READING_ORDER.index(name) >= READING_ORDER.index(module)}
    assert not later, f"{module} imports {later}, which are read after it"


def requirements(name: str) -> dict[str, str]:
    """Package -> version, of a requirements file."""
    lines = [
        line
        for line in (ROOT / name).read_text().splitlines()
        if line and not line.startswith(("#", "-r"))
    ]
    return dict(
        re.sub(r"\[.*\]", "", line).split("==") for line in lines
    )  # every version is exact, or this fails


def test_requirements_are_the_five():
    """requirements.txt holds the packages the README states, the mp4 plugin, and no other; the licence of each is listed."""
    assert requirements("requirements.txt").keys() == {
        "torch",
        "numpy",
        "tqdm",
        "imageio",
        "imageio-ffmpeg",
        "safetensors",
    }
    listed = README[README.index("## Licence, dependencies") :]
    assert all(
        f"`{name}`" in listed
        for name in requirements("requirements.txt") | requirements("requirements-dev.txt")
    )


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
    return [
        line for block in blocks for line in block.splitlines() if line.startswith(".venv/bin/")
    ]


@pytest.mark.parametrize("command", commands(), ids=lambda c: c[10:50])
def test_readme_commands_parse(command):
    """Every command of the README names a script that exists and flags and values that its command line takes."""
    words = shlex.split(command.split("  #")[0])
    while not (words[0].endswith(".py") or words[0] in READING_ORDER):
        words.pop(0)
    module = words[0].removesuffix(".py")
    config = common.from_cli(__import__(module, fromlist=["Config"]).Config, words[1:])
    assert config is not None


@pytest.mark.parametrize("module", READING_ORDER)
def test_public_names_are_explained(module):
    """Every public function and class says what it is for; `main` is told by its script."""
    body = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text()).body
    silent = [
        n.name
        for n in body
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
        and not n.name.startswith("_")
        and n.name != "main"
        and not ast.get_docstring(n)
    ]
    assert not silent


@pytest.mark.parametrize(
    "module",
    [
        "cpu",
        "media",
        "vae",
        "dit",
        "kvcache",
        "anchors",
        "text",
        "sampler",
        "latents",
        "pairs",
        "train_ode",
        "train_ar",
        "train_dmd",
        "metrics",
        "toy.train_vae",
    ],
)
def test_tensors_have_shapes(module):
    """A public function that takes tensors says in its docstring what shape they have."""
    body = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text()).body
    takes = [
        n
        for n in body
        if isinstance(n, ast.FunctionDef)
        and not n.name.startswith("_")
        and any(a.annotation and "Tensor" in ast.unparse(a.annotation) for a in n.args.args)
    ]
    assert [
        n.name
        for n in takes
        if "[" not in ast.get_docstring(n) and "dict" not in ast.unparse(n.args)
    ] == []


def test_named_symbols_exist():
    """Wherever README or a docstring says `file.py:symbol`, the file has that symbol."""
    texts = [README] + [
        (ROOT / p).read_text()
        for p in tracked()
        if p.endswith((".py", ".md")) and not p.startswith("tests/")
    ]
    named = {m for text in texts for m in re.findall(r"`([\w/]+\.py):(\w+)`", text)}
    assert named, "no symbol is named at all: the pattern is wrong"
    for file, symbol in named:
        assert re.search(
            rf"^(def|class) {symbol}\b|^{symbol}\b.*=|^    def {symbol}\b",
            (ROOT / file).read_text(),
            re.M,
        ), (file, symbol)


def test_make_targets_exist():
    """The make commands of the README are in the Makefile."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", README, re.M)) | {"bench", "lint"} <= targets


def test_files_fit_one_reading():
    """No file is much longer than one reading: 400 lines aimed at, 440 the limit."""
    long = {
        p: n
        for p in tracked()
        if p.endswith(".py") and not p.startswith("tests/")
        if (n := len((ROOT / p).read_text().splitlines())) > 440
    }
    assert not long
