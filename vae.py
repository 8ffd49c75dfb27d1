"""The Wan2.1 causal 3D VAE: video <-> latents, whole or as a stream.

Every temporal convolution looks only at the past (left padding), so latent i depends on frames 0 .. 4i and frame f on
latents 0 .. ceil(f/4), and on nothing later. Latent 0 is the *image latent*: it holds frame 0 alone; latent i >= 1
holds frames 4i-3 .. 4i. Hence F = 1 + 4 (T - 1) frames for T latents. That the decoder reads the past of a latent is
why naive backward generation flickers (paper Sec. 4.1), and why UniTemp needs anchors.

Causality also makes streaming exact. What a convolution must remember between two chunks is its last two input frames.
This memory is the `state`, an explicit value: `decode_chunk(z, state) -> (video, new_state)` changes neither its
arguments nor the module, so streams interleave and a state can be kept to continue from it twice.

Module and parameter names are Wan's own, so `Wan2.1_VAE.pth` loads as it is [Wan]. It does not sample: `encode`
returns the posterior mean.

    python vae.py --clip in.mp4 --out reconstruction.mp4 --weights Wan2.1-T2V-1.3B
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lib.common import UserError, run, start
from lib.cpu import conv3d, linear
from lib.media import VideoWriter, read_frames
from lib.weights import config_from, load_strict, read_vae, within, write_safetensors

WAN_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,  # [Wan] of its 16 latent channels
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
WAN_STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)


@dataclass(frozen=True)
class VAEConfig:
    """Defaults are Wan2.1's: 126,892,531 parameters in 194 tensors, 8x in space, 4x in time."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[
        float, ...
    ] = ()  # per-channel mean and std of the latents; empty: Wan's if z_dim = 16, else 0 and 1
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        within(self, "VAE", dim=4096, z_dim=1024, dim_mult=64, num_res_blocks=16)
        if not 1 <= len(self.dim_mult) <= 8:
            raise UserError(f"the VAE config's dim_mult {self.dim_mult} must have 1 to 8 numbers")
        wan = self.z_dim == len(WAN_MEAN)
        for name, default in (
            ("mean", WAN_MEAN if wan else (0.0,) * self.z_dim),
            ("std", WAN_STD if wan else (1.0,) * self.z_dim),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, default)
            if len(getattr(self, name)) != self.z_dim:
                raise UserError(
                    f"the VAE config's {name} has {len(getattr(self, name))} numbers but z_dim is {self.z_dim}"
                )
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"temporal_downsample {self.temporal_downsample} needs one entry less than dim_mult {self.dim_mult}"
            )

    @property
    def space(self) -> int:
        """Pixels per latent cell along height and width."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def time(self) -> int:
        """Frames per latent, except for latent 0, which is one frame."""
        return 2 ** sum(self.temporal_downsample)

    def frames(self, latents: int) -> int:
        """21 latents -> 81 frames."""
        return 1 + self.time * (latents - 1)

    def latents(self, frames: int) -> int:
        """81 frames -> 21 latents."""
        return 1 + (frames - 1) // self.time


PRESETS = {"wan": VAEConfig(), "toy": VAEConfig(dim=16, z_dim=16, num_res_blocks=1)}  # toy [ours]
LAYOUT = (
    torch.channels_last_3d
)  # channels innermost: the norm over channels, else as dear as a convolution, becomes cheap
LARGE = (
    2**14
)  # [ours] cells a frame (128 x 128) from which memory counts more than the overhead of small steps
State = dict  # module -> what it remembers of the stream: tensors [B, C, 1 or 2, H, W]


class CausalConv3d(nn.Conv3d):
    """A convolution padded in time on the left only: by zeros at the start, by remembered frames later."""

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        keep = self.kernel_size[0] - 1
        if keep:
            past = state.get(self) if state is not None else None
            if past is None:
                past = x.new_zeros(*x.shape[:2], keep, *x.shape[3:]).contiguous(
                    memory_format=LAYOUT
                )
            x = torch.cat([past, x], dim=2)  # (B, C, keep + T, H, W)
            if state is not None:
                state[self] = x[:, :, -keep:].clone(memory_format=LAYOUT)
        x = x.contiguous(memory_format=LAYOUT)
        space = (0, self.kernel_size[1] // 2, self.kernel_size[2] // 2)
        return conv3d(x, self.weight, self.bias, self.stride, space)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over channels: no mean, no bias. `per_frame` is only the shape of the stored gamma."""

    def __init__(self, dim: int, per_frame: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1) if per_frame else torch.ones(dim, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(
            1e-12
        )
        x, gamma = x * (x.shape[1] ** 0.5 / length).to(x.dtype), self.gamma.view(-1, 1, 1, 1)
        return (
            x * gamma if torch.is_grad_enabled() else x.mul_(gamma)
        )  # in place: one pass through memory less


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) of any shape [...], in place where no gradient asks for x."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))); the digits are the places in Wan's nn.Sequential."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(dim_in),
                "2": CausalConv3d(dim_in, dim_out, 3),
                "3": RMSNorm(dim_out),
                "6": CausalConv3d(dim_out, dim_out, 3),
            }
        )
        self.shortcut = CausalConv3d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        r = self.residual
        h = r["2"](silu(r["0"](x)), state)
        return r["6"](silu(r["3"](h)), state) + self.shortcut(x)


