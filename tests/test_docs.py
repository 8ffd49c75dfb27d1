"""What README and docs say is true: commands parse, names exist, numbers stand beside commands."""

import ast
import importlib
import re
import subprocess

import pytest
from house import BESIDE, METHOD, file_table, lines, python_files
from pages import (
    LAUNCHERS,
    PAGES,
    README,
    ROOT,
    anchors_of,
    commands,
    inline_commands,
    prose,
    script_of,
    tables,
)

from lib import common

MODULES = [
    file.removesuffix(".py").replace("/", ".")
    for file in python_files()
    if not file.startswith("tests/")
]
OTHER_FLAGS = {  # of torchrun and pip
    *("--max-restarts", "--nproc_per_node", "--nnodes", "--standalone"),
    *("--rdzv-endpoint", "--rdzv-backend", "--rdzv-id", "--help"),
}
WITH_ZOO = PAGES | {"zoo/README.md": (ROOT / "zoo" / "README.md").read_text()}
ALL_COMMANDS = sorted(
    {
        (name, command)
        for name, page in WITH_ZOO.items()
        for command in commands(page)
        if not command.startswith("cp ") and name != "hacks.md"  # its commands run in test_hacks.py
    }
)


def source(module: str) -> str:
    return (ROOT / (module.replace(".", "/") + ".py")).read_text()


# ---------------------------------------------------------------- commands
@pytest.mark.parametrize("name, command", ALL_COMMANDS, ids=lambda x: x[-60:])
def test_commands_parse(name, command):
    """A command names a script that exists, and flags and values that its command line takes."""
    found = script_of(command)
    if found is None:
        assert "pip" in command, f"{name}: {command} starts no script of this project"
        return
    module, words = found
    if "--help" in words:
        return
    script = importlib.import_module(module)
    if hasattr(script, "STAGES"):  # the first word says which
        script, words = script.STAGES[words[0]], words[1:]
    if hasattr(script, "Config"):
        assert common.from_cli(script.Config, words) is not None
    else:
        assert not any(word.startswith("--") for word in words), f"{module} takes no flags"


def test_commands_have_lines_of_their_own():
    """No paragraph begins with a command, as one does that lost its block."""
    lost = {
        (name, line)
        for name, page in WITH_ZOO.items()
        for line in prose(page).splitlines()
        if line.strip().split(" ")[0] in (*LAUNCHERS, "make")
    }
    assert not lost


def test_commands_in_prose_name_their_flags():
    """A command in running text names a script that exists and flags that it has."""
    unknown = []
    for name, page in PAGES.items():
        for command in inline_commands(page):
            module, words = script_of(command)
            known = config_flags([module]) | {"--help"}
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            unknown += [f"{name}: {command}: {flag}" for flag in sorted(flags - known)]
    assert not unknown


def config_flags(modules: list[str] = MODULES) -> set[str]:
    """Every flag of these scripts, spelt with underscores and with dashes."""
    found = set()
    for module in modules:
        if re.search(r"^@dataclass\nclass Config\b", source(module), re.M) and module != "lib.cli":
            config = importlib.import_module(module).Config
            found |= {f"--{name}" for name in config.__dataclass_fields__}
    return found | {flag[:2] + flag[2:].replace("_", "-") for flag in found}


def test_flags_in_prose_exist():
    """Each `--flag` that a page mentions belongs to one of the scripts."""
    known = config_flags() | OTHER_FLAGS
    named = {
        (name, flag)
        for name, page in PAGES.items()
        for flag in re.findall(r"(?<![\w-])--\w[\w-]*", page)
    }
    assert named, "no flag is named at all: the pattern is wrong"
    unknown = sorted((name, flag) for name, flag in named if flag not in known)
    assert not unknown


