"""Realigner `bounded`: positions stay as they are up to a limit; beyond it, what is recalled keeps its distance.

`original` leaves positions alone, so that a long text gets beyond those that the model was trained on. `contiguous`
never does, but it changes the distance of everything that is recalled. Between them: recent begins at `reach` at most,
what is recalled keeps its distance to it, and what would lie before the sink takes the first free places behind it.
Clamping large distances is an idea of ReRoPE (Su, 2023) and of InfLLM (arXiv 2402.04617), which gives all distant
tokens one position. Deviation: blocks keep their order and their inner distances.
"""

import attrs
from attrs import validators as v
from jaxtyping import Int
from torch import Tensor

from kvtiers.slots import Moment, Placement, Realigner


@attrs.frozen(kw_only=True)
class Bounded(Realigner):
    """Recent begins at step `reach` at most, and mid blocks lie as far before it as they were, if there is room.

    reach: lowered to half of the positions that the model was made for, where its configuration says how many. So the
    other half is left for recent and what is being read. The sink stays where it is.
    """

    reach: int = attrs.field(default=3072, validator=[v.instance_of(int), v.ge(0)])

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
        known = moment.geometry.known_positions
        reach = self.reach if known is None else min(self.reach, known // 2)
        shift = max(sink + total - recent, min(0, reach - recent))
        before = spans.cumsum(-1) - spans
        return Placement(sink_shift=0, mid_starts=(starts + shift).maximum(before + sink).double(), recent_shift=shift)
