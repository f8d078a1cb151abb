"""Compressor `drop`: what leaves recent is forgotten (StreamingLLM, arXiv 2309.17453, section 3.2)."""

from typing import Any, ClassVar

import attrs

from kvtiers.blocks import Blocks
from kvtiers.policy import Compressor


@attrs.frozen(kw_only=True)
class Drop(Compressor):
    """Nothing of a block remains."""

    drops: ClassVar[bool] = True

    def age(self, blocks: Blocks, state: Any) -> tuple[Blocks | None, Any]:
        return None, state

    def compressed_tokens(self, tokens: int) -> int:
        return 0
