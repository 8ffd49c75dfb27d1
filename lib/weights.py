"""Checkpoints: which files people have, and what the names in them mean. No model is built here.

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
brought to Wan's names, which are the parameters' names in dit.py and vae.py. Nothing is downloaded.

    python -m lib.weights --weights out/dmd --to diffusers --out transformer
    python -m lib.weights --weights toy/weights --merge_lora style.safetensors --out new.safetensors
"""

import hashlib
import json
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lib import lora
from lib.common import UserError, atomic, check_out, read_pickle, run
from lib.foreign import refuse_file, refuse_names, refuse_pair

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
SUMS = r"(sha-?256(sums?)?|checksums?|md5sums?)(\.(txt|sha256))?"  # names of files of hashes
IN_FOLDER = (  # what may be the one checkpoint in a folder; a variant (.fp16) only if it is alone
    "*.index.json",
    "*.index.*.json",
    "diffusion_pytorch_model.safetensors model.safetensors",
    "*.safetensors",
    " ".join("*" + suffix for suffix in PICKLES),
)


# ---------------------------------------------------------------- files
def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], config: dict | None = None
) -> None:
    """Write tensors and, as JSON under the metadata key `config`, a plain dict; atomically."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    metadata = None if config is None else {"config": json.dumps(config)}
    with atomic(path) as tmp:
        try:
            save_file(tensors, str(tmp), metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None


def listed(folder: Path, pattern: str) -> list[Path]:
    """Files by a pattern, sorted; hidden ones (._x of a Mac, .x.tmp of a killed run) are none."""
    return sorted(p for p in folder.glob(pattern) if not p.name.startswith("."))


def read_tensors(path: str | Path) -> tuple[dict, dict | None]:
    """Read a checkpoint: a .safetensors or .pt file, or a folder with one (or shards, an index).

    Tensors stay memory-mapped until they are used; those of safetensors have a mapping each, so
    that the memory of the file's pages goes with the tensor. What a pickle holds comes as it is.
    returns: (tensors, config), where config comes from the metadata key `config`, else from
        config.json beside the file, else None
    raises: UserError naming the file when it is missing, truncated, no checkpoint, an unsafe
        pickle, or not the one that a SHA256SUMS beside it means"""
    path = Path(path).expanduser()
    if path.is_dir():
        path = only_checkpoint(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    verify(path)
    beside = path.parent / "config.json"
    config = read_json(beside) if beside.is_file() else None
    if re.search(r"\.index(\.\w+)?\.json$", path.name):
        return read_shards(path), config
    refuse_file(path)
    with open(path, "rb") as f:
        head = f.read(9)
    if path.suffix != ".safetensors" and head[8:] != b"{":  # a length of eight bytes, then JSON
        return read_pickle(path), config
    tensors, inside = read_safetensors(path)
    return tensors, config if inside is None else inside


def only_checkpoint(folder: Path) -> Path:
    """The one checkpoint in a folder. raises: UserError where there are none, or several"""
    found = []
    for patterns in IN_FOLDER:
        found = found or [p for pattern in patterns.split() for p in listed(folder, pattern)]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise UserError(
            f"{folder} holds {len(found)} checkpoints ({names}); name one .safetensors or .pt file"
        )
    return found[0]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Tensors, each of a mapping of its own, and the metadata's config. raises: UserError"""
    try:
        with safe_open(str(path), "pt") as f:
            metadata, names = f.metadata() or {}, list(f.keys())
        tensors = {name: safe_open(str(path), "pt").get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again, or"
            " name it .pt if torch.save wrote it"
        ) from None
    config = metadata.get("config")
    return tensors, None if config is None else json_object(config, f"{path}: the config")


