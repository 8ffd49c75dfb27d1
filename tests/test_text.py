"""Prompts become the tensors that Wan makes of them, once, into files that training and
sampling read; mistakes are named."""

import hashlib
import html
import math
import re
import shutil
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from tiny import (
    at_call,
    command_line,
    distance,
    randn,
    randomise,
    terminate,
    tiny_checkpoints,
    tiny_dit,
)

import train_dmd
import train_ode
from dit import save_dit
from generate import Config as ClipConfig
from generate import main as generate
from lib import text
from lib.common import UserError, from_cli
from lib.tensors import read_tensors
from lib.text import HELD_OUT, NEGATIVE, Config, Prompts, clean, embed, lines_of, umt5
from toy import world
from vae import VAE, VAEConfig, save_vae

LINES = [
    "a red square moves left over a green wave",
    "a red disc moves up over a blue wave",
    "a cyan ring moves down over a red wave",
]
SENTENCES = [
    "a cat runs over a hill",
    "cat",
    "a dog and a cat and a dog and a cat and a dog run over a hill and a hill and a hill",
    "  A &amp;amp; B\tand\u3000 a\n  cat  ",
]


# ---------------------------------------------------------------- UMT5, told independently
OFFICIAL = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    **{
        f"blocks.{n}.{ours}": f"encoder.block.{n}.layer.{theirs}"
        for n in range(2)
        for ours, theirs in (
            ("norm1", "0.layer_norm"),
            ("attn.q", "0.SelfAttention.q"),
            ("attn.k", "0.SelfAttention.k"),
            ("attn.v", "0.SelfAttention.v"),
            ("attn.o", "0.SelfAttention.o"),
            ("pos_embedding.embedding", "0.SelfAttention.relative_attention_bias"),
            ("norm2", "1.layer_norm"),
            ("ffn.gate.0", "1.DenseReluDense.wi_0"),
            ("ffn.fc1", "1.DenseReluDense.wi_1"),
            ("ffn.fc2", "1.DenseReluDense.wo"),
        )
    },
}


def bucket(distance: int) -> int:
    """32 buckets: 16 for what lies ahead; in each half 8 for the next neighbours, 8 logarithmic
    ones up to 128."""
    near = abs(distance)
    place = near if near < 8 else min(15, 8 + int(math.log(near / 8) / math.log(128 / 8) * 8))
    return place + 16 * (distance > 0)


