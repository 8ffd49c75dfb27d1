"""What a file is, if it is not what was asked for: tables, so that a message can say what to do.

Each row: a pattern, what a file that has it is, and what to do. The first row that fits is named.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from lib.common import UserError

T2V = "only text-to-video is supported here: use Wan2.1-T2V-1.3B or -14B"
PLAIN = "use the bf16 or fp16 file of the same model"
AGAIN = "download it again, from the link of the file itself (some want a login)"
LFS = "a Git LFS pointer, not the file that it stands for"
BY_FIRST_BYTES = (
    (rb"GGUF", "a GGUF file, whose weights are quantised", PLAIN),
    (rb"version https://git-lfs", LFS, "run `git lfs pull` where it lies, or download the file"),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page and not a checkpoint", AGAIN),
    (rb"[\t\r\n -~]+\Z", "a text and not a checkpoint", AGAIN),
    (rb"\Z", "an empty file", "copy or download it again"),
)
BY_NAMES = (  # what of the tensors' names is searched for, anywhere in them
    (
        r"lora[._]|\.diff(_[bm])?$|\.(hada|lokr|oft)_|dora_scale",
        "a LoRA, a change to weights and not weights",
        "merge it into its base (LongLive: longlive_base.pt): python -m lib.weights"
        " --weights BASE --merge_lora FILE --out NEW.safetensors",
    ),
    (
        r"(^|\.)scaled_fp8$|[._](scale_(weight|input)|(weight|input|fp8)_scales?(_\w+)?)$|comfy_quant",
        "fp8 weights with a scale for each layer",
        PLAIN,
    ),
    (
        r"\.(q?weight_packed|qweight|qzeros|w?scales|absmax|quant_map|quant_state\S*|SCB|_data)$",
        "quantised weights",
        PLAIN,
    ),
    (r"(^|\.)vace_", "VACE, which edits videos", T2V),
    (r"k_img|img_emb|image_embedder|add_k_proj", "an image-to-video transformer (I2V)", T2V),
    (
        r"control_adapter|(^|\.)ref_conv|audio_|face_|motion_encoder|pose_patch|cam_encoder",
        "a transformer that is steered by a picture, a pose, a camera or a sound",
        T2V,
    ),
    (
        r"(down|up)samples\.\d+\.(down|up)samples\.|_blocks\.\d+\.(down|up)sampler\.",
        "the VAE of Wan2.2's 5B, with 48 channels",
        "use Wan2.1_VAE.pth, which comes with Wan2.1-T2V-1.3B",
    ),
    (r"^(model\.)?(encoder|decoder)\.(conv1|conv_in|middle\.)", "VAE", ""),
    (r"(^|\.)(patch_embedding|self_attn\.q|attn1\.to_q)\.", "transformer", ""),
    (
        r"(^|\.)(SelfAttention\.q|blocks\.\d+\.attn\.q|embed_tokens)\.",
        "a text encoder",
        "name the transformer, the VAE, or a folder with all of them",
    ),
    (r"^(encoder|decoder)\.\d+\.", "a tiny autoencoder (TAEHV)", "use Wan2.1_VAE.pth"),
)


def refuse_pair(path: Path) -> None:
    """raises: UserError if a folder, or a file's name, shows that it is of Wan2.2's pair"""
    names = ("high_noise_model", "low_noise_model", "transformer_2")
    if re.search(r"(?i)wan.?2.2.*noise", path.name) or any((path / x).exists() for x in names):
        raise UserError(
            f"{path} is of Wan2.2's 14B, one network for high noise and one for low;"
            " use Wan2.1-T2V-14B"
        )


def refuse_file(path: Path) -> None:
    """raises: UserError if the first bytes of a file show that it is no checkpoint at all"""
    with open(path, "rb") as f:
        head = f.read(64)
    for pattern, what, advice in BY_FIRST_BYTES:
        if re.match(pattern, head):
            raise UserError(f"{path} is {what}; {advice}")


def refuse_names(path: object, names: Iterable[str], wanted: str) -> None:
    """wanted: "transformer" or "VAE".  raises: UserError if the names show that it is another"""
    names = list(names)
    for pattern, what, advice in BY_NAMES:
        example = next((name for name in names if re.search(pattern, name)), None)
        if example is None:
            continue
        if what == wanted:
            return
        if not advice:
            what, advice = f"a {what} and not a {wanted}", f"name a {wanted}, or a folder with both"
        raise UserError(f"{path} is {what} (it has {example}); {advice}")
