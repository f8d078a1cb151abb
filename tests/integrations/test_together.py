"""Rows of different length are decoded in one attention call, and each is still the same row alone."""

import weakref

import attrs
import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.accounting import bytes_in
from kvtiers.cache import TieredCache
from kvtiers.errors import SelectionError
from kvtiers.geometry import Geometry
from kvtiers.presets import policy
from kvtiers.rows import Chunk, PaddingPattern
from kvtiers_transformers.together import buffers, can_share, chunks
from strategies import STEPS, Setting, Stream, attend_context, fewer, policies, rotary, settings_of, small_presets


def fed(cache: TieredCache, now: Stream, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, list[Chunk]]:
    """What every row attends to, zero at pads, and the attention calls that it took."""
    batch, heads, steps = now.query.shape[:3]
    out = torch.zeros(batch, heads, steps, now.values.shape[-1], dtype=torch.float64)
    calls = []
    with torch.no_grad():
        padding = PaddingPattern.of(valid)
        for chunk in chunks(cache.layers[0], now.query, now.keys, now.values, padding):
            rows = torch.arange(batch) if chunk.rows is None else chunk.rows
            columns = torch.arange(steps)[chunk.columns]
            out[rows[:, None], :, columns[None]] = attend_context(chunk.query, chunk.context).transpose(1, 2)
            calls.append(chunk)
    return out, calls


@fewer
@given(data=st.data())
def test_each_row_decoded_with_others_is_the_same_row_alone(data):
    """Prompts of any length, then tokens of which now and then one row gets none, after row changes and rollbacks."""
    setting = data.draw(settings_of(policies() | small_presets(), max_heads=2))
    geometry, tokens = attrs.evolve(setting.geometry, batch=3), attrs.evolve(setting.geometry, batch=3)
    setting = attrs.evolve(setting, geometry=geometry)
    tokens, alone = setting.tokens, attrs.evolve(setting, geometry=attrs.evolve(geometry, batch=1))
    cache, ones = setting.cache(), [alone.cache() for _ in range(3)]
    longest = 16
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, longest), min_size=3, max_size=3), label="prompts"))
    valid = torch.arange(longest) >= longest - lengths[:, None]
    start, forwards = longest, [(tokens.part(0, longest), valid)]
    steps = st.sampled_from(["token", "token", "token", "token", "pad", "rows"])
    changes = data.draw(st.lists(steps, min_size=1, max_size=STEPS - longest), label="changes")
    for change in changes:
        absent = torch.tensor([[change != "pad"], [True], [True]])
        forwards.append((tokens.part(start, start + 1), absent))
        start += 1
    for number, (now, real) in enumerate(forwards):
        if number and changes[number - 1] == "rows":
            rows = data.draw(st.permutations(range(3)), label="rows")
            cache.select_rows(torch.tensor(rows))
            ones = [ones[row].fork() for row in rows]
        could = number and bool(real.all()) and all(can_share(layer) for layer in cache.every_layer())
        got, calls = fed(cache, now, real)
        if could and all(can_share(layer) for layer in cache.every_layer()):
            assert len(calls) == 1
        for row, one in enumerate(ones):
            columns = real[row].nonzero()[:, 0]
            if len(columns):
                own = Stream(*(x[row : row + 1][:, :, columns] for x in (now.query, now.keys, now.values)))
                want, _ = fed(one, own)
                assert torch.allclose(got[row, :, columns], want[0], rtol=1e-5, atol=1e-5)


def batch(name: str = "archive", **changes: object) -> tuple[Setting, TieredCache]:
    """Three rows of 5, 9 and 14 tokens."""
    sizes = {"sink": 1, "recent": 4, "block_size": 2, "top_k": 1, "chunk_size": 4} | changes
    setting = Setting(
        policy=policy(name, **sizes), geometry=Geometry(kv_heads=2, head_dim=4, batch=3), rotary=rotary(4), seed=0
    )
    cache = setting.cache()
    fed(cache, setting.tokens.part(0, 14), torch.arange(14) >= 14 - torch.tensor([5, 9, 14])[:, None])
    return setting, cache


