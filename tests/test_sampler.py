"""Executing a plan: cached == full for every order, no leak, no stray gradient, and a command line
that cannot surprise."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PLANS, distance, randn, randomise, side_by_side, tiny_dit

import anchors
from anchors import HORIZON, Plan, Step, layout
from generate import decode_in_order
from kvcache import KVCache
from lib.common import UserError
from sampler import (
    generate,
    noise_from,
    noise_seeded,
    ode_sigmas,
    rollout,
    shift_sigma,
    student_sigmas,
)
from vae import VAE, VAEConfig

SIGMAS, H, W = student_sigmas(), 4, 2  # 2 tokens a latent


# ---------------------------------------------------------------- schedule and noise
def test_schedule_numbers():
    """Wan's shift of 5 makes 1000, 750, 500, 250 into 1000, 937.5, 833.333, 625."""
    assert [1000 * s for s in SIGMAS] == pytest.approx([1000, 937.5, 2500 / 3, 625], abs=1e-9)
    five = [1000, 952.381, 882.353, 769.231, 555.556]
    assert [1000 * s for s in student_sigmas((1000, 800, 600, 400, 200))] == pytest.approx(
        five, abs=1e-3
    )
    assert (
        student_sigmas(shift=1) == [1, 0.75, 0.5, 0.25]
        and shift_sigma(0.001) == pytest.approx(0.00498, abs=1e-6)
        and shift_sigma(0.0) == 0
    )
    assert distance(shift_sigma(torch.tensor([1.0, 0.75, 0.5, 0.25])), torch.tensor(SIGMAS)) <= 1e-7


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_every_twelfth_ode_level_is_the_students(shift):
    """48 solver steps pass through the student's levels exactly, fall strictly, and end at 0."""
    levels = ode_sigmas(48, shift)
    assert (
        len(levels) == 49
        and levels[0] == 1
        and levels[-1] == 0
        and levels == sorted(set(levels), reverse=True)
    )
    assert levels[:48:12] == student_sigmas(shift=shift)


@pytest.mark.parametrize("steps", [(), (0,), (1001,), (250, 500), (1000, -1)])
def test_impossible_steps_are_refused(steps):
    """Denoising steps fall, from at most 1000, and stay above 0."""
    with pytest.raises(UserError, match="denoising steps"):
        student_sigmas(steps)


def test_noise_is_a_function_of_numbers():
    """The noise of a latent depends on (seed, prompt, sample, latent, k): not on batch, neighbours
    or order; each number counts."""
    shape = (2, 3, 5)
    both = noise_seeded([(0, 0, 0), (7, 3, 1)], shape)
    assert both(0, (4, 1, -2)).shape == (2, 3, *shape)
    alone = noise_seeded([(7, 3, 1)], shape)
    assert torch.equal(alone(0, (1,))[0, 0], both(0, (4, 1, -2))[1, 1]) and torch.equal(
        alone(0, (1,)), alone(0, (1,))
    )
    draws = [
        noise_seeded([seed], shape)(k, (i,))
        for seed, k, i in (
            ((7, 3, 1), 0, 1),
            ((8, 3, 1), 0, 1),
            ((7, 4, 1), 0, 1),
            ((7, 3, 2), 0, 1),
            ((7, 3, 1), 1, 1),
            ((7, 3, 1), 0, 2),
            ((7, 3, 1), 0, -2),
            ((3, 7, 1), 0, 1),
            ((7, 3, 1), 1, 0),
        )
    ]
    assert all((a - b).abs().min() > 0 for n, a in enumerate(draws) for b in draws[:n])
    many = noise_seeded([(0, 0, 0)], (1000,))(2, tuple(range(20)))
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_noise_from_tensors():
    """Row i is latent i, dummies ~i stand behind the video; renoise k-1 is for step k; its absence
    is an error."""
    noise, renoise = (
        torch.arange(6.0).view(1, 6, 1, 1, 1),
        torch.arange(100.0, 112).view(2, 1, 6, 1, 1, 1),
    )
    rows = noise_from(noise, renoise, length=4)
    assert rows(0, (3, 0, -1, -2)).flatten().tolist() == [3, 0, 4, 5]
    assert rows(1, (1, -1)).flatten().tolist() == [101, 104] and rows(
        2, (1,)
    ).flatten().tolist() == [107]
    with pytest.raises(ValueError, match="renoise"):
        noise_from(noise)(1, (0,))


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
        imagined = tuple(
            draw(
                st.lists(
                    st.sampled_from([i for i in range(-2, length + 2) if i not in targets]),
                    max_size=3,
                    unique=True,
                )
            )
        )
        read = (
            draw(st.lists(st.sampled_from(finished), max_size=6)) if finished else []
        )  # a latent may come twice
        places = [origin + p for p in draw(st.permutations(range(HORIZON)))]
        own = len(imagined) + len(targets)
        steps.append(Step(targets, tuple(places[:own]), imagined, tuple(zip(read, places[own:]))))
        finished += targets
    return Plan("random", length, tuple(steps))


