"""Every family, real code with tiny random weights: `full` is the model's own cache, whatever cuts the forward."""

from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
from transformers import DynamicCache

from kvtiers import RotaryError
from kvtiers_transformers import tiered
from tiny_models import FAMILIES, attentions, build, distance, drop_mask, feed, given, masked, plain, tokens

ROTARY = [name for name in FAMILIES if name != "gpt2"]
ATTENTIONS = [
    pytest.param(family, attention, id=f"{family}-{attention}")
    for family in FAMILIES
    for attention in ("eager", "sdpa")
    if (family, attention) != ("gemma2", "sdpa")  # its softcap is one that transformers' sdpa refuses
]
SPLITS = [pytest.param((), id="one-shot"), pytest.param((1, 14, 15, 16, 17, 40), id="pieces")]


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
def test_full_with_gaps_is_the_models_own_cache_bit_for_bit(
    family: str, attention: str, splits: tuple[int, ...]
) -> None:
    model, ids = build(family, attention=attention), tokens(44, rows=2)
    with tiered(model, "full") as cache:
        ours = feed(model, ids, cache, splits)
    assert torch.equal(ours, plain(model, ids, splits))
    assert cache.get_seq_length() == 44


@pytest.mark.parametrize("realigner", ["contiguous", "incremental"])
@pytest.mark.parametrize("family", ROTARY)
def test_full_realigned_is_the_models_own_cache_but_for_rounding(family: str, realigner: str) -> None:
    model, ids = build(family), tokens(44, rows=2)
    for splits in ((), (1, 14, 15, 16, 17, 40)):
        with tiered(model, "full", realigner=realigner) as cache:
            assert distance(feed(model, ids, cache, splits), plain(model, ids, splits)) < 1e-5


@pytest.mark.parametrize(
    ("family", "attention", "realigner"),
    [pytest.param(*case.values, "original", id=f"{case.id}-original") for case in ATTENTIONS]
    + [pytest.param(family, "eager", "contiguous", id=f"{family}-eager-contiguous") for family in ROTARY],
)
def test_greedy_generation_under_full_gives_the_same_tokens(family: str, attention: str, realigner: str) -> None:
    model, prompt = build(family, attention=attention), tokens(11)
    options: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False}
    own = model.generate(prompt, **given(DynamicCache(config=model.config)), **options)
    with tiered(model, "full", realigner=realigner) as cache:
        ours = model.generate(prompt, **given(cache), **options)
    assert ours.shape[1] == 75
    assert torch.equal(ours, own)
    assert len(set(own[0].tolist())) > 5  # the model does not just repeat itself


@pytest.mark.parametrize("realigner", ["contiguous", "incremental"])
def test_a_model_without_rotary_embedding_refuses_to_be_realigned(realigner: str) -> None:
    with pytest.raises(RotaryError, match="no rotary embedding; use a realigner that leaves positions alone"):
        tiered(build("gpt2"), "streaming", realigner=realigner).__enter__()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_with_gaps_is_full_attention_that_is_masked(family: str) -> None:
    model, ids = build(family), tokens(40)
    window = drop_mask(40, sink=3, recent=8, block=4)
    tiers = {"gemma2": (1,), "gemma3": (1,)}.get(family, range(2))
    own = drop_mask(40, sink=0, recent=8, block=1)  # the model's own sliding window of 9
    masks = {m.layer_idx: (window if m.layer_idx in tiers else own)[None, None] for m in attentions(model)}
    with tiered(model, "streaming", realigner="original", sink=3, recent=8, block_size=4, chunk_size=8) as cache:
        ours = feed(model, ids, cache, (7, 8, 9, 30))
        assert len(cache.tiered_layers) == len(tiers)
    assert distance(ours, masked(model, ids, masks)) < 1e-5
    wrong = {i: drop_mask(40, sink=3, recent=9, block=4)[None, None] if i in tiers else m for i, m in masks.items()}
    assert distance(ours, masked(model, ids, wrong)) > 0.02


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_sliding_layers_stay_the_models_own(family: str) -> None:
    model, ids = build(family), tokens(40)
    with tiered(model, "streaming", sink=2, recent=8, block_size=2) as cache:
        feed(model, ids, cache, (20, 21))
        kinds = [type(layer).__name__ for layer in cache.layers]
        held = cache.memory_usage()
    assert kinds == ["DynamicSlidingWindowLayer", "TieredLayer"]
    assert all(layer.get_seq_length() == 40 for layer in cache.layers)
    assert sum(h.bytes for h in held if h.location == "device") > sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers[::2]
    )


