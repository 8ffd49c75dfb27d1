"""The Wan2.1 causal 3D VAE: video <-> latents, whole or as a stream.

Every temporal convolution looks only at the past (left padding), so latent i depends on frames
0 .. 4i and frame f on latents 0 .. ceil(f/4), and on nothing later. Latent 0 is the *image latent*:
it holds frame 0 alone; latent i >= 1 holds frames 4i-3 .. 4i. Hence F = 1 + 4 (T - 1) frames for
T latents. That the decoder reads the past of a latent is why naive backward generation flickers
(paper Sec. 4.1), and why UniTemp needs anchors.

Causality also makes streaming exact. What a convolution must remember between two chunks is its
last two input frames. This memory is the `state`, an explicit value: `decode_chunk(z, state) ->
(video, new_state)` changes neither its arguments nor the module, so streams interleave and a state
can be kept to continue from it twice.

Module and parameter names are Wan's own, so `Wan2.1_VAE.pth` loads as it is [Wan]. It does not
sample: `encode` returns the posterior mean.

    python vae.py --clip in.mp4 --out reconstruction.mp4 --weights Wan2.1-T2V-1.3B
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lib.common import UserError, check_out, run, start
from lib.cpu import conv3d, linear
from lib.media import VideoWriter, read_frames
from lib.weights import check_sizes, config_from, load_strict, read_vae, write_safetensors

# fmt: off
WAN_MEAN = (  # of Wan's 16 latent channels, and their standard deviation [Wan]
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


@dataclass(frozen=True)
class VAEConfig:
    """Defaults are Wan2.1's: 126,892,531 parameters in 194 tensors, 8x in space, 4x in time."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = ()  # of each latent channel; empty: Wan's if there are 16, else 0
    std: tuple[float, ...] = ()  # likewise, else 1

    def __post_init__(self) -> None:
        check_sizes(self, "VAE")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"temporal_downsample {self.temporal_downsample} needs one entry less than"
                f" dim_mult {self.dim_mult}"
            )
        wan = self.z_dim == len(WAN_MEAN)
        mean = self.mean or (WAN_MEAN if wan else (0.0,) * self.z_dim)
        std = self.std or (WAN_STD if wan else (1.0,) * self.z_dim)
        if not len(mean) == len(std) == self.z_dim:
            raise UserError(f"mean {mean} and std {std} must have z_dim {self.z_dim} numbers each")
        object.__setattr__(self, "mean", mean)  # the dataclass is frozen
        object.__setattr__(self, "std", std)

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
# Channels innermost: makes the norm over channels cheap, else it costs as much as a convolution.
LAYOUT = torch.channels_last_3d
# Cells a frame (128 x 128) from which memory counts more than the overhead of small steps [ours].
LARGE = 2**14
State = dict[nn.Module, Tensor]  # what a layer remembers of the stream: [B, C, 1 or 2, H, W]


# ---------------------------------------------------------------- layers
class CausalConv3d(nn.Conv3d):
    """A convolution padded in time on the left only: by zeros, or by the frames it remembers."""

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        keep = self.kernel_size[0] - 1
        if keep:
            past = state.get(self) if state is not None else None
            if past is None:
                B, C, _, H, W = x.shape
                past = x.new_zeros(B, C, keep, H, W).contiguous(memory_format=LAYOUT)
            x = torch.cat([past, x], dim=2)  # (B, C, keep + T, H, W)
            if state is not None:
                state[self] = x[:, :, -keep:].clone(memory_format=LAYOUT)
        x = x.contiguous(memory_format=LAYOUT)
        space = (0, self.kernel_size[1] // 2, self.kernel_size[2] // 2)
        return conv3d(x, self.weight, self.bias, self.stride, space)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over channels; `per_frame` is only a matter of gamma's shape."""

    def __init__(self, dim: int, per_frame: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1) if per_frame else torch.ones(dim, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        x = x * (x.shape[1] ** 0.5 / length.clamp_min(1e-12)).to(x.dtype)
        gamma = self.gamma.view(-1, 1, 1, 1)
        # in place where no gradient wants x: one pass through memory less
        return x * gamma if torch.is_grad_enabled() else x.mul_(gamma)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) for x [B, C, T, h, w], in place where no gradient wants x."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))); the digits are places in Wan's nn.Sequential."""

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
        nn.init.zeros_(self.proj.weight)  # starts as the identity [Wan]

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        B, C, T, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).reshape(B * T, 1, H * W, C)  # one head
        qkv = linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        y = linear(y, self.proj.weight.flatten(1), self.proj.bias)
        return x + y.view(B, T, H, W, C).permute(0, 4, 1, 2, 3)


