"""What the names in a checkpoint mean: Wan's beside diffusers' and transformers', as tables.

Wan's are the parameters' names in dit.py and vae.py. No files here: names, shapes and configs come
in, names and values go out.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from lib.common import UserError

# ---------------------------------------------------------------- the transformer
# Wan's name -> diffusers' name, outside the blocks and inside block i
OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
INNER = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    INNER |= {f"{ours}.{a}": f"{theirs}.to_{a}" for a in "qkv"}
    INNER |= {f"{ours}.{a}": f"{theirs}.{a}" for a in ("norm_q", "norm_k")}
    INNER[f"{ours}.o"] = f"{theirs}.to_out.0"
FIELDS = (  # of DiTConfig, in its order
    *("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len"),
    *("in_dim", "out_dim", "patch_size", "eps", "recipe"),
)
DIFFUSERS_DIT = {  # diffusers' field -> DiTConfig's
    **{k: k for k in ("ffn_dim", "num_layers", "freq_dim", "text_dim", "patch_size", "eps")},
    **{"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"},
}
OURS = "_unitemp"  # for what diffusers' config has no field; it ignores names that start with _
FIXED = {  # what the transformer here is built for, where a config says so
    "model_type": ("t2v",),
    "qk_norm": (True, "rms_norm_across_heads"),
    "cross_attn_norm": (True,),
    "window_size": ([-1, -1], (-1, -1)),
    **dict.fromkeys(("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"), (None,)),
}
HEADS = {1536: 12, 5120: 40}  # of Wan's widths, whose text has 4096 channels and 512 tokens
OTHERS = {  # channels in and out of models of Wan's that are not built here
    (36, 16): "an image-to-video transformer: 20 channels of it are for a picture",
    (48, 48): "Wan2.2's 5B, which has a VAE of its own",
}


def rename(key: str, to_diffusers: bool) -> str:
    """Translate a parameter's name between Wan and diffusers; unknown ones stay as they are."""
    block, name = re.match(r"(blocks\.\d+\.)?(.*)", key).groups()
    stem, kind = re.match(r"(.*?)(\.weight|\.bias)?$", name).groups()
    table = INNER if block else OUTER
    if not to_diffusers:
        table = {theirs: ours for ours, theirs in table.items()}
    return (block or "") + table.get(stem, stem) + (kind or "")


def names_of_dit(layers: int) -> list[str]:
    """All names of a Wan transformer: 15 outside its blocks and 27 in each."""
    names = []
    for stem in [*OUTER, *(f"blocks.{n}.{stem}" for n in range(layers) for stem in INNER)]:
        if stem.endswith("modulation"):
            names.append(stem)
        else:
            names += [stem + ".weight"] + [stem + ".bias"] * ("norm_" not in stem)
    return names


def sizes_of_dit(tensors: dict[str, Tensor], source: object) -> dict:
    """The fields of DiTConfig that the tensors' shapes tell: all but heads, text_len and eps.

    raises: UserError for tensors that are missing, or a model of Wan's that is not built here"""
    try:
        dim, there, *patch = tensors["patch_embedding.weight"].shape
        made = tensors["head.head.weight"].shape[0] // (patch[1] * patch[2])
        sizes = {
            "dim": dim,
            "ffn_dim": tensors["blocks.0.ffn.0.weight"].shape[0],
            "num_layers": 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks.")),
            "freq_dim": tensors["time_embedding.0.weight"].shape[1],
            "text_dim": tensors["text_embedding.0.weight"].shape[1],
            "in_dim": there,
            "out_dim": made,
            "patch_size": tuple(patch),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{source} is not a whole Wan transformer: {error} is missing or of another shape;"
            f" the first of its {len(tensors)} names is {next(iter(tensors), 'absent')!r}"
        ) from None
    if sizes["text_dim"] == 4096 and (there, made) in OTHERS:
        raise UserError(f"{source} is {OTHERS[there, made]}; use Wan2.1-T2V-1.3B or -14B")
    if made != there:
        raise UserError(f"{source} makes {made} channels of {there}: that is no velocity")
    return sizes


