"""What full size costs, by counting: no GPU is needed to know what a GPU will have to do.

Two kinds of cost, each with its own ceiling:

    FLOPs       linear layers and attention, two a multiplication; formulas, tested against torch
    bytes       weights, and what is read of the cache

"Least" times divide by a datasheet, so nothing can be faster, and all is slower: `tools/gpu.py`
measures.

    python -m tools.count                          # the tables of docs/counting.md
    python -m tools.count --write docs/counting.md    # and put them there
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import anchors
from anchors import Plan, layout
from dit import PRESETS, DiT, DiTConfig
from lib.common import UserError, atomic, run
from plans import both_directions
from vae import VAE

H, W = 60, 104  # cells of a latent at 480 x 832
PEAK, BANDWIDTH = 989e12, 3.35e12  # FLOP/s in dense bfloat16, bytes/s: an H100's datasheet
LEVELS = 4  # denoising steps a block [paper]
MEAN_EXIT = 2.5  # of stage 2's rollouts: 1 to 4 denoising steps
CHECKPOINTED = 4  # forward, forward again, backward: 1 + 1 + 2
UMT5 = {"layers": 24, "dim": 4096, "ffn": 10240}  # [Wan] the text encoder
BFLOAT = 2  # bytes
ADAMW = 28  # bytes a parameter: float32 weight, gradient and moments read, all but one written
ORDERS = {  # rows of the tables, as the paper's Table 7 has them
    "forward": anchors.forward(21),
    "forward, both sinks": anchors.forward(21, view=anchors.View(6, True, True)),
    "backward, P = 3": anchors.backward(21),
    "backward, P = 3, both sinks": anchors.backward(21, view=anchors.View(6, True, True)),
    "inbetween, 15 latents": anchors.inbetween(given=True),
}


# ---------------------------------------------------------------- sizes and FLOPs, by formula
def size_of(c: DiTConfig) -> int:
    """How many parameters a transformer of this config has."""
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(c).parameters())


def vae_size() -> int:
    """How many parameters the VAE has that decode."""
    with torch.device("meta"):
        return sum(p.numel() for k, p in VAE().named_parameters() if "encoder" not in k)


def latent_bytes(c: DiTConfig, tokens: int) -> int:
    """Of one latent's keys and values in all layers, in bfloat16."""
    return 2 * c.num_layers * tokens * c.dim * BFLOAT


def linear_flops(c: DiTConfig, tokens: int) -> float:
    """Of a pass's linear layers: two a weight and token."""
    return c.num_layers * 2 * tokens * c.dim * (6 * c.dim + 2 * c.ffn_dim)


def attention_flops(c: DiTConfig, tokens: int, keys: int) -> float:
    """Of a pass's attention: four a query, key and channel."""
    return c.num_layers * 4 * tokens * keys * c.dim


def pass_flops(c: DiTConfig, tokens: int, keys: int) -> float:
    """Of one pass over `tokens` that see `keys`, with the text's keys given."""
    return linear_flops(c, tokens) + attention_flops(c, tokens, keys + c.text_len)


def clean_flops(c: DiTConfig, tokens: int, keys: int) -> float:
    """Of the pass that only makes keys and values: its last layer stops at them."""
    all_but_one = (c.num_layers - 1) / c.num_layers
    return all_but_one * pass_flops(c, tokens, keys) + 2 * tokens * c.dim * 2 * c.dim


def passes(plan: Plan, levels: float = LEVELS) -> Iterator[tuple[float, int, int, bool]]:
    """How often the transformer runs, on how many latents that see how many; is it a clean pass?

    Each step is denoised at so many levels, and runs once clean if a later step reads it."""
    for n, step in enumerate(plan.steps):
        past, own, targets = len(step.reads), len(step.own), len(step.targets)
        if not step.commits:
            yield levels, own, past + own, False
        if any(plan.last_read.get(i, -1) > n for i in step.targets):
            yield 1, targets, past + targets, True


def plan_flops(c: DiTConfig, plan: Plan, tokens: int, levels: float = LEVELS) -> float:
    """Of a whole rollout."""
    total = 0.0
    for times, own, seen, clean in passes(plan, levels):
        flops = clean_flops if clean else pass_flops
        total += times * flops(c, own * tokens, seen * tokens)
    return total


def masked_flops(c: DiTConfig, plan: Plan, tokens: int) -> float:
    """Of one masked pass over a whole plan (stage 1): every slot sees what its spans say."""
    total = 0.0
    for first, stop, ranges in layout(plan).visible.spans:
        keys = sum(b - a for a, b in ranges)
        total += pass_flops(c, (stop - first) * tokens, keys * tokens)
    return total


def text_kv_flops(c: DiTConfig) -> float:
    """Of a prompt's keys and values in every layer."""
    return 2 * c.text_len * (c.text_dim * c.dim + c.dim**2 + c.num_layers * 2 * c.dim**2)


