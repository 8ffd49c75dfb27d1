"""Checkpoints: which files people have, and what the names in them mean. No model is built here.

    native         Wan's own folder, Wan2.1-T2V-1.3B/: diffusion_pytorch_model.safetensors (or shards with an index),
                   Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/ (the tokenizer)
    diffusers      a folder with transformer/, vae/, text_encoder/, tokenizer/
    self-forcing   a .pt {"generator_ema": {"model." + name: tensor}}, else "generator": Self-Forcing, CausVid, LongLive,
                   Causal-Forcing. Such a file is a student without VAE: put it, or a link, beside Wan2.1_VAE.pth
    ours           student.safetensors, vae.safetensors: native names, and the config in the metadata

All of them are brought to Wan's names, which are the parameters' names in dit.py and vae.py. Nothing is downloaded.

    python weights.py --weights out/dmd --to diffusers --out transformer        # also: --to native, --to self-forcing
"""

import hashlib
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lib.common import UserError, atomic, read_pickle, run


# ---------------------------------------------------------------- files
def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], config: dict | None = None
) -> None:
    """Write tensors and, as JSON under the metadata key `config`, a plain dict; atomically."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with atomic(path) as tmp:
        try:
            save_file(
                tensors, str(tmp), {"config": json.dumps(config)} if config is not None else None
            )
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict | None]:
    """Read a checkpoint: one .safetensors or .pt/.pth file, or a folder with one (sharded with its index, too).

    Tensors stay memory-mapped until they are used; those of safetensors have a mapping each, so that the memory of the
    file's pages goes with the tensor. returns: (tensors, config), where config comes from the metadata key `config`,
    else from `config.json` beside the file, else None.
    raises: UserError naming the file when it is missing, truncated, not the one that a SHA256SUMS beside it means, not a
    checkpoint, or an unsafe pickle."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.index.json")) or sorted(
            p for s in (".safetensors", ".pt", ".pth") for p in path.glob("*" + s)
        )
        if len(found) != 1:
            raise UserError(
                f"{path} holds {len(found)} checkpoints ({', '.join(p.name for p in found) or 'none'}); "
                "name one .safetensors or .pt file"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    verify(path)
    config = (
        read_json(path.parent / "config.json") if (path.parent / "config.json").is_file() else None
    )
    if path.name.endswith(".index.json"):
        names = read_json(path).get("weight_map")
        shards = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
        absent = [s for s in shards if not (path.parent / s).is_file()]
        if absent or not shards:
            raise UserError(
                f"{path.name} names shards that are missing in {path.parent}: {', '.join(absent) or 'none at all'}"
            )
        tensors = {}
        for shard in shards:
            tensors.update(read_tensors(path.parent / shard)[0])
        return tensors, config
    if path.suffix != ".safetensors":
        return read_pickle(path), config
    try:
        with safe_open(str(path), "pt") as f:
            meta, names = f.metadata() or {}, list(f.keys())
        tensors = {k: safe_open(str(path), "pt").get_tensor(k) for k in names}
        config = json.loads(meta["config"]) if "config" in meta else config
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again"
        ) from None
    if config is not None and not isinstance(config, dict):
        raise UserError(
            f"{path}: the metadata's config is a JSON {type(config).__name__}, not an object"
        )
    return tensors, config


def verify(path: Path) -> None:
    """Compare a file with the SHA256SUMS beside it, if that names it. raises: UserError if it is not the file meant there"""
    sums = path.parent / "SHA256SUMS"
    lines = (
        sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    )
    meant = {
        name.lstrip("*"): digest
        for digest, _, name in (line.replace("  ", " ").partition(" ") for line in lines)
    }.get(path.name)
    if meant:
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != meant.lower():
                raise UserError(
                    f"{path} is not the file that {sums} names (its hash differs); copy it again, or correct that line"
                )


