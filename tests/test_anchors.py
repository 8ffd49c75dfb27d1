"""An order is data: plans, masks, boundaries and pictures are the paper's, worked by hand."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny import MIXED, PLANS, SINKS, command_line

import anchors
import plans
from anchors import HORIZON, ORDERS, Plan, Step, View, layout, text_picture
from lib.common import UserError
from tools import plan as tool
from tools.plan import picture

GREEN, YELLOW, BLUE = (88, 163, 90), (244, 200, 66), (90, 140, 220)
GREY, LIGHT = (120, 120, 120), (190, 225, 190)
LONG = {
    f"long {direction} {sink}": anchors.long(60, direction, sink=sink)
    for direction in ("forward", "backward")
    for sink in SINKS
}
OTHERS = {
    "dummy": anchors.backward(anchors=0, dummy=True),
    "B=6": anchors.backward(block=6, anchors=0, head=3),
    "long loop": anchors.loop(60),
    "P=B=6": anchors.backward(18, 6, 6),
    "as trained": anchors.backward(12, view=View(as_trained=True)),
    "long, as trained": anchors.long(60, "backward", as_trained=True),
}
FULL_SIZE = {name: make() for name, make in ORDERS.items()} | LONG | OTHERS
ALL = PLANS | MIXED | FULL_SIZE


def same(*latents: int) -> tuple:
    """Reads of latents at their own positions."""
    return tuple((i, i) for i in latents)


def in_threes(*rows: str) -> torch.Tensor:
    """A block-wise mask, one digit for 3 x 3 latents."""
    return (
        torch.tensor([[int(x) for x in row] for row in rows])
        .repeat_interleave(3, 0)
        .repeat_interleave(3, 1)
        .bool()
    )


# ---------------------------------------------------------------- the paper's orders, by hand
def test_forward_by_hand():
    """Fig. 8a: each block of 3 reads all blocks before it."""
    plan = anchors.forward(6)
    assert plan.steps == (
        Step((0, 1, 2), (0, 1, 2)),
        Step((3, 4, 5), (3, 4, 5), reads=same(0, 1, 2)),
    )
    lay = layout(plan)
    assert (
        lay.visible.spans == ((0, 3, ((0, 3),)), (3, 6, ((0, 6),))) and lay.visible.key_slot is None
    )
    assert (
        lay.latent == lay.pos == (0, 1, 2, 3, 4, 5)
        and lay.step == (0, 0, 0, 1, 1, 1)
        and all(lay.is_target)
    )
    assert torch.equal(lay.visible.dense(), in_threes("10", "11"))
    assert (
        plan.boundaries() == [False, False, True, False, False]
        and plan.capacity == 3
        and plan.prompts() == 1
    )


def test_backward_by_hand():
    """Fig. 8d: a block imagines the 3 latents before it; the block of latent 0 imagines nothing."""
    plan = anchors.backward(9, 3, 3)
    assert plan.steps == (
        Step((6, 7, 8), (3, 4, 5, 6, 7, 8), anchors=(3, 4, 5)),
        Step((3, 4, 5), (0, 1, 2, 3, 4, 5), anchors=(0, 1, 2), reads=same(6, 7, 8)),
        Step((0, 1, 2), (0, 1, 2), reads=same(3, 4, 5, 6, 7, 8)),
    )
    lay = layout(plan)
    assert lay.latent == lay.pos == (6, 7, 8, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2)
    assert (
        lay.step == (0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1)
        and lay.is_target == (True,) * 9 + (False,) * 6
    )
    #                            targets 678, 345, 012, anchors 345, 012
    assert torch.equal(lay.visible.dense(), in_threes("10010", "11001", "11100", "10010", "11001"))
    assert plan.capacity == 6 and plan.boundaries() == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
        False,
    ]


def test_fewer_anchors_by_hand():
    """P = 1 imagines the nearest latent only."""
    assert anchors.backward(6, 3, 1).steps == (
        Step((3, 4, 5), (2, 3, 4, 5), anchors=(2,)),
        Step((0, 1, 2), (0, 1, 2), reads=same(3, 4, 5)),
    )


def test_dummy_by_hand():
    """Fig. 8b: a dummy block at the start of the clip comes first, and tells the first real block
    that it is not the beginning."""
    plan = anchors.backward(6, anchors=0, dummy=True)
    assert plan.steps == (
        Step((-1, -2, -3), (0, 1, 2)),
        Step((3, 4, 5), (3, 4, 5), reads=((-1, 0), (-2, 1), (-3, 2))),
        Step((0, 1, 2), (0, 1, 2), reads=same(3, 4, 5)),
    )
    lay = layout(plan)
    assert lay.latent == (-1, -2, -3, 3, 4, 5, 0, 1, 2)
    assert torch.equal(lay.visible.dense(), in_threes("100", "110", "011"))
    assert len(plan.boundaries()) == 5 and plan.capacity == 3


def test_a_windowed_dummy_by_hand():
    """With a window positions begin anew at each step; the dummy is as far from the first real
    block as in 21 latents, where training had it."""
    plan = anchors.backward(24, anchors=0, view=View(6), dummy=True)
    dummy = Step((-1, -2, -3), (0, 1, 2))
    first = Step((21, 22, 23), (18, 19, 20), reads=((-1, 0), (-2, 1), (-3, 2)))
    assert plan.steps[:2] == (dummy, first)
    assert plan.steps[2:] == anchors.backward(24, anchors=0, view=View(6)).steps[1:]


def test_blocks_of_six_by_hand():
    """Fig. 8c: blocks of 6 in backward order and a head of 3, no anchors."""
    plan = anchors.backward(9, block=6, anchors=0, head=3)
    assert plan.steps == (
        Step((3, 4, 5, 6, 7, 8), (3, 4, 5, 6, 7, 8)),
        Step((0, 1, 2), (0, 1, 2), reads=same(3, 4, 5, 6, 7, 8)),
    )
    assert torch.equal(layout(plan).visible.dense(), in_threes("110", "110", "111"))
    assert [len(s.targets) for s in anchors.backward(21, block=6, anchors=0, head=3).steps] == [
        6,
        6,
        6,
        3,
    ]


def test_the_papers_sequences_have_21_and_39_slots():
    """Stage 1 trains on 21 latents forward, and on 21 targets and 6 blocks of 3 anchors
    backward."""
    assert len(layout(anchors.forward(21)).latent) == 21
    lay = layout(anchors.backward(21))
    assert (
        len(lay.latent) == 39 and sum(lay.is_target) == 21 and lay.visible.dense().shape == (39, 39)
    )
    assert lay.latent == lay.pos


def test_inbetween_by_hand():
    """Appendix A.2: head at 0-2, tail at 18-20 after it, then 15 latents as one block that sees
    both."""
    ends, gap = same(0, 1, 2), tuple(range(3, 18))
    last = Step(gap, gap, reads=same(0, 1, 2, 18, 19, 20))
    plan = anchors.inbetween()
    assert plan.steps == (
        Step((0, 1, 2), (0, 1, 2)),
        Step((18, 19, 20), (15, 16, 17, 18, 19, 20), (15, 16, 17), ends),
        last,
    )
    assert anchors.inbetween(21, given=True).steps == (
        Step((0, 1, 2), (0, 1, 2), given=(0, 1, 2)),
        Step((18, 19, 20), (18, 19, 20), reads=ends, given=(18, 19, 20)),
        last,
    )
    assert [i for i, b in enumerate(plan.boundaries()) if b] == [2, 17]


def test_loop_by_hand():
    """The head is read twice: as the past at 0-2 and, without the image, as the future from 18 on;
    that is what the loop comes back to. An image alone cannot be come back to."""
    plan = anchors.loop(18)
    close = Step(tuple(range(3, 18)), tuple(range(3, 18)), reads=(*same(0, 1, 2), (1, 18), (2, 19)))
    assert plan.steps == (Step((0, 1, 2), (0, 1, 2)), close)
    visible = layout(plan).visible
    assert visible.spans == ((0, 3, ((0, 3),)), (3, 18, ((0, 20),)))
    assert visible.key_slot.tolist() == [*range(18), 1, 2]
    assert visible.key_pos.tolist() == list(range(20))
    assert plan.comes_back_to == (1, 2) and anchors.inbetween(21).comes_back_to == ()
    plan = anchors.loop(21)
    assert plan.steps[-1].reads == ((3, 0), (4, 1), (5, 2), (1, 18), (2, 19), (3, 20))
    assert plan.comes_back_to == (1, 2, 3) and anchors.loop(4, block=1).comes_back_to == (1,)
    with pytest.raises(UserError, match="a first block of 2 and a gap"):
        anchors.loop(3, block=1, gap=2)


def test_long_backward_by_hand():
    """Appendix A.2, backward: past sink, gap of 3, anchors, block, window of 6, future sink:
    positions 0 to 20, all 21 in use."""
    plan = anchors.long(33, "backward", window=6, sink="both")
    step = next(s for s in plan.steps if s.targets == (12, 13, 14))
    past_sink, window, future_sink = (
        ((27, 0), (28, 1), (29, 2)),
        tuple((i, i - 3) for i in range(15, 21)),
        ((30, 18), (31, 19), (32, 20)),
    )
    assert step == Step(
        (12, 13, 14), (6, 7, 8, 9, 10, 11), (9, 10, 11), past_sink + window + future_sink
    )
    assert plan.steps[-1] == Step(
        (0, 1, 2),
        (0, 1, 2),
        reads=tuple((i, i) for i in range(3, 9)) + ((30, 9), (31, 10), (32, 11)),
    )


def test_long_forward_by_hand():
    """Appendix A.2, forward: the first block, a window of 6, the block, a gap of 3, the second
    block as the future."""
    plan = anchors.long(33, "forward", window=6, sink="both")
    step = next(s for s in plan.steps if s.targets == (18, 19, 20))
    assert step == Step(
        (18, 19, 20),
        (9, 10, 11),
        reads=(
            (0, 0),
            (1, 1),
            (2, 2),
            (12, 3),
            (13, 4),
            (14, 5),
            (15, 6),
            (16, 7),
            (17, 8),
            (3, 15),
            (4, 16),
            (5, 17),
        ),
    )
    assert plan.steps[2].reads == same(
        0, 1, 2, 3, 4, 5
    )  # while both are in the window they are not moved
    none = anchors.long(33, "forward", window=6, sink="none").steps[6]
    assert none == Step((18, 19, 20), (6, 7, 8), reads=tuple((i, i - 12) for i in range(12, 18)))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("sink", SINKS)
def test_each_sink_is_where_its_name_says(direction, sink):
    """Past sinks stand before the block and future sinks after it, in either direction; `none`
    reads the window only."""
    plan = anchors.long(45, direction, window=6, sink=sink)
    step = plan.steps[10]
    first, second = (
        ({0, 1, 2}, {3, 4, 5}) if direction == "forward" else ({42, 43, 44}, {39, 40, 41})
    )
    before = {i for i, p in step.reads if p < min(step.pos)} & (first | second)
    after = {i for i, p in step.reads if p > max(step.pos)} & (first | second)
    at_past, at_future = (first, second) if direction == "forward" else (second, first)
    assert before == (at_past if sink in ("past", "both") else set())
    assert after == (at_future if sink in ("future", "both") else set())
    assert len(step.reads) == 6 + len(before) + len(after)


def test_as_trained_by_hand():
    """The block of latent 0, in backward order, sees 18 latents at most, the farthest at the end of
    the horizon: as in 21."""
    twelve = anchors.backward(12, view=View(as_trained=True))
    assert twelve.steps[:-1] == anchors.backward(12).steps[:-1]
    far = ((9, 18), (10, 19), (11, 20))
    assert twelve.steps[-1] == Step((0, 1, 2), (0, 1, 2), reads=same(3, 4, 5, 6, 7, 8) + far)
    whole = anchors.backward(21, view=View(as_trained=True))
    assert whole.steps == anchors.backward(21).steps
    for length in (24, 42):
        plan = anchors.long(length, "backward", as_trained=True)
        assert plan.steps[:-1] == anchors.long(length, "backward").steps[:-1]
        assert plan.steps[-1] == Step((0, 1, 2), (0, 1, 2), reads=same(*range(3, 21)))
        assert plan.capacity >= 18 > anchors.long(length, "backward").capacity
    forward = anchors.forward(12, view=View(as_trained=True))
    assert forward == anchors.forward(12)


def test_given_latents_are_marked():
    """Whole steps only commit, without anchors; a part of a step is held; prompts can change at any
    block."""
    plan = plans.with_given(anchors.backward(9), [3, 4, 5, 8])
    assert (
        plan.steps[0] == Step((6, 7, 8), (3, 4, 5, 6, 7, 8), (3, 4, 5), given=(3, 4, 5, 8))
        and not plan.steps[0].commits
    )
    assert (
        plan.steps[1] == Step((3, 4, 5), (3, 4, 5), reads=same(6, 7, 8), given=(3, 4, 5))
        and plan.steps[1].commits
    )
    assert text_picture(plan).splitlines()[1].split()[2:] == [
        ".",
        ".",
        ".",
        "a",
        "a",
        "a",
        "T",
        "T",
        "G",
    ]
    assert [s.prompt for s in plans.switch(anchors.forward(9), (3, 4)).steps] == [0, 1, 2]


# ---------------------------------------------------------------- what holds for every plan
@pytest.mark.parametrize("plan", ALL.values(), ids=ALL)
def test_every_latent_is_finished_once(plan):
    """The targets of all steps are latents 0 .. length-1, each once (and dummies)."""
    assert sorted(i for step in plan.steps for i in step.targets if i >= 0) == list(
        range(plan.length)
    )


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL)
def test_no_step_exceeds_the_horizon(plan):
    """At most 21 latents in view, on distinct positions within 0 .. 20, and time order is position
    order within a step."""
    for step in plan.steps:
        places = [*step.pos, *(p for _, p in step.reads)]
        assert (
            len(places) <= HORIZON
            and len(set(places)) == len(places)
            and 0 <= min(places) <= max(places) < HORIZON
        )
        assert list(step.own) == sorted(step.own, reverse=step.own[0] < 0)
        assert [p - step.pos[0] for p in step.pos] == list(range(len(step.pos)))


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL)
def test_capacity_is_exactly_what_is_needed(plan):
    """Brute force: the most latents that are finished and still to be read, at any time, and which
    step reads them last."""
    alive, last = [1], {}
    for n in range(len(plan.steps)):
        done = {i for step in plan.steps[: n + 1] for i in step.targets}
        later = {i for step in plan.steps[n + 1 :] for i, _ in step.reads}
        alive.append(len(done & later))
        last |= {i: n for i, _ in plan.steps[n].reads}
    assert plan.capacity == max(alive) and plan.last_read == last


def test_long_videos_need_constant_memory():
    """A long video's cache does not grow with its length: window and sinks."""
    for direction in ("forward", "backward"):
        assert {anchors.long(n, direction).capacity for n in (60, 600)} == {12}
        assert {anchors.long(n, direction, sink="none").capacity for n in (60, 600)} == {6}


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL)
def test_boundaries_lie_between_steps(plan):
    """An inter-block boundary is where no step made both neighbours."""
    assert plan.boundaries() == [
        not any({i, i + 1} <= set(s.targets) for s in plan.steps) for i in range(plan.length - 1)
    ]


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL)
def test_the_mask_is_the_plan(plan):
    """Brute force: a slot sees its own step's slots at their positions and its reads' targets at
    theirs, and nothing else: never another step's anchors."""
    lay = layout(plan)
    dense, slots = lay.visible.dense(), range(len(lay.latent))
    slot = list(slots) if lay.visible.key_slot is None else lay.visible.key_slot.tolist()
    pos = list(lay.pos) if lay.visible.key_pos is None else lay.visible.key_pos.tolist()
    entries = [(lay.step[s], lay.latent[s], lay.pos[s], lay.is_target[s]) for s in slots]
    assert sorted(entries) == sorted(
        (n, i, p, i in step.targets)
        for n, step in enumerate(plan.steps)
        for i, p in zip(step.own, step.pos)
    )
    for q in slots:
        step = plan.steps[lay.step[q]]
        seen = sorted((lay.latent[slot[k]], pos[k]) for k in dense[q].nonzero().flatten().tolist())
        assert seen == sorted([*zip(step.own, step.pos), *step.reads])
        assert all(
            lay.is_target[slot[k]] or lay.step[slot[k]] == lay.step[q]
            for k in dense[q].nonzero().flatten().tolist()
        )


