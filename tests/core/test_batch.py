"""Invariant 9: rows are independent. Taking rows commutes with appending, and a padded row is the same row alone."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers import testing
from kvtiers.errors import GeometryError
from kvtiers.geometry import Geometry
from kvtiers.presets import policy
from kvtiers.rows import LayerRows, PaddingPattern
from strategies import (
    STEPS,
    Setting,
    Stream,
    attend_context,
    copied,
    cuts,
    feed_all,
    fewer,
    policies,
    rotary,
    settings_of,
    small_presets,
)


def rows_of(batch: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)


@given(data=st.data())
def test_taking_rows_before_or_after_appending_is_the_same(data):
    setting = data.draw(settings_of())
    rows = torch.tensor(data.draw(rows_of(setting.geometry.batch), label="rows"))
    lengths = data.draw(cuts(setting.policy))
    split = data.draw(st.integers(0, len(lengths)), label="taken after")
    trial = testing.Trial.start(
        setting.policy, setting.geometry, setting.rotary, seed=setting.seed, steps=setting.steps
    )
    other = testing.Trial.start(
        setting.policy, setting.geometry, setting.rotary, seed=setting.seed, steps=setting.steps
    )
    other.query, other.keys, other.values = other.query[rows], other.keys[rows], other.values[rows]
    for number, steps in enumerate(lengths):
        if number == split:
            trial.select_rows(rows)
        mine, theirs = trial.feed(steps), other.feed(steps)
        if number >= split:
            for name in ("keys", "values"):
                a, b = getattr(mine, name), getattr(theirs, name)
                assert a.shape == b.shape
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@given(data=st.data())
def test_what_was_taken_still_keeps_the_invariants(data):
    setting = data.draw(settings_of())
    trial = testing.Trial.start(
        setting.policy, setting.geometry, setting.rotary, seed=setting.seed, steps=setting.steps
    )
    for steps in data.draw(cuts(setting.policy)):
        context = trial.feed(steps)
        if data.draw(st.booleans(), label="select_rows"):
            trial.select_rows(torch.tensor(data.draw(rows_of(trial.geometry.batch))))
            context = trial.cache.context(0)
        testing.conservation(trial)
        testing.contents(trial, context)
        testing.bounded(trial, context)


@given(data=st.data())
def test_taking_in_two_goes_is_taking_once(data):
    setting = data.draw(settings_of())
    batch = setting.geometry.batch
    first = torch.tensor(data.draw(rows_of(batch)))
    second = torch.tensor(data.draw(rows_of(len(first))))
    lengths = data.draw(cuts(setting.policy))
    twice, once = setting.cache(), setting.cache()
    for cache in (twice, once):
        feed_all_cache(cache, setting.tokens, lengths)
    twice.select_rows(first)
    twice.select_rows(second)
    once.select_rows(first[second])
    assert testing.difference(twice.context(0), once.context(0)) is None


def feed_all_cache(cache, tokens: Stream, lengths: list[int], start: int = 0) -> None:
    for length in lengths:
        now = tokens.part(start, start + length)
        cache.write(0, now.keys, now.values)
        cache.select(0, now.query)
        start += length


def attended(layer: LayerRows, tokens: Stream, valid: torch.Tensor | None) -> torch.Tensor:
    """What every row's tokens attend to, [batch, query_heads, steps, value_dim], zero at pads."""
    batch, heads, steps = tokens.query.shape[:3]
    out = torch.zeros(batch, heads, steps, tokens.values.shape[-1], dtype=torch.float64)
    for chunk in layer.chunks(tokens.query, tokens.keys, tokens.values, PaddingPattern.of(valid)):
        got = attend_context(chunk.query, chunk.context)
        rows = range(batch) if chunk.rows is None else chunk.rows.tolist()
        columns = chunk.columns
        where = range(steps)[columns] if isinstance(columns, slice) else columns.tolist()
        for at, row in enumerate(rows):
            out[row, :, list(where)] = got[at]
    return out


