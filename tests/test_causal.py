"""Causal Forcing in every order: teacher forcing is exact and leaks nothing, pairs are the
teacher's, losses are by hand."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from test_pairs import Towards
from test_sampler import EVERY, H, W, row
from test_train_ode import LATENT, Constant
from tiny import (
    MIXED,
    PLANS,
    apart,
    at_call,
    command_line,
    distance,
    randn,
    rows,
    same,
    saved,
    side_by_side,
    terminate,
    tiny_checkpoints,
    tiny_dit,
    two_processes,
)

import anchors
from anchors import Plan, Step, layout
from dit import load_dit
from lib.clips import Clips
from lib.common import UserError
from lib.pairs import kept_states
from lib.text import Prompts
from lib.weights import read_tensors
from mixes import any_mix, both_directions
from sampler import Recipe, noise_from, ode_sigmas
from tools import encode as latents
from train_ode import mix_of, pair_noise, pairs_for, slot_states
from zoo import ar_teacher, causal_ode, consistency
from zoo.ar_teacher import ar_loss, timestep_weight
from zoo.causal_ode import causal_shapes, plan_states
from zoo.consistency import cd_loss


# ---------------------------------------------------------------- teacher forcing
def slots_of(plan: Plan, lay, n: int) -> tuple[list[int], list[int]]:
    """The noisy slots of step n in the step's order (none if all of it is given), and its clean
    slots."""
    own = [s for s, step in enumerate(lay.step) if step == n]
    clean = [s for s in own if lay.is_clean[s]]
    noisy = {(lay.latent[s], lay.is_target[s]): s for s in own if not lay.is_clean[s]}
    step = plan.steps[n]
    if step.commits:
        assert not noisy
        return [], clean
    return [noisy[i, i in step.targets] for i in step.own], clean


def with_data(plan: Plan, B: int = 2) -> tuple:
    """A layout with noisy slots at random times, and clean slots at 0 that hold the data of their
    latent."""
    lay = layout(plan, teacher_forcing=True)
    z, data = randn(0, B, len(lay.latent), 4, H, W), randn(1, B, plan.length + 3, 4, H, W)
    t = (1000 * randn(2, B, len(plan.steps)).sigmoid())[:, torch.tensor(lay.step)]
    clean = torch.tensor(lay.is_clean)
    z = torch.where(clean.view(1, -1, 1, 1, 1), data[:, list(lay.latent)], z)
    return lay, z, t.masked_fill(clean, 0.0)


@pytest.mark.parametrize("plan", EVERY.values(), ids=EVERY)
def test_teacher_forcing_equals_one_block_after_clean_context(plan):
    """Per block: a plain pass over the clean steps before it, as the test lays them out, and the
    noisy block alone. And the clean slots see what a rollout's clean pass sees."""
    model, (lay, z, t) = tiny_dit(), with_data(plan)
    text, finished = model.text_kv(randn(3, 2, 5, 32)), []
    full = model(z, t, text, torch.tensor(lay.pos), lay.visible)
    for n, step in enumerate(plan.steps):
        noisy, clean = slots_of(plan, lay, n)
        seen = Step(step.targets, step.pos[len(step.anchors) :], (), step.reads)
        for as_it_is, slots in ((step, noisy), (seen, clean)):
            if not slots:
                continue
            _, pos, visible = side_by_side([s for s, _ in finished] + [as_it_is])
            own = [slot for _, before in finished for slot in before] + slots
            alone = model(z[:, own], t[:, own], text, torch.tensor(pos), visible)
            assert distance(alone[:, -len(slots) :], full[:, slots]) <= 1e-5, (n, step)
        if clean:
            finished.append((seen, clean))


