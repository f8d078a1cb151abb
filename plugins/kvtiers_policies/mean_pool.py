"""Compressor `mean-pool`: consecutive tokens become one (Compressive Transformer, arXiv 1911.05507, section 3.1).

It is the untrained stand-in on text for PackForcing's compressed blocks (arXiv 2603.25730, section 3.2).
"""

from typing import ClassVar

import attrs
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor, cat

from kvtiers.blocks import Blocks
from kvtiers.slots import Compressor, Moment


@attrs.frozen(kw_only=True)
class MeanPool(Compressor):
    """Every run of `ratio` consecutive tokens of a block becomes one token; the last run of a block may be shorter.

    Keys, values and offsets are averaged, in float32, so that a pooled token lies at the center of those it stands for.
    The block keeps its span. Keys are averaged as stored: unrotated, unless the realigner is `original`.
    """

    alike: ClassVar[bool] = True
    ratio: int = attrs.field(default=8, validator=[v.instance_of(int), v.ge(1)])

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        return attrs.evolve(
            blocks,
            keys=self._mean(blocks.keys),
            values=self._mean(blocks.values),
            offsets=self._mean(blocks.offsets),
            attention=None,
        )

    def compressed_tokens(self, tokens: int) -> int:
        return -(-tokens // self.ratio)

    def _mean(self, x: Float[Tensor, "*rows tokens width"]) -> Float[Tensor, "*rows groups width"]:
        whole = x.shape[-2] // self.ratio * self.ratio
        parts = [x[..., :whole, :].float().unflatten(-2, (-1, self.ratio)).mean(-2)] if whole else []
        if whole < x.shape[-2]:
            parts.append(x[..., whole:, :].float().mean(-2, keepdim=True))
        return cat(parts, dim=-2).to(x.dtype)
