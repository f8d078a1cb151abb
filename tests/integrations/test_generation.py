"""`model.generate` with a tiered cache: ways of decoding, several turns, padded batches, and how a prompt is cut."""

from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
from torch import Tensor
from transformers import DynamicCache

from kvtiers import GeometryError
from kvtiers_transformers import TransformersCache, tiered
from tiny_models import build, distance, feed, given, pad_left, plain, tokens

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "full-contiguous": ("full", {"realigner": "contiguous"}),
    "sliding-window": ("sliding-window", {"recent": 9, "chunk_size": 8}),
    "streaming": ("streaming", {"sink": 2, "recent": 8, "block_size": 4, "chunk_size": 8}),
    "archive": ("archive", {"sink": 2, "recent": 8, "block_size": 4, "top_k": 2, "chunk_size": 8}),
    "packforcing-lm": (
        "packforcing-lm",
        {"sink": 2, "recent": 8, "block_size": 4, "top_k": 2, "chunk_size": 8, "reach": 12},
    ),
    "pooled": (
        "packforcing-lm",
        {
            "sink": 2,
            "recent": 8,
            "block_size": 4,
            "top_k": 2,
            "chunk_size": 8,
            "attend": "compressed",
            "top_k_compressed": 0,
            "realigner": "contiguous",
        },
    ),
    "top_k_compressed": (
        "packforcing-lm",
        {"sink": 1, "recent": 6, "block_size": 3, "top_k": 2, "chunk_size": 7, "top_k_compressed": 2, "reach": 9},
    ),
    "incremental-snapkv": (
        "packforcing-lm",
        {
            "sink": 2,
            "recent": 8,
            "block_size": 4,
            "chunk_size": 8,
            "realigner": "incremental",
            "compressor": ("top-tokens", {"keep": 2, "by": "attention", "window": 4}),
            "attend": "compressed",
        },
    ),
}
FORGETFUL = [name for name in PRESETS if not name.startswith("full")]


