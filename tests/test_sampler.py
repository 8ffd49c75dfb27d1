"""Executing a plan: cached == full for every order, no leak, no stray gradient."""

import gc
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MIXED, PLANS, distance, randn, side_by_side, tiny_dit

import anchors
import plans
import sampler
from anchors import HORIZON, Plan, Step, layout
from kvcache import KVCache
from lib.common import Stream, UserError, generator
from lib.noise import IMAGINED, noise_from, noise_seeded
from lib.recipe import Recipe
from sampler import (
    gather,
    generate,
    ode_sigmas,
    shift_sigma,
    sigmas_of,
    student_blocks,
    student_sigmas,
    teacher_blocks,
)

SIGMAS, H, W = student_sigmas(), 4, 2  # 2 tokens a latent
EVERY = PLANS | MIXED


# ---------------------------------------------------------------- schedule and noise
def test_schedule_numbers():
    """Wan's shift of 5 makes 1000, 750, 500, 250 into 1000, 937.5, 833.333, 625."""
    assert [1000 * s for s in SIGMAS] == pytest.approx([1000, 937.5, 2500 / 3, 625], abs=1e-9)
    five = [1000, 952.381, 882.353, 769.231, 555.556]
    sigmas = student_sigmas((1000, 800, 600, 400, 200))
    assert [1000 * s for s in sigmas] == pytest.approx(five, abs=1e-3)
    assert student_sigmas(shift=1) == [1, 0.75, 0.5, 0.25]
    assert shift_sigma(0.001) == pytest.approx(0.00498, abs=1e-6) and shift_sigma(0.0) == 0
    assert distance(shift_sigma(torch.tensor([1.0, 0.75, 0.5, 0.25])), torch.tensor(SIGMAS)) <= 1e-7


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_every_twelfth_ode_level_is_the_students(shift):
    """48 solver steps pass through the student's levels exactly, fall strictly, and end at 0."""
    levels = ode_sigmas(48, shift)
    assert len(levels) == 49 and levels[0] == 1 and levels[-1] == 0
    assert levels == sorted(set(levels), reverse=True)
    assert levels[:48:12] == student_sigmas(shift=shift)


@pytest.mark.parametrize("levels", [(), (0,), (1001,), (250, 500), (500, 500), (1000, -1)])
def test_impossible_levels_are_refused(levels):
    """Noise levels fall, from at most 1000, and stay above 0."""
    with pytest.raises(UserError, match="--denoising .*must fall from at most 1000"):
        student_sigmas(levels)


def test_noise_is_a_function_of_numbers():
    """The noise of a latent depends on (seed, prompt, sample, latent, level): not on batch,
    neighbours or order; each number counts."""
    shape = (2, 3, 5)
    both = noise_seeded([(0, 0, 0), (7, 3, 1)], shape)
    assert both(0, (4, 1, -2)).shape == (2, 3, *shape)
    alone = noise_seeded([(7, 3, 1)], shape)
    assert torch.equal(alone(0, (1,))[0, 0], both(0, (4, 1, -2))[1, 1])
    assert torch.equal(alone(0, (1,)), alone(0, (1,)))
    numbers = (
        ((7, 3, 1), 0, 1),
        ((8, 3, 1), 0, 1),
        ((7, 4, 1), 0, 1),
        ((7, 3, 2), 0, 1),
        ((7, 3, 1), 1, 1),
        ((7, 3, 1), 0, 2),
        ((7, 3, 1), 0, -2),
        ((3, 7, 1), 0, 1),
        ((7, 3, 1), 1, 0),
        ((7, 3, 1), 0, 1 + IMAGINED),
    )
    draws = [noise_seeded([seed], shape)(k, (i,)) for seed, k, i in numbers]
    assert all((a - b).abs().min() > 0 for n, a in enumerate(draws) for b in draws[:n])
    many = noise_seeded([(0, 0, 0)], (1000,))(2, tuple(range(20)))
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_noise_has_a_stream_of_its_own():
    """Clips that are sampled share no random number with what training draws: the second number of
    every generator says what it is for."""
    got = noise_seeded([(7, 3, 1)], (2, 3))(2, (4,))[0, 0]
    assert torch.equal(got, torch.randn(2, 3, generator=generator(7, Stream.SAMPLE, 3, 1, 4, 2)))
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)


