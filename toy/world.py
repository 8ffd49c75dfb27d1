"""The toy world: captioned procedural video with exact ground truth, to be learned on a laptop.

The idea: a caption such as "a red disc moves left over a blue wave" and an integer seed fix a clip
completely. One bright sprite crosses the frame and wraps round (so its direction holds at every
moment), now faster, now slower, turning, drifting between the other two walls. Behind it a small
pale ball bounces, and behind that a dark wave of the ground colour pans. Colour words name sprite
and ground alike, so word order matters. No word names the ball's tint or the waves: what a clip
began with must be kept (`identity`). One caption in eight is held out, by a hash of its words: no
training stream has it (`held_out`, `caption`). `measure` reads the words back from pixels alone, so
a generated clip is scored without a judge. Lengths are in units of 1/32 frame (a pixel at 32 px),
times in frames; drawing is plain arithmetic on [clips, frames, rows, columns].

What it does not do: keep a data set on disk, move a camera, light a scene; `measure` knows this
world only.

    python -m toy.world sheet.png      # a contact sheet: clips in rows, every 8th frame in columns
"""

import functools
import hashlib
import itertools
import math
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.common import Stream, generator
from lib.media import write_sheet
from lib.text import HELD_OUT, KNOWN

# Every number of this world is [ours].
PALETTE = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
PALETTE |= {"yellow": (1, 1, 0), "magenta": (1, 0, 1), "cyan": (0, 1, 1)}
HEADINGS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y down
COLOURS, DIRECTIONS = tuple(PALETTE), tuple(HEADINGS)
SHAPES = ("disc", "square", "triangle", "ring")
GRAMMAR = (("a",), COLOURS, SHAPES, ("moves",), DIRECTIONS, ("over",), ("a",), COLOURS, ("wave",))
VOCABULARY = tuple(dict.fromkeys(itertools.chain(*GRAMMAR)))

UNITS = 32.0  # frame width
SPRITE_LOW, SPRITE_SPAN = 0.04, 0.94  # sprite = low + span * palette, channels 0..1
GROUND_LOW, GROUND_SPAN, GROUND_WAVE = 0.10, 0.24, 0.30  # (low + span * palette) * (1 +- wave)
SPRITE_RADIUS, BALL_RADIUS = 7.5, 3.0  # every shape fits in the sprite radius
BALL_GREY, BALL_TINT = 0.55, 0.20  # grey + tint * cos(hue - 0, 1/3, 2/3 of a turn): a pale ball
BALL_DARKEST = 0.22  # the ball's lowest channel is above it, all other things' below
GROUND_BRIGHTEST = 0.5  # the sprite's highest channel is above it, the ground's below
SPEED_SWING = 0.4  # speed factor is 1 +- swing
SCALARS = 21  # random numbers per clip
RADII = (1, 2, 3, 4, 5, 6, 7, 8)  # circles on which `measure` looks at a shape
LOOKS = 16  # frames of a clip whose shapes are looked at
BLURS = (1.0, 3.0, 5.0)  # widths of soft edge at which `measure` knows the shapes


def held_out(caption: str) -> bool:
    """Whether no training stream may have this caption: one in eight, by the hash of its words."""
    return hashlib.sha256(caption.encode()).digest()[0] % 8 == 0


@functools.cache
def captions_of(part: str) -> tuple[str, ...]:
    """All 576 captions, or a part: "known", which training sees, or "new", which it never does."""
    every = [" ".join(words) for words in itertools.product(*GRAMMAR)]
    return tuple(c for c in every if part == "all" or held_out(c) == (part == "new"))


def random_captions(
    n: int, generator: torch.Generator | None = None, part: str = "all"
) -> list[str]:
    """n captions of a part of them (`captions_of`), uniform and independent."""
    some = captions_of(part)
    return [some[i] for i in torch.randint(len(some), (n,), generator=generator).tolist()]