# ---------------------------------------------------------------- mistakes
IMPOSSIBLE = [
    (lambda: anchors.forward(20), "20 latents are not whole blocks of 3; use 18 or 21"),
    (lambda: anchors.forward(0), "0 latents are not whole blocks of 3; use 3 or 6"),
    (lambda: anchors.forward(6, 0), "block 0"),
    (lambda: anchors.forward(6, -3), "block -3"),
    (lambda: anchors.forward(24), "spans 24 positions, over the horizon of 21"),
    (lambda: anchors.forward(60, view=View(21)), "horizon"),
    (lambda: anchors.backward(20), "use 18 or 21"),
    (lambda: anchors.backward(24), "horizon"),
    (lambda: anchors.backward(9, anchors=4), "4 anchors do not fit the block 3; use 0 to 3"),
    (lambda: anchors.backward(9, anchors=-1), "-1 anchors"),
    (lambda: anchors.backward(9, head=4), "not whole blocks of 3 behind a head of 4; use 7 or 10"),
    (lambda: anchors.backward(3, head=6), "head of 6"),
    (lambda: anchors.inbetween(9, block=0), "two ends of 0"),
    (lambda: anchors.inbetween(6), "6 latents have no room for two ends of 3, a gap"),
    (lambda: anchors.inbetween(9, anchors=4), "4 anchors"),
    (lambda: anchors.inbetween(9, anchors=-1), "-1 anchors"),
    (lambda: anchors.inbetween(22), "spans 22"),
    (lambda: anchors.loop(18, gap=-1), "got -1"),
    (lambda: anchors.loop(3), "loop of 3"),
    (lambda: anchors.loop(18, gap=16), "first block of 3"),
    (lambda: anchors.loop(24, gap=18), "horizon"),
    (lambda: anchors.loop(20), "5 latents are not whole blocks of 3; use 3 or 6"),
    (lambda: anchors.long(33, sink="left"), "unknown sink 'left'; use past, future, both or none"),
    (lambda: anchors.long(33, window=30), "horizon"),
    (lambda: anchors.long(33, "backward", anchors=5), "5 anchors"),
    (lambda: anchors.long(33, "sideways"), "sideways"),
    (lambda: anchors.long(33, window=-1), "window -1"),
]


