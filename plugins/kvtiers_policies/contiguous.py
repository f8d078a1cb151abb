"""Realigner `contiguous`: sinks stay where they are, everything after them closes up.

It places as PackForcing does (arXiv 2603.25730, section 3.4) up to a common shift, which attention does not see.
Deviation: the paper holds recent and rotates the stored keys again for every block, so rounding accumulates and
positions grow without end; here every key is rotated once and, in the steady state, positions do not change from block
to block. StreamingLLM (arXiv 2309.17453, section 3.2) counts positions within the cache in the same way.
"""

import attrs
from jaxtyping import Int
from torch import Tensor

from kvtiers.policy import Placement, Realigner


@attrs.frozen(kw_only=True)
class Contiguous(Realigner):
    """Mid blocks take consecutive spans after the sink, recent and current the next positions.

    Where blocks differ in length, recent follows the longest choice that there could be, after a gap if it was another.
    """

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
        return Placement(sink_shift=0, mid_starts=before + sink, mid_from=sink, recent_shift=sink + total - recent)
