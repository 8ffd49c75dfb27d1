"""The memory estimate counts what it says."""

import pytest
import torch

import anchors
import dit
import train_dmd
from dit import PRESETS
from tools import memory


def test_meter_counts_live_bytes():
    """Births and deaths are counted once, views and weights not at all; the peak stays."""
    weight = torch.empty(1000, device="meta")
    with memory.Meter() as meter:
        a = (
            torch.empty(256, device="meta") + weight[:256]
        )  # a dead temporary and a live sum: 2 KiB at most at once
        b = a.view(2, 128).t()
        assert (meter.live, meter.peak) == (1024, 2048)
        c = a * 2
        del a, b
        assert meter.live == 1024
        del c
    assert (meter.live, meter.peak) == (0, 2048)


@pytest.fixture
def attend(monkeypatch):
    """`peaks` replaces the attention by one that counts as fused; put the real one back afterwards."""
    monkeypatch.setattr(dit, "attend", dit.attend)


def test_wan_step_has_wan_shapes(attend, monkeypatch):
    """A student and a critic update at 480 x 832 x 81 run on the meta device, forward, with Wan's widths; checkpointing
    keeps one float32 residual stream [32760, 1536] a layer and what the seven blocks read: the peak grows by just that."""
    found = {}
    for layers in (2, 4):
        monkeypatch.setitem(PRESETS, "small", dit.DiTConfig(num_layers=layers))
        config = train_dmd.Config(**{**vars(train_dmd.Config()), **train_dmd.Config.PRESETS["wan"]})
        found[layers] = memory.peaks(config, "small", "small", direction=0)
    stream, latent = (
        32760 * 1536 * 4 / 2**30,
        2 * 1560 * 1536 * 2 / 2**30,
    )  # a layer's residuals; keys and values of a latent
    grown = (found[4]["student"] - found[2]["student"]) / 2
    assert grown == pytest.approx(
        stream + 63 * latent, rel=0.01
    )  # 3 + 6 + ... + 18 latents are read; the cache is gone by then
    assert found[2]["critic"] > 0


def test_weights_by_hand():
    """1,418,996,800 parameters: 20 bytes for the student, 16 for the critic; the teacher's 14,288,491,584 in bf16."""
    one, eight = (memory.weights("wan1.3b", "wan14b", n) for n in (1, 8))
    assert one["teacher"] == 14288491584 * 2 / 2**30 == 8 * eight["teacher"]
    assert one["student: master, gradient, Adam, average"] == 1418996800 * 20 / 2**30
    assert one["critic: master, gradient, Adam"] == 1418996800 * 16 / 2**30


def test_backward_reads_as_much_as_forward():
    """What the estimate rests on: both directions read 63 latents over the rollout."""
    assert [
        sum(len(s.reads) for s in p.steps) for p in (anchors.forward(), anchors.backward())
    ] == [63, 63]
