"""Checkpoints: which files people have, and which network is in them. No model is built here.

    native         Wan's own folder, Wan2.1-T2V-1.3B/: diffusion_pytorch_model.safetensors (or
                   shards with an index), Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth,
                   google/umt5-xxl/ (the tokenizer)
    diffusers      a folder with transformer/, vae/, text_encoder/, tokenizer/
    self-forcing   a .pt {"generator_ema": {"model." + name: tensor}}, else "generator":
                   Self-Forcing, CausVid, LongLive, Causal-Forcing. Such a file is a student
                   without VAE: put it, or a link, beside Wan2.1_VAE.pth
    ours           student.safetensors, vae.safetensors: native names, and in the metadata the
                   config with the recipe, that is, how a student was trained

Other prefixes and other nesting (ComfyUI's, FSDP's, ...) are found by the names inside. All are
brought to Wan's names (names.py). Files are read by tensors.py, and nothing is downloaded.

    python -m lib.weights --weights out/dmd --to diffusers --out transformer
    python -m lib.weights --weights toy/weights --merge_lora style.safetensors --out new.safetensors
"""

import json
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import lora
from lib.common import UserError, atomic, check_out, run
from lib.foreign import refuse_names, refuse_pair
from lib.names import OURS, diffusers_config, dit_of, names_of_dit, rename, umt5_of, vae_of
from lib.tensors import PICKLES, listed, read_json, read_tensors, write_safetensors

SUFFIXES = (".safetensors", *PICKLES)


# ---------------------------------------------------------------- folders
FILES = {  # what: its names in a folder, the first that is there; where it comes from
    "transformer": (
        "student.safetensors diffusion_pytorch_model.safetensors.index.json"
        " diffusion_pytorch_model.safetensors transformer"
        " diffusion_pytorch_model*.index*.json diffusion_pytorch_model*.safetensors"  # .fp16, .bf16
        " diffusion_pytorch_model*.bin *.pt *.safetensors *.gguf",
        "Wan's comes with Wan2.1-T2V-1.3B or -14B; a student may be the folder's only .pt file",
    ),
    "VAE": (
        "vae.safetensors Wan2.1_VAE.pth vae *[Vv][Aa][Ee]*.safetensors",
        "Wan2.1_VAE.pth comes with Wan2.1-T2V-1.3B; copy or link it there",
    ),
    "text encoder": (
        "models_t5_umt5-xxl-enc-bf16.pth text_encoder",
        "it comes with Wan2.1-T2V-1.3B; or give embeddings made where it is, by text.py",
    ),
    "tokenizer": (
        "google/umt5-xxl/tokenizer.json tokenizer/tokenizer.json",
        "it comes with Wan2.1-T2V-1.3B, as the folder google/umt5-xxl",
    ),
}
# what is no transformer in any folder
OTHER = re.compile(r"(?i)state(-\d+)?\.pt$|vae|umt5|text_enc")


def _is_folder(path: Path) -> bool:
    """Whether a folder is there, or would be if it existed."""
    return not path.is_file() and path.suffix not in SUFFIXES


def find(folder: str | Path, what: str) -> Path:
    """Where a folder keeps its transformer, VAE, text encoder or tokenizer.

    raises: UserError with the names that were looked for and where the file comes from"""
    folder, (patterns, origin) = Path(folder).expanduser(), FILES[what]
    names = " or ".join(name for name in patterns.split() if "*" not in name)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; it should be one with a {what} ({names}): {origin}"
        )
    if what == "transformer":
        refuse_pair(folder)
    for pattern in patterns.split():
        found = listed(folder, pattern)
        if what == "transformer":
            found = [p for p in found if not OTHER.search(p.name)]
        if len(found) > 1:
            raise UserError(
                f"{folder} holds several {what}s ({', '.join(p.name for p in found)}); name the one"
                " that is meant, or put the index of these shards beside them"
            )
        if found:
            return found[0]
    raise UserError(f"{folder} holds no {what} ({names}): {origin}")


# ---------------------------------------------------------------- one network in a file
WRAPPERS = r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."  # of training
BEFORE = r"((?:[^.]+\.)*?)"  # a prefix, whatever it is, before a name that tells a network
TELLING = {
    "transformer": re.compile(BEFORE + r"blocks\.\d+\.(?:self_attn\.q|attn1\.to_q)\."),
    "VAE": re.compile(BEFORE + r"encoder\.conv(?:1|_in)\."),
}
EXAMPLE = {"transformer": "blocks.0.self_attn.q.weight", "VAE": "encoder.conv1.weight"}
PREFERRED = (  # of several networks in a file those that fit, if any do, one rule after the other
    r"^(?!.*(critic|fake|real|teacher|discriminator))",
    r"(?i)(?<![a-z])ema|ema(?![a-z])|averag|shadow",
    r"generator|student",
    r"model|state_dict",
)


