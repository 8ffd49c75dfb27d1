"""Stage 1: the loss is the paper's, and processes, batches, interruptions change nothing."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import (
    WORDED,
    apart,
    at_call,
    command_line,
    crash,
    distance,
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
import train_ode
from anchors import layout
from dit import DiT, load_dit, save_dit
from lib.common import UserError
from lib.weights import read_tensors, write_safetensors
from mixes import any_mix
from sampler import Recipe
from train_ode import Config, main, mean_over, ode_loss, rate, recipe_of, scored_slots

LATENT = (6, 4, 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tiny checkpoints and six pairs in three shards, for the paper's two plans."""
    folder = tmp_path_factory.mktemp("ode")
    paths = tiny_checkpoints(folder)
    made = {
        "teacher": paths["teacher"],
        "weights": paths["student"],
        "data": str(folder / "pairs"),
        "latent": LATENT,
        "plans": "paper",
        "pairs": 6,
        "shard": 2,
        "dtype": "float32",
        "decay": 0.0,
    }
    main(Config(**made, generate=True))
    return made


def train(files, out, **changes):
    """Train in this process; the folder it wrote."""
    flags = {"out": str(out), "steps": 3, "batch": 4, "warmup": 2, "lr": 1e-3}
    with suppress(SystemExit):  # stopped by a signal
        main(Config(**files | flags | changes))
    return out


@pytest.fixture(scope="module")
def every(files, tmp_path_factory):
    """The flags of a run on every kind of plan, and its pairs: 15 latents, a shard a pair."""
    data = str(tmp_path_factory.mktemp("every") / "pairs")
    made = files | {"data": data, "latent": (15, 4, 4), "plans": "any", "pairs": 24, "shard": 1}
    main(Config(**made, generate=True))
    return made


# ---------------------------------------------------------------- the loss, by hand
class Constant(nn.Module):
    """Predicts the velocities it is given and remembers what it was shown."""

    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, x, t, prompt, pos, visible):
        self.x, self.t, self.pos = x, t, pos
        return self.v.expand_as(x)


# one channel of 1 x 2 cells; latent i is 20 + i at sigma 1, 10 + i at sigma .5 and i at the end,
# so v = 20 is exact
STATES = (
    (torch.tensor([20.0, 10.0, 0.0])[:, None] + torch.arange(6.0))
    .view(1, 3, 6, 1, 1, 1)
    .expand(1, 3, 6, 1, 1, 2)
)
LEVELS = torch.tensor([1.0, 0.5, 0.0])


def by_hand(plan, *levels, v=(18.0, 20.0), **options):
    """ode_loss of a network that answers v, for each list of levels one sample. v = 18 errs by 2
    sigma in one of two cells, so a slot's mean square is 2 at sigma 1 and .5 at sigma .5."""
    dit = Constant(torch.tensor(v))
    lay = layout(plan)
    states = STATES[:, :, [i if i >= 0 else ~i for i in lay.latent]].expand(
        len(levels), -1, -1, -1, -1, -1
    )
    return ode_loss(
        dit, lay, states, torch.tensor(levels), LEVELS, torch.zeros(1), **options
    ).tolist(), dit


def test_loss_by_hand():
    """Mean over the targets of each sample: three slots at 2 and three at .5 are 1.25; all at sigma
    1 are 2."""
    assert by_hand(anchors.backward(6, 3, 3), [0, 1], [0, 0], [1, 1])[0] == [1.25, 2.0, 0.5]
    assert by_hand(anchors.forward(6), [0, 1], [1, 0])[0] == [1.25, 1.25]


def test_anchors_share_their_steps_level_and_are_replicated():
    """Slots: targets 3-5 and 0-2, then the anchors 0-2 of step 0: state, time and position of step
    0 with the content of latents 0-2."""
    dit = by_hand(anchors.backward(6, 3, 3), [0, 1])[1]
    assert dit.x[0, :, 0, 0, 0].tolist() == [23, 24, 25, 10, 11, 12, 20, 21, 22]
    assert dit.t.tolist() == [[1000] * 3 + [500] * 3 + [1000] * 3]
    assert dit.pos.tolist() == [3, 4, 5, 0, 1, 2, 0, 1, 2]