class Resample(nn.Module):
    """Halve or double space by a 3x3 convolution, and time as well if `in_time`.

    Latent 0 stands for one frame, so the first frame of a video is never paired with another: going
    down it passes alone, going up it is not doubled, and later frames do not see it here [Wan]."""

    def __init__(self, dim: int, up: bool, in_time: bool) -> None:
        super().__init__()
        self.up, self.in_time = up, in_time
        conv = nn.Conv2d(dim, dim // 2, 3, padding=1) if up else nn.Conv2d(dim, dim, 3, stride=2)
        self.resample = nn.ModuleDict({"1": conv})
        if in_time and up:
            self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1))
        elif in_time:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        weight, bias = self.resample["1"].weight.unsqueeze(2), self.resample["1"].bias
        if self.up:
            if self.in_time:
                x = self._double_time(x, state)
            x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")  # (B, C, T, 2H, 2W)
            return conv3d(x, weight, bias, padding=(0, 1, 1))
        x = conv3d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=(1, 2, 2))  # (B, C, T, H/2, W/2)
        return self._halve_time(x, state) if self.in_time else x

    def _double_time(self, x: Tensor, state: State | None) -> Tensor:
        is_start = state is None or self not in state
        if state is not None:
            state[self] = x.new_zeros(())  # only says: frame 0 has passed
        first, rest = (x[:, :, :1], x[:, :, 1:]) if is_start else (None, x)
        if not rest.shape[2]:
            return first
        two = self.time_conv(rest, state).unflatten(1, (2, -1))  # (B, 2, C, T, H, W)
        two = two.permute(0, 3, 1, 4, 5, 2).contiguous()  # (B, T, 2, H, W, C)
        rest = two.flatten(1, 2).permute(0, 4, 1, 2, 3)  # (B, C, 2T, H, W)
        return rest if first is None else torch.cat([first, rest], dim=2)

    def _halve_time(self, x: Tensor, state: State | None) -> Tensor:
        past = state.get(self) if state is not None else None  # the last frame before x
        if state is not None:
            state[self] = x[:, :, -1:].clone(memory_format=LAYOUT)
        pairs = x if past is None else torch.cat([past, x], dim=2)
        if pairs.shape[2] == 1:
            return x  # frame 0 alone
        conv = self.time_conv
        half = conv3d(pairs, conv.weight, conv.bias, conv.stride)  # (B, C, T/2, H, W)
        return half if past is not None else torch.cat([x[:, :, :1], half], dim=2)


class Coder(nn.Module):
    """What encoder and decoder share: a convolution, stages, a middle with attention, a head.

    The encoder runs its stages and then the middle, the decoder the middle and then its stages."""

    def __init__(self, config: VAEConfig, up: bool) -> None:
        super().__init__()
        self.up = up
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        in_time = list(config.temporal_downsample)
        if up:
            widths = [widths[-1], *widths[:0:-1]]
            in_time = in_time[::-1]
        stages = nn.ModuleList()
        for i, (dim, dim_out) in enumerate(zip(widths, widths[1:])):
            if up and i > 0:
                dim = dim // 2  # the stage before, going up, has halved the channels
            for _ in range(config.num_res_blocks + up):
                stages.append(ResidualBlock(dim, dim_out))
                dim = dim_out
            if i < len(in_time):
                stages.append(Resample(dim, up, in_time[i]))
        inner = widths[0] if up else widths[-1]
        self.conv1 = CausalConv3d(config.z_dim if up else 3, widths[0], 3)
        self.add_module("upsamples" if up else "downsamples", stages)  # Wan's name for each
        self.middle = nn.ModuleList(
            [ResidualBlock(inner, inner), Attention(inner), ResidualBlock(inner, inner)]
        )
        out = CausalConv3d(widths[-1], 3 if up else 2 * config.z_dim, 3)
        self.head = nn.ModuleDict({"0": RMSNorm(widths[-1]), "2": out})

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        stages = list(self.upsamples if self.up else self.downsamples)
        in_time = [i for i, stage in enumerate(stages) if getattr(stage, "in_time", False)]
        if self.up:
            last = in_time[-1] if in_time else -1
            x = through([self.conv1, *self.middle, *stages[: last + 1]], x, state)
            return frame_by_frame([*stages[last + 1 :], self._head], x, state)
        first = in_time[0] if in_time else 0
        x = frame_by_frame([self.conv1, *stages[:first]], x, state)
        return through([*stages[first:], *self.middle, self._head], x, state)

    def _head(self, x: Tensor, state: State | None) -> Tensor:
        return self.head["2"](silu(self.head["0"](x)), state)