def test_make_targets_exist():
    """The make commands that a page names are in the Makefile."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = {t for page in PAGES.values() for t in re.findall(r"(?:^|`)make (\w+)", page, re.M)}
    assert {"demo", "test"} <= named <= targets


# ---------------------------------------------------------------- names
def test_named_symbols_exist():
    """Wherever a page or a docstring says `file.py:symbol`, the file has that symbol."""
    texts = [*PAGES.values(), *map(source, MODULES)]
    named = {found for text in texts for found in re.findall(r"`([\w/]+\.py):(\w+)`", text)}
    assert named, "no symbol is named at all: the pattern is wrong"
    missing = []
    for file, symbol in sorted(named):
        symbol_at = rf"^(def|class) {symbol}\b|^{symbol}\b.*=|^    def {symbol}\b"
        path = ROOT / file
        if not path.exists() or not re.search(symbol_at, path.read_text(), re.M):
            missing.append(f"{file}:{symbol}")
    assert not missing


def test_named_files_exist():
    """A page, and a docstring, names no file of the project that is gone."""
    made = ("out/", "NAME", "my_loss.py", "scripts/constant.py")  # yours, and VBench's
    known = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    stale = set()
    for name, text in [*PAGES.items(), *((m, source(m)) for m in MODULES)]:
        for file in re.findall(r"(?<![\w/.*-])((?:\w+/)*\w+\.py)\b", text):
            there = (ROOT / file).exists() if "/" in file else file in known
            if not there and not file.startswith(made):
                stale.add(f"{name}: {file}")
    assert not stale


def test_links_lead_somewhere():
    """A link of a page leads to a file of the project, and to a heading that is there."""
    broken = []
    for name, page in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)\s]+)\)", page):
            if target.startswith("https://"):
                continue
            file, _, heading = target.partition("#")
            path = (folder / file).resolve() if file else folder / name
            if not path.exists():
                broken.append(f"{name}: {target}")
            elif heading and heading not in anchors_of(path.read_text()):
                broken.append(f"{name}: {target}: no such heading")
    assert not broken


def test_docs_are_reached():
    """Every page of docs/ is linked from README or from a page that is."""
    linked = set(re.findall(r"([\w-]+\.md)", "".join(PAGES.values())))
    assert set(PAGES) - {"README.md"} <= linked


def test_pictures_are_shown():
    """Every picture of assets/ is on a page."""
    shown = set(re.findall(r"assets/([\w.]+)\)", "".join(PAGES.values())))
    assert {path.name for path in (ROOT / "assets").iterdir()} <= shown


# ---------------------------------------------------------------- numbers
def test_readme_has_the_reading_order():
    """README's table names the eight files in reading order, then the three, with their lines."""
    rows = re.findall(r"^\| (\d+) \| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert [file for _, file, _ in rows] == [*METHOD, *BESIDE]
    for _, file, number in rows:
        assert abs(int(number) - lines(file)) <= 15, f"{file}: run python -m tests.house --write"
    eight, eleven = re.search(
        r"first eight are ([\d,]+) lines, all eleven ([\d,]+)", README
    ).groups()
    assert abs(int(eight.replace(",", "")) - sum(map(lines, METHOD))) <= 40
    assert abs(int(eleven.replace(",", "")) - sum(map(lines, METHOD + BESIDE))) <= 40


def test_the_file_table_is_the_tree():
    """docs/files.md has a row for every file that is not at top level, in its own words."""
    row = re.compile(r"^\| `(\w+/\w+\.py)` \| (\d+) \| (.*) \|$", re.M)
    said, true = (
        {f: (n, w) for f, n, w in row.findall(t)} for t in (PAGES["files.md"], file_table())
    )
    assert said.keys() == true.keys(), "run python -m tests.house --write true"
    for file, (number, words) in said.items():
        assert words == true[file][1], f"{file}: run python -m tests.house --write true"
        assert abs(int(number) - int(true[file][0])) <= 15


def test_rooms_are_named():
    """docs/files.md names every folder of the project that holds code."""
    rooms = {file.split("/")[0] + "/" for file in python_files() if "/" in file}
    assert rooms == set(re.findall(r"^\| `(\w+/)` \|", PAGES["files.md"], re.M))


def is_measured(rows: list[str]) -> bool:
    """Whether a table holds measurements: several cells that begin with a number with a point."""
    cells = [cell.strip(" *") for row in rows for cell in row.split("|")]
    return sum(bool(re.match(r"\d*\.\d", cell)) for cell in cells) >= 4


def test_numbers_stand_beside_their_command():
    """A table of measurements says by which command, on which machine, with which seed."""
    origin = {
        "command": r"python |torchrun |make \w|\w+\.py",
        "hardware": r"EPYC|Xeon|H100|H200|CPU|GPU|no hardware",
        "seed": r"seed|random\s+weights|Calculated",
    }
    lacking = []
    for name, page in PAGES.items():
        sections = re.split(r"^(?=## )", page, flags=re.M)
        for section in sections:
            for _, head, rows in tables(section):
                # what holds for the whole page stands above its first section
                said = sections[0] + section
                lacking += [
                    f"{name}: {head.strip()} has no {what}"
                    for what, pattern in origin.items()
                    if is_measured(rows) and not re.search(pattern, said)
                ]
    assert not lacking


def test_no_number_is_missing():
    """No page still has a place held for a number."""
    held = {name: n for name, page in PAGES.items() if (n := page.count("TODO"))}
    assert not held


# ---------------------------------------------------------------- sizes, requirements, docstrings
@pytest.mark.parametrize("name", PAGES)
def test_pages_are_short(name):
    """README is at most 220 lines and 2,500 words, a page of docs below 200 lines."""
    page = PAGES[name]
    if name == "README.md":
        assert len(page.splitlines()) <= 220 and len(page.split()) <= 2500
    else:
        assert len(page.splitlines()) < 200
    assert len(prose(page).splitlines()) > 5, "there is nothing to read"


def requirements(name: str) -> dict[str, str]:
    """Package -> version, of a requirements file; every version is exact, or this fails."""
    listed = [
        re.sub(r"\[.*\]", "", line)
        for line in (ROOT / name).read_text().splitlines()
        if line and not line.startswith(("#", "-r"))
    ]
    return dict(line.split("==") for line in listed)


def test_requirements_are_the_five():
    """requirements.txt holds the five packages and the mp4 plugin; every licence is listed."""
    five = {"torch", "numpy", "tqdm", "imageio", "imageio-ffmpeg", "safetensors"}
    assert requirements("requirements.txt").keys() == five
    page = PAGES["files.md"]
    listed = page[page.index("## What it depends on") :]
    for package in requirements("requirements.txt") | requirements("requirements-dev.txt"):
        assert f"`{package}`" in listed


def public(module: str) -> list[ast.FunctionDef | ast.ClassDef]:
    """The public functions and classes of a module, `main` apart: its script tells what it does."""
    return [
        node
        for node in ast.parse(source(module)).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and node.name != "main"
    ]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_explained(module):
    """Every public function and class says what it is for."""
    assert [node.name for node in public(module) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith(("toy.", "tools."))])
def test_tensors_have_shapes(module):
    """A public function that takes tensors says in its docstring what shape they have."""
    takes = [
        node
        for node in public(module)
        if isinstance(node, ast.FunctionDef)
        and any(a.annotation and "Tensor" in ast.unparse(a.annotation) for a in node.args.args)
        and "dict" not in ast.unparse(node.args)
    ]
    shape = re.compile(r"\[\S|\([A-Z\d.]+,")  # [B, T] or (B, T, C, h, w)
    silent = [node.name for node in takes if not shape.search(ast.get_docstring(node) or "")]
    assert not silent


def test_nothing_private_is_told():
    """No page or source tells of the machine it was written on."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for file in tracked.split():
        if file.endswith((".md", ".py", ".toml", "Makefile")):
            told = re.findall(r"/(?:home|work|root)/\w+", (ROOT / file).read_text())
            assert not told, f"{file}: {told}"
