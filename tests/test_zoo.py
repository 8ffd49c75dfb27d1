"""Other people's methods run on this backbone, and each is the plain rollout where it should be."""

import ast
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import ROOT, distance, randn, randomise, tiny_checkpoints, tiny_dit

import plans
import sampler
import train_dmd
from anchors import HORIZON, Plan, View, backward, forward, inbetween, layout, text_picture
from lib.common import UserError
from lib.media import read_frames
from lib.noise import noise_seeded
from lib.recipe import Recipe
from sampler import gather, sigmas_of, student_sigmas, teacher_blocks
from tools import encode
from train_dmd import dmd_gradient
from train_ode import Part
from vae import VAE, VAEConfig
from zoo import (
    ahead,
    common,
    diagonal,
    ema_sink,
    lookahead,
    one_sided,
    plan_then_fill,
    resampling,
    reward_dmd,
    rolling_forcing,
    routing,
    run,
    same_level,
    self_forcing_pp,
    speculative,
    staggered,
    stitching,
    switch,
    table,
    teachers,
    tree,
    vector_time,
)
from zoo.on_clips import Drawn, timestep_weight
from zoo.run import METHODS, find_method

SEEDS, SHAPE = [(0, 0, 0), (0, 1, 0)], (4, 4, 2)  # two clips of 2 tokens a latent
ONE_LEVEL = Recipe(levels=(1000.0,))
DIRECTIONS = {"forward": forward(9), "backward": backward(9)}
# no methods of their own
SHARED = ("clip_pairs.py", "common.py", "on_clips.py", "run.py", "table.py", "teachers.py")


def inputs(plan: Plan) -> tuple:
    """A tiny student, the plan, a random text a prompt, and noise: what any `generate` takes."""
    texts = [randn(50 + n, 2, 8, 32) for n in range(plan.prompts())]
    return tiny_dit(), plan, texts, noise_seeded(SEEDS, SHAPE)


@torch.no_grad()
def made(generate, plan: Plan, **options) -> torch.Tensor:
    return generate(*inputs(plan), **options)


def plain(plan: Plan, **options) -> torch.Tensor:
    return made(sampler.generate, plan, **options)


# ---------------------------------------------------------------- every one of them
@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_finite_clips_that_depend_on_the_prompt(name):
    """At the length of its row; another text gives another clip, the same one the same bits."""
    method = METHODS[name]
    dit, plan, texts, noise = inputs(method.plan(method.length, 3, 3))
    with torch.no_grad():
        z = method.generate(dit, plan, texts, noise, recipe=Recipe())
        assert z.shape == (2, method.length, *SHAPE) and z.isfinite().all()
        assert torch.equal(z, method.generate(dit, plan, texts, noise, recipe=Recipe()))
        others = [randn(99 + n, 2, 8, 32) for n in range(len(texts))]
        assert not torch.equal(z, method.generate(dit, plan, others, noise, recipe=Recipe()))


