"""Archives `device`, `host` and `disk`: what is written is read back, the limit holds, and nothing is left behind."""

import gc
import resource
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvtiers.blocks import Blocks
from kvtiers.errors import ArchiveFullError, GeometryError, SavedCacheError
from kvtiers_policies.device import DeviceArchive
from kvtiers_policies.disk import DiskArchive
from kvtiers_policies.host import HostArchive

ARCHIVES = {"device": DeviceArchive, "host": HostArchive, "disk": DiskArchive}
archives = pytest.mark.parametrize("archive", [pytest.param(kind, id=name) for name, kind in ARCHIVES.items()])


def blocks(
    count: int = 2,
    *,
    batch: int = 2,
    heads: int = 3,
    tokens: int = 4,
    width: int = 8,
    own: bool = False,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Blocks:
    generator = torch.Generator().manual_seed(first * 31 + count)
    shape = (batch, heads, count, tokens)
    offsets = torch.rand(*(shape if own else (1, 1, 1, tokens)), 1, generator=generator)
    if not own:
        offsets = torch.arange(tokens, dtype=torch.float64)[None, None, None, :, None]
    return Blocks(
        keys=torch.randn(*shape, width, generator=generator).to(dtype),
        values=torch.randn(*shape, width + 2, generator=generator).to(dtype),
        offsets=offsets,
        starts=torch.arange(first, first + count) * tokens,
        span=tokens,
    )


def whole(parts: list[Blocks], name: str) -> Tensor:
    return torch.cat([getattr(part, name).expand(*part.keys.shape[:4], -1) for part in parts], dim=2)


def chosen(data: Tensor, index: Tensor) -> Tensor:
    """The definition, one block at a time."""
    rows = [
        [torch.stack([data[b, h, i] for i in index[b, h].tolist()]) for h in range(index.shape[1])]
        for b in range(index.shape[0])
    ]
    return torch.stack([torch.stack(heads) for heads in rows])


@archives
@given(data=st.data())
def test_what_is_read_is_what_was_written_per_row_and_head(archive, data):
    own = data.draw(st.booleans(), label="own offsets")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    parts = []
    for count in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), label="writes"):
        parts.append(blocks(count, own=own, first=len(parts), dtype=dtype))
    store = archive().open()
    for part in parts:
        store.write(part)
    total = sum(part.count for part in parts)
    assert (store.count, store.tokens, store.span) == (total, 4, 4)
    numbers = st.lists(st.integers(0, total - 1), min_size=12, max_size=12)
    index = torch.tensor(data.draw(numbers, label="chosen")).reshape(2, 3, 2)
    keys, values, offsets = store.read(index)
    assert torch.equal(keys, chosen(whole(parts, "keys"), index))
    assert torch.equal(values, chosen(whole(parts, "values"), index))
    expected = chosen(whole(parts, "offsets").float(), index)
    assert torch.equal(offsets.expand(expected.shape), expected)


@archives
@given(data=st.data())
def test_rows_are_taken_and_forks_go_their_own_way(archive, data):
    store = archive().open()
    first, second, third = blocks(2, own=True), blocks(1, own=True, first=5), blocks(1, own=True, first=9)
    store.write(first)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2)))
    more = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2)))
    store.select_rows(rows)
    store.write(second)
    fork = store.fork()
    store.select_rows(more)
    fork.write(third)
    assert (store.count, fork.count) == (3, 4)
    index = torch.arange(3).expand(2, 3, 3)
    before = torch.cat([first.keys[rows], second.keys], dim=2)
    assert torch.equal(store.read(index)[0], before[more])
    after = torch.cat([before, third.keys], dim=2)
    assert torch.equal(fork.read(torch.arange(4).expand(2, 3, 4))[0], after)


