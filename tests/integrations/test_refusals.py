"""What a tiered cache cannot do is refused by name: encoders, attention maps, pickle, a tensor of keys."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
import transformers

from every_model import build_tiny
from kvtiers import SavedCacheError, UnsupportedModelError
from kvtiers_transformers import TransformersCache, tiered
from tiny_models import build, distance, feed, given, plain, tokens

SMALL: dict[str, Any] = {"sink": 2, "recent": 8, "block_size": 4, "chunk_size": 8}
SIZES = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
DIMENSIONS = {
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 32),
}


# ---------------------------------------------------------------- layers that use the cache twice


@pytest.mark.parametrize("prefix", ["Bart", "Whisper", "T5", "Marian"])
def test_a_model_with_an_encoder_is_refused_at_once(prefix: str) -> None:
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **DIMENSIONS)
    name = f"{prefix}MTModel" if prefix == "Marian" else f"{prefix}ForConditionalGeneration"
    model = getattr(transformers, name)(config).eval()
    for part in (model, getattr(model, "model", model)):
        with pytest.raises(UnsupportedModelError, match="has an encoder, and its layers attend twice"):
            tiered(part, "full").__enter__()


def test_a_decoder_that_is_given_an_encoders_states_is_refused_before_anything_runs() -> None:
    model, ids = build_tiny("bart"), tokens(12)
    with tiered(model, "full") as cache, torch.no_grad():
        with pytest.raises(UnsupportedModelError, match="cross-attention would use the same cache"):
            model(ids, encoder_hidden_states=torch.zeros(1, 5, 32), **given(cache))
        assert distance(feed(model, ids, cache, (5, 6)), plain(model, ids, (5, 6))) < 1e-5


def test_a_layer_that_runs_twice_in_a_forward_is_refused() -> None:
    model, ids = build(), tokens(12)
    layer = model.model.layers[0]
    once = layer.forward
    layer.forward = lambda hidden, **options: once(once(hidden, **options), **options)
    with tiered(model, "full") as cache, pytest.raises(UnsupportedModelError, match="layer 0 uses the cache twice"):
        feed(model, ids, cache, ())


# ---------------------------------------------------------------- what tiers cannot give


@pytest.mark.parametrize("asked", ["forward", "config", "generate"])
def test_attention_maps_are_refused_before_anything_runs(asked: str) -> None:
    model, ids = build(), tokens(12)
    with tiered(model, "full") as cache, torch.no_grad():
        options = {"output_attentions": None if asked == "config" else True, **given(cache)}
        if asked == "generate":
            options |= {"max_new_tokens": 2, "return_dict_in_generate": True}
        model.config.output_attentions = asked == "config"
        with pytest.raises(UnsupportedModelError, match="output_attentions=True asks for attention over every token"):
            (model.generate if asked == "generate" else model)(ids, **options)
        model.config.output_attentions = False
        assert torch.equal(feed(model, ids, cache, ()), plain(model, ids))
        assert len(model(ids, output_attentions=True).attentions) == 2  # without the cache the model gives its own


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(pickle.dumps, id="pickle"),
        pytest.param(lambda cache: torch.save({"cache": cache}, io.BytesIO()), id="torch.save"),
        pytest.param(copy.copy, id="copy.copy"),
    ],
)
def test_a_cache_that_is_pickled_says_what_to_do_instead(write: Callable[[TransformersCache], object]) -> None:
    with (
        tiered(build(), "streaming") as cache,
        pytest.raises(SavedCacheError, match=r"never pickled; use cache.save\(path\).*cache.fork\(\) for a copy"),
    ):
        write(cache)


@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_tiered_layer_says_what_to_read_instead_of_its_keys(what: str) -> None:
    model = build("gemma3")
    with tiered(model, "streaming", **SMALL) as cache:
        feed(model, tokens(12), cache, ())
        with pytest.raises(AttributeError, match=rf"layer 1 is tiered.*core.context\(...\).{what}"):
            getattr(cache.layers[1], what)
        assert getattr(cache.layers[0], what) is not None  # a layer that stays the model's own has them


@pytest.mark.parametrize("name", ["falcon_h1", "rwkv"])
def test_a_model_whose_layers_are_of_another_kind_gets_no_advice_about_windows(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        tiered(build_tiny(name), "full").__enter__()
    assert "sliding_window" not in str(refused.value)
    assert "fixed size" in str(refused.value) or "has no self-attention" in str(refused.value)


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", 1), pytest.param("llama", 2, marks=pytest.mark.slow), pytest.param("gemma3", 2, marks=pytest.mark.slow)],
)
def test_a_compiled_model_gives_what_it_gives_uncompiled(family: str, layers: int) -> None:
    """The tiers run as they are, and torch compiles what lies between them."""
    changes = {} if layers == 2 else {"num_hidden_layers": 1}
    model, ids, cuts = build(family, **changes), tokens(14), (6, 7, 8)
    with tiered(model, "streaming", realigner="original", **SMALL) as cache:
        wanted = feed(model, ids, cache.fork(), cuts)
        assert distance(feed(torch.compile(model, backend="eager"), ids, cache, cuts), wanted) < 1e-5
    torch.compiler.reset()


@pytest.mark.slow
def test_a_model_that_compiles_itself_gives_what_it_gives_uncompiled() -> None:
    model, ids = build(), tokens(14)
    model.compile(backend="eager")
    with tiered(model, "full") as cache:
        assert distance(feed(model, ids, cache, (6, 7, 8)), plain(build(), ids, (6, 7, 8))) < 1e-5
    torch.compiler.reset()


def test_one_whole_graph_is_refused_by_torch_with_the_name_of_what_cannot_be_compiled() -> None:
    model = build(num_hidden_layers=1)
    with tiered(model, "full") as cache, pytest.raises(torch._dynamo.exc.Unsupported, match="kvtiers_hook"):
        torch.compile(model, backend="eager", fullgraph=True)(tokens(6), **given(cache))
    torch.compiler.reset()


def test_generate_neither_compiles_a_tiered_cache_nor_replaces_it() -> None:
    model, ids = build(), tokens(6)
    with tiered(model, "full") as cache:
        assert not cache.is_compileable
        with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
            model.generate(ids, **given(cache), cache_implementation="static", max_new_tokens=2)
        assert cache.get_seq_length() == 0