def test_which_slots_are_scored_by_hand():
    """Targets; anchors and dummies only if asked; what is only there to be read never."""
    backward = layout(anchors.backward(6, 3, 2))  # targets 3-5, 0-2, anchors 1-2
    assert scored_slots(backward).tolist() == [True] * 6 + [False] * 2
    assert scored_slots(backward, anchors=True).tolist() == [True] * 8
    dummy = layout(anchors.backward(6, 3, 0, dummy=True))
    assert scored_slots(dummy, anchors=True).tolist() == [False] * 3 + [True] * 6
    assert scored_slots(dummy, dummies=True).tolist() == [True] * 9
    forced = layout(anchors.forward(6), teacher_forcing=True)
    assert scored_slots(forced, True, True).tolist() == [False] * 3 + [True] * 6


def test_mean_over_scored_slots_by_hand():
    """Of errors 1, 2, 6: slots 0 and 2 mean 3.5; a choice of its own for each sample; of none 0."""
    error = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1, 1).expand(3, 3, 2, 1, 1)
    assert mean_over(error, torch.tensor([True, False, True])).tolist() == [3.5] * 3
    each = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    assert mean_over(error, each).tolist() == [3, 2, 0]


def test_anchors_are_scored_only_when_asked():
    """Scored, the three anchors at sigma 1 count 2 each: (6 * 2 + 3 * .5) / 9 = 1.5 instead of
    1.25."""
    assert by_hand(anchors.backward(6, 3, 3), [0, 1], loss_on_anchors=True)[0] == [1.5]


@pytest.mark.parametrize("scored", [False, True])
def test_dummy_is_never_scored(scored):
    """The dummy has no truth: a network wrong by 1000 on its slots alone has the same loss. It is
    fed the latents it stands at."""
    v = torch.tensor([18.0, 20.0]).repeat(9, 1)
    v[:3] = 1000
    loss, dit = by_hand(
        anchors.backward(6, 3, 0, dummy=True),
        [1, 0, 1],
        v=v.view(9, 1, 1, 2).tolist(),
        loss_on_anchors=scored,
    )
    assert loss == [1.25] and dit.x[0, :3, 0, 0, 0].tolist() == [10, 11, 12]


def test_clean_steps_are_not_scored():
    """A step at t = 0 shows the end point, and only the others count; a sample with nothing to
    score has loss 0."""
    loss, dit = by_hand(anchors.backward(6, 3, 3), [0, 2], [2, 1], [2, 2], v=(18.0, 18.0))
    assert loss == [4.0, 1.0, 0.0]
    assert dit.t[0].tolist() == [1000] * 3 + [0] * 3 + [1000] * 3 and dit.x[
        0, 3:6, 0, 0, 0
    ].tolist() == [0, 1, 2]


# ---------------------------------------------------------------- training
def test_one_pair_is_learned(files, tmp_path):
    """Memorising one pair, the loss falls tenfold within 150 iterations, in both directions."""
    data = tmp_path / "pairs"
    main(Config(**files | {"data": str(data), "pairs": 1}, generate=True))
    log = rows(
        train(files, tmp_path / "run", data=str(data), steps=150, batch=2, warmup=10, lr=1e-2)
    )
    for direction in ("forward", "backward"):
        first, last = (sum(r[direction] for r in part) / 10 for part in (log[:10], log[-10:]))
        assert last < first / 10, (direction, first, last)


def test_log_has_a_row_each_step(files, tmp_path):
    """Each row: step, the loss of each plan by name, the gradient's norm before clipping, and how
    many latents this iteration's plans have."""
    log = rows(train(files, tmp_path))
    assert [r["step"] for r in log] == [0, 1, 2]
    assert all(r.keys() == {"step", "forward", "backward", "norm", "latents"} for r in log)
    assert {r["latents"] for r in log} == {6}
    assert (
        load_dit(tmp_path).config == tiny_dit(**WORDED).config
    )  # the student is a checkpoint as any other


