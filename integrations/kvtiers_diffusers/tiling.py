"""How an autoencoder's settings cut what it decodes: into slices of one video each, and into overlapping tiles."""

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen(kw_only=True)
class Cut:
    """How latents of [rows, channels, frames, height, width] are decoded by an `AutoencoderKLWan`.

    sliced: whether every row is decoded alone (`enable_slicing()`). tile, stride: the height and width of a tile in
    latents, and how far one begins after another (`enable_tiling()`); without tiling, one tile is the whole frame.
    """

    rows: int
    height: int
    width: int
    sliced: bool
    tile: tuple[int, int]
    stride: tuple[int, int]

    @classmethod
    def of(cls, vae: Any, latents: Tensor) -> "Cut":
        """What the settings of `vae` say of these latents."""
        rows, _, _, height, width = latents.shape
        ratio = vae.spatial_compression_ratio
        tile = (vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio)
        stride = (vae.tile_sample_stride_height // ratio, vae.tile_sample_stride_width // ratio)
        if not vae.use_tiling or (height <= tile[0] and width <= tile[1]):
            tile = stride = (height, width)
        sliced = bool(vae.use_slicing) and rows > 1
        return cls(rows=rows, height=height, width=width, sliced=sliced, tile=tile, stride=stride)

    def numbers(self) -> list[int]:
        """Itself as whole numbers, for a file."""
        return [self.rows, self.height, self.width, int(self.sliced), *self.tile, *self.stride]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> "Cut":
        """What `numbers` gave; `ValueError` for others."""
        rows, height, width, sliced, *sides = numbers
        high, wide, down, right = sides
        return cls(rows=rows, height=height, width=width, sliced=bool(sliced), tile=(high, wide), stride=(down, right))

    def parts(self, latents: Tensor) -> Iterator[Tensor]:
        """The pieces that are decoded alone: by slice, then from top to bottom, then from left to right."""
        for rows in latents.split(1) if self.sliced else (latents,):
            for top in range(0, self.height, self.stride[0]):
                for left in range(0, self.width, self.stride[1]):
                    yield rows[..., top : top + self.tile[0], left : left + self.tile[1]]

    @property
    def count(self) -> int:
        """How many parts there are."""
        down, right = (len(range(0, a, b)) for a, b in zip((self.height, self.width), self.stride, strict=True))
        return (self.rows if self.sliced else 1) * down * right

    def joined(self, vae: Any, parts: list[Tensor]) -> Tensor:
        """The decoded parts put together; where tiles overlap, one is faded into the other, as `vae` does it."""
        if len(parts) == 1:
            return parts[0]
        right = len(range(0, self.width, self.stride[1]))
        rows = [parts[start : start + right] for start in range(0, len(parts), right)]
        down = len(range(0, self.height, self.stride[0]))
        videos = [self._untiled(vae, rows[start : start + down]) for start in range(0, len(rows), down)]
        return torch.cat(videos)

    def _untiled(self, vae: Any, tiles: list[list[Tensor]]) -> Tensor:
        if len(tiles) == len(tiles[0]) == 1:
            return tiles[0][0]
        patch = vae.config.patch_size or 1
        ratio = vae.spatial_compression_ratio // patch
        stride = (vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch)
        overlap = (
            vae.tile_sample_min_height // patch - stride[0],
            vae.tile_sample_min_width // patch - stride[1],
        )
        rows = []
        for down, row in enumerate(tiles):
            for right, tile in enumerate(row):  # blending writes into the second tile
                if down:
                    vae.blend_v(tiles[down - 1][right], tile, overlap[0])
                if right:
                    vae.blend_h(row[right - 1], tile, overlap[1])
            rows.append(torch.cat([tile[..., : stride[0], : stride[1]] for tile in row], -1))
        return torch.cat(rows, -2)[..., : self.height * ratio, : self.width * ratio]
