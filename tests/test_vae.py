"""The VAE is Wan2.1's, causal, streams exactly and in constant memory, and says what is wrong with
its input."""

import json
import math
import os
import pathlib
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import anchors
from generate import decode_in_order
from lib.common import UserError, generator
from lib.media import VideoWriter, read_frames
from lib.tensors import write_safetensors
from vae import PRESETS, VAE, WAN_MEAN, WAN_STD, VAEConfig, load_vae, save_vae

REPO = pathlib.Path(__file__).parent.parent
TINY = VAEConfig(
    dim=4, z_dim=4, num_res_blocks=1, mean=(0.1, -0.2, 0.3, -0.4), std=(0.8, 1.1, 1.3, 0.9)
)


@torch.no_grad()
def randomise(model, seed=0):
    """Random weights that keep activations O(1) and leave neither the attention nor the norms at
    their identity."""
    g = generator(seed)
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            p.uniform_(0.5, 1.5, generator=g)
        else:
            p.normal_(std=0.1 if name.endswith("bias") else p[0].numel() ** -0.5, generator=g)
        if name in ("decoder.head.2.weight", "decoder.conv_out.weight"):
            p.mul_(0.4)  # pixels stay within the clamp
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    return randomise(VAE(TINY))


def video(latents=4, batch=1, height=16, width=24, seed=1, time=4):
    return (
        torch.rand(batch, 3, 1 + time * (latents - 1), height, width, generator=generator(seed)) * 2
        - 1
    )


def latents(count=4, batch=1, height=2, width=3, seed=2, channels=4):
    return torch.randn(batch, count, channels, height, width, generator=generator(seed))


def stream(step, parts, state=None):
    """Outputs of `step` over the parts, and the last state."""
    out = []
    for part in parts:
        y, state = step(part, state)
        out.append(y)
    return out, state


def frame_parts(x, sizes):
    """Cut a video where chunks of so many latents end."""
    return x.split([4 * s - 3 * (i == 0) for i, s in enumerate(sizes)], dim=2)