Layers = list[Callable[[Tensor, State | None], Tensor]]


def through(layers: Layers, x: Tensor, state: State | None) -> Tensor:
    """Layers one after the other: x [B, C, T, h, w], the state updated on the way."""
    for layer in layers:
        x = layer(x, state)
    return x


def frame_by_frame(layers: Layers, x: Tensor, state: State | None) -> Tensor:
    """Like `through`, x [B, C, T, h, w]; in a stream LARGE frames go one at a time: less memory.

    For the layers that run at the frame rate of the pixels, where a chunk is largest."""
    if state is None or x.shape[3] * x.shape[4] <= LARGE:
        return through(layers, x, state)
    return torch.cat([through(layers, frame, state) for frame in x.split(1, dim=2)], dim=2)


# ---------------------------------------------------------------- the VAE
class VAE(nn.Module):
    """Video <-> latents, whole or streamed."""

    def __init__(self, config: VAEConfig = VAEConfig()) -> None:
        super().__init__()
        self.config = config
        self.encoder = Coder(config, up=False)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Coder(config, up=True)

    def moments(self, video: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance [B, C, T, h, w], not normalised: for training a VAE."""
        both = self.conv1(self.encoder(video.to(self.conv1.weight.dtype), state))
        mean, logvar = both.chunk(2, dim=1)
        return mean, logvar

    def encode_chunk(
        self, video: Tensor, state: State | None = None, inplace: bool = False
    ) -> tuple[Tensor, State]:
        """Encode the next frames of a stream.

        video: [B, 3, F, H, W] in [-1, 1]; F = 1 + 4k at the start (no state), 4k later
        inplace: the given state becomes the next one; else both exist for a moment, 4 GiB each at
            480 x 832
        returns: normalised latents [B, T, C, h, w], and the state to pass with the next frames"""
        self._check_video(video, is_start=state is None)
        state = state if inplace and state is not None else dict(state or {})
        z = self.moments(video, state)[0].float()
        mean, std = self._scale(z)
        return ((z - mean) / std).transpose(1, 2), state

    def decode_chunk(
        self, z: Tensor, state: State | None = None, inplace: bool = False
    ) -> tuple[Tensor, State]:
        """Decode the next latents of a stream.

        z: [B, T, C, h, w] normalised; without a state z[:, 0] is the image latent
        returns: video [B, 3, F, H, W] in [-1, 1], F = 4T - 3 at the start, 4T later, and the next
            state; inplace as in encode_chunk"""
        self._check_latents(z)
        state = state if inplace and state is not None else dict(state or {})
        z = z.transpose(1, 2).float()  # (B, C, T, h, w)
        mean, std = self._scale(z)
        z = (z * std + mean).to(self.conv2.weight.dtype)
        return self.decoder(self.conv2(z), state).float().clamp(-1, 1), state

    def at_once(self, h: int, w: int) -> int:
        """How many latents of h x w cells to pass at a time in a stream.

        Small ones are faster together, up to twice [measured]; of large ones memory allows one."""
        return 7 if h * w * self.config.space**2 <= LARGE else 1

    def encode(self, video: Tensor, chunk: int = 0) -> Tensor:
        """Encode a whole video [B, 3, 1 + 4(T-1), H, W] in [-1, 1] to latents [B, T, C, h, w].

        Runs as a stream of `chunk` latents at a time, 0: of `at_once`; the result is the same."""
        self._check_video(video, is_start=True)
        n, (h, w) = self.config.time, (side // self.config.space for side in video.shape[3:])
        size = n * (chunk or self.at_once(h, w))  # frames of a chunk
        first = size - n + 1  # of the first chunk: latent 0 is one frame
        z, state = [], None
        for part in (video[:, :, :first], *video[:, :, first:].split(size, dim=2)):
            if part.shape[2]:
                latents, state = self.encode_chunk(part, state, inplace=True)
                z.append(latents)
        return torch.cat(z, dim=1)

    def decode(self, z: Tensor, chunk: int = 0) -> Tensor:
        """Decode latents [B, T, C, h, w] to a video [B, 3, 1 + 4(T-1), H, W], like `encode`."""
        self._check_latents(z)
        video, state = [], None
        for part in z.split(chunk or self.at_once(*z.shape[3:]), dim=1):
            frames, state = self.decode_chunk(part, state, inplace=True)
            video.append(frames)
        return torch.cat(video, dim=2)

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' channels, [C, 1, 1, 1] each."""
        both = torch.tensor([self.config.mean, self.config.std], dtype=like.dtype)
        both = both.to(like.device, non_blocking=True)  # no GPU waits for the host
        mean, std = both.view(2, -1, 1, 1, 1)
        return mean, std

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 5 or z.shape[2] != self.config.z_dim or not z.shape[1]:
            shape = tuple(z.shape)
            raise UserError(f"latents of shape {shape} are not [B, T, {self.config.z_dim}, h, w]")

    def _check_video(self, video: Tensor, is_start: bool) -> None:
        n, space = self.config.time, self.config.space
        if video.ndim != 5 or video.shape[1] != 3:
            shape = tuple(video.shape)
            raise UserError(f"video of shape {shape} is not [B, 3, F, H, W]: 3 colour channels")
        frames, height, width = video.shape[2:]
        if frames < 1 or (frames - is_start) % n:
            below = max(frames - (frames - is_start) % n, 1 if is_start else n)
            rule = f"1 + {n}k" if is_start else f"{n}k"
            raise UserError(f"{frames} frames is not {rule}; use {below} or {below + n}")
        if height % space or width % space:
            crop = "x".join(str(max(side // space, 1) * space) for side in (height, width))
            size = f"{height}x{width}"
            raise UserError(f"frame size {size} is not divisible by {space}; make it {crop}")
        if not torch.isfinite(video).all():
            raise UserError("the video holds NaN or infinite pixels; they must be in [-1, 1]")


# ---------------------------------------------------------------- weights
def load_vae(
    path: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> VAE:
    """Load whatever `weights.read_vae` reads: `Wan2.1_VAE.pth`, a folder with it, ...

    raises: UserError naming every tensor that does not fit"""
    values, tensors, source = read_vae(path)
    with torch.device("meta"):
        vae = VAE(config_from(VAEConfig, values, source))
    return load_strict(vae, tensors, source, dtype, device)


def save_vae(vae: VAE, path: str | Path) -> None:
    """Write native names, and the config in the metadata."""
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
    check_out(config.out, inputs=[config.clip])
    vae = load_vae(config.weights, device=device)
    video = read_frames(config.clip)  # (1, 3, F, H, W)
    z = vae.encode(video.to(device))
    state, error = None, 0.0
    with VideoWriter(config.out) as writer:
        for part in tqdm(z.split(1, dim=1), desc="decode", unit="latent"):
            frames, state = vae.decode_chunk(part, state, inplace=True)
            original = video[:, :, writer.count : writer.count + frames.shape[2]]
            error += (frames.cpu() - original).square().sum().item()
            writer.write(frames[0])
    psnr = -10 * torch.tensor(error / video.numel() / 4).log10()  # pixels span 2: 4 is its square
    print(
        f"{video.shape[2]} frames -> {z.shape[1]} latents of {tuple(z.shape[2:])}"
        f" -> {config.out}, PSNR {psnr:.2f} dB"
    )


if __name__ == "__main__":
    run(main, Config)
