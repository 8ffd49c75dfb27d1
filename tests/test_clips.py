"""Latents of real clips: a folder that is used again holds what a new one would, or is refused."""

import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny import tiny_checkpoints

from lib.clips import Clips
from lib.common import UserError
from lib.tensors import read_tensors
from lib.text import Prompts
from tools import encode
from toy import world
from vae import VAE, VAEConfig, save_vae

PROMPTS = {"a": "a red disc moves up over a blue wave", "b": "a cyan ring", "c": "a blue square"}


def write_video(path, seed, frames=24):
    pixels = np.random.default_rng(seed).random((frames, 32, 32, 3)) * 255
    iio.imwrite(path, pixels.astype(np.uint8), fps=16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny VAE and a folder of three videos with prompts."""
    folder = tmp_path_factory.mktemp("clips")
    vae = tiny_checkpoints(folder)["vae"]
    (folder / "videos").mkdir()
    for seed, (name, prompt) in enumerate(PROMPTS.items()):
        write_video(folder / "videos" / f"{name}.mp4", seed)
        (folder / "videos" / f"{name}.txt").write_text(prompt)
    return {"vae": vae, "data": str(folder / "videos"), "frames": 9, "size": (16, 16), "shard": 2}


@pytest.fixture
def again(source, tmp_path):
    """A copy of the videos, encoded."""
    shutil.copytree(source["data"], tmp_path / "videos")
    shutil.copy(source["vae"], tmp_path / "vae.safetensors")
    flags = {"data": str(tmp_path / "videos"), "vae": str(tmp_path / "vae.safetensors")}
    return encoded(source | flags | {"out": str(tmp_path / "latents")})


def encoded(flags):
    encode.encode(encode.Config(**flags))
    return flags


def latents(flags):
    """All latents of a folder, and what its prompts are."""
    where = sorted(encode.Path(flags["out"]).glob("latents-*"))
    prompts = (encode.Path(flags["out"]) / "prompts.txt").read_text()
    return torch.cat([read_tensors(path)[0]["latents"] for path in where]), prompts


def edit_clip(videos):
    write_video(videos / "b.mp4", 7)


def edit_prompt(videos):
    (videos / "c.txt").write_text("a green square")


def add_first(videos):
    write_video(videos / "aa.mp4", 8)
    (videos / "aa.txt").write_text("a new clip")


def remove(videos):
    (videos / "a.mp4").unlink()


@pytest.mark.parametrize(
    "edit, named", [(edit_clip, "b.mp4"), (edit_prompt, "c.mp4"), (add_first, ""), (remove, "")]
)
def test_edited_clips_are_made_again(edit, named, again, tmp_path, capsys):
    """Whatever was edited, added or removed: the folder equals one that is made anew, and what was
    not what it was is named."""
    capsys.readouterr()
    edit(tmp_path / "videos")
    try:
        encoded(again)
    except UserError as error:  # one shard too many
        assert edit is remove and "latents-000002.safetensors is not one of 2 clips" in str(error)
        return
    new = encoded(again | {"out": str(tmp_path / "new")})
    assert named in capsys.readouterr().out
    assert torch.equal(latents(again)[0], latents(new)[0]) and latents(again)[1] == latents(new)[1]


def test_what_is_right_stays(again, tmp_path, capsys):
    """A run again, or after files were only touched, encodes nothing; a new last clip itself."""
    first = tmp_path / "latents" / "latents-000000.safetensors"
    before = first.read_bytes(), first.stat().st_mtime_ns
    (tmp_path / "videos" / "a.mp4").touch()
    encoded(again)
    assert "fps" not in capsys.readouterr().out
    write_video(tmp_path / "videos" / "d.mp4", 9)
    (tmp_path / "videos" / "d.txt").write_text("the last")
    encoded(again)
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    said = capsys.readouterr().out
    assert "d.mp4: 32x32 to 16x16 (crop), the first 9 frames" in said
    assert "made again" not in said and len(latents(again)[0]) == 4


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"frames": 17}, r"another frames \(9, now 17\)"),
        ({"size": (32, 32)}, r"another size \(\[16, 16\], now \[32, 32\]\)"),
        ({"data": "toy", "clips": 3}, r"another data \(files, now toy "),
        ({"shard": 3}, "latents-000002.safetensors is not one of 3 clips in shards of 3"),
    ],
)
def test_other_settings_are_refused_by_name(changes, says, again):
    """Nothing of another length, size, source or number of clips a shard is taken."""
    before = latents(again)
    with pytest.raises(UserError, match=says):
        encoded(again | changes)
    assert torch.equal(latents(again)[0], before[0])


def test_another_vae_under_the_same_name_is_refused(again, tmp_path):
    """The VAE is known by its weights: retrained in place, or the same one elsewhere."""
    shutil.move(tmp_path / "vae.safetensors", tmp_path / "moved.safetensors")
    encoded(again | {"vae": str(tmp_path / "moved.safetensors")})
    torch.manual_seed(3)
    vae = VAE(VAEConfig(dim=4, z_dim=2, num_res_blocks=1))
    save_vae(vae, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="was made with another vae"):
        encoded(again)


def test_another_world_is_refused(source, tmp_path, monkeypatch):
    """The toy world's clips are known by how it draws them, not by their captions alone."""
    flags = source | {"data": "toy", "clips": 2, "out": str(tmp_path)}
    encoded(flags)
    draw = world.render
    monkeypatch.setattr(world, "render", lambda *args: draw(*args) * 0.9)
    with pytest.raises(UserError, match="was made with another data"):
        encoded(flags)


def test_bad_clips_are_named_or_skipped(source, tmp_path, capsys):
    """A short, a broken and a promptless clip stop a run by name; with --skip_bad they are left out
    by name, and numbers and prompts are those of the rest. Hidden files are never clips."""
    videos = tmp_path / "videos"
    shutil.copytree(source["data"], videos)
    write_video(videos / "0short.mp4", 1, frames=4)
    (videos / "b0broken.mp4").write_bytes((videos / "b.mp4").read_bytes()[:200])
    write_video(videos / "z.mp4", 2)
    for name in ("0short", "b0broken"):
        (videos / f"{name}.txt").write_text("bad")
    (videos / "._a.mp4").write_bytes(b"not a clip")
    flags = source | {"data": str(videos), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match="z.mp4 has no prompt"):
        encoded(flags)
    (videos / "z.txt").write_text("last")
    with pytest.raises(UserError, match="0short.mp4 has 4 frames"):
        encoded(flags)
    (videos / "z.txt").unlink()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    encoded(flags | {"skip_bad": True})
    said = capsys.readouterr().out
    for name in ("0short.mp4 has 4", "b0broken.mp4 cannot be read", "z.mp4 has no prompt"):
        assert f"skipped: {videos / name}" in said
    good = encoded(source | {"out": str(tmp_path / "good")})
    assert torch.equal(latents(flags)[0], latents(good)[0])
    assert latents(flags)[1].splitlines() == list(PROMPTS.values())


def test_a_vae_of_nan_is_named(source, tmp_path):
    """Numbers that are not finite are never written; the clip is named."""
    bad = VAE(VAEConfig(dim=4, z_dim=2, num_res_blocks=1))
    torch.nn.init.constant_(bad.conv1.bias, 1e35)  # finite, but not in float16
    save_vae(bad, tmp_path / "vae.safetensors")
    flags = source | {"vae": str(tmp_path / "vae.safetensors"), "out": str(tmp_path / "out")}
    with pytest.raises(FloatingPointError, match="the VAE makes of a.mp4 what is not finite"):
        encoded(flags)
    assert not list((tmp_path / "out").glob("*"))


def test_clips_are_known_by_what_they_are(again, tmp_path):
    """What is said of them follows the clips, not the folder; every prompt is compared, not only
    the first of a shard; a folder whose encoding was not finished is refused."""

    def read(folder):
        prompts = Prompts(str(folder / "prompts.txt"), 64, 12)
        return Clips(str(folder), (3, 2, 2), 2, prompts)

    folder, copy = tmp_path / "latents", tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert read(folder).made_of == read(copy).made_of and len(read(copy)) == 3
    edit_prompt(tmp_path / "videos")
    encoded(again)
    assert read(folder).made_of != read(copy).made_of
    (copy / "prompts.txt").write_text("\n".join([PROMPTS["a"], "other", PROMPTS["c"]]) + "\n")
    with pytest.raises(UserError, match="clip 1, in .* shows 'a cyan ring', but prompt 1"):
        read(copy)
    prompts = Prompts(str(folder / "prompts.txt"), 64, 12)
    (folder / "prompts.txt").unlink()
    with pytest.raises(UserError, match="holds 3 clips but no lines of prompts.txt"):
        Clips(str(folder), (3, 2, 2), 2, prompts)