def close(a, b, atol=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= atol


# ---------------------------------------------------------------- it is Wan's VAE
@pytest.mark.parametrize(
    "config, batch, height, width",
    [
        (dict(base_dim=8, z_dim=4), 1, 16, 24),
        (dict(base_dim=8, z_dim=4), 2, 32, 16),
        (
            dict(base_dim=4, z_dim=6, num_res_blocks=1, temperal_downsample=[True, False, True]),
            1,
            24,
            32,
        ),
        (
            dict(
                base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]
            ),
            2,
            12,
            20,
        ),
    ],
)
def test_equals_diffusers(tmp_path, config, batch, height, width):
    """A diffusers folder loads, and encoding and decoding agree with diffusers to 1e-5,
    normalisation included."""
    from diffusers import AutoencoderKLWan

    n = config["z_dim"]
    mean, std = torch.linspace(-1, 1.5, n), torch.linspace(0.6, 1.7, n)
    theirs = randomise(
        AutoencoderKLWan(**config, latents_mean=mean.tolist(), latents_std=std.tolist()),
        seed=n + height,
    )
    theirs.save_pretrained(tmp_path)
    ours = load_vae(tmp_path)
    mean, std = mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)

    x = video(3, batch, height, width)
    z = ((theirs.encode(x).latent_dist.mode() - mean) / std).transpose(1, 2)
    assert z.shape[1:3] == (1 + 8 // ours.config.time, n) and 0.2 < z.std() < 3
    close(ours.encode(x), z)

    noise = torch.randn(z.shape, generator=generator(3))
    y = theirs.decode(noise.transpose(1, 2) * std + mean).sample
    assert (
        y.shape == x.shape and y.std() > 0.1 and (y.abs() == 1).float().mean() < 0.01
    )  # not saturated by the clamp
    close(ours.decode(noise), y)


def test_default_is_wan21():
    """The default config has Wan2.1's size and tensor names, and its latent statistics."""
    with torch.device("meta"):
        vae = VAE()
    names = set(vae.state_dict())
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531 and len(names) == 194
    assert (vae.config.mean, vae.config.std) == (WAN_MEAN, WAN_STD)
    assert (vae.config.space, vae.config.time, vae.config.frames(21)) == (8, 4, 81)

    def holds(part, places):  # the places of `stages` that have this part
        return {
            int(k.split(".")[2])
            for k in names
            if k.startswith(part.split("*")[0]) and part.split("*")[1] in k
        } == set(places)

    assert holds("encoder.downsamples.*.residual.6.weight", [0, 1, 3, 4, 6, 7, 9, 10])
    assert holds("encoder.downsamples.*.shortcut.bias", [3, 6])
    assert holds("encoder.downsamples.*.resample.1.weight", [2, 5, 8]) and holds(
        "encoder.downsamples.*.time_conv.weight", [5, 8]
    )
    assert holds("decoder.upsamples.*.residual.3.gamma", [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14])
    assert holds("decoder.upsamples.*.shortcut.weight", [4])
    assert holds("decoder.upsamples.*.resample.1.bias", [3, 7, 11]) and holds(
        "decoder.upsamples.*.time_conv.bias", [3, 7]
    )
    for coder in ("encoder", "decoder"):
        assert {
            f"{coder}.{k}"
            for k in (
                "conv1.weight",
                "middle.0.residual.0.gamma",
                "middle.2.residual.2.bias",
                "middle.1.norm.gamma",
                "middle.1.to_qkv.weight",
                "middle.1.proj.bias",
                "head.0.gamma",
                "head.2.weight",
            )
        } <= names
    assert {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"} <= names


def test_wan_pth_loads_beside_a_transformer_config(tmp_path):
    """`Wan2.1_VAE.pth` loads by its native names at full size; the config.json beside it is not its
    own."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in VAE().state_dict().items()}
    torch.save(
        {k: torch.full((), 0.25).expand(s) for k, s in shapes.items()}, tmp_path / "Wan2.1_VAE.pth"
    )  # one number each
    (tmp_path / "config.json").write_text(
        json.dumps({"dim": 1536, "model_type": "t2v", "num_layers": 30})
    )
    for path in (tmp_path, tmp_path / "Wan2.1_VAE.pth"):
        loaded = load_vae(path)
        assert loaded.config == VAEConfig()
        assert all((p == 0.25).all() for p in (loaded.conv2.weight, loaded.decoder.head["2"].bias))


# ---------------------------------------------------------------- streams
@pytest.mark.parametrize("sizes", [(1,) * 6, (2,) * 3, (3, 3), (6,), (1, 3, 2)])
def test_streaming_equals_whole(vae, sizes):
    """Latents and pixels do not depend on where the stream is cut; `encode` and `decode` agree with
    it."""
    x, z = video(6), latents(6)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (TINY.mean, TINY.std))
    whole_z = (vae.moments(x)[0].transpose(1, 2) - mean) / std  # no state at all
    whole_x = vae.decoder(vae.conv2((z * std + mean).transpose(1, 2)), None).clamp(-1, 1)
    assert (
        whole_z.std() > 0.2 and whole_x.std() > 0.1 and (whole_x.abs() == 1).float().mean() < 0.01
    )
    close(torch.cat(stream(vae.encode_chunk, frame_parts(x, sizes))[0], dim=1), whole_z)
    close(torch.cat(stream(vae.decode_chunk, z.split(sizes, dim=1))[0], dim=2), whole_x)
    close(vae.encode(x, chunk=sizes[0]), whole_z)
    close(vae.decode(z, chunk=sizes[0]), whole_x)


def test_channels_stay_innermost(vae, monkeypatch):
    """Between two convolutions nothing is laid out anew: only what comes in from outside, and a
    stream's zeros."""
    real, laid = torch.Tensor.contiguous, []

    def contiguous(x, **how):
        y = real(x, **how)
        laid.extend([x.shape] if how and y.data_ptr() != x.data_ptr() else [])
        return y

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    x, z = video(9), latents(9)
    for chunk in (1, 3):
        vae.encode(x, chunk), vae.decode(z, chunk)
    assert laid and all(shape[2] <= 2 or shape[1] in (3, z.shape[2]) for shape in laid)


def test_large_frames_pass_one_by_one(vae, monkeypatch):
    """Above a size the stages at pixels' rate take single frames: the same output, no such stage
    sees two, and a state that may be changed in place is."""
    x, z = video(5), latents(5)
    plain = vae.encode(x), vae.decode(z)
    seen, real = [], sys.modules["vae"].conv3d
    monkeypatch.setattr("vae.LARGE", 0)
    monkeypatch.setattr(
        "vae.conv3d",
        lambda y, *args, **kwargs: (seen.append(y.shape[2:]), real(y, *args, **kwargs))[1],
    )
    assert vae.at_once(2, 3) == 1
    close(vae.encode(x, chunk=2), plain[0])
    close(vae.decode(z, chunk=2), plain[1])
    assert {s[0] for s in seen if s[1:] == (16, 24)} == {1, 3} and max(
        s[0] for s in seen
    ) > 4  # one frame, or with two of the past
    for step, (a, b, _), _ in both(vae):
        _, state = step(a)
        out, after = step(b, dict(state))
        used, then = step(b, state, inplace=True)
        assert (
            then is state
            and torch.equal(used, out)
            and all(torch.equal(then[k], v) for k, v in after.items())
        )


def both(vae):
    """(step, parts of a stream, parts of another stream) for decoding and encoding."""
    yield (
        vae.decode_chunk,
        latents(5).split((2, 1, 2), dim=1),
        latents(5, seed=7).split((1, 2, 2), dim=1),
    )
    yield (
        vae.encode_chunk,
        frame_parts(video(5), (2, 1, 2)),
        frame_parts(video(5, seed=7), (1, 2, 2)),
    )


def test_interleaved_streams_do_not_disturb_each_other(vae):
    """The memory of a stream is in its state alone: two streams through one module stay two
    streams."""
    for step, first, second in both(vae):
        alone = [stream(step, first)[0], stream(step, second)[0]]
        mixed, states = ([], []), [None, None]
        for pair in zip(first, second):
            for i, part in enumerate(pair):
                y, states[i] = step(part, states[i])
                mixed[i].append(y)
        assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(alone[i], mixed[i]))


def test_state_is_a_value(vae):
    """A state can be continued from twice: no call changes it, its other arguments or the
    module."""
    before = pickle.dumps(vae)
    for step, (a, b, c), _ in both(vae):
        _, state = step(a)
        kept_state, kept_b = {k: v.clone() for k, v in state.items()}, b.clone()
        once = stream(step, [b, c], state)[0]
        again = stream(step, [b, c], state)[0]
        assert all(torch.equal(p, q) for p, q in zip(once, again))
        assert state.keys() == kept_state.keys() and all(
            torch.equal(state[k], v) for k, v in kept_state.items()
        )
        assert torch.equal(b, kept_b)
        assert not torch.equal(
            once[0], step(b, step(a.flip(2))[1])[0]
        )  # and it matters: another past, another result
    assert pickle.dumps(vae) == before


def test_state_does_not_alias_the_input(vae):
    """A caller may reuse the buffer it passed."""
    for step, (a, b, _), _ in both(vae):
        expected = stream(step, [a, b])[0][1]
        buffer = a.clone()
        _, state = step(buffer)
        buffer.zero_()
        assert torch.equal(step(b, state)[0], expected)


def test_state_does_not_grow_with_the_chunk(vae):
    """A state holds at most two frames of each layer and keeps nothing else alive, however long the
    chunk was."""
    for step, chunks in (
        (vae.decode_chunk, latents(7).split((3, 4), dim=1)),
        (vae.encode_chunk, frame_parts(video(7), (3, 4))),
    ):
        for state in (stream(step, chunks[:1])[1], stream(step, chunks)[1]):
            assert all(v.untyped_storage().nbytes() == v.nbytes for v in state.values())
            assert max(v.shape[2] for v in state.values() if v.ndim) == 2


def test_batch_equals_its_clips(vae):
    """Clips of a batch do not see each other."""
    x, z = video(3, batch=2), latents(3, batch=2)
    close(vae.encode(x), torch.cat([vae.encode(v) for v in x.split(1)]))
    close(vae.decode(z), torch.cat([vae.decode(v) for v in z.split(1)]))


# ---------------------------------------------------------------- causality
@pytest.mark.parametrize("chunk", [2, 9])
@pytest.mark.parametrize("i", range(4))
def test_latent_sees_frames_up_to_4i(vae, i, chunk):
    """Latent i is bit-identical whatever the frames after 4i hold, and it does see frame 4i."""
    x = video(5)
    later, last = x.clone(), x.clone()
    later[:, :, 4 * i + 1 :] = -x[:, :, 4 * i + 1 :]
    last[:, :, 4 * i] = -x[:, :, 4 * i]
    a, b, c = (vae.encode(v, chunk) for v in (x, later, last))
    assert torch.equal(a[:, : i + 1], b[:, : i + 1])
    assert not torch.equal(a[:, i + 1], b[:, i + 1])
    assert torch.equal(a[:, :i], c[:, :i]) and not torch.equal(a[:, i], c[:, i])


@pytest.mark.parametrize("chunk", [2, 9])
@pytest.mark.parametrize("i", range(1, 4))
def test_latent_i_holds_frames_from_4i_minus_3(vae, i, chunk):
    """Latent i reaches no frame before 4i-3, reaches that one, and the decoder carries it into the
    next latents' frames."""
    z = latents(5)
    other = z.clone()
    other[:, i] = -z[:, i]
    a, b = vae.decode(z, chunk), vae.decode(other, chunk)
    assert torch.equal(a[:, :, : 4 * i - 3], b[:, :, : 4 * i - 3])
    changed = (a != b).any(dim=(0, 1, 3, 4)).tolist()
    assert changed == [False] * (4 * i - 3) + [True] * (
        17 - (4 * i - 3)
    )  # its own four frames, and the past reaches on


def test_image_latent_is_frame_0_alone(vae):
    """One frame makes one latent and back, the same as when a video follows."""
    x, z = video(4), latents(4)
    close(vae.encode(x[:, :, :1]), vae.encode(x)[:, :1])
    close(vae.decode(z[:, :1]), vae.decode(z)[:, :, :1])


# ---------------------------------------------------------------- constant memory
class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made within the block that are still alive; `peak` is their maximum
    after any operation."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage() not in self.known:
                storage, size = t.untyped_storage(), t.untyped_storage().nbytes()
                self.known.add(storage)
                self.live += size
                weakref.finalize(storage, self.free, size)
        self.peak = max(self.peak, self.live)
        return out

    def free(self, size):
        self.live -= size


def peak(chunks, keep=False):
    with torch.no_grad(), LiveBytes() as meter:
        chunks = chunks()
        held = list(chunks) if keep else sum(1 for _ in chunks)
    del held
    return meter.peak


def decoding(toy, count):
    plan = anchors.long(count, "forward", block=4)
    finished = (
        (n, torch.randn(1, len(step.targets), 16, 4, 4)) for n, step in enumerate(plan.steps)
    )
    return lambda: decode_in_order(toy, plan, finished, chunk=4)


def encoding(toy, count):
    def run():
        state = None
        for i in range(0, count, 4):
            z, state = toy.encode_chunk(torch.rand(1, 3, 16 if i else 13, 32, 32), state)
            yield z

    return run


def test_memory_of_streaming_is_constant():
    """Peak tensor memory of 400 latents is that of 40, decoding (as the sampler does) and
    encoding."""
    toy = VAE(PRESETS["toy"]).eval()
    for work in (decoding, encoding):
        assert peak(work(toy, 400)) <= 1.1 * peak(work(toy, 40))
    assert peak(decoding(toy, 40), keep=True) > 1.1 * peak(
        decoding(toy, 40)
    )  # the meter would see chunks that are kept


# ---------------------------------------------------------------- files
@pytest.fixture
def folder(tmp_path, vae):
    """(path, tensors) of a saved tiny VAE."""
    save_vae(vae, tmp_path / "vae.safetensors")
    return tmp_path, {k: v.clone() for k, v in vae.state_dict().items()}


def message(path):
    with pytest.raises(UserError) as error:
        load_vae(path)
    return str(error.value)


def test_save_and_load_is_exact(folder, vae):
    """Config and tensors come back bit for bit, from the file and from its folder; dtype casts
    them."""
    for path in (folder[0], folder[0] / "vae.safetensors"):
        back = load_vae(path)
        assert back.config == TINY and back.state_dict().keys() == vae.state_dict().keys()
        assert all(torch.equal(v, back.state_dict()[k]) for k, v in vae.state_dict().items())
        assert not back.training and not any(p.requires_grad for p in back.parameters())
    half = load_vae(folder[0], dtype=torch.bfloat16)
    assert all(torch.equal(v.bfloat16(), half.state_dict()[k]) for k, v in vae.state_dict().items())
    assert half.decode(half.encode(video(2))).dtype == torch.float32


def test_config_json_beside_the_file_is_read(folder):
    """A native safetensors file without metadata takes its config from config.json, lists being
    tuples."""
    from safetensors.torch import save_file

    path, tensors = folder
    save_file(tensors, path / "vae.safetensors")
    (path / "config.json").write_text(json.dumps(dict(vars(TINY), _note="ignored")))
    assert load_vae(path).config == TINY
    (path / "config.json").write_text(json.dumps(dict(vars(TINY), z_dims=4)))
    assert "z_dims" in message(path)


def test_all_wrong_tensors_are_named_at_once(folder):
    """Missing, unexpected and wrongly shaped tensors are in one sentence, with both shapes."""
    path, tensors = folder
    del tensors["decoder.conv1.bias"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["conv2.weight"] = torch.zeros(4, 5, 1, 1, 1)
    write_safetensors(path / "vae.safetensors", tensors, vars(TINY))
    text = message(path)
    assert text.count("\n") == 0 and str(path / "vae.safetensors") in text
    assert "missing 1 (decoder.conv1.bias)" in text and "unexpected 1 (extra.weight)" in text
    assert "wrong shape 1 (conv2.weight is (4, 5, 1, 1, 1) but should be (4, 4, 1, 1, 1))" in text


def test_native_pth_of_another_size_is_refused(folder):
    """A .pth holds no config and is taken for Wan2.1's; a smaller one is refused with the
    shapes."""
    path, tensors = folder
    torch.save(tensors, path / "small.pth")
    assert "wrong shape" in message(path / "small.pth") and "(96, 3, 3, 3, 3)" in message(
        path / "small.pth"
    )


@pytest.mark.parametrize(
    "name, damage",
    [
        ("vae.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1])),
        ("vae.safetensors", lambda p: p.write_bytes(p.read_bytes()[:100])),
        ("vae.safetensors", lambda p: p.write_bytes(b"")),
        ("vae.pth", lambda p: p.write_bytes(bytes(range(256)) * 8)),
        ("vae.pth", lambda p: p.write_bytes(b"")),
        ("vae.pth", lambda p: torch.save(torch.zeros(3), p)),
        (
            "vae.pth",
            lambda p: (torch.save({"a": torch.zeros(999)}, p), p.write_bytes(p.read_bytes()[:-50])),
        ),
        ("config.json", lambda p: p.write_text("{")),
        ("missing.safetensors", lambda p: None),
    ],
)
def test_damaged_file_is_a_user_error_naming_it(folder, name, damage):
    """Truncated, empty, garbage and absent files never give another error than UserError."""
    path = folder[0]
    damage(path / name)
    assert name in message(path / ("vae.safetensors" if name == "config.json" else name))


def test_something_else_is_refused(tmp_path):
    """A LoRA, a transformer, a dictionary of dictionaries and an empty folder are refused, not half
    loaded."""
    for name, tree, words in (
        ("lora.pth", {"lora.down": torch.zeros(2, 2)}, "is a LoRA"),
        ("dit.pth", {"patch_embedding.weight": torch.zeros(2)}, "is a transformer and not a VAE"),
        (
            "train.pth",
            {"generator": {"w": torch.zeros(2)}, "step": 3},
            "2 entries, the first is 'generator'",
        ),
    ):
        torch.save(tree, tmp_path / name)
        assert name in message(tmp_path / name) and words in message(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert "Wan2.1_VAE.pth" in message(tmp_path / "empty")


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_does_not_run(tmp_path, zipped):
    """A .pth may come from anywhere: code in it is not run."""
    torch.save(
        {"conv1.weight": Hostile(tmp_path / "touched")},
        tmp_path / "vae.pth",
        _use_new_zipfile_serialization=zipped,
    )
    assert "weights_only" in message(tmp_path / "vae.pth")
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "vae.pth", weights_only=False)
    assert (tmp_path / "touched").exists()  # it would have


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 3, 7, 16, 16), ["7 frames is not 1 + 4k", "5 or 9"]),
        ((1, 3, 4, 16, 16), ["4 frames", "1 or 5"]),
        ((1, 3, 0, 16, 16), ["0 frames", "1 or 5"]),
        ((1, 3, 5, 18, 16), ["18x16 is not divisible by 8", "16x16"]),
        ((1, 3, 5, 16, 31), ["16x31 is not divisible by 8", "16x24"]),
        ((1, 4, 5, 16, 16), ["(1, 4, 5, 16, 16)", "3 colour channels"]),
        ((3, 5, 16, 16), ["(3, 5, 16, 16)", "[B, 3, F, H, W]"]),
    ],
)
def test_encode_names_what_is_wrong(vae, shape, words):
    """The message has the offending numbers and, for a length or a size, the ones that work."""
    for encode in (vae.encode, vae.encode_chunk):
        with pytest.raises(UserError) as error:
            encode(torch.zeros(shape))
        assert all(w in str(error.value) for w in words)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_encode_refuses_nan(vae, value):
    """One bad pixel in the last frame is found before anything is computed from it."""
    x = video(2)
    x[0, 1, 4, 3, 5] = value
    with pytest.raises(UserError, match="NaN"):
        vae.encode(x)


