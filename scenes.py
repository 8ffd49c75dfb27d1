"""Several scenes: given or made, anywhere in time, in any order; then what is missing.

    [scene 0]  gap  [scene 1]  after          before  [your clip]  after

A scene is a run of latents with a prompt of its own, made forward and blind to the others, or given
by the user (`anchors.with_given`). When all scenes are there, the gaps between them are filled,
each seeing both of its sides; then the video grows forward after the last scene and backward, with
anchors, before the first. Your own clip is a plan with one scene. No files and no videos here.

    python -c "import anchors, scenes; print(anchors.text_picture(scenes.story()))"
"""

from collections.abc import Sequence
from dataclasses import replace

from anchors import (
    EVERYTHING,
    HORIZON,
    ORDERS,
    Plan,
    Step,
    View,
    backward_step,
    check_anchors,
    forward_step,
    place,
)
from lib.common import UserError


def timeline(
    length: int,
    scenes: Sequence[tuple[int, int]],
    block: int = 3,
    anchors: int = 3,
    view: View = EVERYTHING,
    order: Sequence[int] = (),
    joined: bool = False,
) -> Plan:
    """Scenes (start, stop) first, in `order`; then what is missing: between, after, before them.

    A scene is forward, blind to the others, with its own prompt. After the last scene come forward
    blocks, before the first backward blocks with anchors; the view is theirs.
    joined: the first block of a later scene sees the end of the scene before it across the gap, if
        both fit the horizon (as in `inbetween`)"""
    _check_scenes(length, scenes, order)
    check_anchors(anchors, block)
    steps: list[Step] = []
    for n in order or range(len(scenes)):
        before = range(0)
        if joined and n and scenes[n][0] - scenes[n - 1][1] <= HORIZON - 2 * block:
            before = range(*scenes[n - 1])[-block:]
        steps += _scene(range(*scenes[n]), block, anchors, before, prompt=n)
    first, last = range(*scenes[0]), range(*scenes[-1])
    for n in range(1, len(scenes)):
        gap = range(scenes[n - 1][1], scenes[n][0])
        steps += _gap(first.start, gap, range(*scenes[n]), block, n, one_shot=joined)
    # The sinks are the two blocks farthest from what is made.
    at = last.start
    sinks = range(at, at + block), range(at + block, at + 2 * block)
    for b in _pieces(last.stop, length, block):
        finished = range(first.start, b.start)
        steps.append(forward_step(b, finished, view, *sinks, prompt=len(scenes) - 1))
    at = first.stop
    sinks = range(at - block, at)[::-1], range(at - 2 * block, at - block)
    for b in _pieces(0, first.start, block)[::-1]:
        finished = range(length - 1, b.stop - 1, -1)
        steps.append(backward_step(b, finished, anchors, view, *sinks))
    return Plan("timeline", length, tuple(steps))


def _check_scenes(length: int, scenes: Sequence[tuple[int, int]], order: Sequence[int]) -> None:
    edges = [i for scene in scenes for i in scene]
    inside = bool(edges) and edges[0] >= 0 and edges[-1] <= length
    if not inside or edges != sorted(edges) or any(start == stop for start, stop in scenes):
        raise UserError(
            f"scenes {list(scenes)} do not lie one after the other within {length} latents"
        )
    if order and sorted(order) != list(range(len(scenes))):
        raise UserError(
            f"the order of scenes {list(order)} must name each of 0 to {len(scenes) - 1} once"
        )


def _pieces(start: int, stop: int, block: int) -> list[range]:
    """Blocks from start to stop; if they do not fit, the first is smaller."""
    cuts = list(range(stop, start, -block))[::-1]
    starts = [start, *cuts[:-1]]
    return [range(a, b) for a, b in zip(starts, cuts)]


def _scene(scene: range, block: int, anchors: int, before: range, prompt: int) -> list[Step]:
    """Forward blocks. If the scene does not begin the video, its first block has anchors and, but
    for `before`, no past: that makes it the middle of a video."""
    first, *others = _pieces(scene.start, scene.stop, block)
    lowest = before.stop if before else 0
    imagined = range(max(scene.start - anchors, lowest), scene.start)
    origin = before.start if before else imagined.start
    own = range(imagined.start, first.stop)
    steps = [
        Step(
            targets=tuple(first),
            pos=tuple(i - origin for i in own),
            anchors=tuple(imagined),
            reads=place(before, 0),
            prompt=prompt,
        )
    ]
    for b in others:
        finished = range(scene.start, b.start)[-(HORIZON - block) :]
        steps.append(forward_step(b, finished, prompt=prompt))
    return steps


def _gap(low: int, gap: range, scene: range, block: int, prompt: int, one_shot: bool) -> list[Step]:
    """From what is finished, latents low .. gap.start-1, to the scene after the gap.

    A gap that fits the horizon is one block that sees both sides, a longer one first grows forward.
    Between two scenes half of it grows forward, blind to the next scene and with the prompt of the
    one it leaves: a block that sees both while one prompt speaks mixes their colours [measured]."""
    side = 2 * block  # latents seen on either side
    most = HORIZON - side if one_shot else max(len(gap) // 2, block)
    at, steps = gap.start, []
    while gap.stop - at > min(most, HORIZON - side):
        b = range(at, at + block)
        steps.append(forward_step(b, range(low, at)[-side:], prompt=prompt - (not one_shot)))
        at = b.stop
    last = range(at, gap.stop)
    if last:
        see = min((HORIZON - len(last)) // 2, side)
        left, right = range(low, at)[-see:], scene[:see]
        own = range(len(left), len(left) + len(last))  # their positions
        reads, pos = place(left, 0) + place(right, own.stop), tuple(own)
        steps.append(Step(tuple(last), pos, reads=reads, prompt=prompt))
    return steps


def story(
    length: int = 39, block: int = 3, anchors: int = 3, scenes: int = 3, gap: int = 0
) -> Plan:
    """Key scenes first, each with a prompt of its own, then the gaps between them.

    gap: latents in each (0: two blocks). The scenes share what the gaps leave; the first ones are
        longer by a block if it does not divide. story(39): scenes of 9, gaps of 6."""
    gap = gap or 2 * block
    if scenes < 1 or not 1 <= gap <= HORIZON - 2 * block:
        raise UserError(
            f"a story needs scenes and a gap of 1 to {HORIZON - 2 * block}, got {scenes} scenes "
            f"and gap {gap}"
        )
    blocks = max((length - gap * (scenes - 1)) // block, scenes)
    places, at = [], 0
    for n in range(scenes):
        size = (blocks // scenes + (n < blocks % scenes)) * block
        places.append((at, at + size))
        at += size + gap
    return replace(timeline(at - gap, places, block, anchors), name="story")


def transition(length: int = 24, block: int = 3, anchors: int = 3, gap: int = 0) -> Plan:
    """A story of two scenes."""
    return replace(story(length, block, anchors, scenes=2, gap=gap), name="transition")


ORDERS |= {"story": story, "transition": transition}
