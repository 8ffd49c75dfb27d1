"""Drawing without a library: small letters, coloured tables, curves of a log. uint8 [H, W, 3]."""

import json
import os
import pathlib
from collections.abc import Sequence

import imageio.v3 as iio
import numpy as np

from lib.common import atomic

GREY, BLUE = (60, 60, 60), (40, 90, 160)


def _font() -> dict[str, np.ndarray]:
    """A font [ours] of 3 x 5 pixels: each letter's fifteen bits, as four hexadecimal digits."""
    letters = "0123456789abcdefghijklmnopqrstuvwxyz_.-+"
    digits = (
        "7b6f2c9773e773cf5bc979cf79ef72927bef7bcf2bed6bae39236b6e79a779a4396b5bed7497126a"
        "5bad49275fed6b6d2b6a6ba42b7b6bad388e74925b6f5b6a5bfd5aad5a9272a70007000201c005d0"
    )
    font = {}
    for n, letter in enumerate(letters):
        bits = f"{int(digits[4 * n : 4 * n + 4], 16):015b}"
        font[letter] = np.array([bit == "1" for bit in bits]).reshape(5, 3)
    return font


FONT = _font()


def write_text(image: np.ndarray, row: int, column: int, text: str, scale: int = 1) -> None:
    """Write small letters and digits into a picture, the first one's corner at (row, column)."""
    for n, letter in enumerate(text):
        if letter not in FONT:
            continue
        pixels = FONT[letter].repeat(scale, 0).repeat(scale, 1)
        left = column + 4 * scale * n
        image[row : row + 5 * scale, left : left + 3 * scale][pixels] = GREY


def draw_grid(
    rows: Sequence[Sequence[str]],
    left: Sequence[str],
    top: Sequence[str],
    colours: dict[str, tuple[int, int, int]],
    cell: int = 16,
) -> np.ndarray:
    """A table as a picture: a coloured cell for every mark in `rows`, labels beside and above."""
    image = np.full(((len(rows) + 1) * cell, (len(top) + 1) * cell, 3), 255, np.uint8)
    for r, row in enumerate(rows, 1):
        for c, mark in enumerate(row, 1):
            box = image[r * cell : (r + 1) * cell, c * cell : (c + 1) * cell]
            box[1:, 1:] = colours[mark]
            box[0], box[:, 0] = 210, 210
    for c, label in enumerate(top, 1):
        write_text(image, 5, c * cell + 1, label)
    for r, label in enumerate(left, 1):
        write_text(image, r * cell + 5, 1, label)
    return image


HEIGHT, WIDTH, MARGIN = 60, 600, 130  # of a strip with a curve; the margin holds its name


def _strip(name: str, steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One curve: its name, highest and lowest value beside it."""
    strip = np.full((HEIGHT, MARGIN + WIDTH, 3), 255, np.uint8)
    strip[-1] = 200
    write_text(strip, 24, 4, name, scale=2)
    if len(steps) < 2:
        return strip
    level = np.interp(np.linspace(steps[0], steps[-1], WIDTH), steps, values)
    spread = max(np.ptp(level), 1e-12)
    rows = ((level.max() - level) / spread * (HEIGHT - 8) + 3).astype(int)
    for x in range(WIDTH):  # from its neighbour's row to its own, so that there are no holes
        low, high = sorted((rows[max(x - 1, 0)], rows[x]))
        strip[low : high + 1, MARGIN + x] = BLUE
    write_text(strip, 4, 4, f"{level.max():.4g}", scale=2)
    write_text(strip, HEIGHT - 16, 4, f"{level.min():.4g}", scale=2)
    return strip


def write_curves(path: str | os.PathLike, log: str | os.PathLike) -> None:
    """Draw every number of a JSONL log against its `step`, as a PNG: a strip each."""
    rows = [json.loads(line) for line in pathlib.Path(log).read_text().splitlines()]
    strips = []
    for name in sorted({key for row in rows for key in row} - {"step"}):
        points = [(row["step"], row[name]) for row in rows if np.isfinite(row.get(name, np.nan))]
        steps, values = np.array(points, float).reshape(-1, 2).T
        strips.append(_strip(name, steps, values))
    strips = strips or [_strip("", np.empty(0), np.empty(0))]
    with atomic(path) as tmp:
        iio.imwrite(tmp, np.concatenate(strips))
