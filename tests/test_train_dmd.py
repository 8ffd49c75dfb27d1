"""Stage 2: the gradient is the paper's and moves samples to the teacher's; processes, batches and
interruptions change nothing."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from tiny import (
    ROOT,
    apart,
    at_call,
    command_line,
    crash,
    distance,
    randn,
    rows,
    same,
    saved,
    terminate,
    tiny_checkpoints,
    tiny_dit,
    two_processes,
)
from torch import nn

import anchors
import sampler
import train_dmd
from dit import DiT, load_dit, save_dit
from lib.common import Stream, UserError
from lib.noise import noise_from
from lib.recipe import Recipe
from lib.tensors import read_tensors
from lib.text import Prompts
from lib.training import split_batch
from plans import any_mix, paper_mix, without_given
from sampler import generate
from train_dmd import (
    Config,
    Score,
    World,
    critic_loss,
    dmd_gradient,
    dmd_loss,
    draw_round,
    main,
    noised,
    scores,
)

LATENT = (6, 4, 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The flags of a tiny run: 4 iterations, of which the first and the third update the student;
    no sheets."""
    paths = tiny_checkpoints(tmp_path_factory.mktemp("dmd"))
    return {
        **paths,
        "critic": paths["teacher"],
        "latent": LATENT,
        "plans": "paper",
        "steps": 4,
        "ratio": 2,
        "batch": 4,
        "lr": 1e-3,
        "lr_critic": 2e-3,
        "ema_start": 2,
        "ema": 0.5,
        "sheet_every": 0,
        "dtype": "float32",
    }


def train(files, out, *others, **changes):
    """Train in this process; the folder it wrote. others: `main`'s generate and mix."""
    with suppress(SystemExit):  # stopped by a signal
        main(Config(**files | {"out": str(out)} | changes), *others)
    return out


EVERY = {"latent": (15, 4, 4), "plans": "any", "batch": 2, "steps": 8}


# ---------------------------------------------------------------- the losses, by hand
class Known(nn.Module):
    """Answers one velocity where the prompt is 1 and another where it is 0, and remembers what it
    was shown."""

    def __init__(self, cond, uncond=None):
        super().__init__()
        self.cond, self.uncond, self.calls = cond, uncond, []

    def forward(self, x, t, prompt, pos):
        self.calls.append((x, t, prompt, pos))
        yes = prompt.mean((1, 2)).view(-1, 1, 1, 1, 1)
        return (yes * self.cond + (1 - yes) * (self.uncond or 0)).expand_as(x)


def video(*samples):
    """Each sample: one latent of one channel and 1 x 2 cells."""
    return torch.tensor(samples).view(len(samples), 1, 1, 1, 2)


PROMPT = torch.ones(2, 1, 1)


def test_noise_levels_by_hand():
    """u = 0, .5, 1 with shift 5 are .02, .8333, .98 (clamped, not 0 and 1); every latent of a
    sample has the level of the sample."""
    x, noise = torch.ones(3, 2, 1, 1, 1), torch.full((3, 2, 1, 1, 1), 11.0)
    xt, sigma, t = noised(x, torch.tensor([0.0, 0.5, 1.0]), noise, 5.0)
    assert sigma.flatten().tolist() == pytest.approx([0.02, 5 / 6, 0.98])
    assert t.tolist() == [pytest.approx([s] * 2, rel=1e-6) for s in (20, 2500 / 3, 980)]
    assert xt.flatten().tolist() == pytest.approx([1.2, 1.2, 1 + 25 / 3, 1 + 25 / 3, 10.8, 10.8])
    assert noised(x, torch.tensor([0.0, 0.5, 1.0]), noise, 1.0)[
        1
    ].flatten().tolist() == pytest.approx([0.02, 0.5, 0.98])


def asked(noise, guidance=2.0, shift=1.0):
    """A score at sigma .5, of two samples whose prompt is 1."""
    return Score(torch.full((2,), 0.5), noise, PROMPT, torch.zeros(1, 1, 1), guidance, shift)


