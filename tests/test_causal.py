"""Causal Forcing in both directions: teacher forcing is exact and leaks nothing, pairs are the
teacher's, losses are by hand."""

import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from test_sampler import H, W
from test_train_ode import LATENT, Constant, Towards
from tiny import (
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
from lib.noise import noise_from
from lib.pairs import MADE_BY, kept_states, pair_noise, read_pairs, slot_states
from lib.tensors import read_tensors, write_safetensors
from lib.text import Prompts
from plans import both_directions, paper_mix, rows_of, with_given
from sampler import ode_sigmas, teacher_blocks
from tools import encode as latents
from zoo import ar_teacher, causal_ode, consistency
from zoo.ar_teacher import ar_loss
from zoo.consistency import cd_loss
from zoo.on_clips import Drawn, timestep_weight

KEEP = kept_states((1000, 750, 500, 250))


# ---------------------------------------------------------------- teacher forcing
def slots_of(plan: Plan, lay, n: int) -> tuple[list[int], list[int]]:
    """The noisy slots of step n in the step's order (none of what is given), and its clean ones."""
    noisy = {
        (i, t): s
        for s, (i, m, t, c) in enumerate(zip(lay.latent, lay.step, lay.is_target, lay.is_clean))
        if m == n and not c
    }
    clean = [s for s, (m, c) in enumerate(zip(lay.step, lay.is_clean)) if m == n and c]
    if plan.steps[n].commits:
        return list(noisy.values()), clean
    return [noisy[i, i in plan.steps[n].targets] for i in plan.steps[n].own], clean


def with_data(plan: Plan, B: int = 2) -> tuple:
    """A layout with noisy slots at random times, and clean slots at 0 that hold the data of their
    latent."""
    lay = layout(plan, teacher_forcing=True)
    z, data = randn(0, B, len(lay.latent), 4, H, W), randn(1, B, plan.length + 3, 4, H, W)
    t = (1000 * randn(2, B, len(plan.steps)).sigmoid())[:, torch.tensor(lay.step)]
    clean = torch.tensor(lay.is_clean)
    return (
        lay,
        torch.where(clean.view(1, -1, 1, 1, 1), data[:, list(lay.latent)], z),
        t.masked_fill(clean, 0.0),
    )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_teacher_forcing_equals_one_block_after_clean_context(plan):
    """Per block: a plain pass over the clean steps before it, as the test lays them out, and the
    noisy block alone."""
    model, (lay, z, t) = tiny_dit(), with_data(plan)
    text, finished = model.text_kv(randn(3, 2, 5, 32)), []
    full = model(z, t, text, torch.tensor(lay.pos), lay.visible)
    for n, step in enumerate(plan.steps):
        noisy, clean = slots_of(plan, lay, n)
        assert bool(noisy) != step.commits
        if step.commits:
            finished.append((step, clean))
            continue
        _, pos, visible = side_by_side([s for s, _ in finished] + [step])
        own = [slot for _, slots in finished for slot in slots] + noisy
        assert (
            distance(
                model(z[:, own], t[:, own], text, torch.tensor(pos), visible)[:, -len(noisy) :],
                full[:, noisy],
            )
            <= 1e-5
        ), (n, step)
        if clean:
            finished.append(
                (Step(step.targets, step.pos[len(step.anchors) :], (), step.reads), clean)
            )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_teacher_forcing_leaks_nothing(plan):
    """Bit for bit: a block does not see any other noisy block, nor clean latents that its past does
    not hold; and clean context does not see noise. What it reads, it does see."""
    model, (lay, z, t) = tiny_dit(), with_data(plan, B=1)
    text, pos, other = model.text_kv(randn(3, 1, 5, 32)), torch.tensor(lay.pos), randn(4, *z.shape)
    full = model(z, t, text, pos, lay.visible)
    maker, needs = {i: n for n, step in enumerate(plan.steps) for i in step.targets}, []
    for n, step in enumerate(plan.steps):
        needs.append(set().union(*({maker[i]} | needs[maker[i]] for i, _ in step.reads)))
        noisy, clean = slots_of(plan, lay, n)
        for slots, near in ((noisy, needs[n]), (clean, needs[n] | {n})):
            foreign = torch.tensor(
                [
                    s not in slots and not (c and m in near)
                    for s, (m, c) in enumerate(zip(lay.step, lay.is_clean))
                ]
            )
            out = model(
                torch.where(foreign.view(1, -1, 1, 1, 1), other, z),
                torch.where(foreign, 1000 - t, t),
                text,
                pos,
                lay.visible,
            )
            assert torch.equal(out[:, slots], full[:, slots]), (n, step)
        for i, _ in step.reads[:1] + step.reads[-1:]:
            moved = z.clone()
            moved[
                :, [s for s, (j, c) in enumerate(zip(lay.latent, lay.is_clean)) if c and j == i]
            ] += 1
            seen = noisy or clean
            assert not torch.equal(model(moved, t, text, pos, lay.visible)[:, seen], full[:, seen])


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


# ---------------------------------------------------------------- the teacher's ODE, block by block
@pytest.mark.parametrize(
    "name", ["forward", "backward P=3", "backward, dummy", "inbetween", "loop"]
)
@pytest.mark.parametrize("forced", [True, False])
def test_integrate_equals_masked_passes(name, forced):
    """The cache and one block at a time, against 48 masked passes of the whole sequence, whose
    clean half holds the context:
    the data if it is forced, else what was made."""
    model, plan, B = tiny_dit(), PLANS[name], 2
    noise, data, words = (
        randn(5, B, plan.length + 3, 4, H, W),
        randn(6, B, plan.length, 4, H, W),
        randn(7, B, 5, 32),
    )
    nothing = torch.zeros(1, 5, 32)
    start = noise_from(torch.cat([noise, 2 * noise], 1), length=plan.length)
    lay = layout(plan, teacher_forcing=True)
    clean, column = torch.tensor(lay.is_clean), [i if i >= 0 else ~i for i in lay.latent]
    text = model.text_kv(torch.cat([words, nothing.expand(B, -1, -1)]))
    if forced:
        config = causal_ode.Config(guidance=2.0)
        states = causal_ode.plan_states(model, plan, text, start, data, KEEP, config)
        context = data[:, column]
    else:
        made = {}
        for n, x0 in teacher_blocks(model, plan, [words], nothing, start, 2.0):
            made |= dict(zip(plan.steps[n].targets, x0.unbind(1)))
        context = torch.stack([made[i] for i in lay.latent], 1)
    numbers = []
    for n, i in zip(lay.step, lay.latent):
        step = plan.steps[n]
        numbers.append(dict(zip(step.own, step.noise("none", 0)))[i])
    x = torch.where(clean.view(1, -1, 1, 1, 1), context, start(0, tuple(numbers)))
    for high, low in zip(ode_sigmas()[:-1], ode_sigmas()[1:]):
        t = torch.full(x.shape[:2], 1000 * high).masked_fill(clean, 0.0)
        cond, uncond = (
            model(x, t, p, torch.tensor(lay.pos), lay.visible)
            for p in (words, nothing.expand(B, -1, -1))
        )
        x = torch.where(
            clean.view(1, -1, 1, 1, 1), x, x + (low - high) * (uncond + 2 * (cond - uncond))
        )
    noisy = [s for s, c in enumerate(lay.is_clean) if not c]
    if forced:
        assert states.shape[1] == len(KEEP)
        assert torch.equal(states[:, 0], start(0, tuple(numbers[s] for s in noisy)))
        assert distance(states[:, -1], x[:, noisy]) <= 2e-4  # 48 steps add up their rounding
    for n, step in enumerate(plan.steps):
        if not forced:
            at = slots_of(plan, lay, n)[0][len(step.anchors) :]
            found = torch.stack([made[i] for i in step.targets], 1)
            assert distance(found, x[:, at]) <= 2e-4


# ---------------------------------------------------------------- losses by hand
def test_weight_of_noise_levels():
    """Wan's: with shift 5 nothing at pure noise, 2.08 at the middle, .032 at the smallest level,
    mean 1 over the levels."""
    assert timestep_weight(torch.tensor([1.0, 0.5, 0.00498]), 5.0).tolist() == pytest.approx(
        [0, 2.08, 0.032], abs=5e-3
    )
    levels = 5 * (u := torch.arange(1, 1001) / 1000) / (1 + 4 * u)
    assert timestep_weight(levels, 5.0).mean() == pytest.approx(1, abs=1e-4)


def test_teachers_loss_by_hand():
    """x0 = 0, noise = 1, so v = 1 is right: v = 3 errs by 4, times the weight; clean slots and, if
    not asked for, anchors and
    dummies do not count, although the network is wrong by 1000 there."""
    for plan, unscored in (
        (anchors.backward(6), slice(9, 12)),
        (anchors.backward(6, anchors=0, dummy=True), slice(6, 9)),
    ):
        lay = layout(plan, teacher_forcing=True)
        n, clean = len(lay.latent), torch.tensor(lay.is_clean)
        v = torch.full((1, n, 1, 1, 1), 3.0).masked_fill(clean.view(1, -1, 1, 1, 1), 1000)
        x0, sigma = torch.zeros(1, n, 1, 1, 1), torch.tensor([[0.5] * len(plan.steps)])
        clips = Drawn(x0, x0 + 1, sigma, torch.zeros(1))
        want, seen = 4 * timestep_weight(torch.tensor(0.5), 5.0).item(), Constant(v)
        assert ar_loss(seen, lay, clips, 5.0).item() == pytest.approx(want)
        assert seen.t[0].tolist() == [0 if c else 500 for c in lay.is_clean]
        assert seen.x.flatten().tolist() == [0 if c else 0.5 for c in lay.is_clean]
        v[:, unscored] = 1000
        assert ar_loss(Constant(v), lay, clips, 5.0, False).item() == pytest.approx(want)
        assert ar_loss(Constant(v), lay, clips, 5.0, True).item() > 1e4


def test_a_teacher_is_shown_given_latents_clean():
    """Latent 3 of block 3-5 is the user's own: t = 0, no noise, no loss, as in the student's loss;
    the rest of its block is as noisy as its step."""
    plan = with_given(anchors.backward(6), [3])
    lay = layout(plan, teacher_forcing=True)
    n, known = len(lay.latent), [c or g for c, g in zip(lay.is_clean, lay.is_given)]
    assert sum(known) == 3 + 1
    v = torch.full((1, n, 1, 1, 1), 3.0).masked_fill(torch.tensor(known).view(1, -1, 1, 1, 1), 1000)
    x0, sigma, seen = torch.zeros(1, n, 1, 1, 1), torch.tensor([[0.5, 0.5]]), Constant(v)
    want = 4 * timestep_weight(torch.tensor(0.5), 5.0).item()
    loss = ar_loss(seen, lay, Drawn(x0, x0 + 1, sigma, torch.zeros(1)), 5.0)
    assert loss.item() == pytest.approx(want)
    assert seen.t[0].tolist() == [0 if k else 500 for k in known]
    assert seen.x.flatten().tolist() == [0 if k else 0.5 for k in known]


class TowardsZero(Towards):
    """Towards, in the masked pass."""

    def forward(self, x, t, prompt, pos, visible):
        return super().forward(x, t.clamp_min(1e-9), prompt, pos)


def test_consistency_loss_by_hand():
    """Three networks that know the flow to 0 agree at all levels: 0. A student whose velocity is 0
    answers x itself,
    sigma n at level sigma, and errs by its square. Dummies and clean slots do not count."""
    lay, grid = layout(anchors.forward(6), teacher_forcing=True), torch.tensor(ode_sigmas())
    x0, noise = torch.zeros(1, 9, 1, 1, 1), torch.full((1, 9, 1, 1, 1), 2.0)
    prompt, index, flow = torch.zeros(1, 1, 1), torch.tensor([[0, 24]]), TowardsZero()
    clips = Drawn(x0, noise, index, prompt)

    def loss(student, average):
        return cd_loss(student, average, flow, lay, clips, grid, prompt, 3.0).item()

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
        "plans": "paper",
        "latent": LATENT,
        "dtype": "float32",
        "batch": 4,
    }
    ar_teacher.main(ar_teacher.Config(**made, out=str(folder / "ar"), steps=2, vae=paths["vae"]))
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
    at_call(monkeypatch, latents.world, "render", 6, terminate)  # one is for a fingerprint
    with pytest.raises(SystemExit, match="^143$"):  # nothing that needs all clips begins
        latents.encode(config)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latents-000000.safetensors",
        "latents-000004.safetensors",  # the one clip of it that was at hand
    ]
    with pytest.raises(UserError, match="was not finished; run the same encode.py again"):
        clips_of(files, folder=str(tmp_path))
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
    with pytest.raises(UserError, match="latents-000000.safetensors was made with another vae"):
        latents.encode(latents.Config(out=str(tmp_path), clips=6, frames=21, shard=4))
    latents.encode(latents.Config(out=str(tmp_path / "b"), clips=6, frames=21, shard=4))
    name = "latents-000004.safetensors"
    (tmp_path / name).write_bytes((tmp_path / "b" / name).read_bytes())
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
TEACHER_FLAGS = ("weights", "clips", "latent", "dtype", "batch", "vae", "plans")