def slots_of(plan: Plan) -> list[list[int]]:
    """For each step, the layout's slots of its own latents, in the step's order."""
    lay = layout(plan)
    where = {
        (n, i, target): s
        for s, (n, i, target) in enumerate(zip(lay.step, lay.latent, lay.is_target))
    }
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
    cache = KVCache(
        model.config, 2, plan.capacity, H, W
    )  # exactly the slots the plan says it needs
    for n, (step, own) in enumerate(zip(plan.steps, slots_of(plan))):
        past = cache.read(step.reads)
        out, kv = model(
            z[:, own], t[:, own], text, torch.tensor(step.pos), past=past, return_kv=True
        )
        assert distance(out, full[:, own]) <= 1e-5, (n, step)
        cache.evict([i for i in cache.slot if plan.last_read.get(i, -1) <= n])
        cache.write(
            tuple(
                i if i in step.targets and plan.last_read.get(i, -1) > n else None for i in step.own
            ),
            kv,
        )
    owner, pos, visible = side_by_side(plan.steps)
    own = sum(slots_of(plan), [])
    assert (
        distance(model(z[:, own], t[:, own], text, torch.tensor(pos), visible), full[:, own])
        <= 1e-5
    )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
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
    """Perturb all that a step does not depend on: same bits. Perturb one thing it reads: other
    bits."""
    model = tiny_dit()
    lay, z, t = inputs(plan, B=1)
    text, pos = model.text_kv(randn(2, 1, 5, 32)), torch.tensor(lay.pos)
    full, other, slots = model(z, t, text, pos, lay.visible), randn(3, *z.shape), slots_of(plan)
    home = {i: s for s, i in enumerate(lay.latent) if lay.is_target[s]}
    maker = {i: lay.step[s] for i, s in home.items()}
    needs: list[set[int]] = []  # for each step, the steps it depends on, itself included
    for n, step in enumerate(plan.steps):
        needs.append({n}.union(*(needs[maker[i]] for i, _ in step.reads)))
        foreign = torch.tensor([owner not in needs[n] for owner in lay.step])
        changed = model(
            torch.where(foreign.view(1, -1, 1, 1, 1), other, z),
            torch.where(foreign, 1000 - t, t),
            text,
            pos,
            lay.visible,
        )
        assert torch.equal(changed[:, slots[n]], full[:, slots[n]]), (n, step)
        for s in {
            slots[n][0],
            slots[n][-1],
            *(home[i] for i, _ in step.reads[:1] + step.reads[-1:]),
        }:
            moved = z.clone()
            moved[:, s] = other[:, s]
            assert not torch.equal(
                model(moved, t, text, pos, lay.visible)[:, slots[n]], full[:, slots[n]]
            ), (n, step, s)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
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
ROLLOUTS = {
    k: PLANS[k]
    for k in (
        "forward",
        "forward, ragged window",
        "backward P=0",
        "backward P=2",
        "backward P=3",
        "backward, dummy",
        "inbetween",
        "inbetween, given",
        "loop",
        "long forward, both sink",
        "long backward, both sink",
        "timeline, held latents",
        "timeline, one shot",
        "timeline, long",
        "forward, held latent",
    )
}


def drawn(plan: Plan, B: int = 2, seed: int = 10) -> tuple:
    """noise, renoise and the user's own latents for every latent and dummy of a plan."""
    rows = plan.length + 3
    return (
        randn(seed, B, rows, 4, H, W),
        randn(seed + 1, 3, B, rows, 4, H, W),
        randn(seed + 2, B, rows, 4, H, W),
    )


