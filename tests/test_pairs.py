"""Pairs on disk: made once, exactly, each with its own caption and noise; what does not fit is
refused by name."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import (
    at_call,
    command_line,
    distance,
    randn,
    terminate,
    tiny_checkpoints,
)
from torch import nn

import train_ode
from anchors import forward
from dit import load_dit, save_dit
from lib import text
from lib.common import UserError
from lib.noise import noise_from
from lib.pairs import kept_states, pair_noise, read_pairs
from lib.tensors import read_tensors, write_safetensors
from lib.text import Prompts
from sampler import many_steps, ode_sigmas, student_sigmas
from train_ode import Config, Trajectories, main, mix_of

LATENT = (6, 4, 4)
LEVELS = (1000.0, 750.0, 500.0, 250.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tiny checkpoints and six pairs in two shards, the second a partial one."""
    folder = tmp_path_factory.mktemp("pairs")
    paths = tiny_checkpoints(folder)
    made = {
        "teacher": paths["teacher"],
        "weights": paths["student"],
        "data": str(folder / "pairs"),
        "latent": LATENT,
        "plans": "paper",
        "pairs": 6,
        "shard": 4,
        "dtype": "float32",
    }
    main(Config(**made, generate=True))
    return made | {"other": paths["student"]}


@pytest.fixture
def copy(files, tmp_path):
    """The same flags, with a copy of the pairs to damage."""
    data = shutil.copytree(files["data"], tmp_path / "pairs")
    return {k: v for k, v in files.items() if k != "other"} | {"data": str(data)}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shards(flags: dict) -> list[Path]:
    return sorted(Path(flags["data"]).glob("*.safetensors"))


def found(flags: dict) -> dict:
    """The pairs that training would read, by their length."""
    config = Config(**flags)
    source = Prompts(config.prompts, 64, 12)
    return read_pairs(Trajectories(config, mix_of(config), 2, source))


# ---------------------------------------------------------------- what is kept
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
    text, states = torch.cat([prompt, torch.ones_like(prompt)]), {}
    solve = many_steps(
        Towards(),
        [text],
        noise_from(noise),
        3.0,
        shift,
        record=lambda n, k, x: states.update({k: x}),
    )
    end = solve(0, forward(3, 3).steps[0], None, None, None)
    for k, sigma in enumerate(ode_sigmas(48, shift)):
        assert distance(states[k], 4 + sigma * (noise - 4)) <= 1e-5
    assert torch.equal(states[0], noise) and torch.equal(states[48], end) and len(states) == 49


@pytest.mark.parametrize(
    "levels, kept",
    [
        (LEVELS, [0, 12, 24, 36, 48]),
        ((1000.0, 500.0), [0, 24, 48]),
        ((1000.0,), [0, 48]),
        ((1000.0, 937.5, 62.5), [0, 3, 45, 48]),
    ],
)
def test_student_is_trained_on_the_levels_it_samples_with(levels, kept):
    """The kept states stand at the student's noise levels and at 0, whatever the levels."""
    assert kept_states(levels) == kept
    assert [ode_sigmas()[k] for k in kept] == pytest.approx([*student_sigmas(levels), 0.0])


def test_levels_between_the_teachers_steps_are_refused():
    """A state that the teacher does not pass through cannot be kept."""
    with pytest.raises(UserError, match="--denoising 1000 800: a teacher's 48 steps pass through"):
        kept_states((1000.0, 800.0))


def test_pairs_are_the_teachers_trajectories(files):
    """Pair n starts from the noise of (seed, n), follows the teacher with caption n, and is stored
    as float16 states of all five levels."""
    teacher, source = load_dit(files["teacher"]), Prompts("toy", 64, 12)
    tensors, made = read_tensors(f"{files['data']}/pairs-000004.safetensors")
    noise = pair_noise(Config(teacher=files["teacher"], latent=LATENT), 2, 5, 6)
    text = teacher.text_kv(torch.cat([source([5]), source.embed([""])]))
    states = []
    solve = many_steps(
        teacher,
        [text],
        noise_from(noise[None, :6]),
        3.0,
        record=lambda n, k, x: states.append(x[0]),
    )
    with torch.no_grad():
        solve(0, forward(6, 6).steps[0], None, None, None)
    want = torch.stack(states)[[0, 12, 24, 36, 48]]
    assert tensors["states"].shape == (2, 5, 6, 2, 4, 4)
    assert tensors["states"].dtype == torch.float16
    assert distance(tensors["states"][1].float(), want) <= 4e-3
    assert made["guidance"] == 3.0 and (made["first"], made["count"], made["group"]) == (4, 2, 6)


