"""A write that an archive refuses changes nothing: no step is lost, and the same tokens fit once there is room."""

from typing import ClassVar
from unittest.mock import patch

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers import testing
from kvtiers.archive import Archive, BlockStore, ByteBudget, Parts
from kvtiers.blocks import Location
from kvtiers.errors import ArchiveFullError
from kvtiers.geometry import Geometry
from kvtiers.presets import policy
from kvtiers.window import Window
from kvtiers_policies.memory import MemoryBlockStore
from strategies import Setting, copied, cuts, feed, policies, rotary, settings_of


class Switch:
    """Whether writes fail now, and from which store on."""

    def __init__(self) -> None:
        self.broken = False
        self.only: int | None = None
        self.opened = 0
        self.refused = 0


class Unreliable(MemoryBlockStore):
    def __init__(self, switch: Switch, budget: ByteBudget) -> None:
        super().__init__("device", budget)
        self.switch, self.number = switch, switch.opened
        switch.opened += 1

    def write(self, parts: Parts) -> None:
        if self.switch.broken and self.switch.only in (None, self.number):
            self.switch.refused += 1
            raise ArchiveFullError("no space is left; nothing was lost")
        super().write(parts)


@attrs.frozen
class UnreliableArchive(Archive):
    location: ClassVar[Location] = "device"
    switch: Switch = attrs.field(factory=Switch, eq=False)

    def open(self, budget: ByteBudget) -> BlockStore:
        return Unreliable(self.switch, budget)


def archiving() -> st.SearchStrategy:
    chosen = policies(
        compressor=("keep", "mean-pool", "top-tokens"), recent=3, retriever=("recency", "affinity", "none")
    )
    return chosen.map(lambda found: attrs.evolve(found, archive=UnreliableArchive()))


@given(data=st.data())
def test_a_refused_write_changes_nothing_and_the_same_append_works_later(data):
    setting = data.draw(settings_of(archiving()))
    lengths = data.draw(cuts(setting.policy))
    switch = setting.policy.archive.switch
    layer = setting.layer()
    calm = attrs.evolve(setting, policy=attrs.evolve(setting.policy, archive=UnreliableArchive())).layer()
    tokens, start = setting.tokens, 0
    for length in lengths:
        now = tokens.part(start, start + length)
        start += length
        before, tier_counts = (copied(layer.context()) if layer.num_steps else None), layer.tier_counts()
        switch.broken, refused = True, switch.refused
        try:
            layer.write(now.keys, now.values)
        except ArchiveFullError:
            assert switch.refused > refused
            assert layer.tier_counts() == tier_counts
            assert testing.difference(before, layer.context()) is None
            switch.broken = False
            layer.write(now.keys, now.values)
        finally:
            switch.broken = False
        layer.select(now.query)
        calm.write(now.keys, now.values)
        calm.select(now.query)
        assert testing.difference(copied(layer.context()), calm.context()) is None
        assert layer.tier_counts() == calm.tier_counts()


def test_what_was_archived_before_a_later_error_is_not_saved_with_the_layer(tmp_path):
    """The write is undone, blocks included: the file is that of a layer that never got the tokens."""
    found = policy("archive", retriever="recency", sink=0, recent=2, block_size=2, top_k=1, chunk_size=4)
    setting = Setting(policy=found, geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0)
    cache, tokens = setting.cache(), setting.tokens
    for start in (0, 4):
        now = tokens.part(start, start + 4)
        cache.write(0, now.keys, now.values)
        cache.select(0, now.query)
    count = cache.every_layer()[0].history.count
    now = tokens.part(8, 12)
    with pytest.raises(RuntimeError, match="out of memory"), patch.object(Window, "append", fails):
        cache.write(0, now.keys, now.values)
    assert cache.every_layer()[0].history.count == count
    cache.save(tmp_path / "cache")
    loaded = setting.cache()
    loaded.load(tmp_path / "cache")
    for one in (cache, loaded):
        one.write(0, now.keys, now.values)
        one.select(0, now.query)
    assert testing.difference(cache.context(0), loaded.context(0)) is None


def fails(*_: object, **__: object) -> None:
    raise RuntimeError("out of memory")


def test_when_one_of_two_forms_is_refused_neither_is_held():
    archive = UnreliableArchive()
    found = policy("packforcing-lm", sink=1, recent=2, block_size=2, top_k=1, top_k_compressed=1, chunk_size=4)
    setting = Setting(
        policy=attrs.evolve(found, archive=archive),
        geometry=Geometry(kv_heads=2, head_dim=4),
        rotary=rotary(4),
        seed=0,
    )
    layer, tokens = setting.layer(), setting.tokens
    list(feed(layer, tokens, [4, 4, 4]))
    held = {form: store.count for form, store in layer.history.stores.items()}
    assert held == {"full": 2, "compressed": 2}
    archive.switch.broken = True
    for number in (0, 1):
        archive.switch.only = number
        now = tokens.part(12, 16)
        with pytest.raises(ArchiveFullError):
            layer.write(now.keys, now.values)
        assert {form: store.count for form, store in layer.history.stores.items()} == held
        assert layer.tier_counts()["current"] == 4
    archive.switch.broken = False
    list(feed(layer, tokens, [4, 4], start=12))
    assert layer.history.stores["full"].count == layer.history.stores["compressed"].count == layer.history.count


@pytest.mark.parametrize("archive", ["device", "host", "disk"])
def test_a_byte_limit_is_a_clear_error_and_every_token_is_still_attended(archive):
    found = policy(
        "archive",
        archive=(archive, {"limit_bytes": 2_000}),
        realigner="original",
        retriever="all",
        sink=1,
        recent=4,
        block_size=2,
        chunk_size=4,
    )
    if archive == "device":
        found = attrs.evolve(found, retriever=policy("archive", retriever="recency").retriever, top_k=999)
    setting = Setting(policy=found, geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0)
    layer, tokens, start = setting.layer(), setting.tokens, 0
    with pytest.raises(ArchiveFullError, match=r"limit_bytes = 2,000.*Nothing was lost"):  # noqa: PT012 (some append)
        while True:
            now = tokens.part(start, start + 4)
            layer.write(now.keys, now.values)
            layer.select(now.query)
            start += 4
    assert start > 8
    assert layer.num_steps == start
    assert torch.equal(layer.context().keys, tokens.keys[:, :, :start])


def test_a_layer_whose_archive_refused_takes_the_same_tokens_once_it_works_again():
    archive = UnreliableArchive()
    found = policy("archive", retriever="recency", sink=1, recent=9, block_size=2, top_k=1, chunk_size=4)
    setting = Setting(
        policy=attrs.evolve(found, archive=archive),
        geometry=Geometry(kv_heads=2, head_dim=4),
        rotary=rotary(4),
        seed=0,
    )
    layer = setting.layer()
    list(feed(layer, setting.tokens, [4, 4, 4]))
    archive.switch.broken = True
    now = setting.tokens.part(12, 14)
    with pytest.raises(ArchiveFullError):
        layer.write(now.keys, now.values)
    assert (layer.num_steps, layer.committed_steps, layer.history.count) == (12, 8, 0)
    with pytest.raises(ArchiveFullError):
        layer.write(now.keys, now.values)
    archive.switch.broken = False
    layer.write(now.keys, now.values)
    assert (layer.num_steps, layer.committed_steps, layer.history.count) == (14, 12, 1)