def obvious_rollout(
    model, plan: Plan, text, noise, renoise, own_latents, sigmas, commit_anchors, first=None, warm=0
) -> torch.Tensor:
    """No cache: for each denoising step of each block, everything before it runs again, clean, in
    one masked sequence."""
    row = {-1: plan.length, -2: plan.length + 1, -3: plan.length + 2} | {
        i: i for i in range(plan.length)
    }
    steps, clean, made, imagined = (
        [],
        [],
        {},
        {},
    )  # finished steps as they are seen later, and their clean latents
    for step in plan.steps:
        seen = Step(
            step.targets, step.pos[len(step.anchors) :], (), step.reads
        )  # without anchors, as it is committed
        held = torch.tensor([i in step.given for i in step.own])
        mine = (noise if own_latents is None else own_latents)[:, [max(i, 0) for i in step.own]]
        if held.all():
            x0, step = mine, seen
        else:
            levels = first if first and not steps else sigmas
            start = warm if set(step.targets) == set(imagined) else 0
            for k in range(start, len(levels)):
                sigma, A = levels[k], len(step.anchors)
                fresh = torch.stack(
                    [(noise if k == 0 else renoise[k - 1])[:, row[i]] for i in step.own], 1
                )
                level = torch.full((len(step.own),), sigma)
                if k == start and start:  # the neighbour's anchors, noised; this step's own begin
                    x = torch.stack([noise[:, row[i]] for i in step.own], 1)
                    x[:, A:] = (1 - sigma) * torch.stack(
                        [imagined[i] for i in step.targets], 1
                    ) + sigma * fresh[:, A:]
                    level[:A] = levels[0]
                else:
                    x = fresh if k == 0 else (1 - sigma) * x0 + sigma * fresh
                z = torch.cat([*clean, torch.where(held.view(-1, 1, 1, 1), mine, x)], 1)
                owner, pos, visible = side_by_side([*steps, step])
                t = torch.zeros(len(owner))
                t[-len(step.own) :] = 1000 * level * ~held
                v = model(z, t.expand(len(z), -1), text, torch.tensor(pos), visible)[
                    :, -len(step.own) :
                ]
                x0 = torch.where(held.view(-1, 1, 1, 1), mine, x - sigma * v)
        imagined = dict(zip(step.anchors, x0.unbind(1)))
        made.update(zip(step.targets, x0[:, len(step.anchors) :].unbind(1)))
        steps.append(step if commit_anchors else seen)
        clean.append(x0 if commit_anchors else x0[:, len(step.anchors) :])
    return torch.stack([made[i] for i in range(plan.length)], 1)


@pytest.mark.parametrize("commit_anchors", [False, True])
@pytest.mark.parametrize("plan", ROLLOUTS.values(), ids=ROLLOUTS)
def test_rollout_equals_a_slow_obvious_one(plan, commit_anchors):
    """generate() equals the rollout that keeps no cache and recomputes all clean latents every
    time."""
    model, text = tiny_dit(), randn(5, 2, 5, 32)
    noise, renoise, own_latents = drawn(plan)
    given = {i: own_latents[:, i] for i in range(plan.length)}
    texts = [text] * plan.prompts()
    got = generate(
        model,
        plan,
        texts,
        noise_from(noise, renoise, plan.length),
        given=given,
        commit_anchors=commit_anchors,
    )
    expected = obvious_rollout(
        model, plan, text, noise, renoise, own_latents, SIGMAS, commit_anchors
    )
    assert 0.1 < expected.std() < 10 and distance(got, expected) <= 1e-5
    mine = sorted(i for step in plan.steps for i in step.given if i in step.targets)
    assert torch.equal(got[:, mine], own_latents[:, mine])


@pytest.mark.parametrize("warm", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    ["forward", "backward P=2", "backward P=3", "long backward, both sink", "timeline, long"],
)
def test_warm_start_equals_a_slow_obvious_one(name, warm):
    """Blocks begin from their neighbour's anchors where these are all there (P = 3), with fewer
    steps, and nowhere else."""
    model, text, plan = tiny_dit(), randn(5, 2, 5, 32), PLANS[name]
    noise, renoise, own_latents = drawn(plan)
    given, texts, calls = (
        {i: own_latents[:, i] for i in range(plan.length)},
        [text] * plan.prompts(),
        [],
    )
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    got, cold = (
        generate(model, plan, texts, noise_from(noise, renoise, plan.length), given=given, warm=w)
        for w in (warm, 0)
    )
    hook.remove()
    warmed = sum(set(a.anchors) == set(b.targets) for a, b in zip(plan.steps, plan.steps[1:]))
    assert len(calls) == 2 * evaluations(plan) - warm * warmed
    assert (warmed > 0) == (distance(got, cold) > 1e-3) == ("P=3" in name or "long" in name)
    assert (
        distance(
            got,
            obvious_rollout(
                model, plan, text, noise, renoise, own_latents, SIGMAS, False, warm=warm
            ),
        )
        <= 1e-5
    )