@pytest.mark.parametrize("plan", EVERY.values(), ids=EVERY)
def test_teacher_forcing_leaks_nothing(plan):
    """Bit for bit: a block does not see any other noisy block, nor clean latents that its past does
    not hold; and clean context does not see noise. What it reads, it does see."""
    model, (lay, z, t) = tiny_dit(), with_data(plan, B=1)
    text, pos, other = model.text_kv(randn(3, 1, 5, 32)), torch.tensor(lay.pos), randn(4, *z.shape)
    full = model(z, t, text, pos, lay.visible)
    needs: list[set[int]] = []  # for each step, the steps it depends on
    for n, step in enumerate(plan.steps):
        made = [plan.made_at[i] for i, _ in step.reads]
        needs.append(set().union(*({m} | needs[m] for m in made)))
        noisy, clean = slots_of(plan, lay, n)
        for slots, near in ((noisy, needs[n]), (clean, needs[n] | {n})):
            foreign = [
                s not in slots and not (c and m in near)
                for s, (m, c) in enumerate(zip(lay.step, lay.is_clean))
            ]
            foreign = torch.tensor(foreign)
            z2 = torch.where(foreign.view(1, -1, 1, 1, 1), other, z)
            out = model(z2, torch.where(foreign, 1000 - t, t), text, pos, lay.visible)
            assert torch.equal(out[:, slots], full[:, slots]), (n, step)
        for i, _ in (step.reads[:1] + step.reads[-1:]) if noisy else ():
            moved = z.clone()
            moved[:, [s for s, j in enumerate(lay.latent) if lay.is_clean[s] and j == i]] += 1
            out = model(moved, t, text, pos, lay.visible)
            assert not torch.equal(out[:, noisy], full[:, noisy])


def test_teacher_forcing_by_hand():
    """Backward with anchors: clean 3-5, then the targets 3-5 and 0-2, then the anchors of the first
    step. Nobody reads 0-2."""
    lay = layout(anchors.backward(6), teacher_forcing=True)
    assert (
        lay.latent == (3, 4, 5, 3, 4, 5, 0, 1, 2, 0, 1, 2)
        and lay.is_clean == (True,) * 3 + (False,) * 9
    )
    assert lay.visible.spans == (
        (0, 3, ((0, 3),)),
        (3, 6, ((3, 6), (9, 12))),
        (6, 9, ((0, 3), (6, 9))),
        (9, 12, ((3, 6), (9, 12))),
    )


def test_teacher_forcing_of_a_given_clip_by_hand():
    """What is given stands in the clean half alone: latents 0-2 clean, then 3-5 noisy. Nobody reads
    3-5, and nothing learns to make 0-2."""
    plan = anchors.with_given(anchors.forward(6), range(3))
    lay = layout(plan, teacher_forcing=True)
    assert lay.latent == (0, 1, 2, 3, 4, 5) and lay.is_clean == (True,) * 3 + (False,) * 3
    assert lay.visible.spans == ((0, 3, ((0, 3),)), (3, 6, ((0, 6),)))


# ---------------------------------------------------------------- the teacher's ODE, block by block
BESIDE = {name: plan for name, plan in MIXED.items() if "clip" in name}
NAMES = ["forward", "backward P=3", "backward, dummy", "inbetween", "inbetween, given", "loop"]
PAIRED = {name: PLANS[name] for name in NAMES} | dict([*BESIDE.items()][:2])


@pytest.mark.parametrize("share_noise", ["none", "all"])
@pytest.mark.parametrize("name", PAIRED)
def test_causal_states_equal_masked_passes(name, share_noise):
    """The cache and one block at a time, against 48 masked passes of the whole sequence, whose
    clean half holds the real clip. (Without a clip: tests/test_sampler.py.)"""
    model, plan, B = tiny_dit(), PAIRED[name], 2
    noise, data = randn(5, B, 2 * (plan.length + 3), 4, H, W), randn(6, B, plan.length, 4, H, W)
    words, nothing = randn(7, B, 5, 32), torch.zeros(1, 5, 32)
    cond_uncond = model.text_kv(torch.cat([words, nothing.expand_as(words)]))
    start, keep = noise_from(noise, length=plan.length), kept_states((1000, 750, 500, 250))
    config = causal_ode.Config(guidance=2.0, share_noise=share_noise)
    with torch.no_grad():
        found = plan_states(model, plan, cond_uncond, start, data, keep, config)
    lay = layout(plan, teacher_forcing=True)
    clean, column = torch.tensor(lay.is_clean), [i if i >= 0 else ~i for i in lay.latent]
    numbers = []
    for s, n in enumerate(lay.step):
        step = plan.steps[n]
        at = step.own.index(lay.latent[s])
        numbers.append(row(plan, step.noise(share_noise, 0)[at]))
    x = torch.where(clean.view(1, -1, 1, 1, 1), data[:, column], noise[:, numbers])
    want = [x]
    for high, low in zip(ode_sigmas()[:-1], ode_sigmas()[1:]):
        t = torch.full(x.shape[:2], 1000 * high).masked_fill(clean, 0.0)
        cond, uncond = (
            model(x, t, p, torch.tensor(lay.pos), lay.visible)
            for p in (words, nothing.expand(B, -1, -1))
        )
        moved = x + (low - high) * (uncond + 2 * (cond - uncond))
        x = torch.where(clean.view(1, -1, 1, 1, 1), x, moved)
        want.append(x)
    noisy = [s for s, c in enumerate(lay.is_clean) if not c]
    assert found.shape == (B, 5, len(noisy), 4, H, W)
    assert torch.equal(found[:, 0], want[0][:, noisy])
    for k, state in enumerate(keep):
        assert (
            distance(found[:, k], want[state][:, noisy]) <= 2e-4
        )  # 48 steps add up their rounding


