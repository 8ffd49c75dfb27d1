"""The toy world's tables: students are trained by commands that exist, each row is what its seeds
give, and the measures of lengths, of the middle of a clip and of a wrong past see what they
should."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny import WORDED, command_line, randn, tiny_dit

import anchors
import train_ode
from dit import save_dit
from lib.common import UserError, from_cli
from lib.recipe import Recipe
from lib.states import contents
from lib.world import numbers_of
from toy import causality, critic, gaps, inbetween, lengths, students, tables, world
from toy.causality import with_wrong_past
from vae import VAE, VAEConfig, save_vae

CPU = torch.device("cpu")


def small_vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(dim=4, z_dim=2, num_res_blocks=1)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_dit(tiny_dit(1, **WORDED), folder / "student.safetensors")
    save_vae(small_vae(), folder / "vae.safetensors")
    return folder


@pytest.fixture
def runs(tmp_path):
    """A student for every name and two seeds; the separate ones have two files."""
    for n, name in enumerate(students.STAGE2):
        for seed in (0, 1):
            out = students.folder(str(tmp_path), name, seed)
            out.mkdir()
            files = ("forward", "backward") if name == "separate" else ("student",)
            for k, file in enumerate(files):
                save_dit(tiny_dit(10 * n + 3 * seed + k, **WORDED), out / f"{file}.safetensors")
    return tmp_path


def config_of(number: int, weights: Path, runs: Path, **changes) -> tables.Config:
    usual = {"table": number, "weights": str(weights), "runs": str(runs), "clips": 2}
    return tables.Config(**usual | changes)


# ---------------------------------------------------------------- tables
@pytest.mark.parametrize("number", [2, 3, 6])
def test_table_has_its_rows_and_averages_over_seeds(number, runs, weights, monkeypatch):
    """Each row: the paper's number, and the mean of what each seed alone gives, with both
    errors."""
    monkeypatch.setitem(tables.TABLES, 2, tables.TABLES[2][1:3])
    long = tables.Row("long", "exp7", anchors.long(24, "backward"))
    monkeypatch.setitem(tables.TABLES, 3, (long,))
    one, other, both = (
        tables.table(config_of(number, weights, runs, seeds=seeds), CPU)
        for seeds in ((0,), (1,), (0, 1))
    )
    labels = [row.label for row in tables.TABLES[number]]
    assert list(both) == ["true clips, decoded", "other true clips, decoded", *labels]
    for row in tables.TABLES[number]:
        assert both[row.label].get("paper", "") == row.paper
        for column in set(both[row.label]) - {"paper"}:
            x, y, mean = (t[row.label][column] for t in (one, other, both))
            if x.clips and y.clips:
                assert mean.mean == pytest.approx((x.mean + y.mean) / 2, rel=1e-4, abs=1e-6)
                assert mean.seeds == pytest.approx(abs(x.mean - y.mean) / 2, rel=1e-3, abs=1e-6)
                if x.se == x.se and y.se == y.se:
                    want = (x.se**2 + y.se**2) ** 0.5 / 2
                    assert mean.se == pytest.approx(want, rel=1e-3, abs=1e-6), column


def test_a_table_has_the_columns_it_promises(runs, weights, monkeypatch):
    monkeypatch.setitem(tables.TABLES, 3, (tables.Row("l", "exp7", anchors.long(24, "backward")),))
    monkeypatch.setitem(tables.TABLES, 2, tables.TABLES[2][2:3])
    for number in (1, 2, 3):
        found = tables.table(config_of(number, weights, runs, seeds=(0,)), CPU)
        *_, last = found.values()
        assert set(last) - {"paper"} == set(tables.columns_of(number)), number


def test_every_seed_has_clips_and_noise_of_its_own(runs, weights, monkeypatch):
    """The same student under two training seeds does not give the same numbers: the error over
    seeds is not of weights alone."""
    monkeypatch.setitem(tables.TABLES, 6, tables.TABLES[6][:1])
    first, second = (students.folder(str(runs), "exp10", s) / "student.safetensors" for s in (0, 1))
    second.write_bytes(first.read_bytes())
    found = tables.table(config_of(6, weights, runs, seeds=(0, 1)), CPU)
    label = tables.TABLES[6][0].label
    assert found[label]["motion"].seeds > 0 and found[label]["motion"].clips == 4


def test_students_are_sampled_by_each_noise_rule(runs, weights):
    """Three rows for a plan with anchors, one for a plan without; the rules differ, "none" is the
    default."""
    rules = ("none", "start", "all")
    config = config_of(1, weights, runs, seeds=(0,), share_noise=rules)
    plain = tables.table(config_of(1, weights, runs, seeds=(0,)), CPU)
    found = tables.table(config, CPU)
    labels = [f"backward, P = 3, noise: {rule}" for rule in rules]
    assert set(labels) <= found.keys() and "backward, P = 0" in found and "forward" in found
    values = [found[label]["round trip"].mean for label in labels]
    assert len(set(values)) == 3 and values[0] == plain["backward, P = 3"]["round trip"].mean
    assert found["forward"]["round trip"].mean == plain["forward"]["round trip"].mean


def test_table_uses_the_student_of_its_direction(runs, weights, monkeypatch):
    """Separate students: the forward row is made by forward.safetensors, the backward row by the
    other."""
    monkeypatch.setitem(tables.TABLES, 2, tables.TABLES[2][::3])  # separate forward and backward
    config = config_of(2, weights, runs, seeds=(0,))
    before = tables.table(config, CPU)
    other = (runs / "exp1-0" / "student.safetensors").read_bytes()
    (runs / "separate-0" / "backward.safetensors").write_bytes(other)
    after = tables.table(config, CPU)
    changed = {k for k in before if before[k]["Fréchet"].mean != after[k]["Fréchet"].mean}
    assert changed == {"backward, separate student and critic"}


def test_missing_students_come_with_their_command(weights, tmp_path):
    says = r"exp10-0, exp11-0, exp7-0 are not .*toy.students .* --students exp10 exp11 exp7"
    with pytest.raises(UserError, match=says):
        tables.table(config_of(6, weights, tmp_path, seeds=(0,)), CPU)


def test_rows_without_students_are_left_out(runs, weights, monkeypatch, capsys):
    """What is not trained is named with its command, the rest is measured; a row may have seeds of
    its own."""
    monkeypatch.setitem(
        tables.TABLES, 10, tables.TABLES[10][3:12]
    )  # stage 2 of noisy context, and all of clean context
    found = tables.table(config_of(10, weights, runs, seeds=(0, 1)), CPU)
    assert list(found)[2:] == [
        f"noisy context (UniTemp), stage 2, {name}"
        for name in ("forward", "backward, P = 3", "backward, P = 0")
    ]
    says = capsys.readouterr().out
    assert "clean-p3-1, clean0-0" in says
    assert says.strip().endswith("--seeds 0 1 --students clean0 clean3")


@pytest.mark.parametrize(
    "flags,says",
    [
        ({"table": 7}, "--table 7"),
        ({"table": 1, "clips": 1}, "--clips 1"),
        ({"table": 1, "share_noise": "some"}, "--share_noise 'some' must be none or start or all"),
    ],
)
def test_bad_tables_are_one_sentence(flags, says, monkeypatch, capsys):
    code, line = command_line(monkeypatch, capsys, tables, **flags)
    assert code == 2 and says in line


def test_every_student_of_a_table_is_trained_by_some_command():
    """The commands parse, write the file that ends them, and start stage 2 from the stage 1 of the
    same seed."""
    commands = students.commands("out", "w", "pairs", [4])
    ends = {end.parent.name for end, _, _ in commands}
    assert {f"{row.student}-4" for table in tables.TABLES.values() for row in table} <= ends
    for end, need, line in commands:
        module, *words = line.removeprefix("-m ").split()
        config = from_cli(importlib.import_module(module.removesuffix(".py")).Config, words)
        assert config.seed == 4 and Path(config.out) == end.parent
        assert need is None or (config.student == str(need) and need in {e for e, _, _ in commands})


def test_a_student_that_was_trained_otherwise_is_named(weights, tmp_path):
    """A finished run is left out if it was this one; a trial of fewer steps, or one of a teacher
    that was trained again since, is refused."""
    (weights / "teacher.safetensors").write_bytes((weights / "student.safetensors").read_bytes())
    flags = {"out": str(tmp_path), "weights": str(weights), "seeds": (0,), "students": ("exp7",)}
    (end, _, line), (_, need, _) = students.runs_to_go(students.Config(**flags))
    end.parent.mkdir()
    end.touch()
    config = asdict(from_cli(train_ode.Config, line.split()[1:]))
    for kept, says in (
        (config, ""),
        (config | contents(config), ""),
        (config | {"steps": 3}, "student.safetensors was trained otherwise: steps is 3, not 300"),
        (config | {"content of --teacher": "x"}, "otherwise: content of --teacher is 'x', not"),
    ):
        torch.save({"config": json.dumps(kept)}, end.parent / "state.pt")
        if says:
            with pytest.raises(UserError, match=says):
                students.runs_to_go(students.Config(**flags))
            with pytest.raises(UserError, match=says):
                tables.rows_there(config_of(10, weights, tmp_path, seeds=(0,)))
        else:
            assert [x[1] for x in students.runs_to_go(students.Config(**flags))] == [need]
    (weights / "teacher.safetensors").unlink()


# ---------------------------------------------------------------- every length
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("given", [0, 12])
@pytest.mark.parametrize("latents", [6, 21, 24])
def test_plans_of_every_length(latents, direction, given):
    """So many latents are made beside those given, which are the head or the tail; windows within
    the horizon."""
    plan = lengths.plan_of(latents, direction, given, Recipe())
    assert plan.length == latents + given and len(plan.made) == latents
    forward = direction == "forward"
    first = (0 if forward else latents) if given else (0 if forward else latents - 3)
    assert plan.order[0] == first
    assert all(len(step.reads) <= 12 for step in plan.steps) or plan.length <= 21
    z = randn(0, 2, 21, 2, 4, 4)
    found = lengths.given_latents(plan, z)
    ours = z[:, :12] if forward else z[:, 9:]
    assert (
        sorted(found)
        == (list(range(12)) if forward else list(range(latents, latents + 12)))[:given]
    )
    assert all(torch.equal(found[i], ours[:, n]) for n, i in enumerate(sorted(found)))


def test_lengths_print_every_row(weights, tmp_path, monkeypatch, capsys):
    """A row a set of captions, length, direction and given; frame 0 of a given head is the
    user's."""
    (weights / "teacher.safetensors").write_bytes((weights / "student.safetensors").read_bytes())
    flags = ["--weights", str(weights), "--known", "--clips", "2", "--lengths", "6", "24"]
    monkeypatch.setattr("sys.argv", ["lengths", *flags, "--out", str(tmp_path / "t.json")])
    lengths.run(lengths.main, lengths.Config)
    printed = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    rows = json.loads((tmp_path / "t.json").read_text())
    assert printed == [f"| {name}" for name in rows] and len(rows) == 2 * (2 + 2 * 2 * 2)
    for said in ("held out", "known"):
        assert rows[f"6, forward, 12 given, {said}"]["frame 0: colours"] == "given"
        assert rows[f"6, backward, 12 given, {said}"]["frame 0: colours"]["clips"] == 2
        assert "caption, last made" in rows[f"24, backward, own, {said}"]
    (weights / "teacher.safetensors").unlink()


