"""Which frames are drawn worst, and by whom? The shape, read from single frames of one and the same captions.

If frames are odd after the VAE alone, it is to blame; if the teacher's are, no student learns better; if only one order's
are, the order is. Captions of crosses are left out: the shipped teacher draws none.

    python -m toy.frames --clips 64
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import anchors
from dit import load_dit
from evaluate import held_out, make
from lib import report
from lib.common import UserError, run, start
from lib.text import HELD_OUT
from metrics import Stat, stat
from toy import world
from vae import load_vae

FRAMES = (0, 1, 2, 4, 8, 40, 80)


@dataclass
class Config:
    """Measure how often the shape is right in single frames."""

    weights: str = "toy/weights"  # a folder with vae, teacher and student
    clips: int = 64
    guidance: float = 2.0  # of the teacher
    device: str = "auto"


def shapes(video: Tensor, captions: list[str]) -> dict[str, Stat]:
    """Frame -> share of clips [B, 3, F, H, W] whose shape is right in this frame alone."""
    return {
        f"frame {f}": stat(
            torch.tensor(
                [
                    world.accuracy(clip[None, :, [f, f, f]], [said])["shape"]
                    for clip, said in zip(video, captions, strict=True)
                ]
            )
        )
        for f in FRAMES
    }


@torch.no_grad()
def main(config: Config) -> None:
    device = start(config.device)[2]
    if config.clips < 2:
        raise UserError(f"--clips {config.clips} must be at least 2")
    captions = [c for c in held_out(2 * config.clips + 64) if "cross" not in c][: config.clips]
    vae = load_vae(config.weights, device=device)
    teacher, student = (
        load_dit(f"{config.weights}/{name}.safetensors", device=device)
        for name in ("teacher", "student")
    )
    real = world.render(captions, [HELD_OUT + n for n in range(config.clips)]).to(device)
    rows = {
        "real clips, decoded": shapes(
            torch.cat([vae.decode(vae.encode(x[None])) for x in real]), captions
        ),
        "teacher, all latents at once": shapes(
            make(teacher, vae, None, captions, guidance=config.guidance)[1], captions
        ),
    }
    for plan in (anchors.forward(anchors.HORIZON), anchors.backward(anchors.HORIZON)):
        rows[f"student, {plan.name}"] = shapes(make(student, vae, plan, captions)[1], captions)
    print(report.markdown(rows))


if __name__ == "__main__":
    run(main, Config)
