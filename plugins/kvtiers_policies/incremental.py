"""Realigner `incremental`: recent stays where it is, mid and sink pack up against it.

Source: PackForcing (arXiv 2603.25730) section 3.4, incremental temporal RoPE adjustment. Deviation: the paper rotates
the stored keys by each block's increment; here the same positions are reached in one rotation, so rounding does not
accumulate.
"""

import attrs
from jaxtyping import Int
from torch import Tensor

from kvtiers.policy import Placement, Realigner


@attrs.frozen(kw_only=True)
class Incremental(Realigner):
    """Recent keeps the model's positions; mid blocks take consecutive spans before it, the sink those before them."""

    def place(
        self,
        *,
        sink: int,
        starts: Int[Tensor, "*selection chosen"],
        spans: Int[Tensor, "*selection chosen"],
        recent: int,
        total: int,
    ) -> Placement:
        before = (spans.cumsum(-1) - spans).double()
        first = recent - total
        return Placement(sink_shift=first - sink, mid_starts=before + first, mid_from=first, recent_shift=0)
