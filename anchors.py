"""An order is data: every way to generate a video is a plan, a list of steps.

A step says which latents it finishes (*targets*), which it denoises along with them and throws away (*anchors*), which
finished latents it *reads*, and the temporal position of each. Masks, rollouts, metrics and pictures follow from the
plan, so they cannot disagree, and a new order is a few lines here.

Blockwise anchors (paper Sec. 4.1): the VAE decodes a latent from its past, and in backward order the past of a block
does not exist yet. So the block imagines it: P anchors before its targets are denoised together with them, under full
attention, and dropped. backward(9, block=3, anchors=3), one line a step, in time:

    step 0    .  .  .  a  a  a  T  T  T      T target   a anchor, dropped   r read from the cache
    step 1    a  a  a  T  T  T  r  r  r      The block of latent 0 has no anchors: nothing precedes it.
    step 2    T  T  T  r  r  r  r  r  r      That also tells it to make the image latent.

Latents are numbered in time, 0 .. length-1. Negative numbers are latents that are never shown: ~i (that is -1-i) is a
dummy standing at latent i (the paper's baseline without anchors). No tensors of videos here, no model, no cache.

    python anchors.py --order backward --latents 9                 # the picture above; --out plan.png for Fig. 8 and 9
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import imageio.v3 as iio
import numpy as np
import torch

from dit import Visible
from lib.common import UserError, atomic, run
from lib.picture import draw_grid

HORIZON = 21  # positions and latents the model has seen at once in training [paper Sec. 4.3]
IMAGINED = (
    1 << 20
)  # where anchors do not share their noise, that of latent i's anchor is number i + IMAGINED
SINK_GAP = 3  # empty positions between a block and a sink moved to its far side [paper A.2]


@dataclass(frozen=True)
class Step:
    """Denoise `anchors + targets` jointly, seeing each other and `reads`; keep the targets.

    pos: temporal positions of anchors + targets, in that order; reads: (latent, position) of finished latents;
    prompt: which text it follows; given: those of its latents that are the user's own. They are held clean (t = 0) while the
    others are denoised; a step whose targets are all given denoises nothing and only commits them."""

    targets: tuple[int, ...]
    pos: tuple[int, ...]
    anchors: tuple[int, ...] = ()
    reads: tuple[tuple[int, int], ...] = ()
    prompt: int = 0
    given: tuple[int, ...] = ()

    @property
    def own(self) -> tuple[int, ...]:
        return self.anchors + self.targets

    def noise(self, share: str, level: int) -> tuple[int, ...]:
        """The number of the noise of each of the step's latents at a denoising level (0 is where it starts).

        share: at which levels an anchor has the noise that its latent will have as a target: "none", "start" or "all"."""
        if share == "all" or (share == "start" and level == 0):
            return self.own
        return tuple(i + IMAGINED for i in self.anchors) + self.targets

    @property
    def commits(self) -> bool:
        """Whether nothing is left to denoise."""
        return set(self.given) >= set(self.targets)


@dataclass(frozen=True)
class Plan:
    """Steps in order of generation; together they finish latents 0 .. length-1."""

    name: str
    length: int
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        finished: set[int] = set()
        for n, step in enumerate(self.steps):
            unread = [i for i, _ in step.reads if i not in finished]
            places = [*step.pos, *(p for _, p in step.reads)]
            span, where = max(places) - min(places) + 1, f"step {n} of the plan {self.name!r}"
            again = sorted({i for i in step.targets if i in finished or step.targets.count(i) > 1})
            if unread or again:
                raise UserError(
                    f"{where} reads latents {unread} before they are finished or finishes {again} a second time"
                )
            if len(set(step.own)) < len(step.own):
                raise UserError(
                    f"{where} has latents twice among its anchors {step.anchors} and targets {step.targets}"
                )
            if set(step.given) - set(step.own) or (step.commits and step.anchors):
                raise UserError(
                    f"{where} is given {step.given} but makes {step.targets} with the anchors {step.anchors}"
                )
            if len(step.pos) != len(step.own) or len(set(places)) < len(places):
                raise UserError(
                    f"{where} puts {len(step.own)} latents and {len(step.reads)} reads on positions {sorted(places)}"
                )
            if span > HORIZON:
                raise UserError(
                    f"{where} spans {span} positions, over the horizon of {HORIZON}: shorten the window, gap or block"
                )
            finished |= set(step.targets)
        if missing := sorted(set(range(self.length)) - finished):
            raise UserError(f"the plan {self.name!r} never generates latents {missing}")

    @cached_property
    def last_read(self) -> dict[int, int]:
        """latent -> the last step that reads it; latents that no step reads are absent."""
        return {i: n for n, step in enumerate(self.steps) for i, _ in step.reads}

    @cached_property
    def capacity(self) -> int:
        """The most finished latents that a later step still reads, at any time: the slots a cache needs."""
        most, alive = 1, set()
        for n, step in enumerate(self.steps):
            alive = {i for i in alive | set(step.targets) if self.last_read.get(i, -1) > n}
            most = max(most, len(alive))
        return most

    def boundaries(self) -> list[bool]:
        """For each pair of latents i, i+1: True where two different steps made them (an inter-block boundary)."""
        maker = {i: n for n, step in enumerate(self.steps) for i in step.targets}
        return [maker[i] != maker[i + 1] for i in range(self.length - 1)]

    def prompts(self) -> int:
        """How many prompts the plan asks for."""
        return 1 + max(step.prompt for step in self.steps)


# ---------------------------------------------------------------- the orders
def _blocks(length: int, block: int) -> list[range]:
    if block < 1 or length < 1 or length % block:
        below = max(length // block * block, block) if block > 0 else 0
        raise UserError(
            f"{length} latents is not a multiple of the block {block}; use {below} or {below + block}"
        )
    return [range(s, s + block) for s in range(0, length, block)]


def _place(latents: Sequence[int], at: int) -> tuple[tuple[int, int], ...]:
    """Consecutive positions from `at`: _place((0, 1), 18) -> ((0, 18), (1, 19))."""
    return tuple((i, at + j) for j, i in enumerate(latents))


def _context(
    done: Sequence[int],
    window: int | None,
    sink: bool,
    far_sink: bool,
    first: Sequence[int],
    second: Sequence[int],
) -> tuple[list[int], list[int]]:
    """What a block reads: (sink + window, far sink). `done` and the blocks run from the oldest latent to the newest; a
    sink counts only once it has left the window, so that no latent is seen twice."""
    local = list(done) if window is None else list(done)[max(len(done) - window, 0) :]
    kept = [i for i in first if sink and i not in local and i in done]
    far = [i for i in second if far_sink and i not in local and i in done]
    return kept + local, far


def _onward(
    b: range,
    done: Sequence[int],
    window: int | None = None,
    past_sink: bool = False,
    future_sink: bool = False,
    first: Sequence[int] = (),
    second: Sequence[int] = (),
    prompt: int = 0,
) -> Step:
    """One block of forward order after the finished latents `done`, oldest first."""
    near, far = _context(done, window, past_sink, future_sink, first, second)
    at = len(near)
    return Step(
        tuple(b),
        tuple(range(at, at + len(b))),
        reads=_place(near, 0) + _place(far, at + len(b) + SINK_GAP),
        prompt=prompt,
    )


def _back(
    b: range,
    done: Sequence[int],
    anchors: int,
    window: int | None = None,
    past_sink: bool = False,
    future_sink: bool = False,
    first: Sequence[int] = (),
    second: Sequence[int] = (),
    prompt: int = 0,
) -> Step:
    """One block of backward order before the finished latents `done`, oldest (the last in time) first."""
    imagined = tuple(range(max(b.start - anchors, 0), b.start))
    near, far = _context(done, window, future_sink, past_sink, first, second)
    far = far if b.start else []  # nothing lies before latent 0
    own = imagined + tuple(b)
    at = b.start - len(imagined) if window is None else (len(far) + SINK_GAP if far else 0)
    return Step(
        tuple(b),
        tuple(range(at, at + len(own))),
        imagined,
        _place(far, 0) + _place(near[::-1], at + len(own)),
        prompt,
    )


def forward(
    length: int = 21,
    block: int = 3,
    window: int | None = None,
    past_sink: bool = False,
    future_sink: bool = False,
) -> Plan:
    """Blocks from left to right, each reading all before it (paper Fig. 8a) or, with a window, the last `window` latents.

    past_sink: the first block stays in view, just before the window; future_sink: the second block, once out of the
    window, is read 3 positions *after* the current one (paper A.2). With a window positions restart at 0 each step."""
    blocks = _blocks(length, block)
    sinks = past_sink, future_sink, blocks[0], blocks[min(1, len(blocks) - 1)]
    return Plan(
        "forward", length, tuple(_onward(b, range(b.start), window, *sinks) for b in blocks)
    )


def backward(
    length: int = 21,
    block: int = 3,
    anchors: int = 3,
    window: int | None = None,
    past_sink: bool = False,
    future_sink: bool = False,
    head: int | None = None,
    dummy: bool = False,
) -> Plan:
    """Blocks from right to left, each with `anchors` imagined latents before it, reading all after it (paper Fig. 8d).

    head: size of the block of latent 0, which has no anchors (default: block; the paper's baseline of Fig. 8c is
    block=6, anchors=0, head=3). dummy: the paper's baseline without anchors (Fig. 8b): a dummy block at the start of
    the clip is generated first and read by the first real block alone, to tell it that it is not the beginning.
    Sinks mirror `forward`: the first generated block stays in the future, the second is moved to the past."""
    head = block if head is None else head
    if not 0 <= anchors <= block:
        raise UserError(f"{anchors} anchors do not fit the block {block}; use 0 to {block}")
    if (length - head) % block or length < head:
        _blocks(length, block)
        raise UserError(f"{length} latents are not a head of {head} and blocks of {block}")
    order = [range(s, s + block) for s in range(length - block, head - 1, -block)] + [range(head)]
    steps = [
        _back(
            b,
            range(length - 1, b.stop - 1, -1),
            anchors,
            window,
            past_sink,
            future_sink,
            order[0][::-1],
            order[min(1, len(order) - 1)],
        )
        for b in order
    ]
    if dummy:
        reads = _place([~i for i in range(head)], 0)
        steps[:1] = [
            Step(tuple(i for i, _ in reads), tuple(range(head))),
            replace(steps[0], reads=reads + steps[0].reads),
        ]
    return Plan("backward", length, tuple(steps))


def inbetween(
    head: int = 3, gap: int = 15, tail: int = 3, anchors: int = 3, given: bool = False
) -> Plan:
    """Head, then tail, then all of the gap as one block that sees both (paper A.2).

    given: head and tail are the user's; else they are generated, the tail with anchors so that it is no beginning."""
    length, at = head + gap + tail, head + gap
    if min(head, gap, tail) < 1 or not 0 <= anchors <= gap:
        raise UserError(
            f"head {head}, gap {gap} and tail {tail} must be at least 1 and anchors {anchors} at most the gap"
        )
    imagined, ends = tuple(range(at - anchors, at)), _place(range(head), 0)
    plan = Plan(
        "inbetween",
        length,
        (
            Step(tuple(range(head)), tuple(range(head))),
            Step(tuple(range(at, length)), imagined + tuple(range(at, length)), imagined, ends),
            Step(
                tuple(range(head, at)),
                tuple(range(head, at)),
                reads=ends + _place(range(at, length), at),
            ),
        ),
    )
    return with_given(plan, (*range(head), *range(at, length))) if given else plan


