"""README and docs as data: their commands, blocks and tables. Shared by the tests of prose."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
README = PAGES["README.md"]
LAUNCHERS = ("python", "torchrun", ".venv/bin/python", ".venv/bin/torchrun")


def blocks(page: str, language: str = "") -> list[str]:
    """The fenced blocks of a page in this language, without their fences."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S)
    return [text for name, text in fenced if name == language]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)


def commands(page: str) -> list[str]:
    """The lines of a page's blocks that start a program or copy a file, without their comments."""
    lines = [line.split("  #")[0].strip() for block in blocks(page) for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] in (*LAUNCHERS, "cp")]


def inline_commands(page: str) -> list[str]:
    """Commands in running text: `python -m tools.memory --preset wan` and the like."""
    found = re.findall(r"`([^`\n]+)`", prose(page))
    return [c for c in found if c.split(" ")[0] in LAUNCHERS and script_of(c)]


def script_of(command: str) -> tuple[str, list[str]] | None:
    """(module, flags) of a command that starts one of the project's scripts; None for others."""
    words = shlex.split(command)
    for n, word in enumerate(words):
        module = word.removesuffix(".py").replace("/", ".")
        path = ROOT / (module.replace(".", "/") + ".py")
        named = word.endswith(".py") or words[n - 1] == "-m"
        if n and named and path.exists():
            return module, words[n + 1 :]
    return None


def tables(page: str) -> list[tuple[str, str, list[str]]]:
    """(the section's text before it, its head, its rows) of every table of a page."""
    found = []
    for section in re.split(r"^(?=#+ )", page, flags=re.M):
        for table in re.finditer(r"^(\|.*\n)\|[-|]+\n((?:\|.*\n?)+)", section, re.M):
            found.append((section[: table.start()], table[1], table[2].splitlines()))
    return found


def anchors_of(page: str) -> set[str]:
    """What GitHub makes of headings: "## 1. A new order" -> "1-a-new-order"."""
    headings = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
