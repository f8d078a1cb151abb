"""Archives `device`, `host` and `disk`: how many bytes may be held, of which cache. What stores hold: test_disk.py."""

import gc

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.accounting import bytes_in
from kvtiers.archive import ByteBudget
from kvtiers.cache import TieredCache
from kvtiers.errors import ArchiveFullError
from kvtiers.geometry import Geometry
from kvtiers.presets import policy
from kvtiers.rows import PaddingPattern
from kvtiers_policies.device import DeviceArchive
from kvtiers_policies.disk import DiskArchive
from kvtiers_policies.host import HostArchive

ARCHIVES = {"device": DeviceArchive, "host": HostArchive, "disk": DiskArchive}
archives = pytest.mark.parametrize("archive", [pytest.param(kind, id=name) for name, kind in ARCHIVES.items()])
GEOMETRY = Geometry(kv_heads=2, head_dim=4)


def parts(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed * 31 + count)
    shape = (2, 3, count, 4)
    return {
        "keys": torch.randn(*shape, 8, generator=generator),
        "values": torch.randn(*shape, 10, generator=generator).bfloat16(),
    }


@archives
@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=5), limit=st.integers(1, 40_000))
def test_the_byte_limit_holds_over_all_stores_and_a_refusal_changes_nothing(archive, counts, limit):
    opened, budget = archive(limit_bytes=limit), ByteBudget(limit)
    stores = [opened.open(budget), opened.open(budget)]
    for number, count in enumerate(counts):
        store = stores[number % 2]
        before = (store.count, store.bytes_by_location(), {k: t.clone() for k, t in store.parts().items()})
        refused = None
        try:
            store.write(parts(count, seed=number))
        except ArchiveFullError as error:
            refused = str(error)
        if refused is not None:
            assert f"limit_bytes = {limit:,}" in refused
            after = (store.count, store.bytes_by_location(), store.parts())
            assert before[:2] == after[:2]
            assert before[2].keys() == after[2].keys()
            assert all(torch.equal(before[2][name], after[2][name]) for name in after[2])
        held = sum(sum(each.bytes_by_location().values()) for each in stores)
        assert held == budget.nbytes <= limit


@pytest.mark.parametrize("kind", [DeviceArchive, HostArchive], ids=["device", "host"])
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_what_is_refused_is_what_would_not_fit_and_nothing_else(kind, counts):
    """The bytes that a write needs are known beforehand, to the byte: a limit of what comes to be held admits it."""
    free = ByteBudget(None)
    store = kind().open(free)
    for number, count in enumerate(counts):
        store.write(parts(count, seed=number))
    fits, tight = ByteBudget(free.nbytes), ByteBudget(free.nbytes - 1)
    other, refusing = kind().open(fits), kind().open(tight)
    for number, count in enumerate(counts):
        other.write(parts(count, seed=number))
    assert fits.nbytes == free.nbytes
    with pytest.raises(ArchiveFullError):  # noqa: PT012 (some write)
        for number, count in enumerate(counts):
            refusing.write(parts(count, seed=number))


@archives
def test_what_no_store_holds_any_more_frees_the_limit(archive):
    opened, budget = archive(limit_bytes=7_000), ByteBudget(7_000)
    store = opened.open(budget)
    store.write(parts(2))
    other = opened.open(budget)
    with pytest.raises(ArchiveFullError):
        other.write(parts(4))
    del store
    gc.collect()
    other.write(parts(4))


# ---------------------------------------------------------------------- a limit belongs to a cache


def limited(archive: str, limit: int, *, layers: int = 1, batch: int = 1) -> TieredCache:
    """An empty cache whose layers may archive `limit` bytes together."""
    kind = ARCHIVES[archive](limit_bytes=limit)
    found = policy("archive", archive=kind, retriever="recency", sink=0, recent=2, block_size=2, top_k=1, chunk_size=4)
    return TieredCache(found, [attrs.evolve(GEOMETRY, batch=batch)] * layers)


