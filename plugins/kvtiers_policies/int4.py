"""Codec `int4`: archived keys and values in 4 bits a number (KIVI, arXiv 2402.02750)."""

from typing import ClassVar

import attrs

from kvtiers_policies.quantised import Quantised


@attrs.frozen(kw_only=True)
class Int4(Quantised):
    """An eighth of float32, a quarter of bfloat16, and the scales."""

    bits: ClassVar[int] = 4