# ---------------------------------------------------------------- losses by hand
def test_weight_of_noise_levels():
    """Wan's: with shift 5 nothing at pure noise, 2.08 at the middle, .032 at the smallest level,
    mean 1 over the levels."""
    weight = timestep_weight(torch.tensor([1.0, 0.5, 0.00498]), 5.0)
    assert weight.tolist() == pytest.approx([0, 2.08, 0.032], abs=5e-3)
    levels = 5 * (u := torch.arange(1, 1001) / 1000) / (1 + 4 * u)
    assert timestep_weight(levels, 5.0).mean() == pytest.approx(1, abs=1e-4)


def test_teachers_loss_by_hand():
    """x0 = 0, noise = 1, so v = 1 is right: v = 3 errs by 4, times the weight; clean slots and, if
    not asked for, anchors and dummies do not count, although the network is wrong by 1000 there."""
    for plan, unscored in (
        (anchors.backward(6), slice(9, 12)),
        (anchors.backward(6, anchors=0, dummy=True), slice(6, 9)),
    ):
        lay = layout(plan, teacher_forcing=True)
        n, clean = len(lay.latent), torch.tensor(lay.is_clean)
        v = torch.full((1, n, 1, 1, 1), 3.0).masked_fill(clean.view(1, -1, 1, 1, 1), 1000)
        x0, sigma = torch.zeros(1, n, 1, 1, 1), torch.tensor([[0.5] * len(plan.steps)])
        want, seen = 4 * timestep_weight(torch.tensor(0.5), 5.0).item(), Constant(v)
        assert ar_loss(seen, lay, x0, x0 + 1, sigma, torch.zeros(1), 5.0).item() == pytest.approx(
            want
        )
        assert seen.t[0].tolist() == [0 if c else 500 for c in lay.is_clean]
        assert seen.x.flatten().tolist() == [0 if c else 0.5 for c in lay.is_clean]
        v[:, unscored] = 1000
        assert ar_loss(
            Constant(v), lay, x0, x0 + 1, sigma, torch.zeros(1), 5.0, False
        ).item() == pytest.approx(want)
        assert ar_loss(Constant(v), lay, x0, x0 + 1, sigma, torch.zeros(1), 5.0, True).item() > 1e4


class TowardsZero(Towards):
    """Towards, in the masked pass."""

    def forward(self, x, t, prompt, pos, visible):
        return super().forward(x, t.clamp_min(1e-9), prompt, pos)


def test_consistency_loss_by_hand():
    """Three networks that know the flow to 0 agree at all levels: 0. A student whose velocity is 0
    answers x itself, sigma n at level sigma, and errs by its square. Dummies and clean slots do not
    count."""
    lay, grid = layout(anchors.forward(6), teacher_forcing=True), torch.tensor(ode_sigmas())
    x0, noise = torch.zeros(1, 9, 1, 1, 1), torch.full((1, 9, 1, 1, 1), 2.0)
    prompt, index, flow = torch.zeros(1, 1, 1), torch.tensor([[0, 24]]), TowardsZero()

    def loss(student, average):
        return cd_loss(
            student, average, flow, lay, x0, noise, index, grid, prompt, prompt, 3.0
        ).item()

    assert loss(flow, flow) <= 1e-10
    at, below = grid[[0, 24]], grid[[1, 25]]
    assert loss(Constant(torch.zeros(1)), flow) == pytest.approx((4 * at**2).mean().item())
    assert loss(flow, Constant(torch.zeros(1))) == pytest.approx((4 * below**2).mean().item())


