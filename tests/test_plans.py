"""Several scenes: first the scenes, blind to each other, then what is missing; worked by hand."""

import pytest

import anchors
from anchors import Step, View, place
from lib.common import UserError
from plans import ORDERS, story, switch, timeline, transition, with_given


def same(*latents: int) -> tuple:
    """Reads of latents at their own positions."""
    return tuple((i, i) for i in latents)


SINKS = View(6, True, True)


# ---------------------------------------------------------------- scenes
def test_transition_by_hand():
    """Two scenes, the second with anchors and its own prompt; a gap of one block sees both."""
    assert transition(15, gap=3).steps == (
        Step((0, 1, 2), (0, 1, 2)),
        Step((3, 4, 5), (3, 4, 5), reads=same(0, 1, 2)),
        Step((9, 10, 11), (0, 1, 2, 3, 4, 5), anchors=(6, 7, 8), prompt=1),
        Step((12, 13, 14), (3, 4, 5), reads=((9, 0), (10, 1), (11, 2)), prompt=1),
        Step((6, 7, 8), (6, 7, 8), reads=same(*range(6)) + same(9, 10, 11, 12, 13, 14), prompt=1),
    )


def test_a_gap_between_scenes_by_hand():
    """Three blocks: the first goes on from the scene it leaves, with that one's prompt and blind to
    the next scene; the rest sees both sides and follows the next one's prompt."""
    plan = transition(21, gap=9)
    assert [step.targets[0] for step in plan.steps] == [0, 3, 15, 18, 6, 9]
    assert plan.steps[4:] == (
        Step((6, 7, 8), (6, 7, 8), reads=same(0, 1, 2, 3, 4, 5), prompt=0),
        Step(
            (9, 10, 11, 12, 13, 14),
            (6, 7, 8, 9, 10, 11),
            reads=place(range(3, 9), 0) + place(range(15, 21), 12),
            prompt=1,
        ),
    )


def test_a_gap_in_one_shot_by_hand():
    """The same gap within one shot is one block that sees both sides."""
    plan = timeline(18, [(0, 6), (12, 18)], joined=True)
    both = same(*range(6)) + same(*range(12, 18))
    assert plan.steps[4:] == (Step(tuple(range(6, 12)), tuple(range(6, 12)), reads=both, prompt=1),)
    second = Step(
        (12, 13, 14),
        (6, 7, 8, 9, 10, 11),
        anchors=(9, 10, 11),
        reads=place((3, 4, 5), 0),
        prompt=1,
    )
    assert plan.steps[2] == second


