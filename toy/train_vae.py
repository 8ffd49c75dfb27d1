"""Train the toy VAE: Wan's causal VAE class at toy size, on the procedural world.

Loss: L1 + 2 MSE + 1.5 L1 of frame differences + a mild KL. The frame differences keep boundaries
between latents smooth (without them even a reconstruction flickers); the KL stays mild, since a
strong one turns latents into codes of innovations that mean nothing without their exact past
[measured]. At the end the per-channel mean and std of the latents are measured and stored in the
config, and the PSNR of held-out clips is printed.

All randomness of a step is a function of (seed, step), so an interrupted run continues exactly: run
it again.

    python -m toy.train_vae --out out/toy
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.common import Stream, UserError, check_out, generator, run, start
from lib.text import HELD_OUT
from lib.training import RANGES, clip_gradients, cosine, log_row, training_steps
from toy import world
from vae import PRESETS, VAE, Attention, ResidualBlock, load_vae, save_vae


@dataclass
class Config:
    """Train the toy VAE."""

    RANGES = RANGES | {"preset": tuple(PRESETS), "size": (8, 4096), "frames": (1, 10000)}
    RANGES |= {"batch": (1, 10000), "share": (0, 1), "kl": (0, 1000), "diff": (0, 1000)}
    FREE = ("lr", "kl", "diff")  # what may change when a run goes on
    out: str = "out/toy"  # folder: vae.safetensors, its log, and the resume state
    preset: str = "toy"  # a VAE preset
    size: int = 32  # pixels
    steps: int = 13000
    schedule_steps: int = 0  # steps that rate and stages are planned over, if not --steps
    # Stages: pictures first, then motion, then whole clips: the decoder looks far back, and past
    # the longest clip that it is trained on colours drift [measured].
    frames: tuple[int, ...] = (1, 5, 17, 81)  # of a clip, a number a stage
    batch: tuple[int, ...] = (32, 8, 4, 1)  # clips a step, a number a stage
    share: tuple[float, ...] = (0.08, 0.24, 0.45, 0.23)  # of the steps, a number a stage
    lr: float = 7e-4  # Adam, cosine to zero [ours]
    init: str = ""  # go on from these weights instead of fresh ones
    encoder: bool = True  # false: the decoder only, so that latents made before stay valid
    kl: float = 1e-4  # per latent element [ours]; 1e-2 and more makes latents hang on their past
    diff: float = 1.5  # L1 of frame differences [ours]
    seed: int = 0
    save_every: int = 250  # steps between states; 0: one at the end
    keep: int = 0  # keep the state of every so many steps; 0: only the last
    device: str = "auto"


def clips(numbers: list[int], size: int, frames: int) -> tuple[Tensor, list[str]]:
    """Video [B, 3, F, size, size] and captions of numbered clips.

    Caption and motion follow from the number, so that a clip is always the same."""
    captions = [world.caption(n) for n in numbers]
    return world.render(captions, numbers, size, frames), captions


def vae_loss(
    vae: VAE, video: Tensor, noise: Tensor, kl: float, diff: float
) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction, smoothness and KL of clips [B, 3, F, H, W].

    noise: [B, C, T, h, w], the shape of the posterior mean"""
    mu, logvar = vae.moments(video)
    made = vae.decoder(vae.conv2(mu + (0.5 * logvar).exp() * noise), None).float()
    error = made - video
    change = error.diff(dim=2).abs().mean() if video.shape[2] > 1 else error.new_zeros(())
    terms = {
        "l1": error.abs().mean(),
        "mse": error.square().mean(),
        "diff": change,
        "kl": 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean(),
    }
    loss = terms["l1"] + 2 * terms["mse"] + diff * terms["diff"] + kl * terms["kl"]
    return loss, {name: term.item() for name, term in terms.items()}


@torch.no_grad()
def init_weights(vae: VAE) -> None:
    """Variance-keeping convolutions, nearly silent residual branches and little posterior noise.

    From torch's default init, or at a rate of 1e-3 on video from the start, training stays at the
    mean image [measured: 1300 and 240 steps]."""
    for m in vae.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d)):
            torch.nn.init.kaiming_normal_(m.weight, nonlinearity="linear")
            torch.nn.init.zeros_(m.bias)
    for m in vae.modules():
        if isinstance(m, ResidualBlock):
            m.residual["6"].weight.mul_(0.1)
        if isinstance(m, Attention):
            m.proj.weight.zero_()
    vae.conv1.bias[vae.config.z_dim :] = -6


