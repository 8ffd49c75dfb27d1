"""Following one iteration of stage 2 opens the files that README names, no deeper than it says.

A walk: one iteration of train_dmd.py (student's and critic's update, tiny networks) under
sys.setprofile. A frame counts if its code is in the project. Plumbing is what lies in lib/: it is
called and not followed, so it does not count as depth, but it must not call the method back.

    python -m pytest -s tests/test_walk.py        # prints the walk
"""

import re
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest
from pages import README, ROOT
from tiny import tiny_checkpoints

import train_dmd

IDEAS = {"train_dmd.py", "sampler.py", "dit.py", "kvcache.py"}
ASKED = {  # file -> what an iteration asks it for: facts, no idea is visited there
    "anchors.py": ("Step.", "Plan."),  # what a plan holds
    "plans.py": ("draw", "rows_of"),  # which plans are drawn, and how much noise they need
}
DEPTH = 8


def project_file(frame: FrameType) -> str:
    """The frame's file as a path from the project's root; "" for code of others and of tests."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT):
        return ""
    file = path.relative_to(ROOT).as_posix()
    return "" if file.startswith((".", "tests/")) else file


class Walk:
    """What was visited: (file, function) -> calls, and the deepest stack of the project's own."""

    def __init__(self) -> None:
        self.stack: list[tuple[str, str]] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        self.deepest: list[tuple[str, str]] = []
        self.back: Counter[tuple[str, str]] = Counter()  # (a lib function, what it called)

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """What sys.setprofile calls; a generator's "return" is also each of its yields."""
        if event not in ("call", "return") or not (file := project_file(frame)):
            return
        if event == "return":
            if self.stack:
                self.stack.pop()
            return
        here = (file, frame.f_code.co_qualname)
        if self.stack and self.stack[-1][0].startswith("lib/") and not file.startswith("lib/"):
            self.back["/".join(self.stack[-1]), "/".join(here)] += 1
        self.stack.append(here)
        if not is_wrapper(here):
            self.calls[here] += 1
        if len(self.named()) > len(self.deepest):
            self.deepest = self.named()

    def named(self) -> list[tuple[str, str]]:
        """The stack as a reader follows it: without plumbing, generator expressions, lambdas."""
        return [h for h in self.stack if not h[0].startswith("lib/") and not is_wrapper(h)]

    def files(self) -> Counter[str]:
        """File -> calls."""
        total: Counter[str] = Counter()
        for (file, _), n in self.calls.items():
            total[file] += n
        return total

    def printed(self) -> str:
        """The walk as a reader wants it: files with their functions, then the deepest stack."""
        rows = ["files of one iteration (calls, functions in the order of their first call):"]
        for file, n in self.files().most_common():
            names = [name for f, name in self.calls if f == file]
            rows.append(f"{n:7,}  {file}: {', '.join(names)}")
        rows.append(f"the deepest of the project's own stacks, {len(self.deepest)} frames:")
        rows += [f"{'  ' * depth} {file}:{name}" for depth, (file, name) in enumerate(self.deepest)]
        return "\n".join(rows)


def is_wrapper(here: tuple[str, str]) -> bool:
    """Whether the frame is a generator expression or a lambda: part of its line, no jump."""
    return here[1].endswith(("<genexpr>", "<lambda>", "<listcomp>", "<dictcomp>", "<setcomp>"))


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Walk:
    """One iteration of stage 2, both updates, from the first line of the loop to its end."""
    folder = tmp_path_factory.mktemp("walk")
    files = tiny_checkpoints(folder)
    (folder / "prompts.txt").write_text("a red disc moves left over a green wave\n")
    config = train_dmd.Config(
        student=files["student"],
        teacher=files["teacher"],
        critic=files["teacher"],
        vae=files["vae"],
        prompts=str(folder / "prompts.txt"),
        latent=(6, 4, 4),
        steps=1,
        batch=2,
        sheet_every=0,
        save_every=10,
        dtype="float32",
        device="cpu",
        out=str(folder / "out"),
    )
    seen, real = Walk(), train_dmd.training_steps

    def watched(*args, **kwargs):
        for item in real(*args, **kwargs):
            main = sys._getframe(1)
            seen.stack = [(project_file(main), main.f_code.co_qualname)]
            sys.setprofile(seen)
            yield item
            sys.setprofile(None)

    train_dmd.training_steps = watched
    try:
        train_dmd.main(config)
    finally:
        sys.setprofile(None)
        train_dmd.training_steps = real
    print("\n" + seen.printed())
    return seen


def test_the_walk_sees_the_method(walk):
    """The profile saw what an iteration must do: roll out, remember, score, update."""
    functions = {name for _, name in walk.calls}
    assert {"DiT.forward", "KVCache.read", "KVCache.write", "rollout", "critic_loss"} <= functions


def test_four_files_of_ideas(walk):
    """One iteration visits the four files that README names; beside them facts, and plumbing."""
    ideas = {file for file in walk.files() if not file.startswith("lib/")}
    assert ideas - ASKED.keys() == IDEAS, walk.printed()
    said = re.search(r"iteration of stage 2 walks through four files, (.*?), at", README, re.S)[1]
    assert set(re.findall(r"`(\w+\.py)`", said)) == IDEAS


def test_facts_are_only_asked_for(walk):
    """Of the other files at top level an iteration meets what ASKED lists, and README names them:
    no order's making, no other stage's loss."""
    for file, names in ASKED.items():
        met = {name for f, name in walk.calls if f == file}
        assert met and all(name.startswith(names) for name in met), (file, met)
    said = re.search(r"it asks for facts \((.*?)\)", README, re.S)[1]
    assert set(re.findall(r"`(\w+\.py)`", said)) == ASKED.keys()


def test_plumbing_is_named(walk):
    """The files of lib/ that an iteration calls are those that README names."""
    said = re.search(r"calls plumbing\s\((.*?)\)", README, re.S)[1]
    assert set(re.findall(r"`(lib/\w+\.py)`", said)) == {
        file for file in walk.files() if file.startswith("lib/")
    }


def test_plumbing_does_not_come_back(walk):
    """What lib/ is called for it does alone: no jump from plumbing back into the method."""
    assert not walk.back


def test_the_stack_is_shallow(walk):
    """At most so many of the project's frames are open at once, and README says how many."""
    assert len(walk.deepest) == DEPTH, walk.printed()
    assert int(re.search(r"at most (\d+) calls deep", README)[1]) == DEPTH
