"""A transformer and its compressor over whole clips of generated latents, as they run behind a cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers_diffusers.causal_wan import CausalWan, tiered
from kvtiers_packforcing.dual_branch import DualBranch
from kvtiers_packforcing.training.layout import Layout
from kvtiers_packforcing.training.packed import PackedWan, packed
from kvtiers_packforcing.training.precision import uncompiled
from kvtiers_packforcing.training.sharding import gathered


def high_resolution(
    compressor: Any,
    clean: Float[Tensor, "batch channels frames height width"],
    count: int,
    blocks: Sequence[int],
) -> Float[Tensor, "batch compressed reduced_tokens token_width"]:
    """The tokens of a compressor's high-resolution branch, of some of the `count` blocks of clean latents.

    On a CPU not in mixed precision: there torch 2.13 leaves NaN in the gradient of a strided 3D convolution in bfloat16
    (oneDNN, with AVX-512 and without AMX).
    """
    cut = clean.unflatten(2, (count, -1))[:, :, blocks].transpose(1, 2).flatten(0, 1)
    with torch.autocast("cpu", enabled=False):
        tokens = compressor(cut).flatten(2).transpose(1, 2)
    found: Tensor = tokens.unflatten(0, (len(clean), len(blocks)))
    return found


@attrs.frozen(eq=False, kw_only=True)
class CausalClips:
    """What predicts clips block by block: a transformer, the HR branch of its compressor, and the layout of its past.

    The same prediction has two forms, and tests show that they agree: `cached`, through a cache without gradients, and
    `predict`, all blocks in one forward. Neither looks at what is later than a block.
    """

    transformer: Any
    compressor: Any
    layout: Layout

    @contextmanager
    def cached(self, block_frames: int, blocks: int, vae: Any = None) -> Iterator[CausalWan]:
        """A cache whose tiers are the layout's. vae: for the compressor's low-resolution branch."""
        options: dict[str, Any] = {
            "sink": self.layout.sink_blocks * block_frames,
            "recent": self.layout.recent_blocks * block_frames,
            "top_k": max(1, blocks),
            "branches": "hr" if vae is None else "both",
        }
        with (
            torch.no_grad(),
            uncompiled(),
            tiered(self.transformer, "packforcing", vae=vae, compressor_network=self.compressor, **options) as wan,
        ):
            yield wan

    @contextmanager
    def packed(self, *, detach_history: bool = False) -> Iterator[PackedWan]:
        """What `predict` runs in; backward passes belong inside of the block."""
        with packed(self.transformer, self.layout, detach_history=detach_history) as wan:
            yield wan

    def predict(
        self,
        wan: PackedWan,
        clean: Float[Tensor, "batch channels frames height width"],
        noisy: Float[Tensor, "batch streams channels frames height width"],
        sigmas: Float[Tensor, "batch streams blocks"],
        text: Float[Tensor, "batch *streams blocks words text_width"],
        low: Float[Tensor, "batch compressed channels low_frames low_height low_width"] | None = None,
    ) -> Float[Tensor, "batch streams channels frames height width"]:
        """The flow of noisy streams, given the clean past of each block.

        text: of each block, or of each block of each stream, that of the past first. low: what `low_resolution` found.
        """
        count = sigmas.shape[2]
        blocks = self.layout.compressed(count)
        more: dict[str, Any] = {}
        if blocks:
            tokens = high_resolution(self.compressor, clean, count, blocks)
            if low is not None:
                tokens = tokens + self._embedded(low)
            _, high, wide = self.transformer.config.patch_size
            grid = (clean.shape[3] // high, clean.shape[4] // wide)
            more = {"reduced": tokens, "offsets": DualBranch().offsets(clean.shape[2] // count, grid)}
        told = torch.cat((torch.zeros_like(sigmas[:, :1]), sigmas), 1)
        return wan(torch.cat((clean[:, None], noisy), 1), told, text, **more)[:, 1:]

    @torch.no_grad()
    def _embedded(self, low: Tensor) -> Tensor:
        # not in mixed precision, which would keep the embedding's weights for what follows, without their gradient
        with gathered(self.transformer), torch.autocast(low.device.type, enabled=False):
            tokens = self.transformer.patch_embedding(low.flatten(0, 1)).flatten(2).transpose(1, 2)
        embedded: Tensor = tokens.unflatten(0, low.shape[:2])
        return embedded

    @torch.no_grad()
    def low_resolution(
        self,
        latents: Float[Tensor, "batch channels frames height width"],
        pixels: Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"],
        count: int,
        vae: Any,
    ) -> Float[Tensor, "batch compressed channels low_frames low_height low_width"] | None:
        """Pooled and encoded frames of the blocks that the layout compresses: the same for every transformer.

        pixels: of all frames; the first latent frame stands for one, the others for four each.
        """
        wanted, length = self.layout.compressed(count), latents.shape[2] // count
        if not wanted:
            return None
        reducer = DualBranch(branches="lr").bind(self.transformer, vae)
        scale, found = vae.config.scale_factor_temporal, []
        for nth in range(wanted[-1] + 1):
            seen = pixels[:, :, max(0, (nth * length - 1) * scale + 1) : ((nth + 1) * length - 1) * scale + 1]
            if nth in wanted:
                found.append(reducer.encoded(seen, length // 2))
            reducer.skip(latents[:, :, nth * length : (nth + 1) * length], seen)
        return torch.stack(found, 1)
