"""A video that begins with an image or any clip is the one whose memory was given these latents by hand."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from PIL import Image
from torch import Tensor

from kvtiers import GeometryError, NotFiniteError, PolicyError
from kvtiers_diffusers import StreamingDecoder, tiered
from kvtiers_diffusers.schedule import clean, noised, warped
from strategies import unchecked
from tiny_pipeline import SMALL, pipeline, seeded
from tiny_wan import blocks, build, prompt, vae

LATENT: dict[str, Any] = {**SMALL, "output_type": "latent"}
PACKED: dict[str, Any] = {"policy": "packforcing", "compressor": ("dual-branch", {"branches": "lr"}), "top_k": 2}


def film(frames: int, *, rows: int = 1) -> Tensor:
    """Random bytes, [rows, frames, 3, 64, 64]."""
    shape = (rows, frames, 3, 64, 64)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def encoded(pixels: Tensor) -> Tensor:
    """Normalised latents of [rows, frames, 3, height, width] bytes, by diffusers' own encoder."""
    autoencoder = vae()
    found = autoencoder.encode((pixels.float() / 127.5 - 1).transpose(1, 2)).latent_dist.mode()
    mean, deviation = (
        torch.tensor(numbers).view(1, -1, 1, 1, 1)
        for numbers in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )
    return (found - mean) / deviation