def loop(length: int = 21, block: int = 3, gap: int | None = None) -> Plan:
    """Forward up to a last gap (default 15), which reads its past and, in its future, the head once more.

    loop(18): the head stands at positions 0-2 and 18-20 at once, the 15 latents between are one block."""
    gap = min(HORIZON - 2 * block, length - block) if gap is None else gap
    rest = length - gap
    if gap < 1 or rest < block:
        raise UserError(
            f"a loop of {length} latents needs room for a first block of {block} and a gap of at least 1, got {gap}"
        )
    start = forward(rest, block, None if rest <= HORIZON else 2 * block, past_sink=rest > HORIZON)
    near = range(rest)[-max(HORIZON - gap - block, 1) :]
    at = len(near)
    close = Step(
        tuple(range(rest, length)),
        tuple(range(at, at + gap)),
        reads=_place(near, 0) + _place(range(block), at + gap),
    )
    return Plan("loop", length, (*start.steps, close))


def timeline(
    length: int,
    scenes: Sequence[tuple[int, int]],
    block: int = 3,
    anchors: int = 3,
    window: int | None = None,
    past_sink: bool = False,
    future_sink: bool = False,
    order: Sequence[int] = (),
    joined: bool = False,
    split_gaps: bool = True,
) -> Plan:
    """Scenes (start, stop) first, in `order`, wherever they stand; then all that is missing: between, after, before them.

    A scene is forward, blind to the others, with its own prompt; if it does not begin the video, its first block has
    anchors and no past: that makes it the middle of a video. A gap sees 6 latents on either side and is one block if it
    fits the horizon, else it first grows forward; it follows the prompt of the scene it leads to [ours]. split_gaps: the first
    half of a gap of two blocks or more is made forward, sees only the scene before it and follows that one's prompt; the rest sees
    both sides. Without it colours of both prompts mix in the gap [measured: 10 of 78 frames, 1 of 78 with it]. After the last scene come forward blocks, before the first backward blocks with anchors; window and sinks are theirs. joined: the first block
    of a later scene sees the end of the scene before it across the gap, if both fit the horizon (as in `inbetween`)."""
    edges = [i for scene in scenes for i in scene]
    if (
        not edges
        or edges[0] < 0
        or edges[-1] > length
        or edges != sorted(edges)
        or any(a == b for a, b in scenes)
    ):
        raise UserError(
            f"scenes {list(scenes)} do not lie one after the other within {length} latents"
        )
    if sorted(order or range(len(scenes))) != list(range(len(scenes))):
        raise UserError(
            f"the order of scenes {list(order)} must name each of 0 to {len(scenes) - 1} once"
        )
    if block < 1 or not 0 <= anchors <= block:
        raise UserError(f"{anchors} anchors do not fit the block {block}; use 0 to {block}")

    def pieces(start: int, stop: int) -> list[range]:  # if blocks do not fit, the first is smaller
        cuts = [start, *range(start + ((stop - start) % block or block), stop + 1, block)][
            : stop - start + 1
        ]
        return [range(a, b) for a, b in zip(cuts, cuts[1:])]

    steps, (low, high), last, side = [], (edges[0], edges[-1]), len(scenes) - 1, 2 * block
    for n in order or range(len(scenes)):
        start, stop = scenes[n]
        before = (
            range(*scenes[n - 1])[-block:]
            if joined and n and start - scenes[n - 1][1] <= HORIZON - 2 * block
            else range(start, start)
        )
        for b in pieces(start, stop):
            if b.start == start:
                own = range(max(start - anchors, before.stop if before else 0), b.stop)
                steps.append(
                    Step(
                        tuple(b),
                        tuple(i - (before or own).start for i in own),
                        tuple(own[: -len(b)]),
                        _place(before, 0),
                        n,
                    )
                )
            else:
                steps.append(_onward(b, range(start, b.start)[-(HORIZON - block) :], prompt=n))
    for n, ((_, at), (start, stop)) in enumerate(zip(scenes, scenes[1:]), 1):
        whole = start - at
        alone = at  # up to here the gap sees only what lies before it
        if split_gaps and not joined and whole >= 2 * block:
            alone = at + max(whole // 2 // block, 1) * block
        while at < alone or start - at > HORIZON - side:
            seen = range(low, at)[-side:]
            follows = n - 1 if at < alone else n
            steps.append(_onward(range(at, at + block), seen, prompt=follows))
            at += block
        if gap := start - at:
            see = min((HORIZON - gap) // 2, side)
            left, right = range(low, at)[-see:], range(start, stop)[:see]
            steps.append(
                Step(
                    tuple(range(at, start)),
                    tuple(range(len(left), len(left) + gap)),
                    reads=_place(left, 0) + _place(right, len(left) + gap),
                    prompt=n,
                )
            )
    start, stop = (
        scenes[last][0],
        scenes[0][1],
    )  # sinks: the two blocks of the scene that lie farthest from what is made
    for b in pieces(high, length):
        steps.append(
            _onward(
                b,
                range(low, b.start),
                window,
                past_sink,
                future_sink,
                range(start, start + block),
                range(start + block, start + 2 * block),
                last,
            )
        )
    for b in pieces(0, low)[::-1]:
        steps.append(
            _back(
                b,
                range(length - 1, b.stop - 1, -1),
                anchors,
                window,
                past_sink,
                future_sink,
                range(stop - 1, stop - 1 - block, -1),
                range(stop - 2 * block, stop - block),
            )
        )
    return Plan("timeline", length, tuple(steps))


def story(
    scenes: Sequence[int] = (9, 9, 9),
    gap: int = 6,
    block: int = 3,
    anchors: int = 3,
    split_gaps: bool = True,
) -> Plan:
    """Key scenes first, then the gaps between them, all of one size (`timeline`)."""
    if not scenes or gap < 1 or gap > HORIZON - 2 * block:
        raise UserError(
            f"a story needs scenes and a gap of 1 to {HORIZON - 2 * block}, got {len(scenes)} scenes and gap {gap}"
        )
    starts = [
        n * gap + sum(_blocks(size, block)[-1].stop for size in scenes[:n])
        for n in range(len(scenes))
    ]
    plan = timeline(
        starts[-1] + _blocks(scenes[-1], block)[-1].stop,
        [(at, at + n) for at, n in zip(starts, scenes)],
        block,
        anchors,
        split_gaps=split_gaps,
    )
    return replace(plan, name="story")


def transition(
    first: int = 9,
    gap: int = 6,
    second: int = 9,
    block: int = 3,
    anchors: int = 3,
    split_gaps: bool = True,
) -> Plan:
    """A story of two scenes."""
    return replace(story((first, second), gap, block, anchors, split_gaps), name="transition")


def with_given(plan: Plan, latents: Sequence[int]) -> Plan:
    """The same plan where these latents are the user's own; a step that only commits imagines nothing."""

    def mark(s: Step) -> Step:
        if mine.issuperset(s.targets):
            return replace(s, anchors=(), pos=s.pos[len(s.anchors) :], given=s.targets)
        return replace(s, given=tuple(i for i in s.own if i in mine))

    mine = set(latents)
    return replace(plan, steps=tuple(map(mark, plan.steps)))


def switch(plan: Plan, starts: Sequence[int]) -> Plan:
    """The same plan with prompt n + 1 from latent starts[n] on, in time: a step follows the prompt of its first target."""
    return replace(
        plan,
        steps=tuple(
            replace(s, prompt=sum(i <= max(s.targets[0], 0) for i in starts)) for s in plan.steps
        ),
    )


def long(
    length: int,
    direction: str = "forward",
    block: int = 3,
    anchors: int = 3,
    window: int = 6,
    sink: str = "both",
) -> Plan:
    """Forward or backward past the horizon, at constant memory: a window and sinks on the past, future or both sides."""
    if sink not in ("past", "future", "both", "none"):
        raise UserError(f"unknown sink {sink!r}; use past, future, both or none")
    if direction not in ("forward", "backward") or window < 0:
        raise UserError(
            f"direction {direction!r} must be forward or backward and window {window} at least 0"
        )
    sinks = {
        "window": window,
        "past_sink": sink in ("past", "both"),
        "future_sink": sink in ("future", "both"),
    }
    return (
        forward(length, block, **sinks)
        if direction == "forward"
        else backward(length, block, anchors, **sinks)
    )


def both_directions(
    length: int = 21, block: int = 3, anchors: int = 3, head: int = 0
) -> tuple[Plan, Plan]:
    """The forward and the backward plan that train a student, in both stages (paper App. B.1 and B.2).

    head: size of the forward blocks and of the block of latent 0 (0: block). Without anchors, backward blocks of the
    forward size could be taken for a beginning, so a dummy block comes first."""
    head = head or block
    return forward(length, head), backward(
        length, block, anchors, head=head, dummy=not anchors and head == block
    )


ORDERS: dict[str, Callable[..., Plan]] = {
    f.__name__: f for f in (forward, backward, inbetween, loop, transition, story, long)
}


# ---------------------------------------------------------------- what a training run draws from
Mix = tuple[
    tuple[float, tuple[Plan, ...]], ...
]  # (share, the plans of one iteration); the shares sum to 1


def paper_mix(length: int = 21, block: int = 3, anchors: int = 3, head: int = 0) -> Mix:
    """The paper's: forward and backward over the whole clip, in each iteration (App. B.1 and B.2)."""
    return ((1.0, both_directions(length, block, anchors, head)),)


def any_mix(length: int = 21, block: int = 3, anchors: int = 3, head: int = 0) -> Mix:
    """Both directions at every length, with the window and sinks of long video, before and after given clips; and pictures [ours].

    A student trained at one length alone knows latent 0 by what stands where the clip's end always stood, and makes a
    video latent of it at any other length [measured: frame 0 in wrong colours in 40 to 95 % of the clips]."""
    window, single = 2 * block, (forward(1, 1),)
    whole = both_directions(length, block, anchors, head)
    shorter = [
        both_directions(n, block, anchors, head)
        for n in range(2 * block, length, block)
        if not head or head == block
    ]
    windowed = [
        (
            long(length, "forward", block, anchors, window, sink),
            long(length, "backward", block, anchors, window, sink),
        )
        for sink in ("both", "none")
        if length > window + 2 * block
    ]
    given = [
        tuple(
            replace(
                with_given(
                    timeline(n, [scene], block, anchors, view, bool(view), bool(view)),
                    range(*scene),
                ),
                name=name,
            )
            for name, scene in (("after a clip", (0, k)), ("before a clip", (n - k, n)))
        )
        for n, k, view in (
            (length, 4 * block, None),
            (length, 4 * block, window),
            (5 * block, 4 * block, None),
            (length, 2 * block, None),
        )
        if k < n <= length
    ]
    parts = ((0.25, [whole]), (0.3, shorter), (0.2, windowed), (0.2, given), (0.05, [single]))
    total = sum(share for share, sets in parts if sets)  # a short clip has no room for some
    return tuple((share / total / len(sets), plans) for share, sets in parts for plans in sets)


def prefix_mix(length: int = 21) -> Mix:
    """The bidirectional teacher's: all latents of a clip or of its beginning at once, and single pictures beside them [ours]."""
    picture = replace(forward(1, 1), name="picture")
    shares = [(2 / 3 / length + (n == length) / 3, forward(n, n)) for n in range(1, length + 1)]
    return tuple((share, (replace(plan, name="clip"), picture)) for share, plan in shares)


MIXES: dict[str, Callable[..., Mix]] = {"paper": paper_mix, "any": any_mix}


def without_given(mix: Mix) -> Mix:
    """The plans of a mix that need no clip from outside."""
    kept = [
        (share, plans)
        for share, plans in mix
        if not any(step.given for plan in plans for step in plan.steps)
    ]
    return tuple((share / sum(s for s, _ in kept), plans) for share, plans in kept)


def draw(mix: Mix, u: float) -> int:
    """Which entry of the mix a number u in [0, 1) stands for."""
    edges = np.cumsum([share for share, _ in mix])
    return min(int(np.searchsorted(edges, u, side="right")), len(mix) - 1)


# ---------------------------------------------------------------- a plan as one sequence (stage 1)
@dataclass(frozen=True)
class Layout:
    """All steps of a plan side by side, for one masked pass (paper Fig. 8). One entry per sequence slot:

    latent, step, pos: which latent stands there, for which step, at which position; is_target: not an anchor;
    is_clean: a finished latent of teacher forcing, only there to be read. A latent that is anchor and target has a slot
    for each (replicated anchors). visible: who sees whom."""

    latent: tuple[int, ...]
    step: tuple[int, ...]
    pos: tuple[int, ...]
    is_target: tuple[bool, ...]
    is_clean: tuple[bool, ...]
    visible: Visible


def layout(plan: Plan, teacher_forcing: bool = False) -> Layout:
    """Targets of all steps in order of generation, then the anchors of all steps. A slot sees its own step, and the
    *target* slots of the latents its step reads. forward(6): spans ((0, 3, ((0, 3),)), (3, 6, ((0, 6),))).

    teacher_forcing: [clean | noisy]. The targets of every step that is read stand at the front once more, for the data;
    they see each other and the clean slots their step reads, and what others read is they, as in a rollout's cache.
    forward(6): clean 0-2, then 0-2 and 3-5: spans ((0, 3, ((0, 3),)), (3, 6, ((3, 6),)), (6, 9, ((0, 3), (6, 9))))."""
    made = [
        (n, step) for n, step in enumerate(plan.steps) if not (teacher_forcing and step.commits)
    ]  # what is given is only read
    slots = [
        (i, n, p, target, False)
        for target in (True, False)
        for n, step in made
        for i, p in zip(step.own, step.pos)
        if (i in step.targets) == target
    ]
    if teacher_forcing:
        slots = [
            (i, n, p, True, True)
            for n, step in enumerate(plan.steps)
            if plan.last_read.keys() & step.targets
            for i, p in zip(step.targets, step.pos[len(step.anchors) :])
        ] + slots
    home = {
        slot[0]: s for s, slot in enumerate(slots) if slot[3] and slot[4] == teacher_forcing
    }  # where a latent is read
    keys = [(s, slot[2]) for s, slot in enumerate(slots)]
    extra = {
        (home[i], p): None for step in plan.steps for i, p in step.reads
    }  # a key at another position: one more key
    keys += [key for key in extra if key not in keys]
    column = {key: j for j, key in enumerate(keys)}
    spans: list[tuple] = []
    for _, group in groupby(
        enumerate(slots), lambda x: x[1][1::3]
    ):  # (step, clean): they see the same
        members = [s for s, _ in group]
        _, n, _, _, clean = slots[members[0]]
        own = [s for s, slot in enumerate(slots) if slot[1::3] == (n, clean)]
        seen = sorted(own + [column[home[i], p] for i, p in plan.steps[n].reads])
        edges = np.flatnonzero(np.diff(np.array([-2, *seen, len(keys) + 2])) > 1)
        spans.append(
            (
                members[0],
                members[-1] + 1,
                tuple((seen[a], seen[b - 1] + 1) for a, b in zip(edges[:-1], edges[1:])),
            )
        )
    moved = len(keys) > len(slots)
    visible = Visible(tuple(spans), *(torch.tensor(x) if moved else None for x in zip(*keys)))
    return Layout(*zip(*slots), visible)


# ---------------------------------------------------------------- pictures
def text_picture(plan: Plan) -> str:
    """One line a step, one column a latent: T target, G given, a anchor, r read, . unseen; d: the dummy block."""
    shown = sorted(
        {i for step in plan.steps for i in step.own} | set(range(plan.length)),
        key=lambda i: (i >= 0, abs(i)),
    )
    lines = ["latent    " + " ".join(f"{i if i >= 0 else 'd':>2}" for i in shown)]
    for n, step in enumerate(plan.steps):
        mark = (
            {i: "r" for i, _ in step.reads}
            | {i: "a" for i in step.anchors}
            | {i: "G" if i in step.given else "T" for i in step.targets}
        )
        moved = " ".join(
            f"{i}@{p}"
            for i, p in step.reads
            if dict(zip(step.own, step.pos)).get(i, None) is None
            and p - i != step.pos[-1] - step.targets[-1]
        )
        lines.append(
            f"step {n:<4} "
            + " ".join(f"{mark.get(i, '.'):>2}" for i in shown)
            + (f"   moved: {moved}" if moved else "")
        )
    return "\n".join(lines)


COLOURS = {
    ".": (255, 255, 255),
    "T": (88, 163, 90),
    "G": (120, 120, 120),
    "a": (244, 200, 66),
    "r": (190, 225, 190),
    "d": (90, 140, 220),
}


def picture(plan: Plan) -> np.ndarray:
    """uint8 [H, W, 3]: above, the order of generation (paper Fig. 9), below, the stage-1 mask (Fig. 8), a row per query.

    Green: targets, light green: read, yellow: anchors, blue: dummy, grey: given. Numbers are latents."""

    def name(i: int) -> str:
        return f"d{~i}" if i < 0 else str(i)

    dummies = sorted({i for step in plan.steps for i in step.own if i < 0}, reverse=True)
    shown = [*dummies, *range(plan.length)]
    order = []
    for step in plan.steps:
        mark = {i: "r" for i, _ in step.reads} | {i: "a" for i in step.anchors}
        mark |= {i: "d" if i < 0 else "G" if i in step.given else "T" for i in step.targets}
        order.append([mark.get(i, ".") for i in shown])
    panels = [
        draw_grid(order, [str(n) for n in range(len(order))], [name(i) for i in shown], COLOURS)
    ]
    lay = layout(plan)
    if (
        len(lay.latent) <= 64 and lay.visible.key_slot is None
    ):  # beyond that, or with moved keys, a mask tells nothing
        dense, show = (
            lay.visible.dense(),
            sorted(
                range(len(lay.latent)),
                key=lambda s: (
                    min(plan.steps[lay.step[s]].targets) if lay.latent[s] >= 0 else -9,
                    lay.pos[s],
                ),
            ),
        )
        kind = [
            "d" if lay.latent[s] < 0 else "T" if lay.is_target[s] else "a"
            for s in range(len(lay.latent))
        ]
        rows = [
            [(kind[k] if lay.step[k] == lay.step[q] else "r") if dense[q, k] else "." for k in show]
            for q in show
        ]
        labels = [name(lay.latent[s]) for s in show]
        panels.append(draw_grid(rows, labels, labels, COLOURS))
    width = max(p.shape[1] for p in panels)
    return np.concatenate(
        [np.pad(p, ((0, 16), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in panels]
    )


def write_picture(path: str | os.PathLike, plan: Plan) -> None:
    """`picture` as a PNG."""
    with atomic(path) as tmp:
        iio.imwrite(tmp, picture(plan))


@dataclass
class Config:
    """Print a plan; write its picture."""

    order: str = "backward"  # forward, backward, inbetween, loop, transition, story or long
    latents: int = 21  # how many (forward, backward, loop, long)
    block: int = 3  # latents a step finishes (forward, backward, loop, transition, story, long)
    anchors: int = 3  # imagined latents before each backward block
    out: str = ""  # a .png for the picture
    dummy: bool = False  # the paper's baseline without anchors (with --anchors 0)


def main(config: Config) -> None:
    if config.order not in ORDERS:
        raise UserError(f"unknown order {config.order!r}; use {', '.join(ORDERS)}")
    accepts = ORDERS[config.order].__code__.co_varnames[: ORDERS[config.order].__code__.co_argcount]
    values = {
        "length": config.latents,
        "block": config.block,
        "anchors": config.anchors,
        "dummy": config.dummy,
    }
    plan = ORDERS[config.order](**{k: v for k, v in values.items() if k in accepts})
    print(text_picture(plan))
    print(
        f"{plan.length} latents in {len(plan.steps)} steps; the cache holds at most {plan.capacity}"
    )
    if config.out:
        write_picture(config.out, plan)


if __name__ == "__main__":
    run(main, Config)
