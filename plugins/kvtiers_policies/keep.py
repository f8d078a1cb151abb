"""Compressor `keep`: a block stays as it is, for policies that choose what to attend (Quest, arXiv 2406.10774)."""

from typing import Any, ClassVar

import attrs

from kvtiers.blocks import Blocks
from kvtiers.policy import Compressor


@attrs.frozen(kw_only=True)
class Keep(Compressor):
    """Nothing is compressed."""

    keeps: ClassVar[bool] = True

    def age(self, blocks: Blocks, state: Any) -> tuple[Blocks | None, Any]:
        return blocks, state

    def compressed_tokens(self, tokens: int) -> int:
        return tokens
