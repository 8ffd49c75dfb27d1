"""Your own clips: what comes before, after, between; loops and stories; a video around pictures.

A clip is encoded and its latents are *given* to a plan (`anchors.py`), which makes all others
around them: the seam is made in latent space, no frame is decoded and encoded again. The
directions are those of time:

    --extend-after CLIP     make what comes AFTER the clip: it is the beginning        [clip] > > >
    --extend-before CLIP    make what comes BEFORE the clip: it is the end             < < < [clip]
    both with the same CLIP: it is the middle                                      < < [clip] > >
    --between A B           A, then what leads from A to B, then B, as one shot         [A] > < [B]
    --transition A B        the same between two scenes, each with its own prompt
    --loop CLIP             the clip, and the way back to its beginning          [clip] > < (clip)
    --image PICTURE         the video starts with it
    --keyframes 0:x.png,40:y.png     the video has these pictures at these frames
    --story FILE.json       scenes, given or made, anywhere in time; then the gaps between them

Latent 0 is an image latent, all others are video latents, whose meaning hangs on their past
(`vae.py`). So a clip at the beginning is encoded as it is, 1 + 4k frames. A clip that stands
elsewhere is encoded from one frame earlier: its first frame is the past of its first video latent
and is not part of the result. A picture elsewhere is encoded as a standstill, and held within a
block that is otherwise made: alone, the student would not know what to do with it.

These are plans; generate.py makes and writes them:

    python generate.py --extend-before clip.mp4 --prompt "a red disc moves up over a blue wave"
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import anchors
from anchors import HORIZON, Plan, View
from lib.common import UserError
from lib.media import FPS, load_clip
from lib.recipe import Recipe
from lib.story import LONGEST, Story, read_keyframes, read_story
from plans import switch, timeline, with_given
from vae import VAE

TIME = 4  # frames of a latent [Wan]
STILL = 13  # frames of standstill until a picture's video latent means what it says [ours]


# ---------------------------------------------------------------- what is asked for
@dataclass
class Clips:
    """The flags that name the user's own clips, and what is done with them."""

    RANGES = {
        "fit": ("crop", "pad"),
        "sink": ("past", "future", "both", "none"),
        "window": (0, None),
    }
    prompt: tuple[str, ...] = ()  # what to show; one for all, or one per scene, part or --switch
    switch: tuple[float, ...] = ()  # seconds at which the next --prompt takes over
    extend_after: str | None = None  # make what comes AFTER this clip, which is the beginning
    extend_before: str | None = None  # make what comes BEFORE this clip, which is the end
    between: tuple[str, ...] | None = None  # A B: make what leads from clip A to clip B, one shot
    transition: tuple[str, ...] | None = None  # A B: from scene A to scene B, a prompt each
    loop: str | None = None  # make the way from the end of this clip back to its beginning
    image: str | None = None  # start with this picture
    keyframes: str | None = None  # frame:picture,... such as 0:x.png,40:y.png; motion slows there
    story: str | None = None  # a .json: {"scenes": [{"start": 0, "clip": ..}, {"start": 4, ..}]}
    seconds: float | None = None  # length, default 5; around clips: what is made, in each place, 3
    use: float = 5.0  # at most so many seconds of each clip: those nearest to what is made
    fit: str = "crop"  # crop or pad clips to the model's size
    exact: bool | None = None  # true: your frames to the bit; false: decoded; default: but at seams
    window: int = 0  # how many neighbours stay in view; 0: all within 21 latents, 6 beyond [paper]
    sink: str = "both"  # beyond 21 latents: past, future, both or none stays in view


JOIN = ("between", "transition")  # take two clips
COMMANDS = ("extend_after", "extend_before", *JOIN, "loop", "image", "keyframes", "story")


def flag(name: str) -> str:
    """extend_before -> --extend-before"""
    return "--" + name.replace("_", "-")


