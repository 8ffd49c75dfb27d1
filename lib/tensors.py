"""Files of tensors: read whatever container people have, written whole, compared with hashes.

    .safetensors    memory-mapped, one mapping a tensor; our config is in its metadata
    .pt .pth .bin   pickles, as tensors and plain values alone (`lib/common.py:read_pickle`)
    a folder        with one of these, or shards and their index

What the names inside mean is in names.py, which network they are is in weights.py.
"""

import hashlib
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.common import UserError, atomic, read_pickle
from lib.foreign import refuse_file

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUMS = r"(sha-?256(sums?)?|checksums?|md5sums?)(\.(txt|sha256))?"  # names of files of hashes
IN_FOLDER = (  # what may be the one checkpoint in a folder; a variant (.fp16) only if it is alone
    "*.index.json",
    "*.index.*.json",
    "diffusion_pytorch_model.safetensors model.safetensors",
    "*.safetensors",
    " ".join("*" + suffix for suffix in PICKLES),
)


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
