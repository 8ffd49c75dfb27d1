"""A chosen past: history routing (Resampling Forcing), CausalCine's memory, DySink.

A window reads what is near, a sink what was first; a router reads what is asked for. Each finished
latent is scored by how well its keys answer the query, the best few are read, and the sink and the
newest block always are. DySink adds a gate: a sink that draws too much of the attention is dropped.

On this backbone the plan reads everything (`Plan.horizon` as far as the video goes) and a cache
chooses when it is read. Scores are q.k of means over tokens, summed over layers and clips [ours;
routing asks for each query token]; the query is that of the newest block's clean pass. What is
chosen moves next to the reader. Left open: DySink's gate. Here: no difference, 7 x the cache.

    python -m zoo.run routing --latents 63
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from anchors import Plan, Reads, backward_step, forward_step, place
from dit import DiT
from kvcache import KVCache
from lib.noise import Noise
from lib.recipe import Recipe
from sampler import Text, few_steps, gather, rollout, sigmas_of
from zoo.common import PAPER, Method, memory


class Routed(KVCache):
    """Of what it is asked to read, hand out the sink, the newest block and the best of the rest."""

    def __init__(self, *sizes, best: int, block: int, gate: float) -> None:
        super().__init__(*sizes)
        self.best, self.block, self.gate = best, block, gate
        self.asked: dict[int, Tensor] = {}  # layer -> mean query of the newest pass [B, E]

    def listen(self, layer: int, queries: Tensor) -> None:
        """queries: of a pass, before heads and positions [B, L, E]."""
        self.asked[layer] = queries.detach().mean(1)

    def scores(self, latents: list[int]) -> Tensor:
        """How well the keys of these answer [latents]; a clean pass stops before its last query."""
        slots = [self.slot[i] for i in latents]
        total = torch.zeros(len(latents))
        for layer in range(len(self.layers) - 1):
            keys = self.layers[layer][0][:, slots].mean(2).flatten(2)  # (B, latents, E)
            total += (keys @ self.asked[layer][..., None]).float().mean((0, 2)).cpu()
        return total / self.layers[0][0].shape[-1] ** 0.5

    def choose(self, latents: list[int]) -> set[int]:
        """latents: from the one that was made first to the newest."""
        first, rest = latents[: self.block], latents[self.block : -self.block]
        newest = latents[-self.block :]
        score = dict(zip(latents, self.scores(latents).tolist()))
        shares = torch.tensor(list(score.values())).softmax(0)
        sink = first if shares[: self.block].sum() <= self.gate else []
        best = sorted(rest, key=score.get, reverse=True)[: self.best]
        return {*sink, *best, *newest}

    def read(self, reads: Reads) -> list | None:
        if len(reads) <= 2 * self.block:
            return super().read(reads)
        at = dict(reads)
        made = [i for i in self.slot if i in at]  # a dict keeps its order
        chosen = self.choose(made)
        toward = 1 if at[made[0]] < at[made[-1]] else -1  # the newest is on the reader's side
        end = max(at.values()) if toward > 0 else min(at.values())
        kept = sorted(chosen, key=at.get)
        begin = end - len(kept) + 1 if toward > 0 else end
        return super().read(place(kept, begin))


def reading_all(length: int, block: int, anchors: int, backwards: bool = False) -> Plan:
    """Every block reads all that is finished, however long the video is."""
    blocks = [range(s, s + block) for s in range(0, length, block)]
    if backwards:
        steps = [backward_step(b, range(length - 1, b.stop - 1, -1), anchors) for b in blocks[::-1]]
        return Plan("backward", length, tuple(steps), horizon=length)
    steps = [forward_step(b, range(b.start)) for b in blocks]
    return Plan("forward", length, tuple(steps), horizon=length)


def generate(
    dit: DiT,
    plan: Plan,
    texts: Sequence[Text],
    noise: Noise,
    recipe: Recipe = PAPER,
    given: dict[int, Tensor] | None = None,
    best: int = 6,
    gate: float = 1.0,
    **options,
) -> Tensor:
    """As `sampler.generate`. best: latents read beside sink and newest block; gate: see above"""
    kind = partial(Routed, best=best, block=len(plan.steps[0].targets), gate=gate)
    cache, remember = memory(dit, plan, texts, noise, kind=kind, **options)
    denoise = few_steps(dit, texts, noise, sigmas_of(recipe), share_noise=recipe.share_noise)
    hooks = []
    for layer, block in enumerate(dit.blocks):
        attention = block.self_attn

        def heard(_, __, q, layer=layer, norm=attention.norm_q):
            cache.listen(layer, norm(q))

        hooks.append(attention.q.register_forward_hook(heard))
    try:
        return gather(plan, rollout(plan, denoise, remember, cache, given))
    finally:
        for hook in hooks:
            hook.remove()


_backward = partial(reading_all, backwards=True)

METHODS = {
    "routing": Method(reading_all, generate, "long-forward", length=63, batch=1),
    "routing-backward": Method(_backward, generate, "long-backward", length=63, batch=1),
}
