"""Jumps at block borders, and flicker: is the picture steady while nothing happens but motion?"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.visits import block_count, shots_of
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, Walks

QUIET = 0.7
"""The share of pixels that flicker is told from: the two things of a room never pass over more than the rest."""

_STILL = 0.2 / 255
"""Added to both differences, of 0 to 1: two still frames differ by as much as their neighbours."""


def jumps(pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks) -> Mapping[str, Figure]:
    """Whether it can be seen where one block ends and the next begins.

    `border_jump`: the mean absolute difference between the last frame of a block and the first one of the next, over
    that between neighbours inside of these two blocks; of the borders at which neither door nor curtain begins to move
    (and without the frames in which they move). 1 is best, and is that of truth; the codec
    has more, and what is below 1 is no merit but changes that come at other times.
    """
    blocks, ratios, counts = block_count(pixels, walks), [], []
    for row, video in enumerate(pixels):
        change = _changes(video)
        at, inside = [], []
        for shot in shots_of(walks, row, blocks):
            steps = torch.tensor(list(shot.frames())[:-1])
            for block in range(shot.start + 1, shot.end):
                border = block * FRAMES_PER_BLOCK - FIRST_FRAME - 1
                near = steps[((steps - border).abs() < FRAMES_PER_BLOCK) & (steps != border)]
                at.append(change[border])
                inside.append(change[near].mean())
        counts.append(float(len(at)))
        ratios.append((torch.stack(at).mean() + _STILL) / (torch.stack(inside).mean() + _STILL) if at else torch.nan)
    return {"border_jump": Figure(values=torch.tensor([float(r) for r in ratios]), weights=torch.tensor(counts))}


def flicker(pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks) -> Mapping[str, Figure]:
    """How much changes from frame to frame where nothing moves.

    `flicker`: the mean absolute difference of neighbouring frames, in levels of 0 to 255, of the 70% of pixels that
    change least over a shot (which are ground or curtain), while neither door nor curtain moves; the mean of all such
    frames. Lower is better, truth 0.
    """
    blocks, values, counts = block_count(pixels, walks), [], []
    for row, video in enumerate(pixels):
        total, frames = 0.0, 0
        for shot in shots_of(walks, row, blocks):
            shown = (video[:, shot.frames().start : shot.frames().stop].clamp(-1, 1) + 1) * 127.5
            change = shown.diff(dim=1).abs().mean((0, 1)).flatten()
            quiet = change.sort().values[: int(QUIET * len(change))]
            total, frames = total + float(quiet.mean()) * (shown.shape[1] - 1), frames + shown.shape[1] - 1
        values.append(total / frames)
        counts.append(float(frames))
    return {"flicker": Figure(values=torch.tensor(values), weights=torch.tensor(counts))}


def _changes(video: Float[Tensor, "3 frames height width"]) -> Float[Tensor, " steps"]:
    """The mean absolute difference of each frame and the next one, of 0 to 1."""
    shown = (video.clamp(-1, 1) + 1) / 2
    return torch.stack(
        [(b - a).abs().mean() for a, b in zip(shown[:, :-1].unbind(1), shown[:, 1:].unbind(1), strict=True)]
    )
