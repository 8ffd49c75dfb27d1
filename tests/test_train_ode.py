"""Stage 1: pairs are exact and checked, the loss is the paper's, and neither processes, batches nor
interruptions change the result."""

import hashlib
import json
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
import train_ode
from anchors import layout
from dit import DiT, load_dit, save_dit
from lib import pairs, states
from lib.common import UserError
from lib.noise import noise_from
from lib.pairs import kept_states, pair_noise
from lib.recipe import Recipe
from lib.tensors import read_tensors, write_safetensors
from lib.text import Prompts
from plans import with_given
from sampler import many_steps, ode_sigmas, student_sigmas
from train_ode import Config, main, ode_loss

LATENT = (6, 4, 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tiny checkpoints and six pairs in three shards."""
    folder = tmp_path_factory.mktemp("ode")
    paths = tiny_checkpoints(folder)
    made = {
        "teacher": paths["teacher"],
        "weights": paths["student"],
        "data": str(folder / "pairs"),
        "latent": LATENT,
        "pairs": 6,
        "shard": 2,
        "dtype": "float32",
        "decay": 0.0,
        "plans": "paper",
    }
    main(Config(**made, generate=True))
    return made


def flat(path) -> torch.Tensor:
    """All numbers of a file of tensors, in one row."""
    tensors = read_tensors(path)[0]
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def train(files, out, **changes):
    """Train in this process; the folder it wrote."""
    with suppress(SystemExit):  # stopped by a signal
        main(
            Config(
                **{
                    **files,
                    "out": str(out),
                    "steps": 3,
                    "batch": 4,
                    "warmup": 2,
                    "lr": 1e-3,
                    **changes,
                }
            )
        )
    return out


# ---------------------------------------------------------------- the loss, by hand
class Constant(nn.Module):
    """Predicts the velocities it is given and remembers what it was shown."""

    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, x, t, prompt, pos, visible):
        self.x, self.t, self.pos = x, t, pos
        return self.v.expand_as(x)


# one channel of 1 x 2 cells; latent i is 20 + i at sigma 1, 10 + i at sigma .5 and i at the end, so
# v = 20 is exact
STATES = (
    (torch.tensor([20.0, 10.0, 0.0])[:, None] + torch.arange(6.0))
    .view(1, 3, 6, 1, 1, 1)
    .expand(1, 3, 6, 1, 1, 2)
)
LEVELS = torch.tensor([1.0, 0.5, 0.0])


def by_hand(plan, *levels, v=(18.0, 20.0), **options):
    """ode_loss of a network that answers v, for each list of levels one sample. v = 18 errs by 2
    sigma in one of two cells, so a
    slot's mean square is 2 at sigma 1 and .5 at sigma .5."""
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


def test_given_latents_are_clean_in_a_step_that_is_not():
    """Latent 3 of block 3-5 is the user's own: shown at its end point and t = 0, as a rollout holds
    it, and not scored; the others have the level of their step."""
    plan = with_given(anchors.backward(6, 3, 3), [1, 3])
    assert layout(plan).is_given == (True, *[False] * 3, True, False, False, True, False)
    loss, dit = by_hand(plan, [0, 1], v=(18.0, 18.0))
    assert loss == [(2 * 4 + 2 * 1) / 4]
    assert dit.t.tolist() == [[0, 1000, 1000, 500, 0, 500, 1000, 0, 1000]]
    assert dit.x[0, :, 0, 0, 0].tolist() == [3, 24, 25, 10, 1, 12, 20, 1, 22]


def test_student_is_trained_on_the_levels_it_samples_with():
    """The kept states stand at sigma 1, .9375, .8333, .625 and 0; fewer levels keep fewer; a level
    that the teacher's steps do not meet is refused."""
    keep = kept_states((1000, 750, 500, 250))
    assert keep == [0, 12, 24, 36, 48]
    assert [ode_sigmas()[k] for k in keep] == [*student_sigmas(), 0.0]
    assert kept_states((1000, 500)) == [0, 24, 48]
    with pytest.raises(UserError, match="--denoising 1000 700: .* multiples of 1000 / 48"):
        kept_states((1000, 700))


def test_levels_are_those_of_the_stored_states(files, tmp_path):
    """Three levels on pairs of four would train on the wrong states."""
    with pytest.raises(UserError, match="denoising is .*, not"):
        train(files, tmp_path, denoising=(1000.0, 750.0, 500.0))


# ---------------------------------------------------------------- pairs
class Towards(nn.Module):
    """The velocity of the flow from noise to one point, the mean of the prompt: v = (x - mean) /
    sigma."""

    def __init__(self):
        super().__init__()
        self.patch_embedding = nn.Linear(1, 1)

    def text_kv(self, prompt):
        return prompt

    def forward(self, x, t, prompt, pos, past=None):
        return (x - prompt.mean((1, 2)).view(-1, 1, 1, 1, 1)) / (t / 1000)[..., None, None, None]


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_trajectory_of_a_known_flow(shift):
    """Euler is exact on straight lines: the states are mean + sigma (noise - mean), where guidance
    3 makes the mean 1 + 3 (2 - 1)."""
    noise, prompt = randn(0, 2, 3, 1, 2, 2).double(), torch.full((2, 1, 1), 2.0).double()
    states = trajectory(Towards(), prompt, torch.ones_like(prompt), noise, 3.0, shift)
    sigmas = torch.tensor([ode_sigmas(48, shift)[k] for k in (0, 12, 24, 36, 48)]).double()
    want = 4 + sigmas.view(1, 5, 1, 1, 1, 1) * (noise[:, None] - 4)
    assert distance(states, want) <= 1e-5 and torch.equal(states[:, 0], noise)


def trajectory(teacher, prompt, negative, noise, guidance, shift=5.0):
    """The states 0, 12 .. 48 of a bidirectional teacher: [B, 5, T, C, h, w]."""
    made, T = {}, noise.shape[1]
    text = teacher.text_kv(torch.cat([prompt, negative]))
    solve = many_steps(
        teacher,
        [text],
        noise_from(noise),
        guidance,
        shift,
        record=lambda n, k, x: made.update({k: x}),
    )
    solve(0, anchors.forward(T, T).steps[0], None, None, None)
    return torch.stack([made[k] for k in (0, 12, 24, 36, 48)], dim=1)


def test_pairs_are_the_teachers_trajectories(files):
    """Pair n starts from the noise of (seed, n), follows the teacher with caption n, and is stored
    as float16 states of all five levels."""
    teacher, source = load_dit(files["teacher"]), Prompts("toy", 64, 12)
    tensors, made = read_tensors(f"{files['data']}/pairs-000004.safetensors")
    noise = pair_noise(Config(**files), 2, 5, 6)[None]
    with torch.no_grad():
        states = trajectory(teacher, source([5]), source.embed([""]), noise, 3.0)
    assert tensors["states"].shape == (2, 5, 6, 2, 4, 4)
    assert tensors["states"].dtype == torch.float16
    assert distance(tensors["states"][1].float(), states[0]) <= 4e-3
    assert made["guidance"] == 3.0 and made["denoising"] == [1000, 750, 500, 250]
    assert (made["first"], made["count"], made["group"]) == (4, 2, 6)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_missing_shard_is_made_again(files, tmp_path, capsys):
    """Delete a shard and run again: it comes back bit for bit, the others are not touched, and the
    index names all hashes."""
    data = shutil.copytree(files["data"], tmp_path / "pairs")
    shards = sorted(data.glob("*.safetensors"))
    before = {p.name: (digest(p), p.stat().st_mtime_ns) for p in shards}
    shards[1].unlink()
    main(Config(**files | {"data": str(data)}, generate=True))
    assert "3 shards, 1 to make; " in capsys.readouterr().out
    assert {p.name: digest(p) for p in shards} == {n: d for n, (d, _) in before.items()}
    assert all(p.stat().st_mtime_ns == before[p.name][1] for p in shards if p != shards[1])
    index = json.loads((data / "index.json").read_text())
    assert index["shards"] == {n: d for n, (d, _) in before.items()} and index["pairs"] == 6


def test_interrupted_generation_goes_on(files, tmp_path, monkeypatch, capsys):
    """SIGTERM in the second shard: the first stays, no index claims that all is there, and the same
    command makes the rest."""
    made = files | {"data": str(tmp_path)}
    at_call(monkeypatch, pairs, "write_shard", 2, terminate)
    with pytest.raises(SystemExit, match="^143$"):  # nothing that needs all pairs begins
        main(Config(**made, generate=True))
    assert [p.name for p in tmp_path.iterdir()] == [
        "pairs-000000.safetensors"
    ] and "stopped" in capsys.readouterr().out
    main(Config(**made, generate=True))
    assert (tmp_path / "index.json").read_text() == Path(files["data"], "index.json").read_text()


def rewrite(data, change):
    """Change the states of the first shard and sign them in the index, as a broken generator
    would."""
    path = data / "pairs-000000.safetensors"
    tensors, made = read_tensors(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors["states"])
    write_safetensors(path, tensors, made)
    index = json.loads((data / "index.json").read_text())
    (data / "index.json").write_text(
        json.dumps(index | {"shards": index["shards"] | {path.name: digest(path)}})
    )


def flip_byte(data):
    path = data / "pairs-000002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "flipped byte": (
        flip_byte,
        {},
        "pairs-000002.safetensors is not the file that the index names",
    ),
    "NaN": (
        lambda data: rewrite(data, lambda x: x[1, 2].fill_(float("nan"))),
        {},
        "pair 1 in pairs-000000.safetensors: its states are not finite",
    ),
    "another seed": (lambda data: None, {"seed": 1}, "do not start from the noise of seed 1"),
    "another shift": (lambda data: None, {"shift": 8}, "shift is 5.0, not 8.0"),
    "another size": (
        lambda data: None,
        {"latent": (9, 4, 4)},
        "latent is [6, 4, 4], not [9, 4, 4]",
    ),
    "start noise as end": (
        lambda data: rewrite(data, lambda x: x[:, 4].copy_(x[:, 0])),
        {},
        "do not fall from noise to a clean end",
    ),
    "fresh noise as end": (
        lambda data: rewrite(data, lambda x: x[:, 4].copy_(randn(9, *x[:, 4].shape))),
        {},
        "do not fall from noise to a clean end",
    ),
    "missing index": (
        lambda data: (data / "index.json").unlink(),
        {},
        "index.json does not exist: make pairs first",
    ),
    "missing shard": (
        lambda data: (data / "pairs-000002.safetensors").unlink(),
        {},
        "pairs-000002.safetensors does not exist",
    ),
}


