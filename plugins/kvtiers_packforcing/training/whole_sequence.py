"""`AutoencoderKLWan` over a whole clip at once: equal to its own passes, which go chunk by chunk, and faster.

diffusers encodes and decodes with a cache of features, one latent frame at a time. Without the cache its resampling in
time is silently left out, so the classes here put it in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from jaxtyping import Float
from torch import Tensor


class WholeResample(WanResample):
    """`WanResample` over all frames. The first frame stays one; in time only the others are halved or doubled."""

    def forward(self, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        """Resample; the arguments are those of `WanResample`, whose cache is not used."""
        if self.mode == "upsample3d" and x.shape[2] > 1:
            first, others = x[:, :, :1], x[:, :, 1:]
            doubled = self.time_conv(others).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
            x = torch.cat((first, doubled), 2)
        frames = x.transpose(1, 2)
        space = self.resample(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
        if self.mode == "downsample3d" and x.shape[2] > 1:
            space = torch.cat((space[:, :, :1], self.time_conv(space)), 2)
        resampled: Tensor = space
        return resampled


@contextmanager
def whole_sequence(vae: Any) -> Iterator[None]:
    """Inside of the block, `vae.encoder` and `vae.decoder` take whole clips without a cache."""
    swapped = [module for module in vae.modules() if type(module) is WanResample]
    try:
        for module in swapped:
            module.__class__ = WholeResample
        yield
    finally:
        for module in swapped:
            module.__class__ = WanResample


def encode_whole(
    vae: Any, pixels: Float[Tensor, "batch 3 frames height width"]
) -> Float[Tensor, "batch channels latent_frames latent_height latent_width"]:
    """The mean of the latents of 1 + 4 k frames. Equals `vae.encode(pixels).latent_dist.mode()`."""
    with whole_sequence(vae):
        size = vae.config.patch_size
        moments = vae.quant_conv(vae.encoder(patchify(pixels, size) if size else pixels))
    mean: Tensor = moments.chunk(2, 1)[0]
    return mean


def decode_whole(
    vae: Any, latents: Float[Tensor, "batch channels latent_frames latent_height latent_width"]
) -> Float[Tensor, "batch 3 frames height width"]:
    """The frames of latents, not clamped. Clamped to -1 to 1 it equals `vae.decode(latents).sample`."""
    with whole_sequence(vae):
        decoded = vae.decoder(vae.post_quant_conv(latents))
    size = vae.config.patch_size
    frames: Tensor = unpatchify(decoded, size) if size else decoded
    return frames