def test_scores_and_dmd_gradient_by_hand():
    """At sigma .5: v_real = 3 + 2 (1 - 3) = -1, so x_real = xt + .5; v_fake = -3, so x_fake = xt +
    1.5; their difference is 1.

    Sample 0: x = 2, 4, noise 2, xt = 2, 3, x_real = 2.5, 3.5: mean |x - x_real| = .5, gradient 2.
    Sample 1: x = 12, 14, noise 20, xt = 16, 17, x_real = 16.5, 17.5: mean 4, gradient .25."""
    teacher, critic = Known(1.0, 3.0), Known(-3.0, 1000.0)
    x, noise = video([2.0, 4.0], [12.0, 14.0]), video([2.0, 2.0], [20.0, 20.0])
    x.requires_grad_()
    x_real, x_fake = scores(teacher, critic, x, asked(noise))
    assert x_real.flatten().tolist() == [2.5, 3.5, 16.5, 17.5]
    assert x_fake.flatten().tolist() == [3.5, 4.5, 17.5, 18.5]
    assert not x_real.requires_grad and not x_fake.requires_grad
    g = dmd_gradient(x.detach(), x_real, x_fake)
    assert g.flatten().tolist() == pytest.approx([2, 2, 0.25, 0.25], abs=1e-5)
    ((xt, t, _, pos),) = critic.calls
    assert xt.flatten().tolist() == [2, 3, 16, 17]
    assert t.tolist() == [[500], [500]] and pos.tolist() == [0]
    # one noisy video for all three passes
    assert torch.equal(teacher.calls[0][0], torch.cat([xt, xt]))


def test_guidance_of_one_is_none():
    """w = 1 is the conditional velocity, w = 0 the unconditional: x_real = xt - .5 v."""
    for w, v in ((1.0, 1.0), (0.0, 3.0)):
        x = video([2.0, 4.0], [2.0, 4.0])
        x_real, x_fake = scores(Known(1.0, 3.0), Known(-3.0), x, asked(x, guidance=w))
        g = dmd_gradient(x, x_real, x_fake)
        assert g.flatten().tolist() == pytest.approx([(1.5 + 0.5 * v) / (0.5 * v)] * 4)


def test_gradient_of_the_loss_is_the_dmd_gradient():
    """d loss / dx, per sample, is the given direction over the number of elements; the value is
    half its mean square."""
    x, g = randn(0, 3, 4, 2, 2, 2).requires_grad_(), randn(1, 3, 4, 2, 2, 2)
    loss = dmd_loss(x, g)
    assert distance(loss, g.square().flatten(1).mean(1) / 2) <= 1e-6
    assert distance(torch.autograd.grad(loss.sum(), x)[0], g / 32) <= 1e-7


def test_critic_loss_by_hand():
    """x = 2, 4 and noise 2: the velocities are 0, -2; answering 1 errs by 1 and 9, mean 5. It sees
    the prompt and xt = 2, 3."""
    critic = Known(1.0)
    noise = video([2.0, 2.0], [2.0, 2.0])
    assert critic_loss(critic, video([2.0, 4.0], [4.0, 2.0]), asked(noise)).tolist() == [5, 5]
    ((xt, t, _, _),) = critic.calls
    assert xt.flatten().tolist() == [2, 3, 3, 2] and t.tolist() == [[500], [500]]


# ---------------------------------------------------------------- the gradient's way
@pytest.mark.parametrize("level", [0, 3])
def test_gradient_reaches_anchors_only_through_their_block(level):
    """Backward with anchors: the score of block 3-5 moves the noise of its anchors and targets at
    the exit level and nothing else; that of block 0-2, which reads 3-5 from the cache, moves its
    own noise only."""
    plan, dit, made = anchors.backward(6, 3, 3), tiny_dit().requires_grad_(), {}

    def noise(k, numbers):
        x = randn(len(made), 1, len(numbers), 4, 4, 2).requires_grad_()
        return made.setdefault((numbers, k), x)

    x = generate(dit, plan, [randn(5, 1, 5, 32)], noise, exit_at=lambda n: level)
    made = {key: n for key, n in made.items() if len(key[0]) > 1}  # (0,) only asks for the shape
    for step in plan.steps:
        counts = torch.tensor([float(i in step.targets) for i in range(6)]).view(1, 6, 1, 1, 1)
        loss = dmd_loss(x, randn(9, *x.shape) * counts).sum()
        grads = torch.autograd.grad(loss, list(made.values()), retain_graph=True, allow_unused=True)
        reached = {k: g for k, g in zip(made, grads) if g is not None and g.abs().max() > 0}
        assert reached.keys() == {(step.noise("none", level), level)}
        (g,) = reached.values()
        assert (g.flatten(2).abs().amax(2) > 0).all()  # every latent of it, anchors included