@torch.no_grad()
def finish(vae: VAE, config: Config, device: torch.device) -> tuple[VAE, float]:
    """Measure on 64 held-out clips of 81 frames: the PSNR and, unless the encoder was kept, mean
    and std of the latents, which go into the config."""
    video = torch.cat([clips([HELD_OUT + i], config.size, 81)[0] for i in range(64)]).to(device)
    if config.encoder:
        zeros, ones = (0.0,) * vae.config.z_dim, (1.0,) * vae.config.z_dim
        vae.config = replace(vae.config, mean=zeros, std=ones)
    z = torch.cat([vae.encode(v[None]) for v in video])  # (64, T, C, h, w)
    made = torch.cat([vae.decode(x[None]) for x in z])
    psnr = -10 * ((made - video).square().mean() / 4).log10().item()
    if config.encoder:
        flat = z.movedim(2, 0).flatten(1)  # (C, all)
        mean, std = (tuple(round(x, 4) for x in y.tolist()) for y in (flat.mean(1), flat.std(1)))
        vae.config = replace(vae.config, mean=mean, std=std)
    return vae, psnr


def stage_of(step: int, steps: int, share: tuple[float, ...]) -> int:
    """Which stage a step belongs to, when stages have these shares of all steps; the last takes the
    rest: stage_of(3, 10, (.25, .25, .5)) -> 1"""
    return sum(step >= steps * sum(share[:i]) for i in range(1, len(share)))


def networks(config: Config, device: torch.device) -> tuple[VAE, torch.optim.Optimizer]:
    """The VAE, fresh or from --init, and its optimiser."""
    torch.manual_seed(config.seed)
    vae = load_vae(config.init) if config.init else VAE(PRESETS[config.preset])
    vae = vae.to(device).train().requires_grad_(True)
    if not config.init:
        init_weights(vae)
    vae.encoder.requires_grad_(config.encoder)
    vae.conv1.requires_grad_(config.encoder)
    trained = [p for p in vae.parameters() if p.requires_grad]
    return vae, torch.optim.Adam(trained, lr=config.lr, betas=(0.9, 0.99))


def main(config: Config) -> None:
    device, out = start(config.device)[2], check_out(config.out, folder=True)
    if not len(config.frames) == len(config.batch) == len(config.share) > 0:
        raise UserError(
            f"--frames {config.frames}, --batch {config.batch} and --share {config.share} "
            "need one number a stage each"
        )
    vae, optimiser = networks(config, device)
    c, space, time = vae.config, vae.config.space, vae.config.time
    if config.size % space or any((frames - 1) % time for frames in config.frames):
        raise UserError(
            f"--size {config.size} must be a multiple of {space}, "
            f"and each of --frames {config.frames} 1 + {time}k"
        )
    planned = config.schedule_steps or config.steps
    trained = {"vae": (vae, optimiser)}
    for step, row in training_steps(config, "vae", trained, device, prefix="vae."):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, planned, config.lr)
        stage = stage_of(step, planned, config.share)
        frames, batch = config.frames[stage], config.batch[stage]
        g = generator(config.seed, Stream.VAE, step)
        numbers = torch.randint(HELD_OUT, (batch,), generator=g).tolist()
        video = clips(numbers, config.size, frames)[0].to(device)
        side = config.size // space
        noise = torch.randn(batch, c.z_dim, c.latents(frames), side, side, generator=g)
        loss, terms = vae_loss(vae, video, noise.to(device), config.kl, config.diff)
        loss.backward()
        # pictures do not reach the temporal layers, but Adam's state must be whole to be saved
        for p in optimiser.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = clip_gradients(vae, 1.0, f"step {step}")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 20 == 0:
            row |= terms | {"norm": norm}
    vae, psnr = finish(vae.eval(), config, device)
    save_vae(vae, out / "vae.safetensors")
    (out / "vae.state.pt").unlink(missing_ok=True)
    log_row(out / "vae.log.jsonl", step=config.steps, psnr=psnr)
    print(
        f"wrote {out / 'vae.safetensors'}: PSNR {psnr:.2f} dB on 64 held-out clips, "
        f"latent mean {vae.config.mean}, std {vae.config.std}"
    )


if __name__ == "__main__":
    run(main, Config)
