"""The Wan2.1 causal 3D VAE: video <-> latents, whole or as a stream.

Every temporal convolution looks only at the past (left padding), so latent i depends on frames
0 .. 4i and frame f on latents 0 .. ceil(f/4), and on nothing later. Latent 0 is the *image latent*:
it holds frame 0 alone; latent i >= 1 holds frames 4i-3 .. 4i. Hence F = 1 + 4 (T - 1) frames for
T latents. That the decoder reads the past of a latent is why naive backward generation flickers
(paper Sec. 4.1), and why UniTemp needs anchors.

Causality also makes streaming exact: between two chunks a convolution must remember its last two
input frames, and nothing else. This memory is the `state`, an explicit value: `decode_chunk(z,
state) -> (video, new_state)` changes neither its arguments nor the module, so streams interleave
and one state can be continued from twice. A whole video is a stream of one chunk.

Module and parameter names are Wan's own, so `Wan2.1_VAE.pth` loads as it is [Wan]. It does not
sample: `encode` returns the posterior mean.

    python -m tools.reconstruct --clip in.mp4 --out out/again.mp4 --weights Wan2.1-T2V-1.3B
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cpu import conv3d, linear
from lib.presets import WAN_MEAN, WAN_STD
from lib.shapes import check_latents, check_vae, check_video
from lib.tensors import write_safetensors
from lib.weights import check_sizes, config_from, load_strict, read_vae


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
        is_wan = self.z_dim == len(WAN_MEAN)
        mean = self.mean or (WAN_MEAN if is_wan else (0.0,) * self.z_dim)
        std = self.std or (WAN_STD if is_wan else (1.0,) * self.z_dim)
        object.__setattr__(self, "mean", mean)  # the dataclass is frozen
        object.__setattr__(self, "std", std)
        check_vae(self)

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
LARGE = 2**14  # cells of a frame from which memory counts more than the cost of small steps [ours]
State = dict[nn.Module, Tensor]  # what a layer remembers of the stream: [B, C, 1 or 2, H, W]


# ---------------------------------------------------------------- layers
class CausalConv3d(nn.Conv3d):
    """A convolution padded in time on the left only: by zeros, or by the frames it remembers."""

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        keep = self.kernel_size[0] - 1  # a kernel of one frame needs no state
        if keep:
            if self not in state:
                B, C, _, H, W = x.shape
                zeros = x.new_zeros(B, C, keep, H, W)
                state[self] = zeros.contiguous(memory_format=LAYOUT)
            x = torch.cat([state[self], x], dim=2)  # (B, C, keep + T, H, W)
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


class Layers(nn.ModuleDict):
    """Convolutions, and norms with x * sigmoid(x) behind; keys are places in Wan's Sequential."""

    def forward(self, x: Tensor, state: State) -> Tensor:
        for layer in self.values():
            if isinstance(layer, RMSNorm):
                x = F.silu(layer(x), inplace=not torch.is_grad_enabled())
            else:
                x = layer(x, state)
        return x


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x)))))"""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.residual = Layers(
            {
                "0": RMSNorm(dim_in),
                "2": CausalConv3d(dim_in, dim_out, 3),
                "3": RMSNorm(dim_out),
                "6": CausalConv3d(dim_out, dim_out, 3),
            }
        )
        self.shortcut = CausalConv3d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, state: State) -> Tensor:
        return self.residual(x, state) + self.shortcut(x)


class Attention(nn.Module):
    """Single-head self-attention within each frame; it never mixes time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, per_frame=True)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)  # starts as the identity [Wan]

    def forward(self, x: Tensor, state: State) -> Tensor:
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

    def forward(self, x: Tensor, state: State) -> Tensor:
        weight, bias = self.resample["1"].weight.unsqueeze(2), self.resample["1"].bias
        if self.up:
            x = self._through_time(x, state)
            x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")  # (B, C, T, 2H, 2W)
            return conv3d(x, weight, bias, padding=(0, 1, 1))
        x = conv3d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=(1, 2, 2))  # (B, C, T, H/2, W/2)
        return self._through_time(x, state)

    def _through_time(self, x: Tensor, state: State) -> Tensor:
        if not self.in_time:
            return x
        if self in state:
            return self._double(x, state) if self.up else self._halve(x, state)
        first, rest = x[:, :, :1], x[:, :, 1:]
        state[self] = x.new_zeros(()) if self.up else first.clone(memory_format=LAYOUT)
        if not rest.shape[2]:
            return first
        return torch.cat([first, self._through_time(rest, state)], dim=2)

    def _double(self, x: Tensor, state: State) -> Tensor:
        two = self.time_conv(x, state).unflatten(1, (2, -1))  # (B, 2, C, T, H, W)
        two = two.permute(0, 3, 1, 4, 5, 2).contiguous()  # (B, T, 2, H, W, C)
        return two.flatten(1, 2).permute(0, 4, 1, 2, 3)  # (B, C, 2T, H, W)

    def _halve(self, x: Tensor, state: State) -> Tensor:
        pairs = torch.cat([state[self], x], dim=2)  # the frame before x, and x
        state[self] = x[:, :, -1:].clone(memory_format=LAYOUT)
        conv = self.time_conv
        return conv3d(pairs, conv.weight, conv.bias, conv.stride)  # (B, C, T/2, H, W)


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
        self.head = Layers({"0": RMSNorm(widths[-1]), "2": out})

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Next frames or latents of a stream, whose state is updated; without one a whole video."""
        state = {} if state is None else state
        if self.up:
            layers = [self.conv1, *self.middle, *self.upsamples, self.head]
        else:
            layers = [self.conv1, *self.downsamples, *self.middle, self.head]
        in_time = [i for i, layer in enumerate(layers) if getattr(layer, "in_time", False)] or [0]
        if self.up:
            stop = in_time[-1] + 1
            return frame_by_frame(layers[stop:], through(layers[:stop], x, state), state)
        first = in_time[0]
        return through(layers[first:], frame_by_frame(layers[:first], x, state), state)


def through(layers: Sequence[nn.Module], x: Tensor, state: State) -> Tensor:
    """Layers one after the other: x [B, C, T, h, w], the state updated on the way."""
    for layer in layers:
        x = layer(x, state)
    return x


def frame_by_frame(layers: Sequence[nn.Module], x: Tensor, state: State) -> Tensor:
    """The same, [B, C, T, H, W]; frames beyond LARGE go one at a time, for less memory."""
    if x.shape[3] * x.shape[4] <= LARGE:
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

    def moments(self, video: Tensor, state: State | None = None) -> tuple[Tensor, ...]:
        """Posterior mean and log-variance [B, C, T, h, w], not normalised: for training a VAE."""
        both = self.conv1(self.encoder(video.to(self.conv1.weight.dtype), state))
        return both.chunk(2, dim=1)

    def encode_chunk(
        self, video: Tensor, state: State | None = None, inplace: bool = False
    ) -> tuple[Tensor, State]:
        """Encode the next frames of a stream.

        video: [B, 3, F, H, W] in [-1, 1]; F = 1 + 4k at the start (no state), 4k later
        inplace: the given state becomes the next one; else both exist for a moment, 4 GiB each at
            480 x 832
        returns: normalised latents [B, T, C, h, w], and the state to pass with the next frames"""
        check_video(video, self.config.space, self.config.time, is_start=state is None)
        if state is None or not inplace:
            state = dict(state or {})
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
        check_latents(z, self.config.z_dim)
        if state is None or not inplace:
            state = dict(state or {})
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
        c = self.config
        check_video(video, c.space, c.time, is_start=True)
        frames, height, width = video.shape[2:]
        size = c.time * (chunk or self.at_once(height // c.space, width // c.space))
        first = size - c.time + 1  # frames of the first chunk: latent 0 is one frame
        parts = video.tensor_split(tuple(range(first, frames, size)), dim=2)
        return torch.cat(list(stream(self.encode_chunk, parts)), dim=1)

    def decode(self, z: Tensor, chunk: int = 0) -> Tensor:
        """Decode latents [B, T, C, h, w] to a video [B, 3, 1 + 4(T-1), H, W], like `encode`."""
        check_latents(z, self.config.z_dim)
        parts = z.split(chunk or self.at_once(*z.shape[3:]), dim=1)
        return torch.cat(list(stream(self.decode_chunk, parts)), dim=2)

    def _scale(self, like: Tensor) -> tuple[Tensor, ...]:
        """Mean and standard deviation of the latents' channels, [C, 1, 1, 1] each."""
        both = torch.tensor([self.config.mean, self.config.std], dtype=like.dtype)
        both = both.to(like.device, non_blocking=True)  # no GPU waits for the host
        return both.view(2, -1, 1, 1, 1).unbind()


def stream(step: Callable[..., tuple[Tensor, State]], parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """What `encode_chunk` or `decode_chunk` makes of one video, [B, C, T, H, W], part by part."""
    state = None
    for part in parts:
        made, state = step(part, state, inplace=True)
        yield made


# ---------------------------------------------------------------- weights
def load_vae(
    path: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> VAE:
    """Load whatever `weights.read_vae` reads. raises: UserError naming all that does not fit"""
    values, tensors, source = read_vae(path)
    with torch.device("meta"):
        vae = VAE(config_from(VAEConfig, values, source))
    return load_strict(vae, tensors, source, dtype, device)


def save_vae(vae: VAE, path: str | Path) -> None:
    """Write native names, and the config in the metadata."""
    write_safetensors(path, vae.state_dict(), asdict(vae.config))