# ---------------------------------------------------------------- each with its caption and noise
def trained_on(monkeypatch, flags: dict, out: Path) -> set[int]:
    """Train, and look at what the loss is given: every sample's caption must be that of the pair
    whose noise it starts from. Returns the pairs seen."""
    source, seen, real = Prompts(flags.get("prompts", "toy"), 64, 12), set(), train_ode.ode_loss
    config = Config(**flags)
    noises = [pair_noise(config, 2, n, config.latent[0]) for n in range(config.pairs)]

    def looked_at(dit, lay, states, levels, sigmas, prompt, *rest):
        first = torch.tensor([lay.latent.index(i) for i in range(config.latent[0])])
        for start, words in zip(states[:, 0, first], prompt, strict=True):
            (n,) = [n for n, noise in enumerate(noises) if distance(noise, start) <= 2e-3]
            assert torch.equal(words, source([n])[0])
            seen.add(n)
        return real(dit, lay, states, levels, sigmas, prompt, *rest)

    monkeypatch.setattr(train_ode, "ode_loss", looked_at)
    main(Config(**flags | {"out": str(out), "steps": 8, "batch": 8}))
    return seen


def test_more_pairs_keep_their_captions_and_noise(copy, tmp_path, monkeypatch, capsys):
    """6 pairs in shards of 4, then 10: the partial shard is made again, and said; every pair is
    there once, and trains with its own caption and noise."""
    whole = digest(shards(copy)[0])
    more = copy | {"pairs": 10}
    main(Config(**more, generate=True))
    out = capsys.readouterr().out
    assert "10 pairs in 3 shards, 2 to make" in out
    assert "pairs-000004.safetensors is made again: count is 2, not 4" in out
    assert digest(shards(copy)[0]) == whole
    assert [pair.number for pair in found(more)[6]] == list(range(10))
    assert trained_on(monkeypatch, more, tmp_path / "run") == set(range(10))


def test_smaller_shards_are_made_again(copy, tmp_path, monkeypatch, capsys):
    """Shards of 4, then of 2: each pair is still there once, with its caption and noise."""
    other = copy | {"shard": 2}
    main(Config(**other, generate=True))
    assert "pairs-000000.safetensors is made again: count is 4, not 2" in capsys.readouterr().out
    assert [pair.number for pair in found(other)[6]] == list(range(6))
    assert trained_on(monkeypatch, other, tmp_path / "run") == set(range(6))


def test_exchanged_files_keep_their_captions_and_noise(copy, tmp_path, monkeypatch):
    """A shard says which pairs it holds, so training does not mind its name (--check does)."""
    first, second = shards(copy)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert trained_on(monkeypatch, copy, tmp_path / "run") == set(range(6))


def test_every_length_of_a_mix_has_its_own_pairs(copy, tmp_path):
    """Of all plans: a shard is of one length, and every length has some."""
    flags = copy | {"latent": (9, 4, 4), "plans": "any", "pairs": 16, "shard": 2}
    flags["data"] = str(tmp_path / "any")
    main(Config(**flags, generate=True))
    lengths = found(flags)
    assert sorted(lengths) == sorted({p[0].length for _, p in mix_of(Config(**flags))}) == [1, 6, 9]
    for length, some in lengths.items():
        assert {pair.shard["states"].shape[2] for pair in some} == {length}
    assert sorted(pair.number for some in lengths.values() for pair in some) == list(range(16))
    main(Config(**flags, check=True))