@torch.no_grad()
def by_hand(parts: list[Tensor], *, count: int, even: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """The latents and pixels of `count` blocks of 2 frames that follow the committed `parts`."""
    random, text, schedule, found = seeded(), prompt(rows=parts[0].shape[0]), warped((1000, 500), 5.0), []
    decoder, policy = StreamingDecoder(vae()), options.pop("policy")
    with tiered(build(), policy, vae=vae(), block_frames=2, even=even, **options) as wan:
        for part in parts:
            wan.commit(part, text, decoder.decode(part))
        pixels = []
        for _ in range(count):
            noises = [torch.randn(len(text), 16, 2, 8, 8, generator=random) for _ in range(2)]
            block = clean(noises[0], wan.denoise(noises[0], 1000.0, text), 1000.0)
            noisy = noised(block, noises[1], schedule[1])
            block = clean(noisy, wan.denoise(noisy, schedule[1], text), schedule[1])
            found.append(block)
            pixels.append(decoder.decode(block))
            wan.commit(block, text, pixels[-1])
    return torch.cat(found, 2), torch.cat(pixels, 2).transpose(1, 2) / 2 + 0.5


@pytest.mark.parametrize("policy", ["sink-rolling-window", pytest.param("packforcing", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("latents", "lengths"), [(1, [1]), (2, [2]), (3, [1, 2])])
def test_a_video_from_frames_is_the_one_that_committed_their_latents(
    policy: str, latents: int, lengths: list[int]
) -> None:
    packed = policy == "packforcing"
    settings = {"policy": policy, "sink": 2, "recent": 2, **(PACKED if packed else {})}
    pixels, count = film(4 * latents - 3), 4 if packed else 2
    options: dict[str, Any] = {**SMALL, **settings, "num_frames": 8 * count, "prompt_embeds": prompt()}
    parts = list(encoded(pixels).split(lengths, 2))
    wanted, seen = by_hand(parts, count=count, even=len(lengths) == 1 and lengths != [1], **settings)
    made = pipeline()
    found = made(clip=pixels, generator=seeded(), output_type="latent", **options).frames
    assert torch.allclose(found, wanted, atol=1e-5)
    shown = made(clip=torch.cat(parts, 2), generator=seeded(), output_type="pt", **options).frames
    assert torch.allclose(shown, seen, atol=1e-5)
    other, _ = by_hand([part.flip(-1) for part in parts], count=1, even=latents == 2, **settings)
    assert not torch.allclose(found[:, :, :2], other, atol=1e-3), "the oracle does not notice another clip"


def picture(pixels: Tensor) -> Image.Image:
    """[3, height, width] of bytes as a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def test_an_image_or_a_clip_may_be_given_in_every_form_that_a_stream_gives() -> None:
    made, pixels = pipeline(), film(5, rows=2)
    options: dict[str, Any] = {**LATENT, "num_frames": 8, "prompt_embeds": prompt(rows=2)}
    arrays = pixels.permute(0, 1, 3, 4, 2).numpy()
    pictures = [[picture(frame) for frame in row] for row in pixels]
    forms: list[Any] = [pixels, pixels / 255, arrays, arrays / 255, pictures, [list(row) for row in pixels]]
    wanted = made(clip=encoded(pixels), generator=seeded(), **options).frames
    for form in forms:
        assert torch.allclose(made(clip=form, generator=seeded(), **options).frames, wanted, atol=1e-5)
    options["num_frames"] = 4
    wanted = made(clip=encoded(pixels[:1, :1]), generator=seeded(), **options).frames  # one for both rows
    one = pixels[0, 0]
    for form in (one, one[None], one / 255, arrays[0, 0], pictures[0][0], [pictures[0][0]]):
        assert torch.allclose(made(image=form, generator=seeded(), **options).frames, wanted, atol=1e-5)
    each = made(image=[row[0] for row in pictures], generator=seeded(), **options).frames
    assert torch.allclose(each, made(image=pixels[:, 0], generator=seeded(), **options).frames, atol=1e-5)
    assert torch.allclose(each[0], wanted[0], atol=1e-5)
    assert not torch.allclose(each[1], wanted[1], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"clip": film(4)}, GeometryError, "1 . 4n frames, .* got 4; cut it to 1", id="four"),
        pytest.param({"clip": film(7)}, GeometryError, "got 7; cut it to 5", id="seven"),
        pytest.param({"clip": film(5), "image": film(1)[0]}, PolicyError, "image or clip, one of them", id="both"),
        pytest.param({"clip": film(5)[..., :32]}, GeometryError, r"\(64, 64\), got 3 colours, \(64, 32\)", id="size"),
        pytest.param({"clip": film(5)[0]}, GeometryError, r"a clip is latents .* got \(5, 3, 64, 64\)", id="no rows"),
        pytest.param({"clip": film(5, rows=2)}, GeometryError, "1 rows of prompts and 2 of clips", id="rows"),
        pytest.param({"clip": film(5).float()}, GeometryError, "0 to 1, or uint8", id="0 to 255"),
        pytest.param({"clip": film(5) / 255 * torch.nan}, NotFiniteError, "NaN", id="nan"),
        pytest.param({"clip": blocks(1, high=8, wide=8)[0] / 0}, NotFiniteError, "latents .* NaN", id="latents"),
        pytest.param({"clip": blocks(1, high=8, wide=6)[0]}, GeometryError, "a clip is latents", id="latents' size"),
        pytest.param({"clip": []}, GeometryError, "one or more frames", id="nothing"),
        pytest.param({"clip": "a.mp4"}, GeometryError, "tensors, arrays or PIL images, got a str", id="path"),
        pytest.param({"image": film(1)[0, 0, :1]}, GeometryError, "got 1 colours", id="grey"),
        pytest.param({"image": np.zeros((64, 64, 3), int)}, GeometryError, "as uint8, got int64", id="integers"),
        pytest.param({"image": film(5)}, GeometryError, "has 3 axes, or 4 with rows", id="a clip as image"),
        pytest.param({"clip": film(1), "even": True}, PolicyError, "not whole blocks of 2; leave even=True", id="even"),
        pytest.param({"clip": film(1), **PACKED, "sink": 0}, PolicyError, "at least 2 frames .* got 1", id="no anchor"),
        pytest.param({**PACKED, "block_frames": 1}, PolicyError, "at least 2 frames .* got 1", id="short blocks"),
        pytest.param({**PACKED, "width": 32}, PolicyError, "4 x 4 tokens, got 2 frames of 4 x 2", id="small frames"),
        pytest.param({"budget": 20}, PolicyError, "more than budget = 20", id="budget"),
    ],
)
def test_other_beginnings_are_refused_before_anything_runs(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with unchecked(), pytest.raises(error, match=message):
        pipeline().stream(**{"prompt_embeds": prompt(), "num_frames": 5, **SMALL, **options})
