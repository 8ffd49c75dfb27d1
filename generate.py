"""Your own clips: what comes before, after, between; loops and stories; a video that starts from a picture.

A clip is encoded and its latents are *given* to a plan (`anchors.py`), which makes all others around them: the seam is made
in latent space, no frame is decoded and encoded again. In the result your frames are yours, to the bit (of the clip as it
was resampled to 16 fps and fitted to the model's size; an .mp4 is lossy, so ask for an .mkv to have them on disk).

    --extend-after CLIP     make what comes AFTER the clip: it is the beginning of the video        [clip] > > >
    --extend-before CLIP    make what comes BEFORE the clip: it is the end of the video             < < < [clip]
    both with the same CLIP: it is the middle                                                     < < [clip] > >
    --between A B           A, then what leads from A to B, then B, as one shot                    [A] > < [B]
    --transition A B        the same between two scenes, each with its own prompt
    --loop CLIP             the clip, and the way from its end back to its beginning               [clip] > < (clip)
    --image PICTURE         the video starts with it
    --keyframes 0:x.png,40:y.png   the video has these pictures at these frames
    --story FILE.json       scenes, given or made, anywhere in time; then the gaps between them

Latent 0 is an image latent, all others are video latents, whose meaning hangs on their past (`vae.py`). So a clip at the
beginning is encoded as it is, 1 + 4k frames. A clip that stands elsewhere is encoded from one frame earlier: its first
frame is the past of its first video latent and is not part of the result. A picture elsewhere is encoded as a
standstill, and held within a block that is otherwise made: alone, the student would not know what to do with it.

    python edit.py --extend-before clip.mp4 --prompt "a red disc moves up over a blue wave" --out out/before.mkv
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import anchors
from anchors import HORIZON, Plan
from film import Settings, film, prepare, prompted
from lib.common import UserError, run
from lib.media import load_clip, seam
from sampler import FPS
from vae import VAE

COMMANDS = (
    "extend_after",
    "extend_before",
    "between",
    "transition",
    "loop",
    "image",
    "keyframes",
    "story",
)
TIME = 4  # frames of a latent [Wan]
STILL = 13  # frames of standstill before a picture's video latent means what it says; after 5 its error is a third larger [ours]


@dataclass
class Config(Settings):
    """Make a video around your own clips: use one of the commands, or both --extend flags with the same clip."""

    prompt: tuple[
        str, ...
    ] = ()  # one for all, or one for each part (clips too) in time; in a story the file has them
    extend_after: str = ""  # make what comes AFTER this clip, which is the beginning
    extend_before: str = ""  # make what comes BEFORE this clip, which is the end
    between: tuple[str, ...] = ()  # A B: make what leads from clip A to clip B, one shot
    transition: tuple[
        str, ...
    ] = ()  # A B: make what leads from scene A to scene B, each with its own prompt
    loop: str = ""  # make the way from the end of this clip back to its beginning
    image: str = ""  # start with this picture
    keyframes: str = (
        ""  # frame:picture,... such as 0:x.png,40:y.png; stills, so motion slows at them
    )
    story: str = ""  # a .json: {"scenes": [{"start": 0, "clip": ..}, {"start": 4, "seconds": 2, "prompt": ..}]}
    seconds: float = 3.0  # how much is made, in each place (image: in all)
    use: float = 5.0  # at most so many seconds of each clip: those nearest to what is made
    fit: str = "crop"  # crop or pad clips to the model's size
    exact: bool = (
        True  # show your frames as they are; false: decoded like the rest, for softer seams
    )


@dataclass
class Given:
    """What the user gives: latents -> [1, C, h, w], and the frames [3, H, W] that they stand for."""

    vae: VAE
    device: torch.device
    latents: dict[int, Tensor] = field(default_factory=dict)
    frames: dict[int, Tensor] = field(default_factory=dict)

    def clip(self, video: Tensor, at: int) -> int:
        """Place a clip [1, 3, 1 + 4k, H, W] so that its first latent is latent `at`; the latent after its last one.

        Anywhere but at the beginning its first frame is only the past of its first latent."""
        skip, z = min(at, 1), self.vae.encode(video.to(self.device))
        self.latents |= dict(enumerate(z.unbind(1)[skip:], at))
        first = TIME * (at - 1) + 1 if at else 0
        self.frames |= dict(enumerate(video[0].unbind(1)[skip:], first))
        return at + z.shape[1] - skip

    def picture(self, picture: Tensor, frame: int) -> int:
        """Place a picture [1, 3, 1, H, W]; the latent that holds it, at whose last frame it is shown best."""
        at = math.ceil(frame / TIME)
        still = picture.to(self.device).expand(-1, -1, STILL if at else 1, -1, -1)
        self.latents[at] = self.vae.encode(still)[:, -1]
        self.frames[frame] = picture[0, :, 0]
        return at


def seconds_to_latents(seconds: float, block: int, name: str = "--seconds") -> int:
    """Video latents for so many seconds, rounded up to whole blocks: 1 s -> 16 frames -> 4 latents -> 6 in blocks of 3."""
    if not 0 < seconds < 36000:
        raise UserError(f"{name} {seconds} must be above 0 and below 36000")
    return math.ceil(round(seconds * FPS / TIME / block, 6)) * block


def read(
    config: Config,
    path: str | Path,
    size: tuple[int, int],
    beginning: bool,
    last: bool = False,
    use: float = 0,
) -> Tensor:
    """A clip cut to whole blocks, and one frame more if it is not the beginning: [1, 3, 1 + 4k, H, W]; says what was done.

    last: its last frames, else its first;  use: at most so many seconds, if not those of the config"""
    extra = (
        1 - TIME if beginning else 1
    )  # the image latent is one frame; else one frame is the past
    unit, most = (
        TIME * config.block,
        TIME * seconds_to_latents(use or config.use, config.block, "--use"),
    )
    video, says = load_clip(path, size, FPS, config.fit, most + extra, last, least=unit + extra)
    n = (video.shape[2] - extra) // unit * unit + extra
    print(f"{says}; {n} used: {'the beginning' if beginning else 'one as the past of the others'}")
    return video[:, :, -n:] if last else video[:, :, :n]


def story(config: Config, size: tuple[int, int], mine: Given) -> tuple[Plan, list[str]]:
    """Read --story: {"scenes": [...], "seconds": length, "order": [scene numbers]}; the plan with its prompts.

    A scene has "start" (s), "prompt", and either "clip" (a path seen from the file; "seconds": at most so much of it) or
    "seconds". "bridge": the prompt of the gap before it, if not its own. Times are rounded to latents, scenes to blocks."""
    path = Path(config.story)
    try:
        tale = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a story in JSON and UTF-8 ({error})") from None

    number = (int, float)

    def check(what: object, where: str, kinds: dict[str, type | tuple]) -> None:
        if not isinstance(what, dict):
            raise UserError(f"{path}: {where} is {json.dumps(what)[:60]}, not an object in braces")
        for key, value in what.items():
            if key not in kinds:
                raise UserError(
                    f"{path}: {where} has the unknown key {key!r}; it may have {', '.join(kinds)}"
                )
            if (
                not isinstance(value, kinds[key])
                or isinstance(value, bool)
                or value == ""
                or (kinds[key] == number and not 0 <= value < 36000)
            ):
                raise UserError(
                    f"{path}: {where} has {key} = {json.dumps(value)[:60]}, which is not possible"
                )

    check(tale, "the story", {"scenes": list, "seconds": number, "order": list})
    if not tale.get("scenes"):
        raise UserError(
            f'{path} has no scenes; give at least one, such as {{"start": 0, "seconds": 3, "prompt": ...}}'
        )
    scenes, lines, end, latents_a_second = [], [], 0, FPS / TIME
    for n, scene in enumerate(tale["scenes"]):
        where = f"scene {n}"
        check(
            scene,
            where,
            {"start": number, "seconds": number, "prompt": str, "bridge": str, "clip": str},
        )
        if (
            missing := {"start", "prompt", *(() if "clip" in scene else ("seconds",))}
            - scene.keys()
        ):
            raise UserError(f"{path}: {where} lacks {' and '.join(sorted(missing))}")
        at = round(scene["start"] * latents_a_second)
        if at < end:
            raise UserError(
                f"{path}: {where} starts at {scene['start']} s but the one before it ends at {end / latents_a_second:g} s; "
                "scenes are listed in time and do not overlap (they are rounded up to whole blocks)"
            )
        if at > end:
            lines.append((end, scene.get("bridge", scene["prompt"])))
        lines.append((at, scene["prompt"]))
        if "clip" in scene:
            end = mine.clip(
                read(
                    config, path.parent / scene["clip"], size, not at, use=scene.get("seconds", 0)
                ),
                at,
            )
        else:
            end = at + seconds_to_latents(
                scene["seconds"], config.block, f"{path}: the seconds of {where},"
            )
        scenes.append((at, end))
    length = max(round(tale.get("seconds", 0) * latents_a_second), end)
    order = tale.get("order", [])
    if order and sorted(map(repr, order)) != sorted(map(repr, range(len(scenes)))):
        raise UserError(
            f"{path}: the order {order} must name each scene from 0 to {len(scenes) - 1} once"
        )
    plan = replace(
        anchors.timeline(
            length, scenes, config.block, config.anchors, **_view(config, length), order=order
        ),
        name="story",
    )
    return anchors.switch(plan, [at for at, _ in lines[1:]]), [words for _, words in lines]


def _view(config: Config, length: int) -> dict[str, int | bool | None]:
    """What stays in view: everything within the horizon, else a window and sinks."""
    window = config.window or (2 * config.block if length > HORIZON else None)
    return {
        "window": window,
        "past_sink": config.sink in ("past", "both"),
        "future_sink": config.sink in ("future", "both"),
    }


def asked(config: Config) -> list[str]:
    """The one command that was asked for; with a clip to extend on both sides, the two."""
    commands = [c for c in COMMANDS if getattr(config, c)]
    if len(commands) != 1 and commands != ["extend_after", "extend_before"]:
        raise UserError(
            f"{' and '.join(map(flag, commands)) or 'nothing'} was asked for; use one of {', '.join(map(flag, COMMANDS))}, "
            "or both --extend flags with one clip"
        )
    if len(commands) == 2 and config.extend_before != config.extend_after:
        raise UserError(
            f"--extend-before {config.extend_before} and --extend-after {config.extend_after} are two clips: "
            "name the same one to extend it on both sides, or join two with --between"
        )
    return commands


def flag(name: str) -> str:
    """extend_before -> --extend-before"""
    return "--" + name.replace("_", "-")


def plan_of(config: Config, size: tuple[int, int], mine: Given) -> tuple[Plan, list[str]]:
    """The plan that was asked for, and its prompts; the clips are read, encoded and put into `mine`."""
    commands, block, scenes, parts, joined = asked(config), config.block, [], [], False
    new = seconds_to_latents(config.seconds, block)
    if config.story:
        if config.prompt or config.switch:
            raise UserError(
                f"the prompts of --story {config.story} are in the file; leave out --prompt and --switch"
            )
        return story(config, size, mine)
    if config.keyframes:
        at = [
            mine.picture(load_clip(path, size, FPS, config.fit, 1)[0], frame)
            for frame, path in keys(config.keyframes)
        ]
        if len(set(at)) < len(at):
            raise UserError(
                f"--keyframes {config.keyframes}: two of them lie within the 4 frames of one latent; move one"
            )
        scenes = [(b * block, (b + 1) * block) for b in sorted({i // block for i in at})]
        length = scenes[-1][1]
    elif config.image:
        mine.picture(load_clip(config.image, size, FPS, config.fit, 1)[0], 0)
        scenes, length = (
            [(0, block)],
            seconds_to_latents(config.seconds + 3 / FPS, block),
        )  # latent 0 is one frame, not four
    elif config.between or config.transition:
        pair, joined = config.between or config.transition, bool(config.between)
        if len(pair) != 2:
            raise UserError(f"{flag(commands[0])} takes two clips, got {len(pair)}")
        head = mine.clip(read(config, pair[0], size, True, last=True), 0)
        length = mine.clip(read(config, pair[1], size, False), head + new)
        scenes, parts = [(0, head), (head + new, length)], [head, head + new]
        if config.transition and len(config.prompt) == 2:
            parts = [head]
    elif config.loop:
        head = mine.clip(read(config, config.loop, size, True), 0)
        plan = anchors.loop(head + new, block, min(new, (HORIZON - 2 * block) // block * block))
        return _worded(config, plan, [head])
    elif config.extend_before:
        length = mine.clip(read(config, config.extend_before, size, False), new)
        scenes, parts = [(new, length)], [new]
        if config.extend_after:
            parts, length = [new, length], length + new
    else:
        head = mine.clip(read(config, config.extend_after, size, True, last=True), 0)
        scenes, parts, length = [(0, head)], [head], head + new
    plan = anchors.timeline(
        length, scenes, block, config.anchors, **_view(config, length), joined=joined
    )
    return _worded(config, replace(plan, name=" ".join(map(flag, commands))), parts)


def keys(words: str) -> list[tuple[int, str]]:
    """ "0:x.png,40:y.png" -> [(0, "x.png"), (40, "y.png")]."""
    found = [word.partition(":") for word in words.split(",")]
    if not all(frame.strip().isdigit() and path for frame, _, path in found):
        raise UserError(
            f"--keyframes {words!r} must be frame:picture,frame:picture, such as 0:x.png,40:y.png"
        )
    return [(int(frame), path.strip()) for frame, _, path in found]


def _worded(config: Config, plan: Plan, parts: list[int]) -> tuple[Plan, list[str]]:
    """One prompt for all, one for each part that begins at these latents, or --switch."""
    if not config.switch and len(config.prompt) not in (1, len(parts) + 1):
        raise UserError(
            f"{len(config.prompt)} prompts; give one, or {len(parts) + 1}: one for each part, in time"
            if parts
            else f"{len(config.prompt)} prompts; give one, or say with --switch when the next one takes over"
        )
    plan = anchors.switch(plan, parts) if len(config.prompt) == len(parts) + 1 else plan
    return prompted(plan, config.prompt, config.switch), list(config.prompt)


def seams(mine: Given, frames: int, around: bool) -> list[int]:
    """Frames where what is given meets what was made; with `around`, also where the end meets the beginning (as frame 0)."""
    cuts = [f for f in range(1, frames) if (f in mine.frames) != (f - 1 in mine.frames)]
    return [f for f in cuts if 2 <= f <= frames - 2] + [0] * around


@torch.no_grad()
def main(config: Config) -> None:
    asked(config)
    dit, vae, size = prepare(config)
    mine = Given(vae, dit.patch_embedding.weight.device)
    plan, prompts = plan_of(config, size, mine)
    plan = anchors.with_given(plan, list(mine.latents))
    frames = vae.config.frames(plan.length)
    cuts = seams(mine, frames, bool(config.loop))
    views = {f: [(f + j) % frames for j in range(-2, 2)] for f in cuts}
    seen = film(
        config,
        plan,
        prompts,
        dit,
        vae,
        size,
        mine.latents,
        mine.frames if config.exact else None,
        {i for view in views.values() for i in view},
    )
    for f, view in views.items():
        values = seam(torch.stack([seen[i] for i in view], dim=1)[None], 2)
        print(
            f"seam before frame {f} ({f / FPS:.2f} s): "
            + ", ".join(f"{name} {v.item():.2f}" for name, v in values.items())
        )


if __name__ == "__main__":
    run(main, Config)
