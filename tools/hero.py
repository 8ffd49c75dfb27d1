"""The paper in five seconds: one animated picture of a plan that fills up beside its film strip.

Left, a row a step and a column a latent: targets green, anchors yellow (they vanish when their step
is done), what the step reads light green. Right, the frames of the video, which appear where they
belong in time. In backward order the last frames come first.

    python -m tools.hero --out assets/hero.gif

A latent shows as the last of its frames, decoded with the past it has in the finished video: while
the video is being made backward there is no past yet, so the strip shows what will have been made.
"""

from dataclasses import dataclass

import imageio.v3 as iio
import numpy as np
import torch

import anchors
from anchors import Plan
from evaluate import Maker
from generate import load_models
from lib.common import UserError, atomic, run
from lib.letters import marks
from lib.media import to_uint8
from lib.picture import write_text
from tools.plan import COLOURS

CELL = 22  # pixels of a latent's column in the plan
THUMB = 62  # pixels of a frame in the strip
GAP = 16  # pixels between plan and strip, and around both
DENOISING, DONE, AT_END = 350, 450, 2500  # milliseconds: anchors there, anchors gone, all done
GREY = (242, 242, 242)
Picture = np.ndarray  # uint8 [H, W, 3]


@dataclass
class Config:
    """Draw a plan filling up and its video appearing, as an animated GIF."""

    RANGES = {"order": ("forward", "backward"), "latents": (1, 100)}
    out: str = "assets/hero.gif"
    weights: str = "toy/weights"  # a folder with student and VAE, or: random
    prompt: str = "a red disc moves up over a blue wave"
    order: str = "backward"  # forward or backward
    latents: int = 21  # length of the video
    seed: int = 0


def video_of(config: Config, plan: Plan) -> list[Picture]:
    """One frame for each latent of the plan's video, the last that the latent stands for."""
    student = Maker(*load_models(config.weights), (32, 32), config.seed)
    video = student.make(plan, [config.prompt])[1][0]  # (3, F, H, W)
    shown = torch.arange(plan.length) * student.vae.config.time  # latent i ends with frame 4i
    return list(to_uint8(video[:, shown]))


def enlarged(frame: Picture, side: int) -> Picture:
    """A frame as a square of so many pixels, by repeating its own."""
    rows = np.arange(side) * frame.shape[0] // side
    columns = np.arange(side) * frame.shape[1] // side
    return frame[rows][:, columns]


def box(image: Picture, row: int, column: int, side: int, what: tuple[int, ...] | Picture) -> None:
    """Fill a square, one pixel smaller than its cell, with a colour or a picture of that size."""
    image[row + 1 : row + side, column + 1 : column + side] = what


# ---------------------------------------------------------------- the plan, left
def plan_panel(plan: Plan, current: int, anchors_there: bool) -> Picture:
    """The plan up to the step `current`, whose anchors are there or gone."""
    height, width = (len(plan.steps) + 1) * CELL, (plan.length + 1) * CELL
    image = np.full((height, width, 3), 255, np.uint8)
    for latent in range(plan.length):
        left = (latent + 1) * CELL + (CELL - 8 * len(str(latent))) // 2 + 1
        write_text(image, 6, left, str(latent), scale=2)
    for n, step in enumerate(plan.steps):
        write_text(image, (n + 1) * CELL + 6, 4, str(n + 1), scale=2)
        mark = marks(step) if n <= current else {}
        if not anchors_there or n != current:
            mark = {latent: letter for latent, letter in mark.items() if letter != "a"}
        for latent in range(plan.length):
            colour = COLOURS[mark[latent]] if latent in mark else GREY
            box(image, (n + 1) * CELL, (latent + 1) * CELL, CELL, colour)
    return image


def legend() -> Picture:
    """What the colours mean, in one line."""
    image = np.full((CELL, 21 * CELL, 3), 255, np.uint8)
    column = 0
    for mark, words in (("T", "made"), ("a", "imagined then dropped"), ("r", "read")):
        box(image, 0, column, CELL, COLOURS[mark])
        write_text(image, 6, column + CELL + 6, words, scale=2)
        column += CELL + 8 * len(words) + 30
    return image


# ---------------------------------------------------------------- the film strip, right
def strip_panel(plan: Plan, frames: list[Picture], current: int, anchors_there: bool) -> Picture:
    """The video's frames, seven a row; what is not made yet is blank, what is imagined yellow."""
    columns = 7
    rows = -(-plan.length // columns)
    image = np.full((rows * THUMB, columns * THUMB, 3), 255, np.uint8)
    made = {latent for step in plan.steps[:current] for latent in step.targets}
    step = plan.steps[current]
    for latent in range(plan.length):
        row, column = (latent // columns) * THUMB, (latent % columns) * THUMB
        box(image, row, column, THUMB, GREY)
        if anchors_there and latent in step.own:
            kind = "a" if latent in step.anchors else "T"
            box(image, row, column, THUMB, COLOURS[kind])
        elif latent in made or latent in step.targets:
            box(image, row, column, THUMB, enlarged(frames[latent], THUMB - 1))
    return image


def picture(plan: Plan, frames: list[Picture], current: int, anchors_there: bool) -> Picture:
    """Both panels side by side, with a line of words above each."""
    left = plan_panel(plan, current, anchors_there)
    right = strip_panel(plan, frames, current, anchors_there)
    below = legend()
    top, height = GAP + 20, max(len(left) + 8 + len(below), len(right))
    width = left.shape[1] + right.shape[1] + 3 * GAP
    image = np.full((top + height + GAP, width, 3), 255, np.uint8)
    image[top : top + len(left), GAP : GAP + left.shape[1]] = left
    under = top + len(left) + 8
    image[under : under + len(below), GAP + CELL :][:, : below.shape[1]] = below
    second = 2 * GAP + left.shape[1]
    image[top : top + len(right), second : second + right.shape[1]] = right
    write_text(image, GAP, GAP + CELL, f"{plan.name}. a row a step. a column a latent", scale=2)
    write_text(image, GAP, second, "the video. a frame a latent", scale=2)
    return image


def film_of(plan: Plan, frames: list[Picture]) -> tuple[list[Picture], list[int]]:
    """The pictures of the animation and how long each stays, in milliseconds."""
    pictures, stays = [], []
    for n, step in enumerate(plan.steps):
        pictures.append(picture(plan, frames, n, True))
        stays.append(DENOISING)
        pictures.append(picture(plan, frames, n, False))
        stays.append(DONE if step.anchors else DENOISING)
    stays[-1] = AT_END
    return pictures, stays


def main(config: Config) -> None:
    if not config.out.endswith(".gif"):
        raise UserError(f"--out {config.out} must end in .gif")
    plan = anchors.ORDERS[config.order](config.latents)
    pictures, stays = film_of(plan, video_of(config, plan))
    with atomic(config.out) as tmp:
        iio.imwrite(tmp, pictures, duration=stays, loop=0)
        size = tmp.stat().st_size
    seconds = sum(stays) / 1000
    print(f"wrote {config.out}: {len(pictures)} pictures, {seconds:.1f} s, {size:,} bytes")


if __name__ == "__main__":
    run(main, Config)
