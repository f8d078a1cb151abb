"""Methods that fetch blocks, serving a model: nothing is lost where everything is fetched, something is where not."""

from typing import Any

import pytest
import torch

from kvtiers_transformers import tiered
from tiny_models import build, distance, feed, pad_left, plain, tokens

PROMPT, TOKENS, BLOCK = 40, 72, 4
SIZES: dict[str, Any] = {"sink": 2, "recent": 8, "block_size": BLOCK, "chunk_size": 7}
EVERYTHING: dict[str, dict[str, Any]] = {"infllm": {}, "shadowkv": {"rank": BLOCK, "outliers": 1}}


@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("glm", "sdpa")])
@pytest.mark.parametrize("name", EVERYTHING)
def test_where_all_blocks_are_fetched_the_model_gives_its_own_result(name: str, family: str, attention: str) -> None:
    """`glm` rotates half of its channels, in neighbouring pairs."""
    model, ids, stops = build(family, attention=attention), tokens(TOKENS), [PROMPT, *range(PROMPT + 1, TOKENS)]
    own = plain(model, ids, stops)
    for top_k, near in ((99, True), (1, False)):
        with tiered(model, name, top_k=top_k, **SIZES, **EVERYTHING[name]) as cache:
            off = distance(feed(model, ids, cache, stops), own)
        assert (off < 1e-4) == near, off


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_padded_row_equals_the_same_row_alone(name: str) -> None:
    model, rows = build("llama"), [tokens(60)[0], tokens(49, seed=5)[0]]
    ids, mask = pad_left(rows)
    with tiered(model, name, top_k=2, **SIZES, **EVERYTHING[name]) as cache, torch.no_grad():
        both = model(ids, attention_mask=mask, cache=cache).logits
    for number, row in enumerate(rows):
        with tiered(model, name, top_k=2, **SIZES, **EVERYTHING[name]) as cache:
            alone = feed(model, row[None], cache, ())
        assert distance(both[number : number + 1, -row.numel() :], alone) < 1e-4
