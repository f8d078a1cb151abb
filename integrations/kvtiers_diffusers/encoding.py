"""Encoding pixels as a model's latents, with an autoencoder that threads may share."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def encoded(
    vae: Any, pixels: Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"]
) -> Float[Tensor, "batch channels frames height width"]:
    """Normalised latents, in float32, of 1 + 4n frames from -1 to 1: the mean of what the autoencoder gives.

    The encoder keeps what it remembers between frames on the object. A shallow copy shares the weights and the settings
    (slicing, tiling) and has that for itself.
    """
    found = copy.copy(vae).encode(pixels.to(vae.dtype)).latent_dist.mode().float()
    mean, deviation = (
        torch.tensor(numbers, device=found.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents: Tensor = (found - mean) / deviation
    return latents
