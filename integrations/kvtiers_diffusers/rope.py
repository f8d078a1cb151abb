"""How Wan rotates: three axes (time, height, width), interleaved pairs, angles in float64."""

from typing import Any

import torch

from kvtiers import Rotary, RotaryError

_THETA = 10_000.0
_TRIED = 7
"""A position at which the formula is held against the model's own table."""


def rotary_of(transformer: Any) -> Rotary:
    """The rotary embedding of `transformer`, for positions without end (its own table has 1,024 frames).

    Raises `RotaryError` if the model's table is not what Wan's formula gives.
    """
    rope: Any = transformer.rope
    axes = (rope.t_dim, rope.h_dim, rope.w_dim)
    device = rope.freqs_cos.device
    frequencies = [_THETA ** -(torch.arange(0, n, 2, dtype=torch.float64, device=device) / n) for n in axes]
    rotary = Rotary(frequencies, layout="interleaved", angle_dtype=torch.float64)
    cos, sin = rotary.table(torch.full((1, len(axes)), float(_TRIED), device=device))
    own_cos, own_sin = rope.freqs_cos[_TRIED], rope.freqs_sin[_TRIED]
    error = max((cos[0] - own_cos).abs().max(), (sin[0, 1::2] - own_sin[1::2]).abs().max())
    if not error < 1e-5:
        raise RotaryError(
            f"{type(transformer).__name__} rotates otherwise than Wan does (its table differs by {error:.1e}); "
            "kvtiers_diffusers serves Wan's own rotary embedding"
        )
    return rotary
