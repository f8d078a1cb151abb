"""The frames of the side-by-side video: what each memory makes now, above what it made when the room was first seen."""

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from kvtiers_packforcing.demo.letters import ROOM_COLOURS, clock, enlarged, letters
from kvtiers_packforcing.demo.returns import first_visits, seen_before
from kvtiers_packforcing.tiny_world.prompts import prompts_of
from kvtiers_packforcing.tiny_world.vocabulary import FIRST_FRAME, FRAMES_PER_BLOCK, HEIGHT, ROOMS, WIDTH
from kvtiers_packforcing.tiny_world.walks import Walks

_SCALE, _GAP, _EDGE = 3, 16, 4
_WIDE, _HIGH = _SCALE * WIDTH, _SCALE * HEIGHT
_NAME_TOP = 60
_NOW_TOP = _NAME_TOP + 32
_CAPTION_TOP = _NOW_TOP + _HIGH + 14
_BEFORE_TOP = _CAPTION_TOP + 28
_STRIP_TOP = _BEFORE_TOP + _HIGH + 24
_STRIP_HIGH = 24
_TALL = _STRIP_TOP + _STRIP_HIGH + 16
_PAPER, _INK, _FAINT, _EMPTY = "#14161a", "#f2f2f2", "#9aa0a6", "#22252b"


@attrs.frozen(eq=False, kw_only=True)
class Film:
    """Draws blocks of frames. names: of the memories, from left to right."""

    names: Sequence[str]
    walks: Walks
    prompts: list[str] = attrs.field(init=False)
    seen: list[int | None] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompts_of(self.walks))
        object.__setattr__(self, "seen", seen_before(self.walks))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return len(self.names) * (_WIDE + _GAP) + _GAP, _TALL

    def block(
        self, number: int, frames: Sequence[UInt8[Tensor, "frames 3 height width"]]
    ) -> UInt8[Tensor, "block_frames 3 picture_height picture_width"]:
        """The frames of block `number`. frames: for each memory, those of the video up to and with that block."""
        still = self._still(number)
        first = max(number * FRAMES_PER_BLOCK, FIRST_FRAME)
        before = self.seen[number]
        pictures = []
        for frame in range(first, (number + 1) * FRAMES_PER_BLOCK):
            picture = still.copy()
            for nth, made in enumerate(frames):
                picture.paste(enlarged(made[frame - FIRST_FRAME], _SCALE), (self._left(nth), _NOW_TOP))
                if before is not None:
                    at = max((before - number) * FRAMES_PER_BLOCK + frame - FIRST_FRAME, 0)
                    picture.paste(enlarged(made[at], _SCALE), (self._left(nth), _BEFORE_TOP))
            self._playhead(picture, frame / FRAMES_PER_BLOCK)
            pictures.append(torch.from_numpy(np.array(picture)))
        return torch.stack(pictures).permute(0, 3, 1, 2)

    def _left(self, nth: int) -> int:
        return _GAP + nth * (_WIDE + _GAP)

    def _still(self, number: int) -> Image.Image:
        """What does not move during a block."""
        picture = Image.new("RGB", self.size, _PAPER)
        draw = ImageDraw.Draw(picture)
        room = ROOMS[int(self.walks.rooms[0, number])]
        before, colour = self.seen[number], ROOM_COLOURS[room]
        draw.rectangle((_GAP, 18, _GAP + 23, 41), fill=colour)
        draw.text((_GAP + 36, 30), self.prompts[number], _INK, letters(24, bold=True), anchor="lm")
        time = f"{clock(number)} / {clock(self.walks.blocks)}"
        draw.text((self.size[0] - _GAP, 30), time, _INK, letters(24), anchor="rm")
        if before is None:
            caption = "curtain" if bool(self.walks.curtains[0, number]) else "not seen before"
        else:
            caption = f"the {room} as it was first seen, {clock(number - before)} ago"
        for nth, name in enumerate(self.names):
            left = self._left(nth)
            draw.text((left, _NAME_TOP + 14), name, _INK, letters(20, bold=True), anchor="lm")
            self._frame(draw, left, _NOW_TOP, colour)
            draw.text((left, _CAPTION_TOP + 12), caption, _FAINT, letters(17), anchor="lm")
            if before is None:
                draw.rectangle((left, _BEFORE_TOP, left + _WIDE - 1, _BEFORE_TOP + _HIGH - 1), fill=_EMPTY)
            else:
                self._frame(draw, left, _BEFORE_TOP, colour)
        self._strip(draw)
        return picture

    def _frame(self, draw: ImageDraw.ImageDraw, left: int, top: int, colour: str) -> None:
        box = (left - _EDGE, top - _EDGE, left + _WIDE + _EDGE - 1, top + _HIGH + _EDGE - 1)
        draw.rectangle(box, fill=colour)

    def _strip(self, draw: ImageDraw.ImageDraw) -> None:
        """The whole walk: a colour for each room, high where it is in sight, and its name where it is first seen."""
        rooms, curtains = self.walks.rooms[0].tolist(), self.walks.curtains[0].tolist()
        for number, (room, curtained) in enumerate(zip(rooms, curtains, strict=True)):
            left, right = self._along(number), self._along(number + 1) - 1
            top = _STRIP_TOP + (_STRIP_HIGH * 3 // 4 if curtained else 0)
            draw.rectangle((left, top, max(left, right), _STRIP_TOP + _STRIP_HIGH), fill=ROOM_COLOURS[ROOMS[room]])
        for room, visit in first_visits(self.walks).items():
            left, right = self._along(visit.start), self._along(visit.end)
            if letters(11).getlength(room) < right - left:
                at = ((left + right) // 2, _STRIP_TOP + _STRIP_HIGH // 2)
                draw.text(at, room, _PAPER, letters(11), anchor="mm")

    def _playhead(self, picture: Image.Image, second: float) -> None:
        at = self._along(second)
        ImageDraw.Draw(picture).rectangle((at - 1, _STRIP_TOP - 6, at + 1, _STRIP_TOP + _STRIP_HIGH + 6), fill=_INK)

    def _along(self, second: float | int) -> int:
        return _GAP + round((self.size[0] - 2 * _GAP) * second / self.walks.blocks)