def test_lengths_that_do_not_fit_are_refused_first(weights, monkeypatch, capsys):
    code, line = command_line(monkeypatch, capsys, lengths, weights=weights, lengths=(6, 10))
    assert code == 2 and "10 latents" in line and "9 or 12" in line


def test_shape_changes_are_counted():
    """Half a clip of discs, half of squares: one change in fifteen looks; none in a true clip."""
    one, other = (
        world.render([f"a red {shape} moves left over a blue wave"], [3])
        for shape in ("disc", "square")
    )
    assert lengths.shape_changes(one).item() == 0
    mixed = torch.cat([one[:, :, :40], other[:, :, 40:]], 2)
    assert lengths.shape_changes(mixed).item() == pytest.approx(1 / 15)


# ---------------------------------------------------------------- between two scenes
def test_colours_of_a_gap_are_read_frame_by_frame():
    """A gap of 12 frames, 3 of them in colours of neither scene; the next scene comes 5 late."""
    colours = ("red", "blue"), ("cyan", "magenta"), ("green", "yellow")  # sprite, ground
    first, third, then = (f"a {a} square moves left over a {b} wave" for a, b in colours)
    shown = [first] * 12 + [third] * 3 + [then] * 5 + [first] * 5 + [then] * 19
    clips = {words: world.render([words], [3], 32, len(shown)) for words in set(shown)}
    video = torch.stack([clips[words][:, :, f] for f, words in enumerate(shown)], 2)
    found = gaps.read(video, [(first, then)], 8, 20)
    assert {name: x.item() for name, x in found.items()} == {
        "colour: neither": 3,
        "colour: late": 5,
        "ground: neither": 3,
        "ground: late": 5,
    }


