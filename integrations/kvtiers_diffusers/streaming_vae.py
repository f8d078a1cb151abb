"""Decoding a video block by block: what a whole decode would give, without holding the whole."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_REPEATED, _MARK = "Rep", torch.empty(0)
"""What diffusers holds where a convolution has seen the first frame alone, and what stands for it in a file."""


class StreamingDecoder:
    """An `AutoencoderKLWan` whose causal convolutions remember the blocks before.

    The first latent frame gives one frame of pixels, every later one four.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.reset()

    def reset(self) -> None:
        """Another video begins."""
        self._features: list[Any] | None = None

    def remembered(self) -> dict[str, Tensor]:
        """What the convolutions hold of the frames before, by number; nothing before the first frame."""
        held = enumerate(self._features or [])
        return {str(at): part if isinstance(part, Tensor) else _MARK for at, part in held if part is not None}

    def restore(self, remembered: Mapping[str, Tensor]) -> None:
        """Go on from what `remembered` gave."""
        self.reset()
        if remembered:
            self.vae.clear_cache()
            self._features = list(self.vae._feat_map)
            for at, part in remembered.items():
                self._features[int(at)] = part if part.numel() else _REPEATED

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch channels frames height width"]
    ) -> Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"]:
        """The pixels, from -1 to 1, of the next frames of normalised latents."""
        vae, shape = self.vae, (1, -1, 1, 1, 1)
        hook = getattr(vae, "_hf_hook", None)
        if hook is not None:  # an autoencoder that is kept elsewhere until it is needed
            hook.pre_forward(vae)
        mean, deviation = (
            torch.tensor(numbers, device=latents.device, dtype=torch.float32).view(shape)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        plain = vae.post_quant_conv((latents.float() * deviation + mean).to(vae.dtype))
        begins = self._features is None
        if self._features is None:
            vae.clear_cache()
            self._features = list(vae._feat_map)
        pieces = []
        for frame in range(plain.shape[2]):
            first = {"first_chunk": True} if begins and frame == 0 else {}
            piece = plain[:, :, frame : frame + 1]
            pieces.append(vae.decoder(piece, feat_cache=self._features, feat_idx=[0], **first))
        pixels = torch.cat(pieces, 2)
        if vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return pixels.clamp(-1, 1)