def test_updates_move_samples_to_the_teachers():
    """With scores that are exact (the teacher's videos are all `goal`, the critic knows the
    student's) 80 updates through the real rollouts of both directions bring the student's samples
    five times nearer to the goal."""

    class Point(nn.Module):
        def forward(self, x, t, prompt, pos):
            return (x - self.at.repeat(len(x) // len(self.at), 1, 1, 1, 1)) / (t / 1000)[
                ..., None, None, None
            ]

    teacher, critic, dit = Point(), Point(), tiny_dit().requires_grad_()
    goal = torch.tensor([1.0, -0.5, 0.2, 0.0]).view(1, 1, 4, 1, 1).expand(2, 6, 4, 4, 2)
    teacher.at, far = goal, []
    optimiser, prompt, u = (
        torch.optim.Adam(dit.parameters(), 1e-2, (0.0, 0.999)),
        randn(5, 2, 5, 32),
        torch.full((2,), 0.5),
    )
    for step in range(80):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / 80)
        for n, plan in enumerate((anchors.forward(6), anchors.backward(6, 3, 3))):
            noise = randn(100 + 2 * step + n, 4, 2, 12, 4, 4, 2)
            start = noise_from(noise[0], noise[1:])
            x = generate(dit, plan, [prompt], start, exit_at=lambda n, level=step % 4: level)
            critic.at = x.detach()
            at = Score(u, noise[0, :, :6], prompt, torch.zeros(1, 5, 32), 2.0, 5.0)
            g = dmd_gradient(x.detach(), *scores(teacher, critic, x.detach(), at))
            dmd_loss(x, g).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        far.append((x.detach() - goal).abs().mean().item())
    assert sum(far[-4:]) < sum(far[:4]) / 5, far


# ---------------------------------------------------------------- what an iteration draws
def world_of(files, mix, rounds=(range(4),), clips=None):
    """A process's view of a run."""
    source = Prompts("toy", 64, 12)
    nothing, device = source.embed([""]), torch.device("cpu")
    return World(Config(**files), mix, source, nothing, clips, 2, list(rounds), device)


def test_a_draw_does_not_depend_on_how_the_batch_is_shared(files):
    """Four samples in one process, in two rounds of two, or as two processes of two rounds of one:
    the same noise, levels, prompts and exits."""
    mix = paper_mix(6)
    world, plan = world_of(files, mix), mix[0][1][1]
    whole = draw_round(world, Stream.STUDENT, 3, range(4), plan, 1)
    for rank, processes, micro in ((0, 1, 2), (0, 2, 1), (1, 2, 1)):
        for own in split_batch(4, micro, rank, processes):
            part = draw_round(world, Stream.STUDENT, 3, own, plan, 1)
            assert part.exits == whole.exits and torch.equal(part.noise, whole.noise[:, own])
            for a, b in zip(part.score[:3], whole.score[:3]):
                assert torch.equal(a, b[own])


def test_each_draw_is_its_own(files):
    """Another iteration, role, plan or sample has other noise. All blocks of a
    rollout exit at one level, unless the first block has levels of its own."""
    mix = paper_mix(6)
    world = world_of(files, mix)
    draws = [
        draw_round(world, role, step, range(4), plan, d)
        for role in (Stream.STUDENT, Stream.CRITIC)
        for step in range(40)
        for d, plan in enumerate(mix[0][1])
    ]
    starts = torch.stack([x.noise[0].flatten() for x in draws])
    assert len(starts.unique(dim=0)) == len(draws)
    assert {x.exits for x in draws} == {(k, k) for k in range(4)}
    first, plan = world_of(files | {"first_denoising": (1000.0, 500.0)}, mix), mix[0][1][0]
    exits = {draw_round(first, Stream.STUDENT, n, range(4), plan, 0).exits for n in range(100)}
    assert exits == {(a, b) for a in range(2) for b in range(4)}


def test_a_draw_has_noise_for_dummies_and_anchors(files):
    """[levels, B, rows, C, h, w]: the video, the dummies, and as many rows again for anchors."""
    for P, rows_of_noise in ((3, 12), (0, 18)):
        mix = paper_mix(6, anchors=P)
        drawn = draw_round(world_of(files, mix), Stream.STUDENT, 0, range(4), mix[0][1][1], 1)
        assert drawn.noise.shape == (4, 4, rows_of_noise, 2, 4, 4)