def stage1(files, out, script=causal_ode, **changes):
    """A run of zoo/causal_ode.py or zoo/consistency.py; the folder it wrote."""
    keys = ("teacher", "clips", "latent", "dtype", "weights", "batch", "plans")
    flags = {k: files[k] for k in keys} | {
        "data": str(files["folder"] / "pairs"),
        "pairs": 6,
        "shard": 3,
        "out": str(out),
        "steps": 3,
        "warmup": 2,
        "lr": 1e-3,
    }
    script.main(script.Config(**flags | changes))
    return out


@pytest.fixture(scope="module")
def causal_pairs(files):
    return stage1(files, files["folder"] / "none", generate=True)


def test_causal_pairs_are_the_teachers(files, causal_pairs):
    """Pair 4: each block of both plans from its own noise, after the clean latents of clip 4, told
    caption 4."""
    made = read_tensors(files["folder"] / "pairs" / "pairs-000003.safetensors")[1]
    config = causal_ode.Config(
        teacher=files["teacher"],
        latent=LATENT,
        plans="paper",
        data=str(files["folder"] / "pairs"),
    )
    source, clip = Prompts("toy", 64, 12), clips_of(files)[4]
    kind = causal_ode.CausalPairs(config, paper_mix(6), 2, source)
    kind.made_by = MADE_BY
    (pair,) = [p for p in read_pairs(kind)[0] if p.number == 4]
    assert distance(pair.shard["clean"][pair.row].float(), clip) <= 4e-3
    assert made["block"] == made["anchors"] == 3 and made["share_noise"] == "none"
    teacher, plans = load_dit(files["teacher"]), both_directions(6)
    text = teacher.text_kv(torch.cat([source([4]), source.embed([""])]))
    noise = noise_from(pair_noise(config, 2, 4, rows_of(plans))[None], length=6)
    for d, plan in enumerate(plans):
        want = causal_ode.plan_states(teacher, plan, text, noise, clip[None], KEEP, config)[0]
        lay = layout(plan, teacher_forcing=True)
        states = slot_states(pair, lay, d)  # (5, slots, C, h, w)
        clean = torch.tensor(lay.is_clean)
        assert distance(states[:, ~clean], want) <= 8e-3
        for s in clean.nonzero().flatten().tolist():
            real = pair.shard["clean"][pair.row, lay.latent[s]].float()
            assert torch.equal(states[:, s], real.expand(5, -1, -1, -1))


