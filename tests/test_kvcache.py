"""The cache keeps what it was given, where it was told, and gives it back at any position."""

import pytest
import torch
from tiny import distance, randn, tiny_dit

from dit import PRESETS, DiTConfig, rope, rotate
from kvcache import KVCache

SMALL = DiTConfig(dim=12, num_heads=2, num_layers=2)


def coded(*latents: int) -> list:
    """Keys and values of one-token latents: layer l holds 100 l + i in the keys of latent i, and
    its negative in the values."""
    x = torch.tensor(latents, dtype=torch.float32).view(1, -1, 1, 1).expand(2, -1, 2, 6)
    return [(100 * layer + x, -100 * layer - x) for layer in range(2)]


def cache_of(capacity: int) -> KVCache:
    return KVCache(SMALL, batch=2, capacity=capacity, h=2, w=2)


def holds(cache: KVCache, *latents: int) -> bool:
    """True if the cache holds exactly these latents, each with its own numbers in both layers (at
    position 0 keys are not turned)."""
    if sorted(cache.slot) != sorted(latents) or len(set(cache.slot.values())) < len(latents):
        return False
    return all(
        torch.equal(a, b)
        for i in latents
        for got, put in zip(cache.read(((i, 0),)), coded(i))
        for a, b in zip(got, put)
    )


def test_latents_come_back_out_of_order():
    """A latent is addressed by its number: not by time, nor by order of arrival."""
    cache = cache_of(5)
    cache.write((7, 2), coded(7, 2))
    cache.write((4,), coded(4))
    cache.write((-1, 0), coded(-1, 0))
    assert holds(cache, -1, 0, 2, 4, 7)
    values = cache.read(((4, 9), (7, 3), (-1, 5)))[1][1]
    assert values[0, :, 0, 0].tolist() == [-104, -107, -99] and values.shape == (2, 3, 2, 6)


def test_anchors_are_passed_over():
    """None marks an anchor: its keys are not stored and take no slot, the neighbours' stay
    theirs."""
    cache = cache_of(2)
    cache.write((None, 3, None, 4), coded(50, 3, 51, 4))
    assert holds(cache, 3, 4)
    cache.write((None, None), coded(1, 2))
    assert holds(cache, 3, 4)


def test_overflow_is_refused_and_writes_nothing():
    """A full cache says so with both numbers; nothing of the refused sequence is stored, nothing
    held is lost."""
    cache = cache_of(3)
    cache.write((0, 1), coded(0, 1))
    before = [x.clone() for pair in cache.layers for x in pair]
    with pytest.raises(ValueError, match="1 of 3 slots free but 2 latents"):
        cache.write((2, 3), coded(2, 3))
    assert all(
        torch.equal(x, y) for x, y in zip(before, [x for pair in cache.layers for x in pair])
    ) and holds(cache, 0, 1)
    cache.write((None, 2), coded(9, 2))  # one still fits
    assert holds(cache, 0, 1, 2)


@pytest.mark.parametrize("latents, named", [((1,), "[1]"), ((5, 0), "[0]"), ((5, 5), "[5, 5]")])
def test_a_latent_is_written_once(latents, named):
    """Writing a held latent again, or one latent twice at a time, is refused by name and writes
    nothing."""
    cache = cache_of(6)
    cache.write((0, 1), coded(0, 1))
    with pytest.raises(ValueError, match="already") as error:
        cache.write(latents, coded(*[77] * len(latents)))
    assert named in str(error.value) and holds(cache, 0, 1)


def test_absent_latents_are_not_read():
    """Reading what was never written, or was evicted, names it; reading nothing is None."""
    cache = cache_of(2)
    assert cache.read(()) is None
    cache.write((0, 1), coded(0, 1))
    cache.evict((1,))
    with pytest.raises(ValueError, match=r"\[1, 5\] are not in the cache, which holds \[0\]"):
        cache.read(((0, 0), (1, 1), (5, 2)))


def test_a_freed_slot_is_used_again_without_harm():
    """Eviction frees exactly the evicted slot; the newcomer there disturbs no other latent. Absent
    latents are passed over."""
    cache = cache_of(3)
    cache.write((0, 1, 2), coded(0, 1, 2))
    freed = cache.slot[1]
    cache.evict((1, 99))
    assert holds(cache, 0, 2)
    cache.write((8,), coded(8))
    assert cache.slot[8] == freed and holds(cache, 0, 2, 8)
    cache.evict({0, 8})
    cache.write((9, 1), coded(9, 1))
    assert holds(cache, 1, 2, 9)


