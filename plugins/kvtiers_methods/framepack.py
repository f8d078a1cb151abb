"""Compressor `framepack`: the older a frame, the fewer tokens are left of it; their number falls geometrically.

Source: FramePack (arXiv 2504.12626) section 3.1, equations 1 and 2 with lambda = 2: a frame of a level has half the
tokens of one of the level before, so that all levels together hold about `frames` whole frames, however many there are.
A level has `frames` frames (the paper duplicates terms of its series); what is older than the last level is deleted
(the first of its options for the tail). Deviations: the paper patchifies latents, with a trained kernel for each level,
and runs them through the model anew for every section; here keys and values, made when a frame was new, are averaged,
keys before rotation. Kernels are one frame long, and halve width and height by turns. A token lies at the mean position
of those that it stands for, where the paper averages their phases.
"""

from math import prod
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
from kvtiers_methods.whole_past import positions_of, remade, unturned


@attrs.frozen(kw_only=True)
class FramePack(Compressor):
    """Mid is the newest `frames` x `levels` frames that left recent, pooled harder from level to level."""

    rewrites: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    frames: int = attrs.field(default=3, validator=[v.instance_of(int), v.ge(1)])
    levels: int = attrs.field(default=6, validator=[v.instance_of(int), v.ge(1)])

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        raise PolicyError("framepack rewrites all of mid; it does not age blocks")

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        grid, before = moment.geometry.grid, 0 if mid is None else mid.span
        levels = [*map(self._level, reversed(range(before))), *[0] * (leaving.count * leaving.span)]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        sizes = [cells(level, grid) for level in levels]
        for blocks in (mid, leaving) if mid is not None else (leaving,):
            plain, own = unturned(blocks.keys, positions_of(blocks), moment), sizes[len(keys) :]
            own = own[: blocks.count * blocks.span]
            keys += plain.float().flatten(2, 3).split(own, 2)
            values += blocks.values.float().flatten(2, 3).split(own, 2)
        kept = min(len(levels), self.frames * self.levels)
        now = [self._level(age) for age in reversed(range(kept))]
        pools = [*zip(levels[-kept:], now, strict=True)]
        made_keys, made_values = (
            torch.cat([pooled(x, *pool, grid) for x, pool in zip(part[-kept:], pools, strict=True)], 2)
            for part in (keys, values)
        )
        offsets = torch.cat([places(number, level, grid, moment.device) for number, level in enumerate(now)])
        starts = leaving.starts[-1:] + (leaving.span - kept)
        return remade(leaving, made_keys, made_values, offsets, starts=starts, span=kept, moment=moment)

    def compressed_tokens(self, tokens: int) -> int:
        return tokens

    def mid_tokens(self, geometry: Geometry) -> int:
        return self.frames * sum(cells(1 + level, geometry.grid) for level in range(self.levels))

    def _level(self, age: int) -> int:
        """The level of a frame, by how many newer ones have left recent."""
        return 1 + age // self.frames


def kernels(level: int, grid: tuple[int, ...]) -> list[int]:
    """How many rows, columns, ... become one: 2**level together, shared out from the last axis on."""
    return [2 ** ((level + axis) // len(grid)) for axis in range(len(grid))]


def cells(level: int, grid: tuple[int, ...]) -> int:
    """How many tokens a frame has at a level."""
    return prod(-(-length // size) for length, size in zip(grid, kernels(level, grid), strict=True))


def means(length: int, fine: int, coarse: int, device: torch.device) -> Float[Tensor, "coarse fine"]:
    """What takes means over one axis, of cells of `fine` rows, to cells of `coarse`. The last ones may be cut off."""
    first = torch.arange(0, length, fine, device=device)
    share = one_hot(first // coarse, -(-length // coarse)).mT * (length - first).clamp(max=fine)
    return share / share.sum(-1, keepdim=True)


def pooled(
    x: Float[Tensor, "batch kv_heads tokens width"], fine: int, coarse: int, grid: tuple[int, ...]
) -> Float[Tensor, "batch kv_heads fewer width"]:
    """The tokens of a frame at the level `coarse`, of those at a finer one."""
    if fine == coarse or not grid:
        return x
    sizes = [*zip(grid, kernels(fine, grid), kernels(coarse, grid), strict=True)]
    x = x.unflatten(2, [-(-length // size) for length, size, _ in sizes])
    for axis, size in enumerate(sizes, 2):
        x = (means(*size, x.device) @ x.movedim(axis, -2)).movedim(-2, axis)
    return x.flatten(2, -2)


def places(number: int, level: int, grid: tuple[int, ...], device: torch.device) -> Float[Tensor, "tokens axes"]:
    """Where the tokens of frame `number` lie: in the middle of their cells."""
    axes = [torch.tensor([float(number)], dtype=torch.float64, device=device)]
    for length, size in zip(grid, kernels(level, grid), strict=True):
        rows = torch.arange(length, dtype=torch.float64, device=device)
        axes.append(means(length, 1, size, device).double() @ rows)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