@fewer
@given(data=st.data())
def test_a_padded_row_is_the_same_row_alone(data):
    """Pads anywhere: left, right, in between, whole rows, in the first forward and in later ones."""
    setting = data.draw(settings_of(policies() | small_presets(), max_heads=2))
    geometry, tokens = setting.geometry, setting.tokens
    of_all, alone = setting.cache(), attrs.evolve(setting, geometry=attrs.evolve(geometry, batch=1))
    of_one = [alone.cache() for _ in range(geometry.batch)]
    together = of_all.layers[0]
    start = 0
    for length in data.draw(st.lists(st.integers(1, STEPS // 4), min_size=1, max_size=4), label="forwards"):
        bits = st.lists(st.booleans(), min_size=length, max_size=length)
        padded = st.integers(0, length).map(lambda pads, n=length: [i >= pads for i in range(n)])
        whole = st.just([True] * length)
        valid = torch.tensor([data.draw(bits | padded | whole, label="valid") for _ in range(geometry.batch)])
        now = tokens.part(start, start + length)
        start += length
        got = attended(together, now, valid)
        for row, cache in enumerate(of_one):
            columns = valid[row].nonzero()[:, 0]
            if not len(columns):
                continue
            own = Stream(*(x[row : row + 1][:, :, columns] for x in (now.query, now.keys, now.values)))
            want = attended(cache.layers[0], own, None)
            assert torch.allclose(got[row, :, columns], want[0], rtol=1e-5, atol=1e-5)
        assert together.batch == geometry.batch


def test_what_is_at_a_pad_does_not_matter():
    setting = Setting(
        policy=policy("archive", sink=1, recent=2, block_size=2, top_k=1, chunk_size=4),
        geometry=Geometry(kv_heads=2, head_dim=4, batch=2),
        rotary=rotary(4),
        seed=0,
    )
    valid = torch.tensor([[False] * 5 + [True] * 9, [True] * 14])
    one = setting.tokens.part(0, 14)
    other = Stream(*(x.clone() for x in (one.query, one.keys, one.values)))
    for x in (other.query, other.keys, other.values):
        x[0, :, :5] = 1e6
    for mask, same in ((valid, True), (None, False)):
        caches = setting.cache(), setting.cache()
        a, b = (attended(cache.layers[0], part, mask) for cache, part in zip(caches, (one, other), strict=True))
        assert torch.equal(a, b) == same


@fewer
@given(data=st.data())
def test_rows_that_parted_ways_are_taken_like_any_others(data):
    setting = data.draw(settings_of(max_heads=2))
    batch, tokens = setting.geometry.batch, setting.tokens
    pads = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch)))
    rows = torch.tensor(data.draw(rows_of(batch)))
    valid = torch.arange(8) >= pads[:, None]
    caches = setting.cache(), setting.cache()
    after, before = (cache.layers[0] for cache in caches)
    attended(after, tokens.part(0, 8), valid)
    caches[0].select_rows(rows)
    attended(before, tokens.select_rows(rows).part(0, 8), valid[rows])
    assert after.batch == before.batch == len(rows)
    later = tokens.select_rows(rows).part(8, 14)
    assert torch.allclose(attended(after, later, None), attended(before, later, None), rtol=1e-5, atol=1e-5)


def filled(batch: int = 2):
    setting = Setting(
        policy=policy("streaming", sink=1, recent=2, block_size=2, chunk_size=8),
        geometry=Geometry(kv_heads=2, head_dim=4, batch=batch),
        rotary=rotary(4),
        seed=0,
    )
    cache = setting.cache()
    feed_all_cache(cache, setting.tokens, [4])
    return cache, setting


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_another_number_of_rows_is_a_clear_error_and_changes_nothing(batch):
    cache, setting = filled()
    before = copied(cache.context(0))
    other = attrs.evolve(setting, geometry=attrs.evolve(setting.geometry, batch=batch)).tokens.part(0, 1)
    with pytest.raises(GeometryError, match=f"holds 2 rows, got {batch}; a filled cache cannot grow its batch"):
        cache.write(0, other.keys, other.values)
    with pytest.raises(GeometryError, match=f"holds 2 rows, got {batch}"):
        list(cache.layers[0].chunks(other.query, other.keys, other.values))
    assert testing.difference(before, cache.context(0)) is None


@pytest.mark.parametrize("empty", ["after reset", "after crop to nothing", "after a first append that was refused"])
def test_an_empty_cache_takes_a_batch_of_any_size(empty):
    cache, setting = filled()
    if empty == "after reset":
        cache.reset()
    elif empty == "after crop to nothing":
        cache.crop(0)
    else:
        cache.reset()
        with pytest.raises(GeometryError):
            cache.write(0, torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 1, 3))
    other = attrs.evolve(setting, geometry=attrs.evolve(setting.geometry, batch=3)).tokens
    feed_all_cache(cache, other, [2])
    assert cache.context(0).keys.shape[0] == 3


@pytest.mark.parametrize("rows", [[0, 2], [-1], [5, 0]])
@pytest.mark.parametrize("padded", [False, True], ids=["one group", "two groups"])
def test_a_row_that_is_not_there_cannot_be_taken(rows, padded):
    cache, setting = filled()
    if padded:
        cache.reset()
        valid = torch.tensor([[True] * 4, [False] + [True] * 3])
        attended(cache.layers[0], setting.tokens.part(0, 4), valid)
    before = [copied(context) for _, context in cache.contexts(0)]
    with pytest.raises(GeometryError, match=r"holds rows 0 to 1"):
        cache.select_rows(torch.tensor(rows))
    after = [context for _, context in cache.contexts(0)]
    assert all(testing.difference(a, b) is None for a, b in zip(before, after, strict=True))


def test_the_context_of_rows_that_parted_ways_is_read_per_group():
    cache, setting = filled()
    cache.reset()
    valid = torch.tensor([[True] * 4, [False, False, True, True]])
    attended(cache.layers[0], setting.tokens.part(0, 4), valid)
    with pytest.raises(GeometryError, match="2 groups of rows"):
        cache.context(0)
    groups = cache.contexts(0)
    assert [rows.tolist() for rows, _ in groups] == [[0], [1]]
    assert [context.keys.shape[2] for _, context in groups] == [4, 2]
    assert cache.tier_counts(row=0) != cache.tier_counts(row=1)
    assert sum(cache.tier_counts(row=1).values()) == 2


@given(data=st.data())
def test_the_same_tokens_give_the_same_contexts_again(data):
    setting = data.draw(settings_of())
    lengths = data.draw(cuts(setting.policy))
    one, other = (feed_all(setting.layer(), setting.tokens, lengths) for _ in range(2))
    assert all(testing.difference(a, b) is None for a, b in zip(one, other, strict=True))