def test_given_latents_are_of_the_prompts_clip(files):
    """A plan around a given clip: sample j shows clip n, is told caption n, and only given latents
    are handed over."""
    mix, clips = any_mix(15), [torch.full((15, 2, 4, 4), float(n)) for n in range(5)]
    entry = next(e for e, (_, plans) in enumerate(mix) if plans[-1].name == "before a clip")
    world = world_of(files | {"latent": (15, 4, 4)}, mix, clips=clips)
    plan = mix[entry][1][1]
    drawn = draw_round(world, Stream.STUDENT, 0, range(4), plan, 1)
    assert sorted(drawn.given) == sorted(i for step in plan.steps for i in step.given)
    for i in drawn.given:
        numbers = drawn.given[i][:, 0, 0, 0].int().tolist()
        assert torch.equal(drawn.score.prompt, world.source(numbers))
        assert drawn.given[i].shape == (4, 2, 4, 4)


# ---------------------------------------------------------------- the script
def test_critic_learns_one_prompt(files, tmp_path):
    """With a still student the critic's loss falls, in both directions, to less than half of where
    it began, at the paper's levels: at lower ones most of it is noise that nobody can tell."""
    (tmp_path / "prompts.txt").write_text("a red square moves left over a green wave\n")
    log = rows(
        train(
            files,
            tmp_path / "run",
            prompts=str(tmp_path / "prompts.txt"),
            shift=5.0,
            steps=60,
            ratio=60,
            lr=0.0,
            lr_critic=1e-2,
            batch=2,
        )
    )
    for name in ("critic_forward", "critic_backward"):
        first, last = (sum(r[name] for r in part) / len(part) for part in (log[:5], log[-20:]))
        assert last < first / 2, (name, first, last)


def test_log_curves_and_sheets(files, tmp_path):
    """Every iteration logs the critic, every `ratio`-th also the student; curves and sheets are
    PNGs, the first and the last included."""
    train(files, tmp_path, steps=4, sheet_every=2)
    critic = {"step", "latents", "critic_forward", "critic_backward", "norm_critic"}
    student = {"dmd_forward", "dmd_backward", "norm_student", "motion_forward", "motion_backward"}
    log = rows(tmp_path)
    assert [r["step"] for r in log] == [0, 1, 2, 3] and [r.keys() - critic for r in log] == [
        student,
        set(),
        student,
        set(),
    ]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "curves.png",
        "sheet-00000.png",
        "sheet-00002.png",
        "sheet-00004.png",
    ]
    assert all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for p in tmp_path.glob("*.png"))
    assert load_dit(tmp_path).config == load_dit(files["teacher"]).config