def test_good_pairs_pass_the_check(files, monkeypatch, capsys):
    """The check says how many pairs, of whom, and how far the end is from noise."""
    flags = {k: files[k] for k in ("latent", "data", "teacher", "plans")}
    assert command_line(monkeypatch, capsys, train_ode, "--check", **flags) == (0, "")
    assert "6 pairs of 1 lengths are good" in capsys.readouterr().out


@pytest.mark.parametrize("name", DAMAGES)
def test_check_names_the_damage(name, files, tmp_path, monkeypatch, capsys):
    """Every kind of damage ends with exit code 2 and one line that names file and fault."""
    damage, flags, says = DAMAGES[name]
    data = shutil.copytree(files["data"], tmp_path / "pairs")
    damage(data)
    flags = {"latent": LATENT, "data": data, "teacher": files["teacher"], "plans": "paper"} | flags
    code, error = command_line(monkeypatch, capsys, train_ode, "--check", **flags)
    assert code == 2 and says in error


def test_shards_of_two_makings_are_refused(files, tmp_path):
    """Pairs of guidance 2 and 3 in one folder are not one data set, though each shard is whole."""
    data = shutil.copytree(files["data"], tmp_path / "pairs")
    (data / "pairs-000002.safetensors").unlink()
    for what in ("generate", "check"):
        with pytest.raises(UserError, match="guidance is 3.0, not 2.0"):
            main(Config(**files | {"data": str(data), what: True}, guidance=2.0))


