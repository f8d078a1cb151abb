"""Models that differ from Llama in shape, position, mask or storage: the model's own result, or a refusal by name."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")
pytest.importorskip("accelerate", reason="needs the extra 'transformers'")

import accelerate
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvtiers import RotaryError, UnsupportedModelError
from kvtiers_transformers import tiered
from kvtiers_transformers.shapes import shape
from odd_models import LATENT, PackedLinear, odd, packed, whole
from tiny_models import build, distance, feed, pad_left, plain, tokens

SPLITS = (10, 11, 30, 31, 32)
POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("full", {"realigner": "original"}),
    ("streaming", {"recent": 64}),
    ("packforcing-lm", {"recent": 64}),
]
"""Nothing is left out of 44 tokens under any of them; the last two realign."""
REFUSED_TO_REALIGN = {
    "kimi-linear": "no rotary embedding; use a realigner that leaves positions alone",
    "nemotron-h": "no rotary embedding; use a realigner that leaves positions alone",
    "bigcode": "no rotary embedding; use a realigner that leaves positions alone",
    "hunyuan": "rotates in a way that kvtiers does not know.*realigner='original'",
}
SERVED = [
    pytest.param(name, marks=pytest.mark.slow if name == "kimi-linear" else ())
    for name in (*LATENT, "gemma4", "llama4", "modernbert", *REFUSED_TO_REALIGN)
]

pytestmark = pytest.mark.filterwarnings("ignore:.*falling back to its reference:UserWarning")


def given(model: Any, cache: Any) -> dict[str, Any]:
    """The argument that gives `cache` to a model, as the installed transformers calls it."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


@torch.no_grad()
def read_padded(model: Any, cache: Any) -> Tensor:
    """The logits of two rows, of which one is padded on the left: two forwards, and one of a token more."""
    ids, mask = pad_left([tokens(20, seed=1)[0], tokens(33, seed=2)[0]])
    parts, start = [], 0
    ids, mask = torch.cat([ids, torch.full((2, 1), 5)], 1), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    for stop in (20, 33, 34):
        parts.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], **given(model, cache)).logits)
        start = stop
    return torch.cat(parts, 1)[mask.bool()]


def compare(model: Any, *, realigns: bool = True) -> None:
    """Under every policy, in pieces and padded, what the model gives with its own cache."""
    ids = tokens(44, rows=2)
    own, own_padded = plain(model, ids, SPLITS), read_padded(model, DynamicCache(config=model.config))
    for name, changes in POLICIES if realigns else POLICIES[:2]:
        with tiered(model, name, **changes) as cache:
            assert distance(feed(model, ids, cache, SPLITS), own) < 1e-5, name
        with tiered(model, name, **changes) as cache:
            assert distance(read_padded(model, cache), own_padded) < 1e-5, name


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by an older transformers, when it is imported
@pytest.mark.parametrize("name", SERVED)
def test_an_odd_model_gives_what_it_gives_with_its_own_cache(name: str) -> None:
    model = odd(name)
    compare(model, realigns=name not in REFUSED_TO_REALIGN)
    if name in REFUSED_TO_REALIGN:
        for preset in ("streaming", "packforcing-lm"):
            with pytest.raises(RotaryError, match=REFUSED_TO_REALIGN[name]):
                tiered(model, preset).__enter__()


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_keys_and_values_of_different_width_are_counted_archived_and_saved(name: str, tmp_path: Path) -> None:
    """Archived blocks go through codecs and digests; a bound counts both widths; a saved cache goes on."""
    model, ids = odd(name), tokens(60)
    small: dict[str, Any] = {"sink": 2, "recent": 8, "block_size": 4, "chunk_size": 8}
    everything = plain(model, ids)
    for preset in ("archive", "packforcing-lm"):
        for codec, most in (("exact", 1e-5), ("int8", 0.1)):
            changes = {**small, "top_k": 99, "codec": codec, "realigner": "contiguous"}
            with tiered(model, preset, **changes) as cache:
                assert distance(feed(model, ids, cache, (20, 21)), everything) < most
                (geometry,) = {(g.kv_heads, g.head_dim, g.value_dim) for g in cache.core.geometries}
                assert geometry == (4, 20, 10)
    bounded = {**small, "realigner": "contiguous"}
    with tiered(model, "streaming", **bounded) as cache:
        ours = feed(model, ids[:, :40], cache, (20, 21))
        one = cache.core.geometries[0]
        assert one.token_bytes == 4 * (20 + 10) * 4
        held = sum(part.bytes for part in cache.memory_usage())
        assert held <= 2 * cache.policies[0].bound_bytes(one)
        cache.save(tmp_path / "held.safetensors")
        rest = feed(model, ids[:, 40:], cache, ())
    with tiered(model, "streaming", **bounded) as again:
        again.load(tmp_path / "held.safetensors")
        assert torch.equal(feed(model, ids[:, 40:], again, ()), rest)
    assert distance(ours[:, -1], everything[:, 39]) > 0.02  # the control: a window is not everything