# ---------------------------------------------------------------- clips
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tiny checkpoints, latents of six toy clips of 21 frames, and an autoregressive teacher of two
    steps."""
    folder = tmp_path_factory.mktemp("causal")
    paths = tiny_checkpoints(folder)
    latents.encode(
        latents.Config(vae=paths["vae"], out=str(folder / "latents"), clips=6, frames=21, shard=4)
    )
    made = {
        "weights": paths["student"],
        "clips": str(folder / "latents"),
        "latent": LATENT,
        "plans": "paper",
        "dtype": "float32",
        "batch": 4,
    }
    flags = {"out": str(folder / "ar"), "steps": 2, "vae": paths["vae"]}
    ar_teacher.main(ar_teacher.Config(**made | flags))
    return made | {
        "teacher": str(folder / "ar" / "teacher.safetensors"),
        "vae": paths["vae"],
        "folder": folder,
    }


def clips_of(files, **changes):
    return Clips(
        *(
            {
                "folder": files["clips"],
                "latent": LATENT,
                "channels": 2,
                "source": Prompts("toy", 64, 12),
            }
            | changes
        ).values()
    )


def test_clips_are_the_worlds_through_the_vae(files):
    """Clip n is that of caption n, encoded; its prompt is line n of prompts.txt."""
    from toy.train_vae import clips as drawn
    from vae import load_vae

    video, captions = drawn([5], 32, 21)
    found = clips_of(files)
    assert len(found) == 6 and distance(found[5], load_vae(files["vae"]).encode(video)[0]) <= 5e-3
    lines = open(f"{files['clips']}/prompts.txt", encoding="utf-8").read().splitlines()
    assert len(lines) == 6 and lines[5] == captions[0]


def test_encoding_goes_on_where_it_was_stopped(files, tmp_path, monkeypatch):
    """SIGTERM during the second shard: the first stays; the same command makes the rest, to the
    same bytes."""
    config = latents.Config(vae=files["vae"], out=str(tmp_path), clips=6, frames=21, shard=4)
    at_call(monkeypatch, latents.world, "render", 5, terminate)
    latents.encode(config)
    assert [p.name for p in tmp_path.iterdir()] == ["latents-000000.safetensors"]
    latents.encode(config)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (files["folder"] / "latents" / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(
        UserError,
        match="latents-000004.safetensors is not one of 4 clips in shards of 4; use another --out",
    ):
        latents.encode(
            latents.Config(vae=files["vae"], out=str(tmp_path), clips=4, frames=21, shard=4)
        )


def test_clips_that_do_not_fit_are_refused(files, tmp_path):
    """Another size, another number of channels, other prompts, two VAEs, nothing at all: one
    sentence each."""
    for changes, says in (
        ({"latent": (9, 4, 4)}, r"\(6, 2, 4, 4\).*ask for \(9, 2, 4, 4\)"),
        ({"channels": 16}, "or another VAE"),
        ({"folder": str(tmp_path)}, "holds no latents; make them with"),
    ):
        with pytest.raises(UserError, match=says):
            clips_of(files, **changes)
    (tmp_path / "prompts.txt").write_text("a red square moves left over a green wave\n")
    with pytest.raises(UserError, match="use --prompts .*prompts.txt"):
        clips_of(files, source=Prompts(str(tmp_path / "prompts.txt"), 64, 12))
    for path in (files["folder"] / "latents").glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "latents-000004.safetensors").unlink()
    latents.encode(latents.Config(out=str(tmp_path), clips=6, frames=21, shard=4))
    with pytest.raises(UserError, match="another VAE"):
        clips_of(files, folder=str(tmp_path))


def test_a_folder_of_videos_is_encoded_with_its_prompts(files, tmp_path):
    """Each CLIP.mp4 has its prompt in CLIP.txt; one without is named, and nothing is written."""
    frames = (np.random.default_rng(0).random((30, 48, 64, 3)) * 255).astype(np.uint8)
    for name in ("b", "a"):
        iio.imwrite(tmp_path / f"{name}.mp4", frames, fps=16)
    (tmp_path / "a.txt").write_text("a red disc moves\nup over a blue wave\n")
    config = latents.Config(
        data=str(tmp_path), vae=files["vae"], out=str(tmp_path / "out"), frames=21
    )
    with pytest.raises(UserError, match="b.mp4 has no prompt; write what it shows into b.txt"):
        latents.encode(config)
    assert not (tmp_path / "out").exists()
    (tmp_path / "b.txt").write_text("a cyan ring moves down over a red wave")
    latents.encode(config)
    found = clips_of(
        files,
        folder=str(tmp_path / "out"),
        source=Prompts(str(tmp_path / "out" / "prompts.txt"), 64, 12),
    )
    assert len(found) == 2 and found[0].shape == (6, 2, 4, 4)
    assert (
        (tmp_path / "out" / "prompts.txt")
        .read_text()
        .startswith("a red disc moves up over a blue wave\n")
    )


# ---------------------------------------------------------------- pairs and training
def teach(files, out, **changes):
    """An autoregressive teacher; the folder it wrote."""
    keys = ("weights", "clips", "latent", "plans", "dtype", "batch", "vae")
    flags = {k: files[k] for k in keys} | {"out": str(out), "steps": 2} | changes
    ar_teacher.main(ar_teacher.Config(**flags))
    return out


METHODS = {"causal": causal_ode, "cd": consistency}


def stage1(files, out, method="causal", **changes):
    """Stage 1 from an autoregressive teacher; the folder it wrote."""
    keys = ("teacher", "clips", "latent", "plans", "dtype", "weights", "batch")
    flags = {k: files[k] for k in keys} | {"out": str(out), "data": str(files["folder"] / "pairs")}
    flags |= {"pairs": 6, "shard": 3, "steps": 3, "warmup": 2, "lr": 1e-3}
    script = METHODS[method]
    script.main(script.Config(**flags | changes))
    return out


@pytest.fixture(scope="module")
def causal_pairs(files):
    return stage1(files, files["folder"] / "none", generate=True)


def test_causal_pairs_are_the_teachers(files, causal_pairs):
    """Pair 4: each block of both plans from its own noise, after the clean latents of clip 4, told
    caption 4; the clean slots show the clip at every level."""
    tensors, made = read_tensors(files["folder"] / "pairs" / "pairs-000003.safetensors")
    config = causal_ode.Config(teacher=files["teacher"], latent=LATENT, plans="paper")
    source, clip, teacher = Prompts("toy", 64, 12), clips_of(files)[4], load_dit(files["teacher"])
    assert distance(tensors["clean"][1].float(), clip) <= 4e-3
    assert made["block"] == made["anchors"] == 3 and made["first"] == 3
    text = teacher.text_kv(torch.cat([source([4]), source.embed([""])]))
    pairs = causal_pairs_of(files)
    (pair,) = [pair for pair in pairs[0] if pair.number == 4]
    for d, plan in enumerate(both_directions(6)):
        noise = noise_from(pair_noise(config, 2, 4, both_directions(6))[None], length=6)
        keep = kept_states(config.denoising)
        with torch.no_grad():
            want = plan_states(teacher, plan, text, noise, clip[None], keep, config)[0]
        lay = layout(plan, teacher_forcing=True)
        states, clean = slot_states(pair, lay, d), torch.tensor(lay.is_clean)
        assert distance(states[:, ~clean], want) <= 8e-3
        real = tensors["clean"][1][[i for i, c in zip(lay.latent, lay.is_clean) if c]].float()
        assert torch.equal(states[:, clean], real.expand(5, *real.shape))


def causal_pairs_of(files, **changes):
    """The causal pairs that training would read, by entry of the mix."""
    keys = ("teacher", "clips", "latent", "plans")
    flags = {k: files[k] for k in keys} | {"data": str(files["folder"] / "pairs")} | changes
    config = causal_ode.Config(**flags)
    mix, source = mix_of(config), Prompts("toy", 64, 12)
    return pairs_for(config, mix, source, causal_shapes(config, mix, 2))


def test_causal_pairs_pass_the_check_and_are_not_confused(files, causal_pairs, tmp_path):
    """--check knows them; a run with other blocks, or another teacher, does not take them."""
    stage1(files, tmp_path, check=True)
    for changes, says in (
        ({"anchors": 2}, "anchors is 3, not 2"),
        ({"share_noise": "all"}, "share_noise is 'none', not 'all'"),
        ({"teacher": files["weights"]}, "teacher is '"),
    ):
        with pytest.raises(UserError, match=says):
            stage1(files, tmp_path, **changes)
    with pytest.raises(UserError, match="holds 6 clips; use --pairs 6"):
        stage1(files, tmp_path, generate=True, pairs=7, data=str(tmp_path / "pairs"))


@pytest.mark.parametrize("share_noise", ["none", "all"])
def test_causal_pairs_with_a_dummy(share_noise, files, tmp_path):
    """P = 0: the dummy's latents stand for the first ones, and have noise of their own."""
    flags = {"anchors": 0, "data": str(tmp_path / "pairs"), "share_noise": share_noise}
    stage1(files, tmp_path, generate=True, **flags)
    stage1(files, tmp_path, check=True, **flags)
    tensors, _ = read_tensors(tmp_path / "pairs" / "pairs-000000.safetensors")
    assert tensors["plan1"].shape == (3, 5, 9, 2, 4, 4)
    assert rows(stage1(files, tmp_path, **flags))[-1]["step"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_causal_runs_resume_exactly(method, files, causal_pairs, tmp_path):
    """2 + 2 steps are 4, bit for bit: weights, optimiser, log, and the average of consistency."""
    stage1(files, tmp_path / "b", method, steps=2, decay=0.0)
    a, b = (stage1(files, tmp_path / x, method, steps=4, decay=0.0) for x in "ab")
    assert same(saved(a), saved(b)) and apart(a, b) == 0 and rows(a) == rows(b)
    assert any(k.startswith("ema") for k in saved(a)) == (method == "cd")


@pytest.fixture(scope="module")
def every(files, tmp_path_factory):
    """The flags of a run on every kind of plan, with clips of 15 latents and pairs of one each."""
    folder = tmp_path_factory.mktemp("every")
    flags = {"vae": files["vae"], "out": str(folder / "latents"), "clips": 24, "frames": 57}
    latents.encode(latents.Config(**flags, shard=24))
    made = {"clips": flags["out"], "latent": (15, 4, 4), "plans": "any", "batch": 1}
    return files | made | {"folder": folder}


def test_every_plan_has_causal_pairs_and_is_trained(every, tmp_path):
    """All of the mix: teacher, pairs, their check, and both students draw every entry."""
    lengths = {plans[0].length for _, plans in any_mix(15)}
    taught = rows(teach(every, tmp_path / "ar", steps=60))
    assert {r["latents"] for r in taught} == lengths
    stage1(every, tmp_path, generate=True, pairs=24, shard=1)
    stage1(every, tmp_path, check=True, pairs=24, shard=1)
    assert len(causal_pairs_of(every)) == len(any_mix(15))
    for method in METHODS:
        log = rows(stage1(every, tmp_path / method, method, steps=60))
        assert {r["latents"] for r in log} == lengths
        assert any("before a clip" in r for r in log) and any("after a clip" in r for r in log)


def test_teacher_run_resumes_exactly_and_learns(files, tmp_path):
    """2 + 2 steps are 4; 120 steps on six clips halve the loss in both directions."""
    for folder, steps in (("b", 2), ("a", 4), ("b", 4)):
        teach(files, tmp_path / folder, steps=steps, decay=0.0, warmup=2)
    assert same(saved(tmp_path / "a"), saved(tmp_path / "b"))
    assert apart(tmp_path / "a", tmp_path / "b", "teacher") == 0
    log = rows(teach(files, tmp_path / "c", steps=120, lr=5e-3))
    for direction in ("forward", "backward"):
        first, last = (sum(r[direction] for r in part) / 15 for part in (log[:15], log[-15:]))
        assert last < first / 2, (direction, first, last)


def test_average_of_consistency_follows_the_student(files, tmp_path):
    """Decay 0 is the student itself after each step; decay 1 stays what it was: the losses differ
    from step 1 on."""
    a, b = (rows(stage1(files, tmp_path / str(ema), "cd", ema=ema)) for ema in (0.0, 1.0))
    assert a[0] == b[0] and a[1]["forward"] != b[1]["forward"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_consistency_hands_on_the_average(parallel, files, tmp_path):
    """What is written is the average, as published: with decay 1 the weights it began from, with
    decay 0 the student's, between them neither. It remembers its recipe."""
    start, _ = read_tensors(files["weights"])
    for ema in (0.0, 0.5, 1.0):
        out = stage1(files, tmp_path / str(ema), "cd", ema=ema, parallel=parallel)
        written, _ = read_tensors(out / "student.safetensors")
        state = saved(out)
        student = {k: state[f"dit/{k}"] for k in written}
        average = {k: state[f"ema/{k}"] for k in written}
        assert same(written, average)
        assert same(written, student) == (ema == 0) and same(written, start) == (ema == 1)
    assert Recipe.read(load_dit(out).recipe) == Recipe(plans="paper")


@pytest.mark.xdist_group("torchrun")  # one at a time: each starts three processes
def test_two_processes_equal_one(files, causal_pairs, tmp_path):
    """Teacher, causal pairs, both students, by ddp and fsdp: what two processes make is what one
    makes, to 1e-5."""
    keys = ("weights", "clips", "latent", "plans", "dtype", "batch")
    flags = {k: files[k] for k in keys}
    ode = flags | {"teacher": files["teacher"], "data": str(files["folder"] / "pairs")}
    ode |= {"steps": 3, "warmup": 2, "lr": 1e-3}
    pairs = {"data": str(tmp_path / "pairs"), "pairs": 6, "shard": 3, "generate": True}
    fsdp = {"parallel": "fsdp"}
    two_processes(
        tmp_path,
        (
            "zoo.ar_teacher",
            flags | {"vae": files["vae"], "out": str(tmp_path / "ar"), "steps": 2},
        ),
        ("zoo.causal_ode", ode | {"out": str(tmp_path / "none")} | pairs),
        ("zoo.causal_ode", ode | {"out": str(tmp_path / "causal")} | fsdp),
        ("zoo.consistency", ode | {"out": str(tmp_path / "cd")} | fsdp),
    )
    assert apart(tmp_path / "ar", files["folder"] / "ar", "teacher") <= 1e-5
    for path in (tmp_path / "pairs").iterdir():
        assert path.read_bytes() == (files["folder"] / "pairs" / path.name).read_bytes()
    for method in METHODS:
        one = stage1(files, tmp_path / f"one-{method}", method)
        assert apart(one, tmp_path / method) <= 1e-5


@pytest.mark.parametrize(
    "method, flags, says",
    [
        ("causal", {"teacher": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ("cd", {"teacher": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ("cd", {"generate": True}, "has no pairs: leave out --generate and --check"),
        ("cd", {"check": True}, "has no pairs"),
        ("cd", {"clips": "nowhere"}, "nowhere holds no latents"),
        ("causal", {"data": "nowhere"}, "index.json does not exist: make pairs first"),
        ("causal", {"plans": "all"}, "--plans 'all' must be one of"),
        ("cd", {"denoising": (250.0, 500.0)}, "--denoising 250.0 500.0 must fall"),
    ],
)
def test_bad_flags(method, flags, says, files, tmp_path, monkeypatch, capsys):
    """One sentence, exit code 2, and nothing is written."""
    keys = ("teacher", "clips", "latent", "weights", "plans")
    usual = {k: files[k] for k in keys} | {"out": tmp_path / "run"} | flags
    switches = [f"--{k}" for k, v in usual.items() if v is True]
    words = {k: v for k, v in usual.items() if v is not True}
    code, error = command_line(monkeypatch, capsys, METHODS[method], *switches, **words)
    assert code == 2 and says in error and not (tmp_path / "run").exists()


def test_one_block_a_latent(files, tmp_path):
    """Frame-wise (B = 1): teacher, pairs and student with the flags of that preset."""
    frame = {"block": 1, "anchors": 1}
    teach(files, tmp_path / "ar", steps=1, **frame)
    flags = frame | {
        "teacher": str(tmp_path / "ar" / "teacher.safetensors"),
        "data": str(tmp_path / "pairs"),
    }
    stage1(files, tmp_path, generate=True, **flags)
    assert rows(stage1(files, tmp_path, **flags))[-1]["step"] == 2
    for module in (ar_teacher, causal_ode):
        assert frame.items() <= module.Config.PRESETS["wan-framewise"].items()