@archives
@pytest.mark.parametrize("own", [True, False], ids=["own offsets", "shared offsets"])
def test_a_saved_store_continues_in_an_archive_of_any_kind(archive, own):
    store = archive().open()
    for part in (blocks(2, own=own), blocks(3, own=own, first=4)):
        store.write(part)
    store.select_rows(torch.tensor([1, 0]))
    index = torch.tensor([4, 0, 2]).expand(2, 3, 3)
    for other in ARCHIVES.values():
        copy = other().open()
        copy.restore({name: part.clone() for name, part in store.tensors().items()}, count=store.count, span=store.span)
        assert (copy.count, copy.tokens, copy.span) == (5, 4, 4)
        for mine, theirs in zip(store.read(index), copy.read(index), strict=True):
            assert torch.equal(mine, theirs)
        copy.write(blocks(1, own=own, first=9))
        assert copy.count == 6


@archives
def test_the_newest_blocks_are_forgotten_and_written_again(archive):
    store = archive().open()
    store.write(blocks(3, own=True))
    store.write(blocks(2, own=True, first=7))
    store.drop_last(3)
    assert store.count == 2
    again = blocks(1, own=True, first=8)
    store.write(again)
    keys, _, _ = store.read(torch.arange(3).expand(2, 3, 3))
    assert torch.equal(keys, torch.cat([blocks(3, own=True).keys[:, :, :2], again.keys], dim=2))
    store.drop_last(3)
    assert store.count == 0
    store.write(again)
    assert torch.equal(store.read(torch.zeros(2, 3, 1, dtype=torch.int64))[0], again.keys)


@archives
def test_what_is_left_of_a_later_write_is_still_read_right(archive):
    store = archive().open()
    first, second, third = blocks(1, own=True), blocks(3, own=True, first=5), blocks(2, own=True, first=9)
    store.write(first)
    store.write(second)
    store.drop_last(1)
    store.write(third)
    expected = torch.cat([first.keys, second.keys[:, :, :2], third.keys], dim=2)
    assert torch.equal(store.read(torch.arange(5).expand(2, 3, 5))[0], expected)


@archives
def test_blocks_of_another_size_are_refused(archive):
    store = archive().open()
    store.write(blocks(1))
    with pytest.raises(GeometryError, match="of one size, 4 tokens over 4 steps; got 5 tokens over 5 steps"):
        store.write(blocks(1, tokens=5))
    with pytest.raises(GeometryError, match="offsets of their own cannot follow"):
        store.write(blocks(1, own=True))
    assert store.count == 1


@archives
def test_an_empty_store_cannot_be_read_and_choosing_nothing_gives_nothing(archive):
    store = archive().open()
    assert sum(store.bytes_by_location().values()) == 0
    with pytest.raises(GeometryError, match="an empty store was read"):
        store.read(torch.zeros(2, 3, 1, dtype=torch.int64))
    store.write(blocks(1))
    keys, values, _ = store.read(torch.zeros(2, 3, 0, dtype=torch.int64))
    assert (keys.shape, values.shape) == ((2, 3, 0, 4, 8), (2, 3, 0, 4, 10))


@archives
@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=5), own=st.booleans(), limit=st.integers(1, 40_000))
def test_the_byte_limit_holds_over_all_stores_and_a_refusal_changes_nothing(archive, counts, own, limit):
    opened = archive(limit_bytes=limit)
    stores = [opened.open(), opened.open()]
    for number, count in enumerate(counts):
        store = stores[number % 2]
        before = (store.count, store.bytes_by_location(), {k: t.clone() for k, t in store.tensors().items()})
        refused = None
        try:
            store.write(blocks(count, own=own, first=number))
        except ArchiveFullError as error:
            refused = str(error)
        if refused is not None:
            assert f"limit_bytes = {limit:,}" in refused
            after = (store.count, store.bytes_by_location(), store.tensors())
            assert before[:2] == after[:2]
            assert before[2].keys() == after[2].keys()
            assert all(torch.equal(before[2][name], after[2][name]) for name in after[2])
        held = sum(sum(each.bytes_by_location().values()) for each in stores)
        assert held <= limit


