"""What a VAE makes of your own clip: encode, decode, write what came back, print its PSNR.

A student cannot draw what its VAE does not show.

    python -m tools.reconstruct --clip in.mp4 --out out/again.mp4 --weights Wan2.1-T2V-1.3B
"""

from dataclasses import dataclass

import torch

from lib.common import check_out, run, start
from lib.media import VideoWriter, read_frames
from vae import load_vae


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
    made = vae.decode(z).cpu()
    with VideoWriter(config.out) as writer:
        writer.write(made[0])
    psnr = -10 * ((made - video).square().mean() / 4).log10()  # pixels span 2: 4 is its square
    print(
        f"{video.shape[2]} frames -> {z.shape[1]} latents of {tuple(z.shape[2:])}"
        f" -> {config.out}, PSNR {psnr:.2f} dB"
    )


if __name__ == "__main__":
    run(main, Config)