def test_a_student_remembers_its_recipe(files, tmp_path):
    """Levels, shift, block, anchors, head, whose noise anchors have, and the mix of plans lie in
    the checkpoint beside the sizes of the network; a teacher has none."""
    recipe = Recipe.read(load_dit(train(files, tmp_path, share_noise="start", anchors=2)).recipe)
    assert recipe == Recipe(anchors=2, share_noise="start", plans="paper")
    assert recipe == recipe_of(Config(**files | {"share_noise": "start", "anchors": 2}))
    assert load_dit(files["teacher"]).recipe is None


def test_stage_1_of_other_levels(files, tmp_path):
    """Three levels: as many states are stored, trained on, and remembered."""
    flags = files | {"data": str(tmp_path / "pairs"), "denoising": (1000.0, 500.0, 250.0)}
    main(Config(**flags, generate=True))
    tensors, _ = read_tensors(tmp_path / "pairs" / "pairs-000000.safetensors")
    assert tensors["states"].shape == (2, 4, 6, 2, 4, 4)
    student = load_dit(train(flags, tmp_path / "run"))
    assert Recipe.read(student.recipe).levels == (1000.0, 500.0, 250.0)
    with pytest.raises(
        UserError, match=r"denoising is \[1000.0, 500.0, 250.0\], not \[1000.0, 750"
    ):
        train(flags | {"denoising": (1000.0, 750.0, 500.0, 250.0)}, tmp_path / "other")


def test_every_plan_is_trained(every, tmp_path, monkeypatch):
    """--plans any: the iterations draw entries of the mix, each iteration trains all plans of its
    own, logs them by name, and shows given clips clean and without loss."""
    seen, real = set(), train_ode.ode_loss

    def looked_at(dit, lay, states, levels, sigmas, *rest):
        seen.add(lay.latent + lay.pos)
        for j, step in enumerate(by_layout[lay.latent + lay.pos].steps):
            assert not step.commits or (levels[:, j] == len(sigmas) - 1).all()
        return real(dit, lay, states, levels, sigmas, *rest)

    mix = any_mix(15)
    by_layout = {}
    for _, plans in mix:
        for plan in plans:
            lay = layout(plan)
            by_layout[lay.latent + lay.pos] = plan
    monkeypatch.setattr(train_ode, "ode_loss", looked_at)
    log = rows(train(every, tmp_path, steps=60, batch=1))
    assert seen == by_layout.keys()
    assert {r["latents"] for r in log} == {plans[0].length for _, plans in mix}
    for r in log:
        names = r.keys() - {"step", "norm", "latents"}
        assert names in [{plan.name for plan in plans} for _, plans in mix]


