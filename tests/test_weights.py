"""Checkpoints in every layout people have become the same bits, go out again as they came, and what
is missing is named."""

import argparse
import datetime
import hashlib
import json
import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dit import inputs, run_wan, wan
from tiny import command_line, distance, randn, same, tiny_dit

import anchors
from dit import PRESETS, DiT, load_dit, save_dit
from generate import load_models
from lib import lora, weights
from lib.common import UserError
from lib.foreign import refuse_names, refuse_pair
from lib.lora import Low
from lib.names import names_of_dit
from lib.noise import noise_seeded
from lib.tensors import only_checkpoint, read_tensors, write_safetensors
from lib.weights import find, read_dit
from sampler import generate
from vae import VAE, VAEConfig, load_vae, save_vae

WHOLE = {"dim": 128, "num_heads": 1, "text_len": 512}
RECIPE = {"levels": [1000.0, 500.0], "shift": 5.0, "block": 3, "plans": "paper"}


def read_recipe(path):
    return read_dit(path)[0].get("recipe")


# ---------------------------------------------------------------- from any layout to any other
def export(to, source, out, monkeypatch, capsys):
    assert command_line(monkeypatch, capsys, weights, weights=source, out=out, to=to) == (0, "")
    return out


def test_native_round_trips_are_bit_exact(tmp_path, monkeypatch, capsys):
    """Native -> diffusers -> self-forcing -> native: the same tensors at every station, and the
    same file at the end."""
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
    assert theirs.keys() == {"generator", "generator_ema", "config"}
    assert same(theirs["generator"], theirs["generator_ema"])
    assert same(theirs["generator_ema"], {"model." + k: v for k, v in ours.state_dict().items()})


def test_diffusers_round_trip_is_bit_exact(tmp_path, monkeypatch, capsys):
    """diffusers' own sharded folder -> native -> a folder that diffusers loads: its config and
    bits, and its output from ours."""
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


def test_every_layout_keeps_what_the_names_do_not_say(tmp_path, monkeypatch, capsys):
    """Heads, length of the text, eps, patches and the recipe, none of them Wan's, come through all
    layouts: the same clip."""
    sizes = {"num_heads": 2, "text_len": 11, "eps": 1e-3, "patch_size": (1, 1, 2)}
    ours, plan, noise = (
        tiny_dit(3, **sizes),
        anchors.forward(6),
        noise_seeded([(0, 0, 0)], (4, 4, 4)),
    )
    ours.recipe = RECIPE
    save_dit(ours, tmp_path / "student.safetensors")

    def clip(dit):
        return generate(dit, plan, [dit.text_kv(randn(1, 1, 5, 32))], noise)

    at = tmp_path / "student.safetensors"
    for to, name in (
        ("diffusers", "transformer"),
        ("self-forcing", "sf.pt"),
        ("native", "back.safetensors"),
    ):
        at = export(to, at, tmp_path / "made" / name, monkeypatch, capsys)
        back = load_dit(at)
        assert back.config == ours.config and back.recipe == RECIPE == read_recipe(at)
        assert torch.equal(clip(back), clip(ours))
    save_dit(back, tmp_path / "again.safetensors")  # the recipe stays with the network
    assert read_recipe(tmp_path / "again.safetensors") == RECIPE
    assert read_recipe(tmp_path / "made") == RECIPE and read_recipe(wan_pt(tmp_path)) is None


def wan_pt(folder, **changes):
    """A .pt without config at Wan's full size, or at another; one number a tensor, so that it is
    small."""
    with torch.device("meta"):
        shapes = DiT(replace(PRESETS["wan1.3b"], **changes)).state_dict()
    path = folder / "wan.pt"
    torch.save({k: torch.full((), 0.25).expand(v.shape) for k, v in shapes.items()}, path)
    return path


