"""Realigner `block-relativistic`: positions are the model's own until recent lies at `onset`, and stay there from then.

Source: Infinity-RoPE (arXiv 2511.20649) section 4.1, equation 2, for a cache of fixed size: the newest frame never gets
past the onset index f0 of the horizon that the model knows, and earlier frames are turned back with it. f0, counted
from 1, is `onset` + recent + current frames. Deviations: the paper does not say where the sink lies once it is far
behind; here it stays at the beginning, as in the authors' code, which takes the size of the cache for f0 (that is
`contiguous`). Frames of a cache that is larger than the horizon keep places of their own, behind the sink, where the
paper lets them share the first.
"""

import attrs
from attrs import validators as v
from jaxtyping import Int
from torch import Tensor

from kvtiers.slots import Moment, Placement, Realigner


@attrs.frozen(kw_only=True)
class BlockRelativistic(Realigner):
    """Recent begins at step `onset` at most, or right behind what is attended before it if there is no room; mid blocks
    take consecutive spans before recent, and the sink stays where it is."""

    onset: int = attrs.field(default=15, validator=[v.instance_of(int), v.ge(0)])

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
        shift = max(sink + total - recent, min(0, self.onset - recent))
        before, first = (spans.cumsum(-1) - spans).double(), recent + shift - total
        return Placement(sink_shift=0, mid_starts=before + first, mid_from=first, recent_shift=shift)
