"""How far published methods are from their references: tests assert it, and `make distances` prints it."""

import math

from torch import Tensor

MEASURED: dict[str, tuple[float, float]] = {}
"""By method: the largest distance from a reference, and the smallest of a control."""


def near(method: str, off: float | Tensor, *controls: float | Tensor, close: float = 1e-5, apart: float = 1e-3) -> None:
    """Assert that a method is what its reference says, and that a reference that is wrong on purpose says otherwise.

    off: the largest difference from the reference. controls: the same of wrong references.
    """
    worst, least = MEASURED.get(method, (0.0, math.inf))
    MEASURED[method] = max(worst, float(off)), min(least, *map(float, controls))
    assert off < close, f"{method} is {float(off):.2g} off its reference"
    assert min(map(float, controls)) > apart, f"a control of {method} is no control"