def asked(config: Clips) -> list[str]:
    """The one of COMMANDS that was asked for, if any; to extend a clip on both sides, the two.

    raises: UserError for several, for two clips to extend, for one clip to join, for no name"""
    commands = [name for name in COMMANDS if getattr(config, name) is not None]
    if len(commands) > 1 and commands != ["extend_after", "extend_before"]:
        known = ", ".join(map(flag, COMMANDS))
        raise UserError(
            f"{' and '.join(map(flag, commands))} were asked for; use one of {known}, or both"
            " --extend flags with one clip"
        )
    if len(commands) == 2 and config.extend_before != config.extend_after:
        raise UserError(
            f"--extend-before {config.extend_before} and --extend-after {config.extend_after} are"
            " two clips: name the same one to extend it on both sides, or join two with --between"
        )
    for name in commands:
        value = getattr(config, name)
        if name in JOIN and len(value) != 2:
            raise UserError(f"{flag(name)} takes two clips, got {len(value)}")
        if "" in (value if name in JOIN else [value]):
            raise UserError(f"{flag(name)} has an empty name; name a file")
    return commands


def files_of(config: Clips) -> list[str]:
    """The clips and pictures that will be read."""
    named = [config.extend_after, config.extend_before, config.loop, config.image, config.story]
    named += [*(config.between or ()), *(config.transition or ())]
    if config.keyframes:
        named += [path for _, path in read_keyframes(config.keyframes)]
    if config.story:
        named += [scene.clip for scene in read_story(config.story).scenes]
    return list(dict.fromkeys(name for name in named if name))


def seconds_to_latents(seconds: float, block: int, name: str = "--seconds") -> int:
    """Video latents for so many seconds, in whole blocks: 1 s -> 16 frames -> 4 latents -> 6."""
    if not 0 < seconds < LONGEST:
        raise UserError(f"{name} {seconds} must be above 0 and below {LONGEST}")
    return math.ceil(round(seconds * FPS / TIME / block, 6)) * block


def view_of(config: Clips, recipe: Recipe, length: int) -> View:
    """What stays in view: everything within the horizon, else a window and sinks. Students that
    know one length alone are shown what they know where latent 0 is made."""
    as_trained = recipe.plans == "paper"
    if length <= HORIZON and not config.window:
        return View(as_trained=as_trained)
    past, future = config.sink in ("past", "both"), config.sink in ("future", "both")
    return View(config.window or 2 * recipe.block, past, future, as_trained)


# ---------------------------------------------------------------- prompts of a plan
def prompted(
    plan: Plan,
    prompts: Sequence[str],
    seconds: Sequence[float] = (),
    parts: Sequence[int] | None = None,
) -> Plan:
    """The plan with a prompt for each step: changing at these seconds, or one for all, or one for
    each part that begins at these latents (None: what the plan says). raises: UserError if their
    numbers do not fit"""
    if seconds:
        return _switched(plan, prompts, seconds)
    if parts is not None or len(prompts) == 1:
        plan = switch(plan, parts if len(prompts) > 1 else ())
    if len(prompts) != plan.prompts():
        raise UserError(
            f"{len(prompts)} prompts for a plan with {plan.prompts()}; give one, in quotes, or one"
            " for each scene or part, or say with --switch when the next one takes over"
        )
    return plan


def _switched(plan: Plan, prompts: Sequence[str], seconds: Sequence[float]) -> Plan:
    is_rising = list(seconds) == sorted(set(seconds)) and seconds[0] > 0
    if len(prompts) != len(seconds) + 1 or not is_rising:
        needs = f"rising times above 0 and {len(seconds) + 1} prompts, got {len(prompts)}"
        raise UserError(f"--switch {' '.join(map(str, seconds))} needs {needs}")
    plan = switch(plan, [math.ceil(s * FPS / TIME) for s in seconds])
    idle = set(range(len(prompts))) - {step.prompt for step in plan.steps}
    if idle:
        raise UserError(
            f"prompt {min(idle) + 1} is never followed: no block begins at its time; move --switch"
        )
    return plan