def test_committing_anchors_is_a_choice():
    """commit_anchors changes what later blocks read, and only that: the first block is the same,
    the others are not."""
    model, text, plan = tiny_dit(), randn(5, 2, 5, 32), anchors.backward(9)
    noise = noise_from(*drawn(plan)[:2])
    a, b = (generate(model, plan, [text], noise, commit_anchors=c) for c in (False, True))
    assert (
        torch.equal(a[:, 6:], b[:, 6:])
        and distance(a[:, :3], b[:, :3]) > 1e-3
        and distance(a[:, 3:6], b[:, 3:6]) > 1e-3
    )


@pytest.mark.parametrize("exit_at", range(4))
@pytest.mark.parametrize("name", ["forward", "backward P=3"])
def test_exit_stops_every_block_there(name, exit_at):
    """exit_at yields the x0 of that denoising step, for every block."""
    model, text, plan = tiny_dit(), randn(5, 2, 5, 32), PLANS[name]
    noise, renoise, _ = drawn(plan)
    got = generate(model, plan, [text], noise_from(noise, renoise), exit_at=exit_at)
    assert (
        distance(
            got,
            obvious_rollout(model, plan, text, noise, renoise, None, SIGMAS[: exit_at + 1], False),
        )
        <= 1e-5
    )


@pytest.mark.parametrize("name", ["forward", "backward P=3"])
def test_first_block_may_take_more_steps(name):
    """One step a block, but four for the first; and with exits, two of these four."""
    model, text, plan = tiny_dit(), randn(5, 2, 5, 32), PLANS[name]
    noise, renoise, _ = drawn(plan)
    for levels, first in ((SIGMAS, (SIGMAS, None)), (SIGMAS[:2], (SIGMAS, 1))):
        got = generate(model, plan, [text], noise_from(noise, renoise), SIGMAS[:1], first=first)
        assert (
            distance(
                got,
                obvious_rollout(model, plan, text, noise, renoise, None, SIGMAS[:1], False, levels),
            )
            <= 1e-5
        )


def leaves(B: int = 1):
    """Noise as fresh leaf tensors, one per (step's latents, k), remembered: to ask where gradients
    go."""
    made = {}

    def noise(k: int, latents: tuple[int, ...]) -> torch.Tensor:
        made[latents, k] = randn(len(made), B, len(latents), 4, H, W).requires_grad_()
        return made[latents, k]

    return noise, made


@pytest.mark.parametrize("exit_at", [0, 1, 3])
@pytest.mark.parametrize(
    "name", ["forward", "backward P=3", "backward, dummy", "loop", "long backward, both sink"]
)
def test_gradients_stay_in_their_block_and_step(name, exit_at):
    """d block / d noise is zero for every other block and every step but the last; anchors get
    gradient through their targets."""
    model, plan = tiny_dit().requires_grad_(), PLANS[name]
    noise, made = leaves()
    with_grad = []
    model.register_forward_pre_hook(lambda *_: with_grad.append(torch.is_grad_enabled()))
    cache = KVCache(model.config, 1, plan.capacity, H, W)
    blocks = dict(rollout(model, plan, [randn(5, 1, 5, 32)], noise, SIGMAS, cache, exit_at=exit_at))
    kept = [
        any(plan.last_read.get(i, -1) > n for i in step.targets)
        for n, step in enumerate(plan.steps)
    ]
    assert with_grad == sum(
        [[k == exit_at for k in range(exit_at + 1)] + [False] * keeps for keeps in kept], []
    )
    assert not any(x.requires_grad for pair in cache.layers for x in pair)
    for n, step in enumerate(plan.steps):
        assert blocks[n].shape[1] == len(step.targets)
        grads = torch.autograd.grad(
            blocks[n].square().sum(), list(made.values()), retain_graph=True, allow_unused=True
        )
        for (latents, k), g in zip(made, grads):
            if latents == step.own and k == exit_at:
                assert (g.flatten(2).abs().amax(2) > 0).all()  # targets, and anchors through them
            else:
                assert g is None or g.abs().max() == 0, (step, latents, k)
        wrt = torch.autograd.grad(
            blocks[n].square().sum(), list(model.parameters()), retain_graph=True
        )
        assert all(g.abs().max() > 0 for g in wrt)