def test_gaps_print_every_row(weights, tmp_path, monkeypatch, capsys):
    """The hard cut, then a row a gap, made and given; counts are of frames that are there."""
    flags = ["--weights", str(weights), "--clips", "2", "--gaps", "3", "6"]
    monkeypatch.setattr("sys.argv", ["gaps", *flags, "--out", str(tmp_path / "t.json")])
    gaps.run(gaps.main, gaps.Config)
    printed = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if "±" in line]
    rows = json.loads((tmp_path / "t.json").read_text())
    names = [f"{gap}, scenes {how}" for gap in (3, 6) for how in ("made", "given")]
    assert printed == [f"| {name}" for name in rows]
    assert list(rows) == ["a hard cut, decoded", *names]
    for name, row in rows.items():
        assert set(row) == set(gaps.COLUMNS) and row["colour: late"]["mean"] <= gaps.AFTER
        assert row["colour: neither"]["mean"] <= (4 * int(name[0]) if name[0].isdigit() else 0)


# ---------------------------------------------------------------- between two ends
def test_teacher_fills_in_between_what_is_held():
    """A teacher of constant velocity 1 (0 without prompt): known latents come back as given, the
    others are noise - guidance, and at every step the known ones were shown at the level of the
    others."""
    shown = []

    def teacher(x, t, prompts, pos):
        shown.append((x[:1, [0, 3]].clone(), t[0, 0].item() / 1000))
        return prompts.mean((1, 2)).view(-1, 1, 1, 1, 1).expand_as(x)

    z, noise = randn(0, 1, 4, 1, 2, 2), randn(1, 1, 4, 1, 2, 2)
    filled = inbetween.fill_in(teacher, torch.ones(1, 2, 3), z, [0, 3], noise, 2.0)
    assert torch.equal(filled[:, [0, 3]], z[:, [0, 3]])
    assert torch.allclose(filled[:, [1, 2]], noise[:, [1, 2]] - 2, atol=1e-5)
    assert len(shown) == 48 and shown[0][1] == 1
    for x, sigma in shown:
        assert torch.allclose(x, (1 - sigma) * z[:, [0, 3]] + sigma * noise[:, [0, 3]], atol=1e-5)