def read_json(path: Path) -> dict:
    """A JSON object. raises: UserError"""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def load_strict(
    model: nn.Module,
    tensors: dict[str, Tensor],
    source: object,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Put `tensors` into `model` (built on the meta device), one at a time cast to `dtype` and taken out of the dict; no
    second copy is made.

    raises: UserError that names missing, unexpected and wrongly shaped keys in one sentence."""
    want = model.state_dict()
    wrong = [
        f"{k} is {tuple(getattr(tensors[k], 'shape', ()))} but should be {tuple(want[k].shape)}"
        for k in want
        if k in tensors and getattr(tensors[k], "shape", None) != want[k].shape
    ]
    check_names(want, tensors, f"{source} does not fit {type(model).__name__}", wrong)
    cast = {}
    for k in want:
        x = tensors.pop(k)
        cast[k] = x.to(device=device, dtype=dtype or x.dtype)
    model.load_state_dict(cast, assign=True)
    return model.eval().requires_grad_(False)


def check_names(
    want: typing.Iterable[str],
    have: typing.Iterable[str],
    what: str,
    wrong: list[str] | None = None,
) -> None:
    """raises: UserError with names that are missing, unexpected, or of wrong shape."""
    want, have = dict.fromkeys(want), dict.fromkeys(have)
    problems = [
        f"{label} {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for label, names in (
            ("missing", [k for k in want if k not in have]),
            ("unexpected", [k for k in have if k not in want]),
            ("wrong shape", wrong or []),
        )
        if names
    ]
    if problems:
        raise UserError(f"{what}: " + "; ".join(problems))


def within(config: object, what: str, **most: int) -> None:
    """Sizes of a network, often read from a stranger's file, are whole numbers (or tuples of them) from 1 to these.

    raises: UserError naming the first that is not, before anything is built from it"""
    for name, limit in most.items():
        value = getattr(config, name)
        for x in value if isinstance(value, tuple) else (value,):
            if not isinstance(x, int) or isinstance(x, bool) or not 1 <= x <= limit:
                raise UserError(
                    f"the {what} config's {name} is {str(value)[:60]}; it must be from 1 to {limit}"
                )


def config_from(cls: type, values: dict, source: object):
    """Make the config dataclass `cls` from JSON values; keys that start with _ are ignored, lists become tuples.

    raises: UserError naming an unknown key or a value of the wrong type."""
    kinds = typing.get_type_hints(cls)
    known = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in values.items()
        if not k.startswith("_")
    }
    for k, v in known.items():
        kind = typing.get_origin(kinds.get(k)) or kinds.get(k)
        if kind is None:
            raise UserError(
                f"{source}: the config has an unknown field {k!r}; {cls.__name__} has {', '.join(kinds)}"
            )
        inside = typing.get_args(kinds[k])[0] if kind is tuple else None
        if (
            not isinstance(v, (kind, int) if kind is float else kind)
            or (isinstance(v, bool) and kind is not bool)
            or (
                inside
                and not all(isinstance(x, (inside, int) if inside is float else inside) for x in v)
            )
        ):
            raise UserError(
                f"{source}: the config field {k} is {v!r}, which is not of type {kind.__name__}"
            )
    return cls(**known)


# ---------------------------------------------------------------- folders
FILES = {  # what: the names it has in a folder, the first that exists is taken; where it comes from
    "transformer": (
        (
            "student.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
            "diffusion_pytorch_model.safetensors",
            "transformer",
        ),
        "Wan's comes with Wan2.1-T2V-1.3B or -14B; a student may also be the folder's only .pt file",
    ),
    "VAE": (
        ("vae.safetensors", "Wan2.1_VAE.pth", "vae"),
        "Wan2.1_VAE.pth comes with Wan2.1-T2V-1.3B; copy or link it there",
    ),
    "text encoder": (
        ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
        "it comes with Wan2.1-T2V-1.3B; or give embeddings made where it is, by text.py",
    ),
    "tokenizer": (
        ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json"),
        "it comes with Wan2.1-T2V-1.3B, as the folder google/umt5-xxl",
    ),
}


def _is_folder(path: str | Path) -> bool:
    """Whether a folder is there, or would be if it existed."""
    return not Path(path).is_file() and Path(path).suffix not in (".safetensors", ".pt", ".pth")


def find(folder: str | Path, what: str) -> Path:
    """Where a folder keeps its transformer, VAE, text encoder or tokenizer.

    raises: UserError with the names that were looked for and where the file comes from."""
    folder, (names, origin) = Path(folder), FILES[what]
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; it should be one with a {what} ({' or '.join(names)}): {origin}"
        )
    found = [folder / n for n in names if (folder / n).exists()]
    if not found and what == "transformer":
        found = sorted(folder.glob("*.pt"))
        if len(found) > 1:
            raise UserError(
                f"{folder} holds several students ({', '.join(p.name for p in found)}); name one of these files"
            )
    if not found:
        raise UserError(f"{folder} holds no {what} ({' or '.join(names)}): {origin}")
    return found[0]


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
} | {
    f"{ours}.{a}": f"{theirs}.{b}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for a, b in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}
DIFFUSERS_DIT = {
    "ffn_dim": "ffn_dim",
    "num_attention_heads": "num_heads",
    "num_layers": "num_layers",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "patch_size": "patch_size",
    "eps": "eps",
}
WRAPPERS = r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."  # what training wrappers put into names


def rename(key: str, to_diffusers: bool) -> str:
    """Translate a parameter name between Wan and diffusers; unknown names stay, to be reported by load_strict."""
    block, name = re.match(r"(blocks\.\d+\.)?(.*)", key).groups()
    stem, kind = re.match(r"(.*?)(\.weight|\.bias)?$", name).groups()
    table = INNER if block else OUTER
    if not to_diffusers:
        table = {b: a for a, b in table.items()}
    return (block or "") + table.get(stem, stem) + (kind or "")


def names_of_dit(layers: int) -> list[str]:
    """All names of a Wan transformer: 15 outside its blocks and 27 in each."""
    stems = [*OUTER, *(f"blocks.{n}.{stem}" for n in range(layers) for stem in INNER)]
    return [
        stem + kind
        for stem in stems
        for kind in (
            ("",)
            if stem.endswith("modulation")
            else (".weight",)
            if "norm_" in stem
            else (".weight", ".bias")
        )
    ]


def sizes_of_dit(tensors: dict[str, Tensor], source: object) -> dict:
    """The fields of DiTConfig that the tensors' shapes tell; heads have 128 channels, the text 512 tokens [Wan]."""
    try:
        dim, in_dim, *patch = tensors["patch_embedding.weight"].shape
        layers = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks."))
        return {
            "dim": dim,
            "ffn_dim": tensors["blocks.0.ffn.0.weight"].shape[0],
            "num_heads": dim // 128,
            "num_layers": layers,
            "freq_dim": tensors["time_embedding.0.weight"].shape[1],
            "text_dim": tensors["text_embedding.0.weight"].shape[1],
            "text_len": 512,
            "in_dim": in_dim,
            "out_dim": tensors["head.head.weight"].shape[0] // (patch[1] * patch[2]),
            "patch_size": tuple(patch),
            "eps": 1e-6,
        }
    except (KeyError, ValueError, IndexError, AttributeError):
        raise UserError(
            f"{source} is not a Wan transformer (it has {len(tensors)} entries, the first is "
            f"{next(iter(tensors), 'absent')!r}); expected names like blocks.0.self_attn.q.weight"
        ) from None


def read_dit(path: str | Path) -> tuple[dict, dict[str, Tensor], Path]:
    """A transformer in any of the layouts above: the values of its DiTConfig, memory-mapped tensors under Wan's names, and
    the path that was read.

    The values are the safetensors metadata, else config.json, completed by what the shapes tell. raises: UserError"""
    path = find(path, "transformer") if _is_folder(path) else Path(path)
    tensors, values = read_tensors(path)
    if "generator_lora" in tensors or any("lora_A" in k for k in tensors):
        raise UserError(
            f"{path} is a LoRA, a change to weights and not weights; merge it into its base (LongLive: longlive_base.pt) "
            "first, or use the base alone"
        )
    for wrapper in ("generator_ema", "generator", "model", "state_dict"):
        if isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    tensors = {
        re.sub(rf"^model\.|{WRAPPERS}", "", re.sub(rf"^({WRAPPERS})+", "", k)): v
        for k, v in tensors.items()
    }
    values = {
        k: v
        for k, v in (values or {}).items()
        if k not in ("qk_norm", "cross_attn_norm", "window_size")
    }  # always the same
    if any(k.startswith("condition_embedder.") for k in tensors):
        tensors = {rename(k, to_diffusers=False): v for k, v in tensors.items()}
        heads, width = values.get("num_attention_heads", 40), values.get("attention_head_dim", 128)
        if not type(heads) is type(width) is int:
            raise UserError(
                f"{path}: the config has {heads!r} heads of {width!r} channels; both must be whole numbers"
            )
        values = {new: values[old] for old, new in DIFFUSERS_DIT.items() if old in values} | {
            "dim": heads * width
        }
    elif values.pop("model_type", "t2v") != "t2v":
        raise UserError(f"{path}: only the text-to-video model (model_type t2v) is supported")
    values = sizes_of_dit(tensors, path) | (values if "dim" in values else {})
    if not values["num_heads"]:
        raise UserError(
            f"{path}: heads of a transformer of width {values['dim']} cannot be told from its tensors; it needs a config.json"
        )
    return values, tensors, path


def write_dit(
    tensors: dict[str, Tensor], values: dict, path: str | Path, to: str = "native"
) -> None:
    """Write a transformer, given under Wan's names with the values of its DiTConfig, in one of three layouts.

    native: a .safetensors file that ComfyUI reads, too; diffusers: a folder for `WanTransformer3DModel.from_pretrained`;
    self-forcing: a .pt with the same tensors as `generator` and `generator_ema`. raises: UserError"""
    path, suffix = Path(path), {"native": ".safetensors", "self-forcing": ".pt", "diffusers": ""}
    if to not in suffix:
        raise UserError(f"unknown format {to!r}; use {', '.join(suffix)}")
    if path.suffix != suffix[to] and to != "diffusers":
        raise UserError(f"{path} must be a file that ends in {suffix[to]}, for the format {to}")
    if to == "native":
        return write_safetensors(path, tensors, values)
    if to == "self-forcing":
        tensors = {"model." + k: v.detach().cpu().clone() for k, v in tensors.items()}
        with atomic(path) as tmp:
            torch.save({"generator": tensors, "generator_ema": tensors}, tmp)
        return None
    config = {old: values[new] for old, new in DIFFUSERS_DIT.items()} | {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": values["dim"] // values["num_heads"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }
    write_safetensors(
        path / "diffusion_pytorch_model.safetensors",
        {rename(k, True): v for k, v in tensors.items()},
    )
    with atomic(path / "config.json") as tmp:
        tmp.write_text(json.dumps(config, indent=1))


# ---------------------------------------------------------------- the VAE
DIFFUSERS_VAE = {
    "base_dim": "dim",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
    "latents_mean": "mean",
    "latents_std": "std",
}


def read_vae(path: str | Path) -> tuple[dict, dict[str, Tensor], Path]:
    """A VAE as `Wan2.1_VAE.pth`, a native safetensors file, a diffusers `vae/` folder, or a folder that holds one of these:
    the values of its VAEConfig (none: Wan2.1's), tensors under Wan's names, and the path that was read. raises: UserError"""
    path = Path(path)
    if _is_folder(path) and not (
        (path / "config.json").is_file() and "base_dim" in read_json(path / "config.json")
    ):
        path = find(path, "VAE")  # else it is the vae/ folder itself
    tensors, values = read_tensors(path)
    values = values or {}
    if any(k.startswith("encoder.conv_in") for k in tensors):  # diffusers' names
        values = {new: values[old] for old, new in DIFFUSERS_VAE.items() if old in values}
        blocks = values.get("num_res_blocks", 2)
        tensors = {_vae_name(k, blocks): v for k, v in tensors.items()}
    elif "dim_mult" not in values:
        values = {}  # the config.json beside Wan2.1_VAE.pth describes the transformer
    return values, tensors, path


def _vae_name(key: str, num_res_blocks: int) -> str:
    """`decoder.up_blocks.1.resnets.0.conv1.weight` -> `decoder.upsamples.4.residual.2.weight`."""

    def flat(m: re.Match) -> str:  # diffusers nests the decoder's stages, Wan numbers them through
        place = num_res_blocks + 1 if m[2] == "upsamplers" else int(m[3])
        return f"upsamples.{int(m[1]) * (num_res_blocks + 2) + place}"

    for old, new in (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"conv_in\b", "conv1"),
        (r"norm_out", "head.0"),
        (r"conv_out", "head.2"),
        (r"mid_block\.resnets\.0", "middle.0"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.1", "middle.2"),
        (r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", flat),
        (r"down_blocks", "downsamples"),
        (r"conv_shortcut", "shortcut"),
        *(
            (rf"((?:downsamples|upsamples|middle)\.\d+)\.{name}\b", rf"\1.residual.{digit}")
            for name, digit in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6))
        ),
    ):
        key = re.sub(old, new, key)
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


def _umt5_name(key: str) -> str:
    block, name = re.match(r"(?:blocks\.(\d+)\.)?(.*?)(?:\.weight)?$", key).groups()
    if block and name in UMT5_BLOCK:
        return f"encoder.block.{block}.layer.{UMT5_BLOCK[name]}.weight"
    return f"{UMT5_OUTER[name]}.weight" if name in UMT5_OUTER else key


def read_umt5(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """UMT5's encoder from Wan's .pth or a Hugging Face `text_encoder/` folder: the sizes that `transformers.UMT5Config` wants,
    and tensors under transformers' names. raises: UserError"""
    tensors = {_umt5_name(k): v for k, v in read_tensors(path)[0].items()}
    tensors.setdefault("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    tensors["encoder.embed_tokens.weight"] = tensors[
        "shared.weight"
    ]  # transformers has one table under two names
    layer = "encoder.block.0.layer."
    try:
        vocabulary, width = tensors["shared.weight"].shape
        buckets, heads = tensors[layer + "0.SelfAttention.relative_attention_bias.weight"].shape
        return {
            "vocab_size": vocabulary,
            "d_model": width,
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
            "d_kv": tensors[layer + "0.SelfAttention.q.weight"].shape[0] // heads,
            "d_ff": tensors[layer + "1.DenseReluDense.wo.weight"].shape[1],
            "feed_forward_proj": "gated-gelu",
            "num_layers": 1
            + max(int(k.split(".")[2]) for k in tensors if k.startswith("encoder.block.")),
        }, tensors
    except (KeyError, ValueError, AttributeError):
        raise UserError(
            f"{path} is not the encoder of UMT5: expected names like blocks.0.attn.q.weight or {layer}0.SelfAttention.q.weight"
        ) from None


# ---------------------------------------------------------------- command line
@dataclass
class Config:
    """Export a transformer: bring it from any layout that is read here to another."""

    weights: str  # a checkpoint, or a folder with one
    out: str  # native: a .safetensors file; self-forcing: a .pt file; diffusers: a folder
    to: str = "native"  # native (Wan's names, which ComfyUI reads), diffusers or self-forcing


def main(config: Config) -> None:
    values, tensors, source = read_dit(config.weights)
    check_names(
        names_of_dit(values["num_layers"]), tensors, f"{source} is not a whole Wan transformer"
    )
    write_dit(tensors, values, config.out, config.to)
    print(f"{source} -> {config.out}, {sum(x.numel() for x in tensors.values()):,} parameters")


if __name__ == "__main__":
    run(main, Config)