def test_pairs_of_another_teacher_are_refused(files, tmp_path):
    """Which teacher made the pairs is recorded in the shards and compared with the flag."""
    with pytest.raises(UserError, match="was made otherwise: teacher is '"):
        train(files, tmp_path, teacher=files["weights"])


def test_pairs_of_other_prompts_are_refused(files, tmp_path):
    """A student trained on one list of prompts and pairs of another would learn nonsense in
    silence."""
    (tmp_path / "prompts.txt").write_text("a red square moves left over a green wave\n")
    with pytest.raises(UserError, match="prompts"):
        train(files, tmp_path / "run", prompts=str(tmp_path / "prompts.txt"))


def test_pairs_are_found_whatever_the_shard_flag(files, tmp_path):
    """How many pairs a file holds is a fact of the data: --shard while training changes nothing."""
    assert apart(train(files, tmp_path / "a"), train(files, tmp_path / "b", shard=64)) == 0


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
    """Each row: step, the loss of both directions, and the gradient's norm before clipping."""
    log = rows(train(files, tmp_path))
    assert [r["step"] for r in log] == [0, 1, 2] and all(
        r.keys() == {"step", "forward", "backward", "norm", "latents"} for r in log
    )
    assert (
        load_dit(tmp_path).config == tiny_dit(**WORDED).config
    )  # the student is a checkpoint as any other