def test_noise_from_tensors():
    """Row i is latent i, dummies ~i stand behind the video, then the same again for anchors;
    renoise k-1 is for level k; its absence is an error."""
    noise = torch.arange(12.0).view(1, 12, 1, 1, 1)
    renoise = torch.arange(100.0, 124).view(2, 1, 12, 1, 1, 1)
    rows = noise_from(noise, renoise, length=4)
    numbers = (3, 0, -1, -2, 3 + IMAGINED, IMAGINED)
    assert rows(0, numbers).flatten().tolist() == [3, 0, 4, 5, 9, 6]
    assert rows(1, (1, -1, 2 + IMAGINED)).flatten().tolist() == [101, 104, 108]
    assert rows(2, (1,)).flatten().tolist() == [113]
    with pytest.raises(ValueError, match="renoise"):
        noise_from(noise)(1, (0,))


def test_whose_noise_an_anchor_has_by_hand():
    """none: its own at each level. start: at the first level its latent's. all: always that."""
    step = Step((3, 4), (2, 3, 4), anchors=(2,))
    mine, shared = (2 + IMAGINED, 3, 4), (2, 3, 4)
    assert [step.noise("none", k) for k in range(3)] == [mine, mine, mine]
    assert [step.noise("start", k) for k in range(3)] == [shared, mine, mine]
    assert [step.noise("all", k) for k in range(3)] == [shared, shared, shared]


# ---------------------------------------------------------------- a student's recipe
def test_a_recipe_survives_a_checkpoint():
    """What is written into a checkpoint's metadata is read back; one that says nothing is None."""
    recipe = Recipe((1000.0, 500.0), (1000.0,), 3.0, 2, 1, 0, "start", "any")
    assert Recipe.read(recipe.write()) == recipe

    assert Recipe.read(json.loads(json.dumps(recipe.write()))) == recipe
    assert Recipe.read(None) is None and Recipe.read({}) == Recipe()
    with pytest.raises(UserError, match="recipe is not one of this version.*'colour'"):
        Recipe.read({"colour": "red"})
    with pytest.raises(UserError, match=r"--denoising .* 250 500 must fall"):
        Recipe.read({"first_levels": [250, 500]})


def test_a_recipe_gives_each_step_its_levels():
    """The block that is made first may have others."""
    usual = sigmas_of(Recipe())
    assert usual(0) == usual(5) == SIGMAS
    sigmas = sigmas_of(Recipe((1000, 500), (1000, 750, 250), shift=1.0))
    assert sigmas(0) == [1, 0.75, 0.25] and sigmas(1) == [1, 0.5]


# ---------------------------------------------------------------- cached == full
@st.composite
def random_plans(draw) -> Plan:
    """Any partition of a few latents into steps in any order, with any anchors, reading anything
    finished, anywhere in the horizon."""
    length = draw(st.integers(1, 7))
    order = draw(st.permutations(range(length)))
    cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
    origin, steps, finished = draw(st.integers(-30, 30)), [], []
    for a, b in zip([0, *cuts], [*cuts, length]):
        targets = tuple(order[a:b])
        others = st.sampled_from([i for i in range(-2, length + 2) if i not in targets])
        imagined = tuple(draw(st.lists(others, max_size=3, unique=True)))
        read = []  # a latent may come twice
        if finished:
            read = draw(st.lists(st.sampled_from(finished), max_size=6))
        places = [origin + p for p in draw(st.permutations(range(HORIZON)))]
        own = len(imagined) + len(targets)
        steps.append(Step(targets, tuple(places[:own]), imagined, tuple(zip(read, places[own:]))))
        finished += targets
    return Plan("random", length, tuple(steps))


def slots_of(plan: Plan) -> list[list[int]]:
    """For each step, the layout's slots of its own latents, in the step's order."""
    lay = layout(plan)
    where = {key: s for s, key in enumerate(zip(lay.step, lay.latent, lay.is_target))}
    return [[where[n, i, i in step.targets] for i in step.own] for n, step in enumerate(plan.steps)]


