"""What full size costs, by counting: no GPU is needed to know what a GPU will have to do.

Three kinds of cost, each with its own ceiling:

    FLOPs       linear layers and attention, two a multiplication; formulas, tested against torch
    bytes       what kernels read from the GPU's memory and write to it, each tensor once a kernel
    launches    kernels started from Python: all operations of a pass that are no views

"Least" times divide by a datasheet, so nothing can be faster, and much will be slower;
`tools/gpu.py` measures. Ideas for more speed come last, each with the most that it could save.

    python -m tools.count                          # the tables of docs/speed.md
    python -m tools.count --write docs/speed.md    # and put them there
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

import anchors
import dit
from anchors import Plan, layout
from dit import PRESETS, DiT, DiTConfig
from kvcache import KVCache
from lib.common import UserError, atomic, run
from vae import VAE

H, W = 60, 104  # cells of a latent at 480 x 832
PEAK, BANDWIDTH = 989e12, 3.35e12  # FLOP/s in dense bfloat16, bytes/s: an H100's datasheet
LAUNCH = 5e-6  # seconds to start a kernel from Python [guess]
LEVELS = 4  # denoising steps a block [paper]
MEAN_EXIT = 2.5  # of stage 2's rollouts: 1 to 4 denoising steps
CHECKPOINTED = 4  # forward, forward again, backward: 1 + 1 + 2
UMT5 = {"layers": 24, "dim": 4096, "ffn": 10240}  # [Wan] the text encoder
BFLOAT = 2  # bytes


# ---------------------------------------------------------------- formulas
def pass_flops(c: DiTConfig, tokens: int, keys: int) -> float:
    """Floating point operations of one pass over `tokens` that see `keys`, with the text's keys
    given.

    Two a weight and token in the linear layers, four a query, key and channel in attention."""
    linear = 2 * tokens * c.dim * (6 * c.dim + 2 * c.ffn_dim)
    return c.num_layers * (linear + 4 * tokens * (keys + c.text_len) * c.dim)


def clean_flops(c: DiTConfig, tokens: int, keys: int) -> float:
    """Of the pass that only makes keys and values: its last layer stops at them."""
    all_but_one = (c.num_layers - 1) / c.num_layers
    return all_but_one * pass_flops(c, tokens, keys) + 2 * tokens * c.dim * 2 * c.dim


def plan_flops(c: DiTConfig, plan: Plan, tokens: int, levels: float = LEVELS) -> float:
    """Of a whole rollout: each step denoised at so many levels, and once clean if a later step
    reads it."""
    total = 0.0
    for n, step in enumerate(plan.steps):
        seen = len(step.reads)
        if not step.commits:
            own = len(step.own)
            total += levels * pass_flops(c, own * tokens, (seen + own) * tokens)
        if any(plan.last_read.get(i, -1) > n for i in step.targets):
            own = len(step.targets)
            total += clean_flops(c, own * tokens, (seen + own) * tokens)
    return total


def masked_flops(c: DiTConfig, plan: Plan, tokens: int) -> float:
    """Of one masked pass over a whole plan (stage 1): every slot sees what its spans say."""
    spans = layout(plan).visible.spans
    total = 0.0
    for first, stop, ranges in spans:
        keys = sum(b - a for a, b in ranges)
        total += pass_flops(c, (stop - first) * tokens, keys * tokens)
    return total


def text_flops() -> float:
    """Of UMT5-XXL's encoder over 512 tokens: four square matrices and a gated net a layer, and
    attention."""
    n, width = 512, UMT5["dim"]
    weights = 4 * width**2 + 3 * width * UMT5["ffn"]
    return UMT5["layers"] * (2 * n * weights + 4 * n * n * width)


def text_kv_flops(c: DiTConfig) -> float:
    """Of a prompt's keys and values in every layer."""
    weights = c.text_dim * c.dim + c.dim**2 + c.num_layers * 2 * c.dim**2
    return 2 * c.text_len * weights


@cache
def vae_flops(latents: int, first: bool = False) -> float:
    """Of decoding so many latents of a stream (first: its image latent), counted by torch from the
    real network."""
    with torch.device("meta"):
        vae = VAE()
        z = torch.empty(1, latents, vae.config.z_dim, H, W)
    with torch.no_grad():
        state = None if first else vae.decode_chunk(z[:, :1])[1]
        with FlopCounterMode(display=False) as counter:
            vae.decode_chunk(z, state)
    return counter.get_total_flops()


