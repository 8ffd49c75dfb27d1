"""For users: a video in any order of time, or around your own clips (`clips.py`), as a file.

In Python, and the same clip, bit for bit, as from the command line:

    import anchors
    from generate import decode_in_order, load_models, make_blocks, write_video
    dit, vae = load_models("toy/weights")
    plan = anchors.backward(21)
    blocks = make_blocks(dit, plan, ["a red square moves left over a green wave"], (4, 4), seed=0)
    write_video("out/clip.mp4", decode_in_order(vae, plan, blocks))

A stream all the way: blocks are decoded as soon as all earlier ones are there, and written as they
are decoded, so that memory does not grow with the video. A student is run as it was trained (its
file says how); flags given here win, and what contradicts it is said. With --guidance the weights
are a teacher's, of 48 steps a block.

    python generate.py --order backward --prompt "a red square moves left over a green wave"
"""

import inspect
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import anchors
import clips
from anchors import HORIZON, ORDERS, Plan
from clips import TIME, Given, seconds_to_latents
from dit import PRESETS, DiT, load_dit
from lib import outputs, streams, text
from lib.common import UserError, dtype_of, run, start
from lib.media import FORMATS, FPS, VideoWriter, write_sheet
from lib.noise import noise_seeded
from lib.recipe import FLAGS, Recipe, recipe_of, say_changes
from lib.shapes import frame_size
from lib.story import LONGEST
from lib.weights import find
from plans import as_shown
from sampler import gather, student_blocks, teacher_blocks
from vae import PRESETS as VAE_PRESETS
from vae import VAE, load_vae


# ---------------------------------------------------------------- models
def weights_in(weights: str) -> tuple[Path, Path]:
    """The student's file (or folder) and the VAE's, from a folder, or from a student's file."""
    path = Path(weights).expanduser()
    if not path.exists():  # the default is seen from this file, wherever the shell stands
        path = Path(__file__).parent / path
    if not weights or not path.exists():
        raise UserError(
            f"--weights {weights!r} is not a folder or file (seen from {Path.cwd()}); name a folder"
            " with a student and a VAE in it, or use random"
        )
    if path.is_dir():
        return find(path, "transformer"), find(path, "VAE")
    return path, find(path.parent, "VAE")


