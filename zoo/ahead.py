"""Anchors on both sides, in training [ours].

Anchors before a block teach a student to go backward (paper Sec. 4.1). Do those *after* a block
(zoo/lookahead.py) make it better forward, if both stages have them? Here a step draws a plan that
looks 1 or P latents ahead, half and half, and beside it the backward plan as ever.

On this backbone it is a mix of plans with a name, and the two scripts of the core, unchanged.
Here: looking ahead lowers FR; having trained for it adds nothing (three seeds, zoo/README.md).
Left open here: whether imagined latents should have a loss (in the core they have none).

    python -m zoo.ahead ode --plans ahead          first with --generate; after it dmd for ode
"""

import sys

import train_dmd
import train_ode
from anchors import backward, forward
from lib.common import UserError, run
from plans import MIXES, Mix
from zoo.lookahead import looking_ahead


def ahead_mix(length: int = 21, block: int = 3, anchors: int = 3, head: int = 0) -> Mix:
    """Anchors on both sides: backward, and forward blocks that look ahead, 1 or P latents."""
    if anchors < 1 or head not in (0, block):
        raise UserError(
            f"--plans ahead has anchors and blocks of one size; leave out --anchors {anchors} and "
            f"--head {head}"
        )
    back = backward(length, block, anchors)
    go_on = forward(length, block)
    return tuple((0.5, (looking_ahead(go_on, ahead), back)) for ahead in (1, anchors))


MIXES["ahead"] = ahead_mix
STAGES = {"ode": train_ode, "dmd": train_dmd}


def main() -> None:
    """Train by the script that the first word names, with the flags behind it."""
    stage = sys.argv.pop(1) if len(sys.argv) > 1 else "nothing"
    if stage not in STAGES:
        print(f"error: {stage!r} must be {' or '.join(STAGES)}, before all flags", file=sys.stderr)
        raise SystemExit(2)
    run(STAGES[stage].main, STAGES[stage].Config)


if __name__ == "__main__":
    main()
