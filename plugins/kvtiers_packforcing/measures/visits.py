"""When a walk shows a room, and when it comes back: what every measure needs to know of a video's prompts."""

from collections.abc import Sequence
from itertools import pairwise

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers.errors import KVTiersError
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, HEIGHT, HIDDEN_SECONDS, WIDTH, Walks
from kvtiers_packforcing.tiny_world.rendering import SWEEP_FRAMES

STEP = 4
"""Names are read in every fourth frame, those whose number in the world is a multiple of 4."""


class MeasureError(KVTiersError, ValueError):
    """When a video cannot be measured: its shape is another than its walk's, or a file is absent."""


@attrs.frozen(kw_only=True)
class Visit:
    """An open room in sight, from block `start` up to, not including, `end`.

    hidden: for how many seconds it had been out of sight. earlier, first: its last and its first visit before, as
    indices of the list of visits. All are None when it is seen for the first time.
    """

    room: str
    start: int
    end: int
    hidden: int | None
    earlier: int | None
    first: int | None

    @property
    def blocks(self) -> int:
        """Its length."""
        return self.end - self.start

    @property
    def returns(self) -> bool:
        """Whether it was out of sight for 5 s or longer."""
        return self.hidden is not None and self.hidden >= HIDDEN_SECONDS[0]


def block_count(pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks) -> int:
    """How many blocks these videos have, once it is certain that they can be the walks' own."""
    batch, _, frames, height, width = pixels.shape
    blocks, rest = divmod(frames + FIRST_FRAME, FRAMES_PER_BLOCK)
    if (height, width) != (HEIGHT, WIDTH):
        raise MeasureError(f"frames of the tiny world are {HEIGHT} x {WIDTH} pixels, got {height} x {width}")
    if rest or not blocks:
        raise MeasureError(
            f"a video of n blocks has {FRAMES_PER_BLOCK} n - {FIRST_FRAME} frames, got {frames}; leave out the last "
            f"{rest or frames}"
        )
    if batch != len(walks.rooms) or blocks > walks.blocks:
        raise MeasureError(
            f"got {batch} videos of {blocks} s and {len(walks.rooms)} walks of {walks.blocks} s; give each video its "
            "walk, at least as long as it is"
        )
    return blocks


def cut(walks: Walks, blocks: int) -> Walks:
    """The first `blocks` blocks of walks."""
    return Walks(rooms=walks.rooms[:, :blocks], curtains=walks.curtains[:, :blocks])


def visits_of(walks: Walks, row: int, blocks: int) -> list[Visit]:
    """The visits of a walk's first `blocks` blocks, in order. What stays behind a curtain is in none of them."""
    found: list[Visit] = []
    for segment in cut(walks, blocks).segments(row):
        before = [nth for nth, visit in enumerate(found) if visit.room == segment.room]
        found.append(
            Visit(
                room=segment.room,
                start=segment.start,
                end=segment.end,
                hidden=segment.hidden_before,
                earlier=before[-1] if before else None,
                first=before[0] if before else None,
            )
        )
    return found


def clocks(*visits: Visit, step: int = STEP) -> Int[Tensor, " frames"]:
    """Frames of the room's clock that all of these visits show, none of them while a door or a curtain moves."""
    return torch.arange(SWEEP_FRAMES, FRAMES_PER_BLOCK * min(visit.blocks for visit in visits), step)


def frames_at(visit: Visit, clock: Int[Tensor, " frames"]) -> Int[Tensor, " frames"]:
    """Where in a video's frames a visit shows these moments of the room's clock."""
    return clock + visit.start * FRAMES_PER_BLOCK - FIRST_FRAME


def readings_at(visit: Visit, clock: Int[Tensor, " frames"]) -> Int[Tensor, " frames"]:
    """The same among the frames in which names are read."""
    return (clock + visit.start * FRAMES_PER_BLOCK) // STEP - 1


@attrs.frozen(kw_only=True)
class Shot:
    """Blocks `start` up to `end` in which nothing is entered, opened or drawn except at the beginning."""

    start: int
    end: int
    curtain: bool

    def frames(self) -> range:
        """Its frames in the video, without those in which a door or a curtain moves."""
        swept = SWEEP_FRAMES if self.start else FIRST_FRAME
        return range(self.start * FRAMES_PER_BLOCK + swept - FIRST_FRAME, self.end * FRAMES_PER_BLOCK - FIRST_FRAME)


def shots_of(walks: Walks, row: int, blocks: int) -> Sequence[Shot]:
    """The shots of a walk's first `blocks` blocks, in order."""
    moves = (walks.entered() | walks.opened() | walks.drawn())[row, :blocks]
    starts = [0, *moves.nonzero().flatten().tolist(), blocks]
    return [Shot(start=a, end=b, curtain=bool(walks.curtains[row, a])) for a, b in pairwise(starts)]
