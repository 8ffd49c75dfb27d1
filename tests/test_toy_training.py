"""The toy's VAE and teacher: they learn, go on exactly after an interruption, and write weights
that load."""

import hashlib
from contextlib import suppress
from functools import partial

import pytest
import torch
from tiny import WORDED, at_call, command_line, crash, distance, randn, rows, same, saved, terminate

from dit import DiT, DiTConfig, load_dit
from lib.common import UserError, generator
from lib.tensors import read_tensors
from lib.text import HELD_OUT
from lib.training import optimisers_of
from toy import pack, train_teacher, train_vae, world
from toy.train_teacher import teacher_loss
from toy.train_vae import clips, init_weights, vae_loss
from vae import VAE, VAEConfig, load_vae

SMALL = VAEConfig(dim=4, z_dim=2, num_res_blocks=1)


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """A preset "small" for both scripts, and clips of at most 9 frames where the scripts ask for
    81."""
    monkeypatch.setitem(train_vae.PRESETS, "small", SMALL)
    monkeypatch.setitem(train_teacher.PRESETS, "small", DiTConfig(**WORDED))
    monkeypatch.setattr(train_teacher, "FRAMES", 9)
    monkeypatch.setattr(
        train_vae, "clips", lambda seeds, size, frames: clips(seeds, size, min(frames, 9))
    )
    monkeypatch.setattr(train_teacher, "report", partial(train_teacher.report, n=2))


def train(out, script=train_vae, **changes):
    """Train in this process; the folder it wrote."""
    usual = {"steps": 4, "size": 16, "preset": "small"}
    usual |= (
        {"frames": (1, 5), "batch": (2, 2), "share": (0.5, 0.5)}
        if script is train_vae
        else {"clips": 6, "batch": 2}
    )
    with suppress(SystemExit):  # stopped by a signal
        script.main(script.Config(**usual | {"out": str(out)} | changes))
    return out


# ---------------------------------------------------------------- the VAE
def test_clips_follow_from_their_number():
    """Clip n is the same whoever asks, alone or in a batch; its caption says what it shows,
    held-out ones are others."""
    (both, captions), (one, (caption,)) = clips([3, 8], 16, 9), clips([8], 16, 9)
    assert (
        both.shape == (2, 3, 9, 16, 16)
        and torch.equal(both[1], one[0])
        and captions[1] == caption == world.caption(8)
    )
    assert not torch.equal(clips([HELD_OUT + 8], 16, 9)[0], one)


def test_vae_loss_is_the_sum_of_its_terms():
    """l1 + 2 mse + diff * l1 of frame differences + kl * KL, each recomputed here from the model's
    own moments."""
    torch.manual_seed(0)
    vae, video, noise = VAE(SMALL), clips([1, 2], 16, 5)[0], randn(0, 2, 2, 2, 2, 2)
    init_weights(vae)
    loss, terms = vae_loss(vae, video, noise, 0.3, 0.7)
    mu, logvar = vae.moments(video)
    made = vae.decoder(vae.conv2(mu + logvar.exp().sqrt() * noise), None)
    l1, mse = (made - video).abs().mean(), ((made - video) ** 2).mean()
    diff = ((made[:, :, 1:] - made[:, :, :-1]) - (video[:, :, 1:] - video[:, :, :-1])).abs().mean()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, logvar.exp().sqrt()), torch.distributions.Normal(0.0, 1.0)
    ).mean()
    assert loss.item() == pytest.approx((l1 + 2 * mse + 0.7 * diff + 0.3 * kl).item(), rel=1e-5)
    assert terms == pytest.approx(
        {"l1": l1.item(), "mse": mse.item(), "diff": diff.item(), "kl": kl.item()}, rel=1e-4
    )