def test_each_iteration_draws_anew(files, tmp_path):
    """With a still student the losses differ from step to step and from seed to seed, and only
    so."""
    a, b, c = (
        rows(train(files, tmp_path / name, lr=0.0, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert a == b and len({r["forward"] for r in a + c}) == 6


@pytest.mark.xdist_group("torchrun")  # one at a time: each starts three processes
def test_two_processes_equal_one(files, tmp_path):
    """Generating and training, by ddp and by fsdp, on 2 processes and on 1: the same shards to the
    byte, the same weights to 1e-5."""
    flags = {**files, "steps": 3, "batch": 4, "warmup": 2, "lr": 1e-3}
    sharded = {"parallel": "fsdp", "micro": 1, "save_every": 2}
    out = two_processes(
        tmp_path,
        ("train_ode", flags | {"data": str(tmp_path / "pairs"), "generate": True}),
        ("train_ode", flags | {"out": str(tmp_path / "ddp")}),
        ("train_ode", flags | {"out": str(tmp_path / "fsdp")} | sharded),
    )
    assert "2 processes x 1 accumulated x 2 = 4 samples" in out
    assert "6 pairs in 3 shards, 3 to make" in out
    one = train(files, tmp_path / "one")
    for name in ("ddp", "fsdp"):
        assert apart(one, tmp_path / name) <= 1e-5
        losses = [r["forward"] for r in rows(tmp_path / name)]
        assert losses == pytest.approx([r["forward"] for r in rows(one)], abs=1e-5)
    names = sorted(p.name for p in (tmp_path / "pairs").iterdir())
    for name in names:
        assert (tmp_path / "pairs" / name).read_bytes() == Path(files["data"], name).read_bytes()
    assert len(names) == 4
    four = train(files, tmp_path / "four", steps=4)
    # and a state written by two processes is good for one
    assert apart(four, train(files, tmp_path / "fsdp", steps=4)) <= 1e-5


@pytest.mark.xdist_group("torchrun")  # one at a time: each starts three processes
def test_two_processes_equal_one_on_every_plan(every, tmp_path):
    """All processes draw the same entry, so the mix changes nothing: 2 processes equal 1."""
    flags = every | {"steps": 6, "batch": 2, "warmup": 2, "lr": 1e-3}
    two_processes(
        tmp_path,
        ("train_ode", flags | {"data": str(tmp_path / "pairs"), "generate": True}),
        ("train_ode", flags | {"out": str(tmp_path / "ddp")}),
        ("train_ode", flags | {"out": str(tmp_path / "fsdp"), "parallel": "fsdp"}),
    )
    one = train(flags, tmp_path / "one", steps=6, batch=2)
    assert len({r["latents"] for r in rows(one)}) > 1
    for name in ("ddp", "fsdp"):
        assert apart(one, tmp_path / name) <= 1e-5
    for path in (tmp_path / "pairs").iterdir():
        assert path.read_bytes() == Path(every["data"], path.name).read_bytes()


def test_resume_is_exact(files, tmp_path):
    """2 + 2 steps are 4 steps, bit for bit: weights, optimiser and log."""
    train(files, tmp_path / "b", steps=2)
    a, b = train(files, tmp_path / "a", steps=4), train(files, tmp_path / "b", steps=4)
    assert same(saved(a), saved(b)) and apart(a, b) == 0 and rows(a) == rows(b)
    assert saved(a)["step"] == 4 and any("exp_avg" in k for k in saved(a))


def test_resume_is_exact_on_every_plan(every, tmp_path):
    """So it is where each iteration draws its plans: 3 + 3 steps are 6."""
    train(every, tmp_path / "b", steps=3, batch=2)
    a, b = (train(every, tmp_path / name, steps=6, batch=2) for name in "ab")
    assert same(saved(a), saved(b)) and apart(a, b) == 0 and rows(a) == rows(b)
    assert len({r["latents"] for r in rows(a)}) > 1


def test_resume_under_fsdp(files, tmp_path):
    """A run may go on under another --parallel: 2 steps plain and 2 sharded are 4 plain ones."""
    train(files, tmp_path / "b", steps=2)
    a, b = (
        train(files, tmp_path / "a", steps=4),
        train(files, tmp_path / "b", steps=4, parallel="fsdp"),
    )
    assert apart(a, b) <= 1e-6


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": 1e-4},
        {"anchors": 2},
        {"clean": 0.1},
        {"share_noise": "all"},
        {"seed": 5},
        {"batch": 2},
    ],
)
def test_resume_with_other_settings_is_refused(setting, files, tmp_path):
    """A state of another run is not continued; the sentence names the setting and its old value."""
    train(files, tmp_path, steps=1)
    (name,) = setting
    with pytest.raises(UserError, match=rf"other settings \({name}="):
        train(files, tmp_path, **setting)


def test_sigterm_saves_and_the_run_goes_on(files, tmp_path, monkeypatch, capsys):
    """SIGTERM in step 1: the step is finished and saved; the same command ends as if nothing had
    happened."""
    at_call(monkeypatch, train_ode, "ode_loss", 3, terminate)  # two calls a step
    train(files, tmp_path / "b")
    assert (
        saved(tmp_path / "b")["step"] == 2 and not (tmp_path / "b" / "student.safetensors").exists()
    )
    assert "stopped at step 2" in capsys.readouterr().out
    a, b = train(files, tmp_path / "a"), train(files, tmp_path / "b")
    assert same(saved(a), saved(b)) and rows(a) == rows(b)


def test_a_killed_run_logs_each_step_once(files, tmp_path, monkeypatch):
    """Killed in step 3 with a state of 2 steps, the run does step 2 again; its row stands in the
    log once."""
    at_call(monkeypatch, train_ode, "clip_gradients", 4, crash)
    with pytest.raises(MemoryError):
        train(files, tmp_path, steps=4, save_every=2)
    assert saved(tmp_path)["step"] == 2
    assert [r["step"] for r in rows(train(files, tmp_path, steps=4, save_every=2))] == [0, 1, 2, 3]


@pytest.mark.xdist_group("torchrun")  # one at a time: each starts three processes
def test_a_signal_to_one_process_stops_both(files, tmp_path):
    """Processes get a signal at different times; they still stop at the same step, and save it."""
    two_processes(
        tmp_path,
        (
            "train_ode",
            {**files, "out": str(tmp_path), "batch": 4, "steps": 50, "sigterm_in_step_0": True},
        ),
        timeout=25,
    )
    assert saved(tmp_path)["step"] in (1, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"anchors": 0},
        {"latent": (9, 4, 4), "block": 6, "anchors": 0, "head": 3},
        {"loss_on_anchors": True},
        {"clean": 0.5},
        {"anchors": 1},
        {"teacher_forcing": True},
    ],
    ids=str,
)
def test_ablations_run_and_change_the_result(changes, files, tmp_path):
    """Every ablation trains on the same pairs, and is no dead flag."""
    if "latent" in changes:
        files = files | {"latent": changes["latent"], "data": str(tmp_path / "pairs"), "pairs": 2}
        main(Config(**files, generate=True))
        usual = {"latent": changes["latent"]}
    else:
        usual = {}
    a, b = (
        train(files, tmp_path / "a", steps=1, **usual),
        train(files, tmp_path / "b", steps=1, **changes),
    )
    assert 0 < apart(a, b) < 1


