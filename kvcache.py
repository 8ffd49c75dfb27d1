"""Finished latents are remembered, unrotated.

One slot per latent, addressed by the latent's number and not by time or by order of arrival: that
is what lets a video grow backwards, skip a gap, close a loop. Keys are stored before RoPE and
turned when they are read, to whatever position the reading step asks for (RoPE re-indexing): a sink
keeps its place beside a moving window, one latent can be read at two positions at once, and no
position ever leaves the range that the model was trained on.

    slots   0      1      2          k, v: per layer [B, capacity, N, A, D], N tokens a slot
    holds   lat 0  lat 7  (free)     read([(0, 18), (7, 3), (0, -1)]): latent 0 at both 18 and -1

Written only by the clean pass (t = 0, no gradient), never inside attention, so no gradient passes
from a block into another one's keys, as it does by accident in Self-Forcing, which writes while it
differentiates. What is kept, windows and sinks, is a fact of the plan: `evict` follows it.
"""

from collections.abc import Iterable
from functools import partial

import torch

from dit import KV, DiTConfig, Past, rope, rotate


class KVCache:
    """Static buffers for `capacity` latents of h x w cells; 60 x 104 of the 1.3B: 0.288 GB each."""

    def __init__(
        self,
        config: DiTConfig,
        batch: int,
        capacity: int,
        h: int,
        w: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.grid, self.tokens = config.grid(h, w), config.tokens(h, w)
        self.capacity, self.head_dim, self.device = capacity, config.head_dim, device
        shape = (batch, capacity, self.tokens, config.num_heads, config.head_dim)
        empty = partial(torch.zeros, shape, dtype=dtype, device=device)
        self.layers = [(empty(), empty()) for _ in range(config.num_layers)]  # keys and values
        self.slot: dict[int, int] = {}  # latent -> slot

    def write(self, latents: tuple[int | None, ...], kv: list[KV]) -> None:
        """Remember the latents of a sequence.

        latents: one number each; None is passed over (an anchor, or a latent nobody reads)
        kv: per layer, keys and values of all of them [B, len(latents) * N, A, D]
        raises: ValueError if one is held already or no slot is free; then nothing is written"""
        new = [i for i in latents if i is not None]
        held = [i for i in new if i in self.slot]
        free = sorted(set(range(self.capacity)) - set(self.slot.values()))
        if held or len(set(new)) < len(new):
            raise ValueError(f"latents {held or new} are in the cache already; evict them first")
        if len(new) > len(free):
            raise ValueError(f"{len(free)} of {self.capacity} slots free but {len(new)} latents")
        self.slot.update(zip(new, free))
        for buffers, arrived in zip(self.layers, kv):
            for buffer, x in zip(buffers, arrived):
                x = x.detach().unflatten(1, (len(latents), self.tokens))  # (B, T, N, A, D)
                for j, i in enumerate(latents):
                    if i is not None:
                        buffer[:, self.slot[i]] = x[:, j]

    def read(self, reads: tuple[tuple[int, int], ...]) -> list[Past] | None:
        """(latent, position) pairs -> keys at these positions, and values, layer by layer.

        returns: copies [B, len(reads) * N, A, D], which do not change when the cache does;
            without reads None.  raises: ValueError naming latents that are not there"""
        absent = [i for i, _ in reads if i not in self.slot]
        if absent:
            held = sorted(self.slot)
            raise ValueError(f"latents {absent} are not in the cache, which holds {held}")
        if not reads:
            return None
        pairs = torch.tensor([(self.slot[latent], position) for latent, position in reads])
        slots, pos = pairs.to(self.device, non_blocking=True).unbind(1)  # no GPU waits for the host
        angles = rope(pos, *self.grid, self.head_dim)
        past = []
        for k, v in self.layers:
            k, v = k[:, slots].flatten(1, 2), v[:, slots].flatten(1, 2)  # (B, reads * N, A, D)
            past.append((rotate(k, angles), v))
        return past

    def evict(self, latents: Iterable[int]) -> None:
        """Forget these latents and free their slots; those not held are passed over."""
        for i in latents:
            self.slot.pop(i, None)