def test_each_iteration_draws_anew(files, tmp_path):
    """With still networks, losses and DMD gradients differ from step to step and from seed to seed,
    and only so."""
    still = files | {"lr": 0.0, "lr_critic": 0.0, "ratio": 1, "steps": 2}
    a, b, c = (
        rows(train(still, tmp_path / name, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert a == b and all(
        len({r[k] for r in a + c}) == 4
        for k in ("critic_forward", "critic_backward", "dmd_forward", "dmd_backward")
    )


def test_a_student_remembers_its_recipe(files, tmp_path, capsys):
    """Levels, those of the first block, shift, block, anchors, head, noise rule and mix lie in the
    checkpoint; one that is trained on otherwise is told so, flag by flag."""
    changes = {"denoising": (1000.0, 500.0), "first_denoising": (1000.0, 750.0), "anchors": 2}
    train(files, tmp_path, steps=1, share_noise="start", shift=3.0, **changes)
    made = Recipe.read(load_dit(tmp_path / "student.safetensors").recipe)
    assert made == Recipe((1000.0, 500.0), (1000.0, 750.0), 3.0, 3, 2, 0, "start", "paper")
    assert "note:" not in capsys.readouterr().out  # what it began from says nothing of itself
    again = files | {"student": str(tmp_path / "student.safetensors")}
    train(again, tmp_path / "on", steps=1, share_noise="start", **changes | {"anchors": 3})
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert notes == [
        "note: --shift 1.0, but this student was trained with 3.0",
        "note: --anchors 3, but this student was trained with 2",
    ]


def test_another_method_brings_its_rollout_and_plans(files, tmp_path):
    """main(config, generate, mix): what stage 2 samples with, and by which plans, is handed in."""
    plan, seen = anchors.inbetween(9), []

    def mine(dit, plan, texts, noise, **options):
        seen.append(plan.name)
        return sampler.generate(dit, plan, texts, noise, **options)

    train(files, tmp_path, mine, ((1.0, (plan,)),), latent=(9, 4, 4), steps=3)
    assert seen == ["inbetween"] * 5  # two of the student's, three of the critic's
    assert rows(tmp_path)[0].keys() >= {"dmd_inbetween", "critic_inbetween", "motion_inbetween"}


def test_a_sheet_is_of_plans_that_are_given_nothing(files, tmp_path, monkeypatch):
    """A mix that begins with plans around a clip: the sheet shows another entry, and if there is
    none, clips 0 and 1 are given."""
    around = next(plans for _, plans in any_mix(15) if plans[-1].name == "before a clip")
    flags = files | {"latent": (15, 4, 4), "steps": 1, "batch": 1, "sheet_every": 1}
    flags |= in_place_of_clips(monkeypatch)
    for name, mix in (
        ("some", ((0.5, around), (0.5, (anchors.forward(15),)))),
        ("all", ((1.0, around),)),
    ):
        assert (train(flags, tmp_path / name, sampler.generate, mix) / "sheet-00001.png").exists()
    with pytest.raises(UserError, match="all plans are around given clips: use --clips"):
        train(flags | {"clips": ""}, tmp_path / "none", sampler.generate, mix)


def in_place_of_clips(monkeypatch):
    """Clips without a folder: six random ones."""
    made = [randn(n, 15, 2, 4, 4) for n in range(6)]
    monkeypatch.setattr(train_dmd, "Clips", lambda *_: made)
    return {"clips": "here"}


def test_every_plan_is_trained(files, tmp_path, monkeypatch):
    """--plans any: the iterations draw entries of the mix, and log all plans of theirs by name."""
    flags = files | EVERY | in_place_of_clips(monkeypatch) | {"steps": 60, "ratio": 1, "batch": 1}
    log, mix = rows(train(flags, tmp_path)), any_mix(15)
    names = [{plan.name for plan in plans} for _, plans in mix]
    for r in log:
        losses = {k.removeprefix("critic_") for k in r if k.startswith("critic_")}
        assert losses in names and {f"dmd_{name}" for name in losses} <= r.keys()
    trained = [{k.removeprefix("critic_") for k in r if k.startswith("critic_")} for r in log]
    assert all(some in trained for some in names)
    assert {r["latents"] for r in log} == {plans[0].length for _, plans in mix}


def test_plans_around_clips_need_clips(files, tmp_path, capsys):
    """Without --clips they are left out, and that is said."""
    log = rows(train(files | EVERY, tmp_path, steps=30, batch=1, ratio=30))
    assert "plans around given clips are left out: they need --clips" in capsys.readouterr().out
    assert not any("clip" in key for r in log for key in r)
    free = without_given(any_mix(15))
    assert {r["latents"] for r in log} <= {plans[0].length for _, plans in free}


def test_resume_is_exact_on_every_plan(files, tmp_path, monkeypatch):
    """So it is where each iteration draws its plans: 4 + 4 iterations are 8."""
    flags = files | EVERY | in_place_of_clips(monkeypatch)
    a, b = train(flags, tmp_path / "a"), train(flags, tmp_path / "b", steps=4)
    train(flags, b)
    assert same(saved(a), saved(b)) and apart(a, b) == 0 and rows(a) == rows(b)
    assert len({r["latents"] for r in rows(a)}) > 1


def test_student_is_the_average_from_ema_start_on(files, tmp_path):
    """Before ema_start the average is the weights; then ema * average + (1 - ema) * weights at each
    update of the student."""
    first = saved(train(files, tmp_path / "run", steps=2))
    last = saved(train(files, tmp_path / "run"))
    got = read_tensors(tmp_path / "run" / "student.safetensors")[0]
    for name, w in got.items():
        assert torch.equal(first[f"ema0/{name}"], first[f"student0/{name}"])
        assert distance(w, (first[f"student0/{name}"] + last[f"student0/{name}"]) / 2) <= 1e-7
    assert any(not torch.equal(last[f"ema0/{k}"], last[f"student0/{k}"]) for k in got)


@pytest.mark.xdist_group("torchrun")  # one at a time: each starts three processes
def test_two_processes_equal_one(files, tmp_path):
    """2 processes, ddp or fsdp, have the weights of 1 to 1e-5; a signal to one of them stops both,
    and what they saved goes on."""
    flags = files | {"steps": 3}
    two_processes(
        tmp_path,
        ("train_dmd", flags | {"out": str(tmp_path / "ddp")}),
        (
            "train_dmd",
            flags | {"out": str(tmp_path / "fsdp"), "parallel": "fsdp", "sheet_every": 9},
        ),
        ("train_dmd", flags | {"out": str(tmp_path / "stopped"), "sigterm_in_step_0": True}),
        timeout=60,
    )
    one = train(flags, tmp_path / "one")
    for name in ("ddp", "fsdp"):
        assert apart(one, tmp_path / name) <= 1e-5
        a, b = saved(one), saved(tmp_path / name)
        assert (
            a.keys() == b.keys()
            and max(
                distance(a[k], b[k])
                for k in a
                if k.startswith(("student", "critic", "ema")) and "optimiser" not in k
            )
            <= 1e-5
        )
    assert saved(tmp_path / "stopped")["step"] == 1
    assert apart(one, train(flags, tmp_path / "stopped")) <= 1e-5


@pytest.mark.xdist_group("torchrun")  # one at a time: each starts three processes
def test_two_processes_equal_one_on_every_plan(files, tmp_path):
    """All processes draw the same entry, so the mix changes nothing."""
    flags = files | EVERY
    two_processes(
        tmp_path,
        ("train_dmd", flags | {"out": str(tmp_path / "ddp")}),
        ("train_dmd", flags | {"out": str(tmp_path / "fsdp"), "parallel": "fsdp"}),
    )
    one = train(flags, tmp_path / "one")
    assert len({r["latents"] for r in rows(one)}) > 1
    assert apart(one, tmp_path / "ddp") <= 1e-5 and apart(one, tmp_path / "fsdp") <= 1e-5


@pytest.mark.xdist_group("torchrun")  # one at a time: each starts three processes
def test_shared_rounds_do_not_depend_on_the_number_of_processes(files, tmp_path):
    """With --micro 1 as in the wan preset, 2 processes of 2 rounds have the weights of 1 process of
    4 rounds."""
    flags = files | {"steps": 2, "micro": 1}
    two_processes(tmp_path, ("train_dmd", flags | {"out": str(tmp_path / "two")}))
    assert apart(train(flags, tmp_path / "one"), tmp_path / "two") <= 1e-5


def test_resume_is_exact(files, tmp_path):
    """2 + 2 steps are 4 steps, bit for bit: weights, averages, optimisers and log."""
    a, b = train(files, tmp_path / "a"), train(files, tmp_path / "b", steps=2)
    train(files, b)
    assert same(saved(a), saved(b)) and apart(a, b) == 0 and rows(a) == rows(b)
    assert {k.split("/")[0] for k in saved(a)} == {
        "step",
        "networks",
        "ema0",
        "student0",
        "student0.optimiser",
        "critic0",
        "critic0.optimiser",
    }


def test_resume_under_fsdp(files, tmp_path):
    """A run may go on under another --parallel, averages included."""
    a, b = train(files, tmp_path / "a"), train(files, tmp_path / "b", steps=2)
    assert apart(a, train(files, b, parallel="fsdp")) <= 1e-6


@pytest.mark.parametrize(
    "setting",
    [
        {"anchors": 2},
        {"seed": 5},
        {"batch": 2},
        {"commit_anchors": True},
    ],
)
def test_resume_with_other_settings_is_refused(setting, files, tmp_path):
    """A state of another run is not continued; the sentence names the setting."""
    train(files, tmp_path, steps=1)
    (name,) = setting
    with pytest.raises(UserError, match=rf"other settings \({name}="):
        train(files, tmp_path, **setting)


def test_sigterm_in_a_step(files, tmp_path, monkeypatch):
    """SIGTERM in step 1: the step is finished, logged and saved; resumed, the run is what it would
    have been."""
    at_call(monkeypatch, train_dmd, "critic_loss", 3, terminate)  # two calls a step
    b = train(files, tmp_path / "b")
    assert saved(b)["step"] == 2 and len(rows(b)) == 2 and not (b / "student.safetensors").exists()
    a = train(files, tmp_path / "a")
    train(files, b)
    assert same(saved(a), saved(b)) and apart(a, b) == 0 and rows(a) == rows(b)


def test_sigterm_as_a_user_sends_it(files, tmp_path):
    """kill: the process saves and exits with 0; resumed for two more steps it is bit-equal to a run
    that was never stopped."""
    out = tmp_path / "b"
    words = [
        str(w)
        for k, v in (files | {"out": out, "steps": 5000}).items()
        for w in (f"--{k}", *(v if isinstance(v, tuple) else (v,)))
    ]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train_dmd.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        deadline = time.time() + 60
        while (
            not (out / "log.jsonl").exists() and process.poll() is None and time.time() < deadline
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    done = saved(out)["step"]
    assert (
        process.returncode == 143
        and f"stopped at step {done}; run the same command to go on" in said
        and (out / "curves.png").exists()
    )
    a = train(files, tmp_path / "a", steps=done + 2)
    train(files, out, steps=done + 2)
    assert same(saved(a), saved(out)) and rows(a) == rows(out)


def test_a_killed_run_logs_each_step_once(files, tmp_path, monkeypatch):
    """Killed in step 3 with a state of 2 steps, the run does step 2 again; its row stands in the
    log once."""
    at_call(monkeypatch, train_dmd, "critic_loss", 7, crash)
    with pytest.raises(MemoryError):
        train(files, tmp_path, save_every=2)
    assert saved(tmp_path)["step"] == 2
    assert [r["step"] for r in rows(train(files, tmp_path, save_every=2))] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"anchors": 0},
        {"latent": (9, 4, 4), "block": 6, "anchors": 0, "head": 3},
        {"commit_anchors": True},
        {"shared_critic": False},
        {"anchors": 1},
        {"denoising": (1000.0, 500.0)},
        {"block": 1, "anchors": 1},
        {"denoising": (1000.0,), "first_denoising": (1000.0, 750.0, 500.0, 250.0)},
        {"share_noise": "start"},
        {"share_noise": "all"},
        {"plans": "any"},
    ],
    ids=str,
)
def test_ablations_run_and_change_the_result(changes, files, tmp_path):
    """Every ablation trains, and is no dead flag. (9 latents: in a rollout of two blocks nobody
    reads committed anchors' traces.)"""
    usual = {"latent": (9, 4, 4), "steps": 3, "seed": 5}  # whose first entry is not the paper's
    a, b = train(files, tmp_path / "a", **usual), train(files, tmp_path / "b", **usual | changes)
    assert 0 < apart(a, b) < 1
    assert any(k.startswith("critic1/") for k in saved(b)) == (changes == {"shared_critic": False})


def test_two_students_are_two_files(files, tmp_path):
    """shared_student false: forward.safetensors and backward.safetensors, each trained in its own
    direction, resumable."""
    train(files, tmp_path / "b", shared_student=False, steps=2)
    b = train(files, tmp_path / "b", shared_student=False)
    a = train(files, tmp_path / "a", shared_student=False)
    assert sorted(p.name for p in a.glob("*.safetensors")) == [
        "backward.safetensors",
        "forward.safetensors",
    ] and same(saved(a), saved(b))
    x, y, start = (
        load_dit(p)
        for p in (a / "forward.safetensors", a / "backward.safetensors", files["student"])
    )
    for one, other in ((x, y), (x, start), (y, start)):
        assert distance(one.state_dict().values(), other.state_dict().values()) > 0


def test_bfloat16_takes_the_same_steps(files, tmp_path):
    """Autocast reuses no cast made without gradient: every weight moves, on the whole as in
    float32, and resume stays exact."""
    start = read_tensors(files["student"])[0]
    runs = [
        read_tensors(train(files, tmp_path / kind, dtype=kind, steps=1) / "student.safetensors")[0]
        for kind in ("float32", "bfloat16")
    ]
    steps = [{k: run[k] - start[k] for k in start} for run in runs]
    assert [k for k in start if steps[0][k].abs().max() and not steps[1][k].abs().max()] == []
    assert (
        torch.nn.functional.cosine_similarity(
            *(torch.cat([v.flatten() for v in x.values()]) for x in steps), dim=0
        )
        > 0.9
    )
    halves = train(files, tmp_path / "halves", dtype="bfloat16", steps=1)
    train(files, halves, dtype="bfloat16", steps=2)
    assert same(saved(halves), saved(train(files, tmp_path / "whole", dtype="bfloat16", steps=2)))


def test_recomputing_activations_changes_nothing(files, tmp_path):
    """--checkpointing costs time and saves memory, no more."""
    assert (
        apart(train(files, tmp_path / "a"), train(files, tmp_path / "b", checkpointing=True))
        <= 1e-6
    )


@pytest.mark.parametrize("how", [{}, {"parallel": "fsdp", "checkpointing": True}])
def test_compiling_changes_nothing(how, files, tmp_path, monkeypatch):
    """--compile costs minutes and saves time, no more; states go on across it. (Traced only:
    generating code needs a compiler.)"""
    monkeypatch.setattr(DiT.compile_blocks, "__defaults__", ("eager",))
    flags = files | {"lr": 1e-4, "lr_critic": 1e-4} | how
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    slow, fast = (train(flags, tmp_path / str(c), compile=c, steps=1) for c in (False, True))
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] > 4
        and not torch._dynamo.utils.counters["graph_break"]
    )
    assert apart(slow, fast) <= 1e-6
    assert (
        apart(train(flags, slow, compile=True, steps=2), train(flags, fast, compile=False, steps=2))
        <= 1e-6
    )


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_rounds_equal_one_batch(micro, files, tmp_path):
    """--micro is a matter of memory: a batch in rounds gives the weights of a batch at once."""
    flags = files | {
        "steps": 3,
        "lr": 1e-4,
        "lr_critic": 1e-4,
    }  # small: Adam turns rounding into steps of up to lr
    a, b = train(flags, tmp_path / "a"), train(flags, tmp_path / "b", micro=micro)
    assert apart(a, b) <= 1e-6
    for x, y in zip(
        rows(a), rows(b), strict=True
    ):  # Adam forgives a wrong scale; the logged gradient norms do not
        assert x == pytest.approx(y, rel=1e-4)


