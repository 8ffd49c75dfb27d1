"""Videos on disk, as scripts take them: measured one by one."""

import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lib.common import UserError
from lib.media import read_frames, videos_in
from lib.statistics import Stat, over_files


def rows_of_videos(
    path: Path, block: int, measure: Callable[[Tensor, int, int], dict[str, Stat]]
) -> dict[str, dict[str, Stat]]:
    """A row for a video, or for each in a folder and one for all; those that stand still have none.

    block: latents; a video is measured as far as it is whole blocks
    measure: (video [1, 3, F, H, W], latents of it, block) -> a row with FR inter and FR intra
    raises: UserError for a video that is too short, or if none moves"""
    rows = {}
    for file in videos_in(path) if path.is_dir() else [path]:
        video = read_frames(file)
        there, least = video.shape[2], 4 * math.ceil(3 / block) * block - 3
        if there < least:
            raise UserError(f"{file} has {there} frames; blocks of {block} latents need {least}")
        latents = (there + 3) // 4 // block * block
        used = 4 * latents - 3
        print(f"{file.name}: the first {used} of {there} frames, {latents} latents by {block}")
        row = measure(video, latents, block)
        if row["FR inter"].clips or row["FR intra"].clips:
            rows[file.name] = row
        else:
            print(f"{file.name} is left out: it does not move, so it has no flickering ratio")
    if not rows:
        raise UserError(f"{path} does not move, so it has no flickering ratio")
    if path.is_dir():
        rows[f"all {len(rows)}"] = over_files(list(rows.values()))
    return rows