def inputs(plan: Plan, B: int = 2) -> tuple:
    """Random latents for the layout's slots, another time per step and sample."""
    lay = layout(plan)
    z, t = randn(0, B, len(lay.latent), 4, H, W), 1000 * randn(1, B, len(plan.steps)).sigmoid()
    return lay, z, t[:, torch.tensor(lay.step)]


def check_cached_equals_full(plan: Plan) -> None:
    model = tiny_dit()
    lay, z, t = inputs(plan)
    text = model.text_kv(randn(2, 2, 5, 32))
    full = model(z, t, text, torch.tensor(lay.pos), lay.visible)
    cache = KVCache(model.config, 2, plan.capacity, H, W)  # exactly the slots it says it needs
    for n, (step, own) in enumerate(zip(plan.steps, slots_of(plan))):
        past = cache.read(step.reads)
        pos = torch.tensor(step.pos)
        out, kv = model(z[:, own], t[:, own], text, pos, past=past, return_kv=True)
        assert distance(out, full[:, own]) <= 1e-5, (n, step)
        cache.evict([i for i in cache.slot if plan.last_read.get(i, -1) <= n])
        needed = {i for i in step.targets if plan.last_read.get(i, -1) > n}
        cache.write(tuple(i if i in needed else None for i in step.own), kv)
    _, pos, visible = side_by_side(plan.steps)
    own = sum(slots_of(plan), [])
    again = model(z[:, own], t[:, own], text, torch.tensor(pos), visible)
    assert distance(again, full[:, own]) <= 1e-5


@pytest.mark.parametrize("plan", EVERY.values(), ids=EVERY)
def test_cached_equals_full(plan):
    """The masked pass over all steps at once equals the steps one by one with the cache, and the
    obvious mask of the test."""
    check_cached_equals_full(plan)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(random_plans())
def test_cached_equals_full_for_any_plan(plan):
    """So it is for any plan at all, orders nobody has thought of included."""
    check_cached_equals_full(plan)


# ---------------------------------------------------------------- no leak
def check_no_leak(plan: Plan) -> None:
    """Perturb all that a step does not depend on: same bits. Perturb one thing it reads: others."""
    model = tiny_dit()
    lay, z, t = inputs(plan, B=1)
    text, pos = model.text_kv(randn(2, 1, 5, 32)), torch.tensor(lay.pos)
    full, other, slots = model(z, t, text, pos, lay.visible), randn(3, *z.shape), slots_of(plan)
    home = {i: s for s, i in enumerate(lay.latent) if lay.is_target[s]}
    needs: list[set[int]] = []  # for each step, the steps it depends on, itself included
    for n, step in enumerate(plan.steps):
        needs.append({n}.union(*(needs[plan.made_at[i]] for i, _ in step.reads)))
        foreign = torch.tensor([owner not in needs[n] for owner in lay.step])
        z2 = torch.where(foreign.view(1, -1, 1, 1, 1), other, z)
        changed = model(z2, torch.where(foreign, 1000 - t, t), text, pos, lay.visible)
        assert torch.equal(changed[:, slots[n]], full[:, slots[n]]), (n, step)
        ends = [home[i] for i, _ in step.reads[:1] + step.reads[-1:]]
        for s in {slots[n][0], slots[n][-1], *ends}:
            moved = z.clone()
            moved[:, s] = other[:, s]
            out = model(moved, t, text, pos, lay.visible)
            assert not torch.equal(out[:, slots[n]], full[:, slots[n]]), (n, step, s)


@pytest.mark.parametrize("plan", EVERY.values(), ids=EVERY)
def test_no_leak(plan):
    """A step's output has the same bits whatever stands where it does not look, other steps'
    anchors included."""
    check_no_leak(plan)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(random_plans())
def test_no_leak_for_any_plan(plan):
    """So it is for any plan at all."""
    check_no_leak(plan)