def clip_vae_flops(latents: int) -> float:
    """Of decoding a whole clip."""
    return vae_flops(1, first=True) + (latents - 1) * vae_flops(1)


@cache
def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(PRESETS[name]).parameters())


def latent_bytes(c: DiTConfig, tokens: int) -> int:
    """Of one latent's keys and values in all layers, in bfloat16."""
    return 2 * c.num_layers * tokens * c.dim * BFLOAT


# ---------------------------------------------------------------- kernels, counted from a real pass
class Ledger(TorchDispatchMode):
    """Count launches and bytes by family: every operation that is no view is a kernel, and reads
    and writes each tensor once."""

    def __init__(self) -> None:
        super().__init__()
        self.family = ""  # of what runs now; "": told by the operation's name
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.short = 0  # kernels that need less than a launch, by their bytes

    def add(self, family: str, *tensors: Tensor) -> None:
        size = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
        self.launches[family] += 1
        self.bytes[family] += size
        self.short += family not in ("linear layers", "attention") and size / BANDWIDTH < LAUNCH

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "_unsafe_view")):
            family = self.family or FAMILIES.get(name, "GELU, residuals, casts")
            self.add(family, *(x for x in tree_iter((args, kwargs, out)) if torch.is_tensor(x)))
        return out

    @contextmanager
    def inside(self, family: str) -> Iterator[None]:
        outer, self.family = self.family, family
        yield
        self.family = outer

    def within(self, family: str, call: Callable) -> Callable:
        """The same function, all of whose kernels belong to a family."""

        def told(*args, **more):
            with self.inside(family):
                return call(*args, **more)

        return told

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: object = None) -> Tensor:
        """In place of attention, which is one kernel on a GPU and several on the meta device."""
        out = torch.empty_like(q)
        self.add("attention", q, k, v, out)
        return out

    def rms_norm(self, module: torch.nn.Module, x: Tensor) -> Tensor:
        """In place of the RMS norm, likewise."""
        out = torch.empty_like(x)
        self.add("norms and modulation", x, module.weight, out)
        return out


FAMILIES = {
    "mm": "linear layers",
    "addmm": "linear layers",
    "convolution": "linear layers",
    "native_layer_norm": "norms and modulation",
    "cat": "past and own keys in one row",
}


@cache
def vae_ledger(latents: int) -> Ledger:
    """Launches and bytes of decoding so many latents in the middle of a stream, in bfloat16."""
    book = Ledger()
    with torch.device("meta"), torch.no_grad():
        vae = VAE().to(torch.bfloat16)
        z = torch.empty(1, latents, vae.config.z_dim, H, W)
        state = vae.decode_chunk(z[:, :1])[1]
        with book:
            vae.decode_chunk(z, state)
    return book


@cache
def ledger(own: int, seen: int, name: str = "wan1.3b") -> Ledger:
    """Launches and bytes of one denoising pass of `own` latents that see `seen` in all."""
    c, past = PRESETS[name], seen - own
    book = Ledger()
    with torch.device("meta"), torch.no_grad(), ExitStack() as stack:
        model = DiT(c).to(torch.bfloat16)
        text = model.text_kv(torch.empty(1, c.text_len, c.text_dim))
        held = KVCache(c, 1, max(past, 1), H, W, torch.bfloat16, "meta")
        held.slot = {i: i for i in range(past)}
        read = held.read(tuple((i, i) for i in range(past)))
        x, t = torch.empty(1, own, c.in_dim, H, W), torch.empty(1, own)
        for where, what, new in (
            (dit, "attend", book.attend),
            (dit, "rotate", book.within("RoPE", dit.rotate)),
            (dit, "modulate", book.within("norms and modulation", dit.modulate)),
            (dit.RMSNorm, "forward", lambda self, x: book.rms_norm(self, x)),
        ):
            stack.enter_context(mock.patch.object(where, what, new))
        with book:
            model(x, t, text, torch.arange(past, seen), past=read)
    return book