@cache
def vae_flops(latents: int, first: bool = False) -> float:
    """Of decoding so many latents of a stream (first: its image latent), counted by torch from the
    real network."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():
        model = VAE()
        z = torch.empty(1, latents, model.config.z_dim, H, W)
        state = None if first else model.decode_chunk(z[:, :1])[1]
        with counter:
            model.decode_chunk(z, state)
    return counter.get_total_flops()


def clip_vae_flops(latents: int) -> float:
    """Of decoding a whole clip."""
    return vae_flops(1, first=True) + (latents - 1) * vae_flops(1)


def clip_seconds(c: DiTConfig, n: int, plan: Plan) -> float:
    """Least time of a clip: its arithmetic."""
    return (plan_flops(c, plan, n) + clip_vae_flops(plan.length)) / PEAK


# ---------------------------------------------------------------- the tables
Row = list[str | float]


def table(columns: dict[str, str], rows: Iterable[Row]) -> str:
    """A Markdown table; columns: name -> how the numbers below it are written."""
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        pairs = zip(row, columns.values())
        lines.append([x if isinstance(x, str) else format(x, how) for x, how in pairs])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def part_table(c: DiTConfig, n: int) -> str:
    """FLOPs and bytes of every part of generating and training."""
    weights, latent = size_of(c) * BFLOAT, latent_bytes(c, n)
    layers, width, words = UMT5["layers"], UMT5["dim"], c.text_len
    encoder = layers * (4 * width**2 + 3 * width * UMT5["ffn"])  # square matrices, a gated net
    encoded = 2 * words * encoder + layers * 4 * words**2 * width
    found = [
        ("text encoder, once a prompt", encoded, encoder * BFLOAT),
        ("text keys and values, once a prompt", text_kv_flops(c), text_kv_flops(c) / words),
    ]
    for name, own, seen in (
        ("denoising step, 3 latents see 3", 3, 3),
        ("denoising step, 3 see 12: the mean of a forward clip", 3, 12),
        ("denoising step, 3 see 21", 3, 21),
        ("denoising step, backward, 6 see 21", 6, 21),
        ("denoising step, inbetween, 15 see 21", 15, 21),
    ):
        found.append((name, pass_flops(c, n * own, n * seen), weights + seen * latent))
    found += [
        ("clean pass, 3 see 21", clean_flops(c, 3 * n, 21 * n), weights + 21 * latent),
        ("cache: read 18 latents, turn their keys", 0.0, 2 * 18 * latent),
        ("VAE, 3 latents", vae_flops(3), BFLOAT * vae_size()),
        ("AdamW, 28 bytes a parameter", 0.0, ADAMW * size_of(c)),
    ]
    rows: list[Row] = []
    for name, flop, size in found:
        busy, moving = flop / PEAK, size / BANDWIDTH
        bound = "arithmetic" if busy > moving else "memory"
        rows.append([name, flop / 1e12, size / 1e9, flop / size, bound, 1e3 * max(busy, moving)])
    numbers = {"TFLOP": ".3g", "GB": ".3g", "FLOP a byte": ".0f", "bound by": "", "least ms": ".3g"}
    return table({"part": ""} | numbers, rows)


def clip_table(c: DiTConfig, n: int) -> str:
    """FLOPs of whole clips, and the frames a second that they allow."""
    rows = []
    for name, plan in (ORDERS | {"30 s forward, both sinks": anchors.long(120)}).items():
        frames, seconds = 1 + 4 * (plan.length - 1), clip_seconds(c, n, plan)
        work = plan_flops(c, plan, n) / 1e12, clip_vae_flops(plan.length) / 1e12
        rows.append([name, frames, *work, seconds, frames / seconds])
    columns = {"clip": "", "frames": "d", "TFLOP, transformer": ".0f", "TFLOP, VAE": ".0f"}
    return table(columns | {"least s": ".2f", "most FPS": ".1f"}, rows)


def training_table(c: DiTConfig, n: int) -> str:
    """FLOPs of the updates of both stages, one sample, checkpointed."""
    teacher, whole = PRESETS["wan14b"], 21 * n
    scored = CHECKPOINTED * pass_flops(c, whole, whole)
    scores = 2 * pass_flops(teacher, whole, whole) + pass_flops(c, whole, whole)
    rows = []
    for plan in both_directions():
        rollout = plan_flops(c, plan, n, MEAN_EXIT)
        last = plan_flops(c, plan, n, 1) - plan_flops(c, plan, n, 0)  # the level with gradient
        backward = (CHECKPOINTED - 1) * last
        for name, flop in (
            ("stage 1", CHECKPOINTED * masked_flops(c, plan, n)),
            ("stage 2, critic", rollout + scored),
            ("stage 2, student, 14B teacher", rollout + backward + scores),
        ):
            rows.append([f"{name}, {plan.name}", flop / 1e15, flop / PEAK])
    return table({"update, one sample": "", "PFLOP": ".2f", "least s": ".2f"}, sorted(rows))


def counted() -> str:
    """All tables, in Markdown."""
    c = PRESETS["wan1.3b"]
    n = c.tokens(H, W)
    return "\n\n".join([part_table(c, n), clip_table(c, n), training_table(c, n)])


def put(path: str, name: str, text: str) -> None:
    """Replace what a page has between `<!-- name -->` and `<!-- end -->`. raises: UserError"""
    page, begin, end = Path(path).read_text(), f"<!-- {name} -->\n", "<!-- end -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise UserError(f"{path} has no lines <!-- {name} --> and <!-- end -->; add them")
    with atomic(path) as tmp:
        tmp.write_text(before + begin + text + "\n" + rest[rest.index(end) :])


@dataclass
class Config:
    """Count FLOPs and bytes of Wan2.1 1.3B at 480 x 832."""

    write: str = ""  # also put the tables into this page, between its marks


def main(config: Config) -> None:
    text = counted()
    print(text)
    if config.write:
        put(config.write, "python -m tools.count", text)


if __name__ == "__main__":
    run(main, Config)