def load_models(
    weights: str = "toy/weights",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype = torch.float32,
) -> tuple[DiT, VAE]:
    """The student and the VAE in a folder, or a student's file and the VAE beside it.

    "random" builds toy-sized ones, to try plans and to measure speed."""
    if weights != "random":
        student, vae_file = weights_in(weights)
        return load_dit(student, dtype, device), load_vae(vae_file, vae_dtype, device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit, vae = DiT(PRESETS["toy"]), VAE(VAE_PRESETS["toy"])
        torch.nn.init.normal_(dit.head.head.weight, std=0.02)  # else v = 0
    dit.recipe = Recipe().write()
    dit, vae = dit.to(device, dtype), vae.to(device, vae_dtype)
    return dit.eval().requires_grad_(False), vae.eval().requires_grad_(False)


def known_recipe(dit: DiT) -> Recipe:
    """How a student was trained. raises: UserError if its file does not say"""
    if dit.recipe is None:
        raise UserError(
            "these weights do not say how they were trained: give --denoising 1000 750 500 250 if"
            " they are a student of these steps, or --guidance 5 if they are a teacher (48 steps)"
        )
    return recipe_of(dit)


# ---------------------------------------------------------------- from a plan to a file
@torch.no_grad()
def make_blocks(
    dit: DiT,
    plan: Plan,
    prompts: Sequence[str],
    size: tuple[int, int],
    seed: int = 0,
    recipe: Recipe | None = None,
    given: dict[int, Tensor] | None = None,
    commit_anchors: bool = False,
    guidance: float | None = None,
    negative: str | None = None,
    embeddings: str = "",
    weights: str = "",
) -> Iterator[tuple[int, Tensor]]:
    """Generate a plan: (n, latents [1, T, C, h, w]) as step n of the plan is finished.

    prompts: one for each prompt of the plan;  size: h, w of the latents
    recipe: how the student is run; None: as it was trained
    given: latent -> [1, C, h, w], for those that the plan says are given
    guidance: run it as a teacher instead, 48 steps a block;  negative: its unconditional prompt
    embeddings, weights: as `text.embed` takes them"""
    c, device = dit.config, dit.patch_embedding.weight.device
    if negative is None:
        negative = "" if c.text_dim == text.TOY_DIM else text.NEGATIVE
    words = [*prompts] if guidance is None else [*prompts, negative]
    embedded = text.embed(words, c.text_dim, c.text_len, embeddings, weights).to(device)
    texts = list(embedded.split(1))  # (1, L, text_dim) each
    noise = noise_seeded([(seed, 0, 0)], (c.in_dim, *size), device)
    if guidance is None:
        texts, recipe = [dit.text_kv(e) for e in texts], recipe or known_recipe(dit)
        return student_blocks(dit, plan, texts, noise, recipe, given, commit_anchors=commit_anchors)
    *texts, nothing = texts
    rule = {name: getattr(recipe or Recipe(), name) for name in ("shift", "share_noise")}
    return teacher_blocks(dit, plan, texts, nothing, noise, guidance, given, **rule)


@dataclass
class Maker:
    """Who makes clips to measure, and how: a student as trained or, with guidance, a teacher."""

    dit: DiT
    vae: VAE
    size: tuple[int, int]
    seed: int = 0
    guidance: float | None = None
    share_noise: str = ""  # none, start or all; default: as trained
    embeddings: str = ""  # a file of embedded prompts
    weights: str = ""  # a folder with Wan's text encoder

    @torch.no_grad()
    def make(
        self,
        plan: Plan,
        captions: Sequence[str] | Sequence[Sequence[str]],
        first: int = 0,
        given: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, T, C, h, w] and pixels [B, 3, F, H, W], a clip a caption.

        captions: [B], or such a list for each of the plan's prompts
        first: clip n has the noise (seed, first + n, 0);  given: latent -> [B, C, h, w]"""
        c, device = self.dit.config, self.dit.patch_embedding.weight.device
        of_prompts = [captions] * plan.prompts() if isinstance(captions[0], str) else captions
        source = c.text_dim, c.text_len, self.embeddings, self.weights
        texts = [text.embed(words, *source).to(device) for words in of_prompts]  # (B, L, text_dim)
        h, w = (side // self.vae.config.space for side in self.size)
        seeds = [(self.seed, first + n, 0) for n in range(len(texts[0]))]
        noise = noise_seeded(seeds, (c.in_dim, h, w), device)
        recipe = recipe_of(self.dit)
        share = self.share_noise or recipe.share_noise
        if self.guidance is None:
            recipe = replace(recipe, share_noise=share)
            blocks = student_blocks(self.dit, plan, texts, noise, recipe, given)
        else:
            how = (torch.zeros_like(texts[0][:1]), noise, self.guidance, given)  # no negative
            blocks = teacher_blocks(self.dit, plan, texts, *how, share_noise=share)
        z = gather(plan, blocks)
        return z, decoded(self.vae, z)


def decoded(vae: VAE, z: Tensor, chunk: int = 0) -> Tensor:
    """Pixels [B, 3, F, H, W] of latents [B, T, C, h, w], a clip at a time; on the CPU."""
    return torch.cat([vae.decode(clip[None], chunk).cpu() for clip in z])


@torch.no_grad()
def decode_in_order(
    vae: VAE,
    plan: Plan,
    blocks: Iterable[tuple[int, Tensor]],
    chunk: int = 0,
    waiting: dict[int, Tensor] | None = None,
) -> Iterator[Tensor]:
    """Decode latents as soon as all earlier ones are there; yield video [1, 3, F, H, W] in pieces.

    chunk: how many latents at a time at most, 0: `vae.at_once`
    waiting: where finished latents wait, for a caller who wants to see them"""
    waiting = {} if waiting is None else waiting
    at, state = 0, None
    for n, x0 in blocks:
        made = x0.clone()  # or the anchors beside it would stay alive
        waiting.update(zip(plan.steps[n].targets, made.unbind(1)))
        while at in waiting:
            ready = []
            while at in waiting and len(ready) < (chunk or vae.at_once(*x0.shape[3:])):
                ready.append(waiting.pop(at))
                at += 1
            video, state = vae.decode_chunk(torch.stack(ready, dim=1), state, inplace=True)
            yield video.cpu()


def write_video(path: str | Path, pieces: Iterable[Tensor], comment: str = "") -> int:
    """Write a video [1, 3, F, H, W] as its pieces come, and return the number of frames.

    On Ctrl-C what was written by then is a file of its own, clip.part.mp4, and the name is free."""
    writer = VideoWriter(path, FPS, comment)
    try:
        with writer:
            for video in pieces:
                writer.write(video[0])
    except KeyboardInterrupt:
        done = f"{writer.part} has {writer.count / FPS:.2f} s" if writer.count else "nothing yet"
        print(f"stopped: {done}")
        raise
    return writer.count


# ---------------------------------------------------------------- command line
@dataclass
class Config(clips.Clips):
    """Make a video in any order of time, or around your own clips."""

    RANGES = {
        "seed": (),  # a number, or "random"
        "frames": (1, int(LONGEST * FPS)),
        "gap": (0, None),
    }
    prompts: str = ""  # a file with a prompt a line: a clip each, in a folder named as --out
    out: str = "out/clip.mp4"  # .mp4, .gif, .mkv (lossless), .png (one frame)
    order: str = ""  # forward, backward, or any other in anchors.ORDERS; default: forward
    frames: int = 0  # length in frames instead: 1 + 4k, with k + 1 a multiple of the block; or 1
    gap: int = 0  # latents between the ends (inbetween: the rest; loop: 15; story, transition: 6)
    sheet: str = ""  # also write a contact sheet: a .png
    preview: str = ""  # a folder: backward blocks as clips, when the block before each is made
    weights: str = "toy/weights"  # a folder with student and VAE (Wan's layout works), or: random
    embeddings: str = ""  # what text.py made of the prompts; else the text encoder is looked for
    seed: str = "0"  # same seed, same clip; or: random, which is printed
    size: tuple[int, ...] = ()  # height width; default 480 832 for Wan's VAE, 32 32 for the toy's
    denoising: tuple[float, ...] = ()  # such as 1000 750 500 250; default: as trained
    first_denoising: tuple[float, ...] = ()  # of the block made first; default: as trained
    shift: float | None = None  # of the noise levels; default: as trained
    block: int | None = None  # latents made at a time; default: as trained
    anchors: int | None = None  # latents imagined before a backward block; default: as trained
    head: int | None = None  # size of the block of latent 0, 0: of a block; default: as trained
    share_noise: str = ""  # an anchor has its latent's noise: none, start, all; default: as trained
    dummy: bool = False  # backward without anchors: a dummy block says that it is no beginning
    commit_anchors: bool = False  # let anchors be seen while their block is written to the cache
    guidance: float | None = None  # run a teacher, 48 steps a block; without --order all at once
    negative: str | None = None  # the teacher's unconditional prompt; default: Wan's, toy: none
    device: str = "auto"  # cpu, cuda or auto
    dtype: str = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    vae_dtype: str = "float32"  # of the VAE; bfloat16 is up to twice as fast
    compile: bool = False  # torch.compile the transformer's blocks (CUDA; minutes on first use)


OF_ORDERS = ("order", "guidance", "frames", "gap", "dummy")  # not of the user's own clips
OF_CLIPS = ("use", "fit", "exact")
NOT_BOTH = dict.fromkeys(clips.COMMANDS, OF_ORDERS) | {
    "frames": ("seconds",),
    "guidance": ("denoising", "first_denoising"),
    "prompts": ("prompt", "switch"),
    "story": (*OF_ORDERS, "prompt", "switch", "prompts"),
}


def check(config: Config) -> list[str]:
    """What can be said before anything is loaded; the files that are read. raises: UserError"""
    commands = clips.asked(config)
    is_set = {f.name: getattr(config, f.name) != f.default for f in fields(config)}
    for one, others in NOT_BOTH.items():
        for other in others:
            if is_set[one] and is_set[other]:
                both = f"{clips.flag(one)} and {clips.flag(other)}"
                raise UserError(f"{both} were asked for; leave out one of them")
    for name in OF_CLIPS:
        if is_set[name] and not commands:
            raise UserError(f"--{name} is about your own clips, and none is given; leave it out")
    if config.dummy and config.anchors:
        raise UserError(
            f"--dummy is backward without anchors; leave out --anchors {config.anchors}"
        )
    if is_set["negative"] and not is_set["guidance"]:
        raise UserError("--negative is a teacher's; add --guidance, or leave it out")
    if config.order and config.order not in ORDERS:
        raise UserError(f"unknown order {config.order!r}; use {', '.join(ORDERS)}")
    if config.guidance is not None and len(config.prompt) > 1:
        raise UserError(f"a teacher (--guidance) follows one prompt, got {len(config.prompt)}")
    words = config.prompt or (config.prompts or config.story or "",)
    if not all(prompt.strip() for prompt in words):
        example = '--prompt "a red square moves left over a green wave"'
        raise UserError(f"--prompt is empty; say what to show, for instance {example}")
    read = [path for path in (*clips.files_of(config), config.prompts, config.embeddings) if path]
    outputs.check_read(read)
    outputs.check_file(config.out, "out", tuple(FORMATS))
    for one in clips_of(config):
        outputs.check_places(read, one.out, tuple(FORMATS), one.sheet, one.preview)
    return read


def chosen_recipe(config: Config, dit: DiT) -> Recipe:
    """How the weights are run: as they were trained, but for what flags say; contradictions are
    said."""
    trained = Recipe.read(dit.recipe)
    if trained and config.guidance is not None:
        print(f"note: a student of {len(trained.levels)} steps is run as a teacher, of 48")
    is_said = config.denoising or config.guidance is not None
    base, changes = Recipe() if is_said and not trained else known_recipe(dit), {}
    for entry in [name for name in asdict(base) if name != "plans"]:  # that is no flag here
        value = getattr(config, FLAGS.get(entry, entry))
        if value not in (None, (), ""):
            changes[entry] = value
    chosen = replace(base, **changes | ({"anchors": 0} if config.dummy else {}))
    if trained:
        say_changes(trained, chosen)
    return chosen


# ---------------------------------------------------------------- which plan
def length_of(config: Config, block: int, head: int) -> int:
    """Latents of --frames or --seconds: those of the first block, and whole blocks."""
    if config.frames:
        latents = (config.frames + TIME - 1) / TIME  # the first latent is one frame
        blocks = (latents - head) / block
        if blocks < 0 or blocks % 1:
            below = TIME * (head + max(int(blocks), 0) * block) - TIME + 1
            use = f"use {below} or {below + TIME * block}"
            kind = f"1 + {TIME}k frames in whole blocks of {block} latents"
            raise UserError(f"--frames {config.frames} is not {kind}; {use}")
        return int(latents)
    seconds = 5.0 if config.seconds is None else config.seconds
    seconds_to_latents(seconds, block)  # refuses what cannot be
    blocks = ((seconds * FPS + TIME - 1) / TIME - head) / block
    return head + math.ceil(round(max(blocks, 0), 6)) * block


def make_plan(config: Config, recipe: Recipe) -> Plan:
    """The plan of --order, at the asked length: the function that anchors.ORDERS has under that
    name is called with what it takes. raises: UserError for lengths and options that do not fit"""
    if config.guidance is not None and not config.order:
        return all_at_once(length_of(config, 1, 1))
    if config.frames == 1:  # a picture
        recipe = replace(recipe, block=1, anchors=min(recipe.anchors, 1), head=0)
    name, block = config.order or "forward", recipe.block
    head = recipe.head or block
    if name == "forward":  # in blocks of the head's size, as it was trained
        block = head
    elif name != "backward":
        head = block
    takes = inspect.signature(ORDERS[name]).parameters
    for option, parameter in (("gap", "gap"), ("dummy", "dummy"), ("window", "view")):
        is_known = parameter in takes or (option, name) == ("gap", "inbetween")
        if getattr(config, option) and not is_known:
            raise UserError(f"--order {name} has no --{option}; leave it out")
    length = length_of(config, block, head)
    if name == "inbetween" and config.gap:
        if config.frames or config.seconds is not None:
            raise UserError(f"--gap {config.gap} says how long; leave out --frames, --seconds")
        length = config.gap + 2 * block
    as_trained = config.anchors is None and not recipe.anchors and head == block < length
    options = {
        "length": length,
        "block": block,
        "anchors": recipe.anchors,
        "head": head,
        "gap": config.gap,
        "dummy": config.dummy or as_trained,
        "view": clips.view_of(config, recipe, length),
        "scenes": 2 if len(config.prompt) == 2 else max(len(config.prompt), 3),
        "split_gaps": len(config.prompt) > 1,
    }
    plan = ORDERS[name](**{key: value for key, value in options.items() if key in takes})
    return replace(plan, name=name)


def all_at_once(length: int) -> Plan:
    """A bidirectional teacher's plan: one step."""
    if length > HORIZON:
        most = f"makes at most {HORIZON} latents at once, not {length}"
        raise UserError(f"a bidirectional teacher {most}; an autoregressive one needs an --order")
    return replace(anchors.forward(length, length), name="all at once")


# ---------------------------------------------------------------- one clip
@dataclass
class Job:
    """What all clips of a run share."""

    dit: DiT
    vae: VAE
    recipe: Recipe
    size: tuple[int, int]
    seed: int
    sources: dict[str, str]  # files that were read -> their digests


def plan_clip(config: Config, job: Job, given: Given) -> tuple[Plan, Sequence[str]]:
    """What is made, and its prompts; the user's clips are read into `given`."""
    if clips.asked(config):
        return clips.Around(config, job.recipe, job.size, given).plan()
    plan = make_plan(config, job.recipe)
    return clips.prompted(plan, config.prompt, config.switch), config.prompt


def looped(vae: VAE, plan: Plan, z: Tensor) -> Tensor:
    """Video [B, 3, F, H, W] of latents z [B, T, C, h, w], as a file of this plan has it."""
    back = list(plan.comes_back_to)
    video = decoded(vae, torch.cat([z, z[:, back]], dim=1))
    return video[:, :, vae.config.frames(len(back) + 1) :] if back else video


def watched_blocks(
    config: Config, job: Job, plan: Plan, prompts: Sequence[str], given: Given
) -> Iterator[tuple[int, Tensor]]:
    """The blocks of a plan, looked at: NaN ends them; backward ones may be previewed."""
    size = tuple(side // job.vae.config.space for side in job.size)
    flags = ("commit_anchors", "guidance", "negative", "embeddings", "weights")
    how = {name: getattr(config, name) for name in flags}
    blocks = make_blocks(job.dit, plan, prompts, size, job.seed, job.recipe, given.latents, **how)
    blocks = streams.only_finite(blocks, plan)
    if config.preview:
        blocks = streams.previewed(blocks, plan, job.vae, Path(config.preview).expanduser())
    return blocks


@torch.no_grad()
def make_clip(config: Config, job: Job) -> None:
    """Make one video and write it to --out; say what is made, and how seams came out."""
    vae, out = job.vae, Path(config.out).expanduser()
    given = Given(vae, job.dit.patch_embedding.weight.device)
    plan, prompts = plan_clip(config, job, given)
    shown, length = as_shown(plan), vae.config.frames(plan.length)
    back = shown.length - plan.length  # latents that a loop shows at its end instead
    first = vae.config.frames(back + 1) if back else 0  # frame that the file begins with
    frames = vae.config.frames(shown.length) - first
    for f in sorted(given.frames.keys() & range(1, first)):
        given.frames[length - 1 + f] = given.frames[f]
    if out.suffix.lower() == ".png" and frames > 1:
        raise UserError(f"--out {config.out} is one picture, not {frames} frames; add --frames 1")
    recipe = None if config.guidance is not None else asdict(job.recipe)
    about = outputs.describe(config, plan, frames, prompts, job.seed, recipe, job.sources)
    if config.prompts and outputs.is_made(out, about):
        print(f"{out} is there, made with the same settings: skipped")
        return
    print(anchors.text_picture(plan) if plan.length <= 64 else f"{plan.name}: too long to draw")
    print(
        f"{plan.name}: {plan.length} latents in {len(plan.steps)} steps = {frames} frames"
        f" = {frames / FPS:.2f} s, {job.size[0]}x{job.size[1]}"
    )

    if first:
        print(f"a loop: the file begins with frame {first}; those before it come at its end")
    sheet = (first + torch.linspace(0, frames - 1, min(16, frames)).round().int()).tolist()
    seams = streams.Seams(given.frames, first + frames, config.exact, keep=sheet)
    waiting = {}
    brief = {name: about[name] for name in ("prompt", "seed", "sources")} | {"plan": plan.name}
    blocks = watched_blocks(config, job, plan, prompts, given)
    with tqdm(blocks, desc="blocks", total=len(plan.steps), unit="block") as blocks:
        again = streams.come_back(blocks, plan)
        pieces = seams.through(decode_in_order(vae, shown, again, waiting=waiting))
        pieces = streams.without_first(pieces, first)
        pieces = streams.or_the_end(pieces, plan, vae, job.recipe.block, waiting)
        write_video(out, pieces, json.dumps(brief, ensure_ascii=False))

    outputs.write_sidecar(out, about)
    print(f"wrote {out} and {outputs.sidecar(out).name}, which says how it was made")
    seams.say(FPS, first)
    if config.sheet:
        stills = torch.stack([seams.written[f] for f in sheet], dim=1)  # (3, 16, H, W)
        write_sheet(Path(config.sheet).expanduser(), stills[None], columns=16)
        print(f"wrote {config.sheet}")


def clips_of(config: Config) -> list[Config]:
    """One config a clip: with --prompts one for each line, else the config itself."""
    if not config.prompts:
        return [config]
    out = Path(config.out).expanduser()
    made = []
    for n, words in enumerate(text.lines_of(Path(config.prompts).expanduser()), 1):
        path = out.with_suffix("") / f"{outputs.safe_name(n, words)}{out.suffix}"
        sheet = str(path.with_suffix(".sheet.png")) if config.sheet else ""
        preview = str(Path(config.preview) / path.stem) if config.preview else ""
        made.append(replace(config, prompt=(words,), out=str(path), sheet=sheet, preview=preview))
    return made


def main(config: Config) -> None:
    """Check, load once, make every clip."""
    read = check(config)
    seed = outputs.read_seed(config.seed)
    world, device = start(config.device)[1:]
    if world > 1:
        raise UserError(f"a clip is made by one process, not {world}; start it without torchrun")
    dtype = dtype_of(config.dtype, device)
    vae_dtype = dtype_of(config.vae_dtype, device, "vae_dtype")
    dit, vae = load_models(config.weights, dtype, device, vae_dtype)
    recipe, size = chosen_recipe(config, dit), frame_size(config.size, dit, vae)
    if config.compile:
        dit.compile_blocks()
    used = [] if config.weights == "random" else [*weights_in(config.weights)]
    sources = {path.name: outputs.digest(path) for path in used}
    sources |= {path: outputs.digest(path) for path in read if path != config.prompts}
    job = Job(dit, vae, recipe, size, seed, sources)
    with streams.sigterm_is_ctrl_c():
        for one in clips_of(config):
            make_clip(one, job)


if __name__ == "__main__":
    run(main, Config)
