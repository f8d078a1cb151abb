"""Pictures of every usual kind as float32 from 0 to 1, or a clear refusal; nothing is guessed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvtiers import GeometryError, NotFiniteError

_ROUNDING = 1 / 510
"""What lies less outside 0 to 1 rounds to the same of 256 levels."""


def as_tensor(pixels: Any, what: str) -> Tensor:
    """A tensor, an array or a PIL image as a tensor of the same axes and values. Raises `GeometryError` for others."""
    if isinstance(pixels, Tensor):
        return pixels
    if isinstance(pixels, np.ndarray):
        if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
            raise _kind(what, pixels.dtype)
        return torch.from_numpy(np.array(pixels, dtype=None if pixels.dtype.itemsize <= 8 else np.float64))
    from PIL import Image

    if isinstance(pixels, Image.Image):
        return torch.from_numpy(np.array(pixels.convert("RGB")))
    raise GeometryError(f"{what} are tensors, arrays or PIL images, got a {type(pixels).__name__}")


def in_unit(pixels: Tensor, what: str) -> Tensor:
    """Pixels as float32 from 0 to 1: whole numbers of uint8 are divided by 255, others are there already.

    Raises `NotFiniteError` for NaN and infinity, `GeometryError` for other numbers outside 0 to 1 and other dtypes.
    """
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise _kind(what, pixels.dtype)
    found = pixels.float()
    if not bool(found.isfinite().all()):
        raise NotFiniteError(f"{what} hold NaN or infinity; look for what made them, such as a model in float16")
    low, high = (float(end) for end in found.aminmax()) if found.numel() else (0.0, 1.0)
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise GeometryError(
            f"{what} are from 0 to 1, or uint8 from 0 to 255, got {pixels.dtype} from {low:.3g} to {high:.3g}; scale "
            "them, such as x / 2 + 0.5 for what a StreamingDecoder gives"
        )
    return found.clamp(0, 1)


def _kind(what: str, dtype: Any) -> GeometryError:
    return GeometryError(f"{what} are from 0 to 1 as floating numbers, or from 0 to 255 as uint8, got {dtype}")