def test_too_small_frames_are_not_told_to_vanish(vae):
    """The advice for a frame smaller than a cell is not a crop to nothing."""
    with pytest.raises(UserError, match="4x16") as error:
        vae.encode(torch.zeros(1, 3, 1, 4, 16))
    assert "0x16" not in str(error.value)


def test_stream_continues_with_whole_latents(vae):
    """Later chunks hold 4k frames; 1 + 4k is only for the start."""
    _, state = vae.encode_chunk(video(1))
    with pytest.raises(UserError, match="5 frames is not 4k; use 4 or 8"):
        vae.encode_chunk(video(2), state)


@pytest.mark.parametrize("shape", [(1, 2, 5, 2, 2), (1, 4, 2, 2)])
def test_decode_names_the_wrong_shape(vae, shape):
    """Latents of another VAE are refused with both channel counts."""
    with pytest.raises(UserError) as error:
        vae.decode_chunk(torch.zeros(shape))
    assert str(shape) in str(error.value) and "[B, T, 4, h, w]" in str(error.value)


# ---------------------------------------------------------------- command line
def clip(path, frames=5, height=16, width=24):
    with VideoWriter(path) as writer:
        writer.write(torch.rand(3, frames, height, width, generator=generator(5)) * 2 - 1)


def cli(folder, *flags):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.reconstruct",
            "--weights",
            folder / "vae.safetensors",
            "--device",
            "cpu",
            *map(str, flags),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        timeout=60,
    )


