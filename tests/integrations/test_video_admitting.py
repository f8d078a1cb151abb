"""What a video takes, and what it refuses before anything runs: kinds of models, dtypes, timesteps."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from torch import Tensor

from kvtiers import GeometryError, RotaryError, UnsupportedModelError
from kvtiers_diffusers import CausalWan, tiered
from strategies import unchecked
from tiny_wan import blocks, build, prompt

SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        pytest.param(lambda: build(in_channels=36), "takes 36 channels and gives 16", id="image to video by channels"),
        pytest.param(
            lambda: build(image_dim=8, added_kv_proj_dim=48), "attends an image beside the prompt", id="image to video"
        ),
        pytest.param(
            lambda: diffusers.WanVACETransformer3DModel(**SMALL, vace_layers=[0]), "got WanVACETransformer", id="VACE"
        ),
        pytest.param(lambda: diffusers.LTXVideoTransformer3DModel(**SMALL), "got LTXVideoTransformer", id="another"),
        pytest.param(lambda: torch.nn.DataParallel(build()), "got DataParallel.*the model itself", id="in a wrapper"),
        pytest.param(lambda: None, "got NoneType", id="none"),
        pytest.param(lambda: build().to("meta"), "weights were never made", id="without weights"),
    ],
)
def test_models_of_another_kind_are_refused_by_name(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message), unchecked():
        CausalWan(made())


# ---------------------------------------------------------------- dtypes


@torch.no_grad()
def video(model: Any, dtype: torch.dtype) -> list[Tensor]:
    text, found = prompt().to(dtype), []
    with tiered(model, "packforcing-lm", sink=2, recent=2, top_k=2) as wan:
        for clip in blocks(5):
            found += [wan.denoise(clip.to(dtype), 500.0, text), wan.commit(clip.to(dtype), text)]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_that_was_cast_as_a_whole_makes_the_video_of_an_exact_table(dtype: torch.dtype) -> None:
    """A cast rounds the model's own table of rotations too, which the video does not use."""
    cast, exact, clip = build().to(dtype), build().to(dtype), blocks(1)[0].to(dtype)
    exact.rope = build().rope
    flows = video(cast, dtype)
    assert all(torch.equal(a, b) for a, b in zip(flows, video(exact, dtype), strict=True))
    with torch.no_grad():
        plain = exact(clip, torch.tensor([500.0]), prompt().to(dtype), return_dict=False)[0]
    assert (flows[0] - plain).abs().max() < 4 * max(torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_rotates_otherwise_is_refused_in_any_dtype(dtype: torch.dtype) -> None:
    model = build()
    turned = torch.arange(1024)[:, None] * 0.001
    model.rope.freqs_cos = (model.rope.freqs_cos.acos() + turned).cos()
    with pytest.raises(RotaryError, match="rotates otherwise than Wan does"):
        CausalWan(model.to(dtype))


@torch.no_grad()
def test_a_block_or_text_of_another_dtype_is_refused_and_the_right_one_can_follow() -> None:
    model, clip, text = build().to(torch.bfloat16), blocks(1)[0], prompt()
    with tiered(model) as wan:
        for verb in (wan.commit, lambda block, text: wan.denoise(block, 500.0, text)):
            with pytest.raises(
                GeometryError, match=r"works in torch.bfloat16, got the block in .*float32; give block.to"
            ):
                verb(clip, text.bfloat16())
            with pytest.raises(GeometryError, match=r"got the text in torch\.float32"):
                verb(clip.bfloat16(), text)
        assert wan.cache is None
        wan.denoise(clip.bfloat16(), 500.0, text.bfloat16())


def test_autocast_to_another_dtype_is_refused_and_weights_stored_in_eight_bits_are_served() -> None:
    clip, text = blocks(1)[0], prompt()
    with torch.no_grad(), tiered(build()) as wan:
        wanted = wan.denoise(clip, 500.0, text)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(GeometryError, match=r"autocast to .*bfloat16 is on and .*float32"),
        ):
            wan.denoise(clip, 400.0, text)
        assert torch.equal(wan.denoise(clip, 500.0, text), wanted)
    model = build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad(), tiered(model) as wan:
        plain = model(clip, torch.tensor([500.0]), text, return_dict=False)[0]
        assert (wan.denoise(clip, 500.0, text) - plain).abs().max() < 1e-5


# ---------------------------------------------------------------- timesteps


@torch.no_grad()
def test_a_timestep_for_each_token_or_frame_is_taken_where_all_of_a_row_are_equal() -> None:
    model, clip, text = build(), blocks(1, rows=2)[0], prompt()
    times = torch.tensor([[500.0], [300.0]])
    with tiered(model) as wan:
        for entries in (12, 2):
            plain = model(clip, times.expand(2, 12), text.expand(2, -1, -1), return_dict=False)[0]
            assert (wan.denoise(clip, times.repeat(1, entries), text) - plain).abs().max() < 1e-5
        one = model(clip, times[:1].expand(2, 12), text.expand(2, -1, -1), return_dict=False)[0]
        assert (wan.denoise(clip, times[:1].repeat(1, 12), text) - one).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("times", "message"),
    [
        pytest.param(torch.arange(12.0)[None], "12 entries a row that differ .image to video", id="tokens that differ"),
        pytest.param(torch.tensor([[900.0, 0.0]]), "2 entries a row that differ", id="frames that differ"),
        pytest.param(
            torch.full((1, 7), 500.0), "one number, or one for each of 1 rows", id="a number that fits nothing"
        ),
        pytest.param(torch.full((12,), 500.0), "one number, or one for each of 1 rows", id="tokens without rows"),
        pytest.param(torch.full((1, 12), 5000.0), "timesteps are 0", id="too large"),
    ],
)
@torch.no_grad()
def test_timesteps_that_differ_within_a_row_are_refused(times: Tensor, message: str) -> None:
    with tiered(build()) as wan, pytest.raises(GeometryError, match=message), unchecked():
        wan.denoise(blocks(1)[0], times, prompt())
