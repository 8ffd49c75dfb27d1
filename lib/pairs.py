"""The teacher's ODE, and what a student learns from it: pairs of a noisy state and the end point it flows to.

`integrate` executes a plan as `sampler.rollout` does, but each step by 48 Euler steps with guidance. One function is
the bidirectional teacher (a plan of one step that makes everything), the autoregressive teacher of `train_ar.py`
(any plan), and the maker of its causal pairs (any plan, after clean latents of real clips instead of its own):

    teacher          plan                  context      kept at the student's four levels and the end
    bidirectional    one step              none         states            [S, 5, T, C, h, w], a trajectory per latent
    autoregressive   forward, backward     real clips   forward, backward [S, 5, slots, C, h, w], one per slot of the
                                                        plan's layout (an anchor has its own), and clean [S, T, C, h, w]

Why two kinds: a bidirectional teacher's end point depends on noise that a causal student never sees, so the student
learns a mean over it; an autoregressive teacher's end point is a function of what the student sees (Causal Forcing;
`tests/test_injectivity.py` shows both in closed form). Files are whole or absent, hashed in an index, and say how they
were made. Used by train_ode.py --generate and --check; nothing is trained here.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from anchors import Layout, Plan, both_directions, forward, layout
from dit import DiT, load_dit
from kvcache import KVCache
from lib.clips import Clips
from lib.common import UserError, atomic, dtype_of, generator, stop_signals
from lib.text import Prompts
from lib.weights import read_json, read_tensors, write_safetensors
from sampler import Noise, commit, guided, noise_from, ode_sigmas

KEEP = (
    0,
    12,
    24,
    36,
    48,
)  # of the 49 states: the student's four levels, exactly, and the end point [Self-Forcing]
DIRECTIONS = ("forward", "backward")


# ---------------------------------------------------------------- the ODE
@torch.no_grad()
def integrate(
    dit: DiT,
    plan: Plan,
    prompt: Tensor,
    negative: Tensor,
    noise: Noise,
    guidance: float,
    shift: float = 5.0,
    context: Tensor | None = None,
    keep: Sequence[int] = KEEP[-1:],
    bar: tqdm | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Many denoising steps a block: for each step n of the plan yield (n, states [B, len(keep), own latents, C, h, w]).

    prompt, negative: embeddings [B, L, text_dim];  noise: as in `sampler.rollout`, only its start is used
    guidance: conventional, v = uncond + w (cond - uncond);  keep: which of the states 0 .. keep[-1] of that many Euler steps
    context: latents [B, T, C, h, w] that later steps read instead of what was made here (teacher forcing)"""
    sigmas, text = (
        ode_sigmas(keep[-1], shift),
        dit.text_kv(torch.cat([prompt, negative.expand_as(prompt)])),
    )
    B, _, _, h, w = noise(0, (0,)).shape
    weight, cache = dit.patch_embedding.weight, None
    if plan.last_read:
        cache = KVCache(dit.config, 2 * B, plan.capacity, h, w, weight.dtype, weight.device)
    for n, step in enumerate(plan.steps):
        past, pos = (
            cache and cache.read(step.reads, room=len(step.own)),
            torch.tensor(step.pos, device=weight.device),
        )
        x = noise(0, step.own)
        states = [x] if 0 in keep else []
        for i, (sigma, below) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            t = torch.full(x.shape[:2], 1000 * sigma, device=x.device)
            x = x + (below - sigma) * guided(dit, x, t, text, pos, guidance, past=past)
            if i + 1 in keep:
                states.append(x)
            if bar is not None:
                bar.update(B)
        if cache:
            skip = len(step.anchors)
            clean = (
                x[:, skip:]
                if context is None
                else context[:, [i if i >= 0 else ~i for i in step.targets]]
            )
            commit(
                dit, cache, plan, n, step.targets, torch.cat([clean, clean]), pos[skip:], text, past
            )
        yield n, torch.stack(states, dim=1)


def many_steps(
    dit: DiT,
    plan: Plan | None,
    prompt: Tensor,
    negative: Tensor,
    noise: Noise,
    guidance: float,
    shift: float = 5.0,
    length: int = 21,
) -> Tensor:
    """Clips of a teacher, 48 steps a block: latents [B, T, C, h, w]. No plan: all latents at once, bidirectionally."""
    made, plan = {}, plan or forward(length, length)
    for n, states in integrate(dit, plan, prompt, negative, noise, guidance, shift):
        step = plan.steps[n]
        made.update(zip(step.targets, states[:, -1, len(step.anchors) :].unbind(1)))
    return torch.stack([made[i] for i in range(plan.length)], dim=1)


