"""The transformer is Wan's, and its additions (time, position and visibility per latent) are
exact."""

import json
import math
import re
import sys
from dataclasses import asdict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import ROOT, distance, randn, randomise, tiny_dit

import anchors
from dit import (
    PRESETS,
    Block,
    DiT,
    DiTConfig,
    Visible,
    attend,
    load_dit,
    rope,
    rotate,
    save_dit,
    sinusoid,
)
from kvcache import KVCache
from lib.common import UserError
from lib.noise import noise_seeded
from sampler import generate

CONFIGS = {
    "head_dim 12": {},
    "head_dim 16": {
        "dim": 64,
        "ffn_dim": 80,
        "freq_dim": 64,
        "text_dim": 24,
        "in_dim": 6,
        "out_dim": 6,
    },
    "head_dim 10, 3 layers, text 16": {
        "dim": 20,
        "num_heads": 2,
        "num_layers": 3,
        "text_len": 16,
        "in_dim": 2,
        "out_dim": 2,
    },
    "head_dim 128": {"dim": 128, "num_heads": 1, "num_layers": 1},
}
RAGGED = Visible(((0, 2, ((0, 2),)), (2, 3, ((0, 1), (2, 3))), (3, 6, ((1, 6),))))
REPEATED = Visible(
    ((0, 2, ((0, 2),)), (2, 5, ((0, 1), (2, 5), (6, 8)))),
    torch.tensor([0, 1, 2, 3, 4, 0, 1, 0]),
    torch.tensor([0, 1, 2, 3, 4, 9, -3, 12]),
)  # latent 0 stands at 0, 9 and 12, latent 1 at 1 and -3


def inputs(c: DiTConfig, T: int = 3, h: int = 4, w: int = 6, words: int = 5) -> tuple:
    """z, t (other for every sample and latent), text shorter than text_len, positions."""
    return (
        randn(1, 2, T, c.in_dim, h, w),
        1000 * randn(2, 2, T).sigmoid(),
        randn(3, 2, words, c.text_dim),
        torch.arange(T),
    )


def wan_sinusoid(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Wan's embedding of t, angles in float64. (diffusers rounds them to float32: 2e-5 off at t =
    1000.)"""
    return torch.tensor(
        [
            [
                f(s * 10000 ** (-k / (dim // 2)))
                for f in (math.cos, math.sin)
                for k in range(dim // 2)
            ]
            for s in t.tolist()
        ]
    )


def wan(c: DiTConfig):
    """diffusers' transformer of the same size, with random weights and Wan's exact angles."""
    from diffusers import WanTransformer3DModel

    model = randomise(
        WanTransformer3DModel(
            patch_size=c.patch_size,
            num_attention_heads=c.num_heads,
            attention_head_dim=c.dim // c.num_heads,
            in_channels=c.in_dim,
            out_channels=c.out_dim,
            text_dim=c.text_dim,
            freq_dim=c.freq_dim,
            ffn_dim=c.ffn_dim,
            num_layers=c.num_layers,
        ),
        seed=5,
    )
    model.condition_embedder.timesteps_proj.forward = lambda t: wan_sinusoid(t, c.freq_dim)
    return model


def run_wan(
    model, c: DiTConfig, z: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    padded = F.pad(
        text, (0, 0, 0, c.text_len - text.shape[1])
    )  # diffusers leaves this to its pipeline
    return model(z.transpose(1, 2), t, padded, return_dict=False)[0].transpose(1, 2)


# ---------------------------------------------------------------- parity
@pytest.mark.parametrize("sizes", CONFIGS.values(), ids=CONFIGS)
def test_equals_diffusers(sizes, tmp_path):
    """diffusers' Wan transformer, loaded from its own folder, gives the same velocity; the default
    text_len is Wan's 512."""
    c = tiny_dit(**sizes).config
    model = wan(c)
    model.save_pretrained(tmp_path / "transformer")
    for path in (tmp_path, tmp_path / "transformer"):
        ours = load_dit(path)
        assert asdict(ours.config) == asdict(c) | {"text_len": 512}
    z, t, text, pos = inputs(c)
    expected = run_wan(model, ours.config, z, t[:, 0], text)
    assert 0.3 < expected.std() < 5
    assert distance(ours(z, t[:, :1].expand(-1, 3), text, pos), expected) <= 1e-5


