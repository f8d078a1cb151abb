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

_REACH = 3072


@attrs.frozen(kw_only=True)
class Bounded(Realigner):
    """Recent begins at step `reach` at most, and mid blocks lie as far before it as they were, if there is room.

    reach: None takes 3,072, or half of the positions that the model was made for, if its configuration says so and that
    is less. The rest is for recent and what is being read. Where sink and chosen blocks take more than `reach`, recent
    begins right behind them. The sink stays where it is.
    """

    reach: int | None = attrs.field(default=None, validator=v.optional([v.instance_of(int), v.ge(0)]))

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
        known, reach = moment.geometry.known_positions, self.reach
        if reach is None:
            reach = _REACH if known is None else min(_REACH, known // 2)
        shift = max(sink + total - recent, min(0, reach - recent))
        before = spans.cumsum(-1) - spans
        return Placement(sink_shift=0, mid_starts=(starts + shift).maximum(before + sink).double(), recent_shift=shift)
