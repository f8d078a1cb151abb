"""Compressor `h2o`: the heaviest hitters stay, the tokens that got most attention since they came.

Source: H2O (arXiv 2306.14048) section 4.2. Deviations: the query heads of a KV head choose together, by the sum of
their attention, and it is chosen anew when a block leaves recent, not with every token (with `block_size=1` it is).
"""

from typing import ClassVar

import attrs
from torch import Tensor

from kvtiers.blocks import Blocks
from kvtiers.slots import Attention, Moment
from kvtiers_methods.whole_past import Past, WholePast, best


@attrs.frozen(kw_only=True)
class H2O(WholePast):
    """Each KV head keeps the `most` tokens with the largest sum of attention over all queries."""

    attention: ClassVar[Attention | None] = "sum"

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        past = Past.of(leaving, mid)
        return past.block(best(self.scores(past), self.most), close_up=self.close_up)

    def scores(self, past: Past) -> Tensor:
        """How much each token matters, [batch, kv_heads, tokens]."""
        return past.mass()