def test_inbetween_table(weights):
    """Four ways and the floor; blending keeps the given frames exactly and hardly moves."""
    (weights / "teacher.safetensors").write_bytes((weights / "student.safetensors").read_bytes())
    rows = inbetween.table(inbetween.Config(str(weights), clips=2), CPU)
    (weights / "teacher.safetensors").unlink()
    true, blend, teacher, student, others = rows.values()
    assert blend["head"].mean == blend["tail"].mean == 1
    assert blend["jump at 9"].mean < 0.5 and blend["motion"].mean < 0.04
    heads = [row["head"].mean for row in (true, teacher, student)]
    assert heads == pytest.approx([heads[0]] * 3)  # the same latents, decoded
    assert len({row["Fréchet"].mean for row in rows.values()}) == 5 and list(others) == ["Fréchet"]


def test_end_flickering_by_hand():
    """A quarter of the range away in one of nine frames of the head, nowhere in the tail."""
    true = torch.zeros(1, 3, 81, 2, 2)
    video = true.clone()
    video[:, :, 4] = 0.5
    found = inbetween.end_flickering(video, true)
    assert found["head"].item() == pytest.approx(1 - 0.25 / 9) and found["tail"].item() == 1


# ---------------------------------------------------------------- when do anchors help
@pytest.mark.parametrize("p", [0, 1, 2])
def test_only_the_firsts_of_blocks_get_a_wrong_past(p):
    """Latents 3 and 6 are those of a clip that was glued together at the right frame; all others,
    and all with their whole past, are the plain ones."""
    vae, video = small_vae(), randn(0, 2, 3, 33, 16, 16).clamp(-1, 1)
    plain, wrong = vae.encode(video, chunk=99), with_wrong_past(vae, video, [3, 6], p)
    same_latents = [i for i in range(9) if i not in (3, 6)]
    assert torch.equal(wrong[:, same_latents], plain[:, same_latents])
    for i in (3, 6):
        start = 4 * (i - p) - 3  # latent i shows frames 4i-3 .. 4i
        glued = torch.cat([video.roll(1, 0)[:, :, :start], video[:, :, start:]], 2)
        assert torch.allclose(wrong[:, i], vae.encode(glued)[:, i], atol=1e-5)
        assert not torch.equal(wrong[:, i], plain[:, i])
    assert torch.allclose(with_wrong_past(vae, video, [3, 6], 6), plain, atol=1e-6)


