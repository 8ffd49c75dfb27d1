"""Prompts become tensors here and nowhere else.

Two languages, told apart by the width that the model reads:

    64      the toy world's few dozen words (`toy/world.py`): each is a fixed random vector plus a fixed random vector for
            its place in the sentence, since attention has no order of its own. Nothing is learned, so every checkpoint of
            the toy world reads the same language.
    4096    Wan's: UMT5-XXL's encoder, 11 GB, through the optional packages transformers and ftfy. Prompts are cleaned, cut
            to 512 tokens and embedded; rows beyond the true length are zero, and the transformer sees them, too [Wan].

Nobody wants the encoder in memory while training, so embeddings are made once, by the command below, and every --prompts
takes the resulting file in place of a text file. It may be stopped and run again: whole shards stay.

    python text.py prompts.txt --out prompts.safetensors --weights Wan2.1-T2V-1.3B
"""

import hashlib
import html
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lib.common import Stream, UserError, generator, run, start
from lib.weights import find, load_strict, read_tensors, read_umt5, write_safetensors
from lib.world import TOY_DIM
from toy.world import HELD_OUT, KNOWN, VOCABULARY  # noqa: F401
from toy.world import caption as toy_caption

TOY_LEN = 12  # [ours] words in a toy prompt
WAN_LEN = 512  # [Wan] tokens
NEGATIVE = (  # [Wan] its negative prompt, which the teacher's unconditional pass needs, to the letter
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
Rows = Callable[[str], Tensor]  # a prompt -> its embedding [L, width] without padding


# ---------------------------------------------------------------- the toy world's words
@cache
def toy_vector(what: str | int) -> Tensor:
    """The fixed random vector [TOY_DIM] of a word, by its hash, or of a place in the sentence."""
    number = (
        what
        if isinstance(what, int)
        else int.from_bytes(hashlib.sha256(what.encode()).digest()[:4]) | 1 << 31
    )
    return torch.randn(TOY_DIM, generator=generator(0, Stream.WORD, number))


def toy_words(text_len: int = TOY_LEN) -> Rows:
    """Embed in the toy vocabulary; "" has no rows. raises: UserError naming an unknown word, or a prompt that is too long."""

    def rows(prompt: str) -> Tensor:
        words = prompt.lower().replace(",", " ").replace(".", " ").split()
        unknown = [w for w in words if w not in VOCABULARY]
        if unknown:
            raise UserError(
                f"the toy world does not know the word {unknown[0][:80]!r} in {prompt[:80]!r}; "
                f"it knows {' '.join(VOCABULARY)}"
            )
        if len(words) > text_len:
            raise UserError(
                f"the prompt {prompt[:80]!r} has {len(words)} words; this model reads at most {text_len}"
            )
        return (
            torch.stack([toy_vector(word) + toy_vector(place) for place, word in enumerate(words)])
            if words
            else torch.zeros(0, TOY_DIM)
        )

    return rows


# ---------------------------------------------------------------- UMT5-XXL
def optional(package: str):
    """A package that is not among the five. raises: UserError saying how to have it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"the text encoder of Wan needs the package {package}: pip install transformers ftfy; or give embeddings that "
            "text.py made where it is"
        ) from None


def clean(prompt: str) -> str:
    """As Wan does: broken Unicode mended and full-width punctuation made plain (where ftfy is installed), HTML entities read,
    white space collapsed."""
    if importlib.util.find_spec("ftfy"):
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


def umt5(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    text_len: int = WAN_LEN,
) -> Rows:
    """Load the text encoder and its tokenizer from a folder (see `weights.py`) and embed with them.

    A prompt runs at its own length, which equals Wan's run at 512 with the padding masked. What is longer is cut, with a
    note. raises: UserError naming a file or package that is missing."""
    words, source = find(folder, "tokenizer"), find(folder, "text encoder")
    transformers, tokenizers = optional("transformers"), optional("tokenizers")
    if not importlib.util.find_spec("ftfy"):
        print(
            "note: ftfy is not installed, so that full-width punctuation (Wan's negative prompt has it) is embedded as it stands, "
            "unlike in Wan's own code; pip install ftfy"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(words))
    except Exception as error:  # the package has no exception of its own
        raise UserError(
            f"{words} is not a tokenizer ({error}); copy or download it again"
        ) from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(text_len)
    sizes, tensors = read_umt5(source)
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    load_strict(model, tensors, source, dtype, device)
    model.encoder.embed_tokens = model.shared  # one table, which the file may have twice

    @torch.no_grad()
    def rows(prompt: str) -> Tensor:
        tokens = tokenizer.encode(clean(prompt))
        if tokens.overflowing:
            print(
                f"note: the prompt {prompt[:60]!r}... is longer than {text_len} tokens; the rest is cut, as Wan does"
            )
        return model(input_ids=torch.tensor([tokens.ids], device=device)).last_hidden_state[0]

    return rows


# ---------------------------------------------------------------- lists of prompts
def lines_of(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line, or of embeddings that were made from one. raises: UserError"""
    if Path(path).suffix == ".safetensors":
        return [prompt for prompt, _, listed in read_embeddings(path) if listed]
    try:
        text = Path(path).read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, a prompt a line") from None
    if not text:
        raise UserError(f"{path} holds no prompts; write one a line")
    lines = [line.strip() for line in text.split("\n")]
    if "" in lines:
        raise UserError(
            f"{path}: line {lines.index('') + 1} is empty; write a prompt there or delete the line"
        )
    return lines


def read_embeddings(path: str | Path) -> list[tuple[str, Tensor, bool]]:
    """What `main` wrote: prompts, each with its memory-mapped rows [L, width], and whether it is one of the list (the negative
    and the empty prompt, which come first, are not)."""
    path, found = Path(path), []
    names = (read_tensors(path)[1] or {}).get("shards", [])
    for file in (
        path,
        *(path.parent / str(name) for name in (names if isinstance(names, list) else [])),
    ):
        tensors, made = read_tensors(file)
        rows, lengths, prompts = (
            tensors.get("rows"),
            tensors.get("lengths"),
            (made or {}).get("prompts"),
        )
        if (
            rows is None
            or lengths is None
            or not isinstance(prompts, list)
            or rows.ndim != 2
            or lengths.shape != (len(prompts),)
            or (lengths.is_floating_point() or lengths.min() < 0 or lengths.sum() != len(rows))
        ):
            raise UserError(f"{file} does not hold embeddings of prompts; make them with text.py")
        found += [
            (str(prompt), x, file != path)
            for prompt, x in zip(prompts, rows.split(lengths.tolist()))
        ]
    return found


class Prompts:
    """A numbered list of prompts with their embeddings, wherever they come from.

    source: "toy" for the endless captions of the toy world, a text file with a prompt a line, or the .safetensors file
    that text.py made of one."""

    def __init__(self, source: str, text_dim: int, text_len: int) -> None:
        self.source, self.text_dim, self.text_len = source, text_dim, text_len
        self.known = (
            {p: x for p, x, _ in read_embeddings(source)}
            if Path(source).suffix == ".safetensors"
            else {}
        )
        self.lines = None if source == "toy" else lines_of(source)
        widths, longest = (
            {x.shape[1] for x in self.known.values()},
            max(map(len, self.known.values()), default=0),
        )
        if widths - {text_dim} or longest > text_len:
            raise UserError(
                f"{source} holds embeddings {max(widths)} wide and up to {longest} long, but this model reads {text_dim} "
                f"and {text_len}; make them with the encoder of this model"
            )

    def words(self, number: int) -> str:
        return toy_caption(number) if self.lines is None else self.lines[number % len(self.lines)]

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Embeddings [len(numbers), text_len, text_dim]; number n of a file of m lines is line n mod m."""
        return self.embed([self.words(n) for n in numbers])

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of any prompts, of the same shape. raises: UserError for one that a file of embeddings does not hold."""
        if not self.known:
            return embed(prompts, self.text_dim, self.text_len)
        if absent := [p for p in prompts if p not in self.known]:
            raise UserError(
                f"{self.source} has no embedding of {absent[0][:80]!r}; make it with text.py, a negative prompt by --negative"
            )
        return padded([self.known[p] for p in prompts], self.text_dim, self.text_len)


def embed(
    prompts: Sequence[str], text_dim: int, text_len: int, embeddings: str = "", weights: str = ""
) -> Tensor:
    """Embed prompts for a model with this text_dim and text_len.

    embeddings: a file that text.py made;  weights: without it, for Wan, a folder with the text encoder, or a file beside it
    returns: float32 [len(prompts), text_len, text_dim], zero where a prompt is shorter; "" is all zeros in the toy world,
    its unconditional prompt. raises: UserError"""
    if embeddings:
        return Prompts(embeddings, text_dim, text_len).embed(prompts)
    if text_dim == TOY_DIM:
        rows = toy_words(text_len)
    elif weights:
        rows = umt5(Path(weights).parent if Path(weights).is_file() else weights, text_len=text_len)
    else:
        raise UserError(
            f"this model reads embeddings of width {text_dim}, not the toy world's words: make them once with "
            "python text.py prompts.txt --out prompts.safetensors, and give --prompts prompts.safetensors"
        )
    return padded([rows(p) for p in prompts], text_dim, text_len)


def padded(rows: Sequence[Tensor], text_dim: int, text_len: int) -> Tensor:
    """[L, text_dim] each -> float32 [len(rows), text_len, text_dim], zero beyond L. raises: UserError for another width."""
    out = torch.zeros(len(rows), text_len, text_dim)
    for x, row in zip(out, rows):
        if row.shape[1] != text_dim:
            raise UserError(
                f"the text encoder's embeddings are {row.shape[1]} wide, but this model reads {text_dim}"
            )
        x[: len(row)] = row
    return out


# ---------------------------------------------------------------- command line
@dataclass
class Config:
    """Embed prompts once, for training and sampling without a text encoder: FILE, or --prompts FILE."""

    FIRST = "prompts"  # the flag that the first word belongs to
    prompts: str  # a UTF-8 text file, a prompt a line
    out: str = "prompts.safetensors"  # shards go beside it, as prompts-000000.safetensors ...
    weights: str = "Wan2.1-T2V-1.3B"  # a folder with the text encoder and its tokenizer; or toy: the toy world's words
    negative: str | None = (
        None  # prompt of unconditional passes; default: Wan's own, nothing for toy
    )
    shard: int = 256  # prompts a file
    device: str = "auto"  # cpu, cuda or auto


def main(config: Config) -> None:
    device, out, toy = start(config.device)[2], Path(config.out), config.weights == "toy"
    lines, negative = lines_of(config.prompts), config.negative
    if out.suffix != ".safetensors" or config.shard < 1:
        raise UserError(
            f"--out {out} must end in .safetensors, and --shard {config.shard} must be at least 1"
        )
    if negative is None:
        negative = "" if toy else NEGATIVE
    rows = toy_words() if toy else umt5(config.weights, device=device)
    made = {
        "encoder": Path(config.weights).name,
        "ftfy": importlib.util.find_spec("ftfy") is not None,
    }

    def write(path: Path, prompts: list[str], bar: tqdm, **more: list[str]) -> None:
        embedded = []
        for prompt in prompts:
            embedded.append(rows(prompt).bfloat16().cpu())
            bar.update()
        write_safetensors(
            path,
            {"rows": torch.cat(embedded), "lengths": torch.tensor([len(x) for x in embedded])},
            made | {"prompts": prompts} | more,
        )

    def there(path: Path, prompts: list[str]) -> bool:
        return path.exists() and read_tensors(path)[1] == made | {"prompts": prompts}

    parts = {
        out.with_name(f"{out.stem}-{n:06d}.safetensors"): lines[n : n + config.shard]
        for n in range(0, len(lines), config.shard)
    }
    todo = {path: prompts for path, prompts in parts.items() if not there(path, prompts)}
    print(f"{len(lines)} prompts in {len(parts)} shards, {len(todo)} to make")
    if todo:
        out.unlink(missing_ok=True)  # written last: where it is, all shards are
    others = list(dict.fromkeys((negative, "")))
    with tqdm(total=len(others) + sum(map(len, todo.values())), desc="embed", unit="prompt") as bar:
        for path, prompts in todo.items():
            write(path, prompts, bar)
        write(out, others, bar, shards=[path.name for path in parts])
    print(f"wrote {out}; give it as --prompts")


if __name__ == "__main__":
    run(main, Config)
