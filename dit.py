"""The Wan2.1 text-to-video transformer, with one timestep and one temporal position per latent.

Teacher, student and critic are this one class and differ only in what a latent may see:

    dit(z, t, text, pos)                   every latent sees every latent: the bidirectional teacher, the critic
    dit(z, t, text, pos, visible=...)      spans derived from a plan: the student of stage 1, all blocks in one pass
    dit(z, t, text, pos, past=...)         keys and values of finished latents come first: the student's rollout

Time enters per latent (`t [B, T]`), so noisy and clean latents share a sequence. Position enters only by rotating
queries and keys (RoPE), so keys are handed out *unrotated* and whoever stores them may place them anywhere later.
Nothing is stored on the module: mask, past and positions are arguments, keys and values are return values.

Numbers: the network predicts velocity v = noise - x0 and is told t = 1000 sigma. Linear layers and attention run in
the weights' dtype; residual stream, norms, modulation and RoPE in float32, as in Wan's own code [Wan].
Parameter names are Wan's, so its checkpoints load as they are (weights.py). No sampling and no loss here.

    python -c "from dit import load_dit; print(load_dit('toy/weights'))"
"""

from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.common import UserError
from lib.cpu import Linear
from lib.weights import config_from, load_strict, read_dit, within, write_dit


@dataclass(frozen=True)
class DiTConfig:
    """Wan's own names; defaults are Wan2.1 T2V 1.3B."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256  # width of the sinusoidal embedding of t
    text_dim: int = 4096
    text_len: int = (
        512  # text is zero-padded to this length and attended whole, padding included [Wan]
    )
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, ...] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        within(
            self,
            "transformer",
            dim=2**16,
            ffn_dim=2**18,
            num_heads=1024,
            num_layers=512,
            freq_dim=2**16,
            text_dim=2**16,
            text_len=2**16,
            in_dim=1024,
            out_dim=1024,
            patch_size=64,
        )
        if len(self.patch_size) != 3 or self.patch_size[0] != 1:
            raise UserError(
                f"patch_size {self.patch_size} must be (1, height, width): one timestep per latent needs 1"
            )
        if (
            self.dim % self.num_heads
            or self.dim // self.num_heads % 2
            or self.dim // self.num_heads < 6
        ):
            raise UserError(
                f"dim {self.dim} / num_heads {self.num_heads} must be an even whole number of at least 6"
            )

    def tokens(self, h: int, w: int) -> int:
        """Tokens per latent of h x w cells: 60 x 104 -> 1560."""
        return (h // self.patch_size[1]) * (w // self.patch_size[2])


PRESETS = {
    "wan1.3b": DiTConfig(),  # 1,418,996,800 parameters
    "wan14b": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),  # 14,288,491,584
    "toy": DiTConfig(
        dim=192, ffn_dim=512, num_heads=4, num_layers=6, freq_dim=64, text_dim=64, text_len=12
    ),  # [ours]
    "toy64": DiTConfig(
        dim=384, ffn_dim=1024, num_heads=6, num_layers=8, freq_dim=64, text_dim=64, text_len=12
    ),  # [ours]
}


# ---------------------------------------------------------------- positions
class Rope(NamedTuple):
    """The angle of every token and channel pair: its cos and sin, float32 [L, 1, D/2]."""

    cos: Tensor
    sin: Tensor


def rope(pos: Tensor, h: int, w: int, head_dim: int, theta: float = 10000.0) -> Rope:
    """Angles for latents at integer temporal positions pos [T], each a grid of h x w tokens (row-major).

    Of the D/2 channel pairs the first turn with time, the rest with height and width: D = 128 -> 22, 21, 21 pairs.
    An axis with d channels uses the frequencies theta^(-2j/d). Any position is valid, also negative or beyond 1024."""
    side = head_dim // 6  # pairs of height, and of width
    place = (
        torch.cartesian_prod(
            pos, torch.arange(h, device=pos.device), torch.arange(w, device=pos.device)
        )
        .view(-1, 3)
        .double()
    )
    angle = torch.cat(
        [
            torch.outer(place[:, axis], theta ** (-torch.arange(n, device=pos.device).double() / n))
            for axis, n in enumerate((head_dim // 2 - 2 * side, side, side))
        ],
        1,
    )[:, None]
    return Rope(angle.cos().float(), angle.sin().float())  # (T*h*w, 1, D/2)


def rotate(x: Tensor, table: Rope) -> Tensor:
    """Turn each pair of adjacent channels, (a, b) -> (a cos - b sin, a sin + b cos), of x [B, L, A, D].

    Computed in float32, returned in x's dtype. On a CPU as one complex product, three times as fast [measured]."""
    pairs, (cos, sin) = x.float().unflatten(-1, (-1, 2)), table
    if torch.compiler.is_compiling():  # what the compiler can fuse
        a, b = pairs.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