def test_causality_has_rows_for_every_speed(weights, tmp_path, monkeypatch, capsys):
    """A row for each speed and each length of right past; slow clips move less."""
    flags = {"weights": weights, "clips": 2, "speed": (1, 0.25), "out": tmp_path / "t.json"}
    code, _ = command_line(monkeypatch, capsys, causality, **flags)
    rows = json.loads((tmp_path / "t.json").read_text())
    assert code == 0 and len(rows) == 2 * 5
    fast, slow = (rows[f"speed {s}, all of the past is right"] for s in ("1", "0.25"))
    assert {"PSNR of those latents", "FR inter", "FR inter max", "round trip"} <= fast.keys()
    assert fast["PSNR of those latents"] != slow["PSNR of those latents"]
    code, line = command_line(monkeypatch, capsys, causality, weights=weights, speed=0)
    assert code == 2 and "--speed 0.0" in line


# ---------------------------------------------------------------- what a critic sees
def test_change_in_each_latent_of_a_block():
    """A video whose changes are 1, 2 and 3 in the latents of every block, and 7 in the first one,
    which is not counted: 1, 2 and 3 over the mean of all."""
    sizes = [7, 7] + [1, 2, 3] * 6  # latents 1 .. 20
    steps = torch.tensor([0.0] + [s / 1000 for s in sizes for _ in range(4)])
    video = steps.cumsum(0).view(1, 1, -1, 1, 1).expand(2, 3, 81, 4, 4)
    found = critic.jumps(video, anchors.forward(21))
    mean = sum(sizes) / len(sizes)
    for n, want in enumerate((1, 2, 3), 1):
        assert found[f"change in latent {n}"].tolist() == pytest.approx([want / mean] * 2, rel=1e-3)
    assert found["FR inter"].tolist() == pytest.approx([(1 / 7 + 5 / 3) / 6] * 2, rel=1e-3)


def test_a_step_against_the_gradient_has_one_length():
    """As long for a clip with a gradient nine times as large, straight against it; none of none."""
    z, gradient = randn(0, 2, 6, 2, 4, 4), randn(1, 2, 6, 2, 4, 4)
    gradient[1] *= 9
    step = (z - critic.moved(z, gradient)).flatten(1)
    want = critic.STEP * z.square().mean().sqrt().item()
    assert step.square().mean(1).sqrt().tolist() == pytest.approx([want] * 2)
    along = torch.nn.functional.cosine_similarity(step, gradient.flatten(1))
    assert along.tolist() == pytest.approx([1, 1])
    assert torch.equal(critic.moved(z, torch.zeros_like(z)), z)


def test_a_critic_that_equals_the_teacher_gives_no_gradient():
    """Another one does; every clip and draw has a level of its own, in the band."""
    net, other, config = tiny_dit(1, **WORDED), tiny_dit(2, **WORDED), critic.Config(draws=2)
    z, prompt = randn(0, 2, 6, 2, 4, 4), randn(3, 2, 4, WORDED["text_dim"])
    same = critic.mean_gradient(net, net, z, prompt, (0.2, 0.4), config)
    assert same.abs().max() < 1e-5
    found = critic.mean_gradient(net, other, z, prompt, (0.2, 0.4), config)
    assert found.abs().mean() > 1e-3
    levels = []

    def spy(teacher, other, z, at):
        levels.extend(at.u.tolist())
        return z, z

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(critic, "scores", spy)
        critic.mean_gradient(net, other, z + 1, prompt, (0.2, 0.4), config)
    assert len(set(levels)) == 4 and all(0.2 <= u <= 0.4 for u in levels)