def test_anchors_are_seen_by_their_own_step_only():
    """Backward: another imagined past changes the block that imagined it, but no key of another
    block directly (one layer)."""
    model, plan = tiny_dit(num_layers=1), anchors.backward(9)
    lay, z, t = inputs(plan)
    text, pos = randn(2, 2, 5, 32), torch.tensor(lay.pos)
    moved = torch.where(torch.tensor(lay.is_target).view(1, -1, 1, 1, 1), z, randn(3, *z.shape))
    a, b = (model(x, t, text, pos, lay.visible) for x in (z, moved))
    one, two, three = ([s for s in range(9) if lay.step[s] == n] for n in range(3))
    assert distance(a[:, one], b[:, one]) > 0.01 and distance(a[:, two], b[:, two]) > 0.01
    assert torch.equal(a[:, three], b[:, three])


# ---------------------------------------------------------------- rollouts
NAMES = [
    "forward",
    "forward, ragged window",
    "backward P=0",
    "backward P=2",
    "backward P=3",
    "backward, dummy",
    "inbetween",
    "inbetween, given",
    "loop",
    "story",
    "long forward, both sink",
    "long backward, both sink",
    "long backward, as trained",
    "timeline, held latents",
    "timeline, one shot",
    "timeline, long",
    "forward, held latent",
]
ROLLOUTS = {name: PLANS[name] for name in NAMES} | MIXED


def drawn(plan: Plan, B: int = 2, seed: int = 10) -> tuple:
    """noise, renoise [levels - 1] of every latent, dummy, and their anchors; the user's latents."""
    rows = 2 * (plan.length + 3)
    return (
        randn(seed, B, rows, 4, H, W),
        randn(seed + 1, 3, B, rows, 4, H, W),
        randn(seed + 2, B, plan.length, 4, H, W),
    )


def row(plan: Plan, number: int) -> int:
    """Where the tensors of `drawn` hold a noise: the video, three dummies, the anchors of both."""
    if number >= IMAGINED:
        return plan.length + 3 + number - IMAGINED
    return number if number >= 0 else plan.length - 1 - number


def obvious_rollout(
    model, plan: Plan, text, drawn: tuple, levels_of, commit_anchors=False, share_noise="none"
) -> torch.Tensor:
    """No cache: for each level of each block, everything before it runs again, clean, in one masked
    sequence. levels_of: step of the plan -> its noise levels."""
    noise, renoise, own_latents = drawn
    steps, clean, made = [], [], {}  # finished steps as they are seen later, their clean latents
    for n, step in enumerate(plan.steps):
        # without anchors, as it is committed
        seen = Step(step.targets, step.pos[len(step.anchors) :], (), step.reads)
        held = torch.tensor([i in step.given for i in step.own])
        users = own_latents[:, [max(i, 0) for i in step.own]]
        if held.all():
            x0, step = users, seen
        else:
            for k, sigma in enumerate(levels_of(n)):
                numbers = [row(plan, i) for i in step.noise(share_noise, k)]
                fresh = (renoise[k - 1] if k else noise)[:, numbers]
                x = (1 - sigma) * x0 + sigma * fresh if k else fresh
                x = torch.where(held.view(-1, 1, 1, 1), users, x)
                owner, pos, visible = side_by_side([*steps, step])
                t = torch.zeros(len(owner))
                t[-len(step.own) :] = 1000 * sigma * ~held
                z = torch.cat([*clean, x], 1)
                v = model(z, t.expand(len(z), -1), text, torch.tensor(pos), visible)
                x0 = x - sigma * v[:, -len(step.own) :]
                x0 = torch.where(held.view(-1, 1, 1, 1), users, x0)
        made.update(zip(step.targets, x0[:, len(step.anchors) :].unbind(1)))
        steps.append(step if commit_anchors else seen)
        clean.append(x0 if commit_anchors else x0[:, len(step.anchors) :])
    return torch.stack([made[i] for i in range(plan.length)], 1)


def users_of(plan: Plan, own_latents: torch.Tensor) -> dict:
    return {i: own_latents[:, i] for i in range(plan.length)}


@pytest.mark.parametrize("commit_anchors", [False, True])
@pytest.mark.parametrize("plan", ROLLOUTS.values(), ids=ROLLOUTS)
def test_rollout_equals_a_slow_obvious_one(plan, commit_anchors):
    """generate() equals the rollout that keeps no cache and recomputes all clean latents."""
    model, text, data = tiny_dit(), randn(5, 2, 5, 32), drawn(plan)
    got = generate(
        model,
        plan,
        [text] * plan.prompts(),
        noise_from(*data[:2], plan.length),
        given=users_of(plan, data[2]),
        commit_anchors=commit_anchors,
    )
    expected = obvious_rollout(model, plan, text, data, lambda n: SIGMAS, commit_anchors)
    assert 0.1 < expected.std() < 10 and distance(got, expected) <= 1e-5
    users = sorted(i for step in plan.steps for i in step.given if i in step.targets)
    assert torch.equal(got[:, users], data[2][:, users])