def test_a_student_of_a_state_remembers_its_recipe(files, tmp_path):
    """The student that a run writes, and one that is taken from its state, know how to be run."""
    train(files, tmp_path, steps=1, shift=5.0, anchors=2)
    states.main(states.Config(str(tmp_path / "state.pt"), str(tmp_path / "taken.safetensors")))
    for name in ("student.safetensors", "taken.safetensors"):
        made = Recipe.read(load_dit(tmp_path / name).recipe)
        assert (made.levels, made.anchors) == ((1000.0, 750.0, 500.0, 250.0), 2)


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
    common_flags = {**files, "steps": 3, "batch": 4, "warmup": 2, "lr": 1e-3}
    muon = common_flags | {"lr_matrices": 0.01}
    said = two_processes(
        tmp_path,
        ("train_ode", common_flags | {"data": str(tmp_path / "pairs"), "generate": True}),
        ("train_ode", common_flags | {"out": str(tmp_path / "ddp")}),
        (
            "train_ode",
            common_flags
            | {"out": str(tmp_path / "fsdp"), "parallel": "fsdp", "micro": 1, "save_every": 2},
        ),
        *(
            ("train_ode", muon | {"out": str(tmp_path / f"muon-{how}"), "parallel": how})
            for how in ("ddp", "fsdp")
        ),
    )
    assert "2 processes x 1 accumulated x 2 = 4 samples" in said
    assert "6 pairs in 3 shards, 3 to make" in said
    one, other = train(files, tmp_path / "one"), train(files, tmp_path / "other", lr_matrices=0.01)
    start = flat(files["weights"])
    for name in ("ddp", "fsdp"):
        assert apart(one, tmp_path / name) <= 1e-5
        pair = (other, tmp_path / f"muon-{name}")  # torch's Muon computes in bfloat16
        step, its = (flat(folder / "student.safetensors") - start for folder in pair)
        assert (its - step).norm() <= 0.15 * step.norm()
        assert [r["forward"] for r in rows(tmp_path / name)] == pytest.approx(
            [r["forward"] for r in rows(one)], abs=1e-5
        )
    names = sorted(p.name for p in (tmp_path / "pairs").iterdir())
    for name in names:
        assert (tmp_path / "pairs" / name).read_bytes() == Path(files["data"], name).read_bytes()
    assert len(names) == 4
    four = train(
        files, tmp_path / "four", steps=4
    )  # and a state written by two processes is good for one
    assert apart(four, train(files, tmp_path / "fsdp", steps=4)) <= 1e-5


