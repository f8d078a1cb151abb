"""Compressor `dual-branch`: a block of frames becomes 1/32 of its tokens, before the model sees them.

Source: PackForcing (arXiv 2603.25730) section 3.2. HR: 3D convolutions over the latents. LR: the pixels, pooled and
encoded again. Their sum are input tokens of the transformer, which projects them in every layer like any others.
Deviations: the paper gives no kernels, no initial weights and no positions for compressed tokens; here kernels are 4
wide on strided axes, the last layer of HR starts at zero, and `positions` names the choice.
"""

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from kvtiers import Blocks, Compressor, Geometry, Moment, PolicyError
from kvtiers_packforcing.reduced import Reduced

_SPACE, _TIME = 4, 2
"""Tokens (height and width) and frames that become one."""


@attrs.frozen(kw_only=True)
class DualBranch(Compressor):
    """Reduce frames 2 times in time and tokens 4 times in height and in width.

    branches: `both`, or one alone: `hr` needs trained weights, `lr` a VAE.
    positions: where a reduced token lies in the cell of tokens that it stands for: its `center`, its first `corner`, or
        `unit` steps, as if the reduced block were a block of its own grid (it then occupies half the time).
    weights: a folder or hub id that `save_pretrained` of the network wrote; none: zeros in its last layer, so that an
        untrained `both` is `lr` alone.
    """

    given: ClassVar[bool] = True
    alike: ClassVar[bool] = True
    branches: Literal["both", "hr", "lr"] = attrs.field(default="both", validator=v.in_(("both", "hr", "lr")))
    positions: Literal["center", "corner", "unit"] = attrs.field(
        default="center", validator=v.in_(("center", "corner", "unit"))
    )
    weights: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))

    def cells(self, steps: int, grid: tuple[int, ...]) -> tuple[int, int, int]:
        """Reduced frames, height and width of a block of `steps` frames of `grid` tokens."""
        if len(grid) != 2 or steps < _TIME or min(grid) < _SPACE:
            raise PolicyError(
                f"dual-branch reduces blocks of at least {_TIME} frames of {_SPACE} x {_SPACE} tokens, got {steps} "
                f"frames of {' x '.join(map(str, grid)) or '1'}; commit longer blocks, or choose compressor='mean-pool'"
            )
        return steps // _TIME, grid[0] // _SPACE, grid[1] // _SPACE

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        raise PolicyError("dual-branch reduces frames before the model sees them; its form comes with the commit")

    def compressed_tokens(self, tokens: int) -> int:
        raise PolicyError("dual-branch reduces blocks of a grid; ask block_tokens()")

    def block_tokens(self, steps: int, geometry: Geometry) -> int:
        frames, height, width = self.cells(steps, geometry.grid)
        return frames * height * width

    def offsets(self, steps: int, grid: tuple[int, ...]) -> Float[Tensor, "tokens 3"]:
        """Positions of the reduced tokens, from the start of their block."""
        cells = self.cells(steps, grid)
        sizes = (1, 1, 1) if self.positions == "unit" else (steps / cells[0], _SPACE, _SPACE)
        inset = 0.5 if self.positions == "center" else 0.0
        axes = [
            (torch.arange(count, dtype=torch.float64) + inset) * size - inset
            for count, size in zip(cells, sizes, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)

    def span(self, steps: int) -> int:
        """Steps that a reduced block occupies when it is placed."""
        return steps // _TIME if self.positions == "unit" else steps

    def bind(self, model: Any, vae: Any, network: Any = None) -> "DualBranchReducer":
        return DualBranchReducer(self, model, vae, network)


class DualBranchReducer:
    """`DualBranch` for one Wan model. `network` is the HR branch (none for `lr` alone); it can be trained."""

    def __init__(self, settings: DualBranch, model: Any, vae: Any, network: Any = None) -> None:
        if settings.branches != "hr" and vae is None:
            raise PolicyError(
                f"dual-branch with branches={settings.branches!r} encodes pooled frames with the model's autoencoder, "
                "and there is none; give vae=..., or branches='hr' with trained weights"
            )
        if vae is not None and vae.config.z_dim != model.config.in_channels:
            raise PolicyError(
                f"the autoencoder makes latents of {vae.config.z_dim} channels and the model takes "
                f"{model.config.in_channels}; give the autoencoder that belongs to the model"
            )
        self.settings, self.model, self.vae = settings, model, vae
        self.needs_pixels = settings.branches != "hr"
        self.network = None if settings.branches == "lr" else self._network(network)
        self.reset()

    def _network(self, network: Any) -> Any:
        from kvtiers_packforcing.network import HighResolution

        weights, config = self.settings.weights, self.model.config
        channels, width = config.in_channels, config.num_attention_heads * config.attention_head_dim
        given, found = network is not None, network
        if given:
            source = "given"
        elif weights is None:
            source = "made"
            if self.settings.branches == "hr":
                warnings.warn(
                    "dual-branch with branches='hr' and no weights makes tokens of zeros until it is trained; give "
                    "weights=..., or branches='both'",
                    stacklevel=2,
                )
            with torch.random.fork_rng(devices=[]):  # what the caller draws next is not to depend on this
                found = HighResolution(channels=channels, width=width)
        else:
            source, found = f"of {weights!r}", _read(weights)
        made = (found.config.channels, found.config.width)
        if made != (channels, width):
            raise PolicyError(
                f"the compressor {source} reduces {made[0]} channels to a width of {made[1]}, and this model has "
                f"{channels} and {width}; train or load one for this model"
            )
        if given:
            return found
        # not diffusers' own `to`, which warns of any cast; it moves to its device when a block comes
        return torch.nn.Module.to(found, dtype=self.model.dtype)

    def reset(self) -> None:
        self._last: Tensor | None = None

    def remembered(self) -> dict[str, Tensor]:
        return {} if self._last is None else {"last": self._last}

    def restore(self, remembered: Mapping[str, Tensor]) -> None:
        self._last = remembered.get("last")

    def skip(self, latents: Tensor, pixels: Tensor | None) -> None:
        if self.needs_pixels:
            self._last = _newest(self._admitted(latents, pixels))

    def reduce(
        self,
        latents: Float[Tensor, "batch channels frames height width"],
        pixels: Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"] | None,
    ) -> Reduced:
        high, wide = self.model.config.patch_size[1:]
        steps, grid = latents.shape[2], (latents.shape[3] // high, latents.shape[4] // wide)
        cells = self.settings.cells(steps, grid)
        fine = None if self.network is None else self._high_resolution(latents)
        encoded = self.encoded(self._admitted(latents, pixels), cells[0]) if self.needs_pixels else None
        embedded = None if encoded is None else (encoded.shape[2], encoded.shape[3] // high, encoded.shape[4] // wide)
        for made in (None if fine is None else tuple(fine.shape[2:]), embedded):
            if made not in (None, cells):
                raise PolicyError(
                    f"a branch of dual-branch made {made} cells of a block of {steps} frames of {grid} tokens, "
                    f"expected {cells}; give pixels of exactly this block"
                )
        if self.needs_pixels and pixels is not None:
            self._last = _newest(pixels)
        return Reduced(
            make=partial(self._tokens, fine, encoded),
            offsets=self.settings.offsets(steps, grid).to(latents.device),
            span=self.settings.span(steps),
        )

    def _tokens(self, fine: Tensor | None, encoded: Tensor | None) -> Tensor:
        """The sum of the branches; the model's patch embedding is at hand now."""
        parts = [] if fine is None else [fine]
        if encoded is not None:
            embedding = self.model.patch_embedding
            if not embedding.weight.is_meta:  # else its hooks bring its weights to its input
                encoded = encoded.to(embedding.weight.device)
            with torch.no_grad():
                parts.append(embedding(encoded))
        made: Tensor = sum((part.to(parts[0].device) for part in parts[1:]), parts[0]).flatten(2).transpose(1, 2)
        return made

    def _high_resolution(self, latents: Tensor) -> Tensor:
        network: Any = self.network
        if not any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in network.modules()):
            network.to(latents.device)  # hooks would bring its weights
        made: Tensor = network(latents.to(network.dtype))
        return made

    def encoded(self, pixels: Tensor, frames: int) -> Tensor:
        """The pixels of a block, pooled 4 times in height and width and 2 in time, as normalised latents.

        frames: how many reduced ones are wanted.

        The encoder is causal and makes one latent of its first frame alone: the last frame before the block is put in
        front, and that latent left out. The first block has none before it and begins with such a frame itself.
        """
        small = _small(pixels)
        if self._last is None:
            before, body = adaptive_avg_pool3d(pixels[:, :, :1], (1, *small)), pixels[:, :, 1:]
        else:
            before, body = self._last, pixels
        pooled = torch.cat([before, adaptive_avg_pool3d(body, (4 * frames, *small))], 2)
        with torch.no_grad():
            # what the encoder remembers between frames lies on the object: threads may share the weights, not that
            encoder = copy.copy(self.vae)
            latents = encoder.encode(pooled.to(self.vae.dtype)).latent_dist.mode()[:, :, 1:]
            shape = (1, -1, 1, 1, 1)
            mean, deviation = (
                torch.tensor(numbers, device=latents.device, dtype=latents.dtype).view(shape)
                for numbers in (self.vae.config.latents_mean, self.vae.config.latents_std)
            )
            normal: Tensor = ((latents - mean) / deviation).to(self.model.dtype)
        return normal

    def _admitted(self, latents: Tensor, pixels: Tensor | None) -> Tensor:
        """The pixels, if they can be those of these latents."""
        if pixels is None:
            raise PolicyError("dual-branch was given no pixels of this block; give them, or choose branches='hr'")
        space, time = self.vae.config.scale_factor_spatial, self.vae.config.scale_factor_temporal
        frames = time * latents.shape[2] - (time - 1 if self._last is None else 0)
        want = (latents.shape[0], 3, frames, latents.shape[3] * space, latents.shape[4] * space)
        if pixels.shape != want:
            raise PolicyError(
                f"the pixels of this block are [batch, 3, frames, height, width] = {want}, got {tuple(pixels.shape)}; "
                "decode the video block by block with one StreamingDecoder (only the first latent frame of a video "
                "becomes one frame alone)"
            )
        return pixels


def _read(weights: str) -> Any:
    """The network that `save_pretrained` wrote."""
    from kvtiers_packforcing.network import HighResolution

    try:
        network, about = HighResolution.from_pretrained(weights, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise PolicyError(
            f"no compressor can be read from {weights!r}: {str(error).splitlines()[0]}; give a folder or hub id that "
            "save_pretrained of HighResolution wrote"
        ) from error
    if about["missing_keys"] or about["unexpected_keys"]:
        raise PolicyError(
            f"the weights in {weights!r} are not those of the network that its config.json describes: missing "
            f"{about['missing_keys'][:3]}, unexpected {about['unexpected_keys'][:3]}; save it with save_pretrained"
        )
    return network


def _newest(pixels: Tensor) -> Tensor:
    """The last frame, pooled: the encoder is to see it before the next block."""
    return adaptive_avg_pool3d(pixels[:, :, -1:], (1, *_small(pixels))).detach()


def _small(pixels: Tensor) -> tuple[int, int]:
    """A quarter of the height and width."""
    return pixels.shape[-2] // 4, pixels.shape[-1] // 4