@pytest.mark.parametrize(("name", "widths"), [("deepseek-v3", (20, 10)), ("gemma4", (16, 16))])
def test_a_plan_counts_the_widths_that_a_layer_really_stores(
    name: str, widths: tuple[int, int], tmp_path: Path
) -> None:
    model = odd(name)
    model.config.save_pretrained(tmp_path)
    planned = shape(str(tmp_path), tokens=100, dtype=torch.float32)
    with tiered(model, "full") as cache:
        (held,) = set(cache.core.geometries)
    assert planned is not None
    assert (planned.geometry.head_dim, planned.geometry.value_dim) == widths
    assert planned.geometry == held


def test_only_the_channels_that_a_model_rotates_are_rotated() -> None:
    model, ids = odd("deepseek-v3"), tokens(44)
    own = plain(model, ids)
    with tiered(model, "full", realigner="contiguous") as cache:
        for rotary in {id(rotary): rotary for rotary in cache.core.rotaries}.values():
            assert rotary is not None
            assert (rotary.first, rotary.width) == (12, 8)
            rotary.first = 0  # the control: the first channels instead of the last
        assert distance(feed(model, ids, cache, (10,)), own) > 0.02


def test_layers_that_a_model_does_not_rotate_have_nothing_to_realign() -> None:
    """Llama 4: its full layers have no positions, and weigh queries by where they are."""
    model, ids = odd("llama4"), tokens(40)
    small: dict[str, Any] = {"sink": 2, "recent": 8, "block_size": 2}
    with tiered(model, "streaming", **small) as cache:
        assert [rotary.width for rotary in cache.core.rotaries if rotary is not None] == [0]
        assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "TieredLayer"]
        ours = feed(model, ids, cache, (5, 30))
    with tiered(model, "streaming", realigner="original", **small) as cache:
        assert distance(ours, feed(model, ids, cache, (5, 30))) < 1e-5
    assert distance(ours, plain(model, ids)) > 0.02


# ---------------------------------------------------------------------- where and how weights are kept


def _stored(how: str, folder: Path) -> Any:
    model = build("llama")
    if how == "cpu-offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk-offload":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu", offload_buffers=True)
    if how == "packed":
        return packed(model)
    with warnings.catch_warnings():  # torch moves its quantisation elsewhere, and says so
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("how", ["cpu-offload", "disk-offload", "packed", "int8"])
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_it_does_not_matter_how_or_where_weights_are_kept(how: str, tmp_path: Path) -> None:
    model, ids = _stored(how, tmp_path), tokens(44, rows=2)
    own = plain(model, ids, SPLITS)
    if how.endswith("offload"):
        assert distance(own, plain(build("llama"), ids, SPLITS)) < 1e-5
    for name, changes in POLICIES:
        with tiered(model, name, **changes) as cache:
            assert distance(feed(model, ids, cache, SPLITS), own) < 1e-5, name
    with tiered(model, "streaming") as cache:
        feed(model, ids[:, :20], cache, ())
        cache.save(tmp_path / "held.safetensors")
        rest = feed(model, ids[:, 20:], cache, ())
    with tiered(model, "streaming") as again:
        again.load(tmp_path / "held.safetensors")
        assert torch.equal(feed(model, ids[:, 20:], again, ()), rest)


def test_an_attention_that_cannot_be_tried_is_refused_by_name() -> None:
    """A packed projection that says nothing of its width: nobody can tell how this attention rotates."""

    model, ids = build("llama"), tokens(20)
    for layer in model.model.layers:
        layer.self_attn.k_proj = PackedLinear(layer.self_attn.k_proj)
        del layer.self_attn.k_proj.out_features
    with tiered(model, "full") as cache:
        assert distance(feed(model, ids, cache, (10,)), plain(model, ids)) < 1e-5
    with pytest.raises(RotaryError, match=r"cannot be told.*use realigner='original'"):
        tiered(model, "packforcing-lm").__enter__()


# ---------------------------------------------------------------------- masks and positions made outside the decoder


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "paligemma", "qwen2-vl"])
def test_text_alone_is_served_by_a_model_that_also_takes_images(name: str, attention: str) -> None:
    model = whole(name, attention=attention)
    if (name, attention) != ("paligemma", "sdpa"):
        compare(model)
        return
    own = read_padded(model, DynamicCache(config=model.config))
    with tiered(model, "full") as cache, torch.no_grad():  # with padding there is a mask, and it is causal
        ids, mask = pad_left([tokens(20, seed=1)[0], tokens(33, seed=2)[0]])
        ours = model(ids, attention_mask=mask, **given(model, cache)).logits[0, 13:]
    assert distance(ours[:7], own[:7]) < 1e-5
    with (
        tiered(model, "full") as cache,
        pytest.raises(UnsupportedModelError, match=r"see later ones where it is handed no mask.*'eager'"),
    ):
        feed(model, tokens(20), cache, ())


