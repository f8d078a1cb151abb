"""Which blocks exist, which tier each is in, and what the next commit moves. A pure value; no tensors."""

from bisect import bisect_right

import attrs
from attrs import validators as v

from kvtiers.blocks import Extent, Tier
from kvtiers.state import NUMBER, State

_COUNT = [v.instance_of(int), v.ge(0)]


@attrs.frozen(slots=False, kw_only=True)
class Timeline(State):
    """Blocks of `block_size` steps on an absolute grid that starts where the sink ends, so all are of one size.

    A block is `sink` if it lies before `sink` steps, `mid` once its end is at least `recent` steps in the past, and
    `recent` until then; an unfinished block is recent. For video the grid is given: `cuts` are the ends of the
    committed blocks, in order, and `sink` is the end of the last block that is an anchor.

    origin: the step from which blocks are still to leave recent, and at which the grid of text begins. None: where the
    sink ends. When `compact` makes a block leave early, the origin moves to the end of that block.
    """

    sink: int = attrs.field(validator=_COUNT, metadata=NUMBER)
    recent: int | None = attrs.field(validator=v.optional(_COUNT))
    """None: nothing ever leaves recent."""
    block_size: int = attrs.field(validator=[v.instance_of(int), v.ge(1)])
    cuts: tuple[int, ...] | None = attrs.field(default=None, metadata=NUMBER)
    origin: int | None = attrs.field(default=None, metadata=NUMBER)

    @property
    def start(self) -> int:
        """The first step that was not made to leave recent."""
        return self.sink if self.origin is None else self.origin

    def cropped(self, steps: int) -> "Timeline":
        """Of the first `steps` steps alone."""
        origin = None if self.origin is None else min(self.origin, steps)
        if self.cuts is None:
            return attrs.evolve(self, origin=None if steps <= self.sink else origin)
        cuts = self.cuts[: bisect_right(self.cuts, steps)]
        return attrs.evolve(self, origin=origin, cuts=cuts, sink=min(self.sink, steps))

    def recent_start_at(self, steps: int) -> int:
        """The first step of the recent tier when `steps` steps are history (at least the end of the sink)."""
        first = min(self.start, steps)
        if self.recent is None or steps < self.start:
            return first
        if self.cuts is not None:
            past = bisect_right(self.cuts, steps - self.recent)
            return max(first, self.cuts[past - 1]) if past else first
        return self.start + max(0, steps - self.recent - self.start) // self.block_size * self.block_size

    def tier(self, step: int, steps: int) -> Tier:
        """The tier of one step when `steps` steps are history; later steps are current."""
        if step >= steps:
            return "current"
        if step < self.sink:
            return "sink"
        return "mid" if step < self.recent_start_at(steps) else "recent"

    def layout(self, steps: int) -> list[tuple[Extent, Tier]]:
        """Every block of the first `steps` steps with its tier, in order; they tile 0..steps."""
        sink, start = min(self.sink, steps), min(self.start, steps)
        anchors = [Extent(0, sink)] if sink and self.cuts is None else self.blocks(0, sink)
        found = [*anchors, *self.blocks(sink, start), *self.blocks(start, steps)]
        return [(block, self.tier(block.start, steps)) for block in found]

    def blocks(self, start: int, stop: int) -> list[Extent]:
        """The blocks from `start` to `stop`; only the last may be cut short (text)."""
        if self.cuts is not None:
            ends = list(self.cuts[bisect_right(self.cuts, start) : bisect_right(self.cuts, stop)])
        else:
            ends = [*range(start + self.block_size, stop, self.block_size), *([stop] if stop > start else [])]
        return [Extent(a, b) for a, b in zip([start, *ends[:-1]], ends, strict=True)] if ends else []