def test_only_wans_own_sizes_are_known_without_a_config(tmp_path):
    """Width 1536 or 5120 with text of 4096: 12 or 40 heads and 512 tokens. Of any other nothing is
    guessed."""
    values, _, _ = read_dit(wan_pt(tmp_path))
    assert values == {k: v for k, v in asdict(PRESETS["wan1.3b"]).items() if k != "eps"}
    for changes in ({"dim": 1280, "num_heads": 10}, {"text_dim": 64}):
        with pytest.raises(UserError, match="num_heads and text_len .* cannot be told"):
            read_dit(wan_pt(tmp_path, num_layers=1, **changes))
    for sizes, says in (((36, 16), "image-to-video"), ((48, 48), "Wan2.2's 5B")):
        changes = dict(zip(("in_dim", "out_dim"), sizes), num_layers=1)
        with pytest.raises(UserError, match=f"wan.pt is .*{says}"):
            read_dit(wan_pt(tmp_path, **changes))
    save_dit(tiny_dit(in_dim=2, out_dim=8), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="makes 8 channels of 2: that is no velocity"):
        load_dit(tmp_path / "b.safetensors")
    save_file(tiny_dit(dim=128).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="width 128 .* cannot be told .* put a config.json beside"):
        load_dit(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(asdict(tiny_dit(dim=128).config)))
    assert load_dit(tmp_path / "a.safetensors").config == tiny_dit(dim=128).config


def test_names_are_the_models():
    """The names by which an export is checked are the transformer's parameters."""
    c = tiny_dit().config
    assert (
        sorted(names_of_dit(c.num_layers)) == sorted(DiT(c).state_dict())
        and len(names_of_dit(30)) == 825
    )