def test_vae_starts_with_little_posterior_noise():
    """Training starts from log-variances about -6 and latents of the scale of the pixels, not from
    a collapsed posterior."""
    torch.manual_seed(0)
    vae = VAE(SMALL)
    init_weights(vae)
    mu, logvar = vae.moments(clips([1, 2], 16, 5)[0])
    assert logvar.mean() < -3 and 0.05 < mu.std() < 5


def test_decoder_alone(tmp_path):
    """--encoder false goes on from --init, leaves the latents bit for bit, trains the decoder, and
    resumes exactly."""
    first = train(tmp_path / "first") / "vae.safetensors"
    flags = {"init": str(first), "encoder": False, "steps": 2}
    whole = train(tmp_path / "whole", **flags)
    before, after = load_vae(first), load_vae(whole / "vae.safetensors")
    video = clips([5], 16, 9)[0]
    z = before.encode(video)
    assert torch.equal(z, after.encode(video)) and distance(before.decode(z), after.decode(z)) > 0
    with pytest.raises(MemoryError), pytest.MonkeyPatch.context() as patch:
        at_call(patch, train_vae, "vae_loss", 2, crash)
        train(tmp_path / "halves", **flags, save_every=1)
    assert same(
        read_tensors(train(tmp_path / "halves", **flags, save_every=1) / "vae.safetensors")[0],
        after.state_dict(),
    )


def test_picture_has_no_frame_differences():
    """A clip of one frame is allowed: its loss is finite and has no term of differences."""
    torch.manual_seed(0)
    loss, terms = vae_loss(VAE(SMALL), clips([1], 16, 1)[0], randn(0, 1, 2, 1, 2, 2), 0.3, 0.7)
    assert torch.isfinite(loss) and terms["diff"] == 0
    assert loss.item() == pytest.approx(terms["l1"] + 2 * terms["mse"] + 0.3 * terms["kl"])


def test_stages_follow_their_shares(tmp_path, monkeypatch):
    """Shares .25, .25 and .5 of 8 steps: two steps of 3 pictures, two of 2 clips of 5 frames, four
    of 1 clip of 9."""
    shapes = []
    monkeypatch.setattr(
        train_vae,
        "vae_loss",
        lambda vae, video, *a: shapes.append(video.shape[::2][:2]) or vae_loss(vae, video, *a),
    )
    train(tmp_path, steps=8, frames=(1, 5, 9), batch=(3, 2, 1), share=(0.25, 0.25, 0.5))
    assert shapes == [(3, 1)] * 2 + [(2, 5)] * 2 + [(1, 9)] * 4
    with pytest.raises(UserError, match="one number a stage"):
        train(tmp_path, frames=(1, 5), batch=(3, 2, 1))


def test_vae_learns(tmp_path):
    """On the world's clips the error falls by a third in 120 small steps."""
    steps = rows(
        train(tmp_path, steps=121, lr=3e-3, frames=(5,), batch=(2,), share=(1.0,)), "vae.log.jsonl"
    )
    assert steps[-2]["step"] == 120 and steps[-2]["l1"] < steps[0]["l1"] * 2 / 3, steps


def test_vae_weights_load_with_measured_statistics(tmp_path, capsys):
    """The written VAE loads; with its mean and std, latents of the held-out clips are centred and
    of unit size; PSNR is told."""
    vae = load_vae(train(tmp_path) / "vae.safetensors")
    z = (
        torch.cat([vae.encode(clips([HELD_OUT + i], 16, 9)[0]) for i in range(64)])
        .transpose(1, 2)
        .transpose(0, 1)
        .flatten(1)
    )
    assert vae.config.z_dim == 2 and z.shape[0] == 2
    assert z.mean(1).abs().max() < 1e-2 and (z.std(1) - 1).abs().max() < 1e-2
    *steps, last = rows(tmp_path, "vae.log.jsonl")
    assert (
        last.keys() == {"step", "psnr"} and f"PSNR {last['psnr']:.2f} dB" in capsys.readouterr().out
    )
    assert (
        all(r.keys() == {"step", "l1", "mse", "diff", "kl", "norm"} for r in steps)
        and not (tmp_path / "vae.state.pt").exists()
    )


