"""Codec `kivi`: archived keys and values in 2 bits a number.

Source: KIVI (arXiv 2402.02750) section 3.3; its deviations are named in `kvtiers_policies.quantised`. `recent` is the
paper's residual, the newest tokens that stay exact.
"""

from typing import ClassVar

import attrs

from kvtiers_policies.quantised import Quantised


@attrs.frozen(kw_only=True)
class Kivi(Quantised):
    """A sixteenth of float32, an eighth of bfloat16, and the scales."""

    bits: ClassVar[int] = 2