@pytest.mark.parametrize("call, says", IMPOSSIBLE)
def test_impossible_orders_are_refused(call, says):
    """A builder asked for the impossible says what and how much."""
    with pytest.raises(UserError) as error:
        call()
    assert says in str(error.value)


BEGIN = Step((0, 1), (0, 1))
BROKEN = [
    (2, (Step((0, 1), (0, 1), reads=((1, 2),)),), "reads latents [1] before they are finished"),
    (3, (BEGIN, Step((2,), (2,), reads=((4, 3),))), "step 1 of the plan 'mine' reads latents [4]"),
    (2, (BEGIN, Step((1,), (1,))), "finishes latents [1] a second time"),
    (3, (BEGIN, Step((2,), (2, 3))), "puts 1 latents and 0 reads on positions [2, 3]"),
    (3, (BEGIN, Step((2,), (2,), reads=((0, 2),))), "positions [2, 2]"),
    (3, (BEGIN, Step((2,), (2,), reads=((0, 1), (1, 1)))), "positions [1, 1, 2]"),
    (3, (BEGIN, Step((2,), (21,), reads=((0, 0),))), "spans 22 positions"),
    (4, (BEGIN, Step((3,), (3,))), "never generates latents [2]"),
    (
        3,
        (BEGIN, Step((2, 2), (2, 3))),
        "step 1 of the plan 'mine' has latents twice in () and (2, 2)",
    ),
    (3, (BEGIN, Step((2,), (2, 3), anchors=(2,))), "latents twice in (2,) and (2,)"),
    (2, (Step((0, 1), (0, 1), given=(2,)),), "is given (2,) but makes (0, 1)"),
    (4, (BEGIN, Step((2, 3), (1, 2, 3), anchors=(1,), given=(2, 3))), "with anchors (1,)"),
]