# ---------------------------------------------------------------- making them
def is_causal(config) -> bool:
    """Whether the teacher of a stage-1 run is autoregressive: `ar` or `ar:FILE`."""
    return config.teacher.split(":")[0] == "ar"


def teacher_file(config) -> str:
    """The checkpoint that --teacher names; plain `ar` is what train_ar.py writes by default."""
    return (
        (config.teacher[3:] or "out/ar/teacher.safetensors")
        if is_causal(config)
        else config.teacher
    )


def settings(config) -> dict:
    """What a shard records: how it was made."""
    names = ("teacher", "prompts", "guidance", "negative", "shift", "seed", "latent")
    names += ("latents", "block", "anchors", "head") if is_causal(config) else ()
    return {k: asdict(config)[k] for k in names} | {
        "teacher": "ar:" * is_causal(config) + teacher_file(config)
    }


def pair_noise(config, channels: int, number: int, dummies: int = 0) -> Tensor:
    """The noise [T + dummies, C, h, w] from which pair `number` starts."""
    T, h, w = config.latent
    return torch.randn(T + dummies, channels, h, w, generator=generator(config.seed, 3, number))


def dummies_of(plans: Sequence[Plan]) -> int:
    """How many rows of noise the dummies of these plans need behind those of the video."""
    return max(-min(0, *(i for step in plan.steps for i in step.own)) for plan in plans)


def plans_of(config) -> list[Plan]:
    """The plans by which the teacher makes pairs: the student's, or all latents in one step."""
    T = config.latent[0]
    return (
        both_directions(T, config.block, config.anchors, config.head)
        if is_causal(config)
        else [forward(T, T)]
    )


def pairs_in(shard: dict[str, Tensor]) -> int:
    """How many pairs a shard holds."""
    return len(shard["clean" if "clean" in shard else "states"])


def slot_states(shard: dict[str, Tensor], i: int, lay: Layout, direction: int) -> Tensor:
    """What pair i of a shard shows at each slot of a layout: [K+1, slots, C, h, w], the end point (or real clip) last."""
    latent = torch.tensor([i if i >= 0 else ~i for i in lay.latent])
    if "states" in shard:
        return shard["states"][i][:, latent].float()
    noisy = shard[DIRECTIONS[direction]][i].float()
    clean = shard["clean"][i][latent[torch.tensor(lay.is_clean)]].float()
    return torch.cat([clean.expand(len(noisy), *clean.shape), noisy], dim=1)


def make_pairs(
    config,
    teacher: DiT,
    plans: Sequence[Plan],
    prompt: Tensor,
    negative: Tensor,
    noise: Tensor,
    clean: Tensor | None,
    bar: tqdm | None = None,
) -> dict[str, Tensor]:
    """Pairs of one batch, as the table above has them. noise: [B, T + dummies, C, h, w]; clean: [B, T, C, h, w] or None."""
    start = noise_from(noise, length=config.latent[0])
    if clean is None:
        ((_, states),) = integrate(
            teacher,
            plans[0],
            prompt,
            negative,
            start,
            config.guidance,
            config.shift,
            keep=KEEP,
            bar=bar,
        )
        return {"states": states}
    made = {"clean": clean}
    for name, plan in zip(DIRECTIONS, plans):
        states = {
            (n, i): x
            for n, s in integrate(
                teacher,
                plan,
                prompt,
                negative,
                start,
                config.guidance,
                config.shift,
                clean,
                KEEP,
                bar,
            )
            for i, x in zip(plan.steps[n].own, s.unbind(2))
        }
        lay = layout(plan, teacher_forcing=True)
        made[name] = torch.stack(
            [states[n, i] for n, i, c in zip(lay.step, lay.latent, lay.is_clean) if not c], dim=2
        )
    return made