def caption(number: int) -> str:
    """The caption of a clip: one held out from HELD_OUT to KNOWN, else one training sees."""
    part = "new" if HELD_OUT <= number < KNOWN else "known"
    return random_captions(1, generator(number, Stream.CAPTION), part)[0]


def parse(caption: str) -> dict[str, str]:
    """A caption's words as {colour, shape, direction, ground}.

    raises: ValueError if it does not fit the grammar"""
    words = caption.split()
    for place, (word, allowed) in enumerate(itertools.zip_longest(words, GRAMMAR), start=1):
        if allowed is None:
            raise ValueError(
                f"caption {caption!r} goes on with {word!r} where it must end, after 'wave'."
            )
        if word not in allowed:
            fault = "is missing and" if word is None else f"is {word!r} but"
            must = f"must be one of: {', '.join(allowed)}."
            raise ValueError(f"word {place} of caption {caption!r} {fault} {must}")
    return {"colour": words[1], "shape": words[2], "direction": words[4], "ground": words[7]}


def render(
    captions: list[str],
    seeds: list[int] | Tensor,
    size: int = 32,
    frames: int = 81,
    speed: float = 1.0,
) -> Tensor:
    """Draw clips: float32 [B, 3, frames, size, size] in [-1, 1].

    Clip i depends only on (captions[i], seeds[i], size), never on the batch; `frames` only cuts the
    length. speed: how much of the world's time passes in a frame; below 1 it is slow motion
    """
    if not len(captions) == len(seeds) > 0:
        raise ValueError(
            f"render needs a seed per caption, not {len(seeds)} for {len(captions)} captions."
        )
    words = [parse(c) for c in captions]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    scalars = [torch.rand(SCALARS, 1, generator=g, dtype=torch.float64) for g in generators]
    draws = iter(torch.stack(scalars).unbind(1))  # each [B, 1], against t [F]
    t = torch.arange(frames, dtype=torch.float64) * speed

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * next(draws)

    def bounce(radius: float, speed: Tensor) -> Tensor:  # a triangle wave between two walls
        span = UNITS - 2 * radius
        return radius + (torch.remainder(uniform(0, 2 * span) + speed * t, 2 * span) - span).abs()

    # Where things are, each [B, F]: the sprite's speed swings along its heading, all else bounces.
    headings = [HEADINGS[w["direction"]] for w in words]
    heading = torch.tensor(headings, dtype=torch.float64)[..., None]  # [B, 2, 1]
    start, speed, phase = uniform(0, UNITS), uniform(1.2, 1.8), uniform(0, 2 * math.pi)
    rate = 2 * math.pi / uniform(30, 80)
    travel = speed * (t - SPEED_SWING / rate * (torch.cos(rate * t + phase) - phase.cos()))
    along, across = start + heading.sum(1) * travel, bounce(SPRITE_RADIUS, uniform(0.3, 0.5))
    sprite_x, sprite_y = (torch.where(heading[:, i] != 0, along, across) for i in (0, 1))
    turn = uniform(0, 2 * math.pi) + uniform(-0.05, 0.05) * t
    ball_x, ball_y = (bounce(BALL_RADIUS, uniform(0.4, 0.9)) for _ in "xy")

    # The ground: two crossing plane waves that pan, sin(a + b) split so that pixels only multiply.
    pixel = (torch.arange(size, dtype=torch.float64) + 0.5) * UNITS / size
    pan, pan_angle, tilt = uniform(0.5, 0.8), uniform(0, 2 * math.pi), uniform(0, 2 * math.pi)
    wave = 1.0
    for angle in (tilt, tilt + uniform(math.pi / 3, 2 * math.pi / 3)):
        k = 2 * math.pi / UNITS * uniform(0.5, 1.0)
        shift = uniform(0, 2 * math.pi) - k * pan * torch.cos(angle - pan_angle) * t
        a = (k * angle.cos() * pixel)[:, None, None, :] + shift[..., None, None]  # [B, F, 1, W]
        b = (k * angle.sin() * pixel)[:, None, :, None]  # [B, 1, H, 1]
        plane = a.sin().float() * b.cos().float() + a.cos().float() * b.sin().float()
        wave = wave + GROUND_WAVE / 2 * plane
    video = (GROUND_LOW + GROUND_SPAN * _palette(w["ground"] for w in words)) * wave[:, None]

    # The ball over the ground, then the sprite over both.
    ball = _cover("ball", *_offsets(ball_x, ball_y, size), size)
    u, v = _turned(*_offsets(sprite_x, sprite_y, size), turn)
    sprite = torch.empty_like(u)
    for shape in SHAPES:
        where = [i for i, w in enumerate(words) if w["shape"] == shape]
        sprite[where] = _cover(shape, u[where], v[where], size)
    thirds = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    tint = BALL_GREY + BALL_TINT * (uniform(0, 2 * math.pi) - thirds).cos().float()  # [B, 3]
    video += ball[:, None] * (tint[..., None, None, None] - video)
    colour = SPRITE_LOW + SPRITE_SPAN * _palette(w["colour"] for w in words)
    video += sprite[:, None] * (colour - video)
    return video.mul_(2).sub_(1)