def test_psnr_is_that_of_the_written_vae(tmp_path):
    """PSNR of videos in -1 .. 1, over all held-out clips, of what encode and decode give with the
    measured statistics."""
    vae = load_vae(train(tmp_path) / "vae.safetensors")
    video = torch.cat([clips([HELD_OUT + i], 16, 9)[0] for i in range(64)])
    made = torch.cat([vae.decode(vae.encode(v[None])) for v in video])
    psnr = 10 * torch.log10(4 / (made - video).square().mean()).item()
    assert rows(tmp_path, "vae.log.jsonl")[-1]["psnr"] == pytest.approx(psnr, abs=1e-2)


# ---------------------------------------------------------------- both scripts
@pytest.fixture
def both(tmp_path):
    """Folder a with a VAE, and a copy of it, b: for either script to train in."""
    train(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "vae.safetensors").write_bytes(
        (tmp_path / "a" / "vae.safetensors").read_bytes()
    )
    return tmp_path / "a", tmp_path / "b"


CALLS = {train_vae: 1, train_teacher: 2}  # of the loss, a step: the teacher has clips and pictures
PARTS = [(train_vae, "vae_loss", "vae"), (train_teacher, "teacher_loss", "teacher")]


@pytest.mark.parametrize("script, loss, name", PARTS)
def test_interrupted_training_goes_on_exactly(script, loss, name, both, monkeypatch, capsys):
    """SIGTERM in step 1: saved after it; the same command ends with the weights of an uninterrupted
    run, bit for bit."""
    a, b = both
    if script is train_teacher:
        train(a, script)
    at_call(monkeypatch, script, loss, 1 + CALLS[script], terminate)
    train(b, script)
    assert "stopped at step 2; run the same command to go on" in capsys.readouterr().out
    assert saved(b, f"{name}.state.pt")["step"] == 2
    train(b, script)
    x, y = (read_tensors(folder / f"{name}.safetensors") for folder in both)
    assert same(x[0], y[0]) and x[1] == y[1]
    assert rows(a, f"{name}.log.jsonl") == rows(b, f"{name}.log.jsonl")


@pytest.mark.parametrize("script, loss, name", PARTS)
def test_killed_training_goes_on_from_its_last_state(script, loss, name, both, monkeypatch):
    """Killed in step 3 with a state of 2 steps: the same weights, and no step stands in the log
    twice. Other settings are refused."""
    a, b = both
    if script is train_teacher:
        train(a, script)
    at_call(monkeypatch, script, loss, 1 + 3 * CALLS[script], crash)
    with pytest.raises(MemoryError):
        train(b, script, save_every=2)
    with pytest.raises(UserError, match=r"other settings \(seed="):
        train(b, script, seed=5)
    train(b, script)
    assert same(*(read_tensors(folder / f"{name}.safetensors")[0] for folder in both))
    steps = [r["step"] for r in rows(b, f"{name}.log.jsonl")]
    assert steps == sorted(set(steps))


# ---------------------------------------------------------------- the teacher
class Known(torch.nn.Module):
    """Answers a known velocity and remembers what it saw."""

    def forward(self, x, t, prompt, pos):
        self.x, self.t = x, t
        return 3 * prompt.mean((1, 2)).view(-1, 1, 1, 1, 1).expand_as(x)


def test_teacher_loss_by_hand():
    """x0 = 2, noise = 4, so v = 2: answering 3 errs by 1, answering 0 by 4. u = .5 is sigma .75
    under shift 3, one level a clip."""
    x0, noise, prompts = (torch.full((2, 3, 1, 1, 1), n) for n in (2.0, 4.0, 1.0))
    dit = Known()
    prompts = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    assert teacher_loss(dit, x0, prompts, torch.tensor([0.5, 1.0]), noise, 3.0).tolist() == [
        1.0,
        4.0,
    ]
    assert (
        dit.t.tolist() == [[750] * 3, [1000] * 3]
        and dit.x.flatten().tolist() == [3.5] * 3 + [4.0] * 3
    )