MUON = [{}, {"lr_matrices": 0.01}]


@pytest.mark.parametrize("how", MUON, ids=str)
def test_resume_is_exact(how, files, tmp_path):
    """2 + 2 steps are 4 steps, bit for bit: weights, optimiser and log."""
    train(files, tmp_path / "b", steps=2, **how)
    a = train(files, tmp_path / "a", steps=4, **how)
    b = train(files, tmp_path / "b", steps=4, **how)
    assert same(saved(a), saved(b)) and apart(a, b) == 0 and rows(a) == rows(b)
    assert saved(a)["step"] == 4 and any("exp_avg" in k for k in saved(a))


@pytest.mark.parametrize("how", MUON, ids=str)
def test_resume_under_fsdp(how, files, tmp_path):
    """A run may go on under another --parallel: 2 steps plain and 2 sharded are 4 plain ones."""
    train(files, tmp_path / "b", steps=2, **how)
    a, b = (
        train(files, tmp_path / "a", steps=4, **how),
        train(files, tmp_path / "b", steps=4, parallel="fsdp", **how),
    )
    assert apart(a, b) <= 1e-6


@pytest.mark.parametrize(
    "setting", [{"anchors": 2}, {"seed": 5}, {"batch": 2}, {"warmup": 3}, {"loss_on_anchors": True}]
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
    at_call(monkeypatch, train_ode, "apply_gradients", 4, crash)
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
    ],
    ids=str,
)
def test_ablations_run_and_change_the_result(changes, files, tmp_path):
    """Every ablation trains, and is no dead flag."""
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


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_rate_rises_and_falls(kind, files, tmp_path, monkeypatch):
    """Warm-up over 2 of 8 steps, decay over the last half: lr * (1/2, 1, 1, 1, 1, 3/4, 2/4,
    1/4)."""
    how = {"lr": 4e-4} if kind == "AdamW" else {"lr_matrices": 4e-4}
    rates, real = [], train_ode.apply_gradients
    monkeypatch.setattr(
        train_ode,
        "apply_gradients",
        lambda *args: rates.append(optimisers[0].param_groups[0]["lr"]) or real(*args),
    )
    optimisers, made = [], getattr(torch.optim, kind)
    monkeypatch.setattr(
        torch.optim, kind, lambda *a, **k: optimisers.append(made(*a, **k)) or optimisers[0]
    )
    train(files, tmp_path / "a", steps=8, decay=0.5, **how)
    assert rates == pytest.approx([2e-4, 4e-4, 4e-4, 4e-4, 4e-4, 3e-4, 2e-4, 1e-4])


def test_bfloat16_takes_the_same_steps(files, tmp_path):
    start = flat(files["weights"])
    runs = [train(files, tmp_path / d, dtype=d, steps=2) for d in ("float32", "bfloat16")]
    steps = [flat(run / "student.safetensors") - start for run in runs]
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
    assert code == 1 and "step 2: the loss is forward nan, backward nan" in error
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
    assert (
        code == 1 and "step 1: the loss is forward nan, " in error and "through sample 3;" in error
    )


def test_infinite_gradient_stops_training(files, tmp_path, monkeypatch):
    """A gradient that is not finite is named with the step, before it reaches the weights."""
    dit = load_dit(files["weights"])
    dit.head.head.weight.mul_(1e15)
    save_dit(dit, tmp_path / "bad.safetensors")
    with pytest.raises(FloatingPointError, match="step 0"):
        train(files, tmp_path / "run", weights=str(tmp_path / "bad.safetensors"))
    assert not (tmp_path / "run" / "state.pt").exists()