class Attention(nn.Module):
    """Single-head self-attention within each frame; it never mixes time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, per_frame=True)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)  # [Wan] starts as the identity

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        B, C, T, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).reshape(B * T, 1, H * W, C)  # one head
        q, k, v = linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)
        out = linear(out, self.proj.weight.flatten(1), self.proj.bias)
        return x + out.view(B, T, H, W, C).permute(0, 4, 1, 2, 3)


class Resample(nn.Module):
    """Halve or double space by a strided or nearest-neighbour 3x3 convolution, and time as well if `in_time`.

    Latent 0 stands for one frame, so the first frame of a video is never paired with another: going down it passes
    alone, going up it is not doubled, and the frames after it do not see it here [Wan]."""

    def __init__(self, dim: int, up: bool, in_time: bool) -> None:
        super().__init__()
        self.up, self.in_time = up, in_time
        conv = nn.Conv2d(dim, dim // 2, 3, padding=1) if up else nn.Conv2d(dim, dim, 3, stride=2)
        self.resample = nn.ModuleDict({"1": conv})
        if in_time:
            self.time_conv = (
                CausalConv3d(dim, dim * 2, (3, 1, 1))
                if up
                else nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))
            )

    def in_space(self, x: Tensor) -> Tensor:
        conv = self.resample["1"]
        if self.up:
            x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
            return conv3d(x, conv.weight.unsqueeze(2), conv.bias, padding=(0, 1, 1))
        return conv3d(F.pad(x, (0, 1, 0, 1)), conv.weight.unsqueeze(2), conv.bias, stride=(1, 2, 2))

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        if not self.in_time:
            return self.in_space(x)
        past = (
            state.get(self) if state is not None else None
        )  # None: this chunk begins with frame 0
        if self.up:
            out = [x[:, :, :1]] if past is None else []
            rest = x[:, :, len(out) :]
            if state is not None:
                state[self] = x.new_zeros(())  # only says: frame 0 has passed
            if rest.shape[2]:
                two = self.time_conv(rest, state).unflatten(
                    1, (2, -1)
                )  # (B, 2, C, T, H, W): channels hold the two new frames
                out.append(
                    two.permute(0, 3, 1, 4, 5, 2).contiguous().flatten(1, 2).permute(0, 4, 1, 2, 3)
                )
            return self.in_space(torch.cat(out, dim=2))
        x = self.in_space(x)
        out, x = ([x[:, :, :1]], x) if past is None else ([], torch.cat([past, x], dim=2))
        if state is not None:
            state[self] = x[:, :, -1:].clone(memory_format=LAYOUT)
        if x.shape[2] > 1:
            out.append(conv3d(x, self.time_conv.weight, self.time_conv.bias, self.time_conv.stride))
        return torch.cat(out, dim=2)


class Coder(nn.Module):
    """What encoder and decoder share: a convolution, a list of stages, a middle with attention, a head.

    The encoder runs stages then middle, the decoder middle then stages; `stages` bears Wan's name for each."""

    def __init__(self, config: VAEConfig, up: bool) -> None:
        super().__init__()
        mult = list(config.dim_mult)
        flags = list(config.temporal_downsample)
        widths = [config.dim * m for m in ([mult[-1]] + mult[::-1] if up else [1] + mult)]
        self.name = "upsamples" if up else "downsamples"
        stages = []
        for i, (dim_in, dim_out) in enumerate(zip(widths[:-1], widths[1:])):
            dim_in = (
                dim_in // 2 if up and i > 0 else dim_in
            )  # the up-sampling before has halved the channels
            for _ in range(config.num_res_blocks + up):
                stages.append(ResidualBlock(dim_in, dim_out))
                dim_in = dim_out
            if i < len(flags):
                stages.append(Resample(dim_out, up, (flags[::-1] if up else flags)[i]))
        inner = widths[0] if up else widths[-1]
        self.conv1 = CausalConv3d(config.z_dim if up else 3, widths[0], 3)
        self.add_module(self.name, nn.ModuleList(stages))
        self.middle = nn.ModuleList(
            [ResidualBlock(inner, inner), Attention(inner), ResidualBlock(inner, inner)]
        )
        self.head = nn.ModuleDict(
            {
                "0": RMSNorm(widths[-1]),
                "2": CausalConv3d(widths[-1], 3 if up else 2 * config.z_dim, 3),
            }
        )

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """Stages at the frame rate of the pixels take large frames of a stream one by one, to save memory."""
        stages = list(getattr(self, self.name))
        in_time = [i for i, stage in enumerate(stages) if getattr(stage, "in_time", False)] or [0]
        if self.name == "upsamples":
            x = self._run([self.conv1, *self.middle, *stages[: in_time[-1] + 1]], x, state)
            return torch.cat(
                [
                    self._head(self._run(stages[in_time[-1] + 1 :], part, state), state)
                    for part in pieces(x, state)
                ],
                2,
            )
        x = torch.cat(
            [
                self._run([self.conv1, *stages[: in_time[0]]], part, state)
                for part in pieces(x, state)
            ],
            2,
        )
        return self._head(self._run([*stages[in_time[0] :], *self.middle], x, state), state)

    def _run(self, modules: list[nn.Module], x: Tensor, state: State | None) -> Tensor:
        for module in modules:
            x = module(x, state)
        return x

    def _head(self, x: Tensor, state: State | None) -> Tensor:
        return self.head["2"](silu(self.head["0"](x)), state)