# ---------------------------------------------------------------- who may see whom
Spans = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]


@dataclass
class Visible:
    """Who may see whom inside one sequence, in units of latents; made from a plan by `anchors.layout`.

    spans: queries q0 .. q1-1 see the keys of the ranges [k0, k1); runs of queries follow each other without a gap.
        Two blocks of 3, causal: ((0, 3, ((0, 3),)), (3, 6, ((0, 6),))).
    key_slot, key_pos: key j is the key of sequence slot key_slot[j], rotated to position key_pos[j]. None: keys are
        the slots themselves, at their own positions. (A latent read at two positions appears as two keys.)
    One description, two realisations: attention span by span, exact and unpadded (`attend`), or FlexAttention with a
    block mask on CUDA after `prepare`. Never stored on a module: another plan is another object."""

    spans: Spans
    key_slot: Tensor | None = None
    key_pos: Tensor | None = None
    block_mask: object = field(default=None, repr=False)

    def dense(self, tokens: int = 1) -> Tensor:
        """The same as a bool matrix [L, K]; True = may attend. For pictures and tests."""
        slots = self.spans[-1][1]
        mask = torch.zeros(
            slots, slots if self.key_slot is None else len(self.key_slot), dtype=torch.bool
        )
        for q0, q1, ranges in self.spans:
            for k0, k1 in ranges:
                mask[q0:q1, k0:k1] = True
        return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def prepare(self, tokens: int, device: torch.device | str) -> "Visible":
        """Move to a device; on CUDA also build the FlexAttention block mask for `tokens` per latent, once per plan."""
        block_mask = None
        if torch.device(device).type == "cuda":
            from torch.nn.attention.flex_attention import create_block_mask

            table = self.dense().to(device)
            block_mask = create_block_mask(
                lambda b, a, i, j: table[i // tokens, j // tokens],
                None,
                None,
                table.shape[0] * tokens,
                table.shape[1] * tokens,
                device=device,
            )
        moved = (None if x is None else x.to(device) for x in (self.key_slot, self.key_pos))
        return Visible(self.spans, *moved, block_mask)


@cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys each query may see. q: [B, L, A, D]; k, v: [B, K, A, D] -> [B, L, A, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, A, L, D)
    if visible is None:
        out = F.scaled_dot_product_attention(q, k, v)
    elif visible.block_mask is not None:
        out = _flex()(q, k, v, block_mask=visible.block_mask)
    else:
        n, runs = q.shape[2] // visible.spans[-1][1], []  # tokens per latent
        for q0, q1, ranges in visible.spans:
            seen = [
                torch.cat([x[:, :, k0 * n : k1 * n] for k0, k1 in ranges], 2)
                if len(ranges) > 1
                else x[:, :, ranges[0][0] * n : ranges[0][1] * n]
                for x in (k, v)
            ]
            runs.append(F.scaled_dot_product_attention(q[:, :, q0 * n : q1 * n], *seen))
        out = torch.cat(runs, dim=2)
    return out.transpose(1, 2)


# ---------------------------------------------------------------- layers
KV = tuple[Tensor, Tensor]  # keys and values, [B, L, A, D] each


class Past(NamedTuple):
    """A layer's keys, rotated, and values of finished latents [B, K, A, D]. Behind the first `length` entries of K there may
    be room for those of the sequence that reads them: without gradient they are written there, and the past is not copied."""

    k: Tensor
    v: Tensor
    length: int

    def then(self, k: Tensor, v: Tensor) -> KV:
        """Past keys and values, then these [B, L, A, D]."""
        end = self.length + k.shape[1]
        if end > self.k.shape[1] or torch.is_grad_enabled():
            return torch.cat([self.k[:, : self.length], k], dim=1), torch.cat(
                [self.v[:, : self.length], v], dim=1
            )
        self.k[:, self.length : end], self.v[:, self.length : end] = k, v
        return self.k[:, :end], self.v[:, :end]


class RMSNorm(nn.Module):
    """Over the full width, all heads together, before the split into heads [Wan]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Video tokens see video tokens."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, L, E) -> (B, L, A, D)

    def kv(self, x: Tensor) -> KV:
        return self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))

    def forward(
        self,
        x: Tensor,
        at: Rope,
        visible: Visible | None,
        at_keys: Rope,
        past: Past | None,
        last: int,
    ) -> tuple[Tensor, KV]:
        """x: [B, L, E] -> output of the `last` tokens [B, last, E], and all tokens' keys, unrotated, and values, for a cache to keep.

        at, at_keys: angles of queries and keys; past: keys already rotated, and values, of finished latents."""
        q = rotate(
            self.heads(self.norm_q(self.q(x[:, -last:]))), Rope(*(angle[-last:] for angle in at))
        )
        own = k, v = self.kv(x)
        if (
            visible is not None and visible.key_slot is not None
        ):  # one latent may serve as several keys
            k, v = (
                y.unflatten(1, (visible.spans[-1][1], -1))[:, visible.key_slot].flatten(1, 2)
                for y in own
            )
        k = rotate(k, at_keys)
        if past is not None:
            k, v = past.then(k, v)  # (B, past + L, A, D)
        return self.o(attend(q, k, v, visible).flatten(2)), own


class CrossAttention(SelfAttention):
    """Queries from the video, keys and values from the text; no positions."""

    def forward(self, x: Tensor, text: Tensor | KV) -> Tensor:
        k, v = text if isinstance(text, tuple) else self.kv(text)
        return self.o(attend(self.heads(self.norm_q(self.q(x))), k, v).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, and a feed-forward net; the time sets shift, scale and gate."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = config
        self.eps = c.eps
        self.self_attn = SelfAttention(c.dim, c.num_heads, c.eps)
        self.cross_attn = CrossAttention(c.dim, c.num_heads, c.eps)
        self.norm3 = nn.LayerNorm(
            c.dim, c.eps
        )  # before cross-attention; the only norm with weights
        self.ffn = nn.Sequential(
            Linear(c.dim, c.ffn_dim), nn.GELU(approximate="tanh"), Linear(c.ffn_dim, c.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor | KV,
        at: Rope,
        visible: Visible | None,
        at_keys: Rope,
        past: Past | None,
        need: int | None = None,
    ) -> tuple[Tensor, KV]:
        """x: [B, T, N, E] float32, T latents of N tokens; time: [B, T, 6, E] float32; text: [B, L, E] or its keys.

        need: all latents give keys and values, but only the last so many go on; 0: none, x is returned as it came."""
        dtype = self.ffn[0].weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (self.modulation.float() + time).unsqueeze(3).unbind(2)
        )
        y = modulate(x, shift1, scale1, self.eps).to(dtype).flatten(1, 2)  # (B, L, E)
        if need == 0:
            return x, self.self_attn.kv(y)
        y, own = self.self_attn(y, at, visible, at_keys, past, (need or x.shape[1]) * x.shape[2])
        if need:
            x, gate1, shift2, scale2, gate2 = (
                a[:, -need:] for a in (x, gate1, shift2, scale2, gate2)
            )
        x = torch.addcmul(x, y.view_as(x), gate1)  # x + y * gate
        y = F.layer_norm(
            x, x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.eps
        )
        x = x + self.cross_attn(y.to(dtype).flatten(1, 2), text).view_as(x)
        y = self.ffn(modulate(x, shift2, scale2, self.eps).to(dtype))
        return torch.addcmul(x, y, gate2), own


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, without weights of its own, in float32: x [B, T, N, E], shift, scale [B, T, 1, E]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class Head(nn.Module):
    """Modulated by the time embedding itself, not by its projection [Wan]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, config.out_dim * config.patch_size[1] * config.patch_size[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps).to(self.head.weight.dtype))


