"""With `original`, whatever a policy leaves out is as if the full attention were masked: at every step, layer, head.

The masks are made here, from the words of DESIGN.md, for policies that drop by age; for the others the blocks that a
context says it holds are read after every forward. A mask that is off by one index fails by a factor of a thousand.
"""

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
from torch import Tensor

from kvtiers_transformers import TransformersCache, tiered
from tiny_models import build, distance, drop_mask, feed, given, masked, pad_left, plain, tokens

LENGTH = 70
CLOSE, FAR = 1e-5, 0.02

ONE_SHOT: tuple[int, ...] = ()
CHUNKS = (16, 32, 48, 64)
ODD = (1, 3, 10, 17, 18, 19, 45)
SINGLE = tuple(range(1, LENGTH))
SPLITS = [
    pytest.param(ONE_SHOT, id="one-shot"),
    pytest.param(CHUNKS, id="chunked"),
    pytest.param(ODD, id="odd"),
    pytest.param(SINGLE, id="token-by-token"),
]

WINDOWS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "sliding-window": ("sliding-window", {"recent": 11, "chunk_size": 16}, {"sink": 0, "recent": 11, "block": 1}),
    "streaming": (
        "streaming",
        {"realigner": "original", "sink": 4, "recent": 12, "block_size": 8, "chunk_size": 16},
        {"sink": 4, "recent": 12, "block": 8},
    ),
    "streaming-by-token": (
        "streaming",
        {"realigner": "original", "sink": 1, "recent": 7, "block_size": 1, "chunk_size": 7},
        {"sink": 1, "recent": 7, "block": 1},
    ),
    "nothing-recent": (
        "streaming",
        {"realigner": "original", "sink": 2, "recent": 0, "block_size": 3, "chunk_size": 5},
        {"sink": 2, "recent": 0, "block": 3},
    ),
    "only-the-current-token": ("sliding-window", {"recent": 0, "chunk_size": 4}, {"sink": 0, "recent": 0, "block": 1}),
    "single-token-chunks": (
        "streaming",
        {"realigner": "original", "sink": 3, "recent": 9, "block_size": 4, "chunk_size": 1},
        {"sink": 3, "recent": 9, "block": 4},
    ),
    "block-wider-than-recent": (
        "streaming",
        {"realigner": "original", "sink": 2, "recent": 5, "block_size": 13, "chunk_size": 3},
        {"sink": 2, "recent": 5, "block": 13},
    ),
    "sink-of-most": (
        "streaming",
        {"realigner": "original", "sink": 40, "recent": 6, "block_size": 2, "chunk_size": 9},
        {"sink": 40, "recent": 6, "block": 2},
    ),
    "wider-than-the-text": (
        "streaming",
        {"realigner": "original", "sink": 90, "recent": 6, "block_size": 2, "chunk_size": 128},
        {"sink": 90, "recent": 6, "block": 2},
    ),
}


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("name", WINDOWS)
def test_a_policy_that_drops_is_a_mask(name: str, splits: tuple[int, ...]) -> None:
    policy, changes, window = WINDOWS[name]
    model, ids = build(), tokens(LENGTH)
    with tiered(model, policy, **changes) as cache:
        ours = feed(model, ids, cache, splits)
    assert distance(ours, masked(model, ids, drop_mask(LENGTH, **window)[None, None])) < CLOSE


@pytest.mark.parametrize("name", ["sliding-window", "streaming", "block-wider-than-recent"])
@pytest.mark.parametrize("wrong", [{"recent": 1}, {"recent": -1}, {"sink": 1}], ids=str)
def test_an_index_off_by_one_fails_the_oracle(name: str, wrong: dict[str, int]) -> None:
    policy, changes, window = WINDOWS[name]
    model, ids = build(), tokens(LENGTH)
    with tiered(model, policy, **changes) as cache:
        ours = feed(model, ids, cache, CHUNKS)
    off = {key: value + wrong.get(key, 0) for key, value in window.items()}
    assert distance(ours, masked(model, ids, drop_mask(LENGTH, **off)[None, None])) > FAR