def test_the_method_that_the_readme_writes_down_is_the_plain_rollout():
    """The code under "Add one" runs as it stands."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "zoo" / "README.md").read_text(), re.S)[1]
    exec(code, written := {})
    for plan in DIRECTIONS.values():
        assert torch.equal(made(written["generate"], plan), plain(plan))


def test_every_file_is_short_and_says_what_it_is():
    """Under 120 lines, all but the table; of a method, what it is on this backbone, what is left
    open, what it shows here, and a command that names it."""
    for path in sorted((ROOT / "zoo").glob("*.py")):
        lines = path.read_text(encoding="utf-8")
        words = ast.get_docstring(ast.parse(lines))
        assert lines.count("\n") < 120 or path.name == "table.py", path.name
        if path.name in SHARED:
            continue
        assert 10 <= words.count("\n") + 1 <= 30, path.name
        for part in ("On this backbone", "eft open", "Here: ", "\n    python -"):
            assert part in words, (path.name, part)
        for line in words.splitlines():
            if "python -m zoo.run" in line:
                assert line.split("python -m zoo.run ")[1].split()[0] in METHODS, path.name


def test_the_readme_has_every_file_and_every_method():
    words = (ROOT / "zoo" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "zoo").glob("*.py")):
        assert path.name in words, path.name
    for name in METHODS | teachers.METHODS:
        assert f"`{name}`" in words, name


def test_nothing_in_the_zoo_imports_toy_or_tools():
    for path in (ROOT / "zoo").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not [n for n in names if n.split(".")[0] in ("toy", "tools")], path.name


# ---------------------------------------------------------------- rolling_forcing
@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_window_of_one_block_is_the_plain_rollout(name):
    """A block that enters when the one before has left: the same bits, anchors included."""
    generate = partial(rolling_forcing.generate, every=4)
    assert torch.equal(made(generate, DIRECTIONS[name]), plain(DIRECTIONS[name]))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_window_of_one_level_is_the_plain_rollout(name):
    """K = 1: the window holds one block."""
    z = made(rolling_forcing.generate, DIRECTIONS[name], recipe=ONE_LEVEL)
    assert torch.equal(z, plain(DIRECTIONS[name], recipe=ONE_LEVEL))


def test_windows_by_hand():
    """Forward steps 0-2 of 9 latents: the newest block first, all at their places in time;
    backward the newest has its anchors."""
    window = rolling_forcing.window(forward(12), 1, 3)
    assert window.own == (9, 10, 11, 6, 7, 8, 3, 4, 5) == window.pos
    assert window.reads == ((0, 0), (1, 1), (2, 2)) and window.targets == (3, 4, 5)
    window = rolling_forcing.window(backward(12), 0, 1)
    assert window.own == (3, 4, 5, 6, 7, 8, 9, 10, 11) == window.pos and not window.reads
    long = rolling_forcing.forward_plan(39, 3, 3)
    window = rolling_forcing.window(long, 9, 12)
    assert sorted([*window.pos, *(p for _, p in window.reads)]) == list(range(HORIZON))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_gradients_of_a_window_reach_every_block_once(name):
    """w mod K = exit: without gradients the same numbers, with them one graph for each block."""
    plan = DIRECTIONS[name]
    dit, _, texts, noise = inputs(plan)
    dit.requires_grad_(True)
    for exit_level in (0, 3):
        z = rolling_forcing.generate(dit, plan, texts, noise, exit_at=lambda n, e=exit_level: e)
        for block in z.split(3, dim=1):
            grads = torch.autograd.grad(
                block.sum(), list(dit.parameters()), retain_graph=True, allow_unused=True
            )
            assert max(g.abs().max() for g in grads if g is not None) > 0


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="spans 24 positions, over the horizon of 21"):
        made(rolling_forcing.generate, forward(39, view=View(9, True)))
    with pytest.raises(UserError, match="rolls over nothing given, every 1 to 4 passes, not 5"):
        made(partial(rolling_forcing.generate, every=5), forward(9))
    with pytest.raises(UserError, match="rolls over nothing given"):
        made(rolling_forcing.generate, inbetween(12, given=True))


# ---------------------------------------------------------------- orders
def test_looking_nowhere_is_the_plain_plan():
    plan = lookahead.looking_ahead(forward(9), 0)
    assert plan.steps == forward(9).steps
    assert torch.equal(made(lookahead.generate, plan), plain(forward(9)))
    assert lookahead.knotted(forward(9), 0).steps == forward(9).steps


def test_looking_ahead_by_hand():
    """Imagined latents stand after their block; a block is seen by its reader without them."""
    first, second, last = lookahead.looking_ahead(forward(9), 2).steps
    assert (first.anchors, first.pos) == ((3, 4), (3, 4, 0, 1, 2))
    assert (second.anchors, second.pos) == ((6, 7), (6, 7, 3, 4, 5)) and last.anchors == ()
    assert second.reads == ((0, 0), (1, 1), (2, 2))


def test_a_knot_is_what_was_imagined_of_the_next_block():
    """Latents 3 and 6 are kept as the step before imagined them; the first block is free."""
    free, tied = lookahead.looking_ahead(forward(9)), lookahead.knotted(forward(9))
    z = made(lookahead.generate, tied)
    dit, _, texts, noise = inputs(free)
    seen: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        few = sampler.few_steps(dit, texts, noise, sigmas_of(Recipe()))
        seen[3] = few(0, free.steps[0], None, None, None)[:, 0]
    assert torch.equal(z[:, 3], seen[3])
    assert torch.equal(z[:, :3], plain(free)[:, :3]) and not torch.equal(z, plain(free))
    with pytest.raises(UserError, match="a knot of 3 latents leaves nothing"):
        lookahead.knotted(forward(9), 3)


def test_the_tree_by_hand():
    """Ends first, then middles; only a block with nothing before it has anchors."""
    assert tree.breadth_first(7) == [0, 6, 3, 1, 4, 2, 5]
    assert [tree.breadth_first(n) for n in (1, 2, 3)] == [[0], [0, 1], [0, 2, 1]]
    plan = tree.tree(21)
    assert [s.targets[0] // 3 for s in plan.steps] == [0, 6, 3, 1, 4, 2, 5]
    assert [s.anchors for s in plan.steps] == [(), (15, 16, 17), (6, 7, 8), *[()] * 4]
    assert plan.steps[-1].reads == tuple((i, i) for i in [*range(15), *range(18, 21)])
    assert tree.tree(6, anchors=0).steps == forward(6).steps


def test_plan_then_fill_by_hand():
    plan = plan_then_fill.plan_then_fill(21)
    assert [s.targets for s in plan.steps] == [
        (0, 1, 2),
        (3, 11, 20),
        tuple(range(4, 11)),
        tuple(range(12, 20)),
    ]
    assert [[i for i, _ in s.reads] for s in plan.steps] == [
        [],
        [0, 1, 2],
        [0, 1, 2, 3, 11],
        [*range(12), 20],
    ]
    longer = plan_then_fill.plan_then_fill(39)
    assert longer.steps[4].targets == (21, 29, 38)
    assert longer.steps[4].reads == ((18, 0), (19, 1), (20, 2))
    with pytest.raises(UserError, match="24 latents are not 3 and segments of 18; use 21 or 39"):
        plan_then_fill.plan_then_fill(24)


def test_one_side_alone_is_the_rollout_that_reads_it_alone():
    """Weights of 1: the gap as if the tail did not exist; and a plan without gaps is untouched."""
    plan = inbetween(9)
    gap = plan.steps[2]
    head_only = replace(plan, steps=(*plan.steps[:2], replace(gap, reads=gap.reads[:3])))
    z = made(partial(one_sided.generate, weights=lambda n: torch.ones(n)), plan)
    assert distance(z, plain(head_only)) == 0
    tail_only = replace(plan, steps=(*plan.steps[:2], replace(gap, reads=gap.reads[3:])))
    z = made(partial(one_sided.generate, weights=lambda n: torch.zeros(n)), plan)
    assert distance(z, plain(tail_only)) == 0
    assert torch.equal(made(one_sided.generate, forward(9)), plain(forward(9)))
    assert one_sided.linear(3).tolist() == pytest.approx([0.75, 0.5, 0.25])


# ---------------------------------------------------------------- schedules
@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_same_levels_and_clean_passes_are_the_plain_rollout(name):
    levels = partial(diagonal.generate, levels=diagonal.constant, overhear=False)
    assert torch.equal(made(levels, DIRECTIONS[name]), plain(DIRECTIONS[name]))


def test_diagonal_levels():
    """4, 3, 2, 2 of the recipe, the last one always; a recipe of one level has no fewer."""
    found = [diagonal.falling(Recipe(), n) for n in range(4)]
    full = student_sigmas()
    assert found == [full, [*full[:2], full[3]], [full[0], full[3]], [full[0], full[3]]]
    assert diagonal.falling(ONE_LEVEL, 0) == diagonal.falling(ONE_LEVEL, 5) == [1.0]


def test_overheard_keys_are_those_of_the_last_noisy_pass():
    """Block 1 after block 0's noisy keys, done by hand."""
    plan = forward(6)
    dit, _, texts, noise = inputs(plan)
    sigmas, x0, past = student_sigmas(), None, None
    with torch.no_grad():
        for step in plan.steps:
            x0 = None
            for k, sigma in enumerate(sigmas):
                fresh = noise(k, step.own)
                x = fresh if k == 0 else (1 - sigma) * x0 + sigma * fresh
                t = torch.full((2, 3), 1000 * sigma)
                v, kv = dit(x, t, texts[0], torch.tensor(step.pos), past=past, return_kv=True)
                x0 = x - sigma * v
            if past is None:
                cache = sampler.cache_for(dit, plan, noise)
                cache.write(step.own, kv)
                past = cache.read(plan.steps[1].reads)
    z = made(partial(diagonal.generate, levels=diagonal.constant), plan)
    assert distance(z[:, 3:], x0) == 0


