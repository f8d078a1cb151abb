"""Videos of the tiny world made of prompts, under several memories in lockstep, block by block.

In each block every memory denoises from the same noise, then all of them are decoded as one batch, which an autoencoder
does faster than one after the other, and then each commits its block with its own pixels. What one memory makes never
depends on the others beside it, nor does a row on other rows.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers import GeometryError, PolicyError, bytes_in
from kvtiers_diffusers.streaming_vae import StreamingDecoder
from kvtiers_packforcing.tiny_world.codec import LATENT_CHANNELS, STRIDE, LinearCodec
from kvtiers_packforcing.tiny_world.prompts import embed_walks
from kvtiers_packforcing.tiny_world.sampling import Sampler
from kvtiers_packforcing.tiny_world.variants import Variant
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES, HEIGHT, WIDTH
from kvtiers_packforcing.tiny_world.walks import Walks
from kvtiers_packforcing.tiny_world.weights import Models

LATENT_SHAPE = (LATENT_CHANNELS, BLOCK_FRAMES, HEIGHT // STRIDE[1], WIDTH // STRIDE[2])


@attrs.frozen(eq=False, kw_only=True)
class MadeBlock:
    """A block of every row under one memory. `pixels` are in -1 to 1: 16 frames, and 13 in the first block.

    attended: tokens that the clean pass attended, its own included. Bytes are those held after the commit; what lies on
    a disk counts to the host. seconds: of denoising and committing, and an even share of decoding.
    """

    latents: Float[Tensor, "batch channels frames height width"]
    pixels: Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"]
    attended: int
    device_bytes: int
    host_bytes: int
    seconds: float


class CodecDecoder:
    """The linear codec as a streaming decoder: it costs nothing, and shows latents as they are."""

    def __init__(self, codec: LinearCodec) -> None:
        self.codec, self.began = codec, False

    def decode(
        self, latents: Float[Tensor, "batch channels frames height width"]
    ) -> Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"]:
        """The pixels of the next frames, in -1 to 1."""
        if self.began:  # the codec takes the first latent for one frame, so another is put in front
            pixels = self.codec.decode(torch.cat((latents[:, :, :1], latents), 2))[:, :, 1:]
        else:
            pixels, self.began = self.codec.decode(latents), True
        return pixels.clamp(-1, 1)


def make_videos(
    models: Models,
    chosen: Sequence[Variant],
    walks: Walks,
    *,
    seeds: Sequence[int] | None = None,
    sampler: Sampler | None = None,
    decoder: Literal["autoencoder", "codec"] = "autoencoder",
) -> Generator[Mapping[str, MadeBlock]]:
    """Block after block of one video for each walk, under each memory, by its name.

    seeds: of the noise of each row; none: 0, 1, 2, ... decoder: `codec` decodes with the linear codec instead.

    The transformer is given back as it was when the last block is made, or when the iterator is closed.
    """
    rows = len(walks.rooms)
    seeds = range(rows) if seeds is None else seeds
    names = [variant.name for variant in chosen]
    if not names or len(set(names)) < len(names):
        raise PolicyError(f"give at least one memory, and each name once, got {names}")
    if len(seeds) != rows:
        raise GeometryError(f"there is one seed for each of the {rows} walks, got {len(seeds)}")
    decodes: Any = (
        StreamingDecoder(models.autoencoder) if decoder == "autoencoder" else CodecDecoder(LinearCodec.load())
    )
    return _made(models, chosen, embed_walks(walks), seeds, sampler or Sampler(), decodes)


@torch.no_grad()
def _made(
    models: Models, chosen: Sequence[Variant], text: Tensor, seeds: Sequence[int], sampler: Sampler, decoder: Any
) -> Generator[Mapping[str, MadeBlock]]:
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    with ExitStack() as stack:
        wans = {variant.name: stack.enter_context(variant.remember(models)) for variant in chosen}
        for words in text.unbind(1):
            noises = [
                torch.stack([torch.randn(LATENT_SHAPE, generator=draw) for draw in draws])
                for _ in range(sampler.noises)
            ]
            latents, seconds = {}, {}
            for name, wan in wans.items():
                began = time.perf_counter()
                latents[name] = sampler.denoise(wan, noises, words)
                seconds[name] = time.perf_counter() - began
            began = time.perf_counter()
            pixels = dict(zip(wans, decoder.decode(torch.cat(list(latents.values()))).split(len(draws)), strict=True))
            share = (time.perf_counter() - began) / len(wans)
            for name, wan in wans.items():
                began = time.perf_counter()
                wan.commit(latents[name], words, pixels=pixels[name])
                seconds[name] += share + time.perf_counter() - began
            yield {name: _report(wan, latents[name], pixels[name], seconds[name]) for name, wan in wans.items()}


def _report(wan: Any, latents: Tensor, pixels: Tensor, seconds: float) -> MadeBlock:
    held = wan.memory_usage()
    return MadeBlock(
        latents=latents,
        pixels=pixels,
        attended=max(wan.attended()),
        device_bytes=bytes_in(held, "device"),
        host_bytes=bytes_in(held, "host") + bytes_in(held, "disk"),
        seconds=seconds,
    )