def network_in(tree: dict, what: str, source: object) -> dict[str, Tensor]:
    """The tensors of the transformer or VAE in a file, however nested and prefixed, by their names.

    raises: UserError if there is none, or several and none to prefer, or it is another kind"""
    found = networks_in(tree, what)
    every = [k for _, tensors in dicts_of_tensors(tree) for k in tensors]
    if not found:
        refuse_names(source, every, what)
        raise UserError(
            f"{source} is not a Wan {what} (it has {len(tree)} entries, the first is"
            f" {next(iter(tree), 'absent')!r}); expected names like {EXAMPLE[what]}"
        )
    tensors = found[preferred(found, source)]
    refuse_names(source, tensors, what)
    others = len(every) - len(tensors)
    if len(found) == 1 and others:
        print(f"note: {source} holds {others} tensors besides, which stay unused")
    return tensors


def preferred(found: Iterable[str], source: object) -> str:
    """Which of several networks in a file is meant, by their names. raises: UserError"""
    chosen = list(found)
    for rule in PREFERRED:
        chosen = [k for k in chosen if re.search(rule, k)] or chosen
    if len(chosen) > 1:
        shown = ", ".join(map(repr, chosen))
        raise UserError(f"{source} holds several networks ({shown}); save the one that is meant")
    if len(list(found)) > 1:
        print(f"note: of {', '.join(found)} in {source} it is {chosen[0]} that is used")
    return chosen[0]