def test_one_step_and_first_enhanced_are_recipes():
    one = replace(Recipe(), levels=(1000.0,))
    assert torch.equal(made(diagonal.one_step, forward(9)), plain(forward(9), recipe=one))
    z = made(diagonal.first_enhanced, forward(9))
    assert torch.equal(z[:, :3], plain(forward(9))[:, :3])


@pytest.mark.parametrize("name", DIRECTIONS)
def test_one_level_by_level_is_the_plain_rollout(name):
    """HiAR with one level has nothing to exchange."""
    z = made(same_level.generate, DIRECTIONS[name], recipe=ONE_LEVEL)
    assert torch.equal(z, plain(DIRECTIONS[name], recipe=ONE_LEVEL))


@pytest.mark.parametrize("name", DIRECTIONS)
def test_neighbours_are_a_masked_pass_a_level(name):
    """Neighbor Forcing equals one masked pass over the plan for each level, as in stage 1."""
    plan = DIRECTIONS[name]
    dit, _, texts, noise = inputs(plan)
    lay, x0 = layout(plan), None
    pos = torch.tensor(lay.pos)
    with torch.no_grad():
        for k, sigma in enumerate(student_sigmas()):
            fresh = []
            for n, i in zip(lay.step, lay.latent):
                step = plan.steps[n]
                fresh.append(noise(k, (step.noise("none", k)[step.own.index(i)],)))
            fresh = torch.cat(fresh, 1)
            x = fresh if k == 0 else (1 - sigma) * x0 + sigma * fresh
            t = torch.full(x.shape[:2], 1000 * sigma)
            x0 = x - sigma * dit(x, t, texts[0], pos, lay.visible)
    slots = [n for n, target in enumerate(lay.is_target) if target]
    slots.sort(key=lambda n: lay.latent[n])
    z = made(partial(same_level.generate, neighbour=True), plan)
    assert distance(z, x0[:, slots]) <= 1e-5