def test_what_is_not_whole_is_not_exported(tmp_path, monkeypatch, capsys):
    """A missing tensor, a foreign one, a wrong suffix and an unknown format each are one sentence
    and no file."""
    save_dit(tiny_dit(), tmp_path / "good.safetensors")
    state, config = read_tensors(tmp_path / "good.safetensors")
    extra = {"blocks.0.extra": torch.zeros(2)}
    write_safetensors(
        tmp_path / "cut.safetensors",
        {k: v for k, v in state.items() if k != "blocks.1.norm3.bias"} | extra,
        config,
    )
    before = sorted(tmp_path.rglob("*"))
    for source, to, out, says in (
        (
            "cut",
            "native",
            "x.safetensors",
            "missing 1 (blocks.1.norm3.bias); unexpected 1 (blocks.0.extra)",
        ),
        ("good", "native", "x.pt", "x.pt must be a file that ends in .safetensors"),
        ("good", "self-forcing", "folder", "folder must be a file that ends in .pt"),
        ("good", "onnx", "x", "unknown format 'onnx'"),
        ("good", "diffusers", "x.pt", "x.pt must be a folder"),
        ("good", "diffusers", "", "holds cut.safetensors, good.safetensors, which would be read"),
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
    """A .pt in a folder, or named itself, is the student; Wan's own transformer in the same folder
    comes first."""
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
    """The message has the file names that were looked for and where they usually come from; nothing
    is fetched."""
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


# ---------------------------------------------------------------- other people's files
AVERAGES = ("EMA", "modelEMA", "ema_state_dict", "averaged_model", "shadow")


@pytest.mark.parametrize(
    "nest, prefix",
    [
        (lambda x: x, "model.diffusion_model."),
        (lambda x: x, "diffusion_model."),
        (lambda x: x, "any.thing.at.all."),
        (lambda x: {"ema": x}, ""),
        (lambda x: {"step": 3, "net": {"inner": {"module": x}}}, "_orig_mod.module."),
        (lambda x: {"generator": zeros(x), "model_ema": x, "critic": zeros(x)}, "model."),
        (lambda x: {"fake_score_ema": zeros(x), "student": x}, ""),
        (lambda x: x | {"first_stage_model.encoder.conv1.weight": torch.zeros(1)}, "model."),
        (lambda x: x | {"n_averaged": torch.tensor(3)}, "module."),
        (lambda x: x | {k.removeprefix("ema."): v for k, v in zeros(x).items()}, "ema."),
        (lambda x: x | {"clip.patch_embedding.weight": torch.zeros(1)}, "model.diffusion_model."),
        *((lambda x, name=name: {"model": zeros(x), name: x}, "") for name in AVERAGES),
    ],
)
def test_any_prefix_and_any_nesting(nest, prefix, tmp_path):
    """The transformer is found by the names inside it; an average comes before what it is an
    average of."""
    ours = tiny_dit(1)
    torch.save(nest({prefix + k: v for k, v in ours.state_dict().items()}), tmp_path / "a.pt")
    (tmp_path / "config.json").write_text(json.dumps(asdict(ours.config)))
    assert same(load_dit(tmp_path / "a.pt").state_dict(), ours.state_dict())


def zeros(tensors):
    return {k: torch.zeros_like(v) for k, v in tensors.items()}


@pytest.mark.parametrize("nest", [lambda x: x, lambda x: {"state_dict": x}])
@pytest.mark.parametrize("prefix", ["", "model.", "first_stage_model.", "vae."])
def test_any_prefix_of_a_vae(nest, prefix, tmp_path):
    ours = VAE(VAEConfig(dim=4, z_dim=4, num_res_blocks=1))
    torch.save(nest({prefix + k: v for k, v in ours.state_dict().items()}), tmp_path / "a.pth")
    (tmp_path / "config.json").write_text(json.dumps(asdict(ours.config)))
    assert same(load_vae(tmp_path / "a.pth").state_dict(), ours.state_dict())


def test_two_networks_and_none_to_prefer(tmp_path):
    state = tiny_dit().state_dict()
    torch.save({"a": state, "b": state}, tmp_path / "two.pt")
    with pytest.raises(UserError, match=r"two.pt holds several networks \('a.', 'b.'\)"):
        load_dit(tmp_path / "two.pt")


FP8 = torch.zeros(2, dtype=torch.float8_e4m3fn)
FOREIGN = {  # what is put into a whole student -> what is said
    "blocks.0.self_attn.q.lora_A.weight": "is a LoRA.*--merge_lora",
    "lora_unet_blocks_0_ffn_0.lora_down.weight": "is a LoRA",
    "blocks.0.norm3.diff_b": "is a LoRA",
    "blocks.0.diff_m": "is a LoRA",
    "blocks.0.ffn.0.hada_w1_a": "is a LoRA",
    "scaled_fp8": "is fp8 weights with a scale.*bf16",
    "blocks.0.ffn.0.scale_weight": "is fp8 weights with a scale",
    "blocks.0.ffn.0.comfy_quant": "is fp8 weights with a scale",
    "blocks.0.ffn.0.weight_scale": "is fp8 weights with a scale",
    "blocks.0.ffn.0.weight_scale_inv": "is fp8 weights with a scale",
    "blocks.0.ffn.0.qweight": "is quantised weights",
    "blocks.0.ffn.0.weight_packed": "is quantised weights",
    "vace_blocks.0.before_proj.weight": "is VACE.*Wan2.1-T2V",
    "blocks.0.cross_attn.k_img.weight": "is an image-to-video.*Wan2.1-T2V",
    "img_emb.proj.0.weight": "is an image-to-video",
    "control_adapter.conv.weight": "is a transformer that is steered",
    "face_encoder.conv.weight": "is a transformer that is steered",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_what_is_not_built_here_is_named(key, tmp_path):
    """A student with one foreign tensor is said to be what that makes it, as a file of ComfyUI's,
    too."""
    for prefix in ("", "model.diffusion_model."):
        state = {prefix + k: v for k, v in (tiny_dit().state_dict() | {key: FP8}).items()}
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=f"a.safetensors {FOREIGN[key]}"):
            load_dit(tmp_path / "a.safetensors")


def test_wans_own_names_are_not_foreign():
    with torch.device("meta"):
        vae = VAE().state_dict()
    refuse_names("x", names_of_dit(40), "transformer")
    refuse_names("x", vae, "VAE")
    with pytest.raises(UserError, match="x is a VAE and not a transformer"):
        refuse_names("x", vae, "transformer")
    with pytest.raises(UserError, match="the VAE of Wan2.2"):
        refuse_names("x", ["encoder.downsamples.0.downsamples.0.residual.0.gamma", *vae], "VAE")
    refuse_pair(Path("low_noise_student.pt"))
    with pytest.raises(UserError, match="is of Wan2.2's 14B, one network for high noise"):
        refuse_pair(Path("wan2.2_t2v_high_noise_14B_fp8.safetensors"))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.safetensors", b"GGUF" + bytes(60), "is a GGUF file"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
        ("a.pth", b"\n<!DOCTYPE html><html>", "is a web page"),
        ("a.pt", b"\xef\xbb\xbf<!-- a page -->", "is a web page"),
        ("a.safetensors", b'{"error": "Repository not found"}', "is a text and not a checkpoint"),
        ("a.bin", b"", "is an empty file"),
    ],
)
def test_what_is_no_checkpoint_at_all(name, content, says, tmp_path):
    """Told by the first bytes, for the transformer and the VAE."""
    (tmp_path / name).write_bytes(content)
    for load in (load_dit, load_vae):
        with pytest.raises(UserError, match=f"{name} .*{says}"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "config, says",
    [
        ({"model_type": "i2v"}, "model_type is 'i2v'; only .*text-to-video"),
        ({"qk_norm": False}, "qk_norm is False"),
        ({"window_size": [3, 3]}, "window_size"),
        ({"recipe": [1]}, "recipe is .1., not an object"),
        ({"typo": 1}, "unknown field 'typo'"),
        ({"_class_name": "WanModel", "add_ref_conv": False}, None),
    ],
)
def test_a_config_that_means_another_network(config, says, tmp_path, capsys):
    """What would change the network is refused; fields of other projects that change no tensor are
    said, and left out."""
    ours = tiny_dit()
    save_file(ours.state_dict(), tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(asdict(ours.config) | config))
    if says is None:
        assert load_dit(tmp_path / "a.safetensors").config == ours.config
        assert "mean nothing here: add_ref_conv=False" in capsys.readouterr().out
        return
    with pytest.raises(UserError, match=says):
        load_dit(tmp_path / "a.safetensors")


