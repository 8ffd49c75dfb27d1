"""Finished latents are remembered, unrotated.

One slot per latent, addressed by the latent's number and not by time or by order of arrival: that is what lets a
video grow backwards, skip a gap, close a loop. Keys are stored before RoPE and turned when they are read, to whatever
position the reading step asks for (RoPE re-indexing): a sink keeps its place beside a moving window, one latent can be
read at two positions at once, and no position ever leaves the range the model was trained on. In forward order within
21 latents this equals rotating before storing.

    slots   0      1      2          k, v: per layer [B, capacity * N, A, D], N tokens a slot
    holds   lat 0  lat 7  (free)     read([(0, 18), (7, 3), (0, -1)]) -> latent 0 twice, at positions 18 and -1

Written only by the clean pass (t = 0, no gradient), never inside attention, so no gradient passes from a block into
another one's keys. (Self-Forcing writes in place while differentiating and so has such gradients, by accident.)
The cache does not choose what to keep: windows and sinks are facts of the plan, and `evict` follows the plan.
"""

import torch

from dit import KV, DiTConfig, Past, rope, rotate


class KVCache:
    """Static buffers for `capacity` latents of h x w cells; the batch shares one set of slots."""

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
        self.grid = (h // config.patch_size[1], w // config.patch_size[2])
        self.tokens, self.capacity = config.tokens(h, w), capacity
        shape = (batch, capacity, self.tokens, config.num_heads, config.dim // config.num_heads)
        self.layers = [
            (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_layers)
        ]
        self.slot: dict[int, int] = {}  # latent -> slot

    def write(self, latents: tuple[int | None, ...], kv: list[KV]) -> None:
        """Remember the latents of a sequence. kv: per layer its unrotated keys and its values [B, len(latents) * N, A, D].

        A None in `latents` is passed over (an anchor, or a latent nobody reads). raises: ValueError if one is held
        already or no slot is free; then nothing is written."""
        new = [i for i in latents if i is not None]
        held = [i for i in new if i in self.slot]
        free = [s for s in range(self.capacity) if s not in self.slot.values()]
        if held or len(set(new)) < len(new):
            raise ValueError(f"latents {held or new} are in the cache already; evict them first")
        if len(new) > len(free):
            raise ValueError(
                f"the cache has {len(free)} of {self.capacity} slots free but {len(new)} latents arrive"
            )
        self.slot.update(zip(new, free))
        for buffers, arrived in zip(self.layers, kv):
            for buffer, x in zip(buffers, arrived):
                x = x.detach().unflatten(1, (len(latents), self.tokens))  # (B, T, N, A, D)
                for j, i in enumerate(latents):
                    if i is not None:
                        buffer[:, self.slot[i]].copy_(x[:, j])

    def read(self, reads: tuple[tuple[int, int], ...], room: int = 0) -> list[Past] | None:
        """(latent, position) pairs -> per layer, keys rotated to these positions and values [B, (len(reads) + room) * N, A, D].

        Copies: what is returned does not change when the cache does. room: for so many latents that read them (`dit.Past`).
        No reads: None.
        raises: ValueError naming latents that are not there."""
        absent = [i for i, _ in reads if i not in self.slot]
        if absent:
            raise ValueError(
                f"latents {absent} are not in the cache, which holds {sorted(self.slot)}"
            )
        if not reads:
            return None
        k = self.layers[0][0]
        slots, pos = (
            torch.tensor(x).to(k.device, non_blocking=True)
            for x in zip(*((self.slot[i], p) for i, p in reads))
        )
        at = rope(pos, *self.grid, k.shape[-1])
        past, n = [], len(reads) * self.tokens
        for k, v in self.layers:
            keys, values = (
                x.new_empty(len(x), n + room * self.tokens, *x.shape[3:]) for x in (k, v)
            )
            keys[:, :n], values[:, :n] = (
                rotate(k[:, slots].flatten(1, 2), at),
                v[:, slots].flatten(1, 2),
            )
            past.append(Past(keys, values, n))
        return past

    def evict(self, latents: set[int] | tuple[int, ...]) -> None:
        """Forget these latents and free their slots; those not held are passed over."""
        for i in latents:
            self.slot.pop(i, None)

    def flush(self, keep: tuple[int, ...] = ()) -> None:
        """Forget everything but `keep`: a new scene, or a new video with keep = ()."""
        self.evict(set(self.slot) - set(keep))

    def bytes(self) -> int:
        """Memory of the buffers; 1.3B at 480x832 in bf16: 0.288 GB per latent."""
        return sum(x.numel() * x.element_size() for pair in self.layers for x in pair)