def test_speculation_that_is_always_or_never_right():
    """The target as its own drafter with all levels: the judge does not matter. One level and a
    judge who takes all: one level, but for the first block."""
    for threshold in (-1.0, 1e9):
        z = made(partial(speculative.generate, draft_levels=4, threshold=threshold), forward(9))
        assert torch.equal(z, plain(forward(9)))
    assert torch.equal(
        made(partial(speculative.generate, threshold=-1.0), forward(9)), plain(forward(9))
    )
    z = made(partial(speculative.generate, threshold=1e9), forward(9))
    recipe = Recipe(levels=(1000.0,), first_levels=Recipe().levels)
    assert torch.equal(z, plain(forward(9), recipe=recipe))
    twin = partial(speculative.generate, drafter=tiny_dit(), draft_levels=4, threshold=1e9)
    assert torch.equal(made(twin, backward(9)), plain(backward(9)))


# ---------------------------------------------------------------- memories
def test_switches_without_a_change_of_memory_are_plain():
    plan = switch.two_scenes(12)
    assert [s.prompt for s in plan.steps] == [0, 0, 1, 1]
    assert torch.equal(made(partial(switch.generate, latents=0), plan), plain(plan))
    assert switch.flushed(plan, sink=12, last=12) == plan
    z, kept = made(switch.generate, plan), plain(plan)
    assert torch.equal(z[:, :6], kept[:, :6]) and not torch.equal(z[:, 6:], kept[:, 6:])


def test_recaching_under_the_same_words_is_remembering_twice():
    """Both prompts alike: one pass over what is read. Of one block: equal."""
    plan = switch.two_scenes(6)
    dit, _, texts, noise = inputs(plan)
    with torch.no_grad():
        same = [texts[0], texts[0]]
        z = switch.generate(dit, plan, same, noise)
        assert torch.equal(z, sampler.generate(dit, plan, same, noise))


def test_flush_and_cut_by_hand():
    plan = switch.flushed(switch.two_scenes(12), cut_at=45)
    third, fourth = plan.steps[2:]
    assert third.reads == ((0, 0), (4, 1), (5, 2)) and third.pos == (45, 46, 47)
    assert [i for i, _ in fourth.reads] == [0, 4, 5, 6, 7, 8] and fourth.pos == (6, 7, 8)


def test_a_tight_sink_is_a_plain_sink():
    """keep = 1: nothing leaks."""
    for long in (common.long_forward, common.long_backward):
        plan = long(18, 3, 3)
        assert torch.equal(made(partial(ema_sink.generate, keep=1.0), plan), plain(plan))
        assert not torch.equal(made(partial(ema_sink.generate, keep=0.5), plan), plain(plan))


def test_groups_of_one_are_everything():
    plan = ema_sink.grouped(12, 3, window=3, group=1)
    assert plan.steps == forward(12).steps
    assert torch.equal(made(partial(ema_sink.generate, group=1), plan), plain(forward(12)))


def test_what_leaves_is_averaged_by_hand():
    """Slots of constants: the sink keeps 3/4 of itself; a group's first slot becomes the mean."""
    dit = tiny_dit()
    kinds = (
        partial(ema_sink.LeakySink, sink=(0, 1), keep=0.75),
        partial(ema_sink.Grouped, group=2),
    )
    for kind, leaving, slot, want in ((kinds[0], [2], 0, 0.5), (kinds[1], [3], 2, 2.5)):
        cache = kind(dit.config, 1, 4, 4, 2)
        shape = (1, 4 * 2, 4, 12)
        values = torch.arange(4.0).repeat_interleave(2).view(1, 8, 1, 1).expand(shape)
        cache.write((0, 1, 2, 3), [(values, values)] * 2)
        cache.evict(leaving)
        assert leaving[0] not in cache.slot
        for layer in cache.layers:
            for buffer in layer:
                assert (buffer[:, cache.slot[slot]] == want).all()