@pytest.mark.parametrize("share_noise", ["start", "all"])
@pytest.mark.parametrize(
    "name", ["backward P=2", "backward P=3", "backward, dummy", "long backward, both sink"]
)
def test_anchors_may_share_their_noise(name, share_noise):
    """As the recipe says: at the first level, or at all. Where there are anchors, it matters."""
    model, text, plan = tiny_dit(), randn(5, 2, 5, 32), PLANS[name]
    data = drawn(plan)
    noise = noise_from(*data[:2], plan.length)
    got, usual = (
        generate(model, plan, [text], noise, recipe=Recipe(share_noise=share))
        for share in (share_noise, "none")
    )
    expected = obvious_rollout(model, plan, text, data, lambda n: SIGMAS, share_noise=share_noise)
    assert distance(got, expected) <= 1e-5
    assert (distance(got, usual) > 1e-3) == any(step.anchors for step in plan.steps)


def test_committing_anchors_is_a_choice():
    """commit_anchors changes what later blocks read, and only that: the first block is the same,
    the others are not."""
    model, text, plan = tiny_dit(), randn(5, 2, 5, 32), anchors.backward(9)
    noise = noise_from(*drawn(plan)[:2], plan.length)
    a, b = (generate(model, plan, [text], noise, commit_anchors=c) for c in (False, True))
    assert torch.equal(a[:, 6:], b[:, 6:])
    assert distance(a[:, :3], b[:, :3]) > 1e-3 and distance(a[:, 3:6], b[:, 3:6]) > 1e-3


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("name", ["forward", "backward P=3"])
def test_exit_stops_every_block_there(name, level):
    """exit_at yields the x0 of that level, for every block."""
    model, text, plan = tiny_dit(), randn(5, 2, 5, 32), PLANS[name]
    data = drawn(plan)
    noise = noise_from(*data[:2], plan.length)
    got = generate(model, plan, [text], noise, exit_at=lambda n: level)
    expected = obvious_rollout(model, plan, text, data, lambda n: SIGMAS[: level + 1])
    assert distance(got, expected) <= 1e-5


@pytest.mark.parametrize("name", ["forward", "backward P=3", "backward, dummy"])
def test_first_block_may_take_more_levels(name):
    """One level a block, but four for the first; and with exits, two of these four. A dummy, which
    comes before it, is not the first."""
    model, text, plan = tiny_dit(), randn(5, 2, 5, 32), PLANS[name]
    data, recipe = drawn(plan), Recipe((1000,), (1000, 750, 500, 250))
    noise = noise_from(*data[:2], plan.length)
    for first, exit_at in ((SIGMAS, lambda n: None), (SIGMAS[:2], lambda n: 0 if n else 1)):
        got = generate(model, plan, [text], noise, recipe=recipe, exit_at=exit_at)
        levels = [SIGMAS[:1]] * len(plan.steps)
        levels[plan.made_at.get(-1, -1) + 1] = first
        assert distance(got, obvious_rollout(model, plan, text, data, levels.__getitem__)) <= 1e-5


def leaves(B: int = 1):
    """Noise as fresh leaf tensors, one per (numbers, level), remembered: to ask where gradients
    go."""
    made = {}

    def noise(k: int, numbers: tuple[int, ...]) -> torch.Tensor:
        made[numbers, k] = randn(len(made), B, len(numbers), 4, H, W).requires_grad_()
        return made[numbers, k]

    return noise, made