@pytest.mark.parametrize("gap", range(1, 16))
def test_the_first_half_of_a_gap_does_not_see_the_next_scene(gap):
    """For any gap: half of it, in whole blocks, but for the last two, grows forward, reads nothing
    of the next scene and has the prompt of the last one; one block that reads both sides has the
    rest."""
    places = [(0, 6), (6 + gap, 12 + gap)]
    steps = timeline(12 + gap, places).steps[4:]
    *grown, last = steps
    alone = {9: 3, 10: 3, 11: 3}.get(gap, gap // 2 // 3 * 3 if gap >= 12 else 0)
    assert [len(step.targets) for step in grown] == [3] * (alone // 3)
    assert len(last.targets) == gap - alone
    for step in grown:
        assert max(i for i, _ in step.reads) < step.targets[0] and step.prompt == 0
    read = {i for i, _ in last.reads}
    assert last.prompt == 1 and min(read) < last.targets[0] and max(read) >= 6 + gap
    whole = timeline(12 + gap, places, split_gaps=False).steps[4:]
    assert [len(step.targets) for step in whole] == [gap] and whole[0].prompt == 1


def test_a_gap_grows_from_the_scene_before_it():
    """Of three scenes, the second gap leaves the second scene: it reads that, and has its
    prompt."""
    plan = timeline(36, [(0, 9), (12, 21), (30, 36)])
    grown = next(step for step in plan.steps if step.targets == (21, 22, 23))
    assert grown.prompt == 1 and [i for i, _ in grown.reads] == [15, 16, 17, 18, 19, 20]


def test_story_structure():
    """Scenes first, blind to each other and with their own prompts, a later one with anchors; then
    gaps that see both sides."""
    plan = timeline(36, [(0, 3), (12, 18), (27, 36)])
    assert plan.length == 36 and plan.prompts() == 3
    inside = {i: n for n, r in enumerate((range(3), range(12, 18), range(27, 36))) for i in r}
    made, gaps = plan.steps[:6], plan.steps[6:]
    for step in made:
        seen = [*step.targets, *(i for i, _ in step.reads)]
        assert {inside[i] for i in seen} == {step.prompt}
    assert [len(step.anchors) for step in made] == [0, 3, 0, 3, 0, 0]
    assert [(step.targets, step.prompt) for step in gaps] == [
        ((3, 4, 5), 0),
        (tuple(range(6, 12)), 1),
        ((18, 19, 20), 1),
        (tuple(range(21, 27)), 2),
    ]
    assert [[i for i, _ in step.reads] for step in gaps[1::2]] == [
        [*range(6), *range(12, 18)],
        [*range(15, 21), *range(27, 33)],
    ]


def test_story_shares_out_its_length():
    """The scenes share what the gaps leave, the first ones longer by a block."""
    for plan, places in (
        (story(39), [(0, 9), (15, 24), (30, 39)]),
        (story(18, gap=3), [(0, 6), (9, 12), (15, 18)]),
        (story(30, scenes=2, gap=12), [(0, 9), (21, 30)]),
        (transition(24), [(0, 9), (15, 24)]),
        (transition(10, block=2, anchors=1), [(0, 4), (8, 10)]),
    ):
        block = 2 if plan.length == 10 else 3
        assert plan.steps == timeline(plan.length, places, block, min(3, 2 * block - 3)).steps
    assert story().name == "story" and transition().name == "transition"
    whole = [(0, 9), (15, 24), (30, 38)]  # what is no block is the last scene's
    assert story(38).steps == timeline(38, whole).steps and story(38).length == 38
    assert transition(24).steps == story(24, scenes=2).steps


# ---------------------------------------------------------------- one clip, and the orders
def test_timeline_by_hand():
    """The user's clip in the middle: committed forward, then blocks after it, then backward blocks
    with anchors before it."""
    plan = with_given(timeline(12, [(3, 9)]), range(3, 9))
    assert plan.steps == (
        Step((3, 4, 5), (3, 4, 5), given=(3, 4, 5)),
        Step((6, 7, 8), (3, 4, 5), reads=((3, 0), (4, 1), (5, 2)), given=(6, 7, 8)),
        Step((9, 10, 11), (6, 7, 8), reads=tuple((i, i - 3) for i in range(3, 9))),
        Step((0, 1, 2), (0, 1, 2), reads=same(*range(3, 12))),
    )
    assert timeline(9, [(3, 6)]).steps[0] == Step((3, 4, 5), (0, 1, 2, 3, 4, 5), (0, 1, 2))


def test_timeline_contains_the_other_orders():
    """One scene at the beginning is forward order, at the end backward order's blocks; two in one
    shot are inbetween."""
    assert timeline(21, [(0, 6)]).steps == anchors.forward(21).steps
    assert timeline(33, [(0, 6)], view=SINKS).steps == anchors.long(33).steps
    for a, b in (
        (
            timeline(33, [(30, 33)], view=View(6, past_sink=True)),
            anchors.long(33, "backward", sink="past"),
        ),
        (timeline(21, [(18, 21)]), anchors.backward(21)),
        (timeline(12, [(9, 12)], view=View(as_trained=True)), AS_TRAINED),
    ):
        assert a.steps[1:] == b.steps[1:]
    joined = switch(timeline(21, [(0, 3), (18, 21)], joined=True), ())
    assert joined.steps == anchors.inbetween().steps
    ends = [0, 1, 2, 18, 19, 20]
    assert with_given(joined, ends).steps == anchors.inbetween(given=True).steps


AS_TRAINED = anchors.backward(12, view=View(as_trained=True))


def test_a_gap_that_no_horizon_holds_grows_forward_first():
    """30 latents between two ends: the second end does not see the first, 15 are made forward and
    the last 15 at once."""
    plan = timeline(36, [(0, 3), (33, 36)], joined=True)
    assert not plan.steps[1].reads
    assert [len(step.targets) for step in plan.steps] == [3, 3, 3, 3, 3, 3, 3, 15]


def test_timeline_memory_is_constant():
    """Hundreds of latents before and after a clip: the cache does not grow."""
    plans = [timeline(2 * n + 6, [(n, n + 6)], view=SINKS) for n in (60, 300)]
    assert {plan.capacity for plan in plans} == {12}


# ---------------------------------------------------------------- mistakes
IMPOSSIBLE = [
    (lambda: story(scenes=0), "0 scenes"),
    (lambda: story(gap=-1), "gap -1"),
    (lambda: story(gap=16), "gap of 1 to 15, got 3 scenes and gap 16"),
    (lambda: story(anchors=4), "4 anchors"),
    (lambda: story(20), "20 latents have no room for 3 scenes of 3 and gaps of 6; use 21 or more"),
    (lambda: story(block=0), "gap 0"),
    (lambda: transition(gap=16), "gap 16"),
    (lambda: timeline(9, []), "scenes []"),
    (lambda: timeline(9, [(0, 5), (4, 9)]), "one after the other within 9"),
    (lambda: timeline(9, [(3, 3)]), "[(3, 3)]"),
    (lambda: timeline(9, [(3, 10)]), "within 9 latents"),
    (lambda: timeline(9, [(-1, 3)]), "[(-1, 3)]"),
    (lambda: timeline(9, [(0, 3), (6, 9)], order=(0, 0)), "[0, 0] must name each of 0 to 1 once"),
    (lambda: timeline(9, [(0, 3)], anchors=4), "4 anchors"),
    (lambda: timeline(9, [(0, 3)], block=0), "block 0"),
    (lambda: timeline(60, [(0, 3)]), "horizon"),
]


@pytest.mark.parametrize("call, says", IMPOSSIBLE)
def test_impossible_scenes_are_refused(call, says):
    """A builder asked for the impossible says what and how much."""
    with pytest.raises(UserError) as error:
        call()
    assert says in str(error.value)


def test_scenes_are_orders():
    """story and transition are known to whoever looks into `ORDERS`."""
    assert {"story", "transition"} <= anchors.ORDERS.keys() and ORDERS is anchors.ORDERS
