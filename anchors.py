"""An order is data: every way to generate a video is a plan, a list of steps.

A step says which latents it finishes (*targets*), which it denoises along with them and throws
away (*anchors*), which finished latents it *reads*, and the temporal position of each. Masks,
rollouts, metrics and pictures follow from the plan, so they cannot disagree.

Blockwise anchors (paper Sec. 4.1): the VAE decodes a latent from its past, and in backward order
the past of a block does not exist yet. So the block imagines it: P anchors before its targets are
denoised together with them, under full attention, and dropped. backward(9), one line a step:

    step 0    .  .  .  a  a  a  T  T  T      T target   a anchor, dropped   r read from the cache
    step 1    a  a  a  T  T  T  r  r  r      The block of latent 0 has no anchors: nothing precedes
    step 2    T  T  T  r  r  r  r  r  r      it. That also tells it to make the image latent.

Latents are numbered in time, 0 .. length-1. The number ~i (that is -1-i) is a dummy at latent i,
which is never shown (the paper's baseline without anchors). No videos here, no model, no cache.

    python -c "import anchors; print(anchors.text_picture(anchors.backward(9)))"
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import groupby
from typing import NamedTuple

import torch

from dit import Visible
from lib import shapes
from lib.common import UserError
from lib.letters import text_picture as text_picture
from lib.noise import IMAGINED

HORIZON = 21  # positions and latents the model has seen at once in training [paper Sec. 4.3]
SINK_GAP = 3  # empty positions between a block and a sink moved to its far side [paper A.2]

Reads = tuple[tuple[int, int], ...]  # (latent, position) pairs


@dataclass(frozen=True)
class Step:
    """Denoise `anchors + targets` jointly, seeing each other and `reads`; keep the targets."""

    targets: tuple[int, ...]
    pos: tuple[int, ...]  # positions of anchors + targets, in that order
    anchors: tuple[int, ...] = ()
    reads: Reads = ()
    prompt: int = 0  # which text it follows
    given: tuple[int, ...] = ()  # its latents that are the user's own: held clean, at t = 0

    @property
    def own(self) -> tuple[int, ...]:
        return self.anchors + self.targets

    @property
    def commits(self) -> bool:
        """Whether all targets are given: nothing is left to denoise."""
        return set(self.given) >= set(self.targets)

    def noise(self, share: str, level: int) -> tuple[int, ...]:
        """The number of the noise of each of its latents at a denoising level, from 0.

        share: at which levels an anchor has the noise that its latent will have as a target:
            "none" (its noise is its own), "start" (the first level) or "all"."""
        if share == "all" or (share == "start" and level == 0):
            return self.own
        return tuple(i + IMAGINED for i in self.anchors) + self.targets


@dataclass(frozen=True)
class Plan:
    """Steps in order of generation; together they finish latents 0 .. length-1."""

    name: str
    length: int
    steps: tuple[Step, ...]
    horizon: int = HORIZON  # the most positions a step may span

    def __post_init__(self) -> None:
        finished: set[int] = set()
        for n, step in enumerate(self.steps):
            shapes.check_step(step, finished, self.horizon, f"step {n} of the plan {self.name!r}")
            finished.update(step.targets)
        missing = sorted(set(range(self.length)) - finished)
        if missing:
            raise UserError(f"the plan {self.name!r} never generates latents {missing}")

    @cached_property
    def last_read(self) -> dict[int, int]:
        """latent -> the last step that reads it; latents that no step reads are absent."""
        return {i: n for n, step in enumerate(self.steps) for i, _ in step.reads}

    def is_read_after(self, n: int, latent: int) -> bool:
        """Whether a later step than n reads this latent."""
        return self.last_read.get(latent, -1) > n

    @cached_property
    def capacity(self) -> int:
        """The most finished latents that wait to be read at any time: the slots a cache needs."""
        most, waiting = 1, set()
        for n, step in enumerate(self.steps):
            waiting = {i for i in waiting.union(step.targets) if self.is_read_after(n, i)}
            most = max(most, len(waiting))
        return most

    @cached_property
    def made_at(self) -> dict[int, int]:
        """latent -> the step that finishes it, in order of generation."""
        return {i: n for n, step in enumerate(self.steps) for i in step.targets}

    @property
    def order(self) -> list[int]:
        """Latents in order of generation, no dummies; backward(9): [6, 7, 8, 3, 4, 5, 0, 1, 2]."""
        return [i for i in self.made_at if i >= 0]

    @cached_property
    def given(self) -> set[int]:
        """The latents that are the user's own."""
        return {i for step in self.steps for i in step.given}

    @property
    def made(self) -> list[int]:
        """`order` without those that are given."""
        return [i for i in self.order if i not in self.given]

    @property
    def comes_back_to(self) -> tuple[int, ...]:
        """Latents that a loop goes on with after its end: the last step reads them as its future,
        though they are its past."""
        last = self.steps[-1]
        after = {i: p for i, p in last.reads if i < last.targets[0] and p > last.pos[-1]}
        at_once = last.pos[-1] + 1 in after.values()  # a sink keeps a distance
        return tuple(after) if at_once else ()

    def boundaries(self) -> list[bool]:
        """For latents i, i+1: True where two different steps made them (inter-block)."""
        return [self.made_at[i] != self.made_at[i + 1] for i in range(self.length - 1)]

    def prompts(self) -> int:
        """How many prompts the plan asks for."""
        return 1 + max(step.prompt for step in self.steps)