@pytest.mark.parametrize("length, steps, says", BROKEN)
def test_impossible_plans_are_refused(length, steps, says):
    """A plan checks itself: reads are finished, targets are new, positions are distinct and within
    the horizon, no latent is left."""
    with pytest.raises(UserError) as error:
        Plan("mine", length, steps)
    assert says in str(error.value)


def test_a_plan_may_have_another_horizon():
    """The horizon is the model's: a plan for one that was trained on 24 latents may span 24."""
    steps = (Step(tuple(range(24)), tuple(range(24))),)
    assert Plan("mine", 24, steps, horizon=24).capacity == 1
    with pytest.raises(UserError, match="spans 24 positions, over the horizon of 21"):
        Plan("mine", 24, steps)


# ---------------------------------------------------------------- pictures
PICTURES = {
    "backward": (
        anchors.backward(9),
        "latent     0  1  2  3  4  5  6  7  8\n"
        "step 0     .  .  .  a  a  a  T  T  T\n"
        "step 1     a  a  a  T  T  T  r  r  r\n"
        "step 2     T  T  T  r  r  r  r  r  r",
    ),
    "dummy": (
        anchors.backward(6, anchors=0, dummy=True),
        "latent     d  d  d  0  1  2  3  4  5\n"
        "step 0     T  T  T  .  .  .  .  .  .\n"
        "step 1     r  r  r  .  .  .  T  T  T\n"
        "step 2     .  .  .  T  T  T  r  r  r",
    ),
    "loop": (
        anchors.loop(6, gap=3),
        "latent     0  1  2  3  4  5\n"
        "step 0     T  T  T  .  .  .\n"
        "step 1     r  r  r  T  T  T   moved: 1@6 2@7",
    ),
    "given": (
        anchors.inbetween(4, block=1, anchors=0, given=True),
        "latent     0  1  2  3\n"
        "step 0     G  .  .  .\n"
        "step 1     r  .  .  G\n"
        "step 2     r  T  T  r",
    ),
}