def test_one_latent_is_read_at_two_positions():
    """Keys are turned to the position asked for, negative ones too; values are never turned; what
    is stored stays unturned."""
    cache = KVCache(SMALL, 2, 2, h=4, w=6)
    kv = [(randn(layer, 2, 12, 2, 6), randn(5 + layer, 2, 12, 2, 6)) for layer in range(2)]
    cache.write((7, 3), kv)
    for _ in range(2):
        for (k, v), (k0, v0) in zip(cache.read(((3, 18), (7, 2), (3, -1))), kv):
            for n, (first, position) in enumerate(((6, 18), (0, 2), (6, -1))):
                turned = rotate(k0[:, first : first + 6], rope(torch.tensor([position]), 2, 3, 6))
                assert torch.equal(k[:, 6 * n : 6 * n + 6], turned) and torch.equal(
                    v[:, 6 * n : 6 * n + 6], v0[:, first : first + 6]
                )
            assert distance(k[:, :6], k[:, 12:]) > 0.1


def test_what_was_read_is_a_copy():
    """Later writes into the same slot do not reach keys and values read before, nor do changes to
    them reach the cache."""
    cache = cache_of(1)
    cache.write((1,), coded(1))
    read = cache.read(((1, 0),))
    cache.evict((1,))
    cache.write((2,), coded(2))
    assert all(torch.equal(a, b) for got, put in zip(read, coded(1)) for a, b in zip(got, put))
    for pair in cache.read(((2, 0),)):
        for x in pair:
            x.zero_()
    assert holds(cache, 2)


def test_no_gradient_passes_through_the_cache():
    """Keys and values made with gradient come back without, so no block can change another one's
    keys."""
    model = tiny_dit().requires_grad_()
    cache = KVCache(model.config, 1, 2, 4, 4)
    z, text = randn(0, 1, 2, 4, 4, 4).requires_grad_(), randn(1, 1, 3, 32)
    _, kv = model(z, torch.zeros(1, 2), text, torch.arange(2), return_kv=True)
    assert all(x.requires_grad for pair in kv[1:] for x in pair)
    cache.write((0, 1), kv)
    past = cache.read(((0, 0), (1, 1)))
    assert not any(x.requires_grad for layer in (*past, *cache.layers) for x in layer)
    out = model(randn(2, 1, 2, 4, 4, 4), torch.zeros(1, 2), text, torch.arange(2, 4), past=past)
    assert torch.autograd.grad(out.sum(), z, allow_unused=True) == (None,)


def test_rotating_at_read_equals_rotating_at_write():
    """In forward order, keys turned when they are made and kept turned (as Self-Forcing does) give
    the same video."""
    model = tiny_dit()
    cache, kept = KVCache(model.config, 2, 9, 4, 6), None
    z, text = randn(0, 2, 9, 4, 4, 6), model.text_kv(randn(1, 2, 5, 32))
    for start in (0, 3, 6):
        here, t, pos = (
            z[:, start : start + 3],
            torch.full((2, 3), 250.0),
            torch.arange(start, start + 3),
        )
        ours, kv = model(
            here, t, text, pos, past=cache.read(tuple((i, i) for i in range(start))), return_kv=True
        )
        theirs, new = model(here, t, text, pos, past=kept, return_kv=True)
        assert distance(ours, theirs) <= 1e-5
        cache.write(tuple(range(start, start + 3)), kv)
        turned = [(rotate(k, rope(pos, 2, 3, 12)), v) for k, v in new]
        if kept is None:
            kept = turned
        else:
            kept = [
                (torch.cat((k, more_k), 1), torch.cat((v, more_v), 1))
                for (k, v), (more_k, more_v) in zip(kept, turned)
            ]
    assert distance(ours, model(here, t, text, pos)) > 0.01  # the past matters


def test_bytes_are_what_wan_needs():
    """1.3B at 480x832 in bf16: 2 x 30 layers x 1560 tokens x 1536 numbers x 2 bytes = 0.288 GB a
    latent."""
    wan = KVCache(PRESETS["wan1.3b"], 1, 2, 60, 104, torch.bfloat16, "meta")

    def held(cache: KVCache) -> int:
        return sum(x.numel() * x.element_size() for layer in cache.layers for x in layer)

    assert held(wan) == 2 * 287_539_200 and wan.tokens == 1560
    assert held(cache_of(3)) == 2 * 2 * (2 * 3 * 12) * 4