def test_rate_rises_and_falls(files, tmp_path, monkeypatch):
    """Warm-up over 2 of 8 steps, decay over the last half: lr * (1/2, 1, 1, 1, 1, 3/4, 2/4,
    1/4)."""
    rates, real = [], train_ode.clip_gradients
    monkeypatch.setattr(
        train_ode,
        "clip_gradients",
        lambda *args: rates.append(optimisers[0].param_groups[0]["lr"]) or real(*args),
    )
    optimisers, made = [], torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: optimisers.append(made(*a, **k)) or optimisers[0]
    )
    train(files, tmp_path / "a", steps=8, lr=4e-4, decay=0.5)
    assert rates == pytest.approx([2e-4, 4e-4, 4e-4, 4e-4, 4e-4, 3e-4, 2e-4, 1e-4])


def test_bfloat16_takes_the_same_steps(files, tmp_path):
    start = read_tensors(files["weights"])[0]
    runs = [
        read_tensors(train(files, tmp_path / kind, dtype=kind, steps=2) / "student.safetensors")[0]
        for kind in ("float32", "bfloat16")
    ]
    steps = [torch.cat([(run[k] - start[k]).flatten() for k in start]) for run in runs]
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.9
    assert distance(*steps) > 0  # it is indeed another arithmetic


def test_only_speed_and_memory_depend_on_checkpointing_compiling_and_micro(
    files, tmp_path, monkeypatch
):
    """Recomputing activations, tracing the blocks, or accumulating samples one by one or two by
    two, gives the same weights."""
    monkeypatch.setattr(DiT.compile_blocks, "__defaults__", ("eager",))
    one = train(
        files, tmp_path / "one", lr=1e-4
    )  # Adam turns rounding into steps of up to lr where a gradient is next to zero
    for n, changes in enumerate(
        ({"checkpointing": True}, {"compile": True}, {"micro": 1}, {"micro": 2})
    ):
        other = train(files, tmp_path / str(n), lr=1e-4, **changes)
        assert apart(one, other) <= 1e-6, changes
        for a, b in zip(
            rows(one), rows(other), strict=True
        ):  # Adam forgives a wrong scale; the logged gradient norm does not
            assert a == pytest.approx(b, rel=1e-4), changes


