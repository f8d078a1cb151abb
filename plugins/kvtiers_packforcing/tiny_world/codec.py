"""A linear codec of the tiny world: 4 x 8 x 8 pixels to 16 numbers, by principal components.

It gives a model latents of its own within seconds, and it is what the autoencoder's latents are taught to be. So a
model and its autoencoder can be trained side by side.
"""

from pathlib import Path

import attrs
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvtiers_packforcing.tiny_world.clips import Clips

STRIDE = (4, 8, 8)
LATENT_CHANNELS = 16
SHIPPED = Path(__file__).parent / "codec.safetensors"


@attrs.frozen(eq=False, kw_only=True)
class LinearCodec:
    """Principal components, scaled so that latents have a mean variance of 1 and are half whitened.

    A component of standard deviation s is divided by a multiple of the root of s: large ones stay larger, and small
    ones, which a model learns last, are not blown up.
    """

    mean: Float[Tensor, " pixels"]
    components: Float[Tensor, "pixels channels"]
    scale: Float[Tensor, " channels"]

    @classmethod
    def fit(cls, clips: Clips, channels: int = LATENT_CHANNELS) -> "LinearCodec":
        """The components of what these clips show."""
        patches = _patches(_padded(clips.pixels())).flatten(0, 3).double()
        mean = patches.mean(0)
        centred = patches - mean
        variances, components = torch.linalg.eigh(centred.T @ centred / len(centred))
        deviation, components = variances.flip(0)[:channels].sqrt(), components.flip(1)[:, :channels]
        components = components * components.sum(0).sign()  # or the sign would be an accident
        root = deviation.sqrt()
        scale = root * (deviation / root).square().mean().sqrt()
        return cls(mean=mean.float(), components=components.float().contiguous(), scale=scale.float())

    @classmethod
    def load(cls, path: Path | str = SHIPPED) -> "LinearCodec":
        """The codec in a file: without a path the one that comes with kvtiers."""
        return cls(**load_file(path))

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        save_file(attrs.asdict(self), path)

    def encode(
        self, pixels: Float[Tensor, "batch 3 frames height width"]
    ) -> Float[Tensor, "batch channels latent_frames latent_height latent_width"]:
        """Encode 1 + 4 k frames in -1 to 1. The first one stands for four, as in a causal autoencoder."""
        latents: Tensor = (_patches(_padded(pixels)) - self.mean) @ self.components / self.scale
        return latents.permute(0, 4, 1, 2, 3).contiguous()

    def decode(
        self, latents: Float[Tensor, "batch channels latent_frames latent_height latent_width"]
    ) -> Float[Tensor, "batch 3 frames height width"]:
        """Decode to 1 + 4 k frames."""
        patches = (latents.permute(0, 2, 3, 4, 1) * self.scale) @ self.components.T + self.mean
        frames, rows, columns = STRIDE
        cut: Tensor = patches.unflatten(4, (3, frames, rows, columns)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return cut.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, frames - 1 :]


def _padded(pixels: Tensor) -> Tensor:
    return torch.cat((pixels[:, :, :1].expand(-1, -1, STRIDE[0] - 1, -1, -1), pixels), 2)


def _patches(pixels: Tensor) -> Tensor:
    frames, rows, columns = STRIDE
    cut: Tensor = pixels.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).unflatten(2, (-1, frames))
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal to noise of pictures in -1 to 1, in dB."""
    return float(10 * torch.log10(4 / (one - other).square().mean()))
