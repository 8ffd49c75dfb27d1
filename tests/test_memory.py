"""The memory estimate counts what it says, and the page says what the command prints."""

import re
from dataclasses import replace

import pytest
import torch
from test_count import between
from tiny import ROOT

import anchors
import dit
import train_dmd
from dit import PRESETS
from lib.common import UserError, from_cli
from tools import memory

WAN = train_dmd.Config(**train_dmd.Config.PRESETS["wan"])


def test_meter_counts_live_bytes():
    """Births and deaths are counted once, views and weights not at all; the peak stays."""
    weight = torch.empty(1000, device="meta")
    with memory.Meter() as meter:
        # a dead temporary and a live sum: 2 KiB at most at once
        a = torch.empty(256, device="meta") + weight[:256]
        b = a.view(2, 128).t()
        assert (meter.live, meter.peak) == (1024, 2048)
        c = a * 2
        weight.mul_(2)
        del a, b
        assert meter.live == 1024
        del c
    assert (meter.live, meter.peak) == (0, 2048)


def small(layers: int) -> dit.DiTConfig:
    return dit.DiTConfig(num_layers=layers)


def test_wan_step_has_wan_shapes():
    """Updates at 480 x 832 x 81 run on the meta device, forward, with Wan's widths; checkpointing
    keeps one float32 residual stream [32760, 1536] a layer and what the seven blocks read: the peak
    grows by just that."""
    attend = dit.attend
    found = {n: memory.peaks(WAN, small(n), small(2), 0) for n in (2, 4)}
    assert dit.attend is attend
    stream = 32760 * 1536 * 4 / 2**30  # a layer's residuals
    latent = 2 * 1560 * 1536 * 2 / 2**30  # keys and values of a latent
    grown = (found[4]["student"] - found[2]["student"]) / 2
    # 3 + 6 + ... + 18 latents are read; the cache is gone by then
    assert grown == pytest.approx(stream + 63 * latent, rel=0.01)
    assert found[2]["critic"] > 0


def test_every_layer_adds_the_same():
    """What lets the estimate run two and three layers in place of thirty: five give what is
    extended to five."""
    whole = memory.peaks(WAN, small(5), small(2), 1)
    whole["critic"] = max(whole.pop("rollout"), whole["critic"])
    assert memory.estimate(WAN, small(5), small(2), 1) == pytest.approx(whole, rel=1e-6)


def test_weights_by_hand():
    """1,418,996,800 parameters: 20 bytes for the student, 16 for the critic and in stage 1; the
    teacher's 14,288,491,584 in bf16."""
    student, teacher = PRESETS["wan1.3b"], PRESETS["wan14b"]
    one, eight = (memory.weights_2(student, teacher, n) for n in (1, 8))
    assert one["teacher"] == 14288491584 * 2 / 2**30 == 8 * eight["teacher"]
    assert one["student: master, gradient, Adam, average"] == 1418996800 * 20 / 2**30
    assert one["critic: master, gradient, Adam"] == 1418996800 * 16 / 2**30
    first = memory.weights_1(student, 8)
    assert first["student: master, gradient, Adam"] == 1418996800 * 2 / 2**30


def test_backward_reads_as_much_as_forward():
    """What the estimate rests on: both directions read 63 latents over the rollout."""
    plans = anchors.forward(), anchors.backward()
    assert [sum(len(s.reads) for s in p.steps) for p in plans] == [63, 63]


def test_networks_are_made_in_their_type():
    """Not in float32 and cast; the default type is float32 again afterwards, also when making one
    fails."""
    net = memory.network(PRESETS["toy"], torch.bfloat16, "cpu")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in net.parameters())
    with pytest.raises(RuntimeError):
        memory.network(PRESETS["toy"], torch.bfloat16, "no such device")
    assert torch.get_default_dtype() == torch.float32


def test_updates_run_for_real():
    """The same updates that are counted on the meta device run on this one, and leave no gradient
    behind."""
    c, device = replace(PRESETS["toy"], num_layers=2), torch.device("cpu")
    config = train_dmd.Config(latent=(6, 4, 4))
    g, f_fake = (memory.trainable(memory.network(c, torch.float32, device), True) for _ in range(2))
    f_real, plan = memory.network(c, torch.float32, device), anchors.backward(6)
    seen = []
    for p in (*g.parameters(), *f_fake.parameters()):
        p.register_hook(lambda grad: seen.append(grad.abs().sum().item()))
    updates = memory.updates(g, f_fake, f_real, plan, config, 2, device)
    for what, update in updates.items():
        seen.clear()
        update()
        assert bool(sum(seen)) == (what != "rollout"), what
    assert all(p.grad is None for p in g.parameters())


def test_the_page_says_what_is_estimated():
    """docs/many-gpus.md has the tables of the command, to the letter."""
    page = (ROOT / "docs" / "many-gpus.md").read_text()
    said = between(page, "python -m tools.memory --preset wan")
    assert said == memory.estimated(memory.Config())


def test_what_travels_follows_from_its_formulas():
    """The table of docs/many-gpus.md, from the three formulas above it: a rollout and the critic's
    update in every iteration, a rollout and the student's in every fifth; both directions."""
    student, teacher, k, blocks = 1.42, 14.3, 2.5, 7
    rollout = 2 * student * (blocks * k + blocks - 1)
    critic = 8 * student
    update = 2 * teacher + 2 * student + (2 * blocks + 4) * student
    whole = 2 * (rollout + critic + (rollout + update) / 5)
    page = (ROOT / "docs" / "many-gpus.md").read_text()
    rows = re.findall(r"^\| (\d+) ?[^|]*\| (\d+) \| (\d+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 3
    for row in rows:
        gpus, samples, gigabytes, seconds = map(float, row)
        received = whole * samples * (gpus - 1) / gpus
        assert received == pytest.approx(gigabytes, rel=0.005)
        assert received / (450 if gpus == 8 else 50) == pytest.approx(seconds, abs=0.06)


@pytest.mark.parametrize("words", ["--preset toy", "--gpus 8 0", "--micro 0", "--gpus"])
def test_mistakes_are_named(words):
    says = "is empty" if words == "--gpus" else ".* must be"
    with pytest.raises(UserError, match=f"{words.split()[0]} {says}"):
        memory.main(from_cli(memory.Config, words.split()))