def generate_pairs(config, rank: int, world: int, device: torch.device) -> None:
    """Write the missing shards; process r makes shards r, r + world, ...; at the end rank 0 writes the index."""
    folder, dtype, T = Path(config.data), dtype_of(config.dtype), config.latent[0]
    plans = plans_of(config)
    shards = range(0, config.pairs, config.shard)
    todo = [
        s
        for n, s in enumerate(shards)
        if n % world == rank and not (folder / f"pairs-{s:06d}.safetensors").exists()
    ]
    teacher = load_dit(teacher_file(config), dtype, device)
    c, (T, h, w) = teacher.config, config.latent
    source = Prompts(config.prompts, c.text_dim, c.text_len)
    negative = source.embed([config.negative]).to(device)
    clips = Clips(config.latents, config.latent, c.in_dim, source) if is_causal(config) else None
    if clips and len(clips) < config.pairs:
        raise UserError(
            f"{config.latents} holds {len(clips)} clips; use --pairs {len(clips)} or encode more with latents.py"
        )
    micro, steps = config.micro or 16, KEEP[-1] * sum(len(plan.steps) for plan in plans)
    shapes = (
        torch.zeros(2 * micro, T, c.in_dim, h, w, device=device),
        torch.zeros(2 * micro, T, device=device),
    )
    for _ in range(2):  # the first pass warms up
        began = time.perf_counter()
        teacher(
            *shapes, negative.expand(2 * micro, -1, -1), torch.arange(T, device=device)
        ).sum().item()
    cost = timedelta(
        seconds=round(
            (time.perf_counter() - began) * KEEP[-1] * len(plans) * len(todo) * config.shard / micro
        )
    )
    kept = len(KEEP) * sum(len(step.own) for plan in plans for step in plan.steps) + (
        T if clips else 0
    )
    print(
        f"{config.pairs} pairs in {len(shards)} shards, {len(todo)} to make here: about {cost} (h:mm:ss) and "
        f"{config.pairs * kept * c.in_dim * h * w * 2 / 1e9:.2g} GB on disk in all",
        flush=True,
    )
    with (
        tqdm(total=len(todo) * config.shard * steps, desc=f"pairs {rank}", unit="step") as bar,
        stop_signals() as stop,
    ):
        for s in todo:
            parts, numbers = [], range(s, min(s + config.shard, config.pairs))
            for a in range(s, numbers.stop, micro):
                some = range(a, min(a + micro, numbers.stop))
                noise = torch.stack(
                    [pair_noise(config, c.in_dim, i, dummies_of(plans)) for i in some]
                ).to(device)
                clean = torch.stack([clips[i] for i in some]).to(device) if clips else None
                made = make_pairs(
                    config, teacher, plans, source(some).to(device), negative, noise, clean, bar
                )
                parts.append({k: v.half().cpu() for k, v in made.items()})
                if stop():
                    return print(
                        f"stopped; {folder} keeps its whole shards, run the same command to go on"
                    )
            sigmas = torch.tensor([ode_sigmas(KEEP[-1], config.shift)[k] for k in KEEP])
            write_safetensors(
                folder / f"pairs-{s:06d}.safetensors",
                {k: torch.cat([p[k] for p in parts]) for k in parts[0]} | {"sigmas": sigmas},
                settings(config),
            )
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        names = sorted(p.name for p in folder.glob("pairs-*.safetensors"))
        index = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
        with atomic(folder / "index.json") as tmp:
            tmp.write_text(
                json.dumps(
                    {"pairs": config.pairs, "shard": config.shard, "shards": index}, indent=1
                )
            )
        print(f"wrote {len(index)} shards and {folder / 'index.json'}")


# ---------------------------------------------------------------- reading them
def read_index(folder: Path) -> dict[str, str]:
    """Shard -> its hash. raises: UserError"""
    if not (folder / "index.json").is_file():
        raise UserError(
            f"{folder / 'index.json'} does not exist: make pairs first with python train_ode.py --generate --data {folder}"
        )
    shards = read_json(folder / "index.json").get("shards")
    if (
        not shards
        or not isinstance(shards, dict)
        or not all(Path(name).name == name for name in shards)
    ):
        raise UserError(
            f"{folder / 'index.json'} names no shards; delete it and run --generate again"
        )
    return shards


def has_shapes(config, tensors: dict[str, Tensor]) -> bool:
    """Whether a shard holds what its kind of teacher leaves behind, for the run's plans and latents."""
    (T, h, w), some = config.latent, tensors.get("clean", tensors.get("states"))
    if some is None or some.ndim < 5:
        return False
    S, C = len(some), some.shape[-3]
    slots = [sum(len(step.own) for step in plan.steps) for plan in plans_of(config)]
    want = {"sigmas": (len(KEEP),), "states": (S, len(KEEP), T, C, h, w)}
    if is_causal(config):
        want = {"sigmas": (len(KEEP),), "clean": (S, T, C, h, w)} | {
            k: (S, len(KEEP), n, C, h, w) for k, n in zip(DIRECTIONS, slots)
        }
    return {k: tuple(x.shape) for k, x in tensors.items()} == want


