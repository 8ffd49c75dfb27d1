"""From one colour to another: what a gap between two scenes shows on its way.

In the toy world no clip changes its colours, so no network has seen a change: what comes is the
student's own. Two scenes of nine latents, whose held-out captions differ in the colours of sprite
and ground, made or given (true clips), and a gap between them. Colours are read in single frames:
in the gap, how many have one of neither scene, or none; in the 24 frames after it, how many do not
have the next scene's, for a causal decoder goes on in the colours before until latents say
otherwise. To compare with: a hard cut between true clips, through the VAE.

    python -m toy.gaps --clips 64
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from tqdm import tqdm

from evaluate import BATCH, Maker, decoded, encoded, summary
from generate import frame_size, load_models
from lib import report
from lib.common import Stream, UserError, generator, run, start
from lib.statistics import Values, joined
from plans import timeline, with_given
from toy import world

SCENE = 9  # latents of each scene
AFTER = 24  # frames of the next scene that are looked at
READ = ("colour", "ground")
COLUMNS = [f"{what}: {when}" for what in READ for when in ("neither", "late")]


@dataclass
class Config:
    """Read colours in the gap between two scenes, and after it."""

    weights: str = "toy/weights"  # a folder with student and VAE
    clips: int = 64  # pairs of captions
    gaps: tuple[int, ...] = (3, 6, 9, 12)  # latents between the scenes
    seed: int = 0  # of captions, clips and noise
    out: str = ""  # also write the table as .json
    device: str = "auto"


def pairs_of(clips: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of held-out captions that differ in the colours of sprite and of ground."""
    pairs, g = [], generator(seed, Stream.CAPTION, 2)
    while len(pairs) < clips:
        a, b = world.random_captions(2, g, "new")
        words = world.parse(a), world.parse(b)
        if all(words[0][key] != words[1][key] for key in READ):
            pairs.append((a, b))
    return pairs


def read(video: Tensor, pairs: Sequence[tuple[str, str]], begins: int, ends: int) -> Values:
    """Frames [B] from `begins` on whose colours are neither scene's, and from `ends` on not the
    next one's."""
    found = {name: torch.zeros(len(pairs)) for name in COLUMNS}
    for f in range(begins, ends + AFTER):
        for n, (seen, pair) in enumerate(zip(world.measure(video[:, :, f : f + 1]), pairs)):
            right = [world.parse(words) for words in (pair if f < ends else pair[1:])]
            for what in READ:
                wrong = all(seen[what] != words[what] for words in right)
                found[f"{what}: {'neither' if f < ends else 'late'}"][n] += wrong
    return found


@torch.no_grad()
def measure_gap(maker: Maker, pairs: Sequence[tuple[str, str]], gap: int, is_given: bool) -> Values:
    """Scenes of two captions each, made or given, with so many latents between them; 0: true
    clips, cut hard and sent through the VAE."""
    after, parts = SCENE + gap, []
    for n in range(0, len(pairs), BATCH):
        some = pairs[n : n + BATCH]
        numbers = [range(i, i + len(some)) for i in (maker.seed + n, maker.seed + n + len(pairs))]
        true = [world.render(w, s, maker.size[0]) for w, s in zip(zip(*some), numbers)]
        begins, ends = (maker.vae.config.frames(latents) for latents in (SCENE, after))
        if not gap:
            cut = torch.cat([true[0][:, :, :begins], true[1][:, :, begins:]], 2)
            video = decoded(maker.vae, encoded(maker.vae, cut))
        else:
            plan, given = timeline(after + SCENE, [(0, SCENE), (after, after + SCENE)]), {}
            if is_given:
                z = [encoded(maker.vae, clip) for clip in true]
                given = {i: z[0][:, i] for i in range(SCENE)}
                given |= {after + i: z[1][:, SCENE + i] for i in range(SCENE)}
                plan = with_given(plan, given)
            video = maker.make(plan, list(zip(*some)), n, given)[1]
        parts.append(read(video, some, begins, ends))
    return joined(parts)


def main(config: Config) -> None:
    device = start(config.device)[2]
    if config.clips < 2 or not config.gaps or min(config.gaps) < 1:
        raise UserError(
            f"--clips {config.clips} must be at least 2, and --gaps {config.gaps} from 1 up"
        )
    dit, vae = load_models(config.weights, torch.float32, device)
    maker = Maker(dit, vae, frame_size((), dit, vae), config.seed)
    pairs, rows = pairs_of(config.clips, config.seed), {}
    print(report.markdown({}, COLUMNS), flush=True)
    for gap, is_given in tqdm([(0, True), *product(config.gaps, (False, True))], unit="row"):
        name = f"{gap}, scenes {'given' if is_given else 'made'}" if gap else "a hard cut, decoded"
        rows[name] = summary(measure_gap(maker, pairs, gap, is_given))
        tqdm.write(report.markdown_row(name, rows[name], COLUMNS))
    if config.out:
        report.write_json(rows, config.out)


if __name__ == "__main__":
    run(main, Config)