def test_cli_reconstructs_a_clip(folder):
    """The command writes a clip of the same length and size, and prints the PSNR it has."""
    path, _ = folder
    clip(path / "in.gif", frames=9)
    done = cli(path, "--clip", "in.gif", "--out", "made/out.mp4")
    assert done.returncode == 0, done.stderr
    shape = read_frames(path / "made" / "out.mp4").shape
    assert shape == (1, 3, 9, 16, 24) and os.listdir(path / "made") == ["out.mp4"]
    x = read_frames(path / "in.gif")
    made = load_vae(path).decode(load_vae(path).encode(x))
    psnr = -10 * ((made - x).square().mean() / 4).log10()
    assert f"9 frames -> 3 latents of (4, 2, 3) -> made/out.mp4, PSNR {psnr:.2f} dB" in done.stdout


@pytest.mark.parametrize(
    "name, make, words",
    [
        ("absent.mp4", lambda p: None, "absent.mp4 does not exist"),
        (
            "text.mp4",
            lambda p: p.write_text("not a video\n" * 50),
            "text.mp4 cannot be read as a video",
        ),
        ("short.gif", lambda p: clip(p, frames=4), "4 frames is not 1 + 4k; use 1 or 5"),
        ("odd.gif", lambda p: clip(p, height=15), "15x24 is not divisible by 8"),
    ],
)
def test_cli_error_is_one_line_and_leaves_no_file(folder, name, make, words):
    """A bad clip gives exit code 2, one line of error, and neither an output nor a temporary
    file."""
    path, _ = folder
    make(path / name)
    before = sorted(path.rglob("*"))
    done = cli(path, "--clip", name, "--out", "out.mp4")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and words in done.stderr
    )
    assert sorted(path.rglob("*")) == before