def test_plans_without_pairs_are_left_out_and_said(copy, tmp_path, capsys):
    """Too few shards for every length: it trains on the others, and says so."""
    flags = copy | {"latent": (9, 4, 4), "plans": "any", "pairs": 2, "data": str(tmp_path / "any")}
    main(Config(**flags, generate=True))
    main(Config(**flags | {"out": str(tmp_path / "run"), "steps": 4, "batch": 2}))
    assert "2 of 3 kinds of plans have no pairs yet" in capsys.readouterr().out
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    (length,) = found(flags)
    assert {json.loads(line)["latents"] for line in log} == {length}


# ---------------------------------------------------------------- making
def test_only_the_missing_shard_is_made_again(copy, capsys):
    """Delete a shard and run again: it comes back bit for bit, the others are not touched, and the
    index names all hashes."""
    paths = shards(copy)
    before = {p.name: (digest(p), p.stat().st_mtime_ns) for p in paths}
    paths[1].unlink()
    main(Config(**copy, generate=True))
    assert "6 pairs in 2 shards, 1 to make" in capsys.readouterr().out
    assert {p.name: digest(p) for p in paths} == {n: d for n, (d, _) in before.items()}
    assert paths[0].stat().st_mtime_ns == before[paths[0].name][1]
    index = json.loads((Path(copy["data"]) / "index.json").read_text())
    assert index == {"pairs": 6, "shards": {n: d for n, (d, _) in before.items()}}


