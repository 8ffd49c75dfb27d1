"""Plans made of plans: scenes anywhere in time, for users; and mixes of plans, for training.

    [scene 0]  gap  [scene 1]  after          before  [your clip]  after

*Scenes.* A scene is a run of latents with a prompt of its own, made forward and blind to the
others, or given by the user (`with_given`). When all scenes are there, the gaps between
them are filled, each seeing both of its sides; then the video grows forward after the last scene,
and backward, with anchors, before the first. Your own clip is a plan with one scene.

*Mixes.* Which plans a training run draws from is data: a list of (share, plans). An iteration draws
one entry and trains on each of its plans. The paper's mix has one entry, forward and backward over
the whole clip. A new order joins the training by a line in `any_mix`; a mix of your own, by
`MIXES["mine"] = f` before `main`, is a name for --plans (zoo/ahead.py has one).

    python -c "import anchors, plans; print(anchors.text_picture(plans.story()))"
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from anchors import (
    EVERYTHING,
    HORIZON,
    ORDERS,
    SINK_GAP,
    Plan,
    Step,
    View,
    backward,
    backward_step,
    forward,
    forward_step,
    place,
)
from lib.cli import check_range
from lib.common import Stream, UserError, generator, say
from lib.recipe import Recipe
from lib.shapes import check_anchors


# ---------------------------------------------------------------- changes to any plan
def with_given(plan: Plan, latents: Sequence[int]) -> Plan:
    """The same plan where these latents are the user's; a step that only commits has no anchors."""
    given = set(latents)
    steps = []
    for step in plan.steps:
        if given.issuperset(step.targets):
            pos = step.pos[len(step.anchors) :]
            steps.append(replace(step, anchors=(), pos=pos, given=step.targets))
        else:
            steps.append(replace(step, given=tuple(i for i in step.own if i in given)))
    return replace(plan, steps=tuple(steps))


def switch(plan: Plan, starts: Sequence[int]) -> Plan:
    """The same plan with prompt n + 1 from latent starts[n] on, in time.

    A step follows the prompt of its first target."""
    steps = []
    for step in plan.steps:
        begins = max(step.targets[0], 0)
        steps.append(replace(step, prompt=sum(start <= begins for start in starts)))
    return replace(plan, steps=tuple(steps))


def as_shown(plan: Plan) -> Plan:
    """What is decoded: a loop goes on after its end with what it comes back to. So the file may
    begin after that, and its end leads to its beginning as frames of one clip do."""
    if not plan.comes_back_to:
        return plan
    count = len(plan.comes_back_to)
    again = Step(tuple(range(plan.length, plan.length + count)), tuple(range(count)))
    return replace(plan, length=plan.length + count, steps=(*plan.steps, again))