@pytest.mark.parametrize("backwards", (False, True))
def test_routing_that_takes_all_is_the_plain_rollout(backwards):
    plan = routing.reading_all(15, 3, 3, backwards)
    assert plan.steps == (backward(15) if backwards else forward(15)).steps
    assert torch.equal(made(partial(routing.generate, best=99), plan), plain(plan))
    assert not torch.equal(made(partial(routing.generate, best=0), plan), plain(plan))


def test_routing_keeps_the_sink_the_newest_and_the_best():
    """Keys point where latent i's number says; the query asks for latent 4."""
    dit = tiny_dit()
    cache = routing.Routed(dit.config, 1, 6, 4, 2, best=1, block=1, gate=1.0)
    keys = torch.eye(6, 48).view(1, 6, 1, 4, 12).expand(1, 6, 2, 4, 12).flatten(1, 2)
    cache.write((0, 1, 2, 3, 4, 5), [(keys, keys)] * 2)
    cache.listen(0, torch.eye(6, 48)[4].view(1, 1, 48))
    assert cache.choose([0, 1, 2, 3, 4, 5]) == {0, 4, 5}
    reads = tuple((i, i) for i in range(6))
    chosen = super(routing.Routed, cache).read(((0, 3), (4, 4), (5, 5)))
    for got, want in zip(cache.read(reads), chosen):
        assert distance(got[0], want[0]) == 0 and distance(got[1], want[1]) == 0
    cache.gate = 0.0
    assert cache.choose([0, 1, 2, 3, 4, 5]) == {4, 5}


def test_every_row_has_one_to_compare_with():
    for name, method in (METHODS | teachers.METHODS).items():
        if method.against:
            other = find_method(method.against)
            assert not other.against and other.length == method.length, name


def test_pictures_of_every_plan():
    for name, method in (METHODS | teachers.METHODS).items():
        assert "T" in text_picture(method.plan(method.length, 3, 3)), name
    assert common.read_later(forward(6), 0) == (0, 1, 2)
    assert common.read_later(backward(6), 1) == (None, None, None)


# ---------------------------------------------------------------- those that train
def test_reward_weights_have_mean_one_and_prefer_motion():
    """exp(r / b) over its mean; still samples alike: the plain gradient."""
    x, real, fake = (randn(n, 3, 4, 2, 1, 1) for n in range(3))
    plain_gradient = dmd_gradient(x, real, fake)
    ratio = (reward_dmd.weighted(x, real, fake) / plain_gradient).flatten(1)
    assert distance(ratio, ratio[:, :1].expand_as(ratio)) <= 1e-5
    assert ratio[:, 0].mean().item() == pytest.approx(1.0)
    motion = x.diff(dim=1).abs().mean((1, 2, 3, 4))
    assert ratio[:, 0].argsort().tolist() == motion.argsort().tolist()
    alike = x[:1].expand(3, -1, -1, -1, -1)
    assert distance(reward_dmd.weighted(alike, real, fake), dmd_gradient(alike, real, fake)) <= 1e-5


def test_a_window_that_is_the_video_is_the_plain_rollout():
    assert torch.equal(made(self_forcing_pp.generate, forward(21)), plain(forward(21)))


@pytest.mark.parametrize("d", (0, 1))
def test_only_the_window_has_gradients(d):
    """21 of 33 latents in a row, as the plain rollout makes them."""
    plan = self_forcing_pp.long_mix(33, 3, 3)[0][1][d]
    dit, _, texts, noise = inputs(plan)
    window = self_forcing_pp.drawn_window(plan, noise)
    latents = sorted(i for n in window for i in plan.steps[n].targets)
    assert len(window) == 7 and latents == list(range(latents[0], latents[0] + 21))
    whole = plain(plan)
    dit.requires_grad_(True)
    z = self_forcing_pp.generate(dit, plan, texts, noise, exit_at=lambda n: 2)
    assert torch.equal(z.detach(), whole[:, latents]) and z.requires_grad
    with torch.no_grad():
        assert not self_forcing_pp.generate(dit, plan, texts, noise, exit_at=lambda n: 2).grad_fn


def test_a_window_begins_with_a_picture_of_what_it_shows():
    """The image latent of the last frame of its first latent."""
    vae = randomise(VAE(VAEConfig(dim=4, z_dim=4, num_res_blocks=1)))
    z = randn(3, 1, 6, 4, 4, 2)
    frame = vae.decode(z[:, 1:5])[:, :, -1:]
    assert distance(self_forcing_pp.as_picture(vae, z, 4), vae.encode(frame)) == 0


