"""The stopwatch runs, at toy size, and its arithmetic is right."""

import json

import pytest
import torch

import anchors
from dit import DiTConfig
from lib.common import UserError, from_cli
from tools import bench
from tools.bench import Clock, Config, main, medians


def test_bench_measures_every_part(tmp_path):
    """Parts, orders, long video and updates, each a positive number, in the .json."""
    main(Config(runs=1, train=True, vae_dtype="bfloat16", out=str(tmp_path / "bench.json")))
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(found["orders"]) == set(bench.ORDERS) and len(found["parts"]) == 5
    assert len(found["training"]) == 8  # student, rollout, critic, stage 1, in two directions
    numbers = [*found["parts"].values(), *found["long"].values(), *found["training"].values()]
    numbers += [x for row in found["orders"].values() for x in row.values()]
    assert all(x > 0 for x in [*numbers, found["matmul FLOP/s"]])
    for name, row in found["orders"].items():
        assert row["FPS"] == pytest.approx(81 / row["clip s"]), name
    assert 0 < found["share of the matmul rate"] < 1


def test_the_first_frame_is_the_first_piece():
    """Forward it comes after the first block, backward after the last."""
    vae = bench.autoencoder(bench.VAES["toy"], torch.float32, torch.device("cpu"))
    c = DiTConfig(
        dim=48, num_heads=4, ffn_dim=96, num_layers=1, freq_dim=32, text_dim=8, text_len=4
    )
    clock, net = Clock(torch.device("cpu")), bench.network(c, torch.float32, "cpu")
    timed = bench.Timed(clock, net, vae, torch.randn(1, 4, 8), (4, 4), torch.float32, 1)
    for order, blocks in (("forward", 1), ("backward, P = 3", 7)):
        plan = bench.ORDERS[order]
        row = bench.measure(timed, plan)
        assert len(plan.steps) == 7
        assert row["first frame s"] > 0.5 * blocks * row["block s, p50"], (order, row)
        assert row["first block s"] < 0.5 * row["clip s"]
        if blocks == 1:
            assert row["first frame s"] < 0.5 * row["clip s"], row


def test_the_first_run_is_not_counted():
    """It warms up; two calls take turns."""
    ticks = iter([0, 100, 200, 201, 300, 303, 400, 402])
    clock = Clock(torch.device("cpu"))
    clock.now = lambda: next(ticks)
    assert bench.median_of(clock, 3, lambda: None) == 2
    turns, ticks = [], iter(range(0, 100))
    assert medians(clock, 2, lambda: turns.append("a"), lambda: turns.append("b")) == [1, 1]
    assert turns == ["a", "b"] * 3


def test_the_processor_is_named():
    """With its family, which decides how its products compare; and the threads in use."""
    assert "family" in bench.processor() and "1 threads" in bench.processor()


@torch.no_grad()
def test_races_run(monkeypatch, capsys):
    """Every contestant of tests/speed.py runs, once and small, and its rows have names."""
    pytest.importorskip("diffusers")
    from tests import speed

    names = []
    monkeypatch.setattr(speed, "race", lambda name, a, b, turns=9: names.append((name, a(), b())))
    long = anchors.long
    monkeypatch.setattr(speed.anchors, "long", lambda n, way: long({42: 18, 402: 21}[n], way))
    tiny = DiTConfig(dim=48, ffn_dim=64, num_heads=4, num_layers=1, text_dim=32)
    speed.transformers("tiny", tiny, 3)
    speed.autoencoders(8)
    speed.rollouts("tiny", tiny)
    speed.longer("backward")
    speed.training(tiny)
    assert len(names) == 4 + 5 + 3 + 4
    assert "100 s of toy video, backward, against 10 s" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--preset", "huge"], ["--runs", "0"]])
def test_mistakes_are_named(words):
    with pytest.raises(UserError, match=f"{words[0]} .* must be"):
        from_cli(Config, words)
