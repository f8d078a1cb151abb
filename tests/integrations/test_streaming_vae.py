"""Decoding and encoding block by block: slices and tiles, failures that are undone, threads that share the weights."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from torch import Tensor

from kvtiers import GeometryError
from kvtiers_diffusers import StreamingDecoder, tiered
from kvtiers_diffusers.encoding import encoded
from kvtiers_packforcing import DualBranch
from tiny_wan import blocks, build, prompt, vae


def scaled(autoencoder: Any, latents: Tensor) -> Tensor:
    """Latents as the autoencoder itself takes them."""
    mean, deviation = (
        torch.tensor(numbers).view(1, -1, 1, 1, 1)
        for numbers in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )
    return latents * deviation + mean


def tiles(autoencoder: Any) -> Any:
    """`autoencoder`, which decodes in tiles of 3 x 4 latents that overlap by 1."""
    autoencoder.enable_tiling(24, 32, 16, 24)
    return autoencoder


def slices(autoencoder: Any) -> Any:
    """`autoencoder`, which decodes each row alone."""
    autoencoder.enable_slicing()
    return autoencoder


class FailsAt:
    """A hook on a module that raises at one call."""

    def __init__(self, module: torch.nn.Module, call: int) -> None:
        self.left = call
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            self.handle.remove()
            raise MemoryError("no room")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((tiles,), id="tiles"),
        pytest.param((slices,), id="slices"),
        pytest.param((tiles, slices), id="tiles of slices"),
    ],
)
@torch.no_grad()
def test_a_streamed_decode_is_sliced_and_tiled_as_the_whole_decode(settings: Any) -> None:
    autoencoder = vae()
    (latents,) = blocks(1, frames=3, high=4, wide=6, rows=2)
    plain = autoencoder.decode(scaled(autoencoder, latents)).sample
    for setting in settings:
        setting(autoencoder)
    whole = autoencoder.decode(scaled(autoencoder, latents)).sample
    assert torch.allclose(whole, plain, atol=1e-5) == (tiles not in settings)
    calls: list[tuple[int, ...]] = []
    handle = autoencoder.decoder.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    decoder = StreamingDecoder(autoencoder)
    pieces = []
    for part in latents.split([1, 2], 2):
        pieces.append(decoder.decode(part))
        other = StreamingDecoder(autoencoder)
        other.restore(decoder.remembered())  # what a file holds is enough to go on
        decoder = other
    handle.remove()
    assert torch.allclose(torch.cat(pieces, 2), whole, atol=1e-5)
    assert {shape[0] for shape in calls} == {1 if slices in settings else 2}
    assert max(shape[4] for shape in calls) == (4 if tiles in settings else 6)


def test_another_video_or_setting_in_the_middle_of_one_is_refused_and_nothing_changes() -> None:
    autoencoder, clips = vae(), blocks(2)
    wanted = StreamingDecoder(autoencoder)
    wanted.decode(clips[0])
    decoder = StreamingDecoder(autoencoder)
    decoder.decode(clips[0])
    for wrong, message in (
        (blocks(1, rows=2)[0], r"rows, height and width \(1, 4, 6\), got latents of \(2, 4, 6\)"),
        (blocks(1, wide=8)[0], r"got latents of \(1, 4, 8\)"),
        (clips[0][:, :4], "decodes latents of .*16, frames.* got .1, 4, 2"),
    ):
        with pytest.raises(GeometryError, match=message):
            decoder.decode(wrong)
    autoencoder.enable_tiling(16, 16, 8, 8)
    with pytest.raises(GeometryError, match="switched in the middle of a video"):
        decoder.decode(clips[1])
    held = decoder.remembered()
    one = {"0.1": torch.zeros(1)}
    many = torch.tensor([10**12, 4, 6, 1, 4, 6, 4, 6])  # a file that asks for more than there is room for
    for crafted, message in (
        (one, "does not say how"),
        ({**one, "cut": many}, "not the 1000000000000 that"),
        ({**held, "0.-1": torch.zeros(1)}, "no convolution -1"),
        ({**held, "1.0": torch.zeros(1)}, "not the 1 that"),
        ({**held, "cut": torch.zeros(8, dtype=torch.long)}, "must not be zero"),
    ):
        with pytest.raises((ValueError, IndexError), match=message):
            decoder.restore(crafted)
    autoencoder.disable_tiling()
    assert torch.equal(decoder.decode(clips[1]), wanted.decode(clips[1]))


@pytest.mark.parametrize(("call", "setting"), [(1, slices), (2, slices), (3, tiles)])
def test_a_decode_that_fails_can_be_repeated(call: int, setting: Any) -> None:
    autoencoder, clips = setting(vae()), blocks(3, frames=2)
    wanted, decoder = StreamingDecoder(autoencoder), StreamingDecoder(autoencoder)
    for number, clip in enumerate(clips):
        FailsAt(autoencoder.decoder, call)
        with pytest.raises(MemoryError):
            decoder.decode(clip)
        assert bool(decoder.remembered()) == bool(number)
        assert torch.equal(decoder.decode(clip), wanted.decode(clip))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@torch.no_grad()
def test_what_compresses_pixels_is_as_it_was_after_a_failure(part: str) -> None:
    """The reducer by itself, and the sources of a video without the commit around them."""
    model, autoencoder, clips = build(), vae(), blocks(2, high=8, wide=8)
    where = getattr(autoencoder, part)
    options = {"vae": autoencoder, "compressor": ("dual-branch", {"branches": "lr"}), "sink": 0, "recent": 2}
    found: dict[str, list[Tensor]] = {}
    for way in ("wanted", "repeated"):
        with tiered(model, "packforcing", **options) as wan:
            wan.denoise(clips[0], 900.0, prompt())
            assert wan.cache is not None
            found[way] = []
            for clip in clips:
                if way == "repeated":
                    FailsAt(where, 1)
                    with pytest.raises(MemoryError):
                        wan.sources.reduce(clip, None, wan.cache)
                reduced = wan.sources.reduce(clip, None, wan.cache)
                assert reduced is not None
                found[way].append(reduced.tokens)
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
    assert not torch.equal(found["wanted"][1], found["wanted"][0])
    reducer, decoder = DualBranch(branches="lr").bind(model, autoencoder), StreamingDecoder(autoencoder)
    for clip, tokens in zip(clips, found["wanted"], strict=True):
        pixels = decoder.decode(clip)
        if part != "decoder":
            FailsAt(where, 1)
            with pytest.raises(MemoryError):
                reducer.reduce(clip, pixels)
        assert torch.equal(reducer.reduce(clip, pixels).tokens, tokens)


@torch.no_grad()
def test_threads_that_share_an_autoencoder_make_the_videos_that_one_thread_makes() -> None:
    """They share a transformer too; other threads decode and encode pixels with the same weights meanwhile."""
    autoencoder, films = vae(), [blocks(2, high=8, wide=8, seed=seed) for seed in range(2)]
    models = [build()] * len(films)
    options: dict[str, Any] = {"compressor": ("dual-branch", {"branches": "lr"}), "sink": 0, "recent": 2}

    def flows(model: Any, clips: list[Tensor]) -> Tensor:
        with torch.no_grad(), tiered(model, "packforcing", vae=autoencoder, **options) as wan:
            return torch.stack([wan.commit(clip, prompt()) for clip in clips])

    def frames(clips: list[Tensor]) -> Tensor:
        decoder = StreamingDecoder(autoencoder)
        pixels = torch.cat([decoder.decode(clip) for clip in clips], 2)
        return encoded(autoencoder, pixels)

    alone = [(flows(model, clips), frames(clips)) for model, clips in zip(models, films, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        videos, latents = pool.map(flows, models, films), pool.map(frames, films)
        for (one, other), flow, latent in zip(alone, videos, latents, strict=True):
            assert torch.allclose(flow, one, atol=1e-5)
            assert torch.allclose(latent, other, atol=1e-5)


@pytest.mark.parametrize("how", ["leaf_level", "block_level", "accelerate", "accelerate, layer by layer"])
@torch.no_grad()
def test_an_autoencoder_that_is_kept_elsewhere_decodes_and_encodes_the_same(how: str, tmp_path: Path) -> None:
    plain, other, clips, cpu = vae(), vae(), blocks(2), torch.device("cpu")
    if how == "accelerate":
        cpu_offload_with_hook(other, execution_device=cpu)
    elif how.startswith("accelerate"):
        cpu_offload(other, execution_device=cpu)
    else:
        groups = {"num_blocks_per_group": 1} if how == "block_level" else {}
        other.enable_group_offload(cpu, offload_type=how, offload_to_disk_path=str(tmp_path), **groups)
    found = []
    for one in (plain, other):
        decoder = StreamingDecoder(one)
        pixels = torch.cat([decoder.decode(clip) for clip in clips], 2)
        found.append((pixels, encoded(one, pixels)))
    for wanted, got in zip(*found, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("setting", [lambda one: one, tiles, slices], ids=["whole", "tiles", "slices"])
@torch.no_grad()
def test_pixels_are_encoded_as_the_autoencoder_does_and_normalised(setting: Any) -> None:
    autoencoder = setting(vae())
    pixels = torch.rand(2, 3, 5, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = autoencoder.encode(pixels).latent_dist.mode()
    assert torch.allclose(scaled(autoencoder, encoded(autoencoder, pixels)), wanted, atol=1e-5)
