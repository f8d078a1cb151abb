"""The few-step schedule of Self-Forcing (arXiv 2506.08009) and PackForcing (arXiv 2603.25730, section 4.1)."""

from collections.abc import Sequence
from itertools import pairwise
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers import PolicyError

TIMESTEPS = (1000, 750, 500, 250)


def warped(timesteps: Sequence[float | int], shift: float) -> list[float]:
    """`timesteps` (1,000 to 0, falling) as the model was trained to see them: shifted towards noise.

    With a shift of 5, 1000, 750, 500, 250 become 1000, 937.5, 833.3, 625. Raises `PolicyError` for a list that does not
    fall from at most 1,000 to more than 0, and a shift that is not a finite number of more than 0.
    """
    if not 0 < shift < inf:
        raise PolicyError(f"shift must be a finite number of more than 0, got {shift!r}")
    within = all(0 < t <= 1000 for t in timesteps)  # which NaN is not
    if not len(timesteps) or not within or not all(a > b for a, b in pairwise(timesteps)):
        raise PolicyError(
            "timesteps fall from at most 1000 to more than 0 (the clean pass at 0 is made anyway), "
            f"got {list(timesteps)}"
        )
    return [1000 * shift * t / 1000 / (1 + (shift - 1) * t / 1000) for t in timesteps]


def clean(
    noisy: Float[Tensor, "batch channels frames height width"],
    flow: Float[Tensor, "batch channels frames height width"],
    timestep: float,
) -> Float[Tensor, "batch channels frames height width"]:
    """What the model takes the clean block to be: x0 = x - sigma * flow, in float32."""
    return (noisy.float() - timestep / 1000 * flow.float()).to(noisy.dtype)


def noised(
    block: Float[Tensor, "batch channels frames height width"],
    noise: Float[Tensor, "batch channels frames height width"],
    timestep: float,
) -> Float[Tensor, "batch channels frames height width"]:
    """A clean block at `timestep`: (1 - sigma) * x0 + sigma * noise, in float32."""
    sigma = timestep / 1000
    return torch.lerp(block.float(), noise.float(), sigma).to(block.dtype)
