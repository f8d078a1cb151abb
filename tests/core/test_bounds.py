"""Invariant 6: tokens and bytes stay within what a policy says beforehand, and what is reported is what is held."""

from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers import testing, trials
from kvtiers.accounting import bytes_in
from kvtiers.blocks import Blocks
from kvtiers.cache import TieredCache
from kvtiers.errors import SlotError
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.presets import policy
from kvtiers.rotary import Rotary
from kvtiers.rows import PaddingPattern
from kvtiers.slots import Compressor
from strategies import STEPS, Setting, cuts, feed, fewer, names, policies, rotary, settings_of, small_presets, stream


@given(data=st.data())
def test_tokens_and_bytes_stay_within_their_bounds_and_reports_are_true(data):
    setting = data.draw(settings_of())
    trial = testing.Trial.start(setting.policy, setting.geometry, setting.rotary, seed=setting.seed, steps=STEPS)
    for steps in data.draw(cuts(setting.policy, most=20)):
        testing.bounded(trial, trial.feed(steps))


@fewer
@given(data=st.data())
def test_several_layers_hold_the_sum_of_what_each_may(data):
    geometry = Geometry(kv_heads=2, head_dim=4, batch=2)
    drawn = data.draw(st.lists(policies() | small_presets(), min_size=2, max_size=3))
    each = [one for one in drawn if one.realigner.rotates == drawn[0].realigner.rotates]  # as a cache must have them
    cache = TieredCache(each, [geometry] * len(each), rotaries=[rotary(4)] * len(each))
    tokens, start = stream(geometry), 0
    for length in data.draw(cuts(min(each, key=lambda p: p.chunk_size or 99))):
        now = tokens.part(start, start + length)
        start += length
        for layer in range(len(each)):
            cache.write(layer, now.keys, now.values)
            cache.select(layer, now.query)
    limits = [p.bound_bytes(geometry, s.history.count) for p, s in zip(each, cache.every_layer(), strict=True)]
    held = cache.memory_usage()
    if None not in limits:
        assert bytes_in(held, "device") <= sum(limits)
    for location in ("device", "host"):
        assert bytes_in(held, location) == sum(trials.storages(layer)[location] for layer in cache.every_layer())


@fewer
@given(data=st.data())
def test_reports_are_true_when_rows_part_ways(data):
    setting = data.draw(settings_of(policies(chunk_size=6)))
    cache, tokens, batch = setting.cache(), setting.tokens, setting.geometry.batch
    for number in range(3):
        part = tokens.part(number * 10, number * 10 + 10)
        pads = data.draw(st.lists(st.integers(0, 4) | st.just(10), min_size=batch, max_size=batch))
        valid = torch.arange(10) >= torch.tensor(pads)[:, None]
        list(cache.layers[0].chunks(part.query, part.keys, part.values, PaddingPattern.of(valid)))
    held = cache.memory_usage()
    for location in ("device", "host"):
        real = trials.storages(*cache.every_layer())
        assert bytes_in(held, location) == real[location]


@attrs.frozen
class Merged(Compressor):
    """A block becomes one token, which counts as all that it stands for, or is left out by some heads."""

    def age(self, blocks, moment):
        logs = torch.full((1, blocks.keys.shape[1], 1, 1), float(blocks.tokens)).log()
        logs[:, 1:] = -torch.inf
        mean = (x.mean(-2, keepdim=True) for x in (blocks.keys, blocks.values, blocks.offsets))
        keys, values, offsets = mean
        return attrs.evolve(blocks, keys=keys, values=values, offsets=offsets, bias=logs)

    def compressed_tokens(self, tokens):
        return 1


@given(data=st.data())
def test_biases_and_blocks_that_compact_cuts_short_are_counted(data):
    found = data.draw(policies(recent=data.draw(st.integers(0, 9)), chunk_size=6, retriever=("recency", "affinity")))
    found = data.draw(st.sampled_from([found, attrs.evolve(found, compressor=Merged())]))
    setting = data.draw(settings_of(st.just(found)))
    trial = testing.Trial.start(setting.policy, setting.geometry, setting.rotary, seed=setting.seed, steps=STEPS)
    for steps in data.draw(cuts(setting.policy, most=12)):
        trial.feed(steps)
        if data.draw(st.booleans(), label="compact"):
            trial.cache.compact(recent=data.draw(st.integers(0, 5)))
            trial.cache.select(0, trial.query[:, :, trial.num_steps - 1 : trial.num_steps])
        limit = setting.policy.bound_bytes(setting.geometry, trial.layer.history.count)
        archived = trials.storages(trial.layer)["device"]
        assert limit is None or archived <= limit