@pytest.mark.parametrize("level", [0, 1, 3])
@pytest.mark.parametrize(
    "name", ["forward", "backward P=3", "backward, dummy", "loop", "long backward, both sink"]
)
def test_gradients_stay_in_their_block_and_level(name, level):
    """d block / d noise is zero for every other block and every level but the last; anchors get
    gradient through their targets."""
    model, plan = tiny_dit().requires_grad_(), PLANS[name]
    noise, made = leaves()
    with_grad, caches, real = [], [], sampler.cache_for
    model.register_forward_pre_hook(lambda *_: with_grad.append(torch.is_grad_enabled()))
    text = randn(5, 1, 5, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sampler, "cache_for", lambda *a, **k: caches.append(real(*a, **k)) or caches[0]
        )
        finished = dict(student_blocks(model, plan, [text], noise, exit_at=lambda n: level))
    kept = [any(plan.last_read.get(i, -1) > n for i in s.targets) for n, s in enumerate(plan.steps)]
    passes = [[k == level for k in range(level + 1)] + [False] * keeps for keeps in kept]
    assert with_grad == sum(passes, [])
    assert not any(x.requires_grad for pair in caches[0].layers for x in pair)
    for n, step in enumerate(plan.steps):
        assert finished[n].shape[1] == len(step.targets)
        total = finished[n].square().sum()
        grads = torch.autograd.grad(
            total, list(made.values()), retain_graph=True, allow_unused=True
        )
        for (numbers, k), g in zip(made, grads):
            if numbers == step.noise("none", k) and k == level:
                assert (g.flatten(2).abs().amax(2) > 0).all()  # targets, and anchors through them
            else:
                assert g is None or g.abs().max() == 0, (step, numbers, k)
        wrt = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
        assert all(g.abs().max() > 0 for g in wrt)


def test_without_exit_nothing_is_differentiated():
    """A rollout for inference builds no graph, even where the caller has gradients enabled."""
    model, plan = tiny_dit().requires_grad_(), anchors.forward(6)
    noise = noise_from(*drawn(plan)[:2], plan.length)
    assert not generate(model, plan, [randn(5, 2, 5, 32)], noise).requires_grad


@pytest.mark.parametrize("name", ["forward", "backward P=3", "long forward, both sink"])
def test_a_batch_equals_its_samples(name):
    """Two videos at a time are the two videos, each with its own noise and text."""
    model, plan, text = tiny_dit(), PLANS[name], randn(5, 2, 5, 32)

    def go(rows: slice) -> torch.Tensor:
        noise = noise_seeded([(3, 1, 0), (3, 2, 4)][rows], (4, H, W))
        return generate(model, plan, [text[rows]], noise)

    both = go(slice(0, 2))
    alone = torch.cat([go(slice(0, 1)), go(slice(1, 2))])
    assert distance(both, alone) <= 1e-5 and distance(both[:1], both[1:]) > 0.1
    assert torch.equal(both, go(slice(0, 2)))


def test_each_scene_follows_its_own_prompt():
    """Another prompt for the second scene changes it and the gap, and no bit of the first scene;
    text may be keys."""
    model, plan = tiny_dit(), plans.transition(9, gap=3)
    noise, (a, b, c) = noise_seeded([(0, 0, 0)], (4, H, W)), randn(5, 3, 1, 5, 32)
    one, two = generate(model, plan, [a, b], noise), generate(model, plan, [a, c], noise)
    assert torch.equal(one[:, :3], two[:, :3])
    assert all(distance(one[:, i], two[:, i]) > 1e-3 for i in range(3, 9))
    assert torch.equal(one, generate(model, plan, [model.text_kv(a), model.text_kv(b)], noise))


