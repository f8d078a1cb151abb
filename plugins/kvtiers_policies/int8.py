"""Codec `int8`: archived keys and values in 8 bits a number (KIVI, arXiv 2402.02750, with 8 bits)."""

from typing import ClassVar

import attrs

from kvtiers_policies.quantised import Quantised


@attrs.frozen(kw_only=True)
class Int8(Quantised):
    """A quarter of float32, half of bfloat16, and the scales."""

    bits: ClassVar[int] = 8
