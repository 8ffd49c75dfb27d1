"""FlexAttention: masked attention as one compiled kernel, for the spans of a plan on CUDA."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128  # tokens: what the kernel leaves out, or does without a mask, it does by tiles


def block_mask(table: Tensor, tokens: int, device: torch.device | str) -> object | None:
    """What `flex_attention` wants to know of a bool table [queries, keys] of latents.

    tokens: per latent;  returns: None where there is no CUDA to use it

    torch's own create_block_mask asks for every pair of tokens: at Wan's size, teacher forcing
    backward, that would be 75 GB. Here the table itself says which tiles hold what."""
    if torch.device(device).type != "cuda":
        return None
    return tiles(table.to(device), tokens)


def tiles(table: Tensor, tokens: int) -> object:
    """The BlockMask of a bool table [queries, keys] of latents with so many tokens each."""
    from torch.nn.attention.flex_attention import BlockMask

    table = table.contiguous()
    padded = F.pad(table, (0, 1, 0, 1))  # what a tile holds beyond the end is seen by nobody
    rows, columns = (held(n, tokens, table.device) for n in table.shape)
    some = rows @ padded.float() @ columns.T > 0  # (tiles of queries, tiles of keys)
    all_ = rows @ (~padded).float() @ columns.T == 0
    return BlockMask.from_kv_blocks(
        *in_order(some & ~all_),
        *in_order(all_),
        BLOCK_SIZE=TILE,
        mask_mod=lambda batch, head, query, key: table[query // tokens, key // tokens],
        seq_lengths=(table.shape[0] * tokens, table.shape[1] * tokens),
    )


def held(latents: int, tokens: int, device: torch.device) -> Tensor:
    """Which latents a tile holds: [tiles, latents + 1] of 0 and 1, the last for what is beyond."""
    count = -(-latents * tokens // TILE)
    latent = (torch.arange(count * TILE, device=device) // tokens).clamp(max=latents)
    one_hot = F.one_hot(latent, latents + 1).float()  # (tiles * TILE, latents + 1)
    return one_hot.unflatten(0, (count, TILE)).amax(1)


def in_order(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask [rows, columns] as how many columns a row has, and which: they come first."""
    mask = mask[None, None].int()  # (batch 1, heads 1, rows, columns)
    which = mask.argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1).int(), which.int()


@cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
    """q: [B, A, L, D];  k, v: [B, A, K, D] -> [B, A, L, D]."""
    return _compiled()(q, k, v, block_mask=mask)
