"""FlexAttention: masked attention as one compiled kernel, for the spans of a plan on CUDA."""

from functools import cache

import torch
from torch import Tensor


def block_mask(table: Tensor, tokens: int, device: torch.device | str) -> object | None:
    """What `flex_attention` wants to know of a bool table [queries, keys] of latents.

    tokens: per latent;  returns: None where there is no CUDA to use it"""
    if torch.device(device).type != "cuda":
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    table = table.to(device)
    return create_block_mask(
        lambda batch, head, query, key: table[query // tokens, key // tokens],
        None,
        None,
        table.shape[0] * tokens,
        table.shape[1] * tokens,
        device=device,
    )


@cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
    """q: [B, A, L, D];  k, v: [B, A, K, D] -> [B, A, L, D]."""
    return _compiled()(q, k, v, block_mask=mask)
