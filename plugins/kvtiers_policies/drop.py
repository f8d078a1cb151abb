"""Compressor `drop`: what leaves recent is forgotten (StreamingLLM, arXiv 2309.17453, section 3.2)."""

from typing import ClassVar

import attrs

from kvtiers.blocks import Blocks
from kvtiers.slots import Compressor, Moment


@attrs.frozen(kw_only=True)
class Drop(Compressor):
    """Nothing of a block remains."""

    drops: ClassVar[bool] = True

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        return None

    def compressed_tokens(self, tokens: int) -> int:
        return 0