def _palette(colours) -> Tensor:
    """Colour words to [B, 3, 1, 1, 1] in 0..1."""
    return torch.tensor([PALETTE[c] for c in colours], dtype=torch.float32)[..., None, None, None]


def _offsets(x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Shortest way round the torus from centres [B, F] to pixels: [B, F, 1, W], [B, F, H, 1]."""
    pixel = (torch.arange(size, dtype=torch.float64) + 0.5) * UNITS / size
    dx, dy = (_around(pixel - c[..., None].double()).float() for c in (x, y))
    return dx[:, :, None, :], dy[:, :, :, None]


def _around(length: Tensor) -> Tensor:
    """Wrap lengths to half a frame either way."""
    return torch.remainder(length + UNITS / 2, UNITS) - UNITS / 2


def _turned(dx: Tensor, dy: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets in the axes of a sprite turned by [B, F] radians: two of [B, F, H, W]."""
    cos, sin = turn.cos().float()[..., None, None], turn.sin().float()[..., None, None]
    return cos * dx + sin * dy, cos * dy - sin * dx


def _cover(shape: str, u: Tensor, v: Tensor, size: int, blur: float = 1.0) -> Tensor:
    """How much of each pixel a shape covers, 0..1: its edge is `blur` pixels soft."""
    if shape == "square":
        distance = torch.maximum(u.abs(), v.abs()) - 5.3
    elif shape == "triangle":
        distance = torch.maximum(v, math.sqrt(3) / 2 * u.abs() - v / 2) - 3.2
    else:
        r = (u * u + v * v).sqrt()
        distance = {"disc": r - 5.0, "ring": (r - 4.8).abs() - 1.7, "ball": r - BALL_RADIUS}[shape]
    return (0.5 - distance * (size / UNITS / blur)).clamp_(0, 1)


def _descriptor(cover: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How a shape [B, F, H, W] about centres [B, F] looks, however it is turned: [B, F, 2 * radii].

    On circles of several radii: the mean cover, and how strongly it repeats four times round it.
    """
    z = torch.complex(*torch.broadcast_tensors(*_offsets(x, y, cover.shape[-1])))
    r = z.abs()
    fourfold, parts = (z / r.clamp_min(1e-6)) ** 4, []
    for radius in RADII:
        circle = (1 - (r - radius).abs()).clamp_min(0)
        part = circle / circle.sum((-2, -1), keepdim=True).clamp_min(1e-6) * cover
        parts += [part.sum((-2, -1)), (part * fourfold).sum((-2, -1)).abs()]
    return torch.stack(parts, -1)


@functools.lru_cache
def _references(size: int) -> Tensor:
    """Mean descriptors over angles and places: [blurs * shapes, 2 * radii]."""
    x, y = UNITS / 2 + torch.rand(2, 1, 64, generator=torch.Generator().manual_seed(0))
    u, v = _turned(*_offsets(x, y, size), torch.linspace(0, math.pi / 2, 64)[None])
    drawn = [_cover(shape, u, v, size, blur * size / UNITS) for blur in BLURS for shape in SHAPES]
    return torch.stack([_descriptor(cover, x, y).mean((0, 1)) for cover in drawn])


def _nearest_colour(rgb: Tensor) -> Tensor:
    """Palette index [B] of colours [B, 3], by hue alone."""
    low, high = rgb.amin(1, keepdim=True), rgb.amax(1, keepdim=True)
    hue = (rgb - low) / (high - low).clamp_min(1e-6)
    return torch.cdist(hue, _palette(COLOURS).flatten(1)).argmin(1)


@torch.no_grad()
def measure(video: Tensor) -> list[dict[str, str]]:
    """Read {colour, shape, direction, ground} from pixels [B, 3, F, H, W] in [-1, 1], or 'none'."""
    rgb = (video.float().cpu().nan_to_num().clamp(-1, 1) + 1) / 2
    size, frames = rgb.shape[-1], rgb.shape[2]
    mask = _saturated(rgb)  # [B, F, H, W]: sprite only
    mass = mask.sum((-2, -1))
    present = (mask.mean((1, 2, 3)) - 0.2).abs() < 0.19  # a sprite fills 1 to 39 % of the frame
    some = torch.linspace(0, frames - 1, min(frames, LOOKS)).round().long()  # not for direction
    few, few_mask = rgb[:, :, some], mask[:, None, some]

    colour = _nearest_colour((few * few_mask).mean((2, 3, 4)))
    ground_rgb = few.masked_fill(few_mask > 0, math.nan).flatten(2).nanmedian(2).values.nan_to_num()
    ground = _nearest_colour(ground_rgb)

    # Direction: circular centroids and their mean step (it counts as far as both ends are seen).
    circle = torch.exp(2j * math.pi * (torch.arange(size) + 0.5) / size)
    x, y = ((mask.sum(d) * circle).sum(-1).angle() / (2 * math.pi) * UNITS for d in (-2, -1))
    seen = torch.minimum(mass[:, 1:], mass[:, :-1])
    velocity = torch.stack([(_around(c.diff(dim=1)) * seen).sum(1) for c in (x, y)], 1)
    velocity = velocity / seen.sum(1, keepdim=True).clamp_min(1e-6)
    progress, direction = (velocity @ torch.tensor(list(HEADINGS.values())).float().T).max(1)

    # Shape: where pixels lie from ground to sprite colour (linear: noise averages).
    cover = _between(few, ground_rgb, _palette(COLOURS).flatten(1)[colour])
    found = (_descriptor(cover, x[:, some], y[:, some]) * mass[:, some, None]).sum(1)
    alike = torch.cosine_similarity(found[:, None], _references(size), dim=-1)

    moving = present & (progress > 0.1)
    grounded = ground_rgb.amax(1) - ground_rgb.amin(1) > 0.06
    read = {
        "colour": (COLOURS, colour, present),
        "shape": (SHAPES, alike.argmax(1) % len(SHAPES), present),
        "direction": (DIRECTIONS, direction, moving),
        "ground": (COLOURS, ground, grounded),
    }

    def word(key: str, i: int) -> str:
        names, index, there = read[key]
        return names[index[i]] if there[i] else "none"

    return [{key: word(key, i) for key in read} for i in range(len(rgb))]


def hits(video: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Whether each word shows in clips [B, 3, F, H, W] as captioned, bool [B] each.

    caption: colour, shape and direction all do"""
    pairs = list(zip(measure(video), map(parse, captions), strict=True))
    found = {k: torch.tensor([seen[k] == said[k] for seen, said in pairs]) for k in pairs[0][1]}
    return found | {"caption": found["colour"] & found["shape"] & found["direction"]}


def accuracy(video: Tensor, captions: list[str]) -> dict[str, float]:
    """Share of clips [B, 3, F, H, W] with each word as captioned, and the whole `caption`."""
    return {key: hit.double().mean().item() for key, hit in hits(video, captions).items()}


def _saturated(rgb: Tensor) -> Tensor:
    """1 where a pixel [B, 3, F, H, W] has a strong colour, 0 where it has none: [B, F, H, W]."""
    return ((rgb.amax(1) - rgb.amin(1) - 0.35) / 0.5).clamp(0, 1)


def _between(rgb: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] from near (0) to far (|far - near|^2), less grey: [B, F, H, W]."""
    pixels, near, far = (c - c.mean(1, keepdim=True) for c in (rgb.flatten(2), near, far))
    return ((pixels - near[..., None]) * (far - near)[..., None]).sum(1).unflatten(1, rgb.shape[2:])


@torch.no_grad()
def outline(video: Tensor, captions: Sequence[str]) -> Tensor:
    """How well the sprite in pixels [B, 3, F, H, W] fills the outline that its caption names, 0..1.

    [B]: what sprite and shape both cover over what either does, mean of up to 16 frames; the shape
    is drawn at the sprite's centre, turned as it fits best. `measure` asks which shape a sprite is
    most like: a square without corners is a square to it. True clips have .98, through the toy's
    VAE .93, and asked for another shape .17 to .72 [measured]."""
    rgb = (video.float().cpu().nan_to_num().clamp(-1, 1) + 1) / 2
    some = torch.linspace(0, rgb.shape[2] - 1, min(rgb.shape[2], LOOKS)).round().long()
    rgb, size, words = rgb[:, :, some], rgb.shape[-1], [parse(c) for c in captions]
    ground = rgb.masked_fill(_saturated(rgb)[:, None] > 0, math.nan)
    near = ground.flatten(2).nanmedian(2).values.nan_to_num()
    far = SPRITE_LOW + SPRITE_SPAN * _palette(w["colour"] for w in words).flatten(1)
    whole = _between(far[..., None, None, None], near, far).clamp_min(1e-6)  # [B, 1, 1, 1]
    cover = _between(rgb, near, far) / whole  # [B, F, H, W]
    cover = ((cover - 0.4) / 0.2).clamp(0, 1) * (rgb.amin(1) < BALL_DARKEST)  # not the pale ball
    circle = torch.exp(2j * math.pi * (torch.arange(size) + 0.5) / size)
    x, y = ((cover.sum(d) * circle).sum(-1).angle() / (2 * math.pi) * UNITS for d in (-2, -1))
    away = (cover * d for d in _offsets(x, y, size))  # the mean on a circle is off for triangles
    x, y = (c + d.sum((-2, -1)) / cover.sum((-2, -1)).clamp_min(1e-6) for c, d in zip((x, y), away))
    offsets, best = _offsets(x, y, size), torch.zeros(cover.shape[:2])
    folds = torch.tensor([{"square": 4, "triangle": 3}.get(w["shape"], 1) for w in words])
    for turn in torch.linspace(0, 2 * math.pi, 37)[:-1]:
        u, v = _turned(*offsets, (turn / folds)[:, None].expand_as(x))
        drawn = torch.stack([_cover(w["shape"], *uv, size, 0.2) for w, *uv in zip(words, u, v)])
        both, either = torch.minimum(cover, drawn), torch.maximum(cover, drawn)
        best = torch.maximum(best, both.sum((-2, -1)) / either.sum((-2, -1)))
    return best.mean(1)


# ---------------------------------------------------------------- what no word says
@torch.no_grad()
def identity(video: Tensor) -> dict[str, Tensor]:
    """What a clip keeps though no word says it, from pixels [B, 3, F, H, W] in [-1, 1].

    NaN where it is not to be seen.
    ball: [B, 2], its tint, as the cosine and sine of its hue times its strength
    ground: [B, 2], the pan of its waves (x, y), pixels a frame at 32 px
    Two pieces of one clip have nearly the same numbers, two clips do not. (The way the waves face
    would be another, but the frame shows less than two of them: there, pieces differ as clips do.)
    """
    rgb = (video.float().cpu().nan_to_num().clamp(-1, 1) + 1) / 2
    return {"ball": _ball_tint(rgb), "ground": _ground_pan(rgb.mean(1), _is_ground(rgb))}


def _ball_tint(rgb: Tensor) -> Tensor:
    """Mean chroma [B, 2] of the ball, which alone has no dark channel, even blurred a little."""
    weight = ((rgb.amin(1) - BALL_DARKEST) / 0.1).clamp(0, 1)  # (B, F, H, W)
    thirds = torch.arange(3) * 2 * math.pi / 3
    axes = torch.stack([thirds.cos(), thirds.sin()]) * 2 / 3  # grey has no part in either
    share = weight.mean((1, 2, 3))[:, None]  # of the frame; a ball fills .027
    chroma = torch.einsum("bcfhw,bfhw,ac->ba", rgb, weight, axes) / weight.sum((1, 2, 3))[:, None]
    return torch.where((share > 0.002) & (share < 0.1), chroma, torch.nan)


def _is_ground(rgb: Tensor) -> Tensor:
    """1 where a pixel [B, 3, F, H, W] and all within 3 of it are ground, else 0: [B, F, H, W]."""
    other = (rgb.amax(1) > GROUND_BRIGHTEST) | (rgb.amin(1) > BALL_DARKEST)
    return 1 - F.max_pool2d(other.float(), 7, stride=1, padding=3)


def _ground_pan(light: Tensor, ground: Tensor, lag: int = 2) -> Tensor:
    """How fast light [B, F, H, W] moves where `ground` is 1: (x, y) of each clip, [B, 2].

    Least squares of light_t + pan . light_xy = 0 over all pixels and frames. Waves are long, so
    light is blurred first: noise in gradients would make the pan look slow.
    """
    frames, size = light.shape[1], light.shape[-1]
    if frames <= 2 * lag:
        return light.new_full((len(light), 2), torch.nan)
    light = F.avg_pool2d(light, 5, stride=1, padding=2)
    inside = slice(3, size - 3)  # the blur is whole there
    before, now, after = (slice(i * lag, frames - (2 - i) * lag) for i in range(3))
    dx = (light[:, now, inside, 4 : size - 2] - light[:, now, inside, 2 : size - 4]) / 2
    dy = (light[:, now, 4 : size - 2, inside] - light[:, now, 2 : size - 4, inside]) / 2
    dt = (light[:, after, inside, inside] - light[:, before, inside, inside]) / (2 * lag)
    valid = (ground[:, before] * ground[:, now] * ground[:, after])[..., inside, inside]

    def total(product: Tensor) -> Tensor:
        return (product * valid).sum((1, 2, 3)).double()

    xx, xy, yy, xt, yt = map(total, (dx * dx, dx * dy, dy * dy, dx * dt, dy * dt))
    determinant = xx * yy - xy * xy
    pan = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], 1) / determinant[:, None]
    known = determinant > 1e-6 * (xx + yy).square()  # gradients face more than one way
    return torch.where(known[:, None], pan * UNITS / size, torch.nan).float()


def main(path: str) -> None:
    """Write a contact sheet PNG of eight clips: one a row, every 8th frame a column."""
    captions = random_captions(8, torch.Generator().manual_seed(1))
    write_sheet(path, render(captions, range(8)), columns=11)
    print("\n".join(captions))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["world.png"]))