def pieces(x: Tensor, state: State | None) -> tuple[Tensor, ...]:
    """[B, C, T, H, W] as it is, or, within a stream, frame by frame if frames are LARGE."""
    return x.split(1, dim=2) if state is not None and x.shape[3] * x.shape[4] > LARGE else (x,)


class VAE(nn.Module):
    """Video <-> latents, whole or streamed. See the top of the file."""

    def __init__(self, config: VAEConfig = VAEConfig()) -> None:
        super().__init__()
        self.config = config
        self.encoder = Coder(config, up=False)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Coder(config, up=True)

    def moments(self, video: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance [B, C, T, h, w], not normalised (what VAE training needs)."""
        mean, logvar = self.conv1(self.encoder(video.to(self.conv1.weight.dtype), state)).chunk(
            2, dim=1
        )
        return mean, logvar

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(v, dtype=like.dtype)
            .to(like.device, non_blocking=True)
            .view(-1, 1, 1, 1)  # no GPU waits for the host
            for v in (self.config.mean, self.config.std)
        )
        return mean, std

    def encode_chunk(
        self, video: Tensor, state: State | None = None, use_up: bool = False
    ) -> tuple[Tensor, State]:
        """Encode the next frames of a stream. video: [B, 3, F, H, W] in [-1, 1]; F = 1 + 4k without a state (the
        start), 4k with one. returns: latents [B, T, C, h, w] and the state to pass with the next frames.
        use_up: the given state becomes the next one; without it both exist for a moment, 4 GiB each at 480 x 832.
        raises: UserError for a wrong frame count, channel count, size or value."""
        first = state is None
        self._check_video(video, first)
        state = {} if first else state if use_up else dict(state)
        mu = self.moments(video, state)[0].float()
        mean, std = self._scale(mu)
        return ((mu - mean) / std).transpose(1, 2), state

    def decode_chunk(
        self, z: Tensor, state: State | None = None, use_up: bool = False
    ) -> tuple[Tensor, State]:
        """Decode the next latents of a stream. z: [B, T, C, h, w] normalised; without a state z[:, 0] is the image
        latent. returns: video [B, 3, F, H, W] in [-1, 1], F = 4T (4T - 3 at the start), and the next state; use_up as
        in encode_chunk."""
        self._check_latents(z)
        state = {} if state is None else state if use_up else dict(state)
        z = z.transpose(1, 2).float()  # (B, C, T, h, w)
        mean, std = self._scale(z)
        z = (z * std + mean).to(self.conv2.weight.dtype)
        return self.decoder(self.conv2(z), state).float().clamp(-1, 1), state

    def at_once(self, h: int, w: int) -> int:
        """How many latents of h x w cells to pass at a time in a stream: small ones are faster together, up to twice as fast
        [measured]; of large ones memory allows one."""
        return 7 if h * w * self.config.space**2 <= LARGE else 1

    def encode(self, video: Tensor, chunk: int = 0) -> Tensor:
        """Encode a whole video [B, 3, 1 + 4(T-1), H, W] in [-1, 1] to normalised latents [B, T, C, h, w].

        Runs as a stream of `chunk` latents at a time, 0: of `at_once`; the result does not depend on it (to 1e-5 in float32)."""
        self._check_video(video, first=True)
        chunk = chunk or self.at_once(*(side // self.config.space for side in video.shape[3:]))
        n, out, state = self.config.time, [], None
        for a in range(
            -n + 1, video.shape[2], n * chunk
        ):  # the first chunk holds frame 0 and fills up to `chunk` latents
            z, state = self.encode_chunk(video[:, :, max(a, 0) : a + n * chunk], state, use_up=True)
            out.append(z)
        return torch.cat(out, dim=1)

    def decode(self, z: Tensor, chunk: int = 0) -> Tensor:
        """Decode latents [B, T, C, h, w] to a video [B, 3, 1 + 4(T-1), H, W] in [-1, 1]; `chunk` as in encode."""
        self._check_latents(z)
        out, state = [], None
        for part in z.split(chunk or self.at_once(*z.shape[3:]), dim=1):
            video, state = self.decode_chunk(part, state, use_up=True)
            out.append(video)
        return torch.cat(out, dim=2)

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 5 or z.shape[2] != self.config.z_dim or not z.shape[1]:
            raise UserError(
                f"latents of shape {tuple(z.shape)} are not [B, T, {self.config.z_dim}, h, w]"
            )

    def _check_video(self, video: Tensor, first: bool) -> None:
        n, space = self.config.time, self.config.space
        if video.ndim != 5 or video.shape[1] != 3:
            raise UserError(
                f"video of shape {tuple(video.shape)} is not [B, 3, F, H, W]; it needs 3 colour channels"
            )
        frames, height, width = video.shape[2:]
        if frames < 1 or (frames - first) % n:
            below = max((frames - first) // n * n, 0 if first else n) + first
            raise UserError(
                f"{frames} frames is not {'1 + ' if first else ''}{n}k; use {below} or {below + n}"
            )
        if height % space or width % space:
            crop = "x".join(str(max(side // space, 1) * space) for side in (height, width))
            raise UserError(
                f"frame size {height}x{width} is not divisible by {space}; crop or resize it to {crop}"
            )
        if not torch.isfinite(video).all():
            raise UserError(
                "the video holds NaN or infinite pixels; pixels must be numbers in [-1, 1]"
            )


# ---------------------------------------------------------------- weights
def load_vae(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> VAE:
    """Load whatever `weights.read_vae` reads: `Wan2.1_VAE.pth`, a folder with it, ...

    raises: UserError that names every missing, unexpected or wrongly shaped tensor."""
    values, tensors, source = read_vae(path)
    config = config_from(VAEConfig, values, source)
    with torch.device("meta"):
        vae = VAE(config)
    return load_strict(vae, tensors, source, dtype, device)


def save_vae(vae: VAE, path: str | Path) -> None:
    """Write native names with the config in the metadata."""
    write_safetensors(path, vae.state_dict(), asdict(vae.config))


# ---------------------------------------------------------------- try it
@dataclass
class Config:
    """Encode and decode a clip; print the PSNR."""

    clip: str  # a video of 1 + 4k frames whose sides are divisible by 8
    out: str = "out/vae.mp4"  # where the reconstruction goes (.mp4 or .gif)
    weights: str = "toy/weights"  # a VAE file or a folder with one
    device: str = "auto"  # cpu, cuda, or auto


@torch.no_grad()
def main(config: Config) -> None:
    device = start(config.device)[2]
    vae = load_vae(config.weights, device=device)
    video, writer = read_frames(config.clip), VideoWriter(config.out)
    z = vae.encode(video.to(device))
    state, error = None, 0.0
    with writer:
        for part in tqdm(z.split(1, dim=1), desc="decode", unit="latent"):
            frames, state = vae.decode_chunk(part, state, use_up=True)
            error += (
                (frames[0].cpu() - video[0, :, writer.count : writer.count + frames.shape[2]])
                .square()
                .sum()
                .item()
            )
            writer.write(frames[0])
    psnr = (
        -10 * torch.tensor(error / video.numel() / 4).log10()
    )  # pixels span 2, so the peak squared is 4
    print(
        f"{video.shape[2]} frames -> {z.shape[1]} latents of {tuple(z.shape[2:])} -> {config.out}, PSNR {psnr:.2f} dB"
    )


if __name__ == "__main__":
    run(main, Config)
