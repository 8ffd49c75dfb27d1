"""Checkpoints in every layout people have become the same bits, go out again as they came, and what is missing is named."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from test_dit import inputs, run_wan, wan
from tiny import command_line, distance, same, tiny_dit

from dit import DiT, load_dit, save_dit
from generate import load_models
from lib import weights
from lib.common import UserError
from lib.weights import find, names_of_dit, read_dit, read_tensors, write_safetensors
from vae import VAE, VAEConfig, load_vae, save_vae

WHOLE = {"dim": 128, "num_heads": 1, "text_len": 512}  # what a .pt without config is taken for


# ---------------------------------------------------------------- from any layout to any other
def export(to, source, out, monkeypatch, capsys):
    assert command_line(monkeypatch, capsys, weights, weights=source, out=out, to=to) == (0, "")
    return out


def test_native_round_trips_are_bit_exact(tmp_path, monkeypatch, capsys):
    """Native -> diffusers -> self-forcing -> native: the same tensors at every station, and the same file at the end."""
    ours = tiny_dit(3, **WHOLE)
    save_dit(ours, tmp_path / "student.safetensors")
    at = tmp_path / "student.safetensors"
    for to, name in (
        ("diffusers", "transformer"),
        ("self-forcing", "sf.pt"),
        ("native", "back.safetensors"),
    ):
        at = export(to, at, tmp_path / "made" / name, monkeypatch, capsys)
        back = load_dit(at, None)
        assert back.config == ours.config and same(back.state_dict(), ours.state_dict())
    assert at.read_bytes() == (tmp_path / "student.safetensors").read_bytes()
    theirs = torch.load(tmp_path / "made" / "sf.pt", weights_only=True)
    assert theirs.keys() == {"generator", "generator_ema"} and same(
        theirs["generator"], theirs["generator_ema"]
    )
    assert same(theirs["generator_ema"], {"model." + k: v for k, v in ours.state_dict().items()})


def test_diffusers_round_trip_is_bit_exact(tmp_path, monkeypatch, capsys):
    """diffusers' own sharded folder -> native -> a folder that diffusers loads: its config and bits, and its output from ours."""
    from diffusers import WanTransformer3DModel

    monkeypatch.setattr(
        WanTransformer3DModel, "_keep_in_fp32_modules", None
    )  # asks for accelerate; all is float32 here
    model = wan(tiny_dit(**WHOLE).config)
    model.save_pretrained(tmp_path / "theirs" / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "theirs" / "transformer").glob("*.safetensors"))) > 2
    native = export(
        "native", tmp_path / "theirs", tmp_path / "native.safetensors", monkeypatch, capsys
    )
    back = WanTransformer3DModel.from_pretrained(
        export("diffusers", native, tmp_path / "transformer", monkeypatch, capsys)
    )
    assert same(back.state_dict(), model.state_dict())
    assert {k: v for k, v in back.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    } | {"patch_size": list(model.config.patch_size)}
    ours = load_dit(native)
    z, t, text, pos = inputs(ours.config)
    assert (
        distance(
            ours(z, t[:, :1].expand(-1, 3), text, pos),
            run_wan(model, ours.config, z, t[:, 0], text),
        )
        <= 1e-5
    )


def test_names_are_the_models():
    """The names by which an export is checked are the transformer's parameters."""
    c = tiny_dit().config
    assert (
        sorted(names_of_dit(c.num_layers)) == sorted(DiT(c).state_dict())
        and len(names_of_dit(30)) == 825
    )


def test_what_is_not_whole_is_not_exported(tmp_path, monkeypatch, capsys):
    """A missing tensor, a foreign one, a wrong suffix and an unknown format each are one sentence and no file."""
    save_dit(tiny_dit(), tmp_path / "good.safetensors")
    state, config = read_tensors(tmp_path / "good.safetensors")
    image = {"blocks.0.cross_attn.k_img.weight": torch.zeros(2)}
    write_safetensors(
        tmp_path / "cut.safetensors",
        {k: v for k, v in state.items() if k != "blocks.1.norm3.bias"} | image,
        config,
    )
    before = sorted(tmp_path.rglob("*"))
    for source, to, out, says in (
        (
            "cut",
            "native",
            "x.safetensors",
            "missing 1 (blocks.1.norm3.bias); unexpected 1 (blocks.0.cross_attn.k_img.weight)",
        ),
        ("good", "native", "x.pt", "x.pt must be a file that ends in .safetensors"),
        ("good", "self-forcing", "folder", "folder must be a file that ends in .pt"),
        ("good", "onnx", "x", "unknown format 'onnx'"),
    ):
        code, error = command_line(
            monkeypatch,
            capsys,
            weights,
            weights=tmp_path / f"{source}.safetensors",
            out=tmp_path / out,
            to=to,
        )
        assert code == 2 and says in error
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- folders
def put_vae(path):
    save_vae(VAE(VAEConfig(dim=4, z_dim=4, num_res_blocks=1)), path)


