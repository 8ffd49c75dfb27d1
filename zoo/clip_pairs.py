"""Pairs with a real clip in them: what one holds, and when it is right.

A trajectory of train_ode.py serves any plan, for its teacher saw no plan. After clean context of a
clip it is another one for each plan, and an anchor has its own beside that of its latent:

    clean         [T, C, h, w]               the clip: what a step reads, whoever made it
    plan0, plan1  [K+1, slots, C, h, w]      states at the noisy slots of each plan of an entry

Who makes them: zoo/causal_ode.py. How they lie on disk: lib/pairs.py.

    python -c "import zoo.clip_pairs; help(zoo.clip_pairs)"
"""

from collections.abc import Sequence

from anchors import Plan, layout
from lib.clips import Clips
from lib.common import UserError
from lib.noise import Noise, noise_from
from lib.pairs import MADE_BY, PLANS, Pair, wrong_states
from plans import rows_of
from train_ode import Trajectories


def noisy_slots(plan: Plan) -> list[tuple[int, int]]:
    """(step, which of its latents) at each noisy slot of [clean | noisy]."""
    lay = layout(plan, teacher_forcing=True)
    slots = zip(lay.step, lay.latent, lay.is_clean)
    return [(n, plan.steps[n].own.index(i)) for n, i, is_clean in slots if not is_clean]


class ClipPairs(Trajectories):
    """Real clips and, for each plan of an entry, states after them; `make` is left open.

    Each entry of the mix has pairs of its own."""

    made_by = MADE_BY + PLANS
    group_is = "entries"

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.teacher_forcing = True  # that is what these pairs are for
        config = self.config
        if not config.generate:
            return  # training reads the pairs alone
        self.clips = Clips(config.clips, config.latent, self.channels, self.source)
        if len(self.clips) < config.pairs:
            raise UserError(
                f"{config.clips} holds {len(self.clips)} clips; use --pairs {len(self.clips)}, or "
                "encode more with tools/encode.py"
            )

    def clip_of(self, number: int) -> str:
        return self.clips.made_of[number]

    def group(self, entry: int) -> int:
        return entry

    def shapes(self, group: int) -> dict[str, tuple[int, ...]]:
        plans, grid = self.mix[group][1], (self.channels, *self.config.latent[1:])
        want = {"clean": (plans[0].length, *grid)}
        for d, plan in enumerate(plans):
            want[f"plan{d}"] = (len(self.keep), len(noisy_slots(plan)), *grid)
        return want

    def start(self, group: int, numbers: Sequence[int], device="cpu") -> Noise:
        """The noise of these pairs, which all plans of an entry share."""
        rows = self.noise(numbers, rows_of(self.mix[group][1]))
        return noise_from(rows.to(device), length=self.config.latent[0])

    def wrong(self, group: int, pair: Pair) -> str:
        noise = self.start(group, [pair.number])
        share = "all" if self.config.share_noise == "all" else "none"
        for d, plan in enumerate(self.mix[group][1]):
            numbers = [plan.steps[n].noise(share, 0)[j] for n, j in noisy_slots(plan)]
            states = pair.shard[f"plan{d}"][pair.row]
            if wrong := wrong_states(states, noise(0, tuple(numbers)), self.config.seed):
                return f"{plan.name}: {wrong}"
        return ""
