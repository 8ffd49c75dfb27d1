"""What users write by hand: a story file (JSON) and a list of keyframes. Read and checked here.

{"seconds": 14, "order": [1, 0],
 "scenes": [{"start": 2, "clip": "a.mp4", "seconds": 1.5, "prompt": "a red disc moves up ..."},
            {"start": 5.5, "seconds": 3, "prompt": "a cyan ring ...", "bridge": "both ..."}]}
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from lib.common import UserError

LONGEST = 36000  # seconds


@dataclass(frozen=True)
class Scene:
    """Times in seconds. A scene is a clip of the user's, or so many seconds to be made."""

    start: float
    prompt: str
    seconds: float = 0.0  # of a clip: at most so much of it, 0: what --use says
    clip: str = ""
    bridge: str = ""  # what to show in the gap before it; "": the prompts on either side


@dataclass(frozen=True)
class Story:
    """Scenes in time, and which is made first."""

    scenes: list
    seconds: float = 0.0  # length of the video, 0: up to the end of the last scene
    order: list = field(default_factory=list)  # which scene is made first, second ...; []: in time


def read_story(file: str | Path) -> Story:
    """Read and check a story; the paths of its clips are seen from its folder. raises: UserError"""
    path = Path(file).expanduser()
    try:
        tale = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a story in JSON and UTF-8 ({error})") from None
    _check(path, tale, "the story", Story)
    if not tale.get("scenes"):
        example = '{"start": 0, "seconds": 3, "prompt": ...}'
        raise UserError(f"{path} has no scenes; give at least one, such as {example}")
    scenes = []
    for n, scene in enumerate(tale["scenes"]):
        _check(path, scene, f"scene {n}", Scene)
        needed = ("start", "prompt") if "clip" in scene else ("start", "seconds", "prompt")
        missing = [name for name in needed if name not in scene]
        if missing:
            raise UserError(f"{path}: scene {n} lacks {' and '.join(missing)}")
        if "clip" in scene:
            scene = scene | {"clip": str(path.parent / Path(scene["clip"]).expanduser())}
        scenes.append(Scene(**scene))
    story = Story(**tale | {"scenes": scenes})
    order = story.order
    if order and sorted(map(repr, order)) != sorted(map(repr, range(len(scenes)))):
        each = f"each scene from 0 to {len(scenes) - 1} once"
        raise UserError(f"{path}: the order {order} must name {each}")
    end = scenes[-1].start + scenes[-1].seconds
    if 0 < story.seconds < end:
        raise UserError(f"{path}: seconds = {story.seconds}, but the last scene needs {end}")
    return story


def _check(path: Path, value: object, where: str, cls: type) -> None:
    """Whether a JSON value is an object with the fields of a dataclass, and none empty."""
    fields = cls.__annotations__
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where} is {json.dumps(value)[:60]}, not an object in braces")
    for key, entry in value.items():
        if key not in fields:
            known = ", ".join(fields)
            raise UserError(f"{path}: {where} has the unknown key {key!r}; it may have {known}")
        if fields[key] is float:
            is_possible = type(entry) in (int, float) and 0 <= entry < LONGEST
        else:
            is_possible = isinstance(entry, fields[key]) and (fields[key] is list or entry.strip())
        if not is_possible:
            shown = json.dumps(entry)[:60]
            raise UserError(f"{path}: {where} has {key} = {shown}, which is not possible")


def read_keyframes(words: str) -> list[tuple[int, str]]:
    """ "0:x.png,40:y.png" -> [(0, "x.png"), (40, "y.png")]; a picture's name may have commas."""
    parts = re.split(r",\s*(?=\d+\s*:)", words)
    found = [re.fullmatch(r"\s*(\d{1,6})\s*:\s*(.+?)\s*", part) for part in parts]
    if not all(found):
        example = "frame:picture,frame:picture, such as 0:x.png,40:y.png, below frame 1000000"
        raise UserError(f"--keyframes {words!r} must be {example}")
    return [(int(match[1]), match[2]) for match in found]
