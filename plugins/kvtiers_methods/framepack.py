"""Compressor `framepack`: the older a frame, the fewer tokens are left of it; their number falls geometrically.

Source: FramePack (arXiv 2504.12626) section 3.1, equations 1 and 2 with lambda = 2: each level has half the tokens a
frame of the one before, so any number of levels holds less than one frame more for each of the first level. A level
has `frames` frames (the paper duplicates terms of its series); what is older than the last is deleted (the first of
its options for the tail). Deviations: the paper patchifies latents, with a trained kernel for each level, and runs them
through the model anew for every section; here keys and values, made when a frame was new, are averaged, keys before
rotation. Kernels are one frame long, and halve width and height by turns. A token lies at the mean position of those
that it stands for, where the paper averages their phases.
"""

from functools import lru_cache, reduce
from typing import ClassVar

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry
from kvtiers.slots import Compressor, Moment
from kvtiers_methods.whole_past import positions_of, turned, unturned


@attrs.frozen(kw_only=True)
class FramePack(Compressor):
    """Mid is the newest `frames` x `levels` frames that left recent, pooled harder from level to level."""

    rewrites: ClassVar[bool] = True
    frames: int = attrs.field(default=3, validator=[v.instance_of(int), v.ge(1)])
    levels: int = attrs.field(default=6, validator=[v.instance_of(int), v.ge(1)])

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        raise PolicyError("framepack rewrites all of mid; it does not age blocks")

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        grid, before = moment.geometry.grid, 0 if mid is None else mid.span
        levels = [*map(self._level, reversed(range(before))), *[0] * (leaving.count * leaving.span)]
        keys, values, sizes = [], [], [cells(level, grid) for level in levels]
        for blocks in (mid, leaving) if mid is not None else (leaving,):
            plain, own = unturned(blocks.keys, positions_of(blocks), moment), sizes[len(keys) :]
            own = own[: blocks.count * blocks.span]
            keys += plain.float().flatten(2, 3).split(own, 2)
            values += blocks.values.float().flatten(2, 3).split(own, 2)
        kept = min(len(levels), self.frames * self.levels)
        made_keys, made_values, offsets = [], [], []
        for number in range(kept):
            level, at = self._level(kept - 1 - number), number - kept
            pool = pooling(levels[at], level, grid, moment.device)
            made_keys.append(pool @ keys[at])
            made_values.append(pool @ values[at])
            places = moment.geometry.positions(number, number + 1, moment.device)
            offsets.append(pooling(0, level, grid, moment.device).double() @ places)
        made = attrs.evolve(
            leaving,
            keys=torch.cat(made_keys, 2)[:, :, None].to(leaving.keys.dtype),
            values=torch.cat(made_values, 2)[:, :, None].to(leaving.values.dtype),
            offsets=torch.cat(offsets)[None, None, None],
            starts=leaving.starts[-1:] + (leaving.span - kept),
            span=kept,
            offsets_differ=False,
            rotated=None,
            attention=None,
            bias=None,
        )
        return attrs.evolve(made, keys=turned(made.keys, positions_of(made), moment))

    def compressed_tokens(self, tokens: int) -> int:
        return tokens

    def mid_tokens(self, geometry: Geometry) -> int:
        return self.frames * sum(cells(1 + level, geometry.grid) for level in range(self.levels))

    def _level(self, age: int) -> int:
        """The level of a frame, by how many newer ones have left recent."""
        return 1 + age // self.frames


def kernel(level: int, axes: int) -> list[int]:
    """How many cells of each axis of a frame become one: 2**level in all, shared out from the last axis on."""
    return [2 ** ((level + axis) // axes) for axis in range(axes)]


def cells(level: int, grid: tuple[int, ...]) -> int:
    """How many tokens a frame has at a level."""
    count = 1
    for length, size in zip(grid, kernel(level, len(grid)), strict=True):
        count *= -(-length // size)
    return count


@lru_cache(maxsize=64)
def pooling(fine: int, coarse: int, grid: tuple[int, ...], device: torch.device) -> Float[Tensor, "coarse fine"]:
    """What takes the mean over the cells of a level, of tokens of a finer one, which may be cut off at the edge."""
    with torch.inference_mode(False):  # it is remembered
        axes = []
        for length, *sizes in zip(grid, kernel(fine, len(grid)), kernel(coarse, len(grid)), strict=True):
            first = torch.arange(0, length, sizes[0], device=device)
            share = one_hot(first // sizes[1], -(-length // sizes[1])).mT * (length - first).clamp(max=sizes[0])
            axes.append((share / share.sum(-1, keepdim=True)).contiguous())
        return reduce(torch.kron, axes, torch.ones(1, 1, device=device))
