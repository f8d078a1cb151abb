"""How Wan rotates: three axes (time, height, width), interleaved pairs, angles in float64."""

from typing import Any

import torch

from kvtiers import Rotary, RotaryError, UnsupportedModelError
from kvtiers_diffusers.offloading import brought, device_of

_THETA = 10_000.0
_ROUNDED = 2e-4
"""How far a table of float32 may be from the formula; one of fewer bits, by its own rounding."""


def rotary_of(transformer: Any) -> Rotary:
    """The rotary embedding of `transformer`, for positions without end (its own table has 1,024 frames).

    Raises `RotaryError` if the model's table is not what Wan's formula gives, to the precision that the table has, and
    `UnsupportedModelError` if it has none yet.
    """
    rope: Any = transformer.rope
    axes, device = (rope.t_dim, rope.h_dim, rope.w_dim), device_of(transformer)
    if device.type == "meta":
        raise UnsupportedModelError(
            "this model's weights were never made (they are on the device meta); load them first"
        )
    frequencies = [_THETA ** -(torch.arange(0, n, 2, dtype=torch.float64, device=device) / n) for n in axes]
    rotary = Rotary(frequencies, layout="interleaved", angle_dtype=torch.float64)
    error = max(_error(transformer, rotary, axis, device) for axis in range(len(axes)))
    if not error < 1:
        raise RotaryError(
            f"{type(transformer).__name__} rotates otherwise than Wan does (its table differs by {error:.1e} times "
            "what rounding explains); kvtiers_diffusers serves Wan's own rotary embedding"
        )
    return rotary


@torch.no_grad()
def _error(transformer: Any, rotary: Rotary, axis: int, device: torch.device) -> float:
    """How far the model's own table is from `rotary` along one axis, by what rounding explains."""
    counts = [1, 1, 1]
    counts[axis] = transformer.rope.max_seq_len
    sizes = [count * patch for count, patch in zip(counts, transformer.config.patch_size, strict=True)]
    with brought(transformer), brought(transformer.rope):
        own = transformer.rope(torch.empty(1, 1, 1, 1, 1, device=device).expand(1, 1, *sizes))
    positions = torch.zeros(counts[axis], len(counts), device=device)
    positions[:, axis] = torch.arange(counts[axis], device=device)
    cos, sin = rotary.table(positions)
    pairs = [
        (part[0, :, 0, at::2].to(device), ours[:, at::2])
        for part, ours, at in zip(own, (cos, sin), (0, 1), strict=True)
    ]
    allowed = max(_ROUNDED, torch.finfo(own[0].dtype).eps)
    return max(float((theirs.float() - ours).abs().max()) for theirs, ours in pairs) / allowed