def test_without_exit_nothing_is_differentiated():
    """A rollout for inference builds no graph, even where the caller has gradients enabled."""
    model, plan = tiny_dit().requires_grad_(), anchors.forward(6)
    assert not generate(
        model, plan, [randn(5, 2, 5, 32)], noise_from(*drawn(plan)[:2])
    ).requires_grad


@pytest.mark.parametrize("name", ["forward", "backward P=3", "long forward, both sink"])
def test_a_batch_equals_its_samples(name):
    """Two videos at a time are the two videos, each with its own noise and text."""
    model, plan, text = tiny_dit(), PLANS[name], randn(5, 2, 5, 32)

    def go(rows: slice) -> torch.Tensor:
        return generate(
            model, plan, [text[rows]], noise_seeded([(3, 1, 0), (3, 2, 4)][rows], (4, H, W))
        )

    both = go(slice(0, 2))
    assert (
        distance(both, torch.cat([go(slice(0, 1)), go(slice(1, 2))])) <= 1e-5
        and distance(both[:1], both[1:]) > 0.1
    )
    assert torch.equal(both, go(slice(0, 2)))


def test_each_scene_follows_its_own_prompt():
    """Another prompt for the second scene changes it and the gap, and no bit of the first scene;
    text may be keys."""
    model, plan = tiny_dit(), anchors.transition(3, 3, 3)
    noise, (a, b, c) = noise_seeded([(0, 0, 0)], (4, H, W)), randn(5, 3, 1, 5, 32)
    one, two = generate(model, plan, [a, b], noise), generate(model, plan, [a, c], noise)
    assert torch.equal(one[:, :3], two[:, :3]) and all(
        distance(one[:, i], two[:, i]) > 1e-3 for i in range(3, 9)
    )
    assert torch.equal(one, generate(model, plan, [model.text_kv(a), model.text_kv(b)], noise))


def live_bytes() -> int:
    """Bytes of all tensors that are alive."""
    storages = {
        x.data_ptr(): x.nbytes()
        for x in (o.untyped_storage() for o in gc.get_objects() if type(o) is torch.Tensor)
    }
    return sum(storages.values())


def evaluations(plan: Plan) -> int:
    """How often the transformer runs: four denoising steps a block, and once to commit it if a
    later one reads it."""
    return sum(
        4 * (not step.commits) + any(plan.last_read.get(i, -1) > n for i in step.targets)
        for n, step in enumerate(plan.steps)
    )


@pytest.mark.parametrize("way", ["forward", "backward"])
@torch.no_grad()
def test_long_videos_take_constant_memory(way):
    """100 s take less than 10.5 times the evaluations of 10 s. 30 s: the same cache and, at its
    peak, the same live tensors;
    backward, the finished latents as well, since none can be decoded before the first."""
    assert evaluations(anchors.long(402, way)) <= 10.5 * evaluations(anchors.long(42, way))
    model, vae, peaks = tiny_dit(), randomise(VAE(VAEConfig(dim=4, z_dim=4, num_res_blocks=1))), []
    for length in (42, 120):
        plan, calls, peak = anchors.long(length, way), [], 0
        hook = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        cache = KVCache(model.config, 1, plan.capacity, H, W)
        made = rollout(
            model, plan, [randn(5, 1, 5, 32)], noise_seeded([(0, 0, 0)], (4, H, W)), SIGMAS, cache
        )
        for n, _ in enumerate(decode_in_order(vae, plan, made)):
            peak = max(peak, live_bytes()) if n % 6 < 2 else peak
        hook.remove()
        peaks.append((cache.bytes(), peak))
        assert len(calls) == evaluations(plan)
    latents = (120 - 42) * 4 * H * W * 4 * (way == "backward")
    assert peaks[0][0] == peaks[1][0] and peaks[1][1] <= 1.01 * peaks[0][1] + latents


@torch.no_grad()
def test_compiled_blocks_make_the_same_clip_and_are_compiled_once():
    """One graph serves all blocks, steps and layers of an order; the second clip, and a long one,
    compile nothing. (Traced, not
    generated code: that needs a C++ compiler or a GPU.) Keys are turned by the other formula, real
    numbers only: <= 1e-5."""
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
        noise = randn(3, 4, 1, plan.length, slow.config.in_dim, 4, 4)
        a, b = (generate(dit, plan, texts, noise_from(noise[0], noise[1:])) for dit in (slow, fast))
        assert distance(a, b) <= 1e-5
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] < graphs[2] == graphs[3] == graphs[4] <= 12, graphs
