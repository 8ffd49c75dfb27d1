"""The Wan2.1 text-to-video transformer, with one timestep and one temporal position per latent.

Teacher, student and critic are this one class and differ only in what a latent may see:

    dit(z, t, text, pos)                every latent sees every latent: the teacher, the critic
    dit(z, t, text, pos, visible=...)   spans derived from a plan: the student of stage 1, one pass
    dit(z, t, text, pos, past=...)      keys of finished latents come first: the student's rollout

Time enters per latent (`t [B, T]`), so noisy and clean latents share a sequence. Position enters
only by rotating queries and keys (RoPE), so keys are handed out *unrotated* and whoever stores them
may place them anywhere later. Mask, past and positions are arguments, keys and values are return
values: nothing is kept on the module. The conditioning, `text`, is handed through by all others
unopened, so that another signal (an action per latent) is an edit of this file alone.

Numbers: the network predicts the velocity v = noise - x0 and is told t = 1000 sigma. Linear layers
and attention run in the weights' dtype; the residual stream, norms, modulation and RoPE compute in
float32, as in Wan's own code [Wan]. Parameter names are Wan's. No sampling and no loss here.

    python -c "from dit import load_dit; print(load_dit('toy/weights'))"
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.cpu import Linear, attention
from lib.shapes import check_noisy, check_text, check_transformer
from lib.weights import check_sizes, config_from, load_strict, read_dit, write_dit


@dataclass(frozen=True)
class DiTConfig:
    """Wan's own names; defaults are Wan2.1 T2V 1.3B."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256  # width of the sinusoidal embedding of t
    text_dim: int = 4096
    text_len: int = 512  # text is zero-padded to this and attended whole, padding included [Wan]
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, ...] = (1, 2, 2)  # latents, rows, columns
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_sizes(self, "transformer")
        check_transformer(self)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def grid(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent of h x w cells: 60 x 104 -> 30 x 52."""
        return h // self.patch_size[1], w // self.patch_size[2]

    def tokens(self, h: int, w: int) -> int:
        """Tokens per latent of h x w cells: 60 x 104 -> 1560."""
        return math.prod(self.grid(h, w))


TOY_TEXT = {"freq_dim": 64, "text_dim": 64, "text_len": 12}
PRESETS = {
    "wan1.3b": DiTConfig(),  # 1,418,996,800 parameters
    "wan14b": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),  # 14,288,491,584
    "toy": DiTConfig(192, 512, 4, 6, patch_size=(1, 1, 1), **TOY_TEXT),  # 16 tokens a latent [ours]
    "toy64": DiTConfig(dim=384, ffn_dim=1024, num_heads=6, num_layers=8, **TOY_TEXT),  # [ours]
}


# ---------------------------------------------------------------- positions
Angles = tuple[Tensor, Tensor]  # cosine and sine for every token and channel pair [L, 1, D/2]


def rope(pos: Tensor, h: int, w: int, head_dim: int, theta: float = 10000.0) -> Angles:
    """Angles for latents at any integer positions pos [T] in time, each of h x w tokens.

    The first of the D/2 channel pairs turn with time, the rest with row and column: D = 128 gives
    22, 21 and 21 pairs. Pair j of n turns by place * theta^(-j/n)."""
    rows = torch.arange(h, device=pos.device)
    columns = torch.arange(w, device=pos.device)
    place = torch.cartesian_prod(pos, rows, columns).double()  # (T*h*w, 3): time, row, column

    in_space = head_dim // 6  # pairs for rows, and as many for columns
    in_time = head_dim // 2 - 2 * in_space
    turned = []
    for axis, pairs in enumerate((in_time, in_space, in_space)):
        frequency = theta ** (-torch.arange(pairs, device=pos.device).double() / pairs)
        turned.append(torch.outer(place[:, axis], frequency))  # (T*h*w, pairs)
    angles = torch.cat(turned, dim=1)[:, None]  # (T*h*w, 1, D/2): the same for all heads
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn each pair of adjacent channels: (a, b) -> (a cos - b sin, a sin + b cos).

    x: [B, L, A, D], any dtype; computed in float32, returned in x's dtype."""
    cos, sin = angles
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, L, A, D/2, 2)
    if torch.compiler.is_compiling():  # what the compiler can fuse
        a, b = pairs.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:  # as one complex product, on a CPU three times as fast [measured]
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)  # (B, L, A, D)


