"""What sees every clean block of a video in turn: the policy's own compressor, and the decoder that gives it pixels."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvtiers import Compressor, GeometryError, TieredCache
from kvtiers_diffusers.reducing import Reduced, Reducer, Reduces
from kvtiers_diffusers.streaming_vae import StreamingDecoder


class Sources:
    """Makes the reduced tokens of clean blocks, where a policy compresses them before the model sees them.

    Both of its parts remember something of the blocks before, so that blocks must come in order; `remembered` and
    `restore` take a block back.
    """

    def __init__(self, compressor: Compressor, transformer: Any, vae: Any, network: Any) -> None:
        self.decoder = None if vae is None else StreamingDecoder(vae)
        self.reducer: Reducer | None = None
        """None if the policy does not compress before the model."""
        if compressor.given and isinstance(compressor, Reduces):
            self.reducer = compressor.bind(transformer, vae, network)
        self.given: bool | None = None
        """Whether this video's pixels are given with its blocks; None before the first."""
        self.frames = 0
        """Latent frames that were seen."""

    @property
    def needs_pixels(self) -> bool:
        return self.reducer is not None and self.reducer.needs_pixels

    def reduce(self, block: Tensor, pixels: Tensor | None, cache: TieredCache) -> Reduced | None:
        """The reduced tokens of the clean block that follows what `cache` remembers; None if nobody asks for them.

        If a part fails, all of them are as they were.
        """
        if self.reducer is None:
            return None
        before, given = self.remembered(), self.given
        try:
            if self.needs_pixels:
                self._check(pixels, cache.committed_steps)
                if pixels is None and self.decoder is not None:
                    pixels = self.decoder.decode(block)
            if _is_anchor(cache, block.shape[2]):
                self.reducer.skip(block, pixels)
                return None
            return self.reducer.reduce(block, pixels)
        except BaseException:
            self.restore(before)
            self.given = given
            raise

    def _check(self, pixels: Tensor | None, frames: int) -> None:
        """Refuse what would let the compressor see another video than the one that is remembered."""
        if self.frames != frames:
            raise GeometryError(
                f"this video has {frames} frames, and the compressor has seen the pixels of {self.frames}; go "
                "back with crop(), fork() or load() of the CausalWan, not of its cache"
            )
        if self.given is not None and self.given != (pixels is not None):
            raise GeometryError(
                f"the blocks before came with{'' if self.given else 'out'} pixels and this one "
                f"{'without' if self.given else 'with them'}; give them with every block of a video, or with none"
            )
        self.given = pixels is not None

    def remembered(self) -> dict[str, Tensor]:
        """What compressing and decoding depend on of the blocks before."""
        return {f"{name}.{key}": x for name, part in self._parts() for key, x in part.remembered().items()}

    def restore(self, remembered: Mapping[str, Tensor]) -> None:
        """Go on from what `remembered` gave. If a part refuses it, all of them are as they were."""
        before = [(part, part.remembered()) for _, part in self._parts()]
        try:
            for name, part in self._parts():
                start = f"{name}."
                part.restore({key.removeprefix(start): x for key, x in remembered.items() if key.startswith(start)})
        except BaseException:
            for part, held in before:
                part.restore(held)
            raise

    def fork(self) -> "Sources":
        """The same parts for another video that goes on from here."""
        other = copy.copy(self)
        other.reducer, other.decoder = copy.copy(self.reducer), copy.copy(self.decoder)
        other.restore(self.remembered())
        return other

    def reset(self) -> None:
        """Another video begins."""
        self.given, self.frames = None, 0
        for _, part in self._parts():
            part.reset()

    def _parts(self) -> list[tuple[str, Any]]:
        parts = (("reducer", self.reducer), ("decoder", self.decoder))
        return [(name, part) for name, part in parts if part is not None]


def _is_anchor(cache: TieredCache, frames: int) -> bool:
    """Whether a block of `frames` frames, committed now, is an anchor in every layer."""
    stop = cache.committed_steps + frames
    for policy, geometry, rows in zip(cache.policies, cache.geometries, cache.layers, strict=True):
        timeline = next((layer.timeline for layer in rows.layers()), policy.timeline(geometry))
        if policy.extended(timeline, stop).sink != stop:
            return False
    return True
