"""What is done to blocks and frames as they pass by, on their way from the network to a file.

Each function takes a stream and passes it on, so that memory does not grow with the video:

    blocks   (n, latents [1, T, C, h, w]) as step n of a plan is finished
    pieces   video [1, 3, F, H, W], in time
"""

import signal
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lib.common import Terminated
from lib.media import VideoWriter

Blocks = Iterator[tuple[int, Tensor]]
FADE = 8  # frames over which the user's fade into decoded ones towards a seam [ours]
STILL = 2e-3  # a change from frame to frame below which a jump has no ratio: a quarter grey level


def only_finite(blocks: Blocks, plan) -> Blocks:
    """Refuse NaN, which would become a black picture. raises: FloatingPointError"""
    for n, x0 in blocks:
        if not torch.isfinite(x0).all():
            latents = f"{plan.steps[n].targets[0]} to {plan.steps[n].targets[-1]}"
            raise FloatingPointError(
                f"block {n + 1} of {len(plan.steps)} (step {n}, latents {latents}) holds numbers"
                " that are not finite, so no video was written; check the weights, and try"
                " --dtype float32"
            )
        yield n, x0


def previewed(blocks: Blocks, plan, vae, folder: Path) -> Blocks:
    """Write each backward block, named by its first frame, once the block before it in time is
    made: that one serves as its past and is not shown itself."""
    last = None
    for n, x0 in blocks:
        targets = plan.steps[n].targets
        if last is not None and plan.steps[n - 1].targets[0] == targets[-1] + 1:
            video = _decode_after(x0, last, targets[0] == 0, vae)
            first = vae.config.frames(targets[-1] + 1)  # of the block that is shown
            with VideoWriter(folder / f"{first:06d}.mp4") as writer:
                writer.write(video[0])
        last = x0
        yield n, x0


def _decode_after(past: Tensor, z: Tensor, begins: bool, vae) -> Tensor:
    """Frames [1, 3, F, H, W] of latents z after a past, which is not shown. It is there twice, if
    it does not begin the video: a decoder takes its first latent for an image, and once leaves
    wrong colours [measured: tests/test_generate.py]."""
    past = past if begins else torch.cat([past, past], dim=1)
    video = vae.decode(torch.cat([past, z], dim=1))
    return video[:, :, vae.config.frames(past.shape[1]) :]


def come_back(blocks: Blocks, plan) -> Blocks:
    """A loop goes on after its end: the latents it comes back to are one block more."""
    known: dict[int, Tensor] = {}
    for n, x0 in blocks:
        known.update((i, z) for i, z in zip(plan.steps[n].targets, x0.unbind(1)))
        known = {i: z for i, z in known.items() if i in plan.comes_back_to}
        yield n, x0
    if known:
        yield len(plan.steps), torch.stack([known[i] for i in plan.comes_back_to], dim=1)


def without_first(pieces: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The same video, pieces of [1, 3, F, H, W], without its first frames."""
    for video in pieces:
        if count < video.shape[2]:
            yield video[:, :, count:]
        count = max(count - video.shape[2], 0)


def or_the_end(
    pieces: Iterable[Tensor], plan, vae, block: int, waiting: dict[int, Tensor]
) -> Iterator[Tensor]:
    """If Ctrl-C comes before the first piece (backward order), decode the end of the video, as far
    as it is made: waiting latents. Its newest block serves as the past and is not shown itself."""
    is_shown = False
    try:
        for video in pieces:
            is_shown = True
            yield video
    except KeyboardInterrupt:
        begin = plan.length
        while begin - 1 in waiting:
            begin -= 1
        if not is_shown and plan.length - begin > block:
            z = torch.stack([waiting[i] for i in range(begin, plan.length)], dim=1)
            yield _decode_after(z[:, :block], z[:, block:], begin == 0, vae).cpu()
        raise


@contextmanager
def sigterm_is_ctrl_c() -> Iterator[None]:
    """Within the block SIGTERM interrupts as Ctrl-C does."""

    def interrupt(*_) -> None:
        raise Terminated

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


# ---------------------------------------------------------------- the user's frames, and seams
def seams(given: Container[int], frames: int) -> list[int]:
    """Frames before which what is given meets what was made."""
    return [f for f in range(2, frames - 1) if (f in given) != (f - 1 in given)]


def shares(given: Iterable[int], frames: int, fade: int) -> dict[int, float]:
    """How much of each of the user's frames is shown, the rest being decoded: 1, but towards a seam
    less and less, over `fade` frames or half of the clip. A lone picture is shown whole.

    frames 0 to 7 given, more to come, fade 2 -> 1 1 1 1 1 1 1/2 0"""
    share = {f: 1.0 for f in given}
    for start in [f for f in share if f - 1 not in share]:
        stop = start
        while stop in share:
            stop += 1
        n = min(fade, (stop - start) // 2)
        for i in range(n):  # at the seam itself a frame is decoded like its neighbour
            if start > 0:
                share[start + i] = i / n
            if stop < frames:
                share[stop - 1 - i] = i / n
    return share


def jump(four: list[Tensor]) -> float:
    """How a cut amid four frames [3, H, W] shows: the change there over that beside it."""
    before, across, after = [(b - a).abs().mean().item() for a, b in zip(four, four[1:])]
    return across / max((before + after) / 2, STILL)


class Seams:
    """The user's frames on their way into a video, and how the seams beside them come out.

    given: {frame: [3, H, W]};  keep: other frames to remember as they are written
    exact: True, to the bit; False, decoded like the rest; None, exact but for a fade towards each
        seam: the decoder blends what follows into what was, exact frames know nothing of it"""

    def __init__(
        self,
        given: dict[int, Tensor],
        frames: int,
        exact: bool | None = None,
        keep: Iterable[int] = (),
    ) -> None:
        self.given = {} if exact is False else given
        self.share = shares(self.given, frames, FADE if exact is None else 0)
        self.views = {
            cut: range(cut - 2, cut + 2)  # the four frames around a seam
            for cut in seams(given, frames)
        }
        around = [f for view in self.views.values() for f in view]
        self.decoded: dict[int, Tensor] = dict.fromkeys(around)
        self.written: dict[int, Tensor] = dict.fromkeys([*around, *keep])

    def through(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same video with the user's frames in it, to their shares."""
        at = 0
        for video in pieces:
            for f, frame in enumerate(video[0].unbind(1), at):  # (3, H, W)
                if f in self.decoded:
                    self.decoded[f] = frame.clone()
                if f in self.share:
                    frame.lerp_(self.given[f], self.share[f])  # a share of 1: to the bit
                if f in self.written:
                    self.written[f] = frame.clone()
            at += video.shape[2]
            yield video

    def say(self, fps: int, first: int = 0) -> None:
        """Print how each seam came out: as written, and as it would be with exact frames alone.

        first: the frame that the file begins with"""
        for cut, view in self.views.items():
            exact = jump([self.given.get(f, self.decoded[f]) for f in view])
            shown = jump([self.written[f] for f in view])
            other = "" if abs(shown - exact) < 0.005 else f" ({exact:.2f} with your frames exact)"
            at = cut - first
            print(f"seam before frame {at} ({at / fps:.2f} s): jump {shown:.2f}{other}")
        faded = sum(share < 1 for share in self.share.values())
        if faded:
            frames = f"{faded} of your frames beside seams"
            print(f"{frames} fade into decoded ones; --exact true shows them as they are")
