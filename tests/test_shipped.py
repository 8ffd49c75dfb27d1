"""The shipped toy weights are what their README says: whole, sharp, obedient in both directions,
and worth training from."""

import hashlib
import importlib
import re
from dataclasses import asdict

import pytest
import torch
from tiny import ROOT, rows

import train_ode
from evaluate import Maker, flickering_ratio, measure, measure_words, round_trip, summary
from generate import load_models
from lib.common import from_cli
from lib.recipe import Recipe
from lib.text import HELD_OUT
from plans import plans_of
from toy import gaps, world
from toy.train_vae import clips

WEIGHTS = ROOT / "toy" / "weights"
PLANS = plans_of(Recipe())
CAPTIONS = [world.caption(HELD_OUT + n) for n in range(16)]


@pytest.fixture(scope="module")
def models():
    return load_models(str(WEIGHTS), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def made(models):
    """Sixteen held-out captions, generated in three ways: latents and pixels."""
    maker = Maker(*models, (32, 32))
    return {name: maker.make(plan, CAPTIONS) for name, plan in PLANS.items()}


def test_hashes_and_size():
    """Every weight file is named in SHA256SUMS with its hash; together they stay below 24 MB."""
    named = dict(
        reversed(line.split()) for line in (WEIGHTS / "SHA256SUMS").read_text().splitlines()
    )
    files = sorted(WEIGHTS.glob("*.safetensors"))
    assert named == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert sorted(named) == [
        "ode.safetensors",
        "student.safetensors",
        "teacher.safetensors",
        "vae.safetensors",
    ]
    assert sum(f.stat().st_size for f in files) < 24e6


def told(text: str) -> list:
    """The trainings of a text in their order, as (script, config without places)."""
    text = text.replace("\\\n", " ").replace("$(TEACHER)", "").replace("$<", "student")
    found = []
    runs = r"torchrun --\S+|\$\(TWO\)|(?:python|\$\(RUN\))(?= -m toy.train)"
    for line in re.findall(rf"^\s*(?:{runs}) (.*)", text, re.M):
        name, *words = line.removeprefix("-m ").split()
        script = importlib.import_module(name.removesuffix(".py"))
        config = asdict(from_cli(script.Config, words))
        places = ("out", "data", "weights", "teacher", "student", "critic", "vae", "clips", "init")
        found.append(
            (name, {k: v for k, v in config.items() if not isinstance(v, str) or k not in places})
        )
    return found


def test_make_toy_makes_what_is_shipped():
    """The Makefile's chain has the flags of the commands that made what is shipped, but for
    places."""
    shipped = told((WEIGHTS / "README.md").read_text())
    assert len(shipped) == 5 and told((ROOT / "Makefile").read_text()) == shipped


@torch.no_grad()
def test_vae_is_sharp_to_the_last_frame(models):
    """At least 28 dB on held-out clips, over all 81 frames and over the last 20."""
    video = clips([HELD_OUT + 500 + n for n in range(4)], 32, 81)[0]
    error = (models[1].decode(models[1].encode(video)) - video).square() / 4
    for part in (error, error[:, :, -20:]):
        assert -10 * part.mean().log10() > 28


@torch.no_grad()
def test_vae_in_bfloat16_is_harmless(made):
    """--vae_dtype bfloat16 changes pixels by less than the eighth bit holds (50 dB) and no
    flickering ratio by 1 %."""
    vae = load_models(str(WEIGHTS), torch.float32, torch.device("cpu"), torch.bfloat16)[1]
    z, video = (x[:4] for x in made["backward"])
    other = torch.cat([vae.decode(x[None]) for x in z])
    assert 50 < -10 * ((other - video).square() / 4).mean().log10() < 100
    assert (flickering_ratio(other).mean() / flickering_ratio(video).mean() - 1).abs() < 0.01


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_student_follows_its_prompt(way, made):
    """Four steps a block: colour, shape, ground and direction right in at least 15 of 16 clips, the
    first frame's shape in 13, and they move as real clips do."""
    video, plan = made[way][1], PLANS[way]
    found = summary(measure(video, plan) | measure_words(world, video, plan, CAPTIONS))
    assert min(found[k].mean for k in ("colour", "shape", "ground", "direction")) >= 15 / 16
    assert found["frame 0: shape"].mean >= 13 / 16
    assert 0.03 < found["motion"].mean < 0.07  # of real clips: 0.050


@torch.no_grad()
def test_anchors_are_worth_dropping(models, made):
    """Latents that were imagined do not come back as well, when decoded and encoded, as finished
    ones do."""
    trips = {}
    for name, (z, video) in made.items():
        again = torch.cat([models[1].encode(clip[None]) for clip in video[:6]])
        trips[name] = round_trip(z[:6], again, PLANS[name]).mean().item()
    assert (
        trips["forward"] < 1.15 and trips["backward"] < 1.2 < trips["backward, anchors as output"]
    ), trips
    assert trips["backward, anchors as output"] > 1.2 * trips["backward"], trips


def test_a_scene_after_a_gap_begins_in_its_own_colours(models):
    """After a gap of two blocks, which see both scenes; true cuts the VAE alone cannot show."""
    maker, pairs = Maker(*models, (32, 32)), gaps.pairs_of(8, 0)
    found = {gap: summary(gaps.measure_gap(maker, pairs, gap, False)) for gap in (0, 6)}
    for what in gaps.READ:
        late, cut = (found[gap][f"{what}: late"].mean for gap in (6, 0))
        assert late < min(1, cut / 8), (what, late, cut)
        assert found[6][f"{what}: neither"].mean < 8
    assert found[0]["ground: late"].mean > 15


def test_stage_1_from_the_shipped_teacher(tmp_path):
    """Forty steps on eight pairs of the shipped teacher bring both losses down by a third."""
    flags = {
        "data": str(tmp_path / "pairs"),
        "pairs": 8,
        "shard": 8,
        "batch": 4,
        "out": str(tmp_path / "ode"),
        "lr": 5e-4,
        "warmup": 5,
        "steps": 40,
    }
    train_ode.main(train_ode.Config(**flags, generate=True))
    train_ode.main(train_ode.Config(**flags))
    log = rows(tmp_path / "ode")
    for way in ("forward", "backward"):
        first, last = (sum(row[way] for row in part) / 8 for part in (log[:8], log[-8:]))
        assert last < first / 1.5, (way, first, last)
