"""Make a clip with any method of the zoo; the list of all of them is here.

python -m zoo.run rolling_forcing --prompt "a red disc moves left over a green wave" --out a.mp4
python -m zoo.run list
"""

from dataclasses import dataclass

import torch

from anchors import backward, text_picture
from dit import DiT, load_dit
from lib import text
from lib.common import UserError, run, start
from lib.media import VideoWriter
from sampler import FPS, Recipe, noise_seeded
from vae import VAE, load_vae
from zoo import (
    diagonal,
    ema_sink,
    lookahead,
    one_sided,
    plan_then_fill,
    rolling_forcing,
    routing,
    same_level,
    speculative,
    switch,
    tree,
)
from zoo.common import Method, forward_plan

PLAIN = {"forward": Method(forward_plan), "backward": Method(backward)}
METHODS: dict[str, Method] = (
    PLAIN
    | rolling_forcing.METHODS
    | lookahead.METHODS
    | tree.METHODS
    | plan_then_fill.METHODS
    | one_sided.METHODS
    | diagonal.METHODS
    | same_level.METHODS
    | speculative.METHODS
    | switch.METHODS
    | ema_sink.METHODS
    | routing.METHODS
)


@dataclass
class Config:
    """Make a clip with a method of the zoo."""

    FIRST = "method"  # the flag that the first word belongs to
    method: str  # one of `python -m zoo.run list`
    prompt: tuple[str, ...] = ("a red disc moves left over a green wave",)  # or one per scene
    out: str = "out/zoo.mp4"  # .mp4, .gif or .mkv
    latents: int = 0  # length; 0: as in the table, 21 but for methods of long video
    weights: str = "toy/weights"  # a folder with student and VAE
    size: tuple[int, ...] = (32, 32)  # height width
    seed: int = 0
    device: str = "auto"


def find_method(name: str) -> Method:
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; use {', '.join(METHODS)}")
    return METHODS[name]


def recipe_of(dit: DiT) -> Recipe:
    """How a student was trained; if its file is silent, the paper's way."""
    return Recipe.read(dit.recipe) or Recipe()


def latent_shape(vae: VAE, size: tuple[int, ...]) -> tuple[int, int, int]:
    """[C, h, w] of the latents of frames of this height and width. raises: UserError"""
    unit = 2 * vae.config.space
    if len(size) != 2 or min(size) < 1 or any(side % unit for side in size):
        raise UserError(f"--size {size} must be a height and a width divisible by {unit}")
    return vae.config.z_dim, *(side // vae.config.space for side in size)


@torch.no_grad()
def main(config: Config) -> None:
    if config.method == "list":
        print("\n".join(METHODS))
        return
    method = find_method(config.method)
    writer = VideoWriter(config.out, FPS)  # refuses a path it cannot write
    device = start(config.device)[2]
    dit, vae = load_dit(config.weights, device=device), load_vae(config.weights, device=device)
    recipe, c = recipe_of(dit), dit.config
    plan = method.plan(config.latents or method.length, recipe.block, recipe.anchors)
    if len(config.prompt) not in (1, plan.prompts()):
        raise UserError(f"{config.method} takes {plan.prompts()} prompts, not {len(config.prompt)}")
    print(text_picture(plan))
    words = text.embed(config.prompt, c.text_dim, c.text_len, weights=config.weights)
    texts = [dit.text_kv(row[None].to(device)) for row in words]
    texts = texts if len(texts) > 1 else texts * plan.prompts()
    noise = noise_seeded([(config.seed, 0, 0)], latent_shape(vae, config.size), device)
    z = method.generate(dit, plan, texts, noise, recipe=recipe)
    with writer:
        writer.write(vae.decode(z)[0])
    print(f"wrote {config.out}: {plan.length} latents in {len(plan.steps)} steps")


if __name__ == "__main__":
    run(main, Config)