def heads_of_wan(sizes: dict, source: object) -> dict:
    """What no shape tells, for Wan's own widths. raises: UserError for any other"""
    if sizes["dim"] not in HEADS or sizes["text_dim"] != 4096:
        raise UserError(
            f"{source} has no config, and num_heads and text_len of a transformer of width"
            f" {sizes['dim']} for text of width {sizes['text_dim']} cannot be told from its"
            " tensors (Wan's have 1536 or 5120, and 4096); put a config.json beside it that"
            " says dim, num_heads and text_len"
        )
    return {"num_heads": HEADS[sizes["dim"]], "text_len": 512}


def dit_of(
    tensors: dict[str, Tensor], configs: Iterable[dict], source: object
) -> tuple[dict, dict[str, Tensor]]:
    """The values of DiTConfig, in its order, and the recipe; and the tensors under Wan's names.

    configs: what may describe it; the first counts that is a transformer's.  raises: UserError"""
    if any(k.startswith("condition_embedder.") for k in tensors):
        tensors = {rename(k, to_diffusers=False): v for k, v in tensors.items()}
    values = next(filter(None, (understood(config, source) for config in configs)), {})
    sizes = sizes_of_dit(tensors, source)
    if not {"num_heads", "text_len"} <= values.keys():
        sizes |= heads_of_wan(sizes, source)
    values = sizes | values
    return {k: values[k] for k in FIELDS if k in values} | values, tensors


def understood(config: dict, path: object) -> dict:
    """The values of DiTConfig, and the recipe, in a config of ours, Wan's or diffusers'; else {}.

    raises: UserError where it means another network than the one that is built here"""
    for name, allowed in FIXED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{path}: the config's {name} is {config[name]!r}; only Wan2.1's text-to-video"
                f" transformer is supported, where it is {allowed[0]!r}"
            )
    values = {k: v for k, v in config.items() if k not in FIXED and (k == OURS or k[:1] != "_")}
    if "num_attention_heads" in values:
        values = from_diffusers(values, path)
    elif "dim" not in values:
        return {}  # of another network: Wan2.1_VAE.pth lies beside the transformer's config
    strange = sorted(values.keys() - set(FIELDS))
    if strange and "_class_name" in config:  # in a config of ours it would be a mistake
        shown = ", ".join(f"{k}={values.pop(k)!r}" for k in strange)
        print(f"note: {path}: fields of its config that mean nothing here: {shown}")
    if not isinstance(values.get("recipe") or {}, dict):
        raise UserError(f"{path}: the config's recipe is {values['recipe']!r}, not an object")
    return values


def from_diffusers(config: dict, path: object) -> dict:
    """Diffusers' config in Wan's words. raises: UserError for what it cannot mean"""
    heads, width = config["num_attention_heads"], config.get("attention_head_dim", 128)
    if type(heads) is not int or type(width) is not int:
        given = f"{heads!r} heads of {width!r} channels"
        raise UserError(f"{path}: the config has {given}; both must be whole numbers")
    said = {"attention_head_dim", "rope_max_seq_len", OURS}
    values = {DIFFUSERS_DIT.get(k, k): v for k, v in config.items() if k not in said}
    ours = config.get(OURS)
    return values | {"dim": heads * width, "text_len": 512} | (ours if type(ours) is dict else {})


def diffusers_config(values: dict) -> dict:
    """The same values as diffusers' config; what it has no field for stands under OURS."""
    return {theirs: values[ours] for theirs, ours in DIFFUSERS_DIT.items()} | {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": values["dim"] // values["num_heads"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        OURS: {k: values[k] for k in ("text_len", "recipe") if k in values},
    }