@pytest.mark.parametrize("plan, drawn", PICTURES.values(), ids=PICTURES)
def test_text_picture_by_hand(plan, drawn):
    """What a plan draws; reads at other places are written out."""
    assert text_picture(plan) == drawn


def test_the_header_shows_what_is_drawn():
    """The picture in anchors.py's own header is what the plan draws."""
    for line in text_picture(anchors.backward(9)).splitlines()[1:]:
        assert line.split(maxsplit=2)[2] in anchors.__doc__


@pytest.mark.parametrize(
    "name",
    ["forward", "backward P=2", "backward P=3", "backward, dummy", "inbetween, given", "inbetween"],
)
def test_picture_shows_the_plan(name):
    """Cells of each colour: in the order, one per latent of a step; in the mask, a step's own slots
    squared, and its reads."""
    plan = PLANS[name]
    image = picture(plan)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    expected = dict.fromkeys((GREEN, YELLOW, BLUE, GREY, LIGHT), 0)
    for step in plan.steps:
        own, dummy = len(step.own), step.targets[0] < 0
        expected[BLUE if dummy else GREY if step.given else GREEN] += len(step.targets)  # the order
        expected[BLUE if dummy else GREEN] += own * len(step.targets)  # the mask
        expected[YELLOW] += len(step.anchors) + own * len(step.anchors)
        expected[LIGHT] += len(step.reads) + own * len(step.reads)
    assert {c: (image == c).all(2).sum() / 15**2 for c in expected} == expected


