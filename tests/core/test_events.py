"""What observers are told: everything that happens, once, counted as the events say; one that fails is left out."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvtiers
from kvtiers.blocks import Blocks
from kvtiers.events import Archived, Committed, Compressed, Event, Recalled, Selected
from kvtiers.plugins import registry
from kvtiers.presets import build
from kvtiers.slots import Compressor, Moment
from strategies import Setting, cuts, policies, rotary, settings_of

GEOMETRY = kvtiers.Geometry(kv_heads=2, query_heads=4, head_dim=4, batch=3)
SMALL = {"sink": 1, "recent": 3, "block_size": 2, "top_k": 2, "chunk_size": 4}


def setting_of(name: str, **changes: Any) -> Setting:
    return Setting(policy=kvtiers.policy(name, **SMALL | changes), geometry=GEOMETRY, rotary=rotary(4), seed=0)


def fill(cache: kvtiers.TieredCache, setting: Setting, lengths: list[int], start: int = 0) -> None:
    for length in lengths:
        now = setting.tokens.part(start, start + length)
        cache.write(0, now.keys, now.values)
        cache.select(0, now.query)
        start += length


class Listener:
    """A plugin that hears events."""

    def __init__(self, hear: Callable[[Event], object]) -> None:
        self.hear = hear

    @kvtiers.hookimpl
    def kvtiers_observe(self, event: Event) -> None:
        self.hear(event)


@pytest.fixture
def plug() -> Iterator[Callable[[Callable[[Event], object]], str]]:
    names: list[str] = []

    def put(hear: Callable[[Event], object]) -> str:
        names.append(registry().register(Listener(hear), f"listener {len(names)}").name)
        return names[-1]

    yield put
    for name in names:
        if any(plugin.name == name for plugin in registry().plugins):
            registry().unregister(name)


# ---------------------------------------------------------------------- who hears


def test_a_plugin_that_comes_after_a_cache_was_made_hears_it_from_then_on(plug):
    setting = setting_of("archive")
    cache = setting.cache()
    fill(cache, setting, [4, 4])
    heard: list[Event] = []
    name = plug(heard.append)
    fill(cache, setting, [4], start=8)
    assert {type(event) for event in heard} == {Committed, Archived, Recalled, Selected}
    registry().unregister(name)
    before = len(heard)
    fill(cache, setting, [4], start=12)
    assert len(heard) == before


def test_the_caches_own_observer_and_those_of_plugins_hear_the_same(plug):
    own: list[Event] = []
    plugged: list[Event] = []
    setting = setting_of("packforcing-lm", top_k_compressed=1)
    cache = setting.cache(observe=own.append)
    plug(plugged.append)
    fill(cache, setting, [4, 4, 4])
    assert len(own) > 6
    assert all(a is b for a, b in zip(own, plugged, strict=True))


@pytest.mark.parametrize("fails_at", [Committed, Archived, Recalled, Selected, Compressed])
@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_observer_of_a_cache_that_raises_is_logged_and_not_called_again_and_nothing_else_changes(
    fails_at, error, caplog
):
    setting = setting_of("packforcing-lm", top_k_compressed=1)
    quiet, loud, called = setting.cache(), None, []

    def fails(event: Event) -> None:
        called.append(event)
        if isinstance(event, fails_at):
            raise error("deaf")

    loud = setting.cache(observe=fails)
    with caplog.at_level(logging.WARNING, logger="kvtiers"):
        for cache in (quiet, loud):
            fill(cache, setting, [4, 4, 4, 1, 1])
        fill(loud.fork(), setting, [4], start=14)
    assert [type(event) for event in called].count(fails_at) == 1
    assert isinstance(called[-1], fails_at)
    (record,) = caplog.records
    assert "failed and is not called again" in record.getMessage()
    one, other = (cache.every_layer()[0] for cache in (quiet, loud))
    assert torch.equal(one.context().keys, other.context().keys)
    assert one.history.count == other.history.count > 2
    assert torch.equal(one.history.starts, other.history.starts)
    held = [{form: store.count for form, store in layer.history.stores.items()} for layer in (one, other)]
    assert held[0] == held[1] == dict.fromkeys(("full", "compressed"), one.history.count)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_failing_observer_of_a_plugin_takes_no_others_events(error, plug, caplog):
    setting, own, other = setting_of("archive"), [], []

    def fails(_: Event) -> None:
        raise error("deaf")

    plug(fails)
    plug(other.append)
    with caplog.at_level(logging.WARNING, logger="kvtiers"):
        fill(setting.cache(observe=own.append), setting, [4, 4, 4])
    assert len(own) == len(other) > 4
    assert len(caplog.records) == 1


def test_an_interrupt_while_an_observer_runs_is_no_failure_of_the_observer():
    setting, calls = setting_of("archive"), []

    def interrupted(event: Event) -> None:
        calls.append(event)
        if len(calls) == 3:
            raise KeyboardInterrupt

    cache = setting.cache(observe=interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(cache, setting, [4, 4, 4])
    assert cache.tell.own is interrupted


# ---------------------------------------------------------------------- what is told


@given(data=st.data())
def test_events_count_every_step_and_block_once(data):
    setting = data.draw(settings_of(policies(recent=3)))
    cache, told = None, []
    cache = setting.cache(observe=told.append)
    fill(cache, setting, data.draw(cuts(setting.policy)))
    layer, policy, geometry = cache.every_layer()[0], setting.policy, setting.geometry
    rows = geometry.batch * geometry.kv_heads
    events = {kind: [event for event in told if type(event) is kind] for kind in
              (Committed, Archived, Compressed, Selected, Recalled)}  # fmt: skip
    assert sum(event.steps for event in events[Committed]) == cache.num_steps
    left = (layer.recent_start - layer.timeline.sink) // policy.block_size if policy.recent is not None else 0
    in_forms = sum(store.count for store in layer.history.stores.values())
    assert sum(event.blocks for event in events[Archived]) == in_forms
    for event in events[Compressed]:
        assert event.tokens_before == event.blocks * policy.block_size
        after = 0 if policy.compressor.drops else policy.compressor.compressed_tokens(policy.block_size)
        assert event.tokens_after == event.blocks * after
    compresses = "compressed" in policy.forms and not policy.compressor.keeps and policy.archives
    assert sum(event.blocks for event in events[Compressed]) == (left if compresses or policy.compressor.drops else 0)
    assert len(events[Recalled]) == len(events[Selected])
    for recalled, selected in zip(events[Recalled], events[Selected], strict=True):
        assert selected.chosen.shape[:2] == (geometry.batch, geometry.kv_heads)
        assert recalled.blocks == selected.chosen.shape[-1] <= selected.archived
        assert recalled.location == policy.archive.location
        assert recalled.bytes % rows == 0


def test_recalled_blocks_are_counted_per_row_and_head_and_their_bytes_over_all():
    setting, told = setting_of("archive"), []
    fill(setting.cache(observe=told.append), setting, [4, 4, 4, 4])
    last = [event for event in told if isinstance(event, Recalled)][-1]
    assert last.blocks == 2  # top_k, whatever the 3 rows and 2 heads chose
    assert last.bytes == 2 * 2 * GEOMETRY.token_bytes


def test_dropped_blocks_are_told_as_compressed_to_nothing():
    setting, told = setting_of("streaming"), []
    cache = setting.cache(observe=told.append)
    fill(cache, setting, [4, 4, 4])
    dropped = [event for event in told if isinstance(event, Compressed)]
    assert {event.tokens_after for event in dropped} == {0}
    assert sum(event.tokens_before for event in dropped) == cache.tier_counts()["dropped"] == 4
    assert sum(event.blocks for event in dropped) == 2


@attrs.frozen(kw_only=True)
class Every(Compressor):
    """Drops every block of those that it is given at an odd time."""

    asked: list[int] = attrs.field(factory=list, eq=False)

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        self.asked.append(blocks.count)
        return None if len(self.asked) % 2 else blocks

    def compressed_tokens(self, tokens: int) -> int:
        return tokens


def test_blocks_that_a_compressor_drops_now_and_then_are_told_so_too():
    found = attrs.evolve(setting_of("archive", retriever="recency").policy, compressor=Every(), attend="compressed")
    setting, told = attrs.evolve(setting_of("archive"), policy=found), []
    cache = setting.cache(observe=told.append)
    fill(cache, setting, [4, 4, 4, 4, 1, 1])
    events = [event for event in told if isinstance(event, Compressed)]
    assert len(events) == len(found.compressor.asked) > 2
    for number, event in enumerate(events):
        assert event.tokens_before == 2 * event.blocks
        assert event.tokens_after == (event.tokens_before if number % 2 else 0)
    counts = cache.tier_counts()
    assert counts["dropped"] == sum(event.tokens_before for event in events if not event.tokens_after)
    assert counts["mid"] == sum(event.tokens_after for event in events)


def test_a_retriever_by_name_is_told_of_with_the_layers_own_number():
    told: list[Event] = []
    found = kvtiers.policy("archive", **SMALL, retriever=build("retriever", "recency"))
    cache = kvtiers.TieredCache([found] * 2, [GEOMETRY] * 2, numbers=[7, 9], observe=told.append)
    tokens = torch.randn(3, 2, 4, 4)
    for _ in range(3):
        cache.write(1, tokens, tokens)
    assert {event.layer for event in told} == {9}
