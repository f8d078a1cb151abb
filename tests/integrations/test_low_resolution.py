"""The LR branch of `dual-branch` by hand: pixels are pooled, encoded behind the frame before, normalised, embedded."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from torch import Tensor

from kvtiers_diffusers import tiered
from kvtiers_packforcing import DualBranch
from tiny_wan import blocks, build, prompt, vae

GRIDS = [
    pytest.param((4, 4), id="one cell"),
    pytest.param((8, 4), id="two cells"),
    pytest.param((5, 11), id="odd sizes"),
]
LENGTHS = [3, 4, 5]


def film(count: int, grid: tuple[int, int], *, rows: int = 1) -> Tensor:
    """Random pixels of `count` frames, [rows, 3, count, 16 x tokens, 16 x tokens], brighter from frame to frame."""
    shape = (rows, 3, count, 16 * grid[0], 16 * grid[1])
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) - 0.5
    return noise + torch.linspace(-0.5, 0.5, count).view(1, 1, -1, 1, 1)


def shrunk(pixels: Tensor) -> Tensor:
    """The means of squares of 4 x 4 pixels."""
    return pixels.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4)).mean((-3, -1))


def shortened(pixels: Tensor, count: int) -> Tensor:
    """`count` frames, each the mean of those that it overlaps with."""
    frames, of = [], pixels.shape[2]
    for number in range(count):
        first, stop = number * of // count, -(-(number + 1) * of // count)
        frames.append(sum(pixels[:, :, frame] for frame in range(first, stop)) / (stop - first))
    return torch.stack(frames, 2)


def by_hand(
    model: Any,
    autoencoder: Any,
    before: Tensor,
    pixels: Tensor,
    frames: int,
    *,
    left_out: int = 0,
    normalised: bool = True,
) -> Tensor:
    """The tokens of a block of `pixels` behind one frame `before`, as `frames` reduced ones.

    left_out: which of the encoded frames is not the block's.
    """
    seen = torch.cat([shrunk(before), shortened(shrunk(pixels), 4 * frames)], 2)
    latents = autoencoder.encode(seen).latent_dist.mode()
    latents = torch.stack([latents[:, :, n] for n in range(frames + 1) if n != left_out % (frames + 1)], 2)
    if normalised:
        config = autoencoder.config
        for channel, (mean, deviation) in enumerate(zip(config.latents_mean, config.latents_std, strict=True)):
            latents[:, channel] = (latents[:, channel] - mean) / deviation
    embedded: Tensor = model.patch_embedding(latents)
    return embedded.flatten(2).transpose(1, 2)


def pieces(pixels: Tensor, steps: int) -> list[Tensor]:
    """The frames of each block of `steps` latent frames: of the first latent frame of all one, of others four."""
    return [pixels[:, :, max(0, 4 * first - 3) : 4 * (first + steps) - 3] for first in range(0, 3 * steps, steps)]


def behind(parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The frame before each block, and the block's own; the first block has none before and gives one of its own."""
    yield parts[0][:, :, :1], parts[0][:, :, 1:]
    for before, pixels in pairwise(parts):
        yield before[:, :, -1:], pixels


def reduced(steps: int, grid: tuple[int, int], *, rows: int = 1) -> tuple[Any, Any, list[Tensor], list[Tensor]]:
    """A model, an autoencoder, three blocks of pixels, and the tokens that the branch makes of each; in float64."""
    model, autoencoder = build().double(), vae().double()
    reducer = DualBranch(branches="lr").bind(model, autoencoder)
    parts = pieces(film(12 * steps - 3, grid, rows=rows), steps)
    latents = torch.zeros(rows, 16, steps, 2 * grid[0], 2 * grid[1])
    return model, autoencoder, parts, [reducer.reduce(latents, part).tokens for part in parts]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", LENGTHS)