def test_every_plan_is_drawn():
    """One line a step, and a picture."""
    for plan in FULL_SIZE.values():
        assert picture(plan).dtype == np.uint8
        assert len(text_picture(plan).splitlines()) == 1 + len(plan.steps)


def test_every_order_is_drawn_from_the_command_line(tmp_path, monkeypatch, capsys):
    """`python -m tools.plan` prints any order and writes its picture; a wrong name is one line and
    no file."""
    path = tmp_path / "plan.png"
    tool.main(tool.Config("backward", 9, out=str(path)))
    assert capsys.readouterr().out.startswith(text_picture(anchors.backward(9)))
    assert np.array_equal(iio.imread(path), picture(anchors.backward(9)))
    for order in ORDERS:
        tool.main(tool.Config(order, out=str(path)))
        assert "latents in" in capsys.readouterr().out
    code, error = command_line(monkeypatch, capsys, tool, order="sideways", out=tmp_path / "no.png")
    assert code == 2 and "unknown order 'sideways'" in error and "backward" in error
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]


def test_an_order_that_is_registered_is_known(monkeypatch, capsys):
    """A new order is one function and one line: the command line draws it."""

    def outside_in(length: int = 6) -> Plan:
        ends = Step((0, length - 1), (0, length - 1))
        inner = tuple(range(1, length - 1))
        return Plan("outside in", length, (ends, Step(inner, inner, reads=same(0, length - 1))))

    monkeypatch.setitem(ORDERS, "outside in", outside_in)
    tool.main(tool.Config("outside in", 4))
    assert "step 1     r  T  T  r" in capsys.readouterr().out


def test_stories_are_orders_once_scenes_is_imported():
    """anchors.py alone knows four orders; scenes.py adds its own."""
    assert ORDERS["story"] is plans.story and ORDERS["transition"] is plans.transition
    assert list(ORDERS)[:4] == ["forward", "backward", "inbetween", "loop"]