# ---------------------------------------------------------------- one block of an order
@dataclass(frozen=True)
class View:
    """What a block sees of the finished latents: all of them, or the nearest `window` and sinks.

    past_sink, future_sink: the first two blocks that were made stay in view, one on either side
        (paper A.2). Forward, the first is the past sink; backward, the first is the future sink.
    as_trained: backward, the block of latent 0 sees what it saw in the paper's training: the
        nearest 18 latents, the farthest of them standing at the end of the horizon. For students
        that were trained at one length alone (`plans.any_mix` says why)."""

    window: int | None = None
    past_sink: bool = False
    future_sink: bool = False
    as_trained: bool = False

    def split(
        self, finished: Sequence[int], near_sink: Sequence[int], far_sink: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """What a block sees of `finished`, oldest first: (near sink + window, far sink).

        A sink counts only once it has left the window, so that no latent is seen twice."""
        cut = 0 if self.window is None else max(len(finished) - self.window, 0)
        left, window = finished[:cut], finished[cut:]
        near = [i for i in near_sink if i in left]
        far = [i for i in far_sink if i in left]
        return [*near, *window], far


EVERYTHING = View()


def place(latents: Sequence[int], at: int) -> Reads:
    """Consecutive positions from `at`: place((0, 1), 18) -> ((0, 18), (1, 19))."""
    return tuple((i, at + j) for j, i in enumerate(latents))


def forward_step(
    block: range,
    finished: Sequence[int],
    view: View = EVERYTHING,
    first: Sequence[int] = (),
    second: Sequence[int] = (),
    prompt: int = 0,
) -> Step:
    """A block after the finished latents, oldest first; first, second: what sinks are made of."""
    near, far = view.split(
        finished, first if view.past_sink else (), second if view.future_sink else ()
    )
    at = len(near)
    return Step(
        targets=tuple(block),
        pos=tuple(range(at, at + len(block))),
        reads=place(near, 0) + place(far, at + len(block) + SINK_GAP),
        prompt=prompt,
    )


def backward_step(
    block: range,
    finished: Sequence[int],
    anchors: int,
    view: View = EVERYTHING,
    first: Sequence[int] = (),
    second: Sequence[int] = (),
) -> Step:
    """A block before the finished latents (oldest, that is last in time, first) with anchors."""
    if block.start == 0 and view.as_trained:
        return _beginning(block, finished)
    has_past = view.past_sink and block.start > 0  # nothing lies before latent 0
    near, far = view.split(finished, first if view.future_sink else (), second if has_past else ())
    imagined = range(max(block.start - anchors, 0), block.start)
    if view.window is None:
        at = imagined.start  # every latent stands at its own position
    else:
        at = len(far) + SINK_GAP if far else 0
    length = len(imagined) + len(block)
    return Step(
        targets=tuple(block),
        pos=tuple(range(at, at + length)),
        anchors=tuple(imagined),
        reads=place(far, 0) + place(near[::-1], at + length),
    )


def _beginning(block: range, finished: Sequence[int]) -> Step:
    """The block of latent 0 as the paper's training knows it (`View.as_trained`)."""
    nearest = finished[::-1][: HORIZON - len(block)]  # in time
    beside, farthest = nearest[: 2 * len(block)], nearest[2 * len(block) :]
    reads = place(beside, len(block)) + place(farthest, HORIZON - len(farthest))
    return Step(tuple(block), tuple(range(len(block))), reads=reads)


def _blocks(length: int, block: int, head: int = 0) -> list[range]:
    """Cut 0 .. length-1 into a head (0: of a block) and blocks. raises: UserError"""
    head = head or block
    shapes.check_blocks(length, block, head)
    return [range(head), *(range(s, s + block) for s in range(head, length, block))]


# ---------------------------------------------------------------- the orders
def forward(length: int = 21, block: int = 3, view: View = EVERYTHING) -> Plan:
    """Blocks from left to right, each reading what lies before it (paper Fig. 8a).

    With a window positions restart at 0 each step; a future sink stands 3 positions *after* the
    block (paper A.2)."""
    blocks = _blocks(length, block)
    first, second = blocks[0], blocks[min(1, len(blocks) - 1)]
    steps = [forward_step(b, range(b.start), view, first, second) for b in blocks]
    return Plan("forward", length, tuple(steps))


def backward(
    length: int = 21,
    block: int = 3,
    anchors: int = 3,
    view: View = EVERYTHING,
    head: int = 0,
    dummy: bool = False,
) -> Plan:
    """Blocks from right to left, each with `anchors` imagined latents before it (paper Fig. 8d).

    head: size of the block of latent 0, which has no anchors; 0: block. The paper's baseline of
        Fig. 8c is block=6, anchors=0, head=3.
    dummy: the paper's baseline without anchors (Fig. 8b): a dummy at the start of the clip is made
        first, and read by the first real block alone, to tell it that it is not the beginning."""
    shapes.check_anchors(anchors, block)
    order = _blocks(length, block, head)[::-1]
    first, second = order[0][::-1], order[min(1, len(order) - 1)]
    steps = []
    for b in order:
        finished = range(length - 1, b.stop - 1, -1)
        steps.append(backward_step(b, finished, anchors, view, first, second))
    if dummy:
        unseen, end = tuple(~i for i in order[-1]), min(length, HORIZON)
        pos = tuple(range(end - len(steps[0].own), end))  # far from it, with a window too
        steps[0] = replace(steps[0], pos=pos, reads=place(unseen, 0))
        steps.insert(0, Step(unseen, tuple(order[-1])))
    return Plan("backward", length, tuple(steps))


def inbetween(length: int = 21, block: int = 3, anchors: int = 3, given: bool = False) -> Plan:
    """Head, then tail, then all of the gap as one block that sees both (paper A.2).

    given: head and tail are the user's; else they are made, the tail with anchors."""
    gap = range(block, length - block)
    shapes.check_inbetween(length, block, anchors, len(gap))
    head, tail = range(block), range(gap.stop, length)
    imagined = () if given else tuple(range(tail.start - anchors, tail.start))
    ends = place(head, 0) + place(tail, tail.start)
    users = (tuple(head), tuple(tail)) if given else ((), ())
    steps = (
        Step(tuple(head), tuple(head), given=users[0]),
        Step(tuple(tail), imagined + tuple(tail), imagined, place(head, 0), given=users[1]),
        Step(tuple(gap), tuple(gap), reads=ends),
    )
    return Plan("inbetween", length, steps)


def loop(length: int = 21, block: int = 3, gap: int = 0) -> Plan:
    """Forward up to a last gap, which reads its past and, in its future, the head once more.

    gap: latents in it; 0: 15, as far as they fit. loop(21): the gap sees latents 3-5 at positions
    0-2 and 1-3 at 18-20. Latent 0 is an image, which nothing goes on to: the last frame of the gap
    is frame 0 again, and whoever shows the loop goes on with latent 1."""
    least = max(block, 2)  # an image latent and one to come back to
    gap = gap or min(HORIZON - 2 * block, length - least)
    rest = length - gap
    shapes.check_loop(length, least, gap)
    view = EVERYTHING if rest <= HORIZON else View(window=2 * block, past_sink=True)
    near = range(rest)[-max(HORIZON - gap - block, 1) :]
    at = len(near)
    head = range(1, min(block, rest - 1) + 1)
    close = Step(
        targets=tuple(range(rest, length)),
        pos=tuple(range(at, at + gap)),
        reads=place(near, 0) + place(head, at + gap),
    )
    return Plan("loop", length, (*forward(rest, block, view).steps, close))


def long(
    length: int,
    direction: str = "forward",
    block: int = 3,
    anchors: int = 3,
    window: int = 6,
    sink: str = "both",
    as_trained: bool = False,
) -> Plan:
    """Forward or backward past the horizon, at constant memory: a window, and sinks on a side."""
    shapes.check_long(direction, window, sink)
    view = View(window, sink in ("past", "both"), sink in ("future", "both"), as_trained)
    if direction == "forward":
        return forward(length, block, view)
    return backward(length, block, anchors, view)


# Registered here, an order is known to generate, evaluate and the pictures: order(length, block,
# anchors) or fewer of these, and options of its own. (plans.py adds stories.)
ORDERS = {"forward": forward, "backward": backward, "inbetween": inbetween, "loop": loop}


# ---------------------------------------------------------------- a plan as one sequence (stage 1)
class Slot(NamedTuple):
    """A place in the sequence of one masked pass."""

    latent: int
    step: int
    pos: int
    is_target: bool  # not an anchor
    is_clean: bool  # a finished latent of teacher forcing, only there to be read
    is_given: bool  # the user's own: held clean, as in a rollout


@dataclass(frozen=True)
class Layout:
    """All steps of a plan side by side, for one masked pass (paper Fig. 8): a Slot's fields, each
    for all slots, and who sees whom. A latent that is anchor and target has a slot for each."""

    latent: tuple[int, ...]
    step: tuple[int, ...]
    pos: tuple[int, ...]
    is_target: tuple[bool, ...]
    is_clean: tuple[bool, ...]
    is_given: tuple[bool, ...]
    visible: Visible


@cache
def layout(plan: Plan, teacher_forcing: bool = False) -> Layout:
    """Targets of all steps in order of generation, then the anchors of all steps. A slot sees its
    own step, and the *target* slots of the latents its step reads.

    forward(6): spans ((0, 3, ((0, 3),)), (3, 6, ((0, 6),))).
    teacher_forcing: [clean | noisy]. The targets of every step that is read stand at the front
        once more, for the data; they see each other and the clean slots their step reads, and it
        is they that others read, as in a rollout's cache. What is given has only clean slots.
        forward(6): ((0, 3, ((0, 3),)), (3, 6, ((3, 6),)), (6, 9, ((0, 3), (6, 9))))."""
    slots = _slots(plan, teacher_forcing)
    read_at = [s.is_target and s.is_clean == teacher_forcing for s in slots]
    home = {s.latent: n for n, s in enumerate(slots) if read_at[n]}
    # A column is a slot at a position: each at its own, then again where it is read elsewhere.
    column = {(n, s.pos): n for n, s in enumerate(slots)}
    for step in plan.steps:
        for i, p in step.reads:
            column.setdefault((home[i], p), len(column))

    spans, start = [], 0
    for (n, is_clean), run in groupby(slots, key=lambda s: (s.step, s.is_clean)):
        stop = start + len(list(run))
        own = [j for j, s in enumerate(slots) if (s.step, s.is_clean) == (n, is_clean)]
        read = [column[home[i], p] for i, p in plan.steps[n].reads]
        spans.append((start, stop, ranges(own + read)))
        start = stop
    key_slot = key_pos = None
    if len(column) > len(slots):
        key_slot, key_pos = map(torch.tensor, zip(*column))
    return Layout(*zip(*slots), Visible(tuple(spans), key_slot, key_pos))


def _slots(plan: Plan, teacher_forcing: bool) -> list[Slot]:
    """The sequence: [clean targets that are read |] targets of all steps | anchors of all steps."""
    clean, targets, anchors = [], [], []
    for n, step in enumerate(plan.steps):
        slots = []
        for i, p in zip(step.own, step.pos):
            slots.append(Slot(i, n, p, i in step.targets, False, i in step.given))
        imagined, made = slots[: len(step.anchors)], slots[len(step.anchors) :]
        if teacher_forcing and any(i in plan.last_read for i in step.targets):
            clean += [slot._replace(is_clean=True) for slot in made]
        if not (teacher_forcing and step.commits):
            targets += made
            anchors += imagined
    return clean + targets + anchors


def ranges(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Half-open runs: ranges((0, 1, 2, 6, 7)) -> ((0, 3), (6, 8))."""
    runs: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][1] == n:
            runs[-1] = (runs[-1][0], n + 1)
        else:
            runs.append((n, n + 1))
    return tuple(runs)
