"""Which plans training draws from: shares by hand, and every plan of every mix is one."""

import pytest
import torch
from tiny import command_line

import anchors
import train_dmd
import train_ode
from anchors import HORIZON, Step, View
from lib.cli import from_cli
from lib.common import UserError
from plans import (
    MIXES,
    any_mix,
    both_directions,
    draw,
    paper_mix,
    prefix_mix,
    rows_of,
    without_given,
)
from zoo import ar_teacher, causal_ode

SIZES = [(length, block) for length in range(6, 22) for block in range(1, 7)]
WHOLE = [(length, block) for length, block in SIZES if length % block == 0]


# ---------------------------------------------------------------- the paper's
def test_the_papers_mix_is_exactly_the_papers():
    """One entry: forward and backward over 21 latents, block 3, three anchors; nothing else."""
    assert paper_mix() == ((1.0, (anchors.forward(21), anchors.backward(21))),)
    assert MIXES["paper"] is paper_mix


def test_a_mix_of_your_own_is_a_name_on_the_command_line(monkeypatch, capsys):
    """Registered after the scripts were imported, it is trained by name; a name that is not there
    is refused in one sentence that lists all that are, from Python too."""
    monkeypatch.setitem(
        MIXES, "mine", lambda length, block, anchors, head: paper_mix(length, block)
    )
    config = from_cli(train_dmd.Config, ["--plans", "mine", "--latent", "6", "4", "4"])
    assert train_ode.mix_of(config) == paper_mix(6)
    for script in (train_ode, train_dmd, ar_teacher):
        code, error = command_line(monkeypatch, capsys, script, plans="yours")
        assert code == 2 and "--plans 'yours' must be paper or any" in error and "mine" in error
        with pytest.raises(UserError, match="--plans 'yours' must be .* or mine"):
            train_ode.mix_of(script.Config(plans="yours"), paper_mix())


@pytest.mark.parametrize("P", range(4))
def test_both_directions_by_hand(P):
    """Without anchors, backward blocks of the forward size could be taken for a beginning, so a
    dummy comes first."""
    forward, backward = both_directions(9, 3, P)
    assert forward == anchors.forward(9)
    assert backward == anchors.backward(9, anchors=P, dummy=P == 0)


def test_both_directions_with_a_head_by_hand():
    """The paper's baseline of larger blocks: forward in blocks of 3, backward in blocks of 6 with a
    head of 3, which no block of 6 is mistaken for: no dummy."""
    forward, backward = both_directions(15, 6, 0, head=3)
    assert forward == anchors.forward(15) and len(forward.steps) == 5
    assert backward == anchors.backward(15, 6, 0, head=3)
    assert [len(step.targets) for step in backward.steps] == [6, 6, 3]


# ---------------------------------------------------------------- ours
def by_name(mix) -> dict[str, float]:
    """What share of the iterations trains on a plan of this name and length."""
    shares = {}
    for share, some in mix:
        for plan in some:
            key = f"{plan.name} {plan.length}"
            shares[key] = shares.get(key, 0) + share
    return shares


def test_any_mix_by_hand():
    """Of 21 latents: a quarter whole, three tenths shorter by whole blocks, a fifth windowed, a
    fifth beside given clips, the rest pictures."""
    mix = any_mix()
    assert mix[0] == (pytest.approx(0.25), both_directions())
    shares = by_name(mix)
    assert shares["forward 1"] == pytest.approx(0.05)
    for length in (6, 9, 12, 15, 18):
        assert shares[f"forward {length}"] == shares[f"backward {length}"] == pytest.approx(0.06)
    assert shares["forward 21"] == shares["backward 21"] == pytest.approx(0.25 + 0.20)
    beside = {k: v for k, v in shares.items() if "clip" in k}
    assert beside == {
        k: pytest.approx(v)
        for k, v in (
            ("after a clip 21", 0.15),
            ("before a clip 21", 0.15),
            ("after a clip 15", 0.05),
            ("before a clip 15", 0.05),
        )
    }


def test_any_mix_has_the_window_and_the_sinks_of_long_video():
    """Steps in the middle of a windowed plan look as in a long video: the same positions."""
    for view in (View(6, True, True), View(6)):
        sink = "both" if view.past_sink else "none"
        windowed = (anchors.forward(21, view=view), anchors.backward(21, view=view))
        assert windowed in [plans for _, plans in any_mix()]
        for plan in windowed:
            long = anchors.long(60, plan.name, sink=sink)

            def shape(step: Step) -> tuple:
                return step.pos, tuple(p for _, p in step.reads), len(step.anchors)

            assert {shape(step) for step in plan.steps[:6]} <= {shape(step) for step in long.steps}


def test_without_anchors_every_first_backward_block_reads_a_dummy():
    """In windowed plans, too: nothing else tells it that it is not the beginning."""
    for _, some in any_mix(anchors=0):
        backward = some[-1]
        if backward.name == "backward":
            dummy, first = backward.steps[:2]
            assert dummy.targets == (-1, -2, -3) and [i for i, _ in first.reads] == [-1, -2, -3]


