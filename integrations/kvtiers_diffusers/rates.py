"""Frames a second, as an exact fraction."""

from fractions import Fraction
from math import isfinite
from numbers import Rational, Real
from typing import Any

from kvtiers import PolicyError

_LEAST, _MOST, _PARTS = Fraction(1, 1000), 1000, 10**6
"""Rates, and denominators of them, that video files keep exactly and without losing frames."""
_CLOSE = 1e-6


def rate(fps: Any) -> Fraction:
    """`fps` as a fraction: a whole number, a `Fraction`, a text such as "24000/1001", or a float such as 23.976, which
    becomes the nearest fraction with a denominator of at most 1,001.

    Raises `PolicyError` unless it is from 0.001 to 1,000, with a denominator of at most a million.
    """
    found = _fraction(fps)
    if found is None or not _LEAST <= found <= _MOST or found.denominator > _PARTS:
        raise PolicyError(f"fps must be 0.001 to 1000 frames a second, such as 16, 23.976 or '24000/1001', got {fps!r}")
    return found


def _fraction(fps: Any) -> Fraction | None:
    if isinstance(fps, bool) or not isinstance(fps, str | Real):
        return None
    try:
        if isinstance(fps, str | Rational):
            return Fraction(fps)
    except (ValueError, ZeroDivisionError):
        return None
    exact = float(fps)
    if not isfinite(exact):
        return None
    near = Fraction(exact).limit_denominator(1001)
    return near if abs(near - exact) <= _CLOSE * abs(exact) else Fraction(exact).limit_denominator(_PARTS)