class DiT(nn.Module):
    """Noisy latents, their times and positions, and a text -> their velocities. See the top of the file."""

    recipe: dict | None = None  # how a student was trained, where its file says so

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, c.patch_size, c.patch_size)
        self.text_embedding = nn.Sequential(
            Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), Linear(c.dim, c.dim)
        )
        self.time_embedding = nn.Sequential(
            Linear(c.freq_dim, c.dim), nn.SiLU(), Linear(c.dim, c.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.head = Head(c)
        self.checkpointing = (
            False  # training: recompute each block in the backward pass instead of keeping it
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Wan's: Xavier for linear layers, 0.02 for the embeddings' first layers, zero for the head: v = 0 at first."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.data.flatten(1))
        for m in (
            self.text_embedding[0],
            self.text_embedding[2],
            self.time_embedding[0],
            self.time_embedding[2],
        ):
            nn.init.normal_(m.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def compile_blocks(self, backend: str = "inductor") -> "DiT":
        """torch.compile each block, in place; the numbers stay the same to rounding. The first call of each kind takes seconds to
        minutes (with a gradient or none, with a past or none, some of the velocities or all: stage 2 meets 32 kinds [measured])."""
        torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block.compile(backend=backend)
        return self

    def embed_text(self, text: Tensor) -> Tensor:
        """[B, L <= text_len, text_dim] -> zero-padded to text_len, then embedded: [B, text_len, E]."""
        c = self.config
        if text.ndim != 3 or text.shape[1] > c.text_len or text.shape[2] != c.text_dim:
            raise UserError(
                f"text embeddings of shape {tuple(text.shape)} are not [B, <= {c.text_len}, {c.text_dim}]"
            )
        text = F.pad(text, (0, 0, 0, c.text_len - text.shape[1]))
        return self.text_embedding(text.to(self.text_embedding[0].weight.dtype))

    def text_kv(self, text: Tensor) -> list[KV]:
        """Cross-attention keys and values of every layer, [B, text_len, A, D] each, to be computed once per prompt from
        text [B, L, text_dim] and passed as `text`."""
        embedded = self.embed_text(text)
        return [block.cross_attn.kv(embedded) for block in self.blocks]

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        text: Tensor | list[KV],
        pos: Tensor,
        visible: Visible | None = None,
        past: list[Past] | None = None,
        return_kv: bool = False,
        need: int | None = None,
    ) -> Tensor | tuple[Tensor, list[KV]] | list[KV]:
        """Predict the velocity of every latent.

        z: [B, T, C, h, w] noisy latents;  t: [B, T] = 1000 sigma, 0 for clean;  pos: [T] integer temporal positions
        text: [B, L, text_dim] embeddings, or what `text_kv` made of them
        visible: who sees whom among these T latents (default: all see all);  past: per layer, rotated keys and values
            of finished latents that all T latents see besides (`KVCache.read`)
        need: velocities of the last so many latents are wanted, and the last layer computes no others; None: of all
        returns: v [B, T or need, C, h, w] float32; with return_kv also, per layer, the unrotated keys and the values of
            all T; with need = 0 these alone
        raises: UserError if a shape does not fit the config; ValueError for need together with spans"""
        c = self.config
        B, T, C, h, w = z.shape
        _, ph, pw = c.patch_size
        if C != c.in_dim or h % ph or w % pw:
            raise UserError(
                f"latents of {C} channels and {h}x{w} cells do not fit in_dim {c.in_dim} and patches of {ph}x{pw}"
                " (with an 8x VAE the frame's sides must be divisible by 16)"
            )
        if t.shape != (B, T) or pos.shape != (T,):
            raise UserError(
                f"t {tuple(t.shape)} and pos {tuple(pos.shape)} must be {(B, T)} and {(T,)} for z {tuple(z.shape)}"
            )
        if need and visible is not None:
            raise ValueError(
                "spans say what all latents see; need = n is for sequences without them"
            )
        weight = self.patch_embedding.weight
        grid, head_dim = (h // ph, w // pw), c.dim // c.num_heads
        x = self.patch_embedding(z.transpose(1, 2).to(weight.dtype))  # (B, E, T, h/2, w/2)
        x = x.flatten(3).permute(0, 2, 3, 1).float().contiguous()  # (B, T, N, E)

        e = self.time_embedding(sinusoid(t.flatten(), c.freq_dim).to(weight.dtype))
        time = self.time_projection(e).view(B, T, 6, c.dim).float()
        at = at_keys = rope(pos, *grid, head_dim)
        if visible is not None and visible.key_pos is not None:
            at_keys = rope(visible.key_pos, *grid, head_dim)
        text = text if isinstance(text, list) else [self.embed_text(text)] * c.num_layers

        kept = []
        for i, block in enumerate(self.blocks):
            args = (
                x,
                time,
                text[i],
                at,
                visible,
                at_keys,
                past[i] if past else None,
                need if i == c.num_layers - 1 else None,
            )
            x, own = (
                checkpoint(block, *args, use_reentrant=False)
                if self.checkpointing and torch.is_grad_enabled()
                else block(*args)
            )
            if return_kv or need == 0:
                kept.append(own)
        if need == 0:
            return kept
        T = x.shape[1]  # or `need`
        x = self.head(x, e.view(B, -1, c.dim)[:, -T:].float())  # (B, T, N, ph * pw * C)
        x = x.view(B, T, *grid, ph, pw, c.out_dim).permute(0, 1, 6, 2, 4, 3, 5)
        v = x.reshape(B, T, c.out_dim, h, w).float()
        return (v, kept) if return_kv else v


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed t [M] in 0 .. 1000 as [cos | sin] of t * 10000^(-k / (dim/2)): float32 [M, dim]."""
    frequency = 10000 ** (-torch.arange(dim // 2, device=t.device).double() / (dim // 2))
    angle = torch.outer(t.double(), frequency)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


# ---------------------------------------------------------------- weights
def load_dit(
    path: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> DiT:
    """Load whatever `weights.read_dit` reads; each tensor is cast to dtype (None: as stored) and moved on its own.

    raises: UserError that names every missing, unexpected or wrongly shaped tensor."""
    values, tensors, source = read_dit(path)
    config = config_from(DiTConfig, values, source)
    with torch.device("meta"):
        dit = DiT(config)
    return load_strict(dit, tensors, source, dtype, device)


def save_dit(dit: DiT, path: str | Path, to: str = "native") -> None:
    """Write a .safetensors file with Wan's names and the config in its metadata, or another layout of `weights.write_dit`."""
    write_dit(dit.state_dict(), asdict(dit.config), path, to)