def test_other_files_of_a_folder(tmp_path):
    """A variant (.fp16), a .bin, hidden files, states of a run, GGUF and Wan2.2's pair are each
    what they are."""
    ours = tiny_dit()
    config = json.dumps(asdict(ours.config))

    def folder(name, *files):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        for file in files:
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            if file.endswith(".gguf"):
                (tmp_path / name / file).write_bytes(b"GGUF")
            elif file.endswith(".safetensors"):
                save_file(
                    {k: v.half() for k, v in ours.state_dict().items()}, tmp_path / name / file
                )
            elif not file.startswith(".") and file.endswith((".pt", ".bin")):
                torch.save({"generator": ours.state_dict()}, tmp_path / name / file)
            else:
                (tmp_path / name / file).write_bytes(b"\0\5\26\7")
        return tmp_path / name

    for path in (
        folder("variant", "diffusion_pytorch_model.fp16.safetensors"),
        folder("bin", "diffusion_pytorch_model.bin"),
        folder("hidden", "._s.pt", "s.pt", ".s.77.tmp.pt", "state.pt", "state-000200.pt"),
        folder("comfy", "wan2.1_t2v.safetensors", "wan_2.1_vae.safetensors"),
    ):
        assert load_dit(path).config == ours.config
    for path, says in (
        (folder("gguf", "wan.gguf"), "wan.gguf is a GGUF file"),
        (folder("22", "high_noise_model/x", "low_noise_model/x"), "22 is of Wan2.2's 14B"),
        (folder("22b", "transformer/x", "transformer_2/x"), "22b is of Wan2.2's 14B"),
        (folder("state", "state.pt"), "holds no transformer"),
        (
            folder("two", "forward.safetensors", "backward.safetensors"),
            "several transformers .backward",
        ),
        (
            folder("shards", *(f"diffusion_pytorch_model-{n}-of-2.safetensors" for n in (1, 2))),
            "the index of these shards",
        ),
    ):
        with pytest.raises(UserError, match=says):
            load_dit(path)


def test_a_variant_is_taken_only_if_it_is_alone(tmp_path):
    """diffusers' repositories have a .fp16 beside the whole file."""
    for name in ("model.fp16.safetensors", "model.safetensors"):
        (tmp_path / name).touch()
        assert only_checkpoint(tmp_path).name == name


