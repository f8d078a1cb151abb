"""Realigner `incremental`: recent stays where it is, mid and sink pack up against it.

Source: PackForcing (arXiv 2603.25730) section 3.4, incremental temporal RoPE adjustment. As there, the stored keys of
anchors are rotated again by every block's increment, and every time rounded: in bfloat16 that drifts (`kvtiers bench
drift`). Deviation: archived keys are stored unrotated, so a mid block is rotated once, whenever it is recalled.
"""

from typing import Literal

import attrs
from attrs import validators as v
from jaxtyping import Int
from torch import Tensor

from kvtiers.policy import Placement, Realigner


@attrs.frozen(kw_only=True)
class Incremental(Realigner):
    """Recent keeps the model's positions; mid blocks take consecutive spans before it, the sink those before them.

    rotations: `each` increment rotates the anchors once more, from where they were (the paper's), or they are rotated
        `once`, from their unrotated keys, to the same place: `contiguous` in other coordinates.
    """

    rotations: Literal["each", "once"] = attrs.field(default="each", validator=v.in_(("each", "once")))

    @property
    def rotates_again(self) -> bool:
        return self.rotations == "each"

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
