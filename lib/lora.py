"""Merging a LoRA, a change of few numbers, into the weights it changes: W + scale * alpha/r * B A.

What people have, with any prefix (diffusion_model., transformer., base_model.model., lora_unet_):

    blocks.0.self_attn.q.lora_A.weight, .lora_B.weight           peft, diffusers
    lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up.weight, .alpha        kohya, musubi
    blocks.0.norm3.diff, .diff_b, blocks.0.diff_m                whole differences: weight, bias,
                                                                 modulation (LoRAs made for Wan)
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lib.common import UserError
from lib.tensors import json_object

PARTS = (  # end of a key -> what it is
    (r"[._]lora[._](A|down)(\.[^.]+)?\.weight$", "down"),
    (r"[._]lora[._](B|up)(\.[^.]+)?\.weight$", "up"),
    (r"\.(lora_)?alpha$", "alpha"),
    (r"\.diff$", "weight"),
    (r"\.diff_b$", "bias"),
    (r"\.diff_m$", "modulation"),
)
PREFIX = r"^((lora|unet|lycoris|base|model|diffusion|transformer|dit|wan|net)_)*"  # of kohya's keys
STRANGERS = (  # what a key that changes no weight may mean, the first that fits
    (r"dora_scale|magnitude", "DoRA, which is not merged here"),
    (r"hada_|lokr_|oft_|lora_mid", "LoHa, LoKr, OFT or Tucker, which are not merged here"),
    (r"lora_te|text_(encoder|model)|SelfAttention|blocks\.\d+\.attn\.", "made for a text encoder"),
    (r"k_img|v_img|img_emb|vace_", "made for an image-to-video model or VACE"),
    ("", "made for another model (of more layers, another family), or of a kind not merged here"),
)


class Low(NamedTuple):
    """How a LoRA file scales its product, where it does not say so layer by layer."""

    alpha: float | None = None  # None: as the rank, that is, a factor of 1
    by_root: bool = False  # alpha / sqrt(r) (rank-stabilised) in place of alpha / r


AS_IT_IS = Low()


def settings(path: Path) -> Low:
    """What peft's adapter_config.json beside a LoRA, or diffusers' metadata in it, says of alpha.

    raises: UserError for kinds that are not merged here"""
    beside, text = (path if path.is_dir() else path.parent) / "adapter_config.json", "{}"
    if beside.is_file():
        text = beside.read_bytes()
    elif path.suffix == ".safetensors":
        with safe_open(str(path), "pt") as f:
            text = (f.metadata() or {}).get("lora_adapter_metadata", text)
    said = json_object(text, f"what {path} says of its alpha")
    said = {str(k).rpartition(".")[2]: v for k, v in said.items()}  # "transformer.lora_alpha"
    for name in ("use_dora", "alpha_pattern"):
        if said.get(name):
            raise UserError(f"{path}: a LoRA with {name} {said[name]} is not merged here")
    if said.get("lora_alpha") is None:
        print(f"note: {path} has no alpha for all: 1 is the factor of a B A without its own")
    return Low(said.get("lora_alpha"), bool(said.get("use_rslora")))


def split(key: str) -> tuple[str, str | None]:
    """blocks.0.ffn.0.lora_A.weight -> blocks.0.ffn.0, "down"; None for what is no LoRA's."""
    for pattern, part in PARTS:
        if found := re.search(pattern, key):
            return key[: found.start()], part
    return key, None


def merge(
    weights: dict[str, Tensor],
    names: dict[str, str],
    lora: dict[str, Tensor],
    scale: float = 1.0,
    low: Low = AS_IT_IS,
) -> tuple[dict[str, Tensor], int]:
    """Add a LoRA to weights, in float32, kept in the weights' dtype.

    names: every spelling of a weight's name -> its name in `weights`
    returns: the new weights, and how many have changed
    raises: UserError naming keys that match no weight, lack their other half, or do not fit"""
    changes = by_weight(names, lora)
    merged = dict(weights)
    for name, parts in changes.items():
        old = weights[name]
        delta = scale * difference(name, parts, low, old.shape)
        merged[name] = (old.float() + delta).to(old.dtype)
        if not torch.isfinite(merged[name].float().sum()):
            raise UserError(f"merging the LoRA makes {name} infinite or NaN; its file is damaged")
    return merged, len(changes)


def by_weight(names: dict[str, str], lora: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Which parts (down, up, alpha, or a whole difference) the LoRA has for which weight."""
    # as kohya writes names: a dot, or several underscores, become one underscore
    flat = {re.sub(r"[._]+", "_", spelling): name for spelling, name in names.items()}
    first = "|".join({re.escape(name.split(".")[0]) for name in names})
    changes: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, x in lora.items():
        stem, part = split(key)
        stem = re.sub(rf"^([^.]+\.)*?(?=({first})\.)", "", stem)  # any prefix with dots
        stem = re.sub(PREFIX, "", re.sub(r"[._]+", "_", stem))
        kind = part if part in ("bias", "modulation") else "weight"
        name = flat.get(f"{stem}_{kind}") or flat.get(stem)  # a modulation has no .weight
        if part is None or name is None:
            strangers.append(key)
        elif part in changes.setdefault(name, {}):
            raise UserError(f"the LoRA has two {part} for {name}: two adapters; save one of them")
        else:
            changes[name][part] = x
    if strangers or not changes:
        shown = (", ".join(strangers[:4]) or "none at all") + (", ..." if strangers[4:] else "")
        why = next(why for pattern, why in STRANGERS if re.search(pattern, " ".join(strangers)))
        raise UserError(
            f"{len(strangers)} of the LoRA's {len(lora)} keys match no weight: {shown}; it is {why}"
        )
    return changes


def difference(name: str, parts: dict[str, Tensor], low: Low, shape: torch.Size) -> Tensor:
    """The change of a weight, in its shape; parts: down [r, in, ...] and up [out, r], or whole.

    raises: UserError if a half is missing, or it is of another size"""
    deltas = [parts[part].float() for part in ("weight", "bias", "modulation") if part in parts]
    if parts.keys() & {"down", "up", "alpha"}:
        if not {"down", "up"} <= parts.keys():
            raise UserError(f"the LoRA has only {', '.join(parts)} for {name}; both halves are due")
        down, up = parts["down"].float().flatten(1), parts["up"].float().flatten(1)
        rank = len(down)
        if up.shape[1] != rank:
            raise UserError(f"the LoRA's halves for {name} have ranks {rank} and {up.shape[1]}")
        alpha = parts["alpha"].item() if "alpha" in parts else low.alpha
        factor = 1.0 if alpha is None else alpha / (rank**0.5 if low.by_root else rank)
        deltas.append(factor * up @ down)
    for delta in deltas:
        if delta.numel() != shape.numel() or delta.shape[0] != shape[0]:
            raise UserError(
                f"the LoRA changes {name} by {tuple(delta.shape)} but the weight is {tuple(shape)};"
                " it is for a model of another size"
            )
    return sum(delta.view(shape) for delta in deltas)