def test_bytes_are_told_as_they_are_held_in_the_shared_buffer():
    setting, cache = batch()
    for step in range(14, 30):
        fed(cache, setting.tokens.part(step, step + 1))
        layers = cache.every_layer()
        planes = [plane for layer in layers for plane in layer.window.planes.values()]
        held = {plane.untyped_storage().data_ptr(): plane.untyped_storage().nbytes() for plane in planes}
        assert len(held) == 2
        of_history = [*(x for layer in layers for x in layer.history.tensors()), *(
            x for layer in layers if layer.placed.mid for x in layer.placed.mid.tensors())]  # fmt: skip
        rest = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in of_history}
        stores = sum(n for layer in layers for store in layer.history.stores.values()
                     for n in store.bytes_by_location().values())  # fmt: skip
        assert bytes_in(cache.memory_usage(), "device") == sum(held.values()) + sum(rest.values()) + stores


def test_forgetting_everything_frees_the_shared_buffer():
    setting, cache = batch()
    fed(cache, setting.tokens.part(14, 15))
    shared = weakref.ref(buffers[cache.every_layer()[0]])
    cache.reset()
    assert not cache.layers[0].groups
    assert shared() is None


def test_a_fork_writes_nothing_into_the_buffer_that_its_origin_shares():
    setting, cache = batch()
    fed(cache, setting.tokens.part(14, 15))
    other = cache.fork()
    fed(other, setting.tokens.part(20, 21))
    control = batch()[1]
    fed(control, setting.tokens.part(14, 15))
    got, want = (fed(one, setting.tokens.part(15, 16))[0] for one in (cache, control))
    assert torch.equal(got, want)


@pytest.mark.parametrize("change", ["select_rows", "fork"])
def test_the_buffer_grows_with_the_tokens_and_not_with_each_change_of_rows(change):
    setting, cache = batch("full", chunk_size=None)
    for step in range(14, 30):
        if change == "fork":
            cache = cache.fork()
            assert cache.every_layer()[0] not in buffers
        else:
            cache.select_rows(torch.arange(3))
        fed(cache, setting.tokens.part(step, step + 1))
    assert max(layer.window.slots for layer in cache.every_layer()) <= 2 * 30


def test_rows_that_come_to_weigh_tokens_while_they_decode_together_attend_by_themselves():
    setting, cache = batch()
    cache.compact(recent=1)  # cuts blocks short: what fills them up has a bias, once it is chosen
    assert all("bias" not in layer.window.planes for layer in cache.every_layer())
    now, alone = setting.tokens.part(14, 15), cache.fork()
    got, calls = fed(cache, now)
    want = torch.zeros_like(got)
    with torch.no_grad():
        for chunk in alone.layers[0].chunks(now.query, now.keys, now.values):
            want[chunk.rows] = attend_context(chunk.query, chunk.context)
    assert any("bias" in layer.window.planes for layer in cache.every_layer())
    assert len(calls) == 3
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_while_the_sink_fills_there_is_nothing_recent_to_rewind(steps):
    setting, cache = batch(sink=4)
    setting = attrs.evolve(setting, geometry=attrs.evolve(setting.geometry, batch=1))
    cache, other = setting.cache(), setting.cache()
    for one in (cache, other):
        fed(one, setting.tokens.part(0, steps))
    assert cache.rewind_recent() == 0
    got, want = (fed(one, setting.tokens.part(steps, steps + 1))[0] for one in (cache, other))
    assert torch.equal(got, want)


def test_where_gradients_are_wanted_rows_attend_by_themselves():
    setting, cache = batch()
    now = setting.tokens.part(14, 15)
    calls = list(chunks(cache.layers[0], now.query, now.keys.requires_grad_(), now.values, None))
    assert len(calls) == 3
    assert sum(chunk.context.keys.requires_grad for chunk in calls) == 3


def test_positions_of_rows_that_attend_together_are_asked_of_each_group():
    setting, cache = batch()
    _, (chunk,) = fed(cache, setting.tokens.part(14, 15))
    with pytest.raises(SelectionError, match="contexts\\(layer\\)"):
        _ = chunk.context.origins
    assert [context.origins.shape[2] for _, context in cache.contexts(0)] == [
        layer.attended for layer in cache.every_layer()
    ]


def test_a_layer_that_watches_its_queries_is_shown_those_of_a_token_decoded_with_others():
    sizes = {"compressor": ("top-tokens", {"by": "attention", "keep": 1, "window": 3}), "attend": "compressed"}
    setting, cache = batch("archive", **sizes)
    for step in range(14, 17):
        now = setting.tokens.part(step, step + 1)
        fed(cache, now)
    latest = [layer.watched.latest for layer in cache.every_layer()]
    assert all(x is not None and torch.equal(x[:, :, -1:], layer_query) for x, layer_query in zip(
        latest, now.query.split(1), strict=True))  # fmt: skip
