"""Decoding a video block by block: what a whole decode would give, without holding the whole."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from jaxtyping import Float
from torch import Tensor

from kvtiers import GeometryError
from kvtiers_diffusers.tiling import Cut

_REPEATED, _MARK = "Rep", torch.empty(0)
"""What diffusers holds where a convolution has seen the first frame alone, and what stands for it in a file."""
_CUT = "cut"
"""Under which `remembered` says how the video is cut."""


class StreamingDecoder:
    """An `AutoencoderKLWan` whose causal convolutions remember the blocks before.

    The first latent frame gives one frame of pixels, every later one four. What the convolutions remember is held here
    and not on the autoencoder, so that videos and threads may share one. Its slicing and tiling are those of the first
    block. A `decode` that fails changes nothing.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.reset()

    def reset(self) -> None:
        """Another video begins."""
        self._features: list[list[Any]] = []
        """By part of the frame, what each convolution holds."""
        self._cut: Cut | None = None

    def remembered(self) -> dict[str, Tensor]:
        """How the video is cut, and by part and number what the convolutions hold; nothing before the first frame."""
        if self._cut is None:
            return {}
        held = {
            f"{part}.{at}": one if isinstance(one, Tensor) else _MARK
            for part, features in enumerate(self._features)
            for at, one in enumerate(features)
            if one is not None
        }
        return {_CUT: torch.tensor(self._cut.numbers()), **held}

    def restore(self, remembered: Mapping[str, Tensor]) -> None:
        """Go on from what `remembered` gave. `ValueError` or `IndexError`, and no change, for another autoencoder's."""
        if not remembered:
            self.reset()
            return
        if _CUT not in remembered:
            raise ValueError("it does not say how its video is cut into slices and tiles")
        cut = Cut.from_numbers(remembered[_CUT].tolist())
        held = {tuple(map(int, name.split("."))): one for name, one in remembered.items() if name != _CUT}
        if {part for part, _ in held} != set(range(min(cut.count, len(held) + 1))):
            raise ValueError(f"its parts are not the {cut.count} that its video is cut into")
        features = self._empty(cut)
        for (part, at), one in held.items():
            if at < 0:
                raise IndexError(f"there is no convolution {at}")
            features[part][at] = one if one.numel() else _REPEATED
        self._features, self._cut = features, cut

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch channels frames height width"]
    ) -> Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"]:
        """The pixels, from -1 to 1, of the next frames of normalised latents.

        Raises `GeometryError` for latents that cannot be the next frames of this video.
        """
        vae, shape = self.vae, (1, -1, 1, 1, 1)
        cut = self._admitted(latents)
        hook = getattr(vae, "_hf_hook", None)
        if hook is not None:  # an autoencoder that is kept elsewhere until it is needed
            hook.pre_forward(vae)
        mean, deviation = (
            torch.tensor(numbers, device=latents.device, dtype=torch.float32).view(shape)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        plain = (latents.float() * deviation + mean).to(vae.dtype)
        begins = self._cut is None
        features = self._empty(cut) if begins else [list(held) for held in self._features]
        parts = [
            self._decoded(part, held, begins=begins) for part, held in zip(cut.parts(plain), features, strict=True)
        ]
        pixels = cut.joined(vae, parts)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        pixels = pixels.clamp(-1, 1)
        self._features, self._cut = features, cut
        return pixels

    def _decoded(self, part: Tensor, features: list[Any], *, begins: bool) -> Tensor:
        """One part, frame by frame; `features` goes on from frame to frame."""
        plain, frames = self.vae.post_quant_conv(part), []
        for frame in range(plain.shape[2]):
            first = {"first_chunk": True} if begins and frame == 0 else {}
            piece = plain[:, :, frame : frame + 1]
            frames.append(self.vae.decoder(piece, feat_cache=features, feat_idx=[0], **first))
        return torch.cat(frames, 2)

    def _empty(self, cut: Cut) -> list[list[Any]]:
        """What the convolutions hold before the first frame."""
        convolutions = sum(isinstance(module, WanCausalConv3d) for module in self.vae.decoder.modules())
        return [[None] * convolutions for _ in range(cut.count)]

    def _admitted(self, latents: Tensor) -> Cut:
        """How these latents are cut, if they can be the next of this video."""
        channels = self.vae.config.z_dim
        if latents.shape[1] != channels or not latents.numel():
            raise GeometryError(
                f"this autoencoder decodes latents of [batch, {channels}, frames, height, width], got "
                f"{tuple(latents.shape)}; give the autoencoder that belongs to the model"
            )
        cut, before = Cut.of(self.vae, latents), self._cut
        if before is not None and cut != before:
            sizes = [(one.rows, one.height, one.width) for one in (before, cut)]
            if sizes[0] != sizes[1]:
                raise GeometryError(
                    f"this decoder is in a video of rows, height and width {sizes[0]}, got latents of {sizes[1]}; use "
                    "one StreamingDecoder per video, or reset() it"
                )
            raise GeometryError(
                "slicing or tiling of the autoencoder was switched in the middle of a video; switch it back, or "
                "reset() this decoder"
            )
        return cut