def teacher_of(length: int) -> tuple:
    dit = tiny_dit()
    return dit, length, randn(50, 2, 8, 32), torch.zeros(1, 8, 32), noise_seeded(SEEDS, SHAPE), 2.0


@pytest.fixture(scope="module")
def at_once():
    """A clip of 7 latents by the teacher's plain ODE."""
    dit, T, prompt, negative, noise, guidance = teacher_of(7)
    whole = forward(7, 7)
    return gather(whole, teacher_blocks(dit, whole, [prompt], negative, noise, guidance))


def test_no_lag_and_one_part_are_the_teachers_ode(at_once):
    assert distance(staggered.generate(*teacher_of(7), lag=0), at_once) <= 1e-4
    assert distance(stitching.generate(*teacher_of(7)), at_once) <= 1e-5


def test_a_teachers_rows_are_of_its_functions():
    """Called as the table calls a student's methods: the ODE at once or a block at a time, a lag is
    another video, and what is completed keeps its ends and has another middle."""
    dit, plan = tiny_dit(), forward(9, 9)
    texts, noise, negative = (
        [randn(50, 2, 8, 32)],
        noise_seeded(SEEDS, SHAPE),
        torch.zeros(1, 8, 32),
    )
    whole = gather(plan, teacher_blocks(dit, plan, texts, negative, noise, teachers.GUIDANCE))

    def row(name: str) -> torch.Tensor:
        return teachers.METHODS[name].generate(dit, plan, texts, noise, recipe=Recipe())

    assert distance(row("at_once"), whole) <= 1e-4 and torch.equal(row("ar-forward"), whole)
    assert distance(row("staggered-2"), whole) > 1e-2
    apart = (row("completed") - whole).abs().amax((0, 2, 3, 4))  # (T,)
    assert apart[:3].max() <= 1e-4 and apart[6:].max() <= 1e-4 and apart[3:6].min() > 1e-2


def test_the_schedule_by_hand():
    """Noise never falls from a latent to the next; the ends are all noise and all clean."""
    assert staggered.schedule(3, 2, 1) == [(0, 0, 0), (1, 0, 0), (2, 1, 0), (2, 2, 1), (2, 2, 2)]
    assert staggered.schedule(2, 2, 2) == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert len(staggered.schedule(21, 48, 5)) == 48 + 5 * 20 + 1
    with pytest.raises(UserError, match="a lag of 3 is not from 0 to the 2 steps"):
        staggered.schedule(3, 2, 3)


def test_stitching_by_hand():
    """Windows of three; a loop has no ends, and its parts may be renamed."""
    assert stitching.neighbours(3, False) == [[0, 1], [0, 1, 2], [1, 2]]
    assert stitching.neighbours(3, True) == [[2, 0, 1], [0, 1, 2], [1, 2, 0]]
    options = {"loop": True, "part": 2, "steps": 2, "omni": 0.5}
    dit, length, prompt, negative, noise, w = teacher_of(6)

    def turned(level, numbers):
        return noise(level, tuple((i + 2) % 6 for i in numbers))

    z = stitching.generate(dit, length, prompt, negative, noise, w, **options)
    again = stitching.generate(dit, length, prompt, negative, turned, w, **options)
    assert distance(again, z.roll(-2, 1)) <= 1e-5 and distance(again, z) > 1e-2
    with pytest.raises(UserError, match="8 latents are not parts of 7"):
        stitching.generate(*teacher_of(8))


def test_vector_levels_and_loss():
    """All alike, or all different; the loss of equal levels is a mean of weighted errors."""
    g = torch.Generator().manual_seed(0)
    assert len(set(vector_time.levels(g, 5, 1.0, 3.0).tolist())) == 1
    assert len(set(vector_time.levels(g, 5, 0.0, 3.0).tolist())) == 5
    x0, noise = randn(1, 2, 5, *SHAPE), randn(2, 2, 5, *SHAPE)
    sigma, prompt, dit = torch.rand(2, 5), randn(3, 2, 8, 32), tiny_dit()
    x = (1 - sigma[..., None, None, None]) * x0 + sigma[..., None, None, None] * noise
    error = (dit(x, 1000 * sigma, prompt, torch.arange(5)) - (noise - x0)).square().mean((2, 3, 4))
    want = (error * timestep_weight(sigma, 3.0)).mean(1)
    found = vector_time.vector_loss(dit, Drawn(x0, noise, sigma, prompt), 3.0)
    assert distance(found, want) <= 1e-5