def wan_encoder(w: dict, ids: list[int], heads: int) -> torch.Tensor:
    """RECIPE's description of Wan's encoder in plain words: no scaling, a position bias in
    every layer, gated GELU."""

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]

    x = w["token_embedding.weight"][ids]
    table = torch.tensor([[bucket(j - i) for j in range(len(ids))] for i in range(len(ids))])
    for n in range(2):
        b, y = f"blocks.{n}.", norm(x, f"blocks.{n}.norm1")
        q, k, v = (torch.stack((y @ w[f"{b}attn.{a}.weight"].T).chunk(heads, -1)) for a in "qkv")
        bias = w[b + "pos_embedding.embedding.weight"][table].permute(2, 0, 1)
        y = torch.cat(list((q @ k.mT + bias).softmax(-1) @ v), -1)
        x = x + y @ w[b + "attn.o.weight"].T
        y = norm(x, b + "norm2")
        gate = torch.nn.functional.gelu(y @ w[b + "ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (y @ w[b + "ffn.fc1.weight"].T * gate) @ w[b + "ffn.fc2.weight"].T
    return norm(x, "norm")


@pytest.fixture(scope="module")
def umt5_folders(tmp_path_factory):
    """A tiny random encoder in Wan's layout and in Hugging Face's, a tokenizer, and
    transformers' model and tokenizer of them."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("umt5")
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *sorted({c for s in SENTENCES for c in html.unescape(html.unescape(s)) if c.strip()}),
        "▁",
        "▁a",
        "▁cat",
        "▁dog",
        "▁and",
        "▁hill",
        "▁over",
        "▁runs",
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(w, -len(words) / len(w)) for w in words], unk_id=2)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    for name in ("native/google/umt5-xxl", "hf/tokenizer"):
        (folder / name).mkdir(parents=True)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    model = randomise(
        transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=len(words),
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        ),
        seed=3,
    )
    with torch.no_grad():
        model.shared.weight.copy_(randn(5, *model.shared.weight.shape))
    model.save_pretrained(folder / "hf" / "text_encoder", max_shard_size="20KB")
    state = model.state_dict()
    torch.save(
        {f"{a}.weight": state[f"{b}.weight"].clone() for a, b in OFFICIAL.items()},
        folder / "native" / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "hf" / "tokenizer" / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="</s>",
    )
    return folder, model, reference


@pytest.fixture
def ftfy(monkeypatch):
    """A stand-in that leaves a mark: the real package is optional."""
    module = types.ModuleType("ftfy")
    module.__spec__, module.fix_text = ModuleSpec("ftfy", None), lambda s: s.replace("，", ",")
    monkeypatch.setitem(sys.modules, "ftfy", module)


@pytest.mark.parametrize("layout", ["native", "hf"])
def test_umt5_equals_transformers_padded_and_masked(layout, umt5_folders, ftfy, capsys):
    """Both layouts give, for prompts in full and cut at the length, transformers' output under
    the padding mask, zero beyond."""
    folder, model, reference = umt5_folders
    rows = umt5(folder / layout, torch.float32, text_len=20)
    got = text.padded([rows(s) for s in SENTENCES], 32, 20)
    cleaned = [re.sub(r"\s+", " ", html.unescape(html.unescape(s)).strip()) for s in SENTENCES]
    tokens = reference(
        cleaned, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
    )
    with torch.no_grad():
        expected = (
            model(tokens.input_ids, tokens.attention_mask).last_hidden_state
            * tokens.attention_mask[..., None]
        )
    lengths = tokens.attention_mask.sum(1).tolist()
    assert min(lengths) < 5 and max(lengths) == 20 and expected.std() > 0.3
    assert distance(got, expected) <= 1e-5
    assert capsys.readouterr().out.count("longer than 20 tokens; the rest is cut") == 1  # the third
    assert (
        rows(SENTENCES[0]).dtype == torch.float32
        and umt5(folder / layout)("cat").dtype == torch.bfloat16
    )


def test_umt5_is_wans_encoder(umt5_folders, ftfy):
    """The official names mean what Wan's code does with them, computed here in plain words."""
    folder, _, reference = umt5_folders
    weights = torch.load(folder / "native" / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    rows = umt5(folder / "native", torch.float32)
    for sentence in SENTENCES[:3]:
        assert (
            distance(rows(sentence), wan_encoder(weights, reference(sentence).input_ids, 2)) <= 1e-5
        )


def test_cleaning(ftfy, monkeypatch):
    """ftfy first, HTML read twice, white space collapsed; without ftfy the rest, and the
    negative prompt is Wan's to the letter."""
    assert clean("  a，&amp;lt;b&amp;gt;\u3000 c\r\n\td  ") == "a,<b> c d"
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean("  a，&amp;lt;b&amp;gt;\u3000 c\r\n\td  ") == "a，<b> c d"
    digest = hashlib.sha256(
        NEGATIVE.encode()
    ).hexdigest()  # of sample_neg_prompt in wan/configs/shared_config.py
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


# ---------------------------------------------------------------- files of embeddings
def precompute(folder, lines, **flags):
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text.main(
        Config(
            **{
                "prompts": str(folder / "prompts.txt"),
                "out": str(folder / "p.safetensors"),
                "weights": "toy",
                **flags,
            }
        )
    )
    return str(folder / "p.safetensors")


def test_files_hold_what_the_encoder_gives(umt5_folders, ftfy, tmp_path):
    """Wan's way: rows in bfloat16 at their true length, the negative prompt with them; read
    back, padded and numbered round."""
    folder, path = (
        umt5_folders[0],
        precompute(tmp_path, SENTENCES[:3], weights=str(umt5_folders[0] / "native"), shard=2),
    )
    rows, source = umt5(folder / "native"), Prompts(path, 32, 512)
    expected = text.padded([rows(s) for s in (*SENTENCES[:3], SENTENCES[0])], 32, 512)
    assert (
        torch.equal(source(range(4)), expected)
        and source.lines == SENTENCES[:3] == lines_of(path)
        and source.words(4) == SENTENCES[1]
    )
    assert (
        torch.equal(source.embed([NEGATIVE, ""]), text.padded([rows(NEGATIVE), rows("")], 32, 512))
        and len(rows("")) == 1
    )
    assert torch.equal(embed(SENTENCES[:2], 32, 512, path), expected[:2])
    assert torch.equal(
        embed(SENTENCES[:2], 32, 512, weights=folder / "native"), expected[:2]
    )  # as sampling does without a file
    assert torch.equal(
        embed(SENTENCES[:2], 32, 512, "", folder / "native" / "models_t5_umt5-xxl-enc-bf16.pth"),
        expected[:2],
    )
    shards = sorted(p.name for p in tmp_path.glob("p-*"))
    assert shards == ["p-000000.safetensors", "p-000002.safetensors"]
    tensors, made = read_tensors(tmp_path / shards[0])
    assert (
        tensors["rows"].shape == (sum(tensors["lengths"]), 32)
        and tensors["rows"].dtype == torch.bfloat16
    )
    name = text.encoder_name(str(folder / "native"))
    assert made == {"encoder": name, "ftfy": True, "prompts": SENTENCES[:2]}
    with pytest.raises(
        UserError,
        match="has no embedding of 'a cow'; make it with text.py, a negative prompt by --negative",
    ):
        source.embed(["a cow"])


def test_the_first_word_may_be_the_file():
    """`prompts.txt --out x` is `--prompts prompts.txt`; a second word is still a mistake."""
    assert from_cli(Config, ["a.txt", "--out", "x"]) == from_cli(
        Config, ["--prompts", "a.txt", "--out", "x"]
    )
    with pytest.raises(UserError, match="--prompts takes one value, got 2"):
        from_cli(Config, ["a.txt", "b.txt"])


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """Whole shards stay and are not made again, the index comes last, and the bytes are those
    of a run without interruption."""
    lines = LINES * 2
    precompute(tmp_path, lines, shard=2)
    expected = {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")}
    assert len(expected) == 4
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with monkeypatch.context() as patch:

        def interrupt():
            raise KeyboardInterrupt

        at_call(patch, text, "write_safetensors", 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            precompute(tmp_path, lines, shard=2)
    assert [p.name for p in tmp_path.glob("p*.safetensors")] == ["p-000000.safetensors"]
    with pytest.raises(UserError, match="p.safetensors does not exist"):
        Prompts(str(tmp_path / "p.safetensors"), 64, 12)
    kept = (tmp_path / "p-000000.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        at_call(patch, text, "write_rows", 1, terminate)
        with pytest.raises(SystemExit, match="^143$"):  # after the shard at hand
            precompute(tmp_path, lines, shard=2)
    assert len(list(tmp_path.glob("p*.safetensors"))) == 2
    precompute(tmp_path, lines, shard=2)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")} == expected
    assert (tmp_path / "p-000000.safetensors").stat().st_mtime_ns == kept
    lines[5] = (
        "a red ring moves up over a red wave"  # another list: its last shard alone is made again
    )
    assert torch.equal(
        Prompts(precompute(tmp_path, lines, shard=2), 64, 12)([5]).bfloat16(),
        embed([lines[5]], 64, 12).bfloat16(),
    )
    assert (tmp_path / "p-000000.safetensors").stat().st_mtime_ns == kept


def test_scripts_take_the_file_for_prompts(tmp_path):
    """Pairs, stage 1, stage 2 and sampling run from the file alone; what the teacher is told is
    what the text would tell it."""
    files, made = tiny_checkpoints(tmp_path), {}
    (tmp_path / "e.txt").write_text("\n".join(LINES))
    flags = {
        "teacher": files["teacher"],
        "weights": files["student"],
        "latent": (6, 4, 4),
        "pairs": 2,
        "shard": 2,
        "dtype": "float32",
        "steps": 1,
        "batch": 2,
    }
    for prompts in (precompute(tmp_path, LINES), str(tmp_path / "e.txt")):
        train_ode.main(
            train_ode.Config(
                **flags, prompts=prompts, data=str(tmp_path / prompts[-3:]), generate=True
            )
        )
        made[prompts[-3:]] = read_tensors(tmp_path / prompts[-3:] / "pairs-000000.safetensors")[0][
            "states"
        ]
    assert 0 < distance(made["ors"], made["txt"]) < 0.05  # bfloat16 words
    path = str(tmp_path / "p.safetensors")
    train_ode.main(
        train_ode.Config(
            **flags, prompts=path, data=str(tmp_path / "ors"), out=str(tmp_path / "ode")
        )
    )
    train_dmd.main(
        train_dmd.Config(
            student=files["student"],
            teacher=files["teacher"],
            critic=files["teacher"],
            vae=files["vae"],
            prompts=path,
            latent=(6, 4, 4),
            steps=1,
            batch=1,
            out=str(tmp_path / "dmd"),
            dtype="float32",
        )
    )
    assert (tmp_path / "ode" / "student.safetensors").exists() and (
        tmp_path / "dmd" / "student.safetensors"
    ).exists()


def test_sampling_with_wans_text(umt5_folders, tmp_path, monkeypatch, capsys):
    """`generate.py` embeds with the encoder in the weights' folder, or reads --embeddings, to the
    same clip; without, it says what
    is missing."""
    folder = umt5_folders[0]
    save_dit(tiny_dit(text_len=512), tmp_path / "student.safetensors")
    save_vae(VAE(VAEConfig(dim=4, z_dim=4, num_res_blocks=1)), tmp_path / "vae.safetensors")
    path = precompute(tmp_path, SENTENCES[:1], weights=str(folder / "native"))
    flags = {"prompt": (SENTENCES[0],), "weights": str(tmp_path), "frames": 9, "size": (16, 16)}
    flags["denoising"] = (1000.0, 750.0, 500.0, 250.0)
    with pytest.raises(UserError, match="holds no tokenizer.* it comes with Wan2.1-T2V-1.3B"):
        generate(ClipConfig(**flags, out=str(tmp_path / "a.gif")))
    assert not (tmp_path / "a.gif").exists()
    generate(ClipConfig(**flags, out=str(tmp_path / "a.gif"), embeddings=path))
    for name in ("google", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / name).symlink_to(folder / "native" / name)
    generate(ClipConfig(**flags, out=str(tmp_path / "b.gif")))
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "content, says",
    [
        (b"one\n\nthree\n", "line 2 is empty"),
        (b"\n \n", "holds no prompts"),
        (b"caf\xe9\n", "is not UTF-8 text"),
        (b"a red disc " * 1000, "has 3000 words; this model reads at most"),
    ],
)
def test_bad_prompt_files_are_one_sentence(content, says, tmp_path, monkeypatch, capsys):
    """Empty lines, other encodings and endless prompts are named in one short line, and no file
    appears."""
    (tmp_path / "p.txt").write_bytes(content)
    code, error = command_line(
        monkeypatch,
        capsys,
        text,
        prompts=tmp_path / "p.txt",
        out=tmp_path / "p.safetensors",
        weights="toy",
    )
    assert (
        code == 2
        and says in error
        and len(error) < 600
        and [p.name for p in tmp_path.iterdir()] == ["p.txt"]
    )


def test_words_that_are_new_are_said_and_have_vectors(tmp_path, capsys):
    """Own captions work at toy scale: any word has a vector, another one than others; the words
    that the toy world does not have are named, once, in a line."""
    text._say_once.cache_clear()
    known, new = "a red disc moves left over a blue wave", "a red Spaceship, over " + "x" * 10000
    x = embed([known, new, new.lower()], 64, 12)
    assert distance(x[1], x[2]) == 0 < distance(x[0], x[1]) and x[1, 2].std() > 0.5
    (tmp_path / "p.txt").write_text(f"{new}\n" * 3)
    assert torch.equal(Prompts(str(tmp_path / "p.txt"), 64, 12)([7])[0], x[1])
    (line,) = capsys.readouterr().out.splitlines()
    assert "may never have seen the words 'spaceship', 'xxx" in line and len(line) < 400
    embed([known, ""], 64, 12)
    assert capsys.readouterr().out == ""


def test_captions_come_from_any_module(tmp_path, monkeypatch):
    """--prompts names a world, by a short name or its module's; without captions it is refused."""
    (tmp_path / "my_world.py").write_text("def caption(number):\n    return f'clip {number}'\n")
    (tmp_path / "no_world.py").write_text("")
    (tmp_path / "bad_world.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = Prompts("my_world", 64, 12)
    assert mine.lines is None and mine.words(HELD_OUT + 3) == f"clip {HELD_OUT + 3}"
    assert torch.equal(mine([3]), embed(["clip 3"], 64, 12))
    for name in ("toy", "toy.world"):
        assert Prompts(name, 64, 12).words(8) == world.caption(8)
    for name, says in (
        ("no_world", "--prompts no_world is a module without caption"),
        ("bad_world", "--prompts bad_world needs the package nowhere_to_be_found"),
    ):
        with pytest.raises(UserError, match=says):
            Prompts(name, 64, 12)
    for name in ("absent_world", "absent.txt"):
        with pytest.raises(FileNotFoundError, match=name):
            Prompts(name, 64, 12)


def test_another_encoder_makes_its_files_again(umt5_folders, ftfy, tmp_path, capsys):
    """An encoder is known by its weights: the same folder with others makes all shards again, and
    says so; the same weights in another folder and layout make none."""
    mine = tmp_path / "encoder"
    shutil.copytree(umt5_folders[0] / "native", mine)
    first = precompute(tmp_path, SENTENCES[:2], weights=str(mine))
    capsys.readouterr()
    precompute(tmp_path, SENTENCES[:2], weights=str(umt5_folders[0] / "native"))
    assert "1 shards, 0 to make" in capsys.readouterr().out
    before = read_tensors(tmp_path / "p-000000.safetensors")[0]["rows"].clone()
    weights = mine / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save({k: 2 * x for k, x in torch.load(weights).items()}, weights)
    assert precompute(tmp_path, SENTENCES[:2], weights=str(mine)) == first
    said = capsys.readouterr().out
    assert "p-000000.safetensors holds other prompts, or is of another encoder" in said
    assert distance(before.float(), read_tensors(tmp_path / "p-000000.safetensors")[0]["rows"]) > 0


def test_a_prompt_of_nan_is_named(tmp_path, monkeypatch, capsys):
    """What an encoder makes must be finite: code 1, the prompt, and no file."""
    (tmp_path / "p.txt").write_text("a red disc\n")
    monkeypatch.setattr(text, "toy_words", lambda: lambda prompt: torch.full((1, 64), float("nan")))
    flags = {"prompts": tmp_path / "p.txt", "out": tmp_path / "p.safetensors", "weights": "toy"}
    code, error = command_line(monkeypatch, capsys, text, **flags)
    assert code == 1 and "'a red disc' what is not finite" in error
    assert [p.name for p in tmp_path.iterdir()] == ["p.txt"]


def test_lines_as_editors_write_them(tmp_path):
    """A byte-order mark, carriage returns, a last line without end or with two are no mistake."""
    for content in ("\ufeffone\r\ntwo", "one\ntwo\n", "one\n two \n\n\n"):
        (tmp_path / "p.txt").write_bytes(content.encode())
        assert lines_of(tmp_path / "p.txt") == ["one", "two"]


def test_what_holds_no_text_is_named(tmp_path):
    """A prompt in another encoding than the terminal's, a folder in the place of a file."""
    with pytest.raises(UserError, match=r"the prompt 'a \\udcff disc' is not UTF-8"):
        embed(["a \udcff disc"], 64, 12)
    with pytest.raises(UserError, match="is a folder; name a text file, a prompt a line"):
        lines_of(tmp_path)


def test_ten_thousand_characters_are_cut_with_a_note(umt5_folders, ftfy, capsys):
    """Wan cuts a prompt after 512 tokens; so do we, and say so."""
    rows = umt5(umt5_folders[0] / "native")("a cat runs " * 1000)
    assert (
        rows.shape == (512, 32)
        and "longer than 512 tokens; the rest is cut" in capsys.readouterr().out
    )


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_a_missing_package_is_named(package, umt5_folders, monkeypatch):
    """Without the optional packages the sentence says what to install, or how to do without."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError,
        match=f"needs the package {package}: pip install transformers ftfy; or give embeddings",
    ):
        umt5(umt5_folders[0] / "native")


def test_a_missing_ftfy_is_noted(umt5_folders, monkeypatch, capsys):
    """It is not needed, but Wan has it: the difference is said."""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    umt5(umt5_folders[0] / "native")
    assert "ftfy is not installed" in capsys.readouterr().out


def test_encoders_that_are_none_are_refused(umt5_folders, tmp_path):
    """An encoder or tokenizer that is missing, foreign or incomplete is named."""
    with pytest.raises(UserError, match="nowhere is no folder; it should be one with a tokenizer"):
        umt5(tmp_path / "nowhere")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="holds no text encoder .models_t5_umt5-xxl-enc-bf16.pth"):
        umt5(tmp_path)
    state = torch.load(
        umt5_folders[0] / "native" / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True
    )
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        umt5(tmp_path)
    (tmp_path / "google" / "umt5-xxl" / "tokenizer.json").write_bytes(
        (umt5_folders[0] / "native" / "google" / "umt5-xxl" / "tokenizer.json").read_bytes()
    )
    cut = {k: v for k, v in state.items() if k != "blocks.1.ffn.fc2.weight"}
    for tree, says in (
        ({"x": torch.zeros(2)}, "is not the encoder of UMT5"),
        (cut, r"missing 1 \(encoder.block.1.layer.1.DenseReluDense.wo.weight"),
    ):
        torch.save(tree, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
        with pytest.raises(UserError, match=says):
            umt5(tmp_path)


def test_embeddings_of_another_width_are_refused(umt5_folders, tmp_path):
    """Files made for another model, shards that are gone, other safetensors, and text for a
    model that reads Wan's are one sentence each."""
    path = precompute(tmp_path, LINES)
    with pytest.raises(
        UserError, match="embeddings 64 wide and up to 9 long, but this model reads 4096 and 512"
    ):
        Prompts(path, 4096, 512)
    with pytest.raises(UserError, match="32 wide, but this model reads 4096"):
        embed(["cat"], 4096, 512, weights=umt5_folders[0] / "native")
    with pytest.raises(UserError, match="up to 9 long, but this model reads 64 and 8"):
        Prompts(path, 64, 8)
    with pytest.raises(
        UserError,
        match="reads embeddings of width 4096.* python -m lib.text prompts.txt --out prompts",
    ):
        Prompts(str(tmp_path / "prompts.txt"), 4096, 512)([0])
    tiny_checkpoints(tmp_path)
    with pytest.raises(UserError, match="teacher.safetensors does not hold embeddings of prompts"):
        Prompts(str(tmp_path / "teacher.safetensors"), 64, 12)
    (tmp_path / "p-000000.safetensors").unlink()
    with pytest.raises(UserError, match="p-000000.safetensors does not exist"):
        Prompts(path, 64, 12)


def test_wan_presets_read_embeddings_with_wans_negative_prompt():
    """The presets for Wan name the file that text.py writes, and Wan's negative prompt."""
    for script in (train_ode, train_dmd):
        for preset in set(script.Config.PRESETS) - {"toy", "toy64"}:
            config = from_cli(script.Config, ["--preset", preset])
            assert (
                Path(config.prompts).name == from_cli(Config, ["x"]).out
                and config.negative == NEGATIVE
            )