@pytest.mark.parametrize("kind", [DeviceArchive, HostArchive], ids=["device", "host"])
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=6), own=st.booleans())
def test_the_bytes_foreseen_before_writing_are_the_bytes_held_after(kind, counts, own):
    store = kind().open()
    for number, count in enumerate(counts):
        part = blocks(count, own=own, first=number)
        foreseen = store._nbytes_after(part)
        store.write(part)
        assert store.nbytes == foreseen


@archives
def test_what_no_store_holds_any_more_frees_the_limit(archive):
    opened = archive(limit_bytes=8_000)
    store = opened.open()
    store.write(blocks(2))
    other = opened.open()
    with pytest.raises(ArchiveFullError):
        other.write(blocks(4))
    del store
    gc.collect()
    other.write(blocks(4))


def test_a_limit_is_no_part_of_what_another_archive_holds():
    one, two = HostArchive(limit_bytes=4_000), HostArchive(limit_bytes=4_000)
    assert one == two
    assert hash(one) == hash(two)
    one.open().write(blocks(2))
    two.open().write(blocks(2))
    assert attrs.evolve(one) == one


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_file_lives_as_long_as_a_fork_needs_it(tmp_path):
    store = DiskArchive(directory=str(tmp_path)).open()
    store.write(blocks(2))
    fork = store.fork()
    store.write(blocks(1, first=5))
    assert len(files(tmp_path)) == 2
    assert store.bytes_by_location() == {"disk": sum(file.stat().st_size for file in files(tmp_path))}
    del store
    gc.collect()
    (left,) = files(tmp_path)
    assert fork.bytes_by_location() == {"disk": left.stat().st_size}
    assert torch.equal(fork.read(torch.zeros(2, 3, 1, dtype=torch.int64))[0], blocks(2).keys[:, :, :1])
    del fork
    gc.collect()
    assert files(tmp_path) == []
    assert tmp_path.exists()


def test_a_private_folder_is_shared_by_the_layers_and_removed_with_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    archive = DiskArchive()
    stores = [archive.open(), archive.open()]
    for store in stores:
        store.write(blocks(1))
    (folder,) = files(tmp_path)
    assert len(files(folder)) == 2
    del store
    stores.pop()
    gc.collect()
    assert len(files(folder)) == 1
    stores.clear()
    gc.collect()
    assert files(tmp_path) == []
    archive.open().write(blocks(1))


def test_a_full_disk_gives_a_clear_error_and_loses_nothing(tmp_path):
    store = DiskArchive(directory=str(tmp_path)).open()
    store.write(blocks(1))
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ArchiveFullError, match=r"cannot write [0-9,]+ bytes.*File too large.*Nothing was lost"):
            store.write(blocks(200, first=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before
    assert store.count == 1
    store.write(blocks(1, first=2))
    assert torch.equal(store.read(torch.ones(2, 3, 1, dtype=torch.int64))[0], blocks(1, first=2).keys)


def test_a_file_that_cannot_be_moved_into_place_leaves_no_part_behind(tmp_path, monkeypatch):
    store = DiskArchive(directory=str(tmp_path)).open()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ArchiveFullError, match="No space left on device"):
        store.write(blocks(1))
    assert files(tmp_path) == []
    assert store.count == 0


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchiveFullError, match="cannot make its folder"):
        DiskArchive(directory=str(tmp_path / "file" / "inside")).open()


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"short")], ids=["removed", "truncated"])
def test_a_file_that_another_program_touched_is_reported_by_name(tmp_path, harm):
    store = DiskArchive(directory=str(tmp_path)).open()
    store.write(blocks(1))
    (path,) = files(tmp_path)
    harm(path)
    with pytest.raises(SavedCacheError, match=f"{path.name}' was removed or changed"):
        store.read(torch.zeros(2, 3, 1, dtype=torch.int64))
