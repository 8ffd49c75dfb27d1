"""Re-DMD (Reward Forcing): samples that a reward likes teach more.

Distribution matching treats all the student's videos alike, and the still ones are the easy ones.
So each sample's gradient is multiplied by exp(r / b), with r the reward of that sample: it is the
matching that is weighted, the reward itself is never differentiated.

On this backbone another loss is a function of three tensors handed to `train_dmd.main`. The paper's
reward is a video-language model's opinion on motion; here it is the motion itself, the mean change
from latent to latent over the batch's [ours], and weights have mean 1 so that the rate keeps its
meaning. The loss sees its batch alone: with --micro the mean is over that many samples.
Left open here: b is 1/2 as published, for a reward of another scale.
Here: no difference after 60 updates, motion included; weights run from .64 to 1.45.

    python -m zoo.reward_dmd --out out/reward        to measure: python -m zoo.table --weights ...
"""

from functools import partial

from torch import Tensor

import train_dmd
from lib.common import run
from train_dmd import Config, dmd_gradient

BETA = 0.5  # [Reward Forcing]


def weighted(x: Tensor, x_real: Tensor, x_fake: Tensor, beta: float = BETA) -> Tensor:
    """As `train_dmd.dmd_gradient`, [B, T, C, h, w], times the weight of each sample."""
    if x.shape[1] == 1:
        return dmd_gradient(x, x_real, x_fake)  # a picture does not move
    motion = x.diff(dim=1).abs().mean((1, 2, 3, 4))  # (B,)
    weight = (motion / motion.mean() / beta).softmax(0) * len(motion)
    return weight.view(-1, 1, 1, 1, 1) * dmd_gradient(x, x_real, x_fake)


main = partial(train_dmd.main, gradient_of=weighted)

if __name__ == "__main__":
    run(main, Config)
