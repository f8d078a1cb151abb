"""Presses of kvpress as a compressor, against the same presses given the real layers of a model by hand.

kvpress is not among what the tests install, as it asks for an older transformers than kvtiers does; `make test-presses`
brings it beside the environment and runs these.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed; make test-presses brings it")

from kvpress.attention_patch import patch_attention_functions  # noqa: E402

import kvtiers  # noqa: E402
from kvtiers.presets import describe, from_description  # noqa: E402
from kvtiers_transformers import tiered  # noqa: E402
from kvtiers_transformers.versions import CACHE  # noqa: E402
from tiny_models import attentions, build, distance, feed, masked, plain, tokens  # noqa: E402

PROMPT, TOKENS, MOST, LAYERS, KV_HEADS, GROUP = 40, 72, 12, 2, 2, 2
PRESSES: Mapping[str, Mapping[str, int]] = {
    "KnormPress": {},
    "KeyDiffPress": {},
    "LagKVPress": {"n_sink": 2, "lag_size": 3},
    "TOVAPress": {},
    "SnapKVPress": {"window_size": 8},
    "ExpectedAttentionPress": {"n_future_positions": 20},
    "StreamingLLMPress": {"n_sink": 3},
}


def reference(model: Any, ids: Tensor, name: str) -> Tensor:
    """The logits where each KV head keeps, of the prompt, what the press scores highest in the real layer."""
    seen: dict[int, tuple[Any, Tensor, Any]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, _args, kwargs: seen.update(
                {module.layer_idx: (module, kwargs["hidden_states"], kwargs["position_embeddings"])}
            ),
            with_kwargs=True,
        )
        for module in attentions(model)
    ]
    press = getattr(kvpress, name)(compression_ratio=1 - (MOST + 0.5) / PROMPT, **PRESSES[name])
    cache, masks = DynamicCache(config=model.config), {}
    with torch.no_grad():
        model(ids[:, :PROMPT], **{CACHE: cache})
        order = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        for layer, (module, hidden, angles) in seen.items():
            module.rotary_emb = model.model.rotary_emb
            held = cache.layers[layer]
            scores = press.score(module, hidden, held.keys, held.values, None, {"position_embeddings": angles})
            del module.rotary_emb
            keep = torch.zeros(KV_HEADS, TOKENS, dtype=torch.bool)
            keep = keep.scatter(-1, scores[0].topk(MOST, -1).indices, True)
            keep[:, PROMPT:] = True
            masks[layer] = order.expand(1, KV_HEADS * GROUP, -1, -1).clone()
            masks[layer][:, :, PROMPT:] &= keep.repeat_interleave(GROUP, 0)[:, None]
    for handle in handles:
        handle.remove()
    return masked(model, ids, masks)


def ours(ids: Tensor, compressor: Any, *, family: str = "llama", **changes: Any) -> Tensor:
    """A prompt is read and compressed; then the rest is read token by token."""
    model = build(family)
    with tiered(
        model, "press", **{"compressor": compressor, "sink": 0, "recent": None, "block_size": 1} | changes
    ) as cache:
        first = feed(model, ids[:, :PROMPT], cache, ())
        cache.compact(recent=0)
        rest = feed(model, ids[:, PROMPT:], cache, range(1, TOKENS - PROMPT))
        assert max(cache.attended()) == MOST + TOKENS - PROMPT
        return torch.cat([first, rest], 1)


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("realigner", ["original", "contiguous"])
def test_a_press_keeps_what_it_keeps_in_kvpress(name: str, realigner: str) -> None:
    ids = tokens(TOKENS)
    chosen = ("press", {"name": name, "settings": PRESSES[name], "most": MOST, "queries": PROMPT})
    got = ours(ids, chosen, realigner=realigner)
    other = "KnormPress" if name != "KnormPress" else "KeyDiffPress"
    assert distance(got, reference(build("llama"), ids, name)) < 1e-5
    assert distance(got, reference(build("llama"), ids, other)) > 1e-3


def test_a_press_chooses_anew_as_tokens_leave_recent() -> None:
    model, ids, held = build("llama"), tokens(TOKENS), {}
    sizes = {"most": MOST, "queries": 6, "recent": 8, "sink": 2, "block_size": 2, "chunk_size": 4}
    for press, settings in (("snapkv", '{"window_size": 4}'), ("knorm", "{}")):
        with tiered(model, "press", press=press, settings=settings, **sizes) as cache:
            feed(model, ids, cache, range(1, TOKENS))
            mid = [layer.history.rewritten for layer in cache.core.every_layer()]
        assert [block.keys.shape[3] for block in mid] == [MOST] * LAYERS
        held[press] = torch.stack([block.offsets[0, :, 0, :, 0] for block in mid])
        assert held[press].max() > 40, "what left late never stayed"
    assert not torch.equal(held["snapkv"], held["knorm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "snapkvv"}, "no scorer press 'snapkvv'.*Did you mean 'snapkv'"),
        ({"name": "adakv"}, "no scorer press 'adakv'"),
        ({"name": "pyramidkv"}, "no scorer press 'pyramidkv'"),
        ({"name": "snapkv", "press": "keydiff"}, "'name' and 'press' say the same"),
        ({"name": "snapkv", "settings": {"windw": 3}}, "make no SnapKVPress.*'windw'"),
        ({"name": "snapkv", "settings": "{"}, "make no SnapKVPress"),
        ({"name": "snapkv", "settings": "[1]"}, "make no SnapKVPress"),
    ],
    ids=["misspelt", "no scorer", "more than scores", "two", "setting", "no JSON", "no mapping"],
)
def test_what_kvpress_lacks_is_said_when_the_policy_is_made(options: Any, message: str) -> None:
    with pytest.raises(kvtiers.PolicyError, match=message):
        kvtiers.policy("press", compressor=("press", options))


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("observedattention", "llama", "ObservedAttentionPress of kvpress cannot score the tokens of layer 0"),
        ("leveragescore", "llama", "LeverageScorePress of kvpress cannot score the tokens of layer 0"),
        ("knorm", "glm", "rotates 6 of them, interleaved"),
    ],
    ids=["attention", "weights", "rotation"],
)
def test_a_press_that_needs_more_than_keys_values_and_queries_is_refused(name: str, family: str, message: str) -> None:
    with pytest.raises(kvtiers.PolicyError, match=message):
        ours(tokens(TOKENS), ("press", {"name": name, "most": MOST}), family=family)


def test_a_model_that_does_not_rotate_can_have_a_press() -> None:
    ids = tokens(TOKENS)
    ours(ids, ("press", {"name": "snapkv", "settings": {"window_size": 8}, "most": MOST}), family="gpt2")


def test_a_policy_with_a_press_can_be_written_down_and_read_again() -> None:
    chosen = kvtiers.policy("press", press="SnapKVPress", settings={"window_size": 32})
    assert from_description(describe(chosen)) == chosen


def test_a_model_that_is_enabled_goes_on_when_kvpress_wraps_every_attention_function() -> None:
    """It does so when it is imported, which may be after kvtiers."""
    model, ids = build("llama", attention="sdpa"), tokens(TOKENS)
    before = dict(ALL_ATTENTION_FUNCTIONS)
    patch_attention_functions()
    try:
        with tiered(model, "full") as cache:
            got = feed(model, ids, cache, [PROMPT])
    finally:
        ALL_ATTENTION_FUNCTIONS.update(before)
    assert distance(got, plain(model, ids)) < 1e-6
