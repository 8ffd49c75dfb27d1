"""Which plans a training run draws from: data, not code. One place for all stages.

A mix is a list of (share, plans): an iteration draws one entry and trains on each of its plans, one
after the other. The paper's has one entry, forward and backward over the whole clip. But a student
trained at one length is right at one length only, so ours has all lengths, long video's window and
sinks, and plans around given clips. A new order joins the training by a line in `any_mix`.

    python -c "import mixes; print(*mixes.any_mix()[1][1], sep='\\n')"
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from anchors import EVERYTHING, Plan, View, backward, both_directions, forward, with_given
from scenes import timeline

Mix = tuple[tuple[float, tuple[Plan, ...]], ...]  # (share, the plans of one iteration)


def paper_mix(length: int = 21, block: int = 3, anchors: int = 3, head: int = 0) -> Mix:
    """The paper's: forward and backward over the whole clip, in each iteration."""
    return ((1.0, both_directions(length, block, anchors, head)),)


def any_mix(length: int = 21, block: int = 3, anchors: int = 3, head: int = 0) -> Mix:
    """Every length, the window and sinks of long video, before and after given clips, pictures.

    A student trained at one length knows the image latent 0 by what has always stood at the end of
    the clip; at any other length it makes a video latent of it, which decodes to wrong colours
    [measured, ours]. The shares are guesses, not tuned [guess]."""
    window = 2 * block
    same_blocks = head in (0, block)
    shorter = range(2 * block, length, block) if same_blocks else ()
    parts = [
        (0.25, [both_directions(length, block, anchors, head)]),
        (0.30, [both_directions(n, block, anchors, head) for n in shorter]),
        (0.05, [(forward(1, 1),)]),
    ]
    if same_blocks and length > window + 2 * block:
        views = [View(window, sinks, sinks) for sinks in (True, False)]
        windowed = [(forward(length, block, v), backward(length, block, anchors, v)) for v in views]
        given = [
            _beside_clip(length, 4 * block, block, anchors, EVERYTHING),
            _beside_clip(length, 4 * block, block, anchors, views[0]),
            _beside_clip(5 * block, 4 * block, block, anchors, EVERYTHING),
            _beside_clip(length, 2 * block, block, anchors, EVERYTHING),
        ]
        parts += [(0.20, windowed), (0.20, given)]
    parts = [(share, entries) for share, entries in parts if entries]  # short clips lack some
    total = sum(share for share, _ in parts)
    return tuple(
        (share / total / len(entries), plans) for share, entries in parts for plans in entries
    )


def _beside_clip(length: int, clip: int, block: int, anchors: int, view: View) -> tuple[Plan, Plan]:
    """What comes after a given clip of so many latents, and what comes before one."""
    after, before = (0, clip), (length - clip, length)
    return tuple(
        replace(
            with_given(timeline(length, [scene], block, anchors, view), range(*scene)), name=name
        )
        for name, scene in (("after a clip", after), ("before a clip", before))
    )


def prefix_mix(length: int = 21) -> Mix:
    """The bidirectional teacher's: the first n latents of a clip at once, a third of the time all
    of them, and single pictures beside them, since latent 0 is one of 21 [ours]."""
    picture = replace(forward(1, 1), name="picture")
    entries = []
    for n in range(1, length + 1):
        share = 2 / 3 / length + (1 / 3 if n == length else 0)
        entries.append((share, (replace(forward(n, n), name="clip"), picture)))
    return tuple(entries)


def rows_of(plans: Sequence[Plan]) -> int:
    """How many rows of noise these plans need: latents, dummies, and as many again for anchors."""
    dummies = max(-min(0, *plan.made_at) for plan in plans)
    return 2 * (plans[0].length + dummies)


def without_given(mix: Mix) -> Mix:
    """The plans of a mix that need no clip from outside."""
    free = [x for x in mix if not any(step.given for plan in x[1] for step in plan.steps)]
    total = sum(share for share, _ in free)
    return tuple((share / total, plans) for share, plans in free)


def draw(mix: Mix, u: float) -> int:
    """Which entry of the mix a number u in [0, 1) stands for."""
    for entry, (share, _) in enumerate(mix):
        u -= share
        if u < 0:
            return entry
    return len(mix) - 1  # the shares sum to 1 only to rounding


MIXES: dict[str, Callable[..., Mix]] = {"paper": paper_mix, "any": any_mix}