# ---------------------------------------------------------------- a teacher's many steps
@pytest.mark.parametrize("share_noise", ["none", "start", "all"])
@pytest.mark.parametrize(
    "name",
    ["forward", "backward P=3", "backward, dummy", "forward, held latent", "inbetween, given"],
)
def test_a_teachers_rollout_equals_a_slow_obvious_one(name, share_noise):
    """48 Euler steps a block with guidance, given latents held: the cache of both halves against
    masked passes of everything, once with the prompt and once without. An ODE has one noise."""
    model, plan, w = tiny_dit(), PLANS[name], 3.0
    noise, _, own_latents = drawn(plan)
    words, nothing = randn(5, 2, 5, 32), torch.zeros(1, 5, 32)
    got = gather(
        plan,
        teacher_blocks(
            model,
            plan,
            [words],
            nothing,
            noise_from(noise, length=plan.length),
            w,
            given=users_of(plan, own_latents),
            share_noise=share_noise,
        ),
    )
    share = "all" if share_noise == "all" else "none"
    steps, clean, made = [], [], {}
    for step in plan.steps:
        seen = Step(step.targets, step.pos[len(step.anchors) :], (), step.reads)
        held = torch.tensor([i in step.given for i in step.own]).view(-1, 1, 1, 1)
        users = own_latents[:, [max(i, 0) for i in step.own]]
        if held.all():
            x, step = users, seen
        else:
            x = noise[:, [row(plan, i) for i in step.noise(share, 0)]]
            _, pos, visible = side_by_side([*steps, step])
            for high, low in zip(ode_sigmas()[:-1], ode_sigmas()[1:]):
                x = torch.where(held, users, x)
                t = torch.zeros(2, len(pos))
                t[:, -len(step.own) :] = 1000 * high * ~held.flatten()
                z = torch.cat([*clean, x], 1)
                cond, uncond = (
                    model(z, t, text, torch.tensor(pos), visible)[:, -len(step.own) :]
                    for text in (words, nothing.expand_as(words))
                )
                x = x + (low - high) * (uncond + w * (cond - uncond))
            x = torch.where(held, users, x)
        made.update(zip(step.targets, x[:, len(step.anchors) :].unbind(1)))
        steps.append(seen)
        clean.append(x[:, len(step.anchors) :])
    expected = torch.stack([made[i] for i in range(plan.length)], 1)
    assert distance(got, expected) <= 2e-4  # 48 steps add up their rounding


# ---------------------------------------------------------------- long videos
def evaluations(plan: Plan) -> int:
    """How often the transformer runs: four levels a block, and once to commit it if a later one
    reads it."""
    return sum(
        4 * (not step.commits) + any(plan.last_read.get(i, -1) > n for i in step.targets)
        for n, step in enumerate(plan.steps)
    )


def live_bytes() -> int:
    """Bytes of all tensors that are alive."""
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) is torch.Tensor]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


@pytest.mark.parametrize("way", ["forward", "backward"])
@torch.no_grad()
def test_long_videos_take_constant_memory(way):
    """100 s take less than 10.5 times the evaluations of 10 s. 30 s: the same cache and, at its
    peak, the same live tensors, where the caller keeps none of the blocks."""
    assert evaluations(anchors.long(402, way)) <= 10.5 * evaluations(anchors.long(42, way))
    model, peaks = tiny_dit(), []
    for length in (42, 120):
        plan, calls, peak = anchors.long(length, way), [], 0
        hook = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        noise = noise_seeded([(0, 0, 0)], (4, H, W))
        for n, _ in student_blocks(model, plan, [randn(5, 1, 5, 32)], noise):
            peak = max(peak, live_bytes()) if n % 6 < 2 else peak
        hook.remove()
        peaks.append((plan.capacity, peak))
        assert len(calls) == evaluations(plan)
    assert peaks[0][0] == peaks[1][0] and peaks[1][1] <= 1.01 * peaks[0][1]


# ---------------------------------------------------------------- compiled
@torch.no_grad()
def test_compiled_blocks_make_the_same_clip_and_are_compiled_once():
    """One graph serves all blocks, levels and layers of an order; the second clip, and a long one,
    compile nothing. (Traced, not generated code: that needs a C++ compiler or a GPU.) Keys are
    turned by the other formula, real numbers only: <= 1e-5."""
    slow, fast = tiny_dit(1), tiny_dit(1).compile_blocks("eager")
    texts, graphs = [slow.text_kv(randn(2, 1, 3, slow.config.text_dim))], []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for plan in (
        anchors.forward(21),
        anchors.forward(21),
        anchors.backward(21),
        anchors.backward(21),
        anchors.long(42),
    ):
        noise = randn(3, 4, 1, 2 * plan.length, slow.config.in_dim, 4, 4)
        start = noise_from(noise[0], noise[1:])
        a, b = (generate(dit, plan, texts, start) for dit in (slow, fast))
        assert distance(a, b) <= 1e-5
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] < graphs[2] == graphs[3] == graphs[4] <= 12, graphs
