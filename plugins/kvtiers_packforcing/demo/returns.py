"""What came back: where a walk shows again what it showed before, and how alike the two are in a video."""

import attrs
from jaxtyping import UInt8
from torch import Tensor

from kvtiers_packforcing.measures.pictures import capped_psnr
from kvtiers_packforcing.tiny_world.rendering import SWEEP_FRAMES
from kvtiers_packforcing.tiny_world.vocabulary import FIRST_FRAME, FRAMES_PER_BLOCK
from kvtiers_packforcing.tiny_world.walks import Segment, Walks


@attrs.frozen(kw_only=True)
class Return:
    """A room that is seen again from second `start` on. psnr: of its frames beside those of its first visit, in dB."""

    room: str
    start: int
    psnr: float


def first_visits(walks: Walks) -> dict[str, Segment]:
    """When each room of a walk is in sight for the first time."""
    found: dict[str, Segment] = {}
    for segment in walks.segments():
        found.setdefault(segment.room, segment)
    return found


def seen_before(walks: Walks) -> list[int | None]:
    """For every block the one of the room's first visit that shows the same: as long after the room was revealed.

    None in a first visit, behind a curtain, and where the first visit was shorter.
    """
    found: list[int | None] = [None] * walks.blocks
    first = first_visits(walks)
    for segment in walks.segments():
        known = first[segment.room]
        if segment != known:
            for clock in range(min(segment.end - segment.start, known.end - known.start)):
                found[segment.start + clock] = known.start + clock
    return found


def returns_of(frames: UInt8[Tensor, "frames 3 height width"], walks: Walks) -> list[Return]:
    """How alike each return and the first visit are. frames: those of a whole video, of 16 x blocks - 3 frames."""
    first = first_visits(walks)
    return [
        Return(room=segment.room, start=segment.start, psnr=_psnr(frames, first[segment.room], segment))
        for segment in walks.segments()
        if segment != first[segment.room]
    ]


def of_strangers(frames: UInt8[Tensor, "frames 3 height width"], walks: Walks) -> float | None:
    """How alike first visits of different rooms are, in dB: what a return is if nothing was kept. None for one room."""
    first = list(first_visits(walks).values())
    alike = [_psnr(frames, one, other) for nth, one in enumerate(first) for other in first[:nth]]
    return sum(alike) / len(alike) if alike else None


def _psnr(frames: Tensor, one: Segment, other: Segment) -> float:
    """Of two visits, as long as both last, without the half second in which doors and curtains move."""
    length = FRAMES_PER_BLOCK * min(one.end - one.start, other.end - other.start) - SWEEP_FRAMES
    starts = (FRAMES_PER_BLOCK * visit.start + SWEEP_FRAMES - FIRST_FRAME for visit in (one, other))
    first, second = (frames[start : start + length].transpose(0, 1).float() for start in starts)
    return capped_psnr(first / 127.5 - 1, second / 127.5 - 1)