def test_denoising_again_ends_where_the_velocity_points():
    """A network that knows the clip brings it back from any level, whatever the noise."""
    z, noise = randn(0, 2, 6, 2, 4, 4), randn(1, 2, 6, 2, 4, 4)
    for sigma in (0.1, 0.7, 0.95):
        again = critic.denoised(lambda x, t, text, pos: noise - z, z, None, noise, sigma)
        assert torch.allclose(again, z, atol=1e-5)


def test_a_critic_that_is_told_places_equals_one_that_is_not_until_it_learns():
    """Then the vector of a place is added to that latent of every block, and to no other."""
    plain, told = tiny_dit(1, **WORDED), tiny_dit(1, **WORDED)
    places = critic.tell_places(told, 3)
    z, t, pos = randn(0, 1, 6, 2, 4, 4), torch.full((1, 6), 500.0), torch.arange(6)
    prompt = randn(1, 1, 4, WORDED["text_dim"])
    assert torch.equal(told(z, t, prompt, pos), plain(z, t, prompt, pos))
    with torch.no_grad():
        places[1] += 1
    before, after = plain._patchify(z), told._patchify(z)
    same = [torch.equal(before[:, i], after[:, i]) for i in range(6)]
    assert same == [True, False, True] * 2
    assert torch.allclose(after[:, 4], before[:, 4] + 1)


def test_critic_has_a_row_for_each_question(weights, tmp_path, monkeypatch, capsys):
    run, dit = tmp_path / "run", tiny_dit(1, **WORDED)
    run.mkdir()
    save_dit(dit, run / "student.safetensors")
    torch.save({"critic0": tiny_dit(2, **WORDED).state_dict()}, run / "state.pt")
    save_dit(tiny_dit(3, **WORDED), tmp_path / "teacher.safetensors")
    flags = {"teacher": tmp_path / "teacher.safetensors", "vae": weights / "vae.safetensors"}
    flags |= {"run": run, "clips": 2, "draws": 1, "out": tmp_path / "t.json"}
    assert command_line(monkeypatch, capsys, critic, **flags)[0] == 0
    rows = json.loads((tmp_path / "t.json").read_text())
    assert len(rows) == critic.ROWS and list(rows)[:3] == ["student", "teacher", "critic"]
    assert all(row["FR inter"]["clips"] == 2 for row in rows.values())
    changes = [row["FR inter, change"]["mean"] for row in list(rows.values())[1:]]
    assert len(set(changes)) == len(changes)
    monkeypatch.setattr(critic, "FITTED", 16)
    for places in (False, True):
        fitted = flags | {"fit": 3, "places": places}
        assert command_line(monkeypatch, capsys, critic, **fitted)[0] == 0
        again = json.loads((tmp_path / "t.json").read_text())
        assert again["student"] == rows["student"] and again["critic"] != rows["critic"]
        rows = again
    code, line = command_line(monkeypatch, capsys, critic, **flags, places=True)
    assert code == 2 and "--fit" in line
    torch.save({"step": 1}, run / "state.pt")
    code, line = command_line(monkeypatch, capsys, critic, **flags)
    assert code == 2 and "state.pt has no critic" in line


def test_numbers_of_the_tables_are_held_out():
    assert all(world.held_out(world.caption(n)) for n in numbers_of(8, 2))


@torch.no_grad()
def test_ball_seen_is_a_share_of_frames(monkeypatch):
    """Of frames in which a third of the ball shows: nearly all of true clips, none without a ball,
    about half of a clip that has one in half of its frames."""
    captions = [world.caption(n) for n in range(4)]
    whole = world.render(captions, range(4))
    monkeypatch.setattr(world, "BALL_RADIUS", -9.0)
    none = world.render(captions, range(4))
    monkeypatch.undo()
    seen = lengths.ball_seen(whole)
    assert 0.6 < seen.min() and seen.mean() > 0.8 and lengths.ball_seen(none).max() < 0.02
    mixed = torch.cat([whole[:, :, :40], none[:, :, 40:]], 2)
    assert (lengths.ball_seen(mixed) < 0.6).all() and lengths.ball_seen(mixed).mean() > 0.35