# ---------------------------------------------------------------- the VAE
DIFFUSERS_VAE = {  # diffusers' field -> VAEConfig's
    **{"base_dim": "dim", "temperal_downsample": "temporal_downsample"},
    **{"latents_mean": "mean", "latents_std": "std"},
    **{k: k for k in ("z_dim", "dim_mult", "num_res_blocks")},
}
RESIDUAL = {"norm1": 0, "conv1": 2, "norm2": 3, "conv2": 6}  # diffusers' part -> place in Wan's
VAE_NAMES = (  # a part of diffusers' name -> Wan's, one after the other
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"conv_in\b", "conv1"),
    (r"norm_out", "head.0"),
    (r"conv_out", "head.2"),
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.1", "middle.2"),
    (r"down_blocks", "downsamples"),
    (r"conv_shortcut", "shortcut"),
    *((rf"(samples\.\d+|middle\.\d+)\.{a}\b", rf"\1.residual.{n}") for a, n in RESIDUAL.items()),
)


def vae_of(tensors: dict[str, Tensor], config: dict) -> tuple[dict, dict[str, Tensor]]:
    """The values of VAEConfig (none: Wan2.1's), and the tensors under Wan's names."""
    if any(k.startswith("encoder.conv_in") for k in tensors):  # diffusers' names
        values = {DIFFUSERS_VAE[k]: v for k, v in config.items() if k in DIFFUSERS_VAE}
        blocks = values.get("num_res_blocks", 2)
        return values, {_vae_name(k, blocks): v for k, v in tensors.items()}
    # the config.json beside Wan2.1_VAE.pth describes the transformer
    return config if "dim_mult" in config else {}, tensors


def _vae_name(key: str, num_res_blocks: int) -> str:
    """`decoder.up_blocks.1.resnets.0.conv1.weight` -> `decoder.upsamples.4.residual.2.weight`."""

    def flat(m: re.Match) -> str:  # diffusers nests the decoder's stages, Wan numbers them through
        place = num_res_blocks + 1 if m[2] == "upsamplers" else int(m[3])
        return f"upsamples.{int(m[1]) * (num_res_blocks + 2) + place}"

    key = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", flat, key)
    for theirs, ours in VAE_NAMES:
        key = re.sub(theirs, ours, key)
    return key


# ---------------------------------------------------------------- the text encoder
# Wan's name -> transformers' name, in block i and outside
UMT5_BLOCK = {
    "norm1": "0.layer_norm",
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
    **{f"attn.{a}": f"0.SelfAttention.{a}" for a in "qkvo"},
}
UMT5_OUTER = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}


def umt5_of(tensors: dict[str, Tensor], source: object) -> tuple[dict, dict[str, Tensor]]:
    """The sizes that `transformers.UMT5Config` wants, and the tensors under transformers' names.

    raises: UserError"""
    tensors = {_umt5_name(k): v for k, v in tensors.items()}
    tensors.setdefault("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]  # one table, two names
    layer = "encoder.block.0.layer."
    try:
        vocabulary, width = tensors["shared.weight"].shape
        buckets, heads = tensors[layer + "0.SelfAttention.relative_attention_bias.weight"].shape
        blocks = [int(k.split(".")[2]) for k in tensors if k.startswith("encoder.block.")]
        return {
            "vocab_size": vocabulary,
            "d_model": width,
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
            "d_kv": tensors[layer + "0.SelfAttention.q.weight"].shape[0] // heads,
            "d_ff": tensors[layer + "1.DenseReluDense.wo.weight"].shape[1],
            "feed_forward_proj": "gated-gelu",
            "num_layers": 1 + max(blocks),
        }, tensors
    except (KeyError, ValueError, AttributeError):
        raise UserError(
            f"{source} is not the encoder of UMT5: expected names like blocks.0.attn.q.weight"
            f" or {layer}0.SelfAttention.q.weight"
        ) from None


def _umt5_name(key: str) -> str:
    block, name = re.match(r"(?:blocks\.(\d+)\.)?(.*?)(?:\.weight)?$", key).groups()
    if block and name in UMT5_BLOCK:
        return f"encoder.block.{block}.layer.{UMT5_BLOCK[name]}.weight"
    return f"{UMT5_OUTER[name]}.weight" if name in UMT5_OUTER else key