def read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of the files that an index names. raises: UserError naming those not there"""
    names = read_json(index).get("weight_map")
    shards = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    absent = [x for x in shards if x.endswith(".json") or not (index.parent / x).is_file()]
    if absent or not shards:
        raise UserError(
            f"{index.name} names shards that are missing in {index.parent}:"
            f" {', '.join(absent) or 'none at all'}"
        )
    tensors = {}
    for name in shards:
        tensors.update(read_tensors(index.parent / name)[0])
    return tensors


def verify(path: Path) -> None:
    """Compare a file with the hashes beside it (SHA256SUMS), and say so if none is of it.

    raises: UserError if it is not the file meant there"""
    own = rf"({re.escape(path.name)}|{re.escape(path.stem)})\.(sha256|md5)(sums?)?(\.txt)?"
    beside = [p for p in listed(path.parent, "*") if re.fullmatch(f"(?i){SUMS}|{own}", p.name)]
    for sums in beside:
        if meant := hash_in(sums, path):
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != meant:
                    raise UserError(
                        f"{path} is not the file that {sums} names (its hash differs);"
                        " copy it again, or correct that line"
                    )
            return
    if beside:
        print(f"note: {beside[0]} has no SHA-256 of {path.name}, which is used unverified")


def hash_in(sums: Path, path: Path) -> str | None:
    """What a file of hashes says of a file, by its name wherever it lay."""
    text = sums.read_text(encoding="utf-8-sig", errors="replace")
    if len(text.split()) == 1:  # the hash alone
        text = f"{text.strip()}  {path.name}"
    pairs = re.findall(r'(?mi)^\s*\\?(?:sha256:)?([\da-f]{64})[ \t]+[*"]*([^"\r\n]+)', text)
    pairs += [pair[::-1] for pair in re.findall(r"(?m)^SHA256 ?\((.+)\) ?= (\w{64})", text)]  # BSD
    digests = {name.strip().replace("\\", "/"): digest.lower() for digest, name in pairs}
    here = {name: digest for name, digest in digests.items() if Path(name).name == path.name}
    return here.get(path.name) or here.get(f"./{path.name}") or next(iter(here.values()), None)


def read_json(path: Path) -> dict:
    """A JSON object. raises: UserError"""
    return json_object(path.read_bytes(), path)


def json_object(text: str | bytes, source: object) -> dict:
    """raises: UserError if a text is no JSON, or something else in JSON"""
    try:
        value = json.loads(text)
    except ValueError as error:  # no UTF-8, or no JSON
        raise UserError(f"{source} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{source} holds a JSON {type(value).__name__}, not an object")
    return value


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
            raise UserError(
                f"{source}: the weights {k} are {x.dtype}, quantised; use the bf16 file"
            )
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
OTHER = re.compile(
    r"(?i)state(-\d+)?\.pt$|vae|umt5|text_enc"
)  # what is no transformer in any folder


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
    if len(found) == 1 and len(tensors) < len(every):
        print(
            f"note: {source} holds {len(every) - len(tensors)} tensors besides, which stay unused"
        )
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
    """All dicts within dicts that hold tensors, and the path to each: "generator.", ...

    A LoRA's alpha may be a plain number."""
    tensors = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)}
    for k, v in tree.items():
        if isinstance(v, Real) and lora.split(str(k))[1] == "alpha":
            tensors[str(k)] = torch.tensor(float(v))
    found = [(where, tensors)] if tensors else []
    for k, v in tree.items():
        if isinstance(v, dict):
            found += dicts_of_tensors(v, f"{where}{k}.")
    return found


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
    """The fields of DiTConfig that the tensors' shapes tell: all but heads, text_len and eps."""
    try:
        dim, in_dim, *patch = tensors["patch_embedding.weight"].shape
        return {
            "dim": dim,
            "ffn_dim": tensors["blocks.0.ffn.0.weight"].shape[0],
            "num_layers": 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks.")),
            "freq_dim": tensors["time_embedding.0.weight"].shape[1],
            "text_dim": tensors["text_embedding.0.weight"].shape[1],
            "in_dim": in_dim,
            "out_dim": tensors["head.head.weight"].shape[0] // (patch[1] * patch[2]),
            "patch_size": tuple(patch),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{source} is not a whole Wan transformer: {error} is missing or of another shape;"
            f" the first of its {len(tensors)} names is {next(iter(tensors), 'absent')!r}"
        ) from None