def test_a_published_student_beside_the_vae(tmp_path):
    """A .pt in a folder, or named itself, is the student; Wan's own transformer in the same folder comes first."""
    ours, base = tiny_dit(1, **WHOLE), tiny_dit(2, **WHOLE)
    save_dit(ours, tmp_path / "causal_forcing.pt", to="self-forcing")
    with pytest.raises(
        UserError,
        match="holds no VAE .*Wan2.1_VAE.pth.* comes with Wan2.1-T2V-1.3B; copy or link it there",
    ):
        load_models(str(tmp_path), torch.float32, torch.device("cpu"))
    put_vae(tmp_path / "vae.safetensors")
    for weights_flag in (tmp_path, tmp_path / "causal_forcing.pt"):
        dit, vae = load_models(str(weights_flag), torch.float32, torch.device("cpu"))
        assert same(dit.state_dict(), ours.state_dict()) and vae.config.dim == 4
    save_dit(base, tmp_path / "diffusion_pytorch_model.safetensors")
    assert same(load_dit(tmp_path).state_dict(), base.state_dict())
    assert same(
        load_models(str(tmp_path / "causal_forcing.pt"), torch.float32, torch.device("cpu"))[
            0
        ].state_dict(),
        ours.state_dict(),
    )


def test_a_diffusers_pipeline_folder(tmp_path):
    """transformer/ and vae/ of one folder load as a pair."""
    from diffusers import AutoencoderKLWan

    wan(tiny_dit().config).save_pretrained(tmp_path / "transformer")
    AutoencoderKLWan(
        base_dim=4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).save_pretrained(tmp_path / "vae")
    dit, vae = load_models(str(tmp_path), torch.float32, torch.device("cpu"))
    assert (
        dit.config.dim == 48
        and vae.config.dim == 4
        and load_vae(tmp_path / "vae").config == vae.config
    )


@pytest.mark.parametrize(
    "what, names",
    [
        ("transformer", "diffusion_pytorch_model.safetensors or transformer"),
        ("VAE", "Wan2.1_VAE.pth"),
        ("text encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("tokenizer", "google/umt5-xxl"),
    ],
)
def test_what_a_folder_lacks_is_named_with_its_origin(what, names, tmp_path):
    """The message has the file names that were looked for and where they usually come from; nothing is fetched."""
    with pytest.raises(UserError, match=f"holds no {what} .*{names}.*comes with Wan2.1-T2V-1.3B"):
        find(tmp_path, what)
    for look in (
        lambda: find(tmp_path / "Wan2.1", what),
        *([lambda: load_dit(tmp_path / "Wan2.1")] * (what == "transformer")),
        *([lambda: load_vae(tmp_path / "Wan2.1")] * (what == "VAE")),
    ):
        with pytest.raises(
            UserError, match=f"Wan2.1 is no folder; it should be one with a {what} .*{names}"
        ):
            look()


@pytest.mark.parametrize(
    "tree",
    [
        {
            "generator_lora": {
                "base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)
            },
            "step": 3,
        },
        {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)},
    ],
)
def test_a_lora_is_not_a_student(tree, tmp_path):
    """LongLive's second file is a change to its first, and is said to be."""
    torch.save(tree, tmp_path / "lora.pt")
    with pytest.raises(UserError, match="lora.pt is a LoRA.*longlive_base.pt"):
        load_dit(tmp_path / "lora.pt")


def test_heads_are_not_guessed(tmp_path):
    """Without a config the number of heads is not in the file: only Wan's width of 128 a head is assumed."""
    save_dit(tiny_dit(), tmp_path / "tiny.pt", to="self-forcing")
    with pytest.raises(UserError, match="heads of a transformer of width 48 cannot be told"):
        read_dit(tmp_path / "tiny.pt")