def test_a_position_off_by_one_fails_the_oracle() -> None:
    policy, changes, window = WINDOWS["streaming"]
    model, ids = build(), tokens(LENGTH)
    with tiered(model, policy, **changes) as cache:
        ours = feed(model, ids, cache, CHUNKS)
    shifted = torch.arange(LENGTH)[None].clone()
    shifted[:, 4:] += 1  # all but the sink
    assert distance(ours, masked(model, ids, drop_mask(LENGTH, **window)[None, None], position_ids=shifted)) > FAR


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sliding_window_is_the_models_own_of_one_more(attention: str, splits: tuple[int, ...]) -> None:
    ids = tokens(LENGTH)
    own = plain(build("mistral", attention=attention, sliding_window=12), ids, splits)
    model = build("mistral", attention=attention)
    with tiered(model, "sliding-window", recent=11, chunk_size=16) as cache:
        assert distance(feed(model, ids, cache, splits), own) < CLOSE
    with tiered(model, "sliding-window", recent=12, chunk_size=16) as cache:
        assert distance(feed(model, ids, cache, splits), own) > FAR


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("kind", ["mapping", "callable"])
def test_every_layer_has_its_own_budget(kind: str, splits: tuple[int, ...]) -> None:
    model, ids = build(), tokens(LENGTH)
    recents = [30, 7]
    recent: Any = {0: 30, "*": 7} if kind == "mapping" else lambda layer: recents[layer]
    changes: dict[str, Any] = {"realigner": "original", "sink": 2, "block_size": 4, "chunk_size": 16}
    with tiered(model, "streaming", recent=recent, **changes) as cache:
        ours = feed(model, ids, cache, splits)
    masks = {i: drop_mask(LENGTH, sink=2, recent=r, block=4)[None, None] for i, r in enumerate(recents)}
    assert distance(ours, masked(model, ids, masks)) < CLOSE
    swapped = {0: masks[1], 1: masks[0]}
    assert distance(ours, masked(model, ids, swapped)) > FAR


@pytest.mark.parametrize("splits", [pytest.param((), id="one-shot"), pytest.param((20, 33, 40, 41, 42), id="pieces")])
@pytest.mark.parametrize("name", ["sliding-window", "streaming", "nothing-recent", "wider-than-the-text"])
def test_padding_on_the_left_is_no_history(name: str, splits: tuple[int, ...]) -> None:
    policy, changes, window = WINDOWS[name]
    model = build()
    rows = [tokens(n, seed=n)[0] for n in (50, 49, 7, 1, 30)]
    ids, mask = pad_left(rows)
    with tiered(model, policy, **changes) as cache:
        parts, start = [], 0
        for stop in (*splits, 50):
            with torch.no_grad():
                out = model(ids[:, start:stop], attention_mask=mask[:, :stop], **given(cache))
            parts.append(out.logits)
            start = stop
    ours = torch.cat(parts, 1)
    for i, row in enumerate(rows):
        count = row.numel()
        alone = masked(model, row[None], drop_mask(count, **window)[None, None])
        assert distance(ours[i, -count:], alone[0]) < CLOSE


# ---------------------------------------------------------------- recalled blocks: read what is attended, then mask

RECALLING: dict[str, tuple[str, dict[str, Any]]] = {
    "archive-affinity": ("archive", {"refresh": "block"}),
    "archive-affinity-every-3": ("archive", {"refresh": 3}),
    "archive-affinity-chunk": ("archive", {"refresh": "chunk"}),
    "archive-more-than-there-are": ("archive", {"top_k": 100}),
    "archive-recency": ("archive", {"retriever": "recency"}),
    "archive-none": ("archive", {"retriever": "none"}),
    "archive-all": ("archive", {"retriever": "all"}),
    "archive-page-bounds": ("archive", {"retriever": ("page-bounds", {"digest_tokens": 2})}),
    "archive-host": ("archive", {"archive": "host"}),
    "archive-disk": ("archive", {"archive": "disk"}),
    "archive-nothing-recent": ("archive", {"recent": 0, "sink": 0}),
    "archive-by-token": ("archive", {"block_size": 1, "retriever": ("affinity", {"heads": "per-kv"})}),
    "top-tokens-norm": ("archive", {"compressor": ("top-tokens", {"keep": 2}), "attend": "compressed"}),
    "top-tokens-attention": (
        "archive",
        {"compressor": ("top-tokens", {"keep": 2, "by": "attention", "window": 3}), "attend": "compressed"},
    ),
    "top-tokens-compressed": (
        "archive",
        {"compressor": ("top-tokens", {"keep": 1}), "attend": "full", "top_k_compressed": 2},
    ),
    "top-tokens-all": (
        "archive",
        {"compressor": ("top-tokens", {"keep": 3}), "attend": "compressed", "retriever": "all"},
    ),
}
_SMALL: dict[str, Any] = {"sink": 3, "recent": 8, "block_size": 4, "top_k": 2, "chunk_size": 8}


