"""Distribution matching distillation (DMD): the losses of a generator and of its critic.

Source: DMD (arXiv 2311.18828) and DMD2 (arXiv 2405.14867), as Self-Forcing (arXiv 2506.08009) and PackForcing (arXiv
2603.25730, section 4.1) use them on videos. The critic learns what the generator makes (the fake score), a frozen
teacher knows what it should make (the real score). Where they differ, the generator moves from the first to the second.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]
"""The flow of noisy clips, [batch, channels, frames, height, width], at noise levels of blocks, [batch, blocks]."""

_SMALLEST = 1e-6
"""Of a mean difference that something is divided by."""


def levels(sigmas: Float[Tensor, "batch blocks"], frames: int) -> Float[Tensor, "batch 1 frames 1 1"]:
    """Noise levels of blocks as what multiplies latents."""
    return sigmas.repeat_interleave(frames // sigmas.shape[1], 1)[:, None, :, None, None]


def generator_loss(
    clips: Float[Tensor, "batch channels frames height width"],
    sigmas: Float[Tensor, "batch blocks"],
    noise: Float[Tensor, "batch channels frames height width"],
    *,
    real: Score,
    fake: Score,
    alone: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss whose gradient in x = `clips` is (fake x0 - real x0) / mean |x - real x0|, per clip and entry.

    sigmas: at which both scores look. alone: whether each block has a noise level and a mean of its own, or a clip one.
    """
    at = levels(sigmas, clips.shape[2])
    with torch.no_grad():
        noisy = torch.lerp(clips.detach(), noise, at)
        predicted, wanted = (noisy - at * score(noisy, sigmas) for score in (fake, real))
        off = (clips - wanted).abs().unflatten(2, (sigmas.shape[1], -1))
        scale = off.mean((1, 3, 4, 5) if alone else (1, 2, 3, 4, 5), keepdim=True).clamp(min=_SMALLEST)
        gradient = (predicted - wanted).unflatten(2, (sigmas.shape[1], -1)).div(scale).flatten(2, 3)
        target = clips - gradient
    loss = 0.5 * (clips - target).square().mean()
    return loss, {"gap": gradient.abs().mean(), "off_teacher": off.mean()}


def critic_loss(
    clips: Float[Tensor, "batch channels frames height width"],
    sigmas: Float[Tensor, "batch blocks"],
    noise: Float[Tensor, "batch channels frames height width"],
    *,
    fake: Score,
) -> Tensor:
    """Flow matching on what the generator made."""
    noisy = torch.lerp(clips, noise, levels(sigmas, clips.shape[2]))
    return (fake(noisy, sigmas) - (noise - clips)).square().mean()