def test_tokens_of_the_past_cannot_be_hidden_behind_a_mask_that_is_made_outside() -> None:
    model, ids = whole("gemma3"), tokens(12)
    late = torch.ones(1, 20, dtype=torch.long)
    late[:, :4] = 0
    with tiered(model, "full") as cache, torch.no_grad():
        model(ids, **given(model, cache))
        with pytest.raises(UnsupportedModelError, match=r"hold \[8\] tokens of the past, but the cache holds \[12\]"):
            model(tokens(8), attention_mask=late, **given(model, cache))


@pytest.mark.parametrize(("name", "image"), [("gemma3", 1), ("paligemma", 0)])
def test_spans_of_an_image_that_see_one_another_both_ways_are_refused(name: str, image: int) -> None:
    """The kinds of tokens are all that the model needs to make such a mask; it is checked before a layer takes any."""
    model, ids = whole(name), tokens(20)
    kinds = torch.full_like(ids, 1 - image)
    kinds[:, 3:7] = image
    with tiered(model, "full") as cache, torch.no_grad():
        with pytest.raises(UnsupportedModelError, match=r"not causal.*those of an image.*own cache"):
            model(ids, token_type_ids=kinds, **given(model, cache))
        assert cache.get_seq_length() == 0
        assert distance(feed(model, ids, cache, ()), plain(model, ids)) < 1e-5


def test_a_decoder_that_attends_both_ways_is_refused() -> None:
    model = build("gemma3", use_bidirectional_attention=True)
    with tiered(model, "full") as cache, pytest.raises(UnsupportedModelError, match="see later ones"):
        feed(model, tokens(20), cache, ())


@torch.no_grad()
def read_image(model: Any, cache: Any) -> Tensor:
    """The logits of a prompt with an image of 4 x 6 patches, and of three tokens after it."""
    model.model.rope_deltas = None
    ids = torch.tensor([[5, 6, 7, 90, *[92] * 6, 91, *range(10, 30)]])
    patches = torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    image = {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "mm_token_type_ids": (ids == 92).int(),
    }
    parts = [model(ids, **given(model, cache), **image).logits]
    parts += [model(torch.tensor([[token]]), **given(model, cache)).logits for token in (11, 12, 13)]
    return torch.cat(parts, 1)


def test_positions_of_an_image_are_the_models_own_and_no_realigner_replaces_them() -> None:
    model = whole("qwen2-vl")
    own = read_image(model, DynamicCache(config=model.config))
    for realigner in ("original", None):
        changes = {} if realigner is None else {"realigner": realigner}
        with tiered(model, "full", **changes) as cache:
            assert distance(read_image(model, cache), own) < 1e-5
    with tiered(model, "streaming", realigner="original", recent=64) as cache:
        assert distance(read_image(model, cache), own) < 1e-5
    for preset in ("streaming", "packforcing-lm"):
        with tiered(model, preset, recent=64) as cache:
            with pytest.raises(UnsupportedModelError, match=r"differ by axis.*those of an image.*realigner='original'"):
                read_image(model, cache)
            assert cache.get_seq_length() == 0


def test_a_model_that_counts_every_forward_from_0_is_refused_under_a_realigner_unless_positions_are_given() -> None:
    model, ids = odd("bamba"), tokens(30)

    def read(cache: Any, *, positions: bool) -> Tensor:
        parts = []
        for start, stop in ((0, 12), (12, 29), (29, 30)):
            places = {"position_ids": torch.arange(start, stop)[None]} if positions else {}
            with torch.no_grad():
                parts.append(model(ids[:, start:stop], **given(model, cache), **places).logits)
        return torch.cat(parts, 1)

    for positions in (True, False):
        own = read(DynamicCache(config=model.config), positions=positions)
        with tiered(model, "full") as cache:
            assert distance(read(cache, positions=positions), own) < 1e-5
        with tiered(model, "streaming", recent=64) as cache:
            if positions:
                assert distance(read(cache, positions=True), own) < 1e-5
            else:
                with pytest.raises(UnsupportedModelError, match="counts every forward from position 0"):
                    read(cache, positions=False)


@pytest.mark.parametrize("end", ["its own cache", "fails outside the decoder"])
def test_the_mask_of_a_forward_without_tiers_reaches_no_other_forward(end: str) -> None:
    around, other = whole("gemma3"), build("llama")
    ids, mask = pad_left([tokens(5)[0], tokens(9, seed=2)[0]])
    more = tokens(9, rows=2, seed=3)

    def fail(*_: Any) -> None:
        raise MemoryError

    with tiered(around, "full"), tiered(other, "full") as cache, torch.no_grad():
        if end == "its own cache":
            around(ids, attention_mask=mask)
        else:
            handle = around.get_input_embeddings().register_forward_pre_hook(fail)
            with pytest.raises(MemoryError):
                around(ids, attention_mask=mask)
            handle.remove()
        assert distance(feed(other, more, cache, ()), plain(other, more)) < 1e-5