def fill(cache: TieredCache, forwards: int, *, batch: int = 1) -> int:
    """Feed forwards of four steps to every layer, until the archive is full; how many were taken by all."""
    for number in range(forwards):
        tokens = torch.full((batch, 2, 4, 4), float(number))
        try:
            for layer in range(len(cache.layers)):
                cache.write(layer, tokens, tokens)
        except ArchiveFullError:
            return number
    return forwards


def archived(cache: TieredCache) -> int:
    """Bytes in the archive, of all layers, by what the stores themselves hold."""
    layers = cache.every_layer()
    stores = [store for layer in layers for store in layer.history.stores.values()]
    return sum(sum(store.bytes_by_location().values()) for store in stores)


named = pytest.mark.parametrize("archive", ARCHIVES)


@named
def test_two_caches_of_one_policy_have_limits_of_their_own(archive):
    one = limited(archive, 6_000)
    taken = fill(one, 99)
    assert 2 < taken < 99
    other = TieredCache(one.policies, one.geometries)
    assert fill(other, 99) == taken
    for cache in (one, other):
        assert 0 < archived(cache) == cache.budget(cache.policies[0].archive).nbytes <= 6_000


@named
def test_the_layers_of_a_cache_share_its_limit(archive):
    alone, three = fill(limited(archive, 9_000), 99), fill(limited(archive, 9_000, layers=3), 99)
    assert 2 < three < alone
    assert one_layer_as_archive_of_equal_settings(archive) == three


def one_layer_as_archive_of_equal_settings(archive: str) -> int:
    """As `limited(..., layers=3)`, each layer with an archive of its own that is set alike: the limit is one still."""
    each = [limited(archive, 9_000).policies[0] for _ in range(3)]
    return fill(TieredCache(each, [GEOMETRY] * 3), 99)


@named
def test_a_fork_and_selected_rows_keep_the_limit_and_the_original_is_not_charged(archive):
    cache = limited(archive, 12_000, batch=2)
    assert fill(cache, 3, batch=2) == 3
    budget = cache.budget(cache.policies[0].archive)
    before = budget.nbytes
    fork = cache.fork()
    assert budget.nbytes == before
    own = fork.budget(fork.policies[0].archive)
    assert (own.limit, own.nbytes) == (12_000, archived(fork))
    assert own.nbytes > 0
    taken = fill(fork, 99, batch=2)
    assert 0 < taken < 99
    assert budget.nbytes == before  # what the fork wrote is the fork's
    assert fill(cache, 99, batch=2) == taken
    cache.select_rows(torch.tensor([1, 0]))
    assert archived(cache) == budget.nbytes <= 12_000
    assert fill(cache, 99, batch=2) == 0
    assert archived(cache) == budget.nbytes


@named
def test_rows_that_were_repeated_count_as_what_they_hold(archive):
    cache = limited(archive, 100_000)
    fill(cache, 6)
    before = archived(cache)
    cache.select_rows(torch.tensor([0, 0, 0]))
    gc.collect()
    assert archived(cache) == cache.budget(cache.policies[0].archive).nbytes
    if archive != "disk":  # files are shared by rows
        assert archived(cache) == 3 * before


@archives
def test_what_stores_of_a_cache_share_counts_once(archive):
    """A limit of what two stores that share everything hold, and of one more block, admits one more block."""
    free = ByteBudget(None)
    store = archive().open(free)
    store.write(parts(4))
    alone = free.nbytes
    fork, row = store.fork(), store.fork().fork()
    assert free.nbytes == alone
    assert sum(row.bytes_by_location().values()) == alone
    fork.write(parts(1))
    assert free.nbytes > alone
    limit = ByteBudget(free.nbytes)
    for each in (store, fork, row):
        each.join(limit)
    assert free.nbytes == 0
    fork.drop_last(5)
    fork.write(parts(1))
    assert limit.nbytes <= limit.limit
    with pytest.raises(ArchiveFullError, match=f"limit_bytes = {limit.limit:,}"):
        row.write(parts(4))


