"""Realigner `unrotated`: blocks stay where they were, and keys are held unrotated and turned there when attended.

It places as `original` does, and as ShadowKV (arXiv 2410.21465) does, whose keys are of low rank before rotation.
"""

import attrs
from jaxtyping import Int
from torch import Tensor

from kvtiers.slots import Moment, Placement, Realigner


@attrs.frozen(kw_only=True)
class Unrotated(Realigner):
    """Leave a gap where blocks are not attended. For a codec or a compressor that wants keys before rotation."""

    def place(
        self,
        *,
        sink: int,
        starts: Int[Tensor, "*selection chosen"],
        spans: Int[Tensor, "*selection chosen"],
        total: int,
        recent: int,
        moment: Moment,
    ) -> Placement:
        return Placement(sink_shift=0, mid_starts=starts.double(), recent_shift=0)