# ---------------------------------------------------------------- who may see whom
Ranges = tuple[tuple[int, int], ...]  # ranges of keys, [k0, k1) each
Spans = tuple[tuple[int, int, Ranges], ...]  # queries q0 .. q1-1 see the keys of these ranges


@dataclass
class Visible:
    """Who may see whom inside one sequence, in units of latents; made from a plan.

    spans: runs of queries without a gap between them, and the keys that they see.
        Two blocks of 3, causal: ((0, 3, ((0, 3),)), (3, 6, ((0, 6),))).
    key_slot, key_pos: key j is that of the latent in slot key_slot[j], rotated to key_pos[j], so
        that a latent may be read at two positions. None: each slot's key, at its own position.
    Attention goes span by span, unpadded, each by torch's fused kernel (why: docs/speed.md)."""

    spans: Spans
    key_slot: Tensor | None = None
    key_pos: Tensor | None = None

    @property
    def slots(self) -> int:
        """How many latents the sequence has: where its last run of queries ends."""
        return self.spans[-1][1]

    def keys_of(self, x: Tensor) -> Tensor:
        """The keys (or values) of all slots [B, slots * N, A, D] as [B, keys * N, A, D]."""
        if self.key_slot is None:
            return x
        x = x.unflatten(1, (self.slots, -1))  # (B, slots, N, A, D)
        return x[:, self.key_slot].flatten(1, 2)

    def in_tokens(self, n: int) -> Spans:
        """The spans in units of tokens, n a latent."""
        return tuple(
            (q0 * n, q1 * n, tuple((k0 * n, k1 * n) for k0, k1 in ranges))
            for q0, q1, ranges in self.spans
        )

    def dense(self, tokens: int = 1) -> Tensor:
        """The same as a bool matrix [L, K]; True = may attend. For pictures and tests."""
        keys = self.slots if self.key_slot is None else len(self.key_slot)
        mask = torch.zeros(self.slots, keys, dtype=torch.bool)
        for q0, q1, ranges in self.spans:
            for k0, k1 in ranges:
                mask[q0:q1, k0:k1] = True
        return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def to(self, device: torch.device) -> "Visible":
        """The same, with the places of repeated keys on a device."""
        return Visible(self.spans, self.key_slot.to(device), self.key_pos.to(device))


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that each query may see.

    q: [B, L, A, D];  k, v: [B, K, A, D];  returns: [B, L, A, D]"""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, A, L or K, D)
    if visible is None:
        spans = ((0, q.shape[2], ((0, k.shape[2]),)),)
    else:
        spans = visible.in_tokens(q.shape[2] // visible.slots)
    return attention(q, k, v, spans).transpose(1, 2)  # (B, L, A, D)


# ---------------------------------------------------------------- layers
KV = tuple[Tensor, Tensor]  # keys, not rotated, and values of a sequence [B, L, A, D]
Past = tuple[Tensor, Tensor]  # keys, rotated, and values of finished latents [B, K, A, D]


class Attention(nn.Module):
    """The weights of an attention: of the video to itself, or to the text."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        # over the full width, all heads together, before the split into heads [Wan]
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def queries(self, x: Tensor) -> Tensor:
        """[B, L, E] -> [B, L, A, D]"""
        q, weight = self.q(x), self.norm_q.weight
        q = F.rms_norm(q, weight.shape, weight.to(q.dtype), self.norm_q.eps)  # in its own dtype
        return q.unflatten(-1, (self.num_heads, -1))

    def kv(self, x: Tensor) -> KV:
        """[B, L, E] -> keys and values, [B, L, A, D] each"""
        k, v, weight = self.k(x), self.v(x), self.norm_k.weight
        k = F.rms_norm(k, weight.shape, weight.to(k.dtype), self.norm_k.eps)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift: x [B, T, N, E], shift and scale [B, T, 1, E], float32."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class Block(nn.Module):
    """Self-attention and a feed-forward net, which the time modulates; the text between them."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c, self.eps = config, config.eps
        self.self_attn = Attention(c.dim, c.num_heads, c.eps)
        self.cross_attn = Attention(c.dim, c.num_heads, c.eps)
        self.norm3 = nn.LayerNorm(c.dim, c.eps)  # before cross-attention; the one with weights
        self.ffn = nn.Sequential(
            Linear(c.dim, c.ffn_dim), nn.GELU(approximate="tanh"), Linear(c.ffn_dim, c.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, c.dim) / c.dim**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor | KV,
        angles: Angles,
        key_angles: Angles,
        visible: Visible | None = None,
        past: Past | None = None,
        keys_only: bool = False,
    ) -> tuple[Tensor, KV]:
        """x: [B, T, N, E] float32, T latents of N tokens;  time: [B, T, 6, E] float32
        text: [B, text_len, E], or its keys and values
        angles, key_angles: of the queries, and of the keys of this sequence
        keys_only: stop at the keys and values of the self-attention
        returns: x, as it came if keys_only, and these keys and values, for a cache to keep"""
        dtype = self.ffn[0].weight.dtype
        six = (self.modulation.float() + time).unsqueeze(3)  # (B, T, 6, 1, E)
        shift1, scale1, gate1, shift2, scale2, gate2 = six.unbind(2)  # (B, T, 1, E) each

        y = modulate(x, shift1, scale1, self.eps).to(dtype).flatten(1, 2)  # (B, L, E)
        if keys_only:
            return x, self.self_attn.kv(y)
        q = rotate(self.self_attn.queries(y), angles)  # (B, L, A, D)
        own = k, v = self.self_attn.kv(y)  # (B, L, A, D) each
        if visible is not None:
            k, v = visible.keys_of(k), visible.keys_of(v)  # (B, K, A, D): a latent may repeat
        k = rotate(k, key_angles)
        if past is not None:
            k = torch.cat([past[0], k], dim=1)  # (B, past + K, A, D)
            v = torch.cat([past[1], v], dim=1)
        y = self.self_attn.o(attend(q, k, v, visible).flatten(2))  # (B, L, E)
        x = torch.addcmul(x, y.view_as(x), gate1)  # x + y * gate

        weight, bias = self.norm3.weight.float(), self.norm3.bias.float()
        y = F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        q = self.cross_attn.queries(y.to(dtype).flatten(1, 2))  # (B, L, A, D); no positions
        k, v = text if isinstance(text, tuple) else self.cross_attn.kv(text)
        x = x + self.cross_attn.o(attend(q, k, v).flatten(2)).view_as(x)

        y = self.ffn(modulate(x, shift2, scale2, self.eps).to(dtype))  # (B, T, N, E)
        x = torch.addcmul(x, y, gate2)
        return x, own


class Head(nn.Module):
    """Modulated by the time embedding itself, not by its projection [Wan]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, config.out_dim * config.patch_size[1] * config.patch_size[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        two = (self.modulation.float() + time.unsqueeze(2)).unsqueeze(3)  # (B, T, 2, 1, E)
        shift, scale = two.unbind(2)  # (B, T, 1, E) each
        return self.head(modulate(x, shift, scale, self.eps).to(self.head.weight.dtype))


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed t [M] in 0 .. 1000 as [cos | sin] of t * 10000^(-k / (dim/2)): float32 [M, dim]."""
    frequency = 10000 ** (-torch.arange(dim // 2, device=t.device).double() / (dim // 2))
    angle = torch.outer(t.double(), frequency)  # (M, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


# ---------------------------------------------------------------- the transformer
class DiT(nn.Module):
    """Noisy latents, their times and positions, and a text -> their velocities."""

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
        self.checkpointing = False  # training: recompute each block in the backward pass
        self.recipe: dict | None = None  # how a student was trained, as its checkpoint says
        self.init_weights()

    def init_weights(self) -> None:
        """Wan's: Xavier, but 0.02 for what embeds text and time, zero for the head: v = 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.data.flatten(1))
        for linear in (*self.text_embedding[::2], *self.time_embedding[::2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def compile_blocks(self, backend: str = "inductor") -> "DiT":
        """torch.compile each block, in place; the first call of each kind takes up to minutes."""
        torch._dynamo.config.recompile_limit = 64  # with a past or none, a gradient or none, ...
        for block in self.blocks:
            block.compile(backend=backend)
        return self

    def embed_text(self, text: Tensor) -> Tensor:
        """[B, L <= text_len, text_dim] -> padded with zeros, then embedded: [B, text_len, E]."""
        c = self.config
        check_text(text, c.text_len, c.text_dim)
        text = F.pad(text, (0, 0, 0, c.text_len - text.shape[1]))
        return self.text_embedding(text.to(self.text_embedding[0].weight.dtype))

    def text_kv(self, text: Tensor) -> list[KV]:
        """Keys and values of text [B, L, text_dim], layer by layer: once per prompt."""
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
        keys_only: bool = False,
    ) -> Tensor | tuple[Tensor, list[KV]] | list[KV]:
        """Predict the velocity of every latent.

        z: [B, T, C, h, w] latents;  t: [B, T] = 1000 sigma, 0 for clean;  pos: [T] integers
        text: embeddings [B, L, text_dim], or what `text_kv` made of them
        visible: who sees whom among these T latents (default: all see all)
        past: what all of them see besides, layer by layer (`KVCache.read`)
        returns: v [B, T, C, h, w] float32; with return_kv also the keys and values of each layer;
            with keys_only these alone, and the last layer stops at its keys"""
        check_noisy(z, t, pos, self.config)
        c, (h, w) = self.config, z.shape[3:]
        x = self._patchify(z)  # (B, T, N, E)
        e = self._embed_time(t)  # (B, T, E)
        time = self.time_projection(e).unflatten(2, (6, -1)).float()  # (B, T, 6, E)
        words = text if isinstance(text, list) else [self.embed_text(text)] * c.num_layers
        angles = key_angles = rope(pos, *c.grid(h, w), c.head_dim)
        if visible is not None and visible.key_slot is not None:
            visible = visible.to(z.device)
            key_angles = rope(visible.key_pos, *c.grid(h, w), c.head_dim)

        kept = []
        for i, block in enumerate(self.blocks):
            here = past[i] if past else None
            stop = keys_only and i == c.num_layers - 1
            args = (x, time, words[i], angles, key_angles, visible, here, stop)
            if self.checkpointing and torch.is_grad_enabled():
                x, own = checkpoint(block, *args, use_reentrant=False)
            else:
                x, own = block(*args)
            if return_kv or keys_only:
                kept.append(own)
        if keys_only:
            return kept
        v = self._unpatchify(self.head(x, e.float()), h, w).float()
        return (v, kept) if return_kv else v

    def _patchify(self, z: Tensor) -> Tensor:
        """[B, T, C, h, w] -> [B, T, N, E], float32."""
        x = z.transpose(1, 2).to(self.patch_embedding.weight.dtype)  # (B, C, T, h, w)
        x = self.patch_embedding(x)  # (B, E, T, rows, columns)
        return x.flatten(3).permute(0, 2, 3, 1).float().contiguous()

    def _embed_time(self, t: Tensor) -> Tensor:
        """[B, T] -> [B, T, E]."""
        waves = sinusoid(t.flatten(), self.config.freq_dim)  # (B*T, freq_dim)
        return self.time_embedding(waves.to(self.time_embedding[0].weight.dtype)).view(*t.shape, -1)

    def _unpatchify(self, x: Tensor, h: int, w: int) -> Tensor:
        """[B, T, N, ph * pw * C] -> [B, T, C, h, w]."""
        c = self.config
        rows, columns = c.grid(h, w)
        _, ph, pw = c.patch_size
        x = x.view(*x.shape[:2], rows, columns, ph, pw, c.out_dim)
        x = x.permute(0, 1, 6, 2, 4, 3, 5)  # (B, T, C, rows, ph, columns, pw)
        return x.reshape(*x.shape[:3], h, w)


# ---------------------------------------------------------------- weights
def load_dit(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    new: tuple[str, ...] = (),
) -> DiT:
    """Load whatever `weights.read_dit` reads; how it was trained, if it says so, is `dit.recipe`.

    dtype: None keeps each tensor's own;  new: parameters whose names begin so may be missing in
    the file and then start as zeros.  raises: UserError naming every tensor that does not fit"""
    values, tensors, source = read_dit(path)
    recipe = values.pop("recipe", None)
    with torch.device("meta"):
        dit = DiT(config_from(DiTConfig, values, source))
    dit.recipe = recipe
    return load_strict(dit, tensors, source, dtype, device, new)


def save_dit(dit: DiT, path: str | Path, to: str = "native", recipe: dict | None = None) -> None:
    """Write weights, config and recipe (default: `dit.recipe`), see `weights.write_dit`."""
    values = asdict(dit.config) | {"recipe": recipe or dit.recipe}
    write_dit(dit.state_dict(), values, path, to)
