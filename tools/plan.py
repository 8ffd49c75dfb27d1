"""A plan as a picture: above, the order of generation (paper Fig. 9), below, the mask (Fig. 8).

Green: targets, light green: read, yellow: anchors, blue: dummy, grey: given. Numbers are latents;
in the mask a row is what a latent sees.

    python -m tools.plan --order backward --latents 9 --out plan.png
"""

import os
from dataclasses import dataclass

import imageio.v3 as iio
import numpy as np

import plans  # noqa: F401  (registers its orders)
from anchors import ORDERS, Plan, layout, text_picture
from lib.common import UserError, atomic, run
from lib.letters import marks
from lib.picture import draw_grid

COLOURS = {".": (255, 255, 255), "T": (88, 163, 90), "G": (120, 120, 120), "a": (244, 200, 66)}
COLOURS |= {"r": (190, 225, 190), "d": (90, 140, 220)}
MOST_SLOTS = 64  # a mask of more slots, or with moved keys, tells nothing


def name(latent: int) -> str:
    """A latent's label; dummies begin with d."""
    return f"d{~latent}" if latent < 0 else str(latent)


def order_panel(plan: Plan) -> np.ndarray:
    """A row a step, a column a latent."""
    dummies = sorted((i for i in plan.made_at if i < 0), reverse=True)
    columns = [*dummies, *range(plan.length)]
    rows = []
    for step in plan.steps:
        mark = marks(step) | {i: "d" for i in step.targets if i < 0}
        rows.append([mark.get(i, ".") for i in columns])
    return draw_grid(rows, [str(n) for n in range(len(rows))], [name(i) for i in columns], COLOURS)


def mask_panel(plan: Plan) -> np.ndarray | None:
    """A row a query, a column a key, both in time; a latent that is anchor and target has two."""
    lay = layout(plan)
    if len(lay.latent) > MOST_SLOTS or lay.visible.key_slot is not None:
        return None

    def in_time(slot: int) -> tuple[int, int]:
        first = min(plan.steps[lay.step[slot]].targets)
        return (first if lay.latent[slot] >= 0 else -9, lay.pos[slot])

    dense, shown = lay.visible.dense(), sorted(range(len(lay.latent)), key=in_time)
    rows = []
    for q in shown:
        row = []
        for k in shown:
            kind = "d" if lay.latent[k] < 0 else "T" if lay.is_target[k] else "a"
            own = lay.step[k] == lay.step[q]
            row.append((kind if own else "r") if dense[q, k] else ".")
        rows.append(row)
    labels = [name(lay.latent[s]) for s in shown]
    return draw_grid(rows, labels, labels, COLOURS)


def picture(plan: Plan) -> np.ndarray:
    """uint8 [H, W, 3]."""
    panels = [p for p in (order_panel(plan), mask_panel(plan)) if p is not None]
    width, padded = max(p.shape[1] for p in panels), []
    for panel in panels:
        margins = ((0, 16), (0, width - panel.shape[1]), (0, 0))
        padded.append(np.pad(panel, margins, constant_values=255))
    return np.concatenate(padded)


def write_picture(path: str | os.PathLike, plan: Plan) -> None:
    """`picture` as a PNG."""
    with atomic(path) as tmp:
        iio.imwrite(tmp, picture(plan))


@dataclass
class Config:
    """Print a plan; write its picture."""

    order: str = "backward"  # one of anchors.ORDERS
    latents: int = 21  # how many
    block: int = 3  # latents a step finishes
    anchors: int = 3  # imagined latents before each backward block
    out: str = ""  # a .png for the picture
    dummy: bool = False  # the paper's baseline without anchors (with --anchors 0)


def main(config: Config) -> None:
    if config.order not in ORDERS:
        raise UserError(f"unknown order {config.order!r}; use {', '.join(ORDERS)}")
    make = ORDERS[config.order]
    accepted = make.__code__.co_varnames[: make.__code__.co_argcount]
    values = {"block": config.block, "anchors": config.anchors, "dummy": config.dummy}
    plan = make(config.latents, **{k: v for k, v in values.items() if k in accepted})
    print(text_picture(plan))
    print(
        f"{plan.length} latents in {len(plan.steps)} steps; the cache holds at most {plan.capacity}"
    )
    if config.out:
        write_picture(config.out, plan)


if __name__ == "__main__":
    run(main, Config)
