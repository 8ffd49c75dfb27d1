"""How much there is to read, counted: files, lines, packed sentences; and what README says of it.

A number in a document is true for a day. So README's lines per file and the table of docs/files.md
come from here:

    python -m tests.house                # the counts
    python -m tests.house --write true   # and put them into README.md, docs/files.md

Nested comprehensions are a measure of packed sentences: a comprehension inside another one.
"""

import ast
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lib.common import atomic, run

ROOT = Path(__file__).resolve().parent.parent
METHOD = (  # the eight files of the method, in reading order
    "anchors.py",
    "sampler.py",
    "dit.py",
    "kvcache.py",
    "train_ode.py",
    "train_dmd.py",
    "evaluate.py",
    "vae.py",
)
BESIDE = ("plans.py", "generate.py", "clips.py")  # the other files at top level
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def python_files() -> list[str]:
    """Every Python file of the project, as a path from its root."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(file for file in listed.stdout.splitlines() if (ROOT / file).exists())


def lines(file: str) -> int:
    """Lines of a file, empty ones and comments too."""
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


def nested_comprehensions(source: str) -> int:
    """Comprehensions that stand inside another one: "[[x for x in y] for y in z]" -> 1."""
    inside = set()
    for outer in ast.walk(ast.parse(source)):
        if isinstance(outer, COMPREHENSIONS):
            inside |= {
                n for n in ast.walk(outer) if n is not outer and isinstance(n, COMPREHENSIONS)
            }
    return len(inside)


def nested_per_100_lines(files: tuple[str, ...]) -> float:
    """Nested comprehensions of all these files, per 100 lines."""
    nested = sum(nested_comprehensions((ROOT / file).read_text(encoding="utf-8")) for file in files)
    return 100 * nested / sum(lines(file) for file in files)


def longest_function(file: str) -> tuple[int, str]:
    """(lines, name) of the longest function of a file, its docstring included."""
    functions = [
        (node.end_lineno - node.lineno + 1, node.name)
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    return max(functions, default=(0, "none"))


def first_sentence(file: str) -> str:
    """What a file says of itself: the first sentence of its docstring."""
    text = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.])(?<!Fig[.]) ", paragraph)[0].rstrip(".")


def house() -> dict[str, float]:
    """The counts by which the house is judged."""
    files = python_files()
    without = [file for file in files if not file.startswith(("tests/", "zoo/"))]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return {
        "Python files at top level": sum("/" not in file for file in files),
        "lines of the eight": sum(lines(file) for file in METHOD),
        "lines of all, without tests and zoo": sum(lines(file) for file in without),
        "nested comprehensions in 100 lines of the eight": nested_per_100_lines(METHOD),
        "lines of README": len(readme.splitlines()),
        "words of README": len(readme.split()),
    }


# ---------------------------------------------------------------- what the documents say
def with_line_counts(text: str) -> str:
    """The document, its rows "| `NAME.py` | number |" with the lines of that file as the number."""

    def row(match: re.Match) -> str:
        return f"{match[1]}{lines(match[2])} |" if (ROOT / match[2]).is_file() else match[0]

    return re.sub(r"^(\|(?: \d+ \|)? `([\w/]+\.py)` \| )\d+ \|", row, text, flags=re.M)


def with_totals(text: str) -> str:
    """README with the lines of the eight, and of all eleven, in its sentence about them."""
    eight = sum(lines(file) for file in METHOD)
    eleven = eight + sum(lines(file) for file in BESIDE)
    text = re.sub(r"(The first eight are )\S+( lines)", rf"\g<1>{eight:,}\g<2>", text)
    return re.sub(r"(all eleven )[\d,]+", rf"\g<1>{eleven:,}", text)


def file_table() -> str:
    """A row for every file in a room, tests apart: its lines, and its own first sentence."""
    rows = [
        f"| `{file}` | {lines(file)} | {first_sentence(file)} |"
        for file in python_files()
        if "/" in file and not file.startswith("tests/")
    ]
    return "\n".join(["| file | lines | what it says of itself |", "|---|---|---|", *rows])


def with_file_table(text: str) -> str:
    """docs/files.md with the table of files, and the lines of all, as they are now."""
    table = re.compile(r"^\| file \| lines \|.*?(?=\n\n)", re.M | re.S)
    whole = f"{house()['lines of all, without tests and zoo']:,}"
    text = re.sub(r"(without tests and zoo: )[\d,]+", rf"\g<1>{whole}", text)
    return table.sub(lambda _: file_table(), text)


@dataclass
class Config:
    """Count what there is to read."""

    write: bool = False  # put the counts into README.md and docs/files.md


def main(config: Config) -> None:
    for name, value in house().items():
        print(f"{value:8.2f}  {name}" if isinstance(value, float) else f"{value:8,}  {name}")
    for file in (*METHOD, *BESIDE):
        length, function = longest_function(file)
        print(f"{lines(file):8,}  {file}, its longest function: {function}, {length}")
    if config.write:
        readme, files = ROOT / "README.md", ROOT / "docs" / "files.md"
        with atomic(readme) as tmp:
            tmp.write_text(with_totals(with_line_counts(readme.read_text(encoding="utf-8"))))
        with atomic(files) as tmp:
            tmp.write_text(with_file_table(files.read_text(encoding="utf-8")))
        print(f"wrote {readme.name} and docs/{files.name}")


if __name__ == "__main__":
    run(main, Config)
