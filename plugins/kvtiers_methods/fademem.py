"""Compressor `fademem`: a fixed number of frames stands for all of the past, the older the more frames for each.

Source: FadeMem (arXiv 2606.10671) and the authors' code, github.com/aniki-ly/FadeMem: a frame that comes when memory is
full makes two neighbours one, those nearest to each other in age ** power; the two that came last are left alone. Means
are weighted by frames ** weight, of keys before rotation. The first frame ever is never mixed. Once memory is full and
reaches further back than `horizon`, it is placed within that: the first frame at the beginning, the newest (a block of
them) before what comes, every other at its own distance if it is free, or the nearest in distance ** power. Of the
paper itself only the abstract could be had, so all figures are those of the code. Deviation: an age counts to the end
of a block of the usual length, also where blocks differ; what was merged when is then known without being kept.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import attrs
import torch
from attrs import validators as v

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry
from kvtiers.slots import Compressor, Moment
from kvtiers_methods.whole_past import fraction, positions_of, remade, unturned

Entry = tuple[int, int]
"""The middle of the frames that one stands for, counted from the first, and how many there are."""


@attrs.frozen(kw_only=True)
class FadeMem(Compressor):
    """Mid is at most `frames` frames.

    power: of ages and distances; the smaller, the sparser the distant past. weight: of the number of frames that one
    stands for, when it is merged. horizon: within how many steps all are placed.
    """

    rewrites: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    frames: int = attrs.field(default=12, validator=[v.instance_of(int), v.ge(2)])
    power: float = fraction(0.3, v.gt(0), v.le(1))
    weight: float = fraction(0.5, v.ge(0), v.le(1))
    horizon: int = attrs.field(default=18, validator=[v.instance_of(int), v.ge(2)])

    @horizon.validator
    def _check_room(self, _: object, value: int) -> None:
        if value < self.frames:
            raise ValueError(f"'horizon' must leave a step to each of 'frames' = {self.frames} frames, got {value}")

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        raise PolicyError("fademem rewrites all of mid; it does not age blocks")

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        geometry, done = moment.geometry, 0 if mid is None else mid.span  # all that ever left
        count, block = done + leaving.count * leaving.span, geometry.steps_per_commit
        keys, values, entries = [], [], list(schedule(done, self.frames, self.power, block))
        for blocks in (mid, leaving) if mid is not None else (leaving,):
            plain = unturned(blocks.keys, positions_of(blocks), moment).flatten(2, 3)
            keys += plain.split(geometry.tokens_per_step, 2)
            values += blocks.values.flatten(2, 3).split(geometry.tokens_per_step, 2)
        for number in range(done, count):
            entries.append((number, 1))
            if len(entries) <= self.frames:
                continue
            at = nearest(entries, ages_end(number, block), self.power)
            share = entries[at][1] ** self.weight / sum(span**self.weight for _, span in entries[at : at + 2])
            for parts in (keys, values):
                new = parts.pop(at + 1)
                parts[at] = parts[at] if at == 0 else torch.lerp(new.float(), parts[at].float(), share).to(new.dtype)
            entries[at : at + 2] = [merged(entries[at], entries[at + 1], first=at == 0)]
        places = torch.tensor(self._places(entries, count, block), dtype=torch.float64, device=moment.device)
        offsets = geometry.positions(0, 1, moment.device).repeat(len(entries), 1)
        offsets[:, 0] = places.repeat_interleave(geometry.tokens_per_step)
        starts = leaving.starts[:1] if mid is None else mid.starts
        made_keys, made_values = (torch.cat(parts, 2) for parts in (keys, values))
        return remade(leaving, made_keys, made_values, offsets, starts=starts, span=count, moment=moment)

    def compressed_tokens(self, tokens: int) -> int:
        return tokens

    def mid_tokens(self, geometry: Geometry) -> int:
        return self.frames * geometry.tokens_per_step

    def _places(self, entries: Sequence[Entry], count: int, block: int) -> list[int]:
        """Where the entries lie, counted from the first frame, when the next frame is number `count`."""
        if count < self.horizon or len(entries) < self.frames:
            return [center for center, _ in entries]
        bridge = min(block, self.frames - 1)
        far, gap, gaps = entries[1 : len(entries) - bridge], self.horizon, [self.horizon]
        for number, (center, _) in enumerate(far):
            least, own = bridge + len(far) - number, max(bridge + 1, min(count - center, self.horizon - 1))
            free = range(least, gap)
            off = [abs(one**self.power - own**self.power) for one in free]
            gap = free[off.index(min(off))]
            gaps.append(gap)
        return [count - gap for gap in (*gaps, *range(bridge, 0, -1))]


@lru_cache(maxsize=8)
def schedule(count: int, frames: int, power: float, block: int) -> Sequence[Entry]:
    """What stands for the first `count` frames."""
    entries: list[Entry] = []
    for number in range(count):
        entries.append((number, 1))
        if len(entries) > frames:
            at = nearest(entries, ages_end(number, block), power)
            entries[at : at + 2] = [merged(entries[at], entries[at + 1], first=at == 0)]
    return tuple(entries)


def ages_end(number: int, block: int) -> int:
    """The step up to which ages count when frame `number` comes: the end of its block."""
    return (number // block + 1) * block


def nearest(entries: Sequence[Entry], now: int, power: float) -> int:
    """The first of the two neighbours that are nearest in age ** power; the newest two are left alone."""
    ages = [(now - center) ** power for center, _ in entries]
    return min(range(max(1, len(entries) - 2)), key=lambda at: abs(ages[at] - ages[at + 1]))


def merged(a: Entry, b: Entry, *, first: bool) -> Entry:
    """What stands for both; the `first` of all keeps its place."""
    total = a[1] + b[1]
    return (a[0] if first else round((a[0] * a[1] + b[0] * b[1]) / total)), total
