"""Realigner `original`: blocks stay where they were, keys keep the model's rotation (RoFormer, arXiv 2104.09864)."""

from typing import ClassVar

import attrs
from jaxtyping import Int
from torch import Tensor

from kvtiers.policy import Placement, Realigner


@attrs.frozen(kw_only=True)
class Original(Realigner):
    """Leave a gap where blocks are not attended. The only choice for a model without rotary embedding."""

    rotates: ClassVar[bool] = False

    def place(
        self,
        *,
        sink: int,
        starts: Int[Tensor, "*selection chosen"],
        spans: Int[Tensor, "*selection chosen"],
        recent: int,
        total: int,
    ) -> Placement:
        return Placement(sink_shift=0, mid_starts=starts.double(), recent_shift=0)