def test_batch_that_cannot_be_shared_is_refused(files, tmp_path):
    """--batch must be a multiple of --micro times the processes."""
    with pytest.raises(UserError, match="--batch 4 is not a multiple of --micro 3"):
        train(files, tmp_path, micro=3)


def test_nan_in_a_pair_stops_training(files, tmp_path, monkeypatch, capsys):
    """A NaN in the data ends the run with exit code 1, naming step and loss; the state saved before
    is not touched."""
    data = shutil.copytree(files["data"], tmp_path / "pairs")
    train(files | {"data": str(data)}, tmp_path, steps=2)
    before = (tmp_path / "state.pt").read_bytes()
    for path in data.glob("*.safetensors"):
        tensors, made = read_tensors(path)
        tensors["states"][:, 4, 3] = float("nan")
        write_safetensors(path, tensors, made)
    code, error = command_line(
        monkeypatch,
        capsys,
        train_ode,
        **files | {"data": data, "out": tmp_path, "steps": 4, "batch": 4, "warmup": 2, "lr": 1e-3},
    )
    assert code == 1 and "step 2: the loss is {'forward': nan, 'backward': nan}, through" in error
    assert (tmp_path / "state.pt").read_bytes() == before


def test_nan_names_its_sample(files, tmp_path, monkeypatch, capsys):
    """One sample of a batch in two rounds is not finite: its number in the step is named, and no
    other."""
    real, calls = train_ode.ode_loss, []

    def broken(*args):
        calls.append(1)
        return real(*args) * torch.tensor(
            [1.0, float("nan") if len(calls) == 7 else 1.0]
        )  # step 1, second round, forward

    monkeypatch.setattr(train_ode, "ode_loss", broken)
    code, error = command_line(
        monkeypatch,
        capsys,
        train_ode,
        **files | {"out": tmp_path, "steps": 4, "batch": 4, "micro": 2},
    )
    assert code == 1 and "step 1: the loss is {'forward': nan, " in error
    assert "through sample 3;" in error


def test_infinite_gradient_stops_training(files, tmp_path, monkeypatch):
    """A gradient that is not finite is named with the step, before it reaches the weights."""
    dit = load_dit(files["weights"])
    dit.head.head.weight.mul_(1e15)
    save_dit(dit, tmp_path / "bad.safetensors")
    with pytest.raises(FloatingPointError, match="step 0"):
        train(files, tmp_path / "run", weights=str(tmp_path / "bad.safetensors"))
    assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"plans": "all"}, "--plans 'all' must be one of paper, any"),
        ({"share_noise": "some"}, "--share_noise 'some' must be none, start or all"),
        ({"latent": (6, 4)}, "must be three numbers"),
        ({"block": 4}, "6 latents is not a multiple of the block 4; use 4 or 8"),
        ({"anchors": 4}, "4 anchors do not fit the block 3"),
        ({"denoising": (250.0, 500.0)}, "--denoising 250.0 500.0 must fall"),
        ({"parallel": "ddq"}, "--parallel 'ddq' must be"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ({"data": "nowhere"}, "index.json does not exist: make pairs first, with --generate"),
    ],
)
def test_impossible_settings_are_refused(flags, says, files, tmp_path, monkeypatch, capsys):
    """A mistake is named before anything is written, with exit code 2."""
    flags = files | {"out": tmp_path / "run"} | flags
    code, error = command_line(monkeypatch, capsys, train_ode, **flags)
    assert code == 2 and says in error and not (tmp_path / "run").exists()


def test_rate_by_hand():
    """A warm-up of 2 iterations, then constant, then down to zero over the last half of 8."""
    config = Config(lr=4e-4, warmup=2, steps=8, decay=0.5)
    want = [2e-4, 4e-4, 4e-4, 4e-4, 4e-4, 3e-4, 2e-4, 1e-4]
    assert [rate(config, step) for step in range(8)] == pytest.approx(want)
    still = Config(lr=1e-3, warmup=0, steps=8, decay=0.0)
    assert [rate(still, step) for step in range(8)] == pytest.approx([1e-3] * 8)