def networks_in(tree: dict, what: str) -> dict[str, dict[str, Tensor]]:
    """All transformers, or VAEs, in a file: the path and prefix of each -> its tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for where, tensors in dicts_of_tensors(tree):
        names = {re.sub(WRAPPERS, "", k): v for k, v in tensors.items()}
        prefixes = {match[1] for match in map(TELLING[what].match, names) if match}
        for k, v in names.items():
            mine = max((p for p in prefixes if k.startswith(p)), key=len, default=None)
            if mine is not None:
                found.setdefault(where + mine, {})[k.removeprefix(mine)] = v
    return found


def dicts_of_tensors(tree: dict, where: str = "") -> list[tuple[str, dict[str, Tensor]]]:
    """All dicts within dicts that hold tensors, and the path to each: "generator.", ..."""
    tensors, inner = {}, []
    for key, value in tree.items():
        if isinstance(value, dict):
            inner += dicts_of_tensors(value, f"{where}{key}.")
        elif isinstance(value, Tensor):
            tensors[str(key)] = value
        elif isinstance(value, Real) and lora.split(str(key))[1] == "alpha":
            tensors[str(key)] = torch.tensor(float(value))  # a LoRA's may be a plain number
    return [(where, tensors)] * bool(tensors) + inner


# ---------------------------------------------------------------- into a network
def load_strict(
    model: nn.Module,
    tensors: dict[str, Tensor],
    source: object,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    new: tuple[str, ...] = (),
) -> nn.Module:
    """Put `tensors` into `model` (built on the meta device), one at a time cast to `dtype` and
    taken out of the dict; no second copy is made.

    new: parameters whose names begin so may be missing; they start as zeros, and it is said
    raises: UserError that names missing, unexpected and wrongly shaped keys in one sentence, or
        the first tensor that holds integers, NaN or infinity (a sum, one more pass over memory)"""
    want = model.state_dict()
    fresh = [k for k in want if k.startswith(new) and k not in tensors] if new else []
    known = [k for k in want if k not in fresh]
    wrong = [
        f"{k} is {tuple(getattr(tensors[k], 'shape', ()))} but should be {tuple(want[k].shape)}"
        for k in known
        if k in tensors and getattr(tensors[k], "shape", None) != want[k].shape
    ]
    check_names(known, tensors, f"{source} does not fit {type(model).__name__}", wrong)
    if fresh:
        print(f"note: {source} has no {', '.join(fresh)}: new, and zero at first")
    cast = {}
    for k in known:
        x = tensors.pop(k)
        if not x.is_floating_point():
            kind = f"{x.dtype}, quantised"
            raise UserError(f"{source}: the weights {k} are {kind}; use the bf16 file")
        cast[k] = x.to(device=device, dtype=dtype or x.dtype)
    for k in fresh:
        cast[k] = torch.zeros(want[k].shape, dtype=dtype or torch.float32, device=device)
    sums = torch.stack([x.sum(dtype=torch.float32) for x in cast.values()])
    for k, is_good in zip(cast, sums.isfinite().tolist()):
        if not is_good:
            raise UserError(f"{source}: the weights {k} hold NaN or infinity; copy the file again")
    model.load_state_dict(cast, assign=True)
    return model.eval().requires_grad_(False)


def check_names(
    want: Iterable[str], have: Iterable[str], what: str, wrong: Iterable[str] = ()
) -> None:
    """raises: UserError with names that are missing, unexpected, or of wrong shape"""
    want, have = dict.fromkeys(want), dict.fromkeys(have)
    problems = {
        "missing": [k for k in want if k not in have],
        "unexpected": [k for k in have if k not in want],
        "wrong shape": list(wrong),
    }
    shown = [
        f"{label} {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for label, names in problems.items()
        if names
    ]
    if shown:
        raise UserError(f"{what}: " + "; ".join(shown))


# of sizes in a config, which may be a stranger's; all others: 2**18 [ours]
MOST = {"num_layers": 512, "patch_size": 64, "dim_mult": 64, "num_res_blocks": 16}


def check_sizes(config: object, what: str) -> None:
    """Each field of a network's config is of its type; sizes are from 1, and not absurd.

    raises: UserError naming the first that is not, before anything is built from it"""
    for name, kind in typing.get_type_hints(type(config)).items():
        value, most = getattr(config, name), MOST.get(name, 2**18)
        is_tuple = typing.get_origin(kind) is tuple
        one = typing.get_args(kind)[0] if is_tuple else kind
        some, types = value if is_tuple else (value,), (int, float) if one is float else (one,)
        good = isinstance(some, tuple) and all(type(x) in types for x in some)
        if one is int:
            good = good and 1 <= len(some) <= 8 and all(1 <= x <= most for x in some)
        if not good:
            must = f"from 1 to {most}" if one is int else f"of type {kind.__name__}"
            raise UserError(f"the {what} config's {name} is {str(value)[:60]}; it must be {must}")


def config_from(cls: type, values: dict, source: object):
    """Make the config dataclass `cls` from JSON values; names that start with _ are ignored.

    raises: UserError naming an unknown field or a bad value"""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k[:1] != "_"}
    names = typing.get_type_hints(cls)
    if strange := sorted(given.keys() - names.keys()):
        raise UserError(
            f"{source}: the config has an unknown field {strange[0]!r};"
            f" {cls.__name__} has {', '.join(names)}"
        )
    try:
        return cls(**given)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


# ---------------------------------------------------------------- the three networks
def read_dit(path: str | Path) -> tuple[dict, dict[str, Tensor], Path]:
    """A transformer in any of the layouts above.

    returns: the values of its DiTConfig, and under "recipe" how it was trained if it says so;
        memory-mapped tensors under Wan's names; the path that was read.  raises: UserError"""
    path = Path(path).expanduser()
    path = find(path, "transformer") if _is_folder(path) else path
    refuse_pair(path)
    tree, config = read_tensors(path)
    inside = tree.get("config")
    configs = [inside if isinstance(inside, dict) else {}, config or {}]
    values, tensors = dit_of(network_in(tree, "transformer", path), configs, path)
    return values, tensors, path


def read_vae(path: str | Path) -> tuple[dict, dict[str, Tensor], Path]:
    """A VAE as `Wan2.1_VAE.pth`, a native file, a diffusers `vae/` folder, or a folder with one.

    returns: the values of its VAEConfig (none: Wan2.1's), tensors under Wan's names, and the path
        that was read.  raises: UserError"""
    path = Path(path).expanduser()
    if _is_folder(path):
        beside = path / "config.json"
        if not (beside.is_file() and "base_dim" in read_json(beside)):
            path = find(path, "VAE")  # else it is the vae/ folder itself
    tree, config = read_tensors(path)
    values, tensors = vae_of(network_in(tree, "VAE", path), config or {})
    return values, tensors, path