def test_settings_in_a_pickle_are_no_obstacle_and_code_is_named(tmp_path):
    """argparse.Namespace and numpy's numbers and arrays, which many scripts save along, are read;
    another class is refused by its name."""
    ours = tiny_dit()
    tree = {"model": ours.state_dict(), "config": asdict(ours.config)}
    for value in (argparse.Namespace(lr=1), np.float64(1.5), np.int64(3), np.random.get_state()):
        torch.save(tree | {"args": value}, tmp_path / "a.pt")
        assert same(load_dit(tmp_path / "a.pt").state_dict(), ours.state_dict())
    torch.save(tree | {"when": datetime.date(2025, 1, 1)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="b.pt .*datetime.date.*save its tensors alone"):
        load_dit(tmp_path / "b.pt")


def test_integers_are_no_weights(tmp_path):
    """int8 without its scales has the right names and shapes, and would make noise."""
    state = {k: v.to(torch.int8) for k, v in tiny_dit().state_dict().items()}
    write_safetensors(tmp_path / "a.safetensors", state, asdict(tiny_dit().config))
    with pytest.raises(UserError, match="patch_embedding.weight are torch.int8, quantised"):
        load_dit(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_a_network_with_nan_is_not_loaded(value, dtype, tmp_path):
    """One bad number among all weights: the tensor is named, and no picture comes of it."""
    state = tiny_dit().state_dict()
    state["blocks.1.ffn.0.weight"] = state["blocks.1.ffn.0.weight"].clone()
    state["blocks.1.ffn.0.weight"][3, 5] = value
    write_safetensors(tmp_path / "a.safetensors", state, asdict(tiny_dit().config))
    with pytest.raises(UserError, match="blocks.1.ffn.0.weight hold NaN or infinity"):
        load_dit(tmp_path / "a.safetensors", dtype)


# ---------------------------------------------------------------- LoRA
def lora_files(rank=3, alpha=6.0):
    """The same change in every spelling people have: name -> tensors; and the change itself, by
    Wan's name."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    layers = {
        "blocks.0.self_attn.q": (draw(rank, 48), draw(48, rank)),
        "blocks.1.ffn.2": (draw(rank, 96), draw(48, rank)),
    }
    change = {f"{k}.weight": alpha / rank * up @ down for k, (down, up) in layers.items()}
    theirs = {
        "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
        "blocks.1.ffn.2": "blocks.1.ffn.net.2",
    }
    files = {"kohya": {}, "kohya, dots": {}, "peft": {}, "diffusers": {}}
    for name, (down, up) in layers.items():
        half = up * alpha / rank  # for those that have no alpha
        flat = "lora_unet_" + name.replace(".", "_")
        dots = "diffusion_model." + name
        for file, stem in (("kohya", flat), ("kohya, dots", dots)):
            files[file] |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(alpha),
            }
        for file, stem, adapter in (
            ("peft", "base_model.model." + name, ".default"),
            ("diffusers", "transformer." + theirs[name], ""),
        ):
            files[file] |= {
                f"{stem}.lora_A{adapter}.weight": down,
                f"{stem}.lora_B{adapter}.weight": half,
            }
    critic = {k: torch.zeros_like(v) for k, v in files["peft"].items()}
    files["nested"] = {"generator_lora": files["peft"], "critic_lora": critic, "step": 3}
    files["plain alpha"] = {k: alpha if "alpha" in k else v for k, v in files["kohya"].items()}
    files["any prefix"] = {
        k.replace("diffusion_model", "a.b-c"): v for k, v in files["kohya, dots"].items()
    }
    files["whole"] = {
        f"diffusion_model.{k.removesuffix('.weight')}.diff": v for k, v in change.items()
    }
    return files, change


@pytest.mark.parametrize("name", lora_files()[0])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_lora_is_merged(name, scale, tmp_path, monkeypatch, capsys):
    """W + scale * alpha/r * B A in every spelling, and nothing else changes; the recipe stays."""
    files, change = lora_files()
    ours = tiny_dit(3)
    save_dit(ours, tmp_path / "base.safetensors", recipe=RECIPE)
    torch.save(files[name], tmp_path / "lora.pt")
    flags = {"weights": tmp_path / "base.safetensors", "merge_lora": tmp_path / "lora.pt"}
    out = tmp_path / "new.safetensors"
    done = command_line(monkeypatch, capsys, weights, **flags, scale=scale, out=out)
    assert done == (0, "")
    new, old = load_dit(out).state_dict(), ours.state_dict()
    assert read_recipe(out) == RECIPE
    for key, x in old.items():
        if key in change:
            assert distance(new[key], x + scale * change[key]) <= 1e-5
            assert distance(new[key], x) > 0.1
        else:
            assert torch.equal(new[key], x)


def test_whole_differences_of_norms_biases_and_modulations():
    """Wan LoRAs carry them as .diff, .diff_b and .diff_m."""
    state = tiny_dit(3).state_dict()
    keys = {
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.diff_m": "head.modulation",
        "blocks.0.modulation.diff": "blocks.0.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    change = {k: torch.full_like(state[name], 0.25) for k, name in keys.items()}
    new, count = lora.merge(state, {k: k for k in state}, change)
    assert count == 6
    for name, x in state.items():
        assert torch.equal(new[name], x + 0.25 if name in keys.values() else x), name


def test_alpha_beside_a_lora_counts(tmp_path):
    """peft's adapter_config.json, or diffusers' metadata in the file: alpha/r, or alpha/sqrt(r);
    and DoRA is refused."""
    x, file = {"a.lora_A.weight": torch.ones(4, 3)}, tmp_path / "adapter_model.safetensors"
    save_file(x, file, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2})})
    assert lora.settings(file) == Low(2, False)
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps({"lora_alpha": 8, "r": 4, "use_rslora": True}))
    assert lora.settings(file) == lora.settings(tmp_path) == Low(8, True)
    both = x | {"a.lora_B.weight": torch.ones(2, 4)}
    for low, factor in ((Low(8, True), 4), (Low(8), 2), (Low(), 1)):
        new, _ = lora.merge(
            {"a.weight": torch.zeros(2, 3)}, {"a.weight": "a.weight"}, both, 1.0, low
        )
        assert torch.equal(new["a.weight"], torch.full((2, 3), 4.0 * factor))
    beside.write_text(json.dumps({"lora_alpha": 8, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        lora.settings(file)


ADAPTER = {
    "blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48),
    "blocks.0.ffn.0.lora_B.weight": torch.zeros(96, 2),
}


@pytest.mark.parametrize(
    "tree, says",
    [
        ({"a.weight": torch.zeros(2)}, "holds no LoRA"),
        ({"text_model.q.lora_A.weight": torch.zeros(2)}, "1 keys match no weight: .*text encoder"),
        ({"vace_blocks.0.ffn.0.diff_b": torch.zeros(96)}, "no weight: vace_blocks.0.*VACE"),
        (ADAPTER | {"blocks.0.ffn.0.dora_scale": torch.zeros(96)}, "it is DoRA"),
        (ADAPTER | {"blocks.0.ffn.0.lora_magnitude_vector": torch.zeros(96)}, "it is DoRA"),
        ({"blocks.0.ffn.0.lokr_w1": torch.zeros(1), **ADAPTER}, "it is LoHa, LoKr"),
        (ADAPTER | {"blocks.9.ffn.0.diff": torch.zeros(1)}, "another model .of more layers"),
        (ADAPTER | {f"x.{k}": v for k, v in ADAPTER.items()}, "two down for .*two adapters"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48)}, "only down .*; both halves are due"),
        ({"blocks.0.ffn.0.diff_b": torch.zeros(48)}, "model of another size"),
        (
            {
                "blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 96),
                "blocks.0.ffn.0.lora_B.weight": torch.zeros(96, 2),
            },
            "model of another size",
        ),
        ({"blocks.0.ffn.0.diff_b": torch.full((96,), math.nan)}, "infinite or NaN"),
    ],
)
def test_a_lora_that_does_not_fit(tree, says, tmp_path, monkeypatch, capsys):
    """One sentence, and no file."""
    save_dit(tiny_dit(), tmp_path / "base.safetensors")
    torch.save(tree, tmp_path / "lora.pt")
    flags = {"weights": tmp_path / "base.safetensors", "merge_lora": tmp_path / "lora.pt"}
    out = tmp_path / "new.safetensors"
    code, error = command_line(monkeypatch, capsys, weights, **flags, out=out)
    assert code == 2 and re.search(says, error) and not out.exists()


def test_a_file_is_let_go_tensor_by_tensor(tmp_path):
    """Loading holds one source tensor at a time: each has a mapping of its own, no larger than
    itself, and leaves the dict."""
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


@pytest.mark.parametrize(
    "line",
    [
        "{}  student.safetensors",
        "{} *student.safetensors\r",
        "{}  ./student.safetensors",
        "{}  out/dmd/student.safetensors",
        "SHA256 (student.safetensors) = {}",
        "SHA256(./student.safetensors)= {}",
        "  sha256:{}  student.safetensors",
        "\ufeff{} student.safetensors",
        "{}",
    ],
)
def test_a_file_that_is_not_the_one_meant_is_refused(line, tmp_path, capsys):
    """SHA256SUMS beside a checkpoint is checked before it is used, however it is written; a file
    that it does not name loads, and that is said."""
    good = tmp_path / "student.safetensors"
    save_dit(tiny_dit(1), good)
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(line.format(digest.upper()) + "\n")
    other = tmp_path / "other.safetensors"
    save_dit(tiny_dit(2), other)
    assert load_dit(good) and not capsys.readouterr().out
    if "student" in line:
        assert load_dit(other)
        assert "SHA256SUMS has no SHA-256 of other.safetensors" in capsys.readouterr().out
    good.write_bytes(other.read_bytes())
    sums = tmp_path / "SHA256SUMS"
    names = "SHA256SUMS sha256sums.txt sha256sum.txt checksums.txt CHECKSUMS.sha256 sha256.txt"
    for name in (*names.split(), "student.safetensors.sha256", "student.sha256sum"):
        sums = sums.rename(tmp_path / name)
        with pytest.raises(UserError, match=f"student.safetensors is not .* that .*{name} names"):
            load_dit(good)