def _attended(cache: TransformersCache, masks: Sequence[Tensor], start: int, stop: int, pads: Sequence[int]) -> None:
    """Note in `masks`, [rows, heads, tokens, tokens], what the tokens of this forward were given, layer by layer."""
    for mask, layer in zip(masks, cache.core.layers, strict=True):
        group = mask.shape[1] // 2  # two KV heads
        for rows, context in cache.core.contexts(layer.number):
            numbers = range(mask.shape[0]) if rows is None else rows.tolist()
            origins = context.origins[..., 0].long().expand(len(numbers), 2, -1)
            for at, row in enumerate(numbers):
                for head in range(mask.shape[1]):
                    seen = origins[at, head // group] + pads[row]
                    for now in range(max(start, pads[row]), stop):
                        mask[row, head, now, seen[seen <= now]] = True


def _blank(rows: int, count: int) -> list[Tensor]:
    return [torch.zeros(rows, 4, count, count, dtype=torch.bool) for _ in range(2)]


@pytest.mark.parametrize(
    "splits",
    [
        pytest.param(tuple(range(3, LENGTH, 8)), id="pieces"),
        pytest.param((*range(1, 14), 19, *range(44, LENGTH)), id="tokens-prompt-tokens"),
    ],
)
@pytest.mark.parametrize("name", RECALLING)
def test_what_is_recalled_is_all_that_is_attended_of_the_past(name: str, splits: tuple[int, ...]) -> None:
    policy, changes = RECALLING[name]
    settings = {**_SMALL, **changes}
    chunk = settings["chunk_size"]
    model, ids = build(), tokens(LENGTH)
    masks = _blank(1, LENGTH)
    parts, start = [], 0
    with tiered(model, policy, realigner="original", **settings) as cache, torch.no_grad():
        stops = sorted({*splits, *range(chunk, LENGTH, chunk), LENGTH})
        for stop in stops:
            parts.append(model(ids[:, start:stop], **given(cache)).logits)
            _attended(cache, masks, start, stop, [0])
            start = stop
    ours = torch.cat(parts, 1)
    assert distance(ours, masked(model, ids, dict(enumerate(masks)))) < CLOSE
    if "more" in name or "all" in name.split("-")[1:2]:
        assert all(torch.equal(m, torch.ones_like(m).tril()) for m in masks)
        return
    # The control: in one layer, one query head's last token sees one token of the past less.
    wrong = [mask.clone() for mask in masks]
    wrong[1][0, :, LENGTH // 2 :, 0] ^= True
    assert distance(ours, masked(model, ids, dict(enumerate(wrong)))) > FAR / 10
    assert not all(torch.equal(m, torch.ones_like(m).tril()) for m in masks)
    if "affinity" in name or "bounds" in name or "top" in name:
        assert any(not torch.equal(m[:, 0], m[:, 2]) for m in masks)  # KV heads choose for themselves


@pytest.mark.parametrize(
    "name", ["archive-affinity", "archive-recency", "top-tokens-attention", "top-tokens-compressed"]
)
def test_rows_with_other_padding_recall_for_themselves(name: str) -> None:
    policy, changes = RECALLING[name]
    model = build()
    rows = [tokens(n, seed=n)[0] for n in (50, 23, 2, 38)]
    pads = [50 - row.numel() for row in rows]
    ids, mask = pad_left(rows)
    masks, parts = _blank(4, 50), []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with (
        tiered(model, policy, realigner="original", **{**_SMALL, "chunk_size": 1, **changes}) as cache,
        torch.no_grad(),
    ):
        for now in range(50):
            out = model(
                ids[:, now : now + 1],
                attention_mask=mask[:, : now + 1],
                position_ids=positions[:, now : now + 1],
                **given(cache),
            )
            parts.append(out.logits)
            _attended(cache, masks, now, now + 1, pads)
    ours = torch.cat(parts, 1)
    something = [layer | torch.eye(50, dtype=torch.bool) for layer in masks]  # pads too have to see something
    own = masked(model, ids, dict(enumerate(something)), position_ids=positions)
    for i, pad in enumerate(pads):
        assert distance(ours[i, pad:], own[i, pad:]) < CLOSE