def test_a_file_is_let_go_tensor_by_tensor(tmp_path):
    """Loading holds one source tensor at a time: each has a mapping of its own, no larger than itself, and leaves the dict."""
    save_dit(tiny_dit(), tmp_path / "a.safetensors")
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors.values())
    assert len({x.untyped_storage().data_ptr() // 4096 for x in tensors.values()}) == len(
        tensors
    )  # no two on one page
    with torch.device("meta"):
        dit = DiT(tiny_dit().config)
    weights.load_strict(dit, tensors, "a", torch.bfloat16)
    assert not tensors and same(
        dit.state_dict(),
        {k: v.bfloat16() for k, v in load_file(tmp_path / "a.safetensors").items()},
    )


# ---------------------------------------------------------------- files
def tensors():
    base = torch.arange(12.0).view(3, 4)
    return {
        "a": base,
        "transposed view": base.T,
        "shared row": base[1],
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def equal(got, want):
    return got.keys() == want.keys() and all(
        g.dtype == w.dtype and torch.equal(g, w) for g, w in ((got[k], want[k]) for k in want)
    )


@pytest.mark.parametrize(
    "config", [None, {}, {"dim": 4, "mult": [1, 2], "name": "é", "deep": {"x": None}}]
)
def test_safetensors_round_trip(tmp_path, config):
    """Tensors, views and shared ones too, come back with their dtype, and the config as it was."""
    write_safetensors(tmp_path / "x" / "m.safetensors", tensors(), config)
    for path in (tmp_path / "x", tmp_path / "x" / "m.safetensors"):
        got, back = read_tensors(path)
        assert equal(got, tensors()) and back == config
    assert os.listdir(tmp_path / "x") == ["m.safetensors"]


def test_config_in_the_file_wins_over_config_json(tmp_path):
    """Metadata travels with the file; config.json beside it serves files without, .pt ones too."""
    (tmp_path / "config.json").write_text('{"dim": 1}')
    write_safetensors(tmp_path / "a.safetensors", tensors(), {"dim": 2})
    write_safetensors(tmp_path / "b.safetensors", tensors())
    torch.save({"w": torch.ones(2)}, tmp_path / "c.pt")
    assert [
        read_tensors(tmp_path / n)[1]["dim"] for n in ("a.safetensors", "b.safetensors", "c.pt")
    ] == [2, 1, 1]
    assert equal(read_tensors(tmp_path / "c.pt")[0], {"w": torch.ones(2)})


def shard(folder):
    whole = tensors()
    files = {
        "m-00001-of-00002.safetensors": list(whole)[:2],
        "m-00002-of-00002.safetensors": list(whole)[2:],
    }
    for name, keys in files.items():
        write_safetensors(folder / name, {k: whole[k] for k in keys})
    index = {"metadata": {}, "weight_map": {k: name for name, keys in files.items() for k in keys}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"dim": 3}')
    return list(files)


def test_shards_are_read_as_one(tmp_path):
    """A sharded folder, or its index, gives all tensors and the config beside it."""
    shard(tmp_path)
    for path in (tmp_path, tmp_path / "m.safetensors.index.json"):
        got, config = read_tensors(path)
        assert equal(got, tensors()) and config == {"dim": 3}


def complaint(path):
    with pytest.raises(UserError) as error:
        read_tensors(path)
    return str(error.value)


def test_missing_or_damaged_shard_is_named(tmp_path):
    """An interrupted download is told apart from a wrong folder: the file to get again is named."""
    first, second = shard(tmp_path)
    (tmp_path / first).write_bytes((tmp_path / first).read_bytes()[:-1])
    assert first in complaint(tmp_path) and second not in complaint(tmp_path)
    os.remove(tmp_path / second)
    assert second in complaint(tmp_path) and first not in complaint(tmp_path)
    (tmp_path / "m.safetensors.index.json").write_text("{}")
    assert "none at all" in complaint(tmp_path)


def test_ambiguous_or_empty_folder_is_refused(tmp_path):
    """Which of two files is meant is not guessed."""
    assert str(tmp_path) in complaint(tmp_path) and "none" in complaint(tmp_path)
    for name in ("one.pt", "two.pt"):
        torch.save({}, tmp_path / name)
    assert "one.pt, two.pt" in complaint(tmp_path)


def test_a_file_that_is_not_the_one_meant_is_refused(tmp_path):
    """SHA256SUMS beside a checkpoint is checked before it is used, by any reader; files it does not name load as ever."""
    good = tmp_path / "student.safetensors"
    save_dit(tiny_dit(1), good)
    (tmp_path / "SHA256SUMS").write_text(
        f"{hashlib.sha256(good.read_bytes()).hexdigest()}  student.safetensors\n"
    )
    other = tmp_path / "other.safetensors"
    save_dit(tiny_dit(2), other)
    assert load_dit(good) and load_dit(other)
    good.write_bytes(other.read_bytes())
    with pytest.raises(
        UserError, match="student.safetensors is not the file that .*SHA256SUMS names"
    ):
        load_dit(good)