# ---------------------------------------------------------------- scenes
def timeline(
    length: int,
    scenes: Sequence[tuple[int, int]],
    block: int = 3,
    anchors: int = 3,
    view: View = EVERYTHING,
    order: Sequence[int] = (),
    joined: bool = False,
    split_gaps: bool = True,
) -> Plan:
    """Scenes (start, stop) first, in `order`; then what is missing: between, after, before them.

    view: of the blocks after the last scene and before the first
    joined: one shot: a gap is one block that sees both sides (as in `inbetween`), and the first
        block of a later scene sees the end of the scene before, if both fit the horizon
    split_gaps: else the first half of a gap sees, and follows, only the scene that it leaves. The
        last two blocks see both: with one, the next scene begins in the last one's colours
        [measured: toy/gaps.py]"""
    _check_scenes(length, scenes, order)
    check_anchors(anchors, block)
    scenes = [range(*scene) for scene in scenes]
    first, last = scenes[0], scenes[-1]
    steps: list[Step] = []
    for n in order or range(len(scenes)):
        before = range(0)
        if joined and n and scenes[n].start - scenes[n - 1].stop <= HORIZON - 2 * block:
            before = scenes[n - 1][-block:]
        steps += _scene(scenes[n], block, anchors, before, prompt=n)
    for n in range(1, len(scenes)):
        gap = range(scenes[n - 1].stop, scenes[n].start)
        split = split_gaps and not joined
        alone = max(0, min(len(gap) // 2, len(gap) - 2 * block)) // block * block if split else 0
        steps += _gap(first.start, gap, gap.start + alone, scenes[n], block, n)
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
    edges = [0, *(i for scene in scenes for i in scene), length]
    is_in_time = edges == sorted(edges) and all(start < stop for start, stop in scenes)
    if not scenes or not is_in_time:
        where = f"one after the other within {length} latents"
        raise UserError(f"scenes {list(scenes)} do not lie {where}")
    if order and sorted(order) != list(range(len(scenes))):
        each = f"each of 0 to {len(scenes) - 1} once"
        raise UserError(f"the order of scenes {list(order)} must name {each}")


def _pieces(start: int, stop: int, block: int) -> list[range]:
    """Blocks from start to stop; if they do not fit, the first is smaller."""
    cuts = list(range(stop, start, -block))[::-1]
    starts = [start, *cuts[:-1]]
    return [range(a, b) for a, b in zip(starts, cuts)]


def _scene(scene: range, block: int, anchors: int, before: range, prompt: int) -> list[Step]:
    """Forward blocks. If the scene does not begin the video, its first block has anchors and, but
    for `before`, no past: that makes it the middle of a video."""
    first, *others = _pieces(scene.start, scene.stop, block)
    imagined = range(max(scene.start - anchors, before.stop), scene.start)
    origin = before.start if before else imagined.start
    pos = tuple(i - origin for i in range(imagined.start, first.stop))
    steps = [Step(tuple(first), pos, tuple(imagined), place(before, 0), prompt)]
    for b in others:
        finished = range(scene.start, b.start)[-(HORIZON - block) :]
        steps.append(forward_step(b, finished, prompt=prompt))
    return steps


def _gap(low: int, gap: range, alone: int, scene: range, block: int, prompt: int) -> list[Step]:
    """From what is finished, latents low .. gap.start-1, to the scene after the gap.

    Up to latent `alone` it grows forward, with the prompt before and blind to the scene; further as
    long as the rest does not fit the horizon; the rest is one block that sees both sides."""
    side = 2 * block  # latents seen on either side
    at, steps = gap.start, []
    while at < alone or gap.stop - at > HORIZON - side:
        b = range(at, at + block)
        follows = prompt - 1 if at < alone else prompt
        steps.append(forward_step(b, range(low, at)[-side:], prompt=follows))
        at = b.stop
    last = range(at, gap.stop)
    if last:
        see = min((HORIZON - len(last)) // 2, side)
        left, right = range(low, at)[-see:], scene[:see]
        pos = range(len(left), len(left) + len(last))
        reads = place(left, 0) + place(right, pos.stop)
        steps.append(Step(tuple(last), tuple(pos), reads=reads, prompt=prompt))
    return steps


def story(
    length: int = 39,
    block: int = 3,
    anchors: int = 3,
    scenes: int = 3,
    gap: int = 0,
    split_gaps: bool = True,
) -> Plan:
    """Key scenes first, each with a prompt of its own, then the gaps between them.

    gap: latents in each; 0: two blocks. The scenes share what the gaps leave, in whole blocks, the
        first ones having one more; what is no block is the last one's.
        story(39): scenes of 9, gaps of 6."""
    gap, most = gap or 2 * block, HORIZON - 2 * block
    if scenes < 1 or not 1 <= gap <= most:
        raise UserError(f"a story has a gap of 1 to {most}, got {scenes} scenes and gap {gap}")
    room = length - gap * (scenes - 1)
    if room < scenes * block:
        parts = f"{scenes} scenes of {block} and gaps of {gap}"
        least = length - room + scenes * block
        raise UserError(f"{length} latents have no room for {parts}; use {least} or more")
    blocks, longer = divmod(room // block, scenes)
    places, at = [], 0
    for n in range(scenes):
        stop = at + (blocks + (n < longer)) * block
        places.append((at, stop))
        at = stop + gap
    places[-1] = (places[-1][0], length)
    plan = timeline(length, places, block, anchors, split_gaps=split_gaps)
    return replace(plan, name="story")


def transition(
    length: int = 24, block: int = 3, anchors: int = 3, gap: int = 0, split_gaps: bool = True
) -> Plan:
    """A story of two scenes."""
    return replace(story(length, block, anchors, 2, gap, split_gaps), name="transition")


ORDERS |= {"story": story, "transition": transition}


# ---------------------------------------------------------------- what training draws
Mix = tuple[tuple[float, tuple[Plan, ...]], ...]  # (share, the plans of one iteration)


def both_directions(
    length: int = 21, block: int = 3, anchors: int = 3, head: int = 0
) -> tuple[Plan, Plan]:
    """The forward and the backward plan that train a student (paper App. B.1 and B.2).

    head: size of the forward blocks and of the block of latent 0; 0: block. Without anchors, the
        first backward block could be taken for a beginning if it is as large: a dummy precedes."""
    head = head or block
    dummy = not anchors and head == block < length
    return forward(length, head), backward(length, block, anchors, head=head, dummy=dummy)


def plans_of(recipe: Recipe) -> dict[str, Plan]:
    """The two plans a student was trained for; and its anchors kept as output (paper Fig. 9c)."""
    block, head = recipe.block, recipe.head or recipe.block
    pair = both_directions(HORIZON, block, recipe.anchors, recipe.head)
    plans = {"forward": pair[0], "backward": pair[1]}
    if recipe.anchors and (HORIZON - head) % (2 * block) == 0:
        plans["backward, anchors as output"] = backward(HORIZON, 2 * block, 0, head=head)
    return plans


def paper_mix(length: int = 21, block: int = 3, anchors: int = 3, head: int = 0) -> Mix:
    """The paper's: forward and backward over the whole clip, in each iteration."""
    return ((1.0, both_directions(length, block, anchors, head)),)


def any_mix(length: int = 21, block: int = 3, anchors: int = 3, head: int = 0) -> Mix:
    """Every length, the window and sinks of long video, before and after given clips, pictures.

    A student trained at one length knows the image latent 0 by what has always stood at the end of
    the clip; at any other length it makes a video latent of it, which decodes to wrong colours
    [measured, ours]. The shares are guesses, not tuned [guess]. Without anchors that remains: a
    dummy tells the first backward block that it is no beginning, but in a window, or a shorter
    clip, a later block sees just what the block of latent 0 sees."""
    window = 2 * block
    same_blocks = head in (0, block)
    shorter = range(2 * block, length, block) if same_blocks else ()
    parts = [
        (0.25, [both_directions(length, block, anchors, head)]),
        (0.30, [both_directions(n, block, anchors, head) for n in shorter]),
        (0.05, [(forward(1, 1),)]),
    ]
    if same_blocks and length > window + 2 * block:
        room = 3 * block + window + max(anchors, 0) + SINK_GAP  # that a view with both sinks takes
        sinks = View(window, True, True) if room <= HORIZON else View(window)
        windowed = []
        for view in dict.fromkeys((sinks, View(window))):
            back = backward(length, block, anchors, view, dummy=not anchors)
            windowed.append((forward(length, block, view), back))
        given = [
            _beside_clip(length, 4 * block, block, anchors, EVERYTHING),
            _beside_clip(length, 4 * block, block, anchors, sinks),
            _beside_clip(5 * block, 4 * block, block, anchors, EVERYTHING),
            _beside_clip(length, 2 * block, block, anchors, EVERYTHING),
        ]
        parts += [(0.20, windowed), (0.20, given)]
    parts = [(share, entries) for share, entries in parts if entries]  # short clips lack some
    total = sum(share for share, _ in parts)
    mix = []
    for share, entries in parts:
        mix += [(share / total / len(entries), plans) for plans in entries]
    return tuple(mix)


def _beside_clip(length: int, clip: int, block: int, anchors: int, view: View) -> tuple[Plan, Plan]:
    """What comes after a given clip of so many latents, and what comes before one."""
    plans = []
    for start, name in ((0, "after a clip"), (length - clip, "before a clip")):
        scene = (start, start + clip)
        plan = timeline(length, [scene], block, anchors, view)
        plans.append(replace(with_given(plan, range(*scene)), name=name))
    return tuple(plans)


def prefix_mix(length: int = 21) -> Mix:
    """The bidirectional teacher's: the first n latents of a clip at once, a third of the time all
    of them, and single pictures beside them, since latent 0 is one of 21 [ours]."""
    picture, mix = replace(forward(1, 1), name="picture"), []
    for n in range(1, length + 1):
        share = 2 / 3 / length + (1 / 3 if n == length else 0)
        mix.append((share, (replace(forward(n, n), name="clip"), picture)))
    return tuple(mix)


def rows_of(plans: Sequence[Plan]) -> int:
    """How many rows of noise these plans need: latents, dummies, and as many again for anchors."""
    dummies = -min(0, *(i for plan in plans for i in plan.made_at))
    return 2 * (plans[0].length + dummies)


def without_given(mix: Mix) -> Mix:
    """The plans of a mix that need no clip from outside."""
    free = [(share, plans) for share, plans in mix if not any(plan.given for plan in plans)]
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


def mix_of(config, mix: Mix | None = None) -> Mix:
    """The plans that a script trains on, `mix` or what --plans names of all that are registered.

    raises: UserError for a name that is not, or sizes that do not fit"""
    check_range("plans", config.plans, tuple(MIXES))
    return mix or MIXES[config.plans](config.latent[0], config.block, config.anchors, config.head)


def draw_entry(config, mix: Mix, step: int) -> int:
    """The entry of the mix that all processes train on in this iteration."""
    return draw(mix, torch.rand(1, generator=generator(config.seed, Stream.PLANS, step)).item())


def possible(config, mix: Mix) -> Mix:
    """The plans that can be trained: those around real clips need --clips. raises: UserError"""
    free = without_given(mix)
    if config.clips or len(free) == len(mix):
        return mix
    if not free:
        raise UserError("all plans are around given clips: use --clips (tools/encode.py)")
    say("plans around given clips are left out: they need --clips (tools/encode.py)")
    return free