def test_causal_pairs_pass_the_check_and_are_not_confused(files, causal_pairs, tmp_path, capsys):
    """--check knows them; a run with other blocks, or another teacher, does not take them."""
    stage1(files, tmp_path, check=True)
    assert "6 pairs of 1 entries are good" in capsys.readouterr().out
    for changes, says in (
        ({"anchors": 2}, "anchors is 3, not 2"),
        ({"share_noise": "all"}, "share_noise is 'none', not 'all'"),
        ({"teacher": files["weights"]}, "teacher is '"),
    ):
        with pytest.raises(UserError, match=says):
            stage1(files, tmp_path, **changes)
    with pytest.raises(UserError, match="holds 6 clips; use --pairs 6"):
        stage1(files, tmp_path, generate=True, pairs=7, data=str(tmp_path / "pairs"))


def test_pairs_of_clips_that_were_encoded_again_are_made_again(
    files, causal_pairs, tmp_path, capsys
):
    """Another VAE under the same folder: no pair keeps the old latents; then nothing is to make."""
    shutil.copytree(files["folder"] / "pairs", tmp_path / "pairs")
    shutil.copytree(files["clips"], tmp_path / "clips")
    for path in (tmp_path / "clips").glob("*.safetensors"):
        tensors, made = read_tensors(path)
        write_safetensors(path, {"latents": -tensors["latents"]}, made | {"vae": "another"})
    changes = {"generate": True, "data": str(tmp_path / "pairs"), "clips": str(tmp_path / "clips")}
    stage1(files, tmp_path, **changes)
    assert capsys.readouterr().out.count("is made again: clips is '") == 2
    stage1(files, tmp_path, **changes)
    assert "0 to make" in capsys.readouterr().out