# ---------------------------------------------------------------- what is given
@dataclass
class Given:
    """The user's latents -> [1, C, h, w], and the frames [3, H, W] that they stand for."""

    vae: VAE
    device: torch.device
    latents: dict[int, Tensor] = field(default_factory=dict)
    frames: dict[int, Tensor] = field(default_factory=dict)

    def clip(self, video: Tensor, at: int) -> int:
        """Place a clip [1, 3, 1 + 4k, H, W] from latent `at` on; the latent after its last.

        Anywhere but at the beginning its first frame is only the past of its first latent."""
        skip, z = min(at, 1), self.vae.encode(video.to(self.device))  # (1, T, C, h, w)
        self.latents |= dict(enumerate(z.unbind(1)[skip:], at))
        first = TIME * (at - 1) + 1 if at else 0
        self.frames |= dict(enumerate(video[0].unbind(1)[skip:], first))
        return at + z.shape[1] - skip

    def picture(self, picture: Tensor, frame: int) -> int:
        """Place a picture [1, 3, 1, H, W]; the latent that holds it."""
        at = math.ceil(frame / TIME)
        still = picture.to(self.device).expand(-1, -1, STILL if at else 1, -1, -1)
        self.latents[at] = self.vae.encode(still)[:, -1]
        self.frames[frame] = picture[0, :, 0]
        return at


