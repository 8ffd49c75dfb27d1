"""Prompts become tensors here and nowhere else.

Two languages, told apart by the width that the model reads:

    64      toy words: each is a fixed random vector, by its hash, plus a fixed random vector for
            its place in the sentence, since attention has no order of its own. Nothing is learned
            and any word has a vector: every small model reads the same language.
    4096    Wan's: UMT5-XXL's encoder, 11 GB, through the optional packages transformers and ftfy.
            Prompts are cleaned, cut to 512 tokens and embedded; rows beyond the true length are
            zero, and the transformer sees them, too [Wan].

Nobody wants the encoder in memory while training, so embeddings are made once, by the command
below, and every --prompts takes the resulting file in place of a text file.

    python -m lib.text prompts.txt --out prompts.safetensors --weights Wan2.1-T2V-1.3B
"""

import hashlib
import html
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from tqdm import tqdm

from lib.common import (
    Stream,
    UserError,
    check_out,
    end_stopped,
    fingerprint,
    generator,
    run,
    say,
    start,
    stop_signals,
)
from lib.tensors import read_tensors, write_safetensors
from lib.weights import find, load_strict, read_umt5

TOY_DIM, TOY_LEN = 64, 12  # [ours] width of a toy word, words in a toy prompt
WAN_LEN = 512  # [Wan] tokens
# Captions without end are numbered: those below HELD_OUT are for training; from there to KNOWN no
# training sees them; from KNOWN on they are new numbers of captions that training does see.
HELD_OUT, KNOWN = 1 << 30, 1 << 31
WORLDS = {"toy": "toy.world"}  # short names of modules with captions without end
NEGATIVE = (  # [Wan] its negative prompt, to the letter, for the teacher's unconditional pass
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
Rows = Callable[[str], Tensor]  # a prompt -> its embedding [L, width] without padding


# ---------------------------------------------------------------- captions without end, toy words
def world_of(source: str) -> ModuleType | None:
    """The module with captions that a --prompts names, by its short name or its own; None: a file.

    Such a module has `caption(number) -> str` and may have VOCABULARY. raises: UserError"""
    name = WORLDS.get(source, source)
    is_name = all(part.isidentifier() for part in name.split("."))
    if not is_name or Path(source).is_file() or source.endswith((".txt", ".safetensors")):
        return None
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            return None
        raise UserError(f"--prompts {source} needs the package {error.name}") from None
    if not hasattr(module, "caption"):
        raise UserError(
            f"--prompts {source} is a module without caption(number), or a folder; name a text "
            f"file, or one of {', '.join(WORLDS)}"
        )
    return module


@cache
def toy_vector(what: str | int) -> Tensor:
    """The fixed random vector [TOY_DIM] of a word, by its hash, or of a place in the sentence."""
    if isinstance(what, int):
        number = what
    else:
        number = int.from_bytes(hashlib.sha256(what.encode()).digest()[:4]) | 1 << 31
    return torch.randn(TOY_DIM, generator=generator(0, Stream.WORD, number))


def split_words(prompt: str) -> list[str]:
    """A prompt's words as toy models read them: small letters, without commas and full stops."""
    return prompt.lower().replace(",", " ").replace(".", " ").split()


def toy_words(text_len: int = TOY_LEN) -> Rows:
    """Embed word by word; "" has no rows. raises: UserError for a prompt that is too long."""

    def rows(prompt: str) -> Tensor:
        words = split_words(prompt)
        if len(words) > text_len:
            raise UserError(
                f"the prompt {prompt[:80]!r} has {len(words)} words; "
                f"this model reads at most {text_len}"
            )
        vectors = [toy_vector(word) + toy_vector(place) for place, word in enumerate(words)]
        return torch.stack(vectors) if vectors else torch.zeros(0, TOY_DIM)

    return rows


@cache
def _say_once(sentence: str) -> None:
    say(sentence)


def note_new_words(prompts: Iterable[str]) -> None:
    """Say which words the toy world does not have: any word has a vector, but not a meaning."""
    known = {word for source in WORLDS for word in world_of(source).VOCABULARY}
    words = dict.fromkeys(word for prompt in prompts for word in split_words(prompt))
    new = [repr(word[:40]) for word in words if word not in known]
    if new:
        more = f" and {len(new) - 5} more" if len(new) > 5 else ""
        _say_once(
            f"note: this model may never have seen the word{'s' * (len(new) > 1)} "
            f"{', '.join(new[:5])}{more}; the toy world has {' '.join(sorted(known))}"
        )


# ---------------------------------------------------------------- UMT5-XXL
def clean(prompt: str) -> str:
    """As Wan does: Unicode mended and full-width punctuation made plain (where ftfy is installed),
    HTML entities read, white space collapsed."""
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

    A prompt runs at its own length, which equals Wan's run at 512 with the padding masked. What is
    longer is cut, with a note. raises: UserError naming a file or package that is missing."""
    words, source = find(folder, "tokenizer"), find(folder, "text encoder")
    try:
        transformers, tokenizers = map(importlib.import_module, ("transformers", "tokenizers"))
    except ImportError as error:
        raise UserError(
            f"the text encoder of Wan needs the package {error.name}: pip install transformers"
            " ftfy; or give embeddings that text.py made where it is"
        ) from None
    if not importlib.util.find_spec("ftfy"):
        say(
            "note: ftfy is not installed, so full-width punctuation stays, unlike in Wan's own code"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(words))
    except Exception as error:  # the package has no exception of its own
        raise UserError(f"{words} is not a tokenizer ({error}); copy it again") from None
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
            say(f"note: {prompt[:60]!r} is longer than {text_len} tokens; the rest is cut")
        return model(input_ids=torch.tensor([tokens.ids], device=device)).last_hidden_state[0]

    return rows


def encoder_name(folder: str) -> str:
    """What tells one text encoder from another, whatever its folder is called; "toy": its words."""
    if folder == "toy":
        return "toy " + fingerprint({"": toy_vector("a")})
    tokenizer = hashlib.sha256(find(folder, "tokenizer").read_bytes()).hexdigest()[:16]
    return fingerprint(read_umt5(find(folder, "text encoder"))[1]) + tokenizer


# ---------------------------------------------------------------- lists of prompts
def lines_of(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line, or of embeddings of one. raises: UserError"""
    if Path(path).suffix == ".safetensors":
        return [prompt for prompt, _, listed in read_embeddings(path) if listed]
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; name a text file, a prompt a line")
    try:
        content = Path(path).read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, a prompt a line") from None
    if not content:
        raise UserError(f"{path} holds no prompts; write one a line")
    lines = [line.strip() for line in content.split("\n")]
    if "" in lines:
        raise UserError(f"{path}: line {lines.index('') + 1} is empty; delete the line")
    return lines


def read_embeddings(path: str | Path) -> list[tuple[str, Tensor, bool]]:
    """What `main` wrote: prompts, each with its memory-mapped rows [L, width].

    The third of each says whether the prompt is one of the list; the negative and the empty prompt,
    which come first, are not. raises: UserError"""
    path, found = Path(path), []
    names = (read_tensors(path)[1] or {}).get("shards", [])
    shards = [path.parent / str(name) for name in (names if isinstance(names, list) else [])]
    for file in (path, *shards):
        tensors, made = read_tensors(file)
        prompts, lengths = (made or {}).get("prompts"), tensors.get("lengths")
        try:
            rows = tensors["rows"].split(lengths.tolist())
            is_right = tensors["rows"].ndim == 2 and len(rows) == len(prompts)
        except (KeyError, AttributeError, RuntimeError, TypeError):
            is_right = False
        if not is_right or not isinstance(prompts, list):
            raise UserError(f"{file} does not hold embeddings of prompts; make them with text.py")
        found += [(str(prompt), x, file != path) for prompt, x in zip(prompts, rows)]
    return found


class Prompts:
    """A numbered list of prompts with their embeddings, wherever they come from.

    source: a world with captions without end (`world_of`), such as toy; a text file with a prompt
        a line; or the .safetensors file that text.py made of one"""

    def __init__(self, source: str, text_dim: int, text_len: int) -> None:
        self.source, self.text_dim, self.text_len = source, text_dim, text_len
        self.world = world_of(source)
        self.lines = None if self.world else lines_of(source)
        self.known: dict[str, Tensor] = {}
        if Path(source).suffix == ".safetensors":
            self.known = {prompt: x for prompt, x, _ in read_embeddings(source)}
        elif self.lines and text_dim == TOY_DIM:
            note_new_words(self.lines)
        widths = {x.shape[1] for x in self.known.values()}
        longest = max(map(len, self.known.values()), default=0)
        if widths - {text_dim} or longest > text_len:
            raise UserError(
                f"{source} holds embeddings {max(widths)} wide and up to {longest} long, but this "
                f"model reads {text_dim} and {text_len}; make them with the encoder of this model"
            )

    def words(self, number: int) -> str:
        """Prompt number n; of a file of m lines it is line n mod m."""
        return self.world.caption(number) if self.world else self.lines[number % len(self.lines)]

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Embeddings [len(numbers), text_len, text_dim] of the prompts with these numbers."""
        return self.embed([self.words(n) for n in numbers])

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of any prompts, of the same shape.

        raises: UserError for one that a file of embeddings does not hold"""
        if absent := [p for p in prompts if self.known and p not in self.known]:
            raise UserError(
                f"{self.source} has no embedding of {absent[0][:80]!r}; make it with text.py, "
                "a negative prompt by --negative"
            )
        rows = self.known.get if self.known else encoder(self.text_dim, self.text_len)
        return padded([rows(prompt) for prompt in prompts], self.text_dim, self.text_len)


def embed(
    prompts: Sequence[str], text_dim: int, text_len: int, embeddings: str = "", weights: str = ""
) -> Tensor:
    """Embed prompts for a model with this text_dim and text_len.

    embeddings: a file that text.py made;  weights: without it, for Wan, a folder with the text
        encoder, or a file beside it
    returns: float32 [len(prompts), text_len, text_dim], zero where a prompt is shorter; "" is all
        zeros in toy words, their unconditional prompt.  raises: UserError"""
    prompts = [prompt.strip() for prompt in prompts]  # as lines of a file are
    if bad := [prompt for prompt in prompts if re.search("[\ud800-\udfff]", prompt)]:
        raise UserError(f"the prompt {bad[0][:80]!r} is not UTF-8; see the terminal's encoding")
    if embeddings:
        return Prompts(embeddings, text_dim, text_len).embed(prompts)
    if text_dim == TOY_DIM:
        note_new_words(prompts)
    rows = encoder(text_dim, text_len, weights)
    return padded([rows(prompt) for prompt in prompts], text_dim, text_len)


def encoder(text_dim: int, text_len: int, weights: str = "") -> Rows:
    """What embeds a prompt for such a model. raises: UserError for Wan's without its weights"""
    if text_dim == TOY_DIM:
        return toy_words(text_len)
    if weights:
        folder = Path(weights).parent if Path(weights).is_file() else weights
        return umt5(folder, text_len=text_len)
    raise UserError(
        f"this model reads embeddings of width {text_dim}, not toy words: make them once with "
        "python -m lib.text prompts.txt --out prompts.safetensors, and give "
        "--prompts prompts.safetensors"
    )


def padded(rows: Sequence[Tensor], text_dim: int, text_len: int) -> Tensor:
    """[L, text_dim] each -> float32 [len(rows), text_len, text_dim], zero beyond L.

    raises: UserError for another width"""
    out = torch.zeros(len(rows), text_len, text_dim)
    for x, row in zip(out, rows):
        if row.shape[1] != text_dim:
            raise UserError(f"embeddings are {row.shape[1]} wide, but this model reads {text_dim}")
        x[: len(row)] = row
    return out


# ---------------------------------------------------------------- command line
@dataclass
class Config:
    """Embed prompts once, for training and sampling without an encoder: FILE, or --prompts FILE."""

    FIRST = "prompts"  # the flag that the first word belongs to
    prompts: str  # a UTF-8 text file, a prompt a line
    out: str = "prompts.safetensors"  # shards go beside it, as prompts-000000.safetensors ...
    weights: str = "Wan2.1-T2V-1.3B"  # a folder with text encoder and tokenizer; or toy: toy words
    negative: str | None = None  # of unconditional passes; default: Wan's own, nothing for toy
    shard: int = 256  # prompts a file
    device: str = "auto"  # cpu, cuda or auto


def write_rows(path: Path, rows: Rows, prompts: list[str], made: dict, bar: tqdm) -> None:
    """Embed some prompts and write them to a file. raises: FloatingPointError naming a prompt"""
    embedded = []
    for prompt in prompts:
        x = rows(prompt).bfloat16().cpu()
        if not x.isfinite().all():
            raise FloatingPointError(f"the encoder makes of {prompt[:80]!r} what is not finite")
        embedded.append(x)
        bar.update()
    lengths = torch.tensor([len(x) for x in embedded])
    write_safetensors(path, {"rows": torch.cat(embedded), "lengths": lengths}, made)


def main(config: Config) -> None:
    out = check_out(config.out, inputs=[config.prompts])
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
    device, toy = start(config.device)[2], config.weights == "toy"
    lines, negative = lines_of(config.prompts), config.negative
    if negative is None:
        negative = "" if toy else NEGATIVE
    if toy:
        note_new_words(lines)
    rows = toy_words() if toy else umt5(config.weights, device=device)
    has_ftfy = importlib.util.find_spec("ftfy") is not None
    made = {"encoder": encoder_name(config.weights), "ftfy": has_ftfy}
    todo, names = {}, []
    for n in range(0, len(lines), config.shard):
        path = out.with_name(f"{out.stem}-{n:06d}.safetensors")
        names.append(path.name)
        content = made | {"prompts": lines[n : n + config.shard]}
        there = path.exists() and read_tensors(path)[1]
        if there == content:
            continue
        todo[path] = content
        if there:
            say(f"{path} holds other prompts, or is of another encoder: it is made again")
    print(f"{len(lines)} prompts in {len(names)} shards, {len(todo)} to make")
    if todo:
        out.unlink(missing_ok=True)  # written last: where it is, all shards are
    others = list(dict.fromkeys((negative, "")))
    total = len(others) + sum(len(content["prompts"]) for content in todo.values())
    with tqdm(total=total, desc="embed", unit="prompt") as bar, stop_signals() as stop:
        for path, content in todo.items():
            write_rows(path, rows, content["prompts"], content, bar)
            if stop():
                bar.close()
                print(f"stopped; {len(names)} shards are to be; run the same command to go on")
                end_stopped(stop())
        write_rows(out, rows, others, made | {"prompts": others, "shards": names}, bar)
    print(f"wrote {out}; give it as --prompts")


if __name__ == "__main__":
    run(main, Config)