def test_what_is_known_is_held_and_the_rest_completed(at_once):
    """Given latents come back to the bit; none given is the plain ODE."""
    dit, T, prompt, negative, noise, w = teacher_of(7)
    z = vector_time.complete(dit, {}, T, prompt, negative, noise, w)
    assert torch.equal(z, at_once)
    known = {i: randn(60 + i, 2, *SHAPE) for i in (0, 6)}
    z = vector_time.complete(dit, known, T, prompt, negative, noise, w)
    assert torch.equal(z[:, 0], known[0]) and torch.equal(z[:, 6], known[6])
    assert not torch.equal(z[:, 1:6], at_once[:, 1:6])


class Fixed:
    """A setup of one plan."""

    def __init__(self, config, dit, plan, lay):
        self.config, self.dit = config, dit
        self.plan, self.layout = lambda part: plan, lambda part: lay


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_history_of_little_noise_is_the_clip(name):
    """t_s = 0 gives the clip back; much noise another one; only clean slots are replaced."""
    plan = DIRECTIONS[name]
    dit, _, texts, noise = inputs(plan)
    clip = {i: randn(70 + i, 2, *SHAPE) for i in range(9)}
    with torch.no_grad():
        same = resampling.remade(dit, plan, clip, texts[0], noise, [0.0, 0.0])
        other = resampling.remade(dit, plan, clip, texts[0], noise, [0.9, 0.5, 0.0])
    assert all(torch.equal(same[i], clip[i]) for i in range(9))
    assert all(distance(other[i], clip[i]) > 0.1 for i in range(9))
    lay = layout(plan, teacher_forcing=True)
    x0 = torch.stack([clip[i] for i in lay.latent], dim=1)
    setup = Fixed(resampling.Config(begin=3), dit, plan, lay)
    clips = Drawn(x0, noise=x0, level=x0, prompt=texts[0])
    assert resampling.own_history(setup, Part(2, [0, 1], 0, 0), clips) is clips
    found = resampling.own_history(setup, Part(3, [0, 1], 0, 0), clips).x0
    for slot, clean in enumerate(lay.is_clean):
        assert torch.equal(found[:, slot], x0[:, slot]) != clean
    assert torch.equal(found, resampling.own_history(setup, Part(3, [0, 1], 0, 0), clips).x0)


def test_trained_methods_run_two_iterations(tmp_path):
    """Stage 2 with a window that rolls, levels that change places, a reward, long rollouts."""
    paths = tiny_checkpoints(tmp_path)
    common_flags = {
        "teacher": paths["teacher"],
        "student": paths["student"],
        "critic": paths["teacher"],
        "vae": paths["vae"],
        "dtype": "float32",
        "batch": 2,
        "steps": 2,
        "ratio": 1,
        "sheet_every": 2,
        "plans": "paper",
        "device": "cpu",
    }
    runs = {
        "rolling": (
            train_dmd.Config,
            partial(train_dmd.main, generate=rolling_forcing.generate),
            9,
        ),
        "hiar": (train_dmd.Config, partial(train_dmd.main, generate=same_level.generate), 9),
        "diagonal": (train_dmd.Config, partial(train_dmd.main, generate=diagonal.generate), 9),
        "reward": (train_dmd.Config, reward_dmd.main, 9),
        "long": (self_forcing_pp.Config, self_forcing_pp.main, 21),
    }
    for name, (kind, main, latents) in runs.items():
        out = tmp_path / name
        rolled = {"rolled": 27} if kind is self_forcing_pp.Config else {}
        main(kind(**common_flags, latent=(latents, 4, 4), out=str(out), **rolled))
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and all(rows[1][f"dmd_{d}"] > 0 for d in ("forward", "backward"))
        assert (out / "student.safetensors").exists()


def test_trained_teachers_run_two_iterations(tmp_path):
    """On the latents of six toy clips: times of their own, histories of their own."""
    paths = tiny_checkpoints(tmp_path)
    encode.encode(
        encode.Config(vae=paths["vae"], out=str(tmp_path / "clips"), clips=6, frames=21, shard=6)
    )
    flags = {
        "weights": paths["teacher"],
        "clips": str(tmp_path / "clips"),
        "latent": (6, 4, 4),
        "dtype": "float32",
        "batch": 2,
        "steps": 2,
        "vae": "",
        "plans": "paper",
        "device": "cpu",
    }
    vector_time.main(vector_time.Config(**flags, out=str(tmp_path / "vector")))
    resampling.main(resampling.Config(**flags, out=str(tmp_path / "own"), begin=1))
    for name in ("vector", "own"):
        rows = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert len(rows) == 2 and (tmp_path / name / "teacher.safetensors").exists()


