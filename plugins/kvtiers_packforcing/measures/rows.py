"""Rows of a table of results: a name, and how its videos are made. Policies are rows, and truth, codec and damages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers_packforcing.measures.damages import DAMAGES
from kvtiers_packforcing.measures.results import Results
from kvtiers_packforcing.measures.visits import MeasureError
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, Houses, LinearCodec, Walks, render

Seed = int | str
Chunk = Float[Tensor, "1 3 frames height width"]


@attrs.frozen(kw_only=True)
class Row:
    """A named way to make a video. `make(seed, walk)` yields its pixels in -1 to 1, in chunks of frames in order.

    walk: one walk, whose prompts the video is to show. seed: of the noise, and of the house where there is a true one.
    """

    name: str
    make: Callable[[Seed, Walks], Iterable[Chunk]]


def measure_rows(
    rows: Sequence[Row],
    walks: Sequence[tuple[Seed, Walks]],
    results: Results,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Make and measure the video of every row and walk. `done` is called after each."""
    for seed, walk in walks:
        for row in rows:
            results.add(row.name, torch.cat(list(row.make(seed, walk)), 2), walk)
            done()


def truth() -> Row:
    """The true video: the house of the seed, drawn."""
    return Row(name="truth", make=lambda seed, walk: iter([drawn(seed, walk)]))


def codec(autoencoder: Path | None = None) -> Row:
    """The true video, passed through the codec: the ceiling of all figures. Without a folder: the linear codec."""
    through = _linear() if autoencoder is None else _autoencoder(autoencoder)
    return Row(name="codec", make=lambda seed, walk: iter([through(drawn(seed, walk))]))


def damaged(name: str, strength: float) -> Row:
    """The true video, with a damage of `DAMAGES`."""
    damage, _ = DAMAGES[name]

    def make(seed: Seed, walk: Walks) -> Iterator[Chunk]:
        yield damage(drawn(seed, walk), walk, strength)

    return Row(name=f"{name} {strength:g}", make=make)


def drawn(seed: Seed, walk: Walks) -> Chunk:
    """The walk through the house of a seed."""
    return render(Houses.of_seeds([seed]), walk, torch.arange(FIRST_FRAME, walk.blocks * FRAMES_PER_BLOCK)[None])


def _linear() -> Callable[[Chunk], Chunk]:
    linear = LinearCodec.load()
    return lambda pixels: linear.decode(linear.encode(pixels))


def _autoencoder(folder: Path) -> Callable[[Chunk], Chunk]:
    if not (folder / "config.json").is_file():
        raise MeasureError(
            f"--autoencoder: {folder} holds no autoencoder of diffusers (no config.json); give the folder of one, or "
            "leave it out for the linear codec"
        )
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan.from_pretrained(folder).eval()

    @torch.no_grad()
    def through(pixels: Chunk) -> Chunk:
        decoded: Tensor = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        return decoded

    return through