def own(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def generated(model: Any, prompt: Tensor, cache: Any, count: int = 24, **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": count, **options}
    ids: Tensor = model.generate(prompt, **given(cache), **options)
    return ids


# ---------------------------------------------------------------- ways of decoding, under `full`


@pytest.mark.parametrize("realigner", ["original", "contiguous"])
def test_sampling_draws_the_same_tokens(realigner: str) -> None:
    model, prompt = build(), tokens(9, rows=2)
    options = {"do_sample": True, "temperature": 1.3, "top_k": 0}
    torch.manual_seed(3)
    wanted = generated(model, prompt, own(model), **options)
    with tiered(model, "full", realigner=realigner) as cache:
        torch.manual_seed(3)
        assert torch.equal(generated(model, prompt, cache, **options), wanted)
    torch.manual_seed(4)
    assert not torch.equal(generated(model, prompt, own(model), **options), wanted)


@pytest.mark.parametrize("realigner", ["original", "contiguous"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "left-padded"])
def test_beam_search_finds_the_same_beams(realigner: str, padded: bool) -> None:
    model = build()
    ids, mask = pad_left([tokens(n, seed=n)[0] for n in ((12, 5) if padded else (12, 12))])
    options = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    wanted = generated(model, ids, own(model), **options)
    with tiered(model, "full", realigner=realigner) as cache:
        assert torch.equal(generated(model, ids, cache, **options), wanted)
    assert wanted.shape[0] == 4


@pytest.mark.parametrize("name", FORGETFUL)
def test_beam_search_of_a_padded_batch_finds_what_each_row_finds_alone(name: str) -> None:
    policy, changes = PRESETS[name]
    model = build()
    rows = [tokens(n, seed=n)[0] for n in (30, 19)]
    ids, mask = pad_left(rows)
    with tiered(model, policy, **changes) as cache:
        both = generated(model, ids, cache, 12, num_beams=3, attention_mask=mask)
    for row, found in zip(rows, both, strict=True):
        with tiered(model, policy, **changes) as cache:
            alone = generated(model, row[None], cache, 12, num_beams=3)
        assert found[ids.shape[1] :].tolist() == alone[0, row.numel() :].tolist()


def test_beams_on_a_cache_that_holds_one_row_are_refused() -> None:
    model, prompt = build(), tokens(9)
    with tiered(model, "streaming") as cache:
        feed(model, prompt[:, :-1], cache, ())
        with pytest.raises(GeometryError, match=r"holds 1 rows, got 3; .*cannot grow its batch by itself"):
            generated(model, prompt, cache, num_beams=3)
        cache.batch_repeat_interleave(3)  # what the message advises
        generated(model, prompt, cache, 5, num_beams=3)


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("name", ["full", "sliding-window", "streaming"])
def test_generate_can_read_the_prompt_in_pieces(name: str, size: int) -> None:
    policy, changes = PRESETS[name]
    if name == "streaming":
        changes = {**changes, "realigner": "original"}
    model, prompt = build(), tokens(33)
    with tiered(model, policy, **changes) as cache:
        whole = generated(model, prompt, cache)
    with tiered(model, policy, **changes) as cache:
        assert torch.equal(generated(model, prompt, cache, prefill_chunk_size=size), whole)


# ---------------------------------------------------------------- several turns


@pytest.mark.parametrize("name", PRESETS)
def test_several_turns_on_one_cache_are_one_long_text(name: str) -> None:
    """A turn leaves its last token unread, so the forwards are known: they are made by hand and compared."""
    policy, changes = PRESETS[name]
    model, turns = build(), [tokens(n, seed=n) for n in (11, 1, 20)]
    texts, parts = [], torch.empty(1, 0, dtype=torch.long)
    with tiered(model, policy, **changes) as cache:
        for turn in turns:
            parts = generated(model, torch.cat([parts, turn], 1), cache, 13)
            texts.append(parts)
            assert cache.get_seq_length() == parts.shape[1] - 1
    text, read = torch.empty(1, 0, dtype=torch.long), 0
    with tiered(model, policy, **changes) as cache:
        for turn, wanted in zip(turns, texts, strict=True):
            text = torch.cat([text, turn], 1)
            for _ in range(13):
                logits = feed(model, text[:, read:], cache, ())
                read = text.shape[1]
                text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(text, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_turns_under_full_are_those_of_the_models_own_cache(family: str) -> None:
    model = build(family)
    ours = wanted = torch.empty(1, 0, dtype=torch.long)
    theirs = own(model)
    with tiered(model, "full") as cache:
        for n in (11, 2, 20):
            ours = generated(model, torch.cat([ours, tokens(n, seed=n)], 1), cache, 9)
            wanted = generated(model, torch.cat([wanted, tokens(n, seed=n)], 1), theirs, 9)
            assert torch.equal(ours, wanted)


def test_padding_between_turns_is_no_history() -> None:
    """A chat in a batch: the second turn too is padded, so a row has pads in the middle of its columns."""
    model = build()
    first, second = [tokens(n, seed=n)[0] for n in (9, 4)], [tokens(n, seed=n)[0] for n in (3, 12)]
    options: dict[str, Any] = {"realigner": "original", "sink": 2, "recent": 6, "block_size": 2, "chunk_size": 5}
    (a, mask_a), (b, mask_b) = pad_left(first), pad_left(second)
    mask = torch.cat([mask_a, mask_b], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with tiered(model, "streaming", **options) as cache, torch.no_grad():
        model(a, attention_mask=mask_a, position_ids=positions[:, :9], **given(cache))
        both = model(b, attention_mask=mask, position_ids=positions[:, 9:], **given(cache)).logits
    for i in (0, 1):
        row = torch.cat([first[i], second[i]])[None]
        with tiered(model, "streaming", **options) as cache:
            alone = feed(model, row, cache, ())
        assert distance(both[i, -second[i].numel() :], alone[0, -second[i].numel() :]) < 1e-5


# ---------------------------------------------------------------- padded batches


@pytest.mark.parametrize("name", PRESETS)
def test_a_padded_row_is_the_same_row_alone(name: str) -> None:
    policy, changes = PRESETS[name]
    model = build()
    rows = [tokens(n, seed=n)[0] for n in (33, 32, 1, 17)]
    ids, mask = pad_left(rows)
    with tiered(model, policy, **changes) as cache:
        out = generated(model, ids, cache, 10, attention_mask=mask, output_logits=True, return_dict_in_generate=True)
    for i, row in enumerate(rows):
        with tiered(model, policy, **changes) as cache:
            alone = generated(model, row[None], cache, 10, output_logits=True, return_dict_in_generate=True)
        assert out.sequences[i, ids.shape[1] :].tolist() == alone.sequences[0, row.numel() :].tolist()
        for step, logits in enumerate(alone.logits):
            assert distance(out.logits[step][i], logits[0]) < 1e-5


def test_the_oracle_of_padding_notices_a_pad_that_is_stored() -> None:
    model, row = build(), tokens(17)
    with tiered(model, "streaming", sink=2, recent=8, block_size=4) as cache:
        alone = feed(model, row, cache, ())
    padded = torch.cat([torch.zeros(1, 1, dtype=torch.long), row], 1)
    with tiered(model, "streaming", sink=2, recent=8, block_size=4) as cache:
        assert distance(feed(model, padded, cache, ())[:, 1:], alone) > 0.02


# ---------------------------------------------------------------- rows: reorder, repeat, select


@pytest.mark.parametrize(
    ("name", "padded"),
    [pytest.param(name, True, id=f"{name}-left-padded") for name in PRESETS]
    + [pytest.param(name, False, id=f"{name}-even") for name in ("streaming", "archive")],
)
def test_reordered_repeated_and_selected_rows_go_on_as_themselves(name: str, padded: bool) -> None:
    policy, changes = PRESETS[name]
    model = build()
    rows = [tokens(n, seed=n)[0] for n in ((38, 21, 38) if padded else (38, 38, 38))]
    more = tokens(14, seed=5)[0]

    def last(row: Tensor) -> Tensor:
        with tiered(model, policy, **changes) as cache:
            feed(model, row[None], cache, ())
            return feed(model, more[None], cache, tuple(range(1, 14)))

    first, second = last(rows[0]), last(rows[1])
    alone = [first, second, first]  # rows of one length are alike
    ids, mask = pad_left(rows)
    moves: dict[str, tuple[list[int], Any]] = {
        "reorder": ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        "repeat": ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
        "select": ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        "mask": ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([True, False, True]))),
    }
    with tiered(model, policy, **changes) as start, torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, **given(start))
        for which, move in moves.values():
            cache = start.fork()
            move(cache)
            at = torch.tensor([rows[i].numel() for i in which])
            parts = []
            for step in range(14):
                ids_now = more[None, step : step + 1].expand(len(which), 1)
                parts.append(model(ids_now, position_ids=(at + step)[:, None], **given(cache)).logits)
            got = torch.cat(parts, 1)
            for i, row in enumerate(which):
                assert distance(got[i], alone[row][0]) < 1e-5


# ---------------------------------------------------------------- one shot or in pieces


@pytest.mark.parametrize("name", PRESETS)
def test_pieces_that_end_on_the_chunk_grid_change_nothing(name: str) -> None:
    policy, changes = PRESETS[name]
    model, ids = build(), tokens(60)
    size = changes.get("chunk_size") or 8
    with tiered(model, policy, **changes) as cache:
        whole = feed(model, ids, cache, ())
    for ends in (tuple(range(size, 60, size)), (size, 3 * size, 6 * size)):
        with tiered(model, policy, **changes) as cache:
            assert distance(feed(model, ids, cache, ends), whole) < 1e-6


@pytest.mark.parametrize("ends", [(1,), (3, 4, 5), (59,), (7, 8, 9, 16, 31, 33), tuple(range(60))], ids=str)
@pytest.mark.parametrize("name", ["sliding-window", "streaming"])
def test_policies_that_drop_with_gaps_read_pieces_of_any_size(name: str, ends: tuple[int, ...]) -> None:
    policy, changes = PRESETS[name]
    model, ids = build(), tokens(60)
    with tiered(model, policy, **{**changes, "realigner": "original"}) as cache:
        whole = feed(model, ids, cache, ())
    with tiered(model, policy, **{**changes, "realigner": "original"}) as cache:
        assert distance(feed(model, ids, cache, ends), whole) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"sink": 50, "recent": 3},
        {"sink": 0, "recent": 0},
        {"block_size": 100},
        {"chunk_size": 1},
        {"top_k": 1000},
        {"block_size": 1, "recent": 1, "sink": 1, "top_k": 1},
        {"chunk_size": 5, "block_size": 7, "recent": 3},
        {"chunk_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 29])
@pytest.mark.parametrize("name", ["streaming", "archive", "top_k_compressed"])
def test_odd_budgets_and_prompts_are_within_bounds_and_finite(name: str, count: int, changes: dict[str, Any]) -> None:
    policy, same = PRESETS[name]
    model, prompt = build(), tokens(count)
    with tiered(model, policy, **{**same, **changes}) as cache:
        logits = feed(model, torch.cat([prompt, tokens(14, seed=2)], 1), cache, tuple(range(count, count + 14)))
        bound = cache.policies[0].bound(cache.core.geometries[0])
        _check_tier_counts(cache, count + 14)
        width = cache.core.context(0).keys.shape[2]
    assert logits.isfinite().all()
    assert bound is None or width <= bound
    if count + 14 <= (changes.get("sink") or 0):  # nothing can have been left out
        assert distance(logits, plain(model, torch.cat([prompt, tokens(14, seed=2)], 1))) < 1e-5


def _check_tier_counts(cache: TransformersCache, count: int) -> None:
    for layer in range(2):
        assert sum(cache.core.tier_counts(layer).values()) == count
