"""Compressor `tova`: what the newest query attends most stays; all heads of a layer keep the same tokens.

Source: TOVA (arXiv 2401.06104) section 3.2. Deviations: only what left recent competes (with `recent=0` all does), and
it is chosen anew when a block leaves, not with every token (with `block_size=1` it is).
"""

from typing import ClassVar

import attrs
from torch import Tensor

from kvtiers.slots import Attention, Moment
from kvtiers_methods.whole_past import Past, WholePast


@attrs.frozen(kw_only=True)
class TOVA(WholePast):
    """A layer keeps the `most` tokens that its newest query attends most, in the mean over all heads."""

    attention: ClassVar[Attention | None] = "latest"
    window: ClassVar[int] = 1

    def scores(self, past: Past, moment: Moment) -> Tensor:
        mass = past.mass()
        return mass.mean(1, keepdim=True).expand_as(mass)
