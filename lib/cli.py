"""A typed dataclass is the command line: fields are flags, comments the help, a table the ranges.

@dataclass
class Config:
    '''What the script does.'''

    RANGES = {"steps": (1, None)}
    steps: int = 1000  # training iterations

from_cli(Config, ["--steps", "5"])  ->  Config(steps=5)
from_cli(Config, ["--steps", "0"])  ->  UserError: --steps 0 must be at least 1
"""

import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import types
import typing

RANGES = {  # what holds for a flag of this name in every script
    "seed": (0, 2**32 - 1),
    "vae": (),  # empty: no samples are shown
    "shard": (1, 10**6),
    "guidance": (0, 100),
    "shift": (0.1, 100),
    "block": (1, 1000),
    "anchors": (0, 1000),
    "head": (0, 1000),
    "share_noise": ("none", "start", "all"),
}


class UserError(ValueError):
    """A mistake the user can mend: one sentence with the offending value and the fix."""


def from_cli(cls: type, argv: list[str] | None = None):
    """Build the dataclass `cls` from `--name value`, `--name=value` or a bare `--switch` (true).

    Dashes and underscores in names are the same. A tuple field takes all words up to the next flag.
    What the class may have besides its fields:
      PRESETS  {name: {flag: value}}: `--preset name` replaces defaults; flags that are given win
      FIRST    the flag that words before all flags belong to
      RANGES   {flag: range} that a given value must be within (`check_range`)
    raises: UserError for an unknown, repeated, mistyped, missing, empty or impossible flag."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(_help(cls))
        raise SystemExit(0)
    if hasattr(cls, "FIRST") and words and not words[0].startswith("--"):
        words.insert(0, "--" + cls.FIRST)
    given = _given(typing.get_type_hints(cls), words)
    ranges = dict(RANGES)
    for c in reversed(cls.__mro__):
        ranges |= vars(c).get("RANGES", {})
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    for name, value in given.items():
        check_range(name, value, ranges.get(name, ()))
        may_be_empty = fields[name] is None or ranges.get(name) == ()
        if (value == () or not str(value).strip()) and not may_be_empty:  # an unset variable?
            raise UserError(f"--{name} is empty; give it a value, or leave it out")
    presets = vars(cls).get("PRESETS", {})
    if "preset" in given and presets:
        check_range("preset", given["preset"], tuple(presets))
        given = presets[given["preset"]] | given
    required = [name for name, default in fields.items() if default is dataclasses.MISSING]
    if missing := [f"--{name}" for name in required if name not in given]:
        raise UserError(f"missing {', '.join(missing)}")
    return cls(**given)


def _given(kinds: dict[str, type], words: list[str]) -> dict[str, object]:
    """What the words of a command line give to which flag, in the flag's type."""
    given = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise UserError(f"unknown flag {word.split('=')[0]!r}{hint} (--help lists all flags)")
        if name in given:
            raise UserError(f"--{name} is given twice; keep one of them")
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        given[name] = _convert(name, kinds[name], values)
    return given


def _convert(name: str, kind: type, words: list[str]):
    """Turn the words after a flag into a value of the field's type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # `str | None`
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:  # `tuple[int, ...]`, `tuple[str, ...]`
        return tuple(_convert(name, typing.get_args(kind)[0], [w]) for w in words)
    if kind is bool and not words:
        return True
    if len(words) != 1:
        shown = " ".join(words) or "nothing"
        raise UserError(f"--{name} takes one value, got {len(words)}: {shown}")
    word = words[0]
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise UserError(f"--{name} is true or false, got {word!r}")
        return word.lower() == "true"
    if kind is str:  # a shell leaves `~` as it is in --out=~/clip.mp4
        return os.path.expanduser(word) if word.startswith("~/") else word
    try:
        return kind(word)
    except ValueError:
        want = "a whole number" if kind is int else "a number"
        raise UserError(f"--{name} needs {want}, got {word!r}") from None


def check_range(name: str, value: object, limits: tuple) -> None:
    """Refuse a flag's value outside its range; a tuple's values one by one.

    limits: (lowest, highest), where None is no limit; (lowest, highest, how many values); or the
        words that are allowed; or () for anything, even nothing.  A number must be finite.
    raises: UserError"""
    values = value if isinstance(value, tuple) else (value,)
    shown = " ".join(map(str, values)) or "nothing"
    if any(isinstance(x, float) and not math.isfinite(x) for x in values):
        raise UserError(f"--{name} {shown} must be finite")
    if not limits:
        return
    if isinstance(limits[0], str):
        if not set(values) <= set(limits):
            raise UserError(f"--{name} {shown!r} must be {' or '.join(limits)}")
        return
    low, high, *count = limits
    if count and len(values) != count[0]:
        raise UserError(f"--{name} takes {count[0]} numbers, got {len(values)}: {shown}")
    for x in values:
        if (low is not None and x < low) or (high is not None and x > high):
            bound = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UserError(f"--{name} {shown} must be {bound}")


def _help(cls: type) -> str:
    """The dataclass's source is the help: a line per field, inherited ones last."""
    comments = {}
    for c in cls.__mro__[-2::-1]:
        comments |= _comments(inspect.getsource(c))
    rows = []
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__):
        default = "required" if f.default is dataclasses.MISSING else f.default
        rows.append(f"  --{f.name:<18} {comments.get(f.name, '')}  [{default}]")
    usage = f"usage: python {os.path.basename(sys.argv[0])} [--flag value ...]"
    return "\n\n".join([usage, inspect.getdoc(cls), "\n".join(rows)])


def _comments(source: str) -> dict[str, str]:
    """Field -> the first comment behind it, even some lines below."""
    comments, name = {}, ""
    for line in source.splitlines():
        if field := re.match(r"    (\w+):", line):
            name = field[1]
        elif re.match(r"    [^\s)]", line):
            name = ""
        _, mark, comment = line.partition("# ")
        if name and mark:
            comments.setdefault(name, comment)
    return comments