@pytest.mark.parametrize("per_head", [False, True])
def test_the_bias_of_a_form_that_is_given_is_counted(per_head):
    """Its archive is kept elsewhere, so that nothing else hides what biases take."""
    found = policy("packforcing", archive="host", top_k=3, retriever="recency")
    found = attrs.evolve(found, compressor=Given())
    geometry = Geometry(kv_heads=2, head_dim=12, grid=(4, 4), steps_per_commit=4, causal=False)
    layer = Layer(policy=found, geometry=geometry, rotary=Rotary([torch.ones(2)] * 3, layout="interleaved"))
    for number in range(40):
        tokens = torch.randn(1, 2, 64, 12)
        layer.write(tokens, tokens)
        layer.select(None)
        heads = 2 if per_head else 1
        offsets, bias = torch.rand(1, heads, 1, 3, 3), torch.rand(1, heads, 1, 3)
        small, starts = torch.randn(1, 2, 1, 3, 12), torch.tensor([4 * number])
        layer.commit(Blocks(keys=small, values=small, offsets=offsets, bias=bias, starts=starts, span=4))
        assert trials.storages(layer)["device"] <= found.bound_bytes(geometry, layer.history.count)
    assert "bias" in layer.window.planes


def test_forms_that_are_given_lie_where_each_says_though_there_is_one_row_and_head():
    found = attrs.evolve(policy("packforcing", archive="host", top_k=3, retriever="recency"), compressor=Given())
    geometry, every = Geometry(kv_heads=1, head_dim=12, grid=(4, 4), steps_per_commit=4, causal=False), []
    layer = Layer(policy=found, geometry=geometry, rotary=Rotary([torch.ones(2)] * 3, layout="interleaved"))
    for number in range(12):
        tokens = torch.randn(1, 1, 64, 12)
        layer.write(tokens, tokens)
        layer.select(None)
        every.append(torch.rand(1, 1, 1, 3, 3))
        small, starts = torch.randn(1, 1, 1, 3, 12), torch.tensor([4 * number])
        layer.commit(Blocks(keys=small, values=small, offsets=every[-1], starts=starts, span=4, offsets_differ=True))
    held = layer.history.tokens["compressed"].offsets
    assert held is not None
    first = (layer.timeline.sink + 3) // 4
    assert torch.equal(held.data, torch.cat(every[first : first + layer.history.count], 2))


@attrs.frozen
class Given(Compressor):
    given: ClassVar[bool] = True

    def age(self, blocks, moment):
        raise AssertionError("it is given")

    def compressed_tokens(self, tokens):
        return 3


@attrs.frozen
class SaysAlike(Merged):
    alike: ClassVar[bool] = True


def test_a_compressor_that_says_its_blocks_are_alike_and_gives_them_a_bias_is_refused():
    found = attrs.evolve(policy("archive", attend="compressed", sink=0, recent=2, block_size=2), compressor=SaysAlike())
    setting = Setting(policy=found, geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0)
    with pytest.raises(SlotError, match=r"SaysAlike.age\(\) made blocks that have a bias.*says alike = True"):
        list(feed(setting.layer(), setting.tokens, [4, 4, 4]))


def is_flat(name: str) -> bool:
    """Whether device bytes are promised not to grow: the policy drops, or archives elsewhere with no digests."""
    found = policy(name)
    return found.recent is not None and found.compressor.drops


@pytest.mark.parametrize("name", [name for name in names("policy") if is_flat(name)])
def test_what_drops_holds_the_same_bytes_from_its_first_token_to_its_last(name):
    found = attrs.evolve(policy(name), sink=2, recent=9, block_size=2, chunk_size=4)
    setting = Setting(policy=found, geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0, steps=120)
    layer, sizes = setting.layer(), set()
    for _ in feed(layer, setting.tokens, [4] * 20 + [1] * 40):
        sizes.add(trials.storages(layer)["device"])
    assert len(sizes) == 1