@pytest.mark.parametrize("sizes", CONFIGS.values(), ids=CONFIGS)
def test_time_per_latent_equals_diffusers(sizes, tmp_path):
    """A timestep of its own for every latent is diffusers' timestep of its own for every token (Wan
    2.2), and not one for all."""
    model = wan(tiny_dit(**sizes).config)
    model.save_pretrained(tmp_path)
    ours = load_dit(tmp_path)
    z, t, text, pos = inputs(ours.config)
    got = ours(z, t, text, pos)
    assert (
        distance(
            got,
            run_wan(model, ours.config, z, t.repeat_interleave(ours.config.tokens(4, 6), 1), text),
        )
        <= 1e-5
    )
    assert distance(got, ours(z, t[:, :1].expand(-1, 3), text, pos)) > 0.01


@pytest.mark.parametrize("sizes", CONFIGS.values(), ids=CONFIGS)
def test_diffusers_loads_what_we_save(sizes, tmp_path, monkeypatch):
    """save_dit(to="diffusers") is a folder that WanTransformer3DModel.from_pretrained reads, with
    equal output."""
    from diffusers import WanTransformer3DModel

    monkeypatch.setattr(
        WanTransformer3DModel, "_keep_in_fp32_modules", None
    )  # asks for accelerate; all is float32 here
    ours = tiny_dit(**sizes)
    save_dit(ours, tmp_path / "transformer", to="diffusers")
    model, report = WanTransformer3DModel.from_pretrained(
        tmp_path / "transformer", output_loading_info=True
    )
    assert not any(report.values()), report
    z, t, text, pos = inputs(ours.config)
    t = t[:, :1].expand(-1, 3) / 10  # within float32's reach, see wan_sinusoid
    with torch.no_grad():
        expected = run_wan(model, ours.config, z, t[:, 0], text)
    assert distance(ours(z, t, text, pos), expected) <= 1e-5


def test_sinusoid_by_hand():
    """[cos | sin] of t, t/100 for width 4: cos 2, cos .02, sin 2, sin .02; at any t within 1e-6 of
    float64."""
    assert (
        distance(
            sinusoid(torch.tensor([2.0]), 4),
            torch.tensor([[-0.41614684, 0.99980001, 0.90929743, 0.01999867]]),
        )
        <= 1e-7
    )
    t = torch.tensor([0.0, 4.98, 833.3333, 937.5, 1000])
    assert distance(sinusoid(t, 256), wan_sinusoid(t, 256)) <= 1e-6


@pytest.mark.parametrize(
    "name, parameters, tensors", [("wan1.3b", 1_418_996_800, 825), ("wan14b", 14_288_491_584, 1095)]
)
def test_presets_are_wan(name, parameters, tensors):
    """The presets have exactly the tensors of Wan2.1's T2V checkpoints: names, shapes and
    counts."""
    c = PRESETS[name]
    with torch.device("meta"):
        state = DiT(c).state_dict()
    assert sum(p.numel() for p in state.values()) == parameters and len(state) == tensors
    E, shapes = c.dim, {}
    for key, x in state.items():
        shapes.setdefault(re.sub(r"^blocks\.\d+\.", "blocks.N.", key), set()).add(tuple(x.shape))

    def linear(name, out, into):
        return {f"{name}.weight": {(out, into)}, f"{name}.bias": {(out,)}}

    expected = {
        "patch_embedding.weight": {(E, 16, 1, 2, 2)},
        "patch_embedding.bias": {(E,)},
        **linear("text_embedding.0", E, 4096),
        **linear("text_embedding.2", E, E),
        **linear("time_embedding.0", E, 256),
        **linear("time_embedding.2", E, E),
        **linear("time_projection.1", 6 * E, E),
        "head.modulation": {(1, 2, E)},
        **linear("head.head", 64, E),
        "blocks.N.modulation": {(1, 6, E)},
        "blocks.N.norm3.weight": {(E,)},
        "blocks.N.norm3.bias": {(E,)},
        **linear("blocks.N.ffn.0", c.ffn_dim, E),
        **linear("blocks.N.ffn.2", E, c.ffn_dim),
    }
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            expected |= linear(f"blocks.N.{attention}.{part}", E, E)
        expected |= {f"blocks.N.{attention}.norm_{part}.weight": {(E,)} for part in "qk"}
    assert shapes == expected