def test_plans_beside_a_clip_by_hand():
    """After: the clip commits, then forward blocks. Before: it commits, then backward blocks with
    anchors, the last one the beginning."""
    (after, before) = next(
        plans for _, plans in any_mix() if plans[0].length == 15 and given(plans)
    )
    assert [step.commits for step in after.steps] == [True] * 4 + [False]
    assert after.steps[4].targets == (12, 13, 14) and len(after.steps[4].reads) == 12
    assert [step.commits for step in before.steps] == [True] * 4 + [False]
    assert before.steps[4].targets == (0, 1, 2) and not before.steps[4].anchors
    assert (after.name, before.name) == ("after a clip", "before a clip")


def given(plans) -> bool:
    return any(step.given for plan in plans for step in plan.steps)


# ---------------------------------------------------------------- what holds for every mix
@pytest.mark.parametrize("length, block", WHOLE)
def test_every_plan_of_any_mix_is_valid(length, block):
    """A plan checks itself, so building it is enough; here, with every number of anchors and a
    head: within the horizon, complete, and none is longer than the clip."""
    for P in {0, 1, block}:
        mix = any_mix(length, block, P)
        assert sum(share for share, _ in mix) == pytest.approx(1, abs=1e-12)
        assert all(share > 0 and some for share, some in mix)
        for _, plans in mix:
            assert len({plan.length for plan in plans}) == 1
            for plan in plans:
                assert plan.length <= length and sorted(i for i in plan.made_at if i >= 0) == [
                    *range(plan.length)
                ]
                for step in plan.steps:
                    at = [*step.pos, *(p for _, p in step.reads)]
                    assert 0 <= min(at) and max(at) < HORIZON
        if block > 1 and (length - 1) % block == 0:
            assert any_mix(length, block, 0, head=1)[0][1] == both_directions(length, block, 0, 1)


@pytest.mark.parametrize("length, block", sorted(set(SIZES) - set(WHOLE)))
def test_lengths_that_no_blocks_fill_are_refused(length, block):
    """One sentence that says which lengths are right."""
    with pytest.raises(UserError, match=f"{length} latents are not whole blocks of {block}"):
        any_mix(length, block, 0)


@pytest.mark.parametrize("mix", [paper_mix(), any_mix(), any_mix(9), any_mix(15, 5), prefix_mix()])
def test_shares_sum_to_one_and_are_what_is_drawn(mix):
    """draw() over an even grid of [0, 1) hits each entry as often as its share says."""
    assert sum(share for share, _ in mix) == pytest.approx(1, abs=1e-12)
    count = 10000
    hits = [0] * len(mix)
    for i in range(count):
        hits[draw(mix, (i + 0.5) / count)] += 1
    for (share, _), hit in zip(mix, hits, strict=True):
        assert abs(hit - share * count) <= 1.5


def test_draw_by_hand():
    """Shares of .5, .25 and .25 end at .5, .75 and 1; a sum below 1 by rounding still ends well."""
    mix = tuple((share, ()) for share in (0.5, 0.25, 0.25))
    numbers = (0.0, 0.49, 0.5, 0.74, 0.75, 0.999)
    assert [draw(mix, u) for u in numbers] == [0, 0, 1, 1, 2, 2]
    assert draw(((0.3, ()), (0.6999999, ())), 0.99999999) == 1


def test_prefixes_by_hand():
    """The bidirectional teacher's: n latents at once for every n, the whole clip a third of the
    time more, and a picture beside each."""
    mix = prefix_mix(4)
    assert [share for share, _ in mix] == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 6 + 1 / 3])
    for n, (_, (clip, picture)) in enumerate(mix, 1):
        assert clip.steps == (Step(tuple(range(n)), tuple(range(n))),) and picture.length == 1
        assert (clip.name, picture.name) == ("clip", "picture")


def test_only_given_clips_need_clips():
    """Without clips, what begins with a given one is left out and the rest keeps its
    proportions."""
    mix = any_mix()
    free = without_given(mix)
    assert len(mix) - len(free) == 4 and not any(given(plans) for _, plans in free)
    assert sum(share for share, _ in free) == pytest.approx(1)
    assert free[0][0] / free[1][0] == pytest.approx(mix[0][0] / mix[1][0])
    assert [plans for _, plans in free] == [plans for _, plans in mix if not given(plans)]
    assert without_given(paper_mix()) == paper_mix()


def test_rows_of_noise():
    """One for each latent and each dummy, and as many again for anchors."""
    assert rows_of(both_directions(9, 3, 3)) == 18 and rows_of(both_directions(9, 3, 0)) == 24
    assert rows_of(both_directions(15, 6, 0, head=3)) == 30


# ---------------------------------------------------------------- pairs
@pytest.mark.parametrize("shards", [64, 500])
def test_every_entry_gets_pairs_in_proportion(shards):
    """Multiples of the golden ratio fill [0, 1) evenly: of any number of shards each entry has its
    share to within two, and the first 64 leave none out."""
    mix = any_mix()
    config = causal_ode.Config(pairs=shards * 32, shard=32)
    kind = causal_ode.CausalPairs(config, mix, 2, None)  # an entry is a group
    hits = torch.bincount(
        torch.tensor([kind.group_of(r) for r in kind.ranges()]), minlength=len(mix)
    )
    assert hits.min() > 0 and hits.sum() == shards
    for (share, _), hit in zip(mix, hits.tolist(), strict=True):
        assert abs(hit - share * shards) <= 2