# Each changes how often, how fast or which channels are rotated. Phi-3 alone takes longrope, GLM alone is interleaved.
_SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {"rope_type": "default", "rope_theta": 10000.0}),
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "yarn": (
        "llama",
        {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    ),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 10000.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "partial": ("gpt-neox", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "interleaved": ("glm", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "interleaved-whole": ("glm", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}),
}
_CHANGING: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
            "original_max_position_embeddings": 24,
        },
    ),
}


def _scaled(name: str) -> Any:
    family, rope = (_SCALED | _CHANGING)[name]
    changes: dict[str, Any] = {"rope_parameters": dict(rope)}
    if name == "dynamic":
        changes["max_position_embeddings"] = 24
    return build(family, **changes)


@pytest.mark.parametrize("name", [*_SCALED, *_CHANGING])
def test_gaps_keep_any_rotation_that_the_model_has(name: str) -> None:
    ids = tokens(60)
    for splits in ((), (10, 23, 24, 25, 40)):
        own = plain(_scaled(name), ids, splits)
        model = _scaled(name)
        with tiered(model, "full") as cache:
            assert torch.equal(feed(model, ids, cache, splits), own)


@pytest.mark.parametrize("realigner", ["contiguous", "incremental"])
@pytest.mark.parametrize("name", _SCALED)
def test_fixed_frequencies_can_be_realigned(name: str, realigner: str) -> None:
    model, ids = _scaled(name), tokens(60)
    with tiered(model, "full", realigner=realigner) as cache:
        assert distance(feed(model, ids, cache, (10, 23, 40)), plain(model, ids)) < 1e-5
    with tiered(model, "full", realigner=realigner) as cache:  # the control: a rotation a little off
        for rotary in cache.core.rotaries:
            assert rotary is not None
            rotary.frequencies = tuple(f * 1.05 for f in rotary.frequencies)
        assert distance(feed(model, ids, cache, (10, 23, 40)), plain(model, ids)) > 0.02


@pytest.mark.parametrize("name", _CHANGING)
def test_frequencies_that_change_with_length_are_refused(name: str) -> None:
    model = _scaled(name)
    with pytest.raises(RotaryError, match=f"rope_type='{name}'.*freeze_rope=True"):
        tiered(model, "full", realigner="contiguous").__enter__()


@pytest.mark.parametrize("name", _CHANGING)
@pytest.mark.parametrize("first", [10, 60], ids=["as-made", "grown"])
def test_frozen_frequencies_are_those_that_the_model_has_now(name: str, first: int) -> None:
    """Short enough to keep them, or after a long forward that changed them: what is made next does not touch them."""
    model, ids = _scaled(name), tokens(60)
    plain(model, ids[:, :first])
    before = model.get_decoder().rotary_emb.inv_freq.clone()
    with tiered(model, "full", realigner="contiguous", freeze_rope=True) as cache:
        assert torch.equal(model.get_decoder().rotary_emb.inv_freq, before)
        ours = feed(model, ids, cache, (10, 30))
    assert all(rotary is not None and torch.equal(rotary.frequencies[0], before) for rotary in cache.core.rotaries)
    frozen = _scaled(name)
    rotary = frozen.get_decoder().rotary_emb
    rotary.rope_type, rotary.inv_freq = "default", before.clone()
    assert distance(ours, plain(frozen, ids)) < 1e-5


@pytest.mark.parametrize("name", _CHANGING)
def test_trying_a_model_leaves_its_rotation_as_it_was(name: str) -> None:
    ids = tokens(60)
    model, untouched = _scaled(name), _scaled(name)
    for other in (model, untouched):
        plain(other, ids)
    with tiered(model, "full", realigner="contiguous", freeze_rope=True):
        pass
    for cut in (60, 12, 40):
        assert torch.equal(plain(model, ids[:, :cut]), plain(untouched, ids[:, :cut]))


def test_a_layer_that_its_model_does_not_rotate_is_not_rotated() -> None:
    """Cohere 2 rotates its sliding layers only, and tells nobody: rotating its other layers would be silently wrong."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    torch.manual_seed(0)
    config = Cohere2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    model, ids = Cohere2ForCausalLM(config).eval(), tokens(40)
    with tiered(model, "full", realigner="contiguous") as cache:
        assert [rotary.width for rotary in cache.core.rotaries if rotary is not None] == [0, 0]
        assert distance(feed(model, ids, cache, (10, 11)), plain(model, ids)) < 1e-5
    with tiered(
        model, "streaming", sink=2, recent=8, block_size=2
    ) as cache:  # without positions, closing up is nothing
        ours = feed(model, ids, cache, (5, 30))
    with tiered(model, "streaming", realigner="original", sink=2, recent=8, block_size=2) as cache:
        assert distance(ours, feed(model, ids, cache, (5, 30))) < 1e-5