def test_causal_pairs_with_a_dummy(files, tmp_path):
    """P = 0: the dummy's latents stand for the first ones, and have noise of their own."""
    stage1(files, tmp_path, generate=True, anchors=0, data=str(tmp_path / "pairs"))
    stage1(files, tmp_path, check=True, anchors=0, data=str(tmp_path / "pairs"))
    tensors = read_tensors(tmp_path / "pairs" / "pairs-000000.safetensors")[0]
    assert tensors["plan1"].shape == (3, 5, 9, 2, 4, 4)
    assert rows(stage1(files, tmp_path, anchors=0, data=str(tmp_path / "pairs")))[-1]["step"] == 2


METHODS = {"causal": causal_ode, "cd": consistency}


@pytest.mark.parametrize("name", METHODS)
def test_causal_runs_resume_exactly(name, files, causal_pairs, tmp_path):
    """2 + 2 steps are 4, bit for bit: weights, optimiser, log, and the average of consistency."""
    stage1(files, tmp_path / "b", steps=2, script=METHODS[name], decay=0.0)
    a, b = (stage1(files, tmp_path / x, steps=4, script=METHODS[name], decay=0.0) for x in "ab")
    assert same(saved(a), saved(b)) and apart(a, b) == 0 and rows(a) == rows(b)
    assert any(k.startswith("ema") for k in saved(a)) == (name == "cd")