# ---------------------------------------------------------------- plans around it
@dataclass
class Around:
    """Plans around the user's clips, which are read, encoded and put into `given`."""

    config: Clips
    recipe: Recipe
    size: tuple[int, int]
    given: Given

    def plan(self) -> tuple[Plan, list[str]]:
        """The plan that was asked for, with every given latent marked, and its prompts."""
        commands, config = asked(self.config), self.config
        if config.story:
            plan, prompts = self.tell(read_story(config.story))
        else:
            plan, parts = self.make()
            prompts = list(config.prompt)
            plan = prompted(plan, prompts, config.switch, parts)
        plan = replace(plan, name=" ".join(map(flag, commands)))
        return with_given(plan, list(self.given.latents)), prompts

    def make(self) -> tuple[Plan, list[int] | None]:
        """Whatever is no story; the latents at which its parts begin, if each may have a prompt."""
        config = self.config
        seconds = 3.0 if config.seconds is None else config.seconds
        new = seconds_to_latents(seconds, self.recipe.block)
        if config.extend_after or config.extend_before:
            return self.extend(new)
        if config.between or config.transition:
            return self.join(new)
        if config.loop:
            return self.close(new)
        return self.hold(seconds), []

    def read(self, path: str, is_begin: bool, last: bool = False, use: float = 0) -> Tensor:
        """A clip cut to whole blocks, and one frame more if it is not the beginning.

        last: its last frames, else its first;  use: at most so many seconds, 0: as --use says
        returns: [1, 3, 1 + 4k, H, W]; prints what was done"""
        block = self.recipe.block
        extra = 1 - TIME if is_begin else 1  # the image latent is one frame; else one is the past
        unit = TIME * block
        most = TIME * seconds_to_latents(use or self.config.use, block, "--use") + extra
        least = unit + extra
        video, says = load_clip(path, self.size, FPS, self.config.fit, most, last, least)
        n = (video.shape[2] - extra) // unit * unit + extra
        used = "the beginning" if is_begin else "one as the past of the others"
        print(f"{says}; {n} used: {used}")
        return video[:, :, -n:] if last else video[:, :, :n]

    def picture(self, path: str, frame: int) -> int:
        video, says = load_clip(path, self.size, FPS, self.config.fit, 1)
        print(says)
        return self.given.picture(video, frame)

    def timeline(self, length: int, scenes: list[tuple[int, int]], **more) -> Plan:
        view = view_of(self.config, self.recipe, length)
        return timeline(length, scenes, self.recipe.block, self.recipe.anchors, view, **more)

    def extend(self, new: int) -> tuple[Plan, list[int]]:
        """A clip, and `new` latents after it, before it, or both; the latents where parts begin."""
        config = self.config
        if not config.extend_before:
            head = self.given.clip(self.read(config.extend_after, True, last=True), 0)
            return self.timeline(head + new, [(0, head)]), [head]
        stop = self.given.clip(self.read(config.extend_before, False), new)
        if config.extend_after:
            return self.timeline(stop + new, [(new, stop)]), [new, stop]
        return self.timeline(stop, [(new, stop)]), [new]

    def join(self, new: int) -> tuple[Plan, list[int] | None]:
        """Two clips with `new` latents between them: one shot, or two scenes."""
        config = self.config
        first, second = config.between or config.transition
        head = self.given.clip(self.read(first, True, last=True), 0)
        stop = self.given.clip(self.read(second, False), head + new)
        scenes, two = [(0, head), (head + new, stop)], len(config.prompt) == 2
        plan = self.timeline(stop, scenes, joined=bool(config.between), split_gaps=two)
        return plan, None if config.transition and two else [head, head + new]

    def close(self, new: int) -> tuple[Plan, list[int]]:
        """A clip, and the way back to its beginning, of which the last gap sees both ends."""
        block = self.recipe.block
        head = self.given.clip(self.read(self.config.loop, True), 0)
        gap = min(new, (HORIZON - 2 * block) // block * block)
        return anchors.loop(head + new, block, gap), [head]

    def hold(self, seconds: float) -> Plan:
        """Pictures, held within blocks of which the rest is made."""
        block = self.recipe.block
        if self.config.image:
            self.picture(self.config.image, 0)
            length = seconds_to_latents(seconds + (TIME - 1) / FPS, block)  # latent 0 is one frame
            return self.timeline(length, [(0, block)])
        held = [self.picture(path, at) for at, path in read_keyframes(self.config.keyframes)]
        if len(set(held)) < len(held):
            where = f"within the {TIME} frames of one latent"
            raise UserError(f"--keyframes {self.config.keyframes}: two lie {where}; move one")
        scenes = [(b * block, (b + 1) * block) for b in sorted({i // block for i in held})]
        return self.timeline(scenes[-1][1], scenes, split_gaps=False)

    def tell(self, story: Story) -> tuple[Plan, list[str]]:
        """Times are rounded to latents, scenes to whole blocks. A scene follows its prompt; a gap
        follows those on either side of it, or its own, the "bridge"."""
        path, second = self.config.story, FPS / TIME
        scenes, end = [], 0
        for n, scene in enumerate(story.scenes):
            at = round(scene.start * second)
            if at < end:
                before = f"the one before it ends at {end / second:g} s, rounded up to whole blocks"
                raise UserError(f"{path}: scene {n} starts at {scene.start} s but {before}")
            if scene.clip:
                end = self.given.clip(self.read(scene.clip, not at, use=scene.seconds), at)
            else:
                name = f"{path}: the seconds of scene {n},"
                end = at + seconds_to_latents(scene.seconds, self.recipe.block, name)
            scenes.append((at, end))
        plan = self.timeline(max(round(story.seconds * second), end), scenes, order=story.order)
        prompts = [scene.prompt for scene in story.scenes]
        for n, scene in enumerate(story.scenes):
            if scene.bridge:
                gap = range(scenes[n - 1][1] if n else 0, scenes[n][0])
                plan = follow(plan, gap, len(prompts))
                prompts.append(scene.bridge)
        return plan, prompts


def follow(plan: Plan, latents: range, prompt: int) -> Plan:
    """The same plan where the steps of these latents follow another prompt."""
    steps = [replace(s, prompt=prompt) if s.targets[0] in latents else s for s in plan.steps]
    return replace(plan, steps=tuple(steps))