@pytest.mark.parametrize("archive", [DeviceArchive, HostArchive], ids=["device", "host"])
def test_a_copy_that_a_write_to_shared_memory_makes_has_to_fit_beside_the_original(archive):
    free = ByteBudget(None)
    one = archive().open(free)
    one.write(parts(3))
    one.write(parts(1))
    limit = ByteBudget(free.nbytes + free.nbytes // 2)
    one.join(limit)
    fork = one.fork()
    with pytest.raises(ArchiveFullError):
        fork.write(parts(1))
    fork.join(free)
    one.write(parts(1))
    assert limit.nbytes <= limit.limit


def test_files_of_rows_that_part_ways_count_once(tmp_path):
    found = attrs.evolve(limited("disk", 10**9).policies[0], archive=DiskArchive(directory=str(tmp_path)))
    cache = TieredCache(found, [attrs.evolve(GEOMETRY, batch=2)])
    fill(cache, 6, batch=2)
    tokens, padding = torch.ones(2, 2, 1, 4), PaddingPattern.of(torch.tensor([[True], [False]]))
    list(cache.layers[0].chunks(tokens, tokens, tokens, padding))
    gc.collect()
    assert len(cache.layers[0].groups) == 2
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert cache.budget(found.archive).nbytes == bytes_in(cache.memory_usage(), "disk") == files


@archives
def test_a_store_that_was_emptied_takes_blocks_of_another_size(archive):
    store = archive().open(ByteBudget(None))
    store.write(parts(2))
    store.drop_last(2)
    others = {"keys": torch.randn(1, 2, 3, 5), "scales": torch.randn(1, 2, 3).double()}
    store.write(others)
    assert {name: x.dtype for name, x in store.parts().items()} == {name: x.dtype for name, x in others.items()}
    assert all(torch.equal(store.parts()[name], x) for name, x in others.items())


@named
def test_what_was_loaded_counts(archive, tmp_path):
    cache = limited(archive, 6_000)
    taken = fill(cache, 99)
    cache.save(tmp_path / "cache")
    loaded = TieredCache(cache.policies, cache.geometries)
    loaded.load(tmp_path / "cache")
    assert loaded.budget(loaded.policies[0].archive).nbytes == archived(loaded) > 0
    assert fill(loaded, 99) < taken
    assert archived(loaded) <= 6_000
    loaded.reset()
    gc.collect()
    assert loaded.budget(loaded.policies[0].archive).nbytes == 0
    assert fill(loaded, 99) == taken


@named
def test_a_forks_archive_is_shared_until_one_side_writes(archive):
    """Of a fork the archived blocks take no memory: what is held is held once, by address, until one side writes."""
    cache = limited(archive, 10**9)
    fill(cache, 12)
    fork = cache.fork()
    assert addresses(cache) == addresses(fork)
    held = [store.parts() for store in cache.every_layer()[0].history.stores.values()]
    fill(fork, 2)
    assert addresses(cache) != addresses(fork)
    after = [store.parts() for store in cache.every_layer()[0].history.stores.values()]
    for one, other in zip(held, after, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def addresses(cache: TieredCache) -> list[object]:
    """Where the archived blocks of a cache lie, and what is noted of them."""
    history = cache.every_layer()[0].history
    growing = (history.table, history.digests)
    tensors = [part.untyped_storage().data_ptr() for one in growing for part in one.tensors()]
    for store in history.stores.values():
        entries = getattr(store, "_entries", None)
        parts = store.parts().values() if entries is None else ()
        tensors += [part.untyped_storage().data_ptr() for part in parts]
        tensors += [] if entries is None else [entry.file for entry in entries]
    return tensors