@torch.no_grad()
def test_a_block_is_encoded_behind_the_last_frame_before_it_and_the_first_behind_its_own_first(
    steps: int, grid: tuple[int, int]
) -> None:
    model, autoencoder, parts, found = reduced(steps, grid, rows=2)
    frames = steps // 2
    for (before, pixels), tokens in zip(behind(parts), found, strict=True):
        assert tokens.shape == (2, frames * (grid[0] // 4) * (grid[1] // 4), 48)
        assert (tokens - by_hand(model, autoencoder, before, pixels, frames)).abs().max() < 1e-9


@pytest.mark.parametrize(
    "off",
    [
        pytest.param(lambda before, _: {"before": torch.zeros_like(before[:, :, -1:])}, id="black before it"),
        pytest.param(lambda before, _: {"before": before[:, :, -2:-1]}, id="a frame earlier before it"),
        pytest.param(lambda _, pixels: {"before": pixels[:, :, :1]}, id="its own first frame before it"),
        pytest.param(lambda _, pixels: {"before": pixels[:, :, -1:]}, id="its own last frame before it"),
        pytest.param(lambda _, pixels: {"pixels": pixels[:, :, :1].expand_as(pixels)}, id="only its first frame"),
        pytest.param(lambda _, pixels: {"pixels": pixels[:, :, :-1]}, id="a frame too few"),
        pytest.param(lambda _, pixels: {"pixels": pixels.flip(2)}, id="backwards"),
        pytest.param(lambda _, pixels: {"pixels": pixels.roll(1, -1)}, id="a pixel aside"),
        pytest.param(lambda *_: {"left_out": -1}, id="the last latent left out"),
        pytest.param(lambda *_: {"normalised": False}, id="not normalised"),
    ],
)
@torch.no_grad()
def test_the_oracle_notices_another_frame_pixel_or_scale(off: Callable[[Tensor, Tensor], dict[str, Any]]) -> None:
    model, autoencoder, (_, before, pixels), (*_, tokens) = reduced(4, (4, 4))
    given = {"before": before[:, :, -1:], "pixels": pixels, **off(before, pixels)}
    wrong = by_hand(model, autoencoder, frames=2, **given)
    assert (tokens - wrong).abs().max() > 1e-4


@pytest.mark.parametrize("steps", LENGTHS)
@torch.no_grad()
def test_a_block_that_passes_by_is_the_one_before(steps: int) -> None:
    model, autoencoder, parts, (first, *others) = reduced(steps, (4, 4))
    reducer = DualBranch(branches="lr").bind(model, autoencoder)
    latents = torch.zeros(1, 16, steps, 8, 8)
    reducer.skip(latents, parts[0])
    for part, tokens in zip(parts[1:], others, strict=True):
        assert torch.equal(reducer.reduce(latents, part).tokens, tokens)
    reducer.reset()
    assert torch.equal(reducer.reduce(latents, parts[0]).tokens, first)


@pytest.mark.parametrize(("steps", "sink"), [(3, 0), (4, 1), (5, 0)])
@torch.no_grad()
def test_the_model_is_given_the_tokens_of_what_a_whole_decode_of_the_video_shows(steps: int, sink: int) -> None:
    """Through `commit`, with an anchor or without one: what stands behind a block's own tokens in its clean pass."""
    model, autoencoder, clips = build(), vae(), blocks(3, frames=steps, high=8, wide=8)
    mean, deviation = (
        torch.tensor(numbers).view(1, -1, 1, 1, 1)
        for numbers in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )
    whole = autoencoder.decode(torch.cat(clips, 2) * deviation + mean).sample
    given: list[Tensor] = []
    compressor = ("dual-branch", {"branches": "lr"})
    with tiered(model, "packforcing", vae=autoencoder, compressor=compressor, sink=sink, recent=steps) as wan:
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
        for clip in clips:
            wan.commit(clip, prompt())
        handle.remove()
    own = 16 * steps
    assert [hidden.shape[1] - own for hidden in given] == [0 if sink else steps // 2, steps // 2, steps // 2]
    for (before, pixels), hidden in list(zip(behind(pieces(whole, steps)), given, strict=True))[sink:]:
        want = by_hand(model, autoencoder, before, pixels, steps // 2)
        assert (hidden[:, own:] - want).abs().max() < 1e-5
