"""The stopwatch runs, at toy size, and its arithmetic is right."""

import json

import pytest
import torch

from dit import PRESETS, DiTConfig
from tools import bench
from tools.bench import Clock, Config, flops, main, median_of


def test_bench_measures_every_part(tmp_path):
    """Parts, orders, long video and training steps, each a positive number, in the .json."""
    main(Config(runs=1, train=True, vae_dtype="bfloat16", out=str(tmp_path / "bench.json")))
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(found["orders"]) == set(bench.ORDERS) and len(found["parts"]) == 5
    numbers = [
        *found["parts"].values(),
        *found["long"].values(),
        *found["training"].values(),
        found["matmul FLOP/s"],
    ]
    assert all(
        x > 0 for x in numbers + [x for row in found["orders"].values() for x in row.values()]
    )
    assert all(
        row["FPS"] == pytest.approx(81 / row["81 frames s"]) for row in found["orders"].values()
    )
    assert 0 < found["share of the matmul rate"] < 1


def test_training_steps_of_another_text_width(monkeypatch, tmp_path):
    """A model that does not speak the toy world's words gets embeddings of its own."""
    small = DiTConfig(
        dim=24,
        num_heads=2,
        ffn_dim=48,
        num_layers=2,
        freq_dim=16,
        text_dim=32,
        text_len=12,
        in_dim=8,
        out_dim=8,
    )
    monkeypatch.setattr(bench, "PRESETS", PRESETS | {"small": small})
    monkeypatch.setitem(bench.SIZES, "toy", ("small", "toy", 32, 32))
    found = bench.training(Config(), small, 4, 4, torch.device("cpu"))
    assert found["generator step s"] + found["critic step s"] > 0


def test_flops_by_hand():
    """One layer of width 2 and ffn 4, 3 tokens that see 5 keys and 7 words: 2*3*2*(6*2+2*4) + 4*3*(5+7)*2."""
    c = DiTConfig(dim=24, num_heads=2, ffn_dim=4, num_layers=1, text_len=7)
    assert flops(c, 3, 5) == 2 * 3 * 24 * (6 * 24 + 2 * 4) + 4 * 3 * (5 + 7) * 24


def test_the_first_run_is_not_counted():
    """It warms up."""
    ticks = iter([0, 100, 200, 201, 300, 303, 400, 402])
    clock = Clock(torch.device("cpu"))
    clock.now = lambda: next(ticks)
    assert median_of(clock, 3, lambda: None) == 2
