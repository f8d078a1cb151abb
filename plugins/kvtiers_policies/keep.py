"""Compressor `keep`: a block stays as it is, for policies that choose what to attend (Quest, arXiv 2406.10774)."""

from typing import ClassVar

import attrs

from kvtiers.blocks import Blocks
from kvtiers.slots import Compressor, Moment


@attrs.frozen(kw_only=True)
class Keep(Compressor):
    """Nothing is compressed."""

    keeps: ClassVar[bool] = True

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        return blocks

    def compressed_tokens(self, tokens: int) -> int:
        return tokens