def read_pairs(config) -> tuple[list[dict[str, Tensor]], dict]:
    """All shards, memory-mapped, and the settings they were made with. raises: UserError where these are not the run's."""
    folder, shards, first = Path(config.data), [], None
    want = torch.tensor([ode_sigmas(KEEP[-1], config.shift)[k] for k in KEEP])
    for name in read_index(folder):
        tensors, made = read_tensors(folder / name)
        if not made or "teacher" not in made or "sigmas" not in tensors:
            raise UserError(f"{name} is not a shard of pairs; delete it and run --generate again")
        if tensors["sigmas"].shape != want.shape or (tensors["sigmas"] - want).abs().max() > 1e-6:
            raise UserError(
                f"{name} has noise levels {tensors['sigmas'].tolist()}, but shift {config.shift} needs {want.tolist()}"
            )
        for key in (
            ("teacher", "latent", "block", "anchors", "head")
            if is_causal(config)
            else ("teacher", "latent", "prompts")
        ):
            ours = settings(config)[key]
            if made.get(key) != (list(ours) if isinstance(ours, tuple) else ours):
                theirs, ours = (
                    " ".join(map(str, x)) if isinstance(x, (list, tuple)) else x
                    for x in (made.get(key), ours)
                )
                raise UserError(
                    f"{name} was made with --{key} {theirs}, but --{key} is {ours}; use the same, or --data for other pairs"
                )
        if made.keys() != settings(config).keys() or not has_shapes(config, tensors):
            raise UserError(
                f"{name} is not a whole shard of pairs for --latent {' '.join(map(str, config.latent))}; delete it and run "
                "--generate again"
            )
        if differ := [k for k in made if made[k] != (first := first or made)[k]]:
            raise UserError(
                f"{name} differs from the other shards in {', '.join(f'{k}={made[k]!r}' for k in differ)}; delete it "
                "and run --generate again"
            )
        shards.append(tensors)
    return shards, made


def check_pairs(config) -> None:
    """Validate every shard: its hash, its noise levels, finite numbers, the first state is the seeded noise, and the
    share of noise falls from state to state to the end point."""
    folder, T = Path(config.data), config.latent[0]
    shards, made = read_pairs(config)
    causal = is_causal(config)
    plans = plans_of(config)
    for (name, digest), tensors in zip(
        read_index(folder).items(), tqdm(shards, desc="check", unit="shard")
    ):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise UserError(
                f"{name} is not the file the index names (its hash differs); delete it and run --generate again"
            )
        first = int(name[6:12])
        for key, plan in zip(DIRECTIONS if causal else ("states",), plans):
            x = tensors[key]
            lay = layout(plan, teacher_forcing=causal)
            own = tuple(i for i, c in zip(lay.latent, lay.is_clean) if not c)
            noise = torch.stack(
                [
                    pair_noise(config, x.shape[3], first + i, dummies_of(plans))
                    for i in range(len(x))
                ]
            )
            noise = noise_from(noise, length=T)(0, own).flatten(1)
            if not torch.isfinite(x).all():
                raise UserError(
                    f"{name} holds NaN or infinite latents; delete it and run --generate again"
                )
            flat = x.float().flatten(2)
            if (flat[:, 0] - noise).abs().max() > 2e-3:
                raise UserError(
                    f"{name} does not start from the noise of seed {config.seed}; was it made with another --seed?"
                )
            share = torch.stack(
                [torch.nn.functional.cosine_similarity(flat[:, k], noise) for k in range(len(KEEP))]
            ).mean(1)
            near = torch.stack(
                [
                    torch.nn.functional.cosine_similarity(flat[:, k], flat[:, -1])
                    for k in range(len(KEEP))
                ]
            ).mean(1)
            if not (share.diff() < 0).all() or not (near.diff() > 0).all():
                raise UserError(
                    f"{name}: the states do not fall from noise to a clean end (likeness to the noise "
                    f"{share.tolist()}, to the end {near.tolist()})"
                )
    print(
        f"{sum(map(pairs_in, shards))} pairs in {len(shards)} "
        f"shards are good: made by {made['teacher']}, guidance {made['guidance']}, shift {made['shift']}, likeness to the noise from 1 "
        f"to {share[-1]:.2f}"
    )
