"""Which blocks exist and which tier each is in: a pure function of the settings and the steps seen. No tensors."""

from bisect import bisect_right
from collections.abc import Sequence

import attrs
from attrs import validators as v

from kvtiers.blocks import Extent, Tier

_COUNT = [v.instance_of(int), v.ge(0)]


@attrs.frozen(kw_only=True)
class Timeline:
    """Blocks of `block_size` steps on an absolute grid that starts where the sink ends, so all are of one size.

    A block is `sink` if it lies before `sink` steps, `mid` once its end is at least `recent` steps in the past, and
    `recent` until then; an unfinished block is recent. For video the grid is given: `cuts` are the ends of the
    committed blocks, in order, and `sink` is the end of the last block that is an anchor.
    """

    sink: int = attrs.field(validator=_COUNT)
    recent: int | None = attrs.field(validator=v.optional(_COUNT))
    """None: nothing ever leaves recent."""
    block_size: int = attrs.field(validator=[v.instance_of(int), v.ge(1)])
    cuts: Sequence[int] | None = None

    def recent_start_at(self, seen: int) -> int:
        """The first step of the recent tier when `seen` steps are history (at least the end of the sink)."""
        first = min(self.sink, seen)
        if self.recent is None:
            return first
        if self.cuts is not None:
            past = bisect_right(self.cuts, seen - self.recent)
            return max(first, self.cuts[past - 1]) if past else first
        return first + max(0, seen - self.recent - self.sink) // self.block_size * self.block_size

    def mid_blocks(self, seen: int) -> int:
        """How many blocks are mid when `seen` steps are history."""
        return sum(tier == "mid" for _, tier in self.layout(seen))

    def tier(self, step: int, seen: int) -> Tier:
        """The tier of one step when `seen` steps are history; later steps are current."""
        if step >= seen:
            return "current"
        if step < self.sink:
            return "sink"
        return "mid" if step < self.recent_start_at(seen) else "recent"

    def layout(self, seen: int) -> list[tuple[Extent, Tier]]:
        """Every block of the first `seen` steps with its tier, in order; they tile 0..seen."""
        if self.cuts is not None:
            ends = [cut for cut in self.cuts if cut <= seen]
        else:
            first = min(self.sink, seen)
            ends = [*([first] if first else []), *range(first + self.block_size, seen + 1, self.block_size)]
            if seen and (not ends or ends[-1] < seen):
                ends.append(seen)
        return [(Extent(a, b), self.tier(a, seen)) for a, b in zip([0, *ends], ends, strict=False)]

    def aged(self, before: int, now: int) -> list[Extent]:
        """The blocks that leave recent when history grows from `before` to `now` steps."""
        first, stop = max(self.recent_start_at(before), self.sink), self.recent_start_at(now)
        return self.blocks(first, stop)

    def blocks(self, start: int, stop: int) -> list[Extent]:
        """The blocks from `start` to `stop`, both on the grid."""
        if self.cuts is not None:
            ends = list(self.cuts[bisect_right(self.cuts, start) : bisect_right(self.cuts, stop)])
        else:
            ends = list(range(start + self.block_size, stop + 1, self.block_size))
        return [Extent(a, b) for a, b in zip([start, *ends[:-1]], ends, strict=True)] if ends else []