def test_teacher_run_resumes_exactly_and_learns(files, tmp_path):
    """2 + 2 steps are 4; 120 steps on four clips halve the loss in both directions."""
    flags = {k: files[k] for k in TEACHER_FLAGS}
    for folder, steps in (("b", 2), ("a", 4), ("b", 4)):
        ar_teacher.main(
            ar_teacher.Config(**flags, out=str(tmp_path / folder), steps=steps, decay=0.0, warmup=2)
        )
    assert (
        same(saved(tmp_path / "a"), saved(tmp_path / "b"))
        and apart(tmp_path / "a", tmp_path / "b", "teacher") == 0
    )
    ar_teacher.main(ar_teacher.Config(**flags, out=str(tmp_path / "c"), steps=120, lr=5e-3))
    log = rows(tmp_path / "c")
    for direction in ("forward", "backward"):
        first, last = (sum(r[direction] for r in part) / 15 for part in (log[:15], log[-15:]))
        assert last < first / 2, (direction, first, last)


def test_a_teachers_vae_is_read_before_its_training(files, tmp_path, monkeypatch, capsys):
    """Its sheet comes last; a VAE that is not there is named first, and nothing is trained."""
    flags = {k: files[k] for k in ("weights", "clips", "latent", "plans")}
    flags |= {"vae": "nowhere.safetensors", "out": tmp_path / "ar", "steps": 1}
    code, error = command_line(monkeypatch, capsys, ar_teacher, **flags)
    assert code == 2 and "nowhere.safetensors does not exist" in error
    assert not (tmp_path / "ar").exists()