def test_teacher_learns_and_writes_its_average(both, monkeypatch):
    """Flow matching on six clips: the loss falls; the written weights are the moving average; a
    sheet and scores are there."""
    a, b = both
    train(a, train_teacher, steps=101, lr=3e-3, batch=4, ema=0.9)
    first, *_, last, scores = rows(a, "teacher.log.jsonl")
    assert last["step"] == 100 and last["picture"] < 0.8 * first["picture"]
    assert {"caption", "colour", "shape", "direction", "motion"} <= scores.keys()
    assert (a / "teacher.png").read_bytes()[:4] == b"\x89PNG"
    assert load_dit(a / "teacher.safetensors").config == DiTConfig(**WORDED)
    train(
        b, train_teacher, ema=0.5, save_every=2
    )  # warm-up is slow: the average differs from the weights all the same
    state, weights = saved(b, "teacher.state.pt"), read_tensors(b / "teacher.safetensors")[0]
    assert all(torch.equal(w, state[f"ema/{k}"]) for k, w in weights.items())
    assert any(not torch.equal(w, state[f"dit/{k}"]) for k, w in weights.items())


def test_matrices_learn_by_muon_if_it_has_a_rate(both, monkeypatch):
    """Each weight has one optimiser, the blocks' matrices Muon; a run that was killed goes on to
    the same bits, which are not AdamW's."""
    a, b = both
    dit = DiT(DiTConfig(**WORDED))
    adamw, muon = optimisers_of(dit, 1e-3, 0.05, (0.9, 0.99), 0.01)
    chosen, rest = (set(o.param_groups[0]["params"]) for o in (muon, adamw))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert chosen == {p for n, p in dit.blocks.named_parameters() if n.endswith("weight")} - {
        p for n, p in dit.blocks.named_parameters() if "norm" in n
    }
    assert chosen | rest == set(dit.parameters()) and not chosen & rest
    assert len(optimisers_of(dit, 1e-3, 0.0, (0.9, 0.99), 0.01)) == 1

    without = read_tensors(train(a, train_teacher, lr_matrices=0) / "teacher.safetensors")[0]
    (a / "teacher.state.pt").unlink()
    train(a, train_teacher, lr_matrices=0.05)
    at_call(monkeypatch, train_teacher, "teacher_loss", 7, crash)
    with pytest.raises(MemoryError):
        train(b, train_teacher, lr_matrices=0.05, save_every=2)
    train(b, train_teacher, lr_matrices=0.05)
    through, on = (read_tensors(folder / "teacher.safetensors")[0] for folder in both)
    assert same(through, on) and not same(through, without)


def test_first_latents_weigh_as_asked():
    """An image latent of three, four times as heavy: errors of 1 there and 0 elsewhere count 4/6.
    Of one latent alone the weight says nothing."""
    x0, noise = torch.zeros(1, 3, 1, 1, 1), torch.full((1, 3, 1, 1, 1), 3.0)
    x0[0, 0] = 1.0  # so the velocity there is 2, answered by 3
    dit, prompts, u = Known(), torch.ones(1, 1, 1), torch.tensor([0.5])
    assert teacher_loss(dit, x0, prompts, u, noise, 3.0, 4.0).item() == pytest.approx(4 / 6)
    assert teacher_loss(dit, x0[:, :1], prompts, u, noise[:, :1], 3.0, 4.0).item() == 1.0


def test_a_teacher_goes_on_from_given_weights(both):
    """--init: with a rate of next to nothing the average is what it began with."""
    a, b = both
    begun = read_tensors(train(a, train_teacher) / "teacher.safetensors")[0]
    init = str(a / "teacher.safetensors")
    on = read_tensors(
        train(b, train_teacher, init=init, lr=1e-12, lr_matrices=0) / "teacher.safetensors"
    )[0]
    assert begun.keys() == on.keys()
    assert all(torch.allclose(begun[k], on[k], atol=1e-6) for k in begun)