def read_umt5(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """UMT5's encoder from Wan's .pth or a Hugging Face `text_encoder/` folder (`names.umt5_of`)."""
    return umt5_of(read_tensors(path)[0], path)


# ---------------------------------------------------------------- out again
SUFFIX_OF = {"native": ".safetensors", "self-forcing": ".pt", "diffusers": ""}


def write_dit(
    tensors: dict[str, Tensor], values: dict, path: str | Path, to: str = "native"
) -> None:
    """Write a transformer, under Wan's names and with the values of `read_dit`, in a layout.

    native: a .safetensors file that ComfyUI reads, too
    diffusers: a folder for `WanTransformer3DModel.from_pretrained`
    self-forcing: a .pt with the same tensors as `generator` and `generator_ema`
    raises: UserError"""
    path = Path(path)
    values = {k: v for k, v in values.items() if v is not None}
    if to not in SUFFIX_OF:
        raise UserError(f"unknown format {to!r}; use {', '.join(SUFFIX_OF)}")
    if to != "diffusers" and path.suffix != SUFFIX_OF[to]:
        raise UserError(f"{path} must be a file that ends in {SUFFIX_OF[to]}, for the format {to}")
    if to == "native":
        write_safetensors(path, tensors, values)
    elif to == "diffusers":
        write_diffusers(tensors, values, path)
    else:
        named = {"model." + k: v.detach().cpu().clone() for k, v in tensors.items()}
        with atomic(path) as tmp:
            torch.save({"generator": named, "generator_ema": named, "config": values}, tmp)
        print(f"note: sizes and recipe stand in {path} as `config`; Self-Forcing does not read it")


def write_diffusers(tensors: dict[str, Tensor], values: dict, folder: Path) -> None:
    """A folder as diffusers has it: the weights under its names, and config.json."""
    file = folder / "diffusion_pytorch_model.safetensors"
    if folder.suffix in SUFFIXES or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} must be a folder, for the format diffusers")
    older = [p.name for p in listed(folder, "*.index.json") + listed(folder, "*.safetensors")]
    if set(older) - {file.name}:
        raise UserError(f"{folder} holds {', '.join(older)}, which would be read in its place")
    write_safetensors(file, {rename(k, True): v for k, v in tensors.items()})
    config = diffusers_config(values)
    with atomic(folder / "config.json") as tmp:
        tmp.write_text(json.dumps(config, indent=1))
    if config[OURS] != {"text_len": 512}:
        fields = " and ".join(config[OURS])
        print(
            f"note: diffusers has no field for {fields}: they stand in config.json as"
            f" {OURS}, which only this project reads; diffusers' pipelines pad the text to 512"
        )


def merge_lora(tensors: dict[str, Tensor], path: str | Path, scale: float) -> dict[str, Tensor]:
    """The transformer's weights with a LoRA added. raises: UserError"""
    path = Path(path)
    dicts = dicts_of_tensors(read_tensors(path)[0])
    found = {where: x for where, x in dicts if any(lora.split(k)[1] for k in x)}
    if not found:
        raise UserError(f"{path} holds no LoRA; expected names like ....lora_A.weight")
    changes = {re.sub(WRAPPERS, "", k): v for k, v in found[preferred(found, path)].items()}
    names = {k: k for k in tensors} | {rename(k, to_diffusers=True): k for k in tensors}
    merged, count = lora.merge(tensors, names, changes, scale, lora.settings(path))
    print(f"{path}: {count} of {len(tensors)} weights changed, by {scale:g} times the LoRA")
    return merged


# ---------------------------------------------------------------- command line
@dataclass
class Config:
    """Bring a transformer from any layout that is read here to another, or merge a LoRA into it."""

    weights: str  # a checkpoint, or a folder with one
    out: str  # native: a .safetensors file; self-forcing: a .pt file; diffusers: a folder
    to: str = "native"  # native (Wan's names, which ComfyUI reads), diffusers or self-forcing
    merge_lora: str = ""  # a LoRA's file: kohya's, diffusers' and peft's names, Wan's .diff
    scale: float = 1.0  # how much of the LoRA is added; its own alpha comes on top


def main(config: Config) -> None:
    values, tensors, source = read_dit(config.weights)
    read = [source, config.merge_lora or source]
    check_out(config.out, folder=config.to == "diffusers", inputs=read)
    names = names_of_dit(values["num_layers"])
    check_names(names, tensors, f"{source} is not a whole Wan transformer")
    if config.merge_lora:
        tensors = merge_lora(tensors, config.merge_lora, config.scale)
    elif config.scale != 1.0:
        raise UserError(f"--scale {config.scale:g} is for a LoRA; name it with --merge_lora")
    write_dit(tensors, values, config.out, config.to)
    print(f"{source} -> {config.out}, {sum(x.numel() for x in tensors.values()):,} parameters")


if __name__ == "__main__":
    run(main, Config)