# ---------------------------------------------------------------- numbers that are not finite
def poisoned(path, to):
    """A copy of a checkpoint with one NaN."""
    dit = load_dit(path)
    dit.head.head.weight[0, 0] = float("nan")
    save_dit(dit, to)
    return str(to)


@pytest.mark.parametrize("name", ["teacher", "critic", "student"])
def test_nan_in_weights_stops_training(name, files, tmp_path, monkeypatch, capsys):
    """One NaN in any network: exit code 2, and one line with the file and the tensor, before
    anything is computed of it."""
    bad = poisoned(files[name], tmp_path / "bad.safetensors")
    code, error = command_line(
        monkeypatch, capsys, train_dmd, **files | {"out": tmp_path / "run", name: bad}
    )
    assert code == 2 and "bad.safetensors: the weights head.head.weight hold NaN" in error
    assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize(
    "term, call, says",
    [
        ("dmd_gradient", 3, "step 2: the DMD gradient is dmd_forward nan, "),
        ("critic_loss", 6, "step 2: the critic's loss is critic_forward "),
        ("dmd_loss", 3, "step 2, student: the gradient has norm nan"),
    ],
)
def test_nan_later_leaves_the_saved_state_good(
    term, call, says, files, tmp_path, monkeypatch, capsys
):
    """A NaN in step 2 names the term; the state of step 2 is what it was, and the run can go on
    from it to the usual end."""
    real, calls = getattr(train_dmd, term), []

    def broken(*args):
        calls.append(1)
        x, factor = real(*args), torch.ones(4)
        factor[2] = float("nan") if len(calls) == call else 1.0
        return x * factor.view(-1, *[1] * (x.ndim - 1))

    with monkeypatch.context() as patch:
        patch.setattr(train_dmd, term, broken)
        code, error = command_line(
            patch, capsys, train_dmd, **files | {"out": tmp_path / "b", "save_every": 2}
        )
    assert code == 1 and says in error and saved(tmp_path / "b")["step"] == 2
    assert ("through sample 2;" in error) == (term != "dmd_loss")
    a, b = train(files, tmp_path / "a"), train(files, tmp_path / "b")
    assert same(saved(a), saved(b))


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"parallel": "ddq"}, "--parallel 'ddq' must be"),
        ({"micro": 3}, "--batch 4 is not a"),
        ({"latent": (6, 4)}, "--latent takes 3 numbers"),
        ({"block": 4}, "6 latents"),
        ({"anchors": 4}, "4 anchors do not fit"),
        ({"teacher": "nowhere.safetensors"}, "does not exist"),
        ({"plans": "all"}, "--plans 'all' must be paper or any"),
        ({"denoising": (250.0, 500.0)}, "250.0 500.0 must fall"),
        ({"first_denoising": (0.0,)}, "--first_denoising 0.0 must be from 0.001"),
        ({"vae": "nowhere.safetensors", "sheet_every": 2}, "nowhere.safetensors does not exist"),
        ({"share_noise": "some"}, "--share_noise 'some' must be none or start or all"),
    ],
)
def test_impossible_settings_are_refused(flags, says, files, tmp_path, monkeypatch, capsys):
    """A mistake is named before anything is written, with exit code 2."""
    code, error = command_line(
        monkeypatch, capsys, train_dmd, **files | {"out": tmp_path / "run"} | flags
    )
    assert code == 2 and says in error and not (tmp_path / "run").exists()