def test_clips_are_encoded_once(both, capsys):
    """Latents are those of clips 0, 1, ..., kept in a folder; another --clips makes the missing
    ones."""
    a, _ = both
    train(a, train_teacher, steps=1)
    kept = a / "latents" / "latents-000000.safetensors"
    before, vae = kept.stat().st_mtime_ns, load_vae(a / "vae.safetensors")
    latents = read_tensors(kept)[0]["latents"]
    assert (
        latents.shape == (6, 3, 2, 2, 2)
        and distance(latents[4].float(), vae.encode(clips([4], 16, 9)[0])[0]) <= 5e-3
    )
    for clips_flag in (6, 7):
        (a / "teacher.state.pt").unlink(missing_ok=True)
        train(a, train_teacher, steps=1, clips=clips_flag)
        assert (kept.stat().st_mtime_ns == before) == (clips_flag == 6)
    assert len(read_tensors(kept)[0]["latents"]) == 7


@pytest.mark.parametrize("script", [train_vae, train_teacher])
def test_unknown_preset_is_named(script, both, monkeypatch, capsys):
    """A preset that does not exist is a user's mistake, told with those that do."""
    clips_flag = {"clips": 6} if script is train_teacher else {}
    code, error = command_line(
        monkeypatch, capsys, script, out=both[0], preset="big", size=16, **clips_flag
    )
    assert code == 2 and "big" in error and "toy" in error


def test_prompts_are_dropped_at_the_stated_rate(both, monkeypatch):
    """One prompt in ten is the empty one (all zeros), the same ones in every run; dropout 0 drops
    none."""
    seen = []
    monkeypatch.setattr(
        train_teacher,
        "teacher_loss",
        lambda dit, x0, p, *a: seen.append(p) or teacher_loss(dit, x0, p, *a),
    )
    train(both[0], train_teacher, steps=20, batch=20)
    dropped = torch.cat(seen).abs().sum((1, 2)) == 0
    assert 0.05 < dropped.float().mean() < 0.15
    g = generator(0, 2, 0)
    torch.randint(6, (20,), generator=g)
    assert torch.equal(dropped[:20], torch.rand(20, 1, 1, generator=g).flatten() < 0.1)


# ---------------------------------------------------------------- shipping
def test_packed_models_load_and_compute_the_same_but_for_rounding(both, tmp_path):
    """Half the bytes and less; outputs within a few per mille (bfloat16) and a few per cent (eight
    bits); logs and hashes beside."""
    trained = train(both[0], train_teacher)
    for name in ("ode", "student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.safetensors").write_bytes(
            (trained / "teacher.safetensors").read_bytes()
        )
        (tmp_path / name / "log.jsonl").write_text('{"step": 0}\n')
    out = tmp_path / "packed"
    pack.main(
        pack.Config(*map(str, (trained, trained, tmp_path / "ode", tmp_path / "student", out)))
    )
    whole, half, eighth = (
        load_dit(p)
        for p in (
            trained / "teacher.safetensors",
            out / "student.safetensors",
            out / "ode.safetensors",
        )
    )
    inputs = randn(0, 1, 3, 2, 2, 2), torch.full((1, 3), 500.0), randn(1, 1, 9, 64), torch.arange(3)
    want = whole(*inputs)
    near, far = ((model(*inputs) - want).norm() / want.norm() for model in (half, eighth))
    assert 0 < near < 0.02 and near < far < 0.2
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert load_vae(out / "vae.safetensors").config == load_vae(trained / "vae.safetensors").config
    assert (out / "teacher.log.jsonl").read_text() == (trained / "teacher.log.jsonl").read_text()