@pytest.mark.parametrize("micro, kept", [(0, 2), (2, 1)])
def test_interrupted_generation_goes_on(files, micro, kept, tmp_path, monkeypatch, capsys):
    """SIGTERM in the second shard: what is whole stays, no index claims that all is there, and the
    same command makes the rest, to the same bytes."""
    made = {k: v for k, v in files.items() if k != "other"}
    made |= {"data": str(tmp_path), "pairs": 12, "micro": micro}
    at_call(monkeypatch, train_ode, "many_steps", 1 + (4 // (micro or 4)), terminate)
    with pytest.raises(SystemExit, match="^143$"):  # nothing that needs all pairs begins
        main(Config(**made, generate=True))
    assert len(list(tmp_path.iterdir())) == kept and not (tmp_path / "index.json").exists()
    assert "stopped" in capsys.readouterr().out
    main(Config(**made, generate=True))
    again = tmp_path / "again"
    main(Config(**made | {"data": str(again)}, generate=True))
    assert (tmp_path / "index.json").read_text() == (again / "index.json").read_text()


def test_a_signal_in_the_last_shard_loses_nothing(files, tmp_path, monkeypatch, capsys):
    """It is finished and written, and so is the index; the same command has nothing to make."""
    made = {k: v for k, v in files.items() if k != "other"} | {"data": str(tmp_path), "pairs": 4}
    at_call(monkeypatch, train_ode, "many_steps", 1, terminate)
    main(Config(**made, generate=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "pairs-000000.safetensors"]
    main(Config(**made, generate=True))
    assert "4 pairs in 1 shards, 0 to make" in capsys.readouterr().out


def test_a_teacher_that_is_not_finite_leaves_no_pairs(files, tmp_path):
    """Its overflow is named with the pairs, and nothing is written of them."""
    teacher = load_dit(files["teacher"])
    teacher.head.head.bias += 1e5
    save_dit(teacher, tmp_path / "bad.safetensors")
    made = {k: v for k, v in files.items() if k != "other"}
    made |= {"teacher": str(tmp_path / "bad.safetensors"), "data": str(tmp_path / "pairs")}
    with pytest.raises(FloatingPointError, match="states of pairs 0 to 3 are not finite"):
        main(Config(**made, generate=True))
    assert not list((tmp_path / "pairs").glob("*"))


# ---------------------------------------------------------------- another run's
OTHER = {
    "guidance": ({"guidance": 2.0}, "guidance is 3.0, not 2.0"),
    "negative": ({"negative": "a red disc"}, "negative is '', not 'a red disc'"),
    "shift": ({"shift": 8.0}, "shift is 5.0, not 8.0"),
    "levels": ({"denoising": (1000.0, 500.0)}, "denoising is [1000.0, 750.0, 500.0, 250.0], not"),
    "size": ({"latent": (9, 4, 4)}, "latent is [6, 4, 4], not [9, 4, 4]"),
    "prompts": ({"prompts": "prompts.txt"}, "prompts is 'toy', not "),
    "teacher": ({"teacher": "other"}, "teacher is '"),
}


@pytest.mark.parametrize("mode", ["generate", "check", "train"])
@pytest.mark.parametrize("name", OTHER)
def test_pairs_of_another_run_are_refused(name, mode, files, copy, tmp_path, monkeypatch, capsys):
    """What differs is named with both values, before any work, in each of the three modes."""
    changes, says = OTHER[name]
    if name == "teacher":
        changes = {"teacher": files["other"]}
    if name == "prompts":
        (tmp_path / "prompts.txt").write_text("a red disc moves left over a green wave\n")
        changes = {"prompts": str(tmp_path / "prompts.txt")}
    before = {p: digest(p) for p in Path(copy["data"]).iterdir()}
    switches = [] if mode == "train" else [f"--{mode}"]
    flags = copy | {"out": str(tmp_path / "run")} | changes
    code, error = command_line(monkeypatch, capsys, train_ode, *switches, **flags)
    assert code == 2 and "pairs-000000.safetensors was made otherwise: " in error and says in error
    assert {p: digest(p) for p in Path(copy["data"]).iterdir()} == before
    assert not (tmp_path / "run").exists()


def test_a_prompt_file_that_was_edited_is_noticed(copy, tmp_path, capsys):
    """The flag is the same and the words are not: training refuses, --generate makes them again."""
    path = tmp_path / "prompts.txt"
    flags = copy | {"prompts": str(path), "data": str(tmp_path / "mine")}
    path.write_text(
        "a red disc moves left over a green wave\na blue ring moves up over a red wave\n"
    )
    main(Config(**flags, generate=True))
    path.write_text(
        "a red disc moves left over a green wave\na blue disc moves up over a red wave\n"
    )
    with pytest.raises(UserError, match="pairs-000000.*made for other prompts than --prompts has"):
        main(Config(**flags | {"out": str(tmp_path / "run")}))
    main(Config(**flags, generate=True))
    assert "pairs-000000.safetensors is made again: words is" in capsys.readouterr().out
    found(flags)


def test_embeddings_of_another_encoder_are_refused(copy, tmp_path, capsys):
    """The file's name and its prompts are the same; the teacher was told something else."""
    (tmp_path / "prompts.txt").write_text("a red disc moves left over a green wave\n")
    path = tmp_path / "prompts.safetensors"
    embed = {"prompts": str(tmp_path / "prompts.txt"), "out": str(path), "weights": "toy"}
    text.main(text.Config(**embed))
    flags = copy | {"prompts": str(path), "data": str(tmp_path / "mine"), "pairs": 2}
    main(Config(**flags, generate=True))
    main(Config(**flags, check=True))
    tensors, made = read_tensors(path)
    write_safetensors(path, tensors, made | {"encoder": "another"})
    for switch in ({"generate": True}, {"check": True}, {"out": str(tmp_path / "run")}):
        with pytest.raises(UserError, match="was made otherwise: encoder is 'toy .*', not 'anoth"):
            main(Config(**flags | switch))


@pytest.mark.parametrize("changes", [{"shard": 3}, {"pairs": 4}, {"shard": 5, "pairs": 9}], ids=str)
def test_a_foreign_shard_is_named(changes, copy):
    """A file that is none of the asked shards is not left lying beside them in silence."""
    with pytest.raises(UserError, match="pairs-000004.safetensors is not one of"):
        main(Config(**copy | changes, generate=True))


def test_a_file_that_the_index_does_not_name_is_named(copy):
    """A shard that somebody copied into the folder is neither trained on nor passed over."""
    path = shards(copy)[0]
    shutil.copy(path, path.with_name("pairs-000008.safetensors"))
    with pytest.raises(UserError, match="index.json does not name pairs-000008.safetensors"):
        found(copy)


@pytest.mark.parametrize("name", ["pairs", "shard"])
def test_no_pairs_at_all_are_refused(name, copy, tmp_path):
    with pytest.raises(UserError, match="must be at least 1"):
        main(Config(**copy | {name: 0, "data": str(tmp_path / "none")}, generate=True))


def test_blocks_anchors_and_seeds_share_a_teachers_pairs(copy, tmp_path):
    """A trajectory does not know how the student will cut it: no need to make it again."""
    for n, changes in enumerate(
        (
            {"anchors": 0},
            {"block": 2, "anchors": 1},
            {"share_noise": "all"},
            {"seed": 3},
            {"shard": 9},
        )
    ):
        main(Config(**copy | {"out": str(tmp_path / str(n)), "steps": 1, "batch": 2} | changes))


# ---------------------------------------------------------------- --check
def rewrite(data: Path, change) -> None:
    """Change the states of the first shard and sign them in the index, as a broken generator
    would."""
    path = data / "pairs-000000.safetensors"
    tensors, made = read_tensors(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors["states"])
    write_safetensors(path, tensors, made)
    index = json.loads((data / "index.json").read_text())
    index["shards"][path.name] = digest(path)
    (data / "index.json").write_text(json.dumps(index))


def flip_byte(data: Path) -> None:
    path = data / "pairs-000004.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def exchange(data: Path) -> None:
    first, second = (data / f"pairs-{n:06d}.safetensors" for n in (0, 4))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def cut_off(data: Path) -> None:
    path = data / "pairs-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def states(change):
    return lambda data: rewrite(data, change)


FALL = "do not fall from noise to a clean end"
DAMAGES = {
    "flipped byte": (
        flip_byte,
        {},
        "pairs-000004.safetensors is not the file that the index names",
    ),
    "exchanged": (exchange, {}, "pairs-000000.safetensors is not the file that the index names"),
    "cut off": (cut_off, {}, "pairs-000000.safetensors"),
    "NaN": (
        states(lambda x: x[1, 2].fill_(float("nan"))),
        {},
        "pair 1 in pairs-000000.safetensors: its states are not finite",
    ),
    "exchanged pairs": (
        states(lambda x: x.copy_(x.flip(0))),
        {},
        "pair 0 in pairs-000000.safetensors: its states do not start from the noise of seed 0",
    ),
    "another seed": (
        lambda data: None,
        {"seed": 1},
        "its states do not start from the noise of seed 1",
    ),
    "start noise as end": (states(lambda x: x[:, 4].copy_(x[:, 0])), {}, FALL),
    "fresh noise as end": (states(lambda x: x[:, 4].copy_(randn(9, *x[:, 4].shape))), {}, FALL),
    "missing index": (
        lambda data: (data / "index.json").unlink(),
        {},
        "index.json does not exist: make pairs first",
    ),
    "empty index": (
        lambda data: (data / "index.json").write_text("{}"),
        {},
        "index.json names no shards",
    ),
    "missing shard": (
        lambda data: (data / "pairs-000004.safetensors").unlink(),
        {},
        "pairs-000004.safetensors does not exist",
    ),
}


def test_good_pairs_pass_the_check(copy, monkeypatch, capsys):
    """The check says how many pairs it found good."""
    assert command_line(monkeypatch, capsys, train_ode, "--check", **copy) == (0, "")
    assert "6 pairs of 1 lengths are good" in capsys.readouterr().out


@pytest.mark.parametrize("name", DAMAGES)
def test_check_names_the_damage(name, copy, monkeypatch, capsys):
    """Every kind of damage ends with exit code 2 and one line that names file and fault."""
    damage, changes, says = DAMAGES[name]
    damage(Path(copy["data"]))
    code, error = command_line(monkeypatch, capsys, train_ode, "--check", **copy | changes)
    assert code == 2 and says in error
