"""The contact sheet: a frame every ten seconds, one row for each memory, sorted by room so that the eye can compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from kvtiers_packforcing.demo.letters import ROOM_COLOURS, clock, enlarged, letters
from kvtiers_packforcing.demo.returns import first_visits, seen_before
from kvtiers_packforcing.tiny_world.vocabulary import FIRST_FRAME, FRAMES_PER_BLOCK, HEIGHT, ROOMS, WIDTH
from kvtiers_packforcing.tiny_world.walks import Walks

EVERY, FROM = 10, 3
"""Seconds between frames, and the second of the first one."""

_SCALE, _EDGE, _BETWEEN, _GAP, _MARGIN = 2, 9, 12, 44, 36
_WIDE, _HIGH = _SCALE * WIDTH, _SCALE * HEIGHT
_LABELS, _TITLE, _HEADS = 500, 84, 184
_INK, _FAINT = "#1a1a1a", "#6b6b6b"


@attrs.frozen(kw_only=True)
class Column:
    """The frame of one second of the walk.

    before: the second in which the same was first seen, if it was. new: whether this is the room's first visit.
    """

    room: str
    second: int
    curtained: bool
    new: bool
    before: int | None

    def says(self) -> str:
        """What stands above it, below its time."""
        if self.curtained:
            return "curtain"
        if self.before is None:
            return "first visit" if self.new else "longer stay"
        return f"{clock(self.second - self.before)} later"


def columns(walks: Walks) -> list[list[Column]]:
    """Those of each room, in the order in which rooms are first shown."""
    seen, first = seen_before(walks), first_visits(walks)
    rooms: dict[str, list[Column]] = {}
    for second in range(min(FROM, walks.blocks - 1), walks.blocks, EVERY):
        room = ROOMS[int(walks.rooms[0, second])]
        curtained = bool(walks.curtains[0, second])
        new = room in first and first[room].start <= second < first[room].end
        column = Column(room=room, second=second, curtained=curtained, new=new, before=seen[second])
        rooms.setdefault(room, []).append(column)
    return list(rooms.values())


def draw_sheet(
    path: Path, videos: Mapping[str, UInt8[Tensor, "frames 3 height width"]], about: Mapping[str, str], walks: Walks
) -> None:
    """Write the sheet as a PNG. about: what stands below each memory's name, in lines."""
    groups = columns(walks)
    lefts = _lefts(groups)
    wide = lefts[-1][-1] + _WIDE + _EDGE + _MARGIN
    tall = _TITLE + _HEADS + len(videos) * (_HIGH + 2 * _EDGE + _BETWEEN) + _MARGIN
    picture = Image.new("RGB", (wide, tall), "white")
    draw = ImageDraw.Draw(picture)
    title = f"A frame every {EVERY} seconds of {walks.blocks}, sorted by room"
    if all(column.before in (None, group[0].second) for group in groups for column in group):
        title += ", all at the same moment of a visit"
    size = next(size for size in range(46, 0, -1) if letters(size, bold=True).getlength(title) < wide - 2 * _MARGIN)
    draw.text((_MARGIN, _TITLE // 2 + 12), title, _INK, letters(size, bold=True), anchor="lm")
    _heads(draw, groups, lefts)
    for row, (name, frames) in enumerate(videos.items()):
        top = _TITLE + _HEADS + row * (_HIGH + 2 * _EDGE + _BETWEEN) + _EDGE
        draw.text((_MARGIN, top - 4), name, _INK, letters(40, bold=True))
        draw.multiline_text((_MARGIN, top + 50), about[name], _FAINT, letters(34), spacing=6)
        for group, of_group in zip(groups, lefts, strict=True):
            for column, left in zip(group, of_group, strict=True):
                box = (left - _EDGE, top - _EDGE, left + _WIDE + _EDGE - 1, top + _HIGH + _EDGE - 1)
                draw.rectangle(box, fill=ROOM_COLOURS[column.room])
                frame = frames[column.second * FRAMES_PER_BLOCK + FRAMES_PER_BLOCK // 2 - FIRST_FRAME]
                picture.paste(enlarged(frame, _SCALE), (left, top))
    picture.save(path, optimize=True)


def _lefts(groups: Sequence[Sequence[Column]]) -> list[list[int]]:
    """Where each frame begins, in pixels from the left."""
    lefts, left = [], _MARGIN + _LABELS
    for group in groups:
        lefts.append([left + nth * (_WIDE + 2 * _EDGE + _BETWEEN) for nth in range(len(group))])
        left = lefts[-1][-1] + _WIDE + 2 * _EDGE + _GAP
    return lefts


def _heads(draw: ImageDraw.ImageDraw, groups: Sequence[Sequence[Column]], lefts: Sequence[Sequence[int]]) -> None:
    """A bar for each room, and above each frame when it is and whether the room returns."""
    for group, of_group in zip(groups, lefts, strict=True):
        colour, top = ROOM_COLOURS[group[0].room], _TITLE + 10
        draw.rectangle((of_group[0] - _EDGE, top, of_group[-1] + _WIDE + _EDGE - 1, top + 55), fill=colour)
        draw.text((of_group[0] + 4, top + 28), group[0].room, "white", letters(42, bold=True), anchor="lm")
        for column, left in zip(group, of_group, strict=True):
            draw.text((left, top + 66), clock(column.second), _INK, letters(40, bold=True))
            draw.text((left, top + 116), column.says(), _FAINT, letters(34))