def test_toy_has_the_students_interface():
    """The toy preset is a few million parameters and starts, like Wan, by predicting v = 0."""
    toy = DiT(PRESETS["toy"])
    assert 1e6 < sum(p.numel() for p in toy.parameters()) < 1e7
    z, t, text, pos = inputs(toy.config)
    assert toy(z, t, text, pos).abs().max() == 0


# ---------------------------------------------------------------- checkpoints
def test_native_round_trip_is_bit_exact(tmp_path):
    """A saved model comes back with the same bits, frozen, and with its config read from the
    metadata."""
    ours = tiny_dit(text_len=11)
    save_dit(ours, tmp_path / "student.safetensors")
    for path in (tmp_path, tmp_path / "student.safetensors"):
        back = load_dit(path)
        assert back.config == ours.config and not any(p.requires_grad for p in back.parameters())
        assert all(torch.equal(x, back.state_dict()[k]) for k, x in ours.state_dict().items())


def test_bfloat16_is_loaded_as_asked(tmp_path):
    """load_dit(dtype=bfloat16) casts every parameter and computes close to float32: rms error below
    2 % of the output."""
    ours = tiny_dit()
    save_dit(ours, tmp_path / "a.safetensors")
    half = load_dit(tmp_path / "a.safetensors", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    exact, got = (m(*inputs(ours.config)) for m in (ours, half))
    assert (
        got.dtype == torch.float32
        and 0 < (got - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()
    )


def test_shards_with_an_index_load(tmp_path):
    """The 14B layout: two shards, an index and Wan's config.json; a missing shard is named."""
    ours = tiny_dit()
    state, c = ours.state_dict(), asdict(ours.config)
    names = {
        k: f"diffusion_pytorch_model-0000{1 + n % 2}-of-00002.safetensors"
        for n, k in enumerate(state)
    }
    for shard in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == shard}, tmp_path / shard)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": names})
    )
    published = (
        "dim",
        "eps",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "num_heads",
        "num_layers",
        "out_dim",
        "text_len",
    )
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"_class_name": "WanModel", "model_type": "t2v", "text_dim": 32}
            | {k: c[k] for k in published}
        )
    )
    back = load_dit(tmp_path)
    assert back.config == ours.config and all(
        torch.equal(x, back.state_dict()[k]) for k, x in state.items()
    )
    (tmp_path / shard).unlink()
    with pytest.raises(UserError, match=shard):
        load_dit(tmp_path)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "model._fsdp_wrapped_module.",
        "_fsdp_wrapped_module.model.",
        "_orig_mod.",
        "model._orig_mod._checkpoint_wrapped_module.",
    ],
)
def test_self_forcing_checkpoints_load(prefix, tmp_path):
    """A .pt of Self-Forcing's kind: the EMA is preferred, wrappers' prefixes go."""
    ours, ema = tiny_dit(1), tiny_dit(2)
    (tmp_path / "config.json").write_text(json.dumps(asdict(ours.config)))

    def wrapped(model):
        return {
            prefix
            + k.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): v
            for k, v in model.state_dict().items()
        }

    torch.save({"generator": wrapped(ours), "critic": {}}, tmp_path / "raw.pt")
    torch.save({"generator": wrapped(ours), "generator_ema": wrapped(ema)}, tmp_path / "both.pt")
    for file, expected in (("raw.pt", ours), ("both.pt", ema)):
        back = load_dit(tmp_path / file)
        assert back.config == expected.config and all(
            torch.equal(x, back.state_dict()[k]) for k, x in expected.state_dict().items()
        )