# ---------------------------------------------------------------- the tables
def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def part_table(c: DiTConfig, n: int) -> str:
    """FLOPs and bytes of every part of generating."""
    weights, latent = parameters("wan1.3b") * BFLOAT, latent_bytes(c, n)
    steps = [
        ("denoising step, 3 latents see 3", 3, 3),
        ("denoising step, 3 see 12: the mean of a forward clip", 3, 12),
        ("denoising step, 3 see 21", 3, 21),
        ("denoising step, backward, 6 see 21", 6, 21),
        ("denoising step, inbetween, 15 see 21", 15, 21),
    ]
    encoder = UMT5["layers"] * (4 * UMT5["dim"] ** 2 + 3 * UMT5["dim"] * UMT5["ffn"])
    found = [
        ("text encoder, once a prompt", text_flops(), encoder * BFLOAT),
        ("text keys and values, once a prompt", text_kv_flops(c), weights // 8),
        *((name, pass_flops(c, n * a, n * b), weights + b * latent) for name, a, b in steps),
        ("clean pass, 3 see 21", clean_flops(c, 3 * n, 21 * n), weights + 21 * latent),
        ("cache: read 18 latents, turn their keys", 0.0, 2 * 18 * latent),
        ("VAE, 3 latents, every kernel's bytes", vae_flops(3), sum(vae_ledger(3).bytes.values())),
    ]
    rows = []
    for name, flop, size in found:
        least = max(flop / PEAK, size / BANDWIDTH)
        bound = "arithmetic" if flop / PEAK > size / BANDWIDTH else "memory"
        rows.append(
            [name, f"{flop / 1e12:.3g}", f"{size / 1e9:.3g}", f"{flop / size:.0f}", bound]
            + [f"{1e3 * least:.3g}"]
        )
    return table(["part", "TFLOP", "GB", "FLOP a byte", "bound by", "least ms"], rows)


def clip_table(c: DiTConfig, n: int) -> str:
    """FLOPs of whole clips, and the frames a second that they allow."""
    sinks = {"window": 6, "past_sink": True, "future_sink": True}
    plans = {
        "forward": anchors.forward(21),
        "forward, both sinks": anchors.forward(21, **sinks),
        "backward, P = 3": anchors.backward(21),
        "backward, P = 3, both sinks": anchors.backward(21, **sinks),
        "inbetween, 15 of 21 latents": anchors.inbetween(given=True),
        "30 s forward, both sinks": anchors.long(120),
    }
    rows = []
    for name, plan in plans.items():
        transformer, decoder = plan_flops(c, plan, n), clip_vae_flops(plan.length)
        frames = 1 + 4 * (plan.length - 1)
        fps = [frames * PEAK * share / (transformer + decoder) for share in (1, 0.55)]
        rows.append(
            [name, str(frames), f"{transformer / 1e12:.0f}", f"{decoder / 1e12:.0f}"]
            + [f"{x:.1f}" for x in fps]
        )
    columns = ["clip", "frames", "TFLOP, transformer", "TFLOP, VAE"]
    return table([*columns, "most FPS", "FPS at 55 % of the peak"], rows)


def training_table(c: DiTConfig, n: int) -> str:
    """FLOPs of the updates of both stages, one sample, checkpointed."""
    teacher, whole = PRESETS["wan14b"], 21 * n
    scored = CHECKPOINTED * pass_flops(c, whole, whole)
    scores = 2 * pass_flops(teacher, whole, whole) + pass_flops(c, whole, whole)
    rows = []
    for plan in anchors.both_directions():
        rollout = plan_flops(c, plan, n, MEAN_EXIT)
        last = plan_flops(c, plan, n, 1) - plan_flops(c, plan, n, 0)  # the level with gradient
        backward = (CHECKPOINTED - 1) * last
        for name, flop in (
            ("stage 1", CHECKPOINTED * masked_flops(c, plan, n)),
            ("stage 2, critic", rollout + scored),
            ("stage 2, student, 14B teacher", rollout + backward + scores),
        ):
            rows.append([f"{name}, {plan.name}", f"{flop / 1e15:.2f}", f"{flop / PEAK:.2f}"])
    return table(["update, one sample", "PFLOP", "least s"], sorted(rows))


def kernel_table() -> str:
    """Launches and bytes of one denoising step in the middle of a forward clip."""
    book = ledger(3, 12)
    rows = []
    for family in sorted(book.launches, key=lambda f: -book.bytes[f]):
        size = book.bytes[family]
        rows.append(
            [family, str(book.launches[family]), f"{size / 1e9:.2f}"]
            + [f"{1e3 * size / BANDWIDTH:.2f}"]
        )
    total = sum(book.launches.values()), sum(book.bytes.values())
    rows.append(["**all**", str(total[0]), f"{total[1] / 1e9:.2f}", ""])
    return table(["kernels", "launches", "GB", "least ms by memory"], rows)


def moved(book: Ledger) -> dict[str, float]:
    """Least seconds by family of what a pass does besides linear layers and attention: all of it is
    bound by memory."""
    busy = ("linear layers", "attention")
    return {k: size / BANDWIDTH for k, size in book.bytes.items() if k not in busy}


def fusable(c: DiTConfig, n: int) -> float:
    """Least seconds of the norms, modulations and rotations of a step if each were one kernel: one
    read, one write."""
    turned = 2 * (BFLOAT + BFLOAT)  # q and k: norm and RoPE at once
    modulated = 2 * (4 + BFLOAT) + (4 + BFLOAT)  # float32 in, bfloat16 out: three norms a layer
    return (turned + modulated) * 3 * n * c.dim * c.num_layers / BANDWIDTH


def savings(c: DiTConfig, n: int) -> list[tuple[str, str, float]]:
    """Ideas: what each saves, and the most that it could, as a share of the least time of a
    denoising step in the middle of a forward clip; of the last one, as a share of a whole block
    with its VAE."""
    book, other = ledger(3, 12), moved(ledger(3, 12))
    step = pass_flops(c, 3 * n, 12 * n) / PEAK + sum(other.values())
    launches = sum(book.launches.values()) * LAUNCH
    linear = 2 * 3 * n * c.dim * (6 * c.dim + 2 * c.ffn_dim) * c.num_layers / PEAK
    distant = 4 * 3 * n * 9 * n * c.dim * c.num_layers / PEAK
    norms = other["RoPE"] + other["norms and modulation"] - fusable(c, n)
    row = other["past and own keys in one row"]
    decoding, passes = vae_flops(3) / PEAK, LEVELS + 1
    aside = min(passes * sum(other.values()), decoding)
    return [
        ("CUDA graphs, if no launch were hidden", "launches x 5 us", launches / step),
        (
            "CUDA graphs, as the host runs ahead",
            "launches x 5 us - step, if above 0",
            max(launches / step - 1, 0),
        ),
        ("fp8 linear layers", "half of their time", linear / 2 / step),
        ("norm, modulation and RoPE fused", "their bytes - one read, one write", norms / step),
        ("sparse attention", "attention to the 9 earlier latents, all of it", distant / step),
        ("room for own keys behind the past's", "the row of past and own keys", row / step),
        (
            "VAE on a stream of its own",
            "memory-bound kernels of 5 passes, hidden behind it",
            aside / (passes * step + decoding),
        ),
    ]


def idea_table(c: DiTConfig, n: int) -> str:
    """The ideas, in Markdown."""
    rows = [[name, why, f"{100 * x:.1f} %"] for name, why, x in savings(c, n)]
    return table(["idea", "saves", "at most"], rows)


def counted() -> str:
    """All tables, in Markdown."""
    c = PRESETS["wan1.3b"]
    n = c.tokens(H, W)
    return "\n\n".join(
        (part_table(c, n), clip_table(c, n), kernel_table(), idea_table(c, n), training_table(c, n))
    )


def put(path: str, name: str, text: str) -> None:
    """Replace what stands between the lines `<!-- name -->` and `<!-- end -->` of a page. raises:
    UserError if it has none"""
    page, begin, end = Path(path).read_text(), f"<!-- {name} -->\n", "\n<!-- end -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise UserError(f"{path} has no lines <!-- {name} --> and <!-- end -->; add them")
    with atomic(path) as tmp:
        tmp.write_text(before + begin + text + rest[rest.index(end) :])


@dataclass
class Config:
    """Count FLOPs, bytes and kernel launches of Wan2.1 1.3B at 480 x 832."""

    write: str = ""  # also put the tables into this page, between its marks


def main(config: Config) -> None:
    text = counted()
    print(text)
    if config.write:
        put(config.write, "python -m tools.count", text)


if __name__ == "__main__":
    run(main, Config)
