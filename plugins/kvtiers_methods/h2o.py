"""Compressor `h2o`: the heaviest hitters stay, the tokens that got most attention since they came.

Source: H2O (arXiv 2306.14048) section 4.2. Deviations: the query heads of a KV head choose together, by the sum of
their attention, and it is chosen anew when a block leaves recent, not with every token (with `block_size=1` it is).
"""

from typing import ClassVar

import attrs
from torch import Tensor

from kvtiers.slots import Attention, Moment
from kvtiers_methods.whole_past import Past, WholePast


@attrs.frozen(kw_only=True)
class H2O(WholePast):
    """Each KV head keeps the `most` tokens with the largest sum of attention over all queries."""

    attention: ClassVar[Attention | None] = "sum"

    def scores(self, past: Past, moment: Moment) -> Tensor:
        return past.mass()
