"""Make a clip with any method of the zoo; the list of all of them is here.

python -m zoo.run rolling_forcing --prompt "a red disc moves left over a green wave" --out a.mp4
python -m zoo.run list
"""

from dataclasses import dataclass

import torch

from anchors import backward, text_picture
from generate import frame_size, load_models, write_video
from lib import text
from lib.common import UserError, run, start
from lib.media import VideoWriter
from lib.noise import noise_seeded
from lib.recipe import recipe_of
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
    teachers,
    tree,
)
from zoo.common import Method, forward_plan, long_backward, long_forward

PLAIN = {
    "forward": Method(forward_plan, against=""),
    "backward": Method(backward, against=""),
    "long-forward": Method(long_forward, against="", length=63),
    "long-backward": Method(long_backward, against="", length=63),
}
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
    size: tuple[int, ...] = ()  # height width; default: what suits the VAE
    seed: int = 0
    device: str = "auto"


def find_method(name: str) -> Method:
    """raises: UserError naming those that there are"""
    known = METHODS | teachers.METHODS
    if name not in known:
        raise UserError(f"unknown method {name!r}; use {', '.join(known)}")
    return known[name]


@torch.no_grad()
def main(config: Config) -> None:
    if config.method == "list":
        print("\n".join([*METHODS, "", "with --weights of a teacher:", *teachers.METHODS]))
        return
    method = find_method(config.method)
    VideoWriter(config.out)  # refuses a name it cannot write
    device = start(config.device)[2]
    dit, vae = load_models(config.weights, device=device)
    recipe, c = recipe_of(dit), dit.config
    plan = method.plan(config.latents or method.length, recipe.block, recipe.anchors)
    if len(config.prompt) not in (1, plan.prompts()):
        raise UserError(f"{config.method} takes {plan.prompts()} prompts, not {len(config.prompt)}")
    print(text_picture(plan))
    words = text.embed(config.prompt, c.text_dim, c.text_len, weights=config.weights)
    texts = [row[None].to(device) for row in words]
    texts = texts if len(texts) > 1 else texts * plan.prompts()
    h, w = (side // vae.config.space for side in frame_size(config.size, dit, vae))
    noise = noise_seeded([(config.seed, 0, 0)], (c.in_dim, h, w), device)
    z = method.generate(dit, plan, texts, noise, recipe=recipe)
    frames = write_video(config.out, [vae.decode(z).cpu()])
    print(f"wrote {config.out}: {frames} frames, {plan.length} latents in {len(plan.steps)} steps")


if __name__ == "__main__":
    run(main, Config)
