"""Houses: rooms with a ground each, and two things in every room, all of it drawn at random from a seed.

What a room holds does not depend on its name, so a prompt that names the room says nothing of what is in it.
"""

import math
import random
from collections.abc import Iterable, Mapping

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers_packforcing.tiny_world.vocabulary import (
    COLOURS,
    FORMS,
    HEIGHT,
    PATTERNS,
    ROOMS,
    TEXTURES,
    THINGS_PER_ROOM,
    WIDTH,
)

CURTAIN_GAP = 16
"""Pixels at the left that a drawn curtain leaves free."""

_MARGIN = 2.0
_PERIODS = (96, 128, 160)


@attrs.frozen(eq=False, kw_only=True)
class Houses:
    """Everything that identity is made of, for a batch of houses.

    Every house has six rooms, of which a walk visits some. Lengths are pixels, angles radians. A thing moves on an
    ellipse around its home: at frame f of the room's clock it is at `home + reach * (cos, sin)` of the angle
    `phase + 2 pi f / turn_frames`.
    """

    ground_colours: Int[Tensor, "batch rooms 2"]
    pattern: Int[Tensor, "batch rooms"]
    angle: Float[Tensor, "batch rooms"]
    period: Float[Tensor, "batch rooms"]
    offset: Float[Tensor, "batch rooms 2"]
    colour: Int[Tensor, "batch rooms things"]
    form: Int[Tensor, "batch rooms things"]
    texture: Int[Tensor, "batch rooms things"]
    tilt: Float[Tensor, "batch rooms things"]
    radius: Float[Tensor, "batch rooms things"]
    home: Float[Tensor, "batch rooms things 2"]
    reach: Float[Tensor, "batch rooms things 2"]
    phase: Float[Tensor, "batch rooms things"]
    turn_frames: Float[Tensor, "batch rooms things"]

    @classmethod
    def of_seeds(cls, seeds: Iterable[int | str]) -> "Houses":
        """The houses of these seeds. A house depends on its own seed only."""
        drawn = [_house(random.Random(f"house {seed}")) for seed in seeds]
        kinds = {field.name: torch.float64 if field.name in _LENGTHS else torch.int64 for field in attrs.fields(cls)}
        return cls(**{name: torch.tensor([house[name] for house in drawn], dtype=kinds[name]) for name in kinds})

    def __len__(self) -> int:
        return len(self.pattern)

    def positions(
        self, rows: Int[Tensor, " frames"], rooms: Int[Tensor, " frames"], clock: Int[Tensor, " frames"]
    ) -> Float[Tensor, "frames things 2"]:
        """Centres (x, y) of the things of `rooms` in houses `rows`, `clock` frames after the room was revealed."""
        angle = self.phase[rows, rooms] + 2 * math.pi * clock[:, None] / self.turn_frames[rows, rooms]
        return self.home[rows, rooms] + self.reach[rows, rooms] * torch.stack((angle.cos(), angle.sin()), -1)


_LENGTHS = {"angle", "period", "offset", "tilt", "radius", "home", "reach", "phase", "turn_frames"}


def _house(draw: random.Random) -> Mapping[str, list[object]]:
    """One house, as lists over rooms. Only `random()` is used: Python promises that its stream never changes."""
    rooms = [_room(draw) for _ in ROOMS]
    return {name: [room[name] for room in rooms] for name in rooms[0]}


def _room(draw: random.Random) -> Mapping[str, object]:
    colours = _distinct(draw, len(COLOURS), 2 + THINGS_PER_ROOM)
    things = [_thing(draw, colour, nth) for nth, colour in enumerate(colours[2:])]
    ground = {
        "ground_colours": colours[:2],
        "pattern": _choice(draw, len(PATTERNS)),
        "angle": math.pi * draw.random(),
        "period": 22 + 12 * draw.random(),
        "offset": [2 * math.pi * draw.random() for _ in range(2)],
    }
    return ground | {name: [thing[name] for thing in things] for name in things[0]}


def _thing(draw: random.Random, colour: int, nth: int) -> Mapping[str, object]:
    """A thing that stays whole in its part of the room: the first left of the second, none where the gap is."""
    radius, reach = 10 + 2 * draw.random(), [3 + 4 * draw.random(), 2 + 4 * draw.random()]
    share = (WIDTH - CURTAIN_GAP) / THINGS_PER_ROOM
    left, right = CURTAIN_GAP + nth * share, CURTAIN_GAP + (nth + 1) * share
    x_rim, y_rim = radius + reach[0] + _MARGIN, radius + reach[1] + _MARGIN
    home = [_between(draw, left + x_rim, right - x_rim), _between(draw, y_rim, HEIGHT - y_rim)]
    backwards = -1 if draw.random() < 0.5 else 1
    return {
        "colour": colour,
        "form": _choice(draw, len(FORMS)),
        "texture": _choice(draw, len(TEXTURES)),
        "tilt": math.pi * draw.random(),
        "radius": radius,
        "home": home,
        "reach": reach,
        "phase": 2 * math.pi * draw.random(),
        "turn_frames": backwards * _PERIODS[_choice(draw, len(_PERIODS))],
    }


def _choice(draw: random.Random, count: int) -> int:
    return int(draw.random() * count)


def _between(draw: random.Random, low: float, high: float) -> float:
    return low + (high - low) * draw.random()


def _distinct(draw: random.Random, count: int, wanted: int) -> list[int]:
    """`wanted` different numbers below `count`."""
    left = list(range(count))
    return [left.pop(_choice(draw, len(left))) for _ in range(wanted)]
