"""Codec `quant-videogen`: a block's tokens in groups of like ones, whose mean is taken off before 2 bits are left.

Source: Quant VideoGen (arXiv 2602.02958) section 4. Semantic-aware smoothing (4.1, equations 5 to 7): k-means over the
tokens of a chunk, apart for keys and values. Progressive residual quantisation (4.2): the same again with what is left,
`stages` times, and then a symmetric rounding of `group` channels together (3.2, equation 2), which at 2 bits leaves -1,
0 and 1. The defaults are the paper's QVG; `stages=4, group=16` is QVG-Pro. As in the paper, keys are written before
rotation wherever a realigner rotates. Deviations: k-means begins with evenly spaced tokens (the paper: k-means++, or
the groups of the chunk before), so a block is written alike alone and beside others; scales are bfloat16, not FP8. A
chunk is one block, and each has means of its own: of three frames of 1,560 tokens a fifth of bfloat16 is left, of 48 a
seventh; the paper takes more frames than three together.
"""

from collections.abc import Mapping
from typing import Literal

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from kvtiers.archive import Codec, Parts
from kvtiers.geometry import Geometry, spread

_Blocks = Float[Tensor, "batch kv_heads blocks tokens width"]


@attrs.frozen(kw_only=True)
class QuantVideoGen(Codec):
    """Means and groups of `stages` rounds of k-means, and what is left in `bits` bits a number.

    centroids: groups of a stage, 256 at most. rounds: of each k-means; the authors' scripts have 2 to 100. group: how
    many channels of a token share a scale.
    """

    centroids: int = attrs.field(default=256, validator=[v.instance_of(int), v.ge(1), v.le(256)])
    stages: int = attrs.field(default=1, validator=[v.instance_of(int), v.ge(1)])
    rounds: int = attrs.field(default=2, validator=[v.instance_of(int), v.ge(1)])
    group: int = attrs.field(default=64, validator=[v.instance_of(int), v.ge(1)])
    bits: Literal[2, 4] = attrs.field(default=2, validator=v.in_((2, 4)))

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {
            f"{name}_{part}": made
            for name, x in (("key", keys), ("value", values))
            for part, made in self._written(x).items()
        }

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = (self._read({part: parts[f"{name}_{part}"] for part in _PARTS}) for name in ("key", "value"))
        number = torch.finfo(dtype)
        return keys.clamp(number.min, number.max).to(dtype), values.clamp(number.min, number.max).to(dtype)

    def block_bytes(self, tokens: int, geometry: Geometry) -> int:
        total = 0
        for width in (geometry.head_dim, geometry.value_dim):
            means = self.stages * (2 * min(self.centroids, tokens) * width + tokens)
            total += means + tokens * (2 * -(-width // self.group) + -(-width * self.bits // 8))
        return geometry.batch * geometry.kv_heads * total

    def tolerance(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Half a step of what is left, and what float32 and the dtype round."""
        return self._error(keys), self._error(values)

    def _error(self, x: _Blocks) -> Tensor:
        parts, number = self._written(x), torch.finfo(x.dtype)
        step = parts["scale"].float().repeat_interleave(self.group, -1)[..., : x.shape[-1]]
        means = sum(means.abs() for means in self._means(parts))
        largest = x.float().abs() + step
        return (
            0.5 * step + 2**-20 * (largest + means) + 0.51 * number.eps * largest + number.eps * number.smallest_normal
        )

    def _written(self, x: _Blocks) -> dict[str, Tensor]:
        left, means, groups = x.float(), [], []
        for _ in range(self.stages):
            found, of_token = self._smoothed(left)
            means.append(found)
            groups.append(of_token)
            left = left - found.float().take_along_dim(of_token[..., None], 3)
        apart = pad(left, (0, -left.shape[-1] % self.group)).unflatten(-1, (-1, self.group))
        most = 2 ** (self.bits - 1) - 1
        scale = (apart.abs().amax(-1) / most).to(torch.bfloat16)
        step = torch.where(scale > 0, scale, 1).float()[..., None]
        whole = ((apart / step).round().clamp(-most, most) + most).to(torch.uint8).flatten(-2)[..., : x.shape[-1]]
        each = 8 // self.bits
        columns = pad(whole, (0, -whole.shape[-1] % each)).unflatten(-1, (-1, each))
        codes = sum((columns[..., n] << self.bits * n for n in range(1, each)), columns[..., 0])
        stacked = torch.stack(groups, 3).to(torch.uint8)
        return {"mean": torch.stack(means, 3), "group": stacked, "scale": scale, "code": codes}

    def _read(self, parts: Mapping[str, Tensor]) -> Float[Tensor, "batch kv_heads blocks tokens width"]:
        width, most = parts["mean"].shape[-1], 2 ** (self.bits - 1) - 1
        columns = [parts["code"] >> self.bits * n & 2**self.bits - 1 for n in range(8 // self.bits)]
        whole = torch.stack(columns, -1).flatten(-2)[..., :width].float() - most
        left: Tensor = whole * parts["scale"].float().repeat_interleave(self.group, -1)[..., :width]
        return sum(self._means(parts), left)

    def _means(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """The mean of each token's group, stage by stage."""
        stages = zip(parts["mean"].unbind(3), parts["group"].unbind(3), strict=True)
        return [means.float().take_along_dim(groups.long()[..., None], 3) for means, groups in stages]

    def _smoothed(
        self, x: _Blocks
    ) -> tuple[Float[Tensor, "batch kv_heads blocks groups width"], Int[Tensor, "batch kv_heads blocks tokens"]]:
        """The means of groups of like tokens, and the group of each token."""
        tokens = x.shape[3]
        means = x.index_select(3, spread(self.centroids, tokens, x.device))
        groups = x.new_zeros(x.shape[:4], dtype=torch.long)
        for _ in range(self.rounds):
            far = means.square().sum(-1)[..., None, :] - 2 * x @ means.mT  # squared distance, less that to zero
            groups = far.argmin(-1)
            count = torch.zeros_like(means[..., 0]).scatter_add(3, groups, torch.ones_like(x[..., 0]))[..., None]
            total = torch.zeros_like(means).scatter_add(3, groups[..., None].expand_as(x), x)
            means = torch.where(count > 0, total / count.clamp(min=1), means)
        return means.to(torch.bfloat16), groups


_PARTS = ("mean", "group", "scale", "code")
"""What is written of keys, and of values."""