def read_dit(path: str | Path) -> tuple[dict, dict[str, Tensor], Path]:
    """A transformer in any of the layouts above.

    returns: the values of its DiTConfig, and under "recipe" how it was trained if it says so;
        memory-mapped tensors under Wan's names; the path that was read.  raises: UserError"""
    path = Path(path).expanduser()
    path = find(path, "transformer") if _is_folder(path) else path
    refuse_pair(path)
    tree, config = read_tensors(path)
    tensors = network_in(tree, "transformer", path)
    if any(k.startswith("condition_embedder.") for k in tensors):
        tensors = {rename(k, to_diffusers=False): v for k, v in tensors.items()}
    inside = tree.get("config")
    values = understood(inside if isinstance(inside, dict) else {}, path)
    values = values or understood(config or {}, path)
    sizes = sizes_of_dit(tensors, path)
    if sizes["text_dim"] == 4096 and (sizes["in_dim"], sizes["out_dim"]) in OTHERS:
        what = OTHERS[sizes["in_dim"], sizes["out_dim"]]
        raise UserError(f"{path} is {what}; use Wan2.1-T2V-1.3B or -14B")
    made, there = sizes["out_dim"], sizes["in_dim"]
    if made != there:
        raise UserError(f"{path} makes {made} channels of {there}: that is no velocity")
    if not {"num_heads", "text_len"} <= values.keys():
        if sizes["dim"] not in HEADS or sizes["text_dim"] != 4096:
            raise UserError(
                f"{path} has no config, and num_heads and text_len of a transformer of width"
                f" {sizes['dim']} for text of width {sizes['text_dim']} cannot be told from its"
                " tensors (Wan's have 1536 or 5120, and 4096); put a config.json beside it that"
                " says dim, num_heads and text_len"
            )
        sizes |= {"num_heads": HEADS[sizes["dim"]], "text_len": 512}
    values = sizes | values
    return {k: values[k] for k in FIELDS if k in values} | values, tensors, path


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
    ours = {k: values[k] for k in ("text_len", "recipe") if k in values}
    config = {theirs: values[ours] for theirs, ours in DIFFUSERS_DIT.items()} | {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": values["dim"] // values["num_heads"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        OURS: ours,
    }
    write_safetensors(file, {rename(k, True): v for k, v in tensors.items()})
    with atomic(folder / "config.json") as tmp:
        tmp.write_text(json.dumps(config, indent=1))
    if ours != {"text_len": 512}:
        print(
            f"note: diffusers has no field for {' and '.join(ours)}: they stand in config.json as"
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
    tensors, values = network_in(tree, "VAE", path), config or {}
    if any(k.startswith("encoder.conv_in") for k in tensors):  # diffusers' names
        values = {DIFFUSERS_VAE[k]: v for k, v in values.items() if k in DIFFUSERS_VAE}
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


def _umt5_name(key: str) -> str:
    block, name = re.match(r"(?:blocks\.(\d+)\.)?(.*?)(?:\.weight)?$", key).groups()
    if block and name in UMT5_BLOCK:
        return f"encoder.block.{block}.layer.{UMT5_BLOCK[name]}.weight"
    return f"{UMT5_OUTER[name]}.weight" if name in UMT5_OUTER else key


def read_umt5(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """UMT5's encoder from Wan's .pth or a Hugging Face `text_encoder/` folder.

    returns: the sizes that `transformers.UMT5Config` wants, and tensors under transformers' names
    raises: UserError"""
    tensors = {_umt5_name(k): v for k, v in read_tensors(path)[0].items()}
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
            f"{path} is not the encoder of UMT5: expected names like blocks.0.attn.q.weight"
            f" or {layer}0.SelfAttention.q.weight"
        ) from None


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
