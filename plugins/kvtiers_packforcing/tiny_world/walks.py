"""Walks through a house: which room each second shows, and whether its curtain is drawn.

A walk is made so that memory has a job. A room that was left comes back after 5 to 60 seconds, and so does what is
behind a curtain.
"""

import math
import random
from collections.abc import Iterable, Sequence

import attrs
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvtiers.errors import KVTiersError, suggest
from kvtiers_packforcing.tiny_world.vocabulary import FRAMES_PER_BLOCK, ROOMS

HIDDEN_SECONDS = (5, 60)
"""The shortest and the longest time for which a room, or what is behind a curtain, is out of sight."""

_STAY = (3, 8)
_BESIDE_CURTAIN = (2, 4)
_CURTAIN_SHARE = 0.25
_FEWEST_ROOMS = 3


class WalkError(KVTiersError, ValueError):
    """When a walk is asked for that cannot be written or made."""


@attrs.frozen(kw_only=True)
class Segment:
    """A room in sight, from block `start` up to, not including, block `end` (a block is a second).

    hidden_before: for how many blocks the room had been out of sight; None if it is seen for the first time.
    """

    room: str
    start: int
    end: int
    hidden_before: int | None


@attrs.frozen(eq=False, kw_only=True)
class Walks:
    """One walk for each house of a batch: each block's room (an index of `ROOMS`), and whether it is curtained."""

    rooms: Int[Tensor, "batch blocks"]
    curtains: Bool[Tensor, "batch blocks"]

    @classmethod
    def of_seeds(cls, seeds: Iterable[int | str], blocks: int) -> "Walks":
        """Random walks. A longer walk of the same seed begins like a shorter one."""
        if blocks < 1:
            raise WalkError(f"a walk has at least 1 block, got {blocks}")
        drawn = [_walk(random.Random(f"walk {seed}"), blocks) for seed in seeds]
        return cls(
            rooms=torch.tensor([[room for room, _ in walk] for walk in drawn]),
            curtains=torch.tensor([[curtain for _, curtain in walk] for walk in drawn]),
        )

    @classmethod
    def written(cls, *visits: tuple[str, int] | tuple[str, int, str]) -> "Walks":
        """One walk, as written: `("hall", 4), ("attic", 5), ("hall", 3, "closed")`, times in seconds."""
        rooms, curtains = [], []
        for room, seconds, *rest in visits:
            if room not in ROOMS:
                raise WalkError(f"no room {room!r}; the rooms are {', '.join(ROOMS)}.{suggest(room, ROOMS)}")
            if rest not in ([], ["open"], ["closed"]) or seconds < 1:
                raise WalkError(
                    f"a visit is (room, seconds of at least 1, 'open' or 'closed'), got {(room, seconds, *rest)}"
                )
            rooms += [ROOMS.index(room)] * seconds
            curtains += [rest == ["closed"]] * seconds
        return cls(rooms=torch.tensor([rooms]), curtains=torch.tensor([curtains]))

    @property
    def blocks(self) -> int:
        """The length, in blocks (seconds)."""
        return self.rooms.shape[1]

    def entered(self) -> Bool[Tensor, "batch blocks"]:
        """Whether a block begins with a door: its room is another than the block's before."""
        return _changed(self.rooms)

    def opened(self) -> Bool[Tensor, "batch blocks"]:
        """Whether a block begins with a curtain that opens."""
        return _changed(self.curtains) & ~self.curtains & ~self.entered()

    def drawn(self) -> Bool[Tensor, "batch blocks"]:
        """Whether a block begins with a curtain that is drawn."""
        return _changed(self.curtains) & self.curtains & ~self.entered()

    def revealed(self) -> Int[Tensor, "batch blocks"]:
        """The block at which what a block shows was last revealed: entered, or its curtain opened.

        A room's clock starts there, so its things are on the same places each time the room is seen again.
        """
        blocks = torch.arange(self.blocks).expand_as(self.rooms)
        return blocks.where(self.entered() | self.opened(), torch.zeros_like(blocks)).cummax(1).values

    def segments(self, row: int = 0) -> list[Segment]:
        """When each room is in sight, in order."""
        rooms, curtains = self.rooms[row].tolist(), self.curtains[row].tolist()
        found: list[Segment] = []
        last_seen: dict[int, int] = {}
        start = 0
        for block in range(1, self.blocks + 1):
            if block < self.blocks and (rooms[block], curtains[block]) == (rooms[start], curtains[start]):
                continue
            if not curtains[start]:
                room = rooms[start]
                hidden = start - last_seen[room] if room in last_seen else None
                found.append(Segment(room=ROOMS[room], start=start, end=block, hidden_before=hidden))
                last_seen[room] = block
            start = block
        return found

    def block_of(self, frames: Int[Tensor, "batch frames"]) -> Int[Tensor, "batch frames"]:
        """The block of each frame. Frames outside of the walk are an error."""
        found = frames.div(FRAMES_PER_BLOCK, rounding_mode="floor")
        if frames.numel() and not 0 <= int(found.min()) <= int(found.max()) < self.blocks:
            raise WalkError(
                f"the walk has frames 0 to {self.blocks * FRAMES_PER_BLOCK - 1}, asked for {int(frames.min())} to "
                f"{int(frames.max())}; make a longer walk"
            )
        return found

    def row(self, row: int) -> "Walks":
        """One walk of the batch, as a batch of one."""
        return Walks(rooms=self.rooms[row : row + 1], curtains=self.curtains[row : row + 1])