def test_average_of_consistency_follows_the_student(files, tmp_path):
    """Decay 0 is the student itself after each step; decay 1 stays what it was: the losses differ
    from step 1 on. It is the average that is handed on."""
    still, moving = (stage1(files, tmp_path / str(ema), consistency, ema=ema) for ema in (1.0, 0.0))
    a, b = rows(still), rows(moving)
    assert a[0] == b[0] and a[1]["forward"] != b[1]["forward"]
    start = read_tensors(files["weights"])[0]
    written, state = read_tensors(still / "student.safetensors")[0], saved(still)
    assert all(torch.equal(written[k], start[k]) for k in start)  # decay 1: never moved
    assert any(not torch.equal(state[f"dit/{k}"], start[k]) for k in start)  # the student did
    written = read_tensors(moving / "student.safetensors")[0]
    assert all(torch.equal(written[k], saved(moving)[f"dit/{k}"]) for k in start)


@pytest.mark.xdist_group("torchrun")  # one at a time: each starts three processes
def test_two_processes_equal_one(files, causal_pairs, tmp_path):
    """Teacher, causal pairs, both students, by ddp and fsdp: what two processes make is what one
    makes, to 1e-5."""
    flags = {k: files[k] for k in TEACHER_FLAGS}
    ode = {k: v for k, v in flags.items() if k != "vae"} | {
        "teacher": files["teacher"],
        "data": str(files["folder"] / "pairs"),
        "steps": 3,
        "warmup": 2,
        "lr": 1e-3,
    }
    made = {"data": str(tmp_path / "pairs"), "pairs": 6, "shard": 3, "generate": True}
    two_processes(
        tmp_path,
        ("zoo.ar_teacher", flags | {"out": str(tmp_path / "ar"), "steps": 2}),
        ("zoo.causal_ode", ode | {"out": str(tmp_path / "pairs-run")} | made),
        ("zoo.causal_ode", ode | {"out": str(tmp_path / "causal"), "parallel": "fsdp"}),
        ("zoo.consistency", ode | {"out": str(tmp_path / "cd"), "parallel": "fsdp"}),
    )
    assert apart(tmp_path / "ar", files["folder"] / "ar", "teacher") <= 1e-5
    for path in (tmp_path / "pairs").iterdir():
        assert path.read_bytes() == (files["folder"] / "pairs" / path.name).read_bytes()
    for name, script in METHODS.items():
        assert apart(stage1(files, tmp_path / f"one-{name}", script), tmp_path / name) <= 1e-5


def test_consistency_takes_no_pairs(files, tmp_path, monkeypatch, capsys):
    """One sentence, exit code 2; and a teacher that is not there is named."""
    usual = {"clips": files["clips"], "latent": LATENT, "weights": files["weights"]}
    usual |= {"out": tmp_path, "plans": "paper"}
    for flags, says in (
        ({"generate": "true"}, "has no pairs: leave out --generate"),
        ({"teacher": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
    ):
        code, error = command_line(monkeypatch, capsys, consistency, **usual | flags)
        assert code == 2 and says in error


def test_one_block_a_latent(files, tmp_path):
    """Frame-wise (B = 1): teacher, pairs and student with the flags of that preset."""
    flags = {k: files[k] for k in TEACHER_FLAGS} | {
        "block": 1,
        "anchors": 1,
    }
    ar_teacher.main(ar_teacher.Config(**flags, out=str(tmp_path / "ar"), steps=1))
    changes = {
        "block": 1,
        "anchors": 1,
        "teacher": str(tmp_path / "ar" / "teacher.safetensors"),
        "data": str(tmp_path / "pairs"),
    }
    stage1(files, tmp_path, generate=True, **changes)
    assert rows(stage1(files, tmp_path, **changes))[-1]["step"] == 2