def test_every_misfit_is_named_at_once(tmp_path):
    """Missing, unexpected and wrongly shaped tensors appear in one UserError, with both shapes."""
    ours = tiny_dit()
    save_dit(ours, tmp_path / "good.safetensors")
    state = load_file(tmp_path / "good.safetensors")
    del state["blocks.1.norm3.bias"]
    state["blocks.0.extra"] = torch.zeros(1)
    state["head.head.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "bad.safetensors", {"config": json.dumps(asdict(ours.config))})
    with pytest.raises(
        UserError,
        match=r"missing 1 \(blocks.1.norm3.bias\); unexpected 1 \(blocks.0.extra\); "
        r"wrong shape 1 \(head.head.bias is \(7,\) but should be \(16,\)\)",
    ):
        load_dit(tmp_path / "bad.safetensors")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    """Foreign, truncated, absent and image-to-video checkpoints each end in a UserError that names
    the file or the reason."""
    save_dit(tiny_dit(), tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    torch.save({"model.layer.weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    save_file({"unet.conv.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    torch.save({"generator": tiny_dit().state_dict()}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:2000])
    for name, says in (
        ("cut.safetensors", "cut.safetensors is not a whole"),
        ("cut.pt", "cut.pt is not a checkpoint"),
        ("foreign.pt", "foreign.pt is not a Wan transformer.*'model.layer.weight'"),
        ("none.pt", "none.pt does not exist"),
        ("foreign.safetensors", "not a Wan transformer.*'unet.conv.weight'"),
        (".", "holds several transformers .cut.pt"),
    ):
        with pytest.raises(UserError, match=says):
            load_dit(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "i2v", "dim": 48}))
    save_file(tiny_dit().state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="text-to-video"):
        load_dit(tmp_path)
    with pytest.raises(UserError, match="onnx"):
        save_dit(tiny_dit(), tmp_path / "x", to="onnx")


# ---------------------------------------------------------------- time, position, visibility
def test_latents_at_their_own_time_equal_separate_passes():
    """Blocks that do not see each other, each latent at its own t, are what separate passes
    give."""
    ours = tiny_dit()
    z, t, text, _ = inputs(ours.config, T=5)
    pos = torch.tensor([4, 5, 0, 1, 2])
    apart = [ours(z[:, a:b], t[:, a:b], text, pos[a:b]) for a, b in ((0, 2), (2, 5))]
    together = ours(z, t, text, pos, Visible(((0, 2, ((0, 2),)), (2, 5, ((2, 5),)))))
    assert distance(together, torch.cat(apart, 1)) <= 1e-5
    assert distance(together, ours(z, t, text, pos)) > 0.01


@pytest.mark.parametrize("shift", [1, 7, 5000, -3, -5000])
def test_only_relative_position_matters(shift):
    """Moving all positions by a constant, beyond Wan's 1024 or below 0, changes nothing; moving one
    latent does."""
    ours = tiny_dit()
    z, t, text, pos = inputs(ours.config)
    assert distance(ours(z, t, text, pos + shift), ours(z, t, text, pos)) <= 1e-5
    assert (
        distance(ours(z, t, text, pos + torch.tensor([0, 0, shift])), ours(z, t, text, pos)) > 1e-3
    )


@pytest.mark.parametrize("head_dim", [6, 12, 16, 128])
def test_angles_are_wans(head_dim):
    """Rotation equals Wan's own: complex float64 multiplication, d - 4(d//6), 2(d//6), 2(d//6)
    channels of t, h, w."""
    pos, h, w = torch.tensor([0, 20, -4, 5000]), 3, 2
    dims = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    grids = torch.meshgrid(
        pos.double(), torch.arange(h).double(), torch.arange(w).double(), indexing="ij"
    )
    angles = torch.cat(
        [
            g.reshape(-1, 1) / torch.pow(10000, torch.arange(0, d, 2).double() / d)
            for g, d in zip(grids, dims)
        ],
        1,
    )
    x = randn(0, 2, len(pos) * h * w, 3, head_dim)
    turned = (
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    cos, sin = rope(pos, h, w, head_dim)
    assert distance(rotate(x, (cos, sin)), torch.view_as_real(turned).flatten(-2)) <= 2e-6
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (len(pos) * h * w, 1, head_dim // 2)


def test_rotate_is_a_rotation():
    """By hand: a quarter turn sends (a, b) to (-b, a); head_dim 6 at position 2, row 1, column 3
    turns by 2, 1, 3 radians."""
    quarter = (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))  # cosine, sine
    assert rotate(torch.tensor([[[[3.0, 4.0]]]]), quarter).flatten().tolist() == [-4, 3]
    token = rotate(
        torch.tensor([1.0, 0, 0, 1, 1, 0]).expand(1, 8, 1, 6), rope(torch.tensor([2]), 2, 4, 6)
    )[0, 7, 0]
    by_hand = torch.tensor(
        [-0.41614684, 0.90929743, -0.84147098, 0.54030231, -0.98999250, 0.14112001]
    )  # cos 2, sin 2, -sin 1, ...
    assert distance(token, by_hand) <= 1e-6
    x = randn(0, 1, 24, 2, 12)
    y = rotate(x, rope(torch.tensor([3, -900]), 4, 3, 12))
    assert distance(x.norm(dim=-1), y.norm(dim=-1)) <= 1e-5 and distance(x, y) > 0.1
    assert rotate(x.bfloat16(), rope(torch.tensor([3, -900]), 4, 3, 12)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "visible",
    [RAGGED, Visible(((0, 6, ((0, 6),)),)), Visible(((0, 1, ((0, 6),)), (1, 6, ((5, 6),))))],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_spans_equal_a_dense_mask(visible, tokens):
    """Attention span by span is masked attention: values and all three gradients."""
    q, k, v = (randn(s, 2, 6 * tokens, 3, 8).requires_grad_() for s in range(3))
    out = attend(q, k, v, visible)
    dense = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible.dense(tokens)
    ).transpose(1, 2)
    weight = randn(9, *out.shape)
    assert distance(out, dense) <= 1e-5
    assert distance(*(torch.autograd.grad(y, (q, k, v), weight) for y in (out, dense))) <= 1e-5


def test_dense_by_hand():
    """The matrix of spans: rows are queries, True may attend."""
    assert RAGGED.dense().int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
    ]
    assert REPEATED.dense().int().tolist() == 2 * [[1, 1, 0, 0, 0, 0, 0, 0]] + 3 * [
        [1, 0, 1, 1, 1, 0, 1, 1]
    ]
    assert torch.equal(RAGGED.dense(2)[::2, 1::2], RAGGED.dense()) and RAGGED.dense(2).shape == (
        12,
        12,
    )


def test_one_latent_may_be_several_keys():
    """key_slot and key_pos: the layer equals dense attention over gathered keys at these positions,
    gradients too. (The block adds to x only the attention of the normed x.)"""
    block = randomise(Block(DiTConfig(dim=24, ffn_dim=8, num_heads=2))).requires_grad_()
    with torch.no_grad():
        block.modulation.zero_()[:, 2] = 1  # the gate of the self-attention
        block.cross_attn.o.weight.zero_()
        block.cross_attn.o.bias.zero_()
    h, w, pos, text = 1, 3, torch.arange(5), randn(1, 2, 4, 24)
    x, time = randn(0, 2, 5, 3, 24).requires_grad_(), torch.zeros(2, 5, 6, 24)
    turned, keys_turned = rope(pos, h, w, 12), rope(REPEATED.key_pos, h, w, 12)
    out, (k_own, _) = block(x, time, text, turned, keys_turned, REPEATED)
    layer, y = block.self_attn, F.layer_norm(x, (24,), eps=block.eps).flatten(1, 2)
    q, k, v = layer.norm_q(layer.q(y)), layer.norm_k(layer.k(y)), layer.v(y)
    rows = (REPEATED.key_slot[:, None] * 3 + torch.arange(3)).flatten()
    q, k, v = (y.view(2, -1, 2, 12) for y in (q, k[:, rows], v[:, rows]))
    q, k = rotate(q, turned), rotate(k, keys_turned)
    dense = F.scaled_dot_product_attention(
        *(y.transpose(1, 2) for y in (q, k, v)), attn_mask=REPEATED.dense(3)
    )
    dense = x + layer.o(dense.transpose(1, 2).flatten(2)).view_as(x)
    wrt, weight = (x, *layer.parameters()), randn(9, *out.shape)
    assert distance(out, dense) <= 1e-5 and k_own.shape == (2, 15, 2, 12)
    assert distance(*(torch.autograd.grad(y, wrt, weight) for y in (out, dense))) <= 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("visible", [RAGGED, REPEATED], ids=["ragged", "repeated"])
def test_spans_equal_dense_on_cuda(visible):
    """CUDA's kernels, chosen a span, give the values and gradients of a dense mask (float32, tf32
    off)."""
    keys = visible.dense().shape[1]
    q = randn(0, 2, visible.slots * 100, 4, 64).cuda().requires_grad_()
    k, v = (randn(s, 2, keys * 100, 4, 64).cuda().requires_grad_() for s in (1, 2))
    heads_first, mask = (x.transpose(1, 2) for x in (q, k, v)), visible.dense(100).cuda()
    dense = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    outs, weight = (attend(q, k, v, visible), dense), randn(9, *q.shape).cuda()
    assert distance(*outs) <= 1e-4
    assert distance(*(torch.autograd.grad(y, (q, k, v), weight) for y in outs)) <= 1e-4


# ---------------------------------------------------------------- text, memory, mistakes
def test_text_may_come_as_keys_and_values():
    """text_kv(text) in place of text gives the same bits; so does text that is already padded with
    zeros."""
    ours = tiny_dit()
    z, t, text, pos = inputs(ours.config)
    v = ours(z, t, text, pos)
    assert torch.equal(ours(z, t, ours.text_kv(text), pos), v)
    assert torch.equal(ours(z, t, F.pad(text, (0, 0, 0, 3)), pos), v)
    assert distance(ours(z, t, text[:, :4], pos), v) > 1e-3  # the fifth word counts
    with pytest.raises(UserError, match=r"\(2, 9, 32\) are not \[B, <= 8, 32\]"):
        ours(z, t, F.pad(text, (0, 0, 0, 4)), pos)


def test_checkpointing_changes_no_bit():
    """Recomputing blocks in the backward pass gives the same output and gradients, past keys and
    spans included."""
    ours = tiny_dit().requires_grad_()
    z, t, text, pos = inputs(ours.config, T=5)
    past = [(randn(7, 2, 12, 4, 12), randn(8, 2, 12, 4, 12))] * 2
    results = []
    for ours.checkpointing in (False, True):
        for how in ({"visible": REPEATED}, {"past": past}):
            out = ours(z, t, text, pos, **how)
            ours.zero_grad()
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad for p in ours.parameters())])
    for plain, again in zip(results[:2], results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        assert all(g.abs().max() > 0 for g in plain)


@pytest.mark.parametrize(
    "shape, t_shape, T, says",
    [
        ((2, 3, 5, 4, 6), (2, 3), 3, "5 channels"),
        ((2, 3, 4, 5, 6), (2, 3), 3, "5x6 cells"),
        ((2, 3, 4, 4, 7), (2, 3), 3, "4x7 cells"),
        ((2, 3, 4, 4, 6), (2, 2), 3, r"t \(2, 2\)"),
        ((2, 3, 4, 4, 6), (2,), 3, r"t \(2,\)"),
        ((2, 3, 4, 4, 6), (2, 3), 4, r"pos \(4,\)"),
    ],
)
def test_bad_shapes_are_named(shape, t_shape, T, says):
    """Latents, times or positions that do not fit end in a UserError with the offending sizes."""
    with pytest.raises(UserError, match=says):
        tiny_dit()(torch.zeros(shape), torch.zeros(t_shape), torch.zeros(2, 5, 32), torch.arange(T))


@pytest.mark.parametrize(
    "changes", [{"patch_size": (2, 2, 2)}, {"dim": 50}, {"dim": 60}, {"dim": 16}]
)
def test_impossible_sizes_are_refused(changes):
    """Patches over time, and widths that do not split into even heads of at least 6, are no DiT of
    this kind."""
    with pytest.raises(UserError, match="patch_size|num_heads"):
        tiny_dit(**changes)


def test_keys_alone_are_those_of_a_whole_pass():
    """keys_only gives every layer's keys and values, bit for bit, with a past or without."""
    dit, pos = tiny_dit(5), torch.arange(6)
    z, t, text, _ = inputs(dit.config, T=6)
    cache = KVCache(dit.config, 2, 2, 4, 6)
    cache.write((0, 1), dit(z[:, :2], t[:, :2], text, pos[:2], keys_only=True))
    for past in (None, cache.read(((0, 7), (1, 8)))):
        _, kept = dit(z, t, text, pos, past=past, return_kv=True)
        alone = dit(z, t, text, pos, past=past, keys_only=True)
        assert len(alone) == dit.config.num_layers
        assert all(torch.equal(a, b) for x, y in zip(kept, alone) for a, b in zip(x, y))


# ---------------------------------------------------------------- a fork
AN_ACTION_PER_LATENT = {  # a line of dit.py -> with what is added; nothing else changes
    """        self.init_weights()
""": """        self.init_weights()
        self.action = nn.Linear(3, c.dim, bias=False)
        nn.init.zeros_(self.action.weight)
""",
    """        check_noisy(z, t, pos, self.config)
""": """        check_noisy(z, t, pos, self.config)
        text, action = text  # action: [B, T, 3]
""",
    """        time = self.time_projection(e)""": """        e = e + self.action(action[:, pos])
        time = self.time_projection(e)""",
}


def test_an_action_per_latent_is_an_edit_of_dit_alone(tmp_path, monkeypatch):
    """Four lines make a world model of it: old weights load with `new`, the sampler hands the
    action through, and an action changes its own block and what comes after, not what was
    before."""
    source = (ROOT / "dit.py").read_text()
    for old, new in AN_ACTION_PER_LATENT.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    fork = ModuleType("fork")
    monkeypatch.setitem(sys.modules, "fork", fork)
    exec(compile(source, "fork", "exec"), fork.__dict__)

    plain, plan, action = tiny_dit(3), anchors.forward(9), torch.zeros(1, 9, 3)
    save_dit(plain, tmp_path / "plain.safetensors")
    world = fork.load_dit(tmp_path / "plain.safetensors", new=("action.",))
    words, noise = plain.text_kv(randn(1, 1, 5, 32)), noise_seeded([(0, 0, 0)], (4, 4, 4))

    def play(model, text):
        return generate(model, plan, [text], noise)

    before = play(plain, words)
    assert torch.equal(play(world, (words, action)), before)  # zero at first
    world.action.weight.data = randn(2, 48, 3)
    action[:, 4] = 1
    after = play(world, (words, action))
    assert torch.equal(after[:, :3], before[:, :3])
    assert all(distance(after[:, n], before[:, n]) > 1e-3 for n in range(3, 9))


def test_new_parameters_are_named_and_nothing_else_may_be_missing(tmp_path, capsys):
    """`new` fills what is missing under a name with zeros, and says so; another missing tensor is
    an error as ever."""
    dit = tiny_dit(3)
    state = dit.state_dict()
    kept = {k: v for k, v in state.items() if not k.startswith("blocks.1.ffn.2.")}
    save_file(kept, tmp_path / "a.safetensors", {"config": json.dumps(asdict(dit.config))})
    back = load_dit(tmp_path / "a.safetensors", new=("blocks.1.ffn.2.",)).state_dict()
    assert not back["blocks.1.ffn.2.weight"].any() and not back["blocks.1.ffn.2.bias"].any()
    assert all(torch.equal(back[k], v) for k, v in kept.items())
    assert "blocks.1.ffn.2.weight, blocks.1.ffn.2.bias: new, and zero" in capsys.readouterr().out
    for new in ((), ("blocks.0.",)):
        with pytest.raises(UserError, match=r"missing 2 \(blocks.1.ffn.2.weight"):
            load_dit(tmp_path / "a.safetensors", new=new)