def _changed(values: Tensor) -> Tensor:
    first = torch.zeros_like(values[:, :1], dtype=torch.bool)
    return torch.cat((first, values[:, 1:] != values[:, :-1]), 1)


def _walk(draw: random.Random, blocks: int) -> list[tuple[int, bool]]:
    """Visit after visit, until there are enough blocks. No choice looks at `blocks`."""
    count = _FEWEST_ROOMS + int(draw.random() * (len(ROOMS) - _FEWEST_ROOMS + 1))
    left = list(range(len(ROOMS)))
    house = [left.pop(int(draw.random() * len(left))) for _ in range(count)]
    seen: list[tuple[int, bool]] = []
    left_at: dict[int, int] = {}
    room = house[0]
    while len(seen) < blocks:
        absent = sorted((len(seen) - at for other, at in left_at.items() if other != room), reverse=True)
        seen += [(room, curtain) for curtain in _visit(draw, _patience(absent))]
        left_at[room] = len(seen)
        room = _next(draw, house, room, {other: len(seen) - at for other, at in left_at.items()})
    return seen[:blocks]


def _patience(absent: Sequence[int]) -> int:
    """The longest stay after which every room that was left can be entered again in time, the longest absent first."""
    return min((HIDDEN_SECONDS[1] - gone - nth * _STAY[0] for nth, gone in enumerate(absent)), default=10**6)


def _visit(draw: random.Random, most: int) -> list[bool]:
    """Whether the curtain is drawn in each second of a visit, of at most `most` seconds."""
    shortest, longest = HIDDEN_SECONDS[0], min(HIDDEN_SECONDS[1], most - 2 * _BESIDE_CURTAIN[1])
    curtained, length = draw.random() < _CURTAIN_SHARE, draw.random()
    before, after = (_BESIDE_CURTAIN[0] + int(draw.random() * 3) for _ in range(2))
    if curtained and longest >= shortest:
        hidden = int(shortest * math.exp(length * math.log((longest + 1) / shortest)))  # short ones are more frequent
        return [False] * before + [True] * min(hidden, longest) + [False] * after
    return [False] * min(_STAY[0] + int(length * (_STAY[1] - _STAY[0] + 1)), most)


def _next(draw: random.Random, house: Sequence[int], room: int, absent: dict[int, int]) -> int:
    """A room that is new, or was away for long enough, such that no other one is then away for too long."""
    others = [other for other in house if other != room]
    ready = [other for other in others if absent.get(other, HIDDEN_SECONDS[0]) >= HIDDEN_SECONDS[0]]
    fine = []
    for other in ready:
        rest = sorted((gone for left, gone in absent.items() if left not in (other, room)), reverse=True)
        if _patience([*rest, 0]) >= _STAY[0]:
            fine.append(other)
    choices = fine or [max(others, key=lambda other: absent.get(other, 0))]
    return choices[int(draw.random() * len(choices))]