def test_anchors_on_both_sides_are_trained_by_name(tmp_path, monkeypatch, capsys):
    """--plans ahead: look-ahead of 1 and of P, each beside backward, in stage 1 and in stage 2; a
    first word that names no stage, and blocks without anchors, are refused in a sentence."""
    (half, one), (_, three) = plans.MIXES["ahead"](9)
    assert half == 0.5 and one[1] == three[1] == backward(9)
    assert one[0] == lookahead.looking_ahead(forward(9))
    assert three[0] == lookahead.looking_ahead(forward(9), 3)
    paths = tiny_checkpoints(tmp_path)
    flags = {"plans": "ahead", "latent": (6, 4, 4), "teacher": paths["teacher"], "batch": 2}
    flags |= {"device": "cpu", "dtype": "float32", "steps": 2}
    ode = flags | {"weights": paths["student"], "pairs": 2, "data": tmp_path / "pairs"}
    dmd = flags | {"student": paths["student"], "critic": paths["teacher"], "vae": paths["vae"]}
    for words, asked, says in (
        (["ode", "--generate"], ode, ""),
        (["ode"], ode | {"out": tmp_path / "ode"}, ""),
        (["dmd"], dmd | {"ratio": 1, "sheet_every": 0, "out": tmp_path / "dmd"}, ""),
        (["three"], {}, "error: 'three' must be ode or dmd"),
        (["ode"], ode | {"anchors": 0}, "leave out --anchors 0"),
    ):
        given = []
        for flag, value in asked.items():
            given += [f"--{flag}", *map(str, value if flag == "latent" else [value])]
        monkeypatch.setattr("sys.argv", ["ahead", *words, *given])
        with pytest.raises(SystemExit) if says else nullcontext():
            ahead.main()
        assert says in capsys.readouterr().err
    for folder, key in (("ode", "forward, looking ahead"), ("dmd", "dmd_forward, looking ahead")):
        rows = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        assert len(rows) == 2 and all(json.loads(row)[key] > 0 for row in rows)


# ---------------------------------------------------------------- run and table
def test_a_clip_by_name_and_what_is_refused(tmp_path):
    """The runner writes a clip of the plan's length; a wrong name lists the right ones."""
    run.main(run.Config("tree", out=str(tmp_path / "a.mkv"), latents=6, device="cpu"))
    assert read_frames(tmp_path / "a.mkv").shape[2] == 21
    with pytest.raises(
        UserError, match="unknown method 'three'; use forward, backward, long-forward"
    ):
        run.main(run.Config("three"))
    with pytest.raises(UserError, match="switch takes 2 prompts, not 3"):
        run.main(run.Config("switch", ("a", "b", "c"), out=str(tmp_path / "b.mkv"), device="cpu"))


def test_the_table_counts_and_goes_on(tmp_path, capsys):
    """Two clips: passes by hand (7 blocks of 4 levels, 6 of them remembered), latents of 3 a pass;
    a finished row is read, and a table of other clips is refused."""
    flags = {"clips": 2, "out": str(tmp_path / "t.json"), "device": "cpu"}
    table.main(table.Config(methods=("forward",), **flags))
    made = json.loads((tmp_path / "t.json").read_text())
    row = made["rows"]["forward, seed 0"]
    assert (row["passes"], row["latents"], row["slots"]) == (34, 102, 18)
    made["rows"]["forward, seed 0"]["motion"] = [7.0, 0.5]
    (tmp_path / "t.json").write_text(json.dumps(made))
    table.main(table.Config(methods=("forward", "rolling_forcing"), **flags))
    made = json.loads((tmp_path / "t.json").read_text())
    assert made["rows"]["rolling_forcing, seed 0"]["passes"] == 16
    assert "7.000 ± 0.500" in capsys.readouterr().out
    for other in ({"clips": 3}, {"latents": 9}):
        with pytest.raises(UserError, match="use another --out"):
            table.main(table.Config(methods=("forward",), **flags | other))
    short = flags | {"latents": 9, "out": str(tmp_path / "short.json")}
    table.main(table.Config(methods=("forward",), **short))
    row = json.loads((tmp_path / "short.json").read_text())["rows"]["forward, seed 0"]
    assert (row["passes"], row["latents"]) == (14, 42)  # 3 blocks of 4 levels, 2 remembered


def test_a_star_needs_every_seed():
    """`*` stands where a row differs by more than two errors, to the same side, on every seed."""
    low, high, near = [1.0, 0.01], [1.1, 0.01], [1.02, 0.01]
    assert table.cell([high, high], [low, low]) == "1.100 ± 0.007 *"
    assert table.cell([high, near], [low, low]) == "1.060 ± 0.007"
    assert table.cell([high, low], [low, high]) == "1.050 ± 0.007"
    assert table.cell([low], []) == "1.000 ± 0.010"
    assert table.cell([3, 3], [4, 4]) == "3" and table.cell(["forward"], []) == "forward"