@pytest.mark.parametrize("where", ["host", "disk"])
def test_an_archive_elsewhere_without_digests_keeps_the_device_flat(where):
    """24 bytes a block remain there: the step at which it began, and how many it is, whole and compressed."""
    found = policy("archive", retriever="recency", archive=where, sink=2, recent=9, block_size=2, top_k=2, chunk_size=4)
    setting = Setting(policy=found, geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0, steps=120)
    layer, grown = setting.layer(), []
    for _ in feed(layer, setting.tokens, [4] * 20 + [1] * 40):
        # on a machine without an accelerator both locations are the same memory; the store's own is left out
        device = bytes_in_device(layer)
        table = layer.history.table.nbytes
        assert table <= 24 * layer.history.count * 5 // 4
        grown.append(device - table)
    assert max(grown[10:]) <= max(grown[:10])
    assert layer.history.count > 30


def bytes_in_device(layer) -> int:
    return trials.storages(layer)["device"]


@given(data=st.data())
def test_a_buffer_that_is_full_is_as_large_as_its_bound_says(data):
    """The bound is no guess: the context buffer of a bounded policy has exactly its slots, and never grows."""
    setting = data.draw(settings_of(policies(recent=5, chunk_size=4, retriever=("none", "recency", "affinity"))))
    slots = setting.policy.slots(setting.geometry)
    assert slots is not None
    layer = setting.layer()
    for _ in feed(layer, setting.tokens, data.draw(cuts(setting.policy, most=20))):
        assert {plane.shape[2] for plane in layer.window.planes.values()} == {slots}


@fewer
@given(data=st.data())
def test_the_bound_is_reached(data):
    """A bound that is never reached would be too high."""
    found = data.draw(
        policies(
            compressor="keep",
            retriever="recency",
            archive="host",
            recent=5,
            block_size=1,
            chunk_size=4,
            top_k_compressed=0,
        )
    )
    setting = data.draw(settings_of(st.just(found)))
    most = max(context.keys.shape[2] for _, context in feed(setting.layer(), setting.tokens, [4] * 8))
    assert most == found.bound(setting.geometry)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"recent": None}, id="nothing leaves recent"),
        pytest.param({"chunk_size": None}, id="forwards of any length"),
        pytest.param({"retriever": "all"}, id="everything is attended"),
    ],
)
def test_what_has_no_limit_says_so(changes):
    found = policy("archive", **changes)
    geometry = Geometry(kv_heads=2, head_dim=4)
    assert found.bound(geometry) is None
    assert found.bound_bytes(geometry, 5) is None


def test_bytes_are_released_when_a_cache_is_reset():
    setting = Setting(
        policy=policy("archive", recent=3, block_size=2, sink=1, top_k=1),
        geometry=Geometry(kv_heads=2, head_dim=4),
        rotary=rotary(4),
        seed=0,
    )
    cache, now = setting.cache(), setting.tokens.part(0, 20)
    for _ in cache.layers[0].chunks(now.query, now.keys, now.values):
        pass
    assert bytes_in(cache.memory_usage(), "device") > 0
    cache.reset()
    assert cache.memory_usage() == []
    assert cache.num_steps == 0


@pytest.mark.parametrize("archive", ["device", "host", "disk"])
def test_bytes_are_reported_in_the_place_where_they_are(archive):
    setting = Setting(
        policy=policy("archive", archive=archive, recent=3, block_size=2, sink=1, top_k=1, chunk_size=4),
        geometry=Geometry(kv_heads=2, head_dim=4),
        rotary=rotary(4),
        seed=0,
    )
    cache, now = setting.cache(), setting.tokens.part(0, 20)
    for _ in cache.layers[0].chunks(now.query, now.keys, now.values):
        pass
    mid = {held.location: held.bytes for held in cache.memory_usage() if held.tier == "mid"}
    block = 2 * setting.geometry.token_bytes
    assert mid[archive] >= cache.every_layer()[0].history.count * block
    assert set(mid) == {archive, "device"}  # the chosen block is in the context buffer too
