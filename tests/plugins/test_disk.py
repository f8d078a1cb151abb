"""Archive `disk`, and what it has in common with `device` and `host`: a store is a list of blocks, whatever happens."""

import copy
import fcntl
import gc
import os
import pickle
import resource
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import config as shapes
from torch import Tensor

from kvtiers.archive import Archive, BlockStore, ByteBudget
from kvtiers.errors import ArchiveFullError, GeometryError, SavedCacheError
from kvtiers.locks import OURS
from kvtiers_policies.device import DeviceArchive
from kvtiers_policies.disk import DiskArchive
from kvtiers_policies.host import HostArchive

HEADS = 2
ARCHIVES = {"device": DeviceArchive, "host": HostArchive, "disk": DiskArchive}
archives = pytest.mark.parametrize("kind", [pytest.param(kind, id=name) for name, kind in ARCHIVES.items()])
Block = dict[str, Tensor]
"""One block of a list that says what a store must hold: parts without the blocks' axis."""


def parts(count: int, *, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Parts of several dtypes, with a width in bytes that no word divides, and with none."""
    generator = torch.Generator().manual_seed(1000 * seed + count)
    lead = (batch, HEADS, count)
    return {
        "keys": torch.randn(*lead, 3, 4, generator=generator).bfloat16(),
        "numbers": torch.randint(0, 255, (*lead, 3), generator=generator, dtype=torch.uint8),
        "scale": torch.randn(lead, generator=generator).half(),
    }


def blocks_of(found: dict[str, Tensor]) -> list[Block]:
    return [{name: part[:, :, at] for name, part in found.items()} for at in range(found["keys"].shape[2])]


def everywhere(*blocks: int, batch: int = 2) -> Tensor:
    """These blocks, for every row and head."""
    return torch.tensor(blocks, dtype=torch.long).expand(batch, HEADS, -1)


def held_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def opened(folder: Path) -> BlockStore:
    return DiskArchive(directory=str(folder)).open(ByteBudget(None))


# ---------------------------------------------------------------------- a store is a list of blocks


def same(store: BlockStore, held: list[Block]) -> bool:
    """Whether `store` holds these blocks, and reads any of them back for any row and head."""
    if store.count != len(held):
        return False
    if not held:
        return all(part.shape[2] == 0 for part in store.parts().values())
    batch = held[0]["scale"].shape[0]
    index = torch.stack([torch.randperm(len(held)) for _ in range(batch * HEADS)]).view(batch, HEADS, -1)
    read, whole = store.read(index), store.parts()
    for name in held[0]:
        expected = torch.stack([block[name] for block in held], 2)
        at = index.view(*index.shape, *(1 for _ in expected.shape[3:])).expand(*index.shape, *expected.shape[3:])
        if not (torch.equal(read[name], expected.gather(2, at)) and torch.equal(whole[name], expected)):
            return False
    return read.keys() == whole.keys() == held[0].keys()


@archives
@given(data=st.data())
def test_a_store_behaves_as_a_list_of_blocks(kind, data):
    archive, budget = kind(), ByteBudget(None)
    stores: list[tuple[BlockStore, list[Block], int]] = [(archive.open(budget), [], 2)]
    for step in range(data.draw(st.integers(1, 8), label="steps")):
        store, held, batch = stores[data.draw(st.integers(0, len(stores) - 1), label="store")]
        verb = data.draw(st.sampled_from(["write", "write", "drop_last", "fork", "select_rows", "restore"]))
        if verb == "write":
            written = parts(data.draw(st.integers(1, 3), label="blocks"), batch=batch, seed=step)
            store.write(written if step % 2 else dict(reversed(written.items())))
            held += blocks_of(written)
        elif verb == "drop_last":
            fewer = data.draw(st.integers(0, len(held)), label="blocks")
            store.drop_last(fewer)
            del held[len(held) - fewer :]
        elif verb == "fork":
            stores.append((store.fork(), list(held), batch))
        elif verb == "select_rows":
            rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3), label="rows"))
            selected = [{name: part[rows] for name, part in block.items()} for block in held]
            stores.append((store.select_rows(rows), selected, len(rows)))
        elif held:
            loaded = ARCHIVES[data.draw(st.sampled_from(sorted(ARCHIVES)), label="to")]().open(budget)
            tensors, about = store.dump()
            loaded.fill({name: part.clone() for name, part in tensors.items()}, about)
            stores.append((loaded, list(held), batch))
        for each, blocks, _ in stores:
            assert same(each, blocks)


@archives
def test_the_list_that_stores_are_compared_with_notices_a_block_that_is_another(kind):
    store = kind().open(ByteBudget(None))
    store.write(parts(2))
    right = blocks_of(parts(2))
    assert same(store, right)
    assert not same(store, right[:1])
    assert not same(store, right[::-1])
    assert not same(store, [right[0], {**right[1], "scale": right[1]["scale"].flip(0)}])


@archives
def test_a_write_that_is_undone_by_a_snapshot_never_was(kind):
    store = kind().open(ByteBudget(None))
    store.write(parts(1))
    before = store.snapshot()
    store.write(parts(2, seed=1))
    store.drop_last(2)
    store.undo(before)
    assert same(store, blocks_of(parts(1)))


@archives
def test_a_store_that_was_emptied_is_restored_as_an_empty_one(kind):
    store, loaded = (kind().open(ByteBudget(None)) for _ in range(2))
    store.write(parts(2))
    store.drop_last(2)
    loaded.fill(*store.dump())
    loaded.write({name: part[:, :, :0] for name, part in parts(2).items()})
    assert same(loaded, [])


@archives
def test_an_empty_store_cannot_be_read_and_choosing_nothing_gives_nothing(kind):
    store = kind().open(ByteBudget(None))
    with pytest.raises(GeometryError, match="an empty store was read"):
        store.read(everywhere(0))
    store.write(parts(1))
    assert {tuple(part.shape[:3]) for part in store.read(everywhere()).values()} == {(2, HEADS, 0)}


OTHER_PARTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "a part is missing": lambda some: {name: some[name] for name in ("keys", "numbers")},
    "another dtype": lambda some: {**some, "keys": some["keys"].float()},
    "more tokens": lambda some: {**some, "keys": some["keys"].repeat(1, 1, 1, 2, 1)},
    "more rows": lambda some: {name: part.repeat(2, *(1 for _ in part.shape[1:])) for name, part in some.items()},
}


@archives
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in OTHER_PARTS.items()])
def test_blocks_of_other_parts_are_refused(kind, change):
    store = kind().open(ByteBudget(None))
    store.write(parts(2))
    with pytest.raises(GeometryError, match="are of one size and made of the same parts"):
        store.write(change(parts(1)))
    assert same(store, blocks_of(parts(2)))


def test_parts_that_count_different_blocks_are_refused(tmp_path):
    with pytest.raises(GeometryError, match="begin with different axes"):
        opened(tmp_path).write({**parts(2), "scale": parts(1)["scale"]})


def test_parts_that_are_views_of_the_same_memory_are_written(tmp_path):
    store, one = opened(tmp_path), torch.randn(1, HEADS, 2, 3, 4)
    store.write({"keys": one, "values": one, "flipped": one.transpose(3, 4)})
    read = store.read(everywhere(1, batch=1))
    assert torch.equal(read["keys"], one[:, :, 1:])
    assert torch.equal(read["values"], one[:, :, 1:])
    assert torch.equal(read["flipped"], one[:, :, 1:].transpose(3, 4))


# ---------------------------------------------------------------------- files


def test_forks_and_row_selections_share_a_file_which_goes_with_the_last(tmp_path):
    store = opened(tmp_path)
    store.write(parts(2))
    fork, rows = store.fork(), store.select_rows(torch.tensor([1, 1, 0]))
    (only,) = held_files(tmp_path)
    assert fork.bytes_by_location() == rows.bytes_by_location() == {"disk": only.stat().st_size}
    store.write(parts(1, seed=1))
    assert len(held_files(tmp_path)) == 2
    del store
    gc.collect()
    assert held_files(tmp_path) == [only]
    del fork
    gc.collect()
    assert held_files(tmp_path) == [only]
    rows.drop_last(1)
    assert held_files(tmp_path) == [only]
    rows.drop_last(1)
    gc.collect()
    assert held_files(tmp_path) == []
    del rows
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_is_shared_by_the_stores_of_an_archive_and_goes_with_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    archive = DiskArchive()
    stores = [archive.open(ByteBudget(None)) for _ in range(2)]
    for store in stores:
        store.write(parts(1))
    del store
    assert (len(list(tmp_path.iterdir())), len(held_files(tmp_path))) == (1, 2)
    stores.pop()
    gc.collect()
    assert len(held_files(tmp_path)) == 1
    stores.clear()
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    archive.open(ByteBudget(None)).write(parts(1))


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("given_directory", [True, False], ids=["directory", "temporary folder"])
def test_nobody_else_may_read_the_folder_or_a_file(tmp_path, monkeypatch, given_directory):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with umask(0):
        archive = DiskArchive(directory=str(tmp_path / "mine") if given_directory else None)
        store = archive.open(ByteBudget(None))
        store.write(parts(1))
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(found) == 2 + given_directory
    assert found == {path: 0o700 if path.is_dir() else 0o600 for path in found}


def test_a_directory_may_be_relative_and_the_program_may_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = DiskArchive(directory="here").open(ByteBudget(None))
    monkeypatch.chdir("/")
    store.write(parts(1))
    assert len(held_files(tmp_path / "here")) == 1
    assert same(store, blocks_of(parts(1)))


def test_a_copy_of_a_store_lives_on_without_the_original(tmp_path):
    store = opened(tmp_path)
    store.write(parts(2))
    twin = copy.deepcopy(store)
    del store
    gc.collect()
    assert same(twin, blocks_of(parts(2)))
    twin.write(parts(1, seed=1))
    assert same(twin, blocks_of(parts(2)) + blocks_of(parts(1, seed=1)))


def test_an_archive_that_is_in_use_can_be_copied_and_pickled(tmp_path):
    archive = DiskArchive(directory=str(tmp_path))
    store = archive.open(ByteBudget(None))
    store.write(parts(1))
    for twin in (copy.deepcopy(archive), pickle.loads(pickle.dumps(archive)), attrs.evolve(archive)):
        assert twin == archive
        other = twin.open(ByteBudget(None))
        other.write(parts(1))
        assert len(held_files(tmp_path)) == 2
        del other
        gc.collect()


def test_two_threads_may_write_and_read_in_one_archive(tmp_path):
    archive: Archive = DiskArchive(directory=str(tmp_path))
    start, done, failed = threading.Barrier(2), [], []

    def work(seed: int) -> None:
        start.wait()
        try:
            store = archive.open(ByteBudget(None))
            for number in range(20):
                store.write(parts(1, seed=100 * seed + number))
                read = store.read(everywhere(number))
                if not torch.equal(read["keys"], parts(1, seed=100 * seed + number)["keys"]):
                    failed.append((seed, number))
            done.append(store)
        except Exception as error:  # noqa: BLE001 the main thread reports it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert (len(done), len(list(tmp_path.iterdir())), len(held_files(tmp_path))) == (2, 1, 40)


def instructions_of(read: Callable[[], object]) -> int:
    """How many instructions Python executes in `read`."""
    count = 0

    def traced(frame: FrameType, event: str, what: object) -> object:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return traced

    before = shapes.jaxtyping_disable
    shapes.update("jaxtyping_disable", True)
    try:
        read()  # what happens only once has happened
        sys.settrace(traced)
        read()
    finally:
        sys.settrace(None)
        shapes.update("jaxtyping_disable", before)
    return count


def test_reading_many_blocks_takes_python_no_longer_than_reading_one_of_each_file(tmp_path):
    store = opened(tmp_path)
    for seed in range(3):
        store.write(parts(40, batch=4, seed=seed))
    few, all_blocks = (everywhere(*range(0, 120, step), batch=4) for step in (40, 1))
    assert few.shape[2] == 3
    assert 0 < instructions_of(lambda: store.read(all_blocks)) == instructions_of(lambda: store.read(few))


# ---------------------------------------------------------------------- what is on disk is checked


def data_of(path: Path) -> tuple[int, bytearray]:
    """Where the tensors of a file begin, and all of its bytes."""
    raw = bytearray(path.read_bytes())
    return 8 + int.from_bytes(raw[:8], "little"), raw


def flip(path: Path, other: Path) -> None:
    start, raw = data_of(path)
    raw[start + 5] ^= 1
    path.write_bytes(raw)


def zero(path: Path, other: Path) -> None:
    start, raw = data_of(path)
    path.write_bytes(raw[:start] + bytes(len(raw) - start))


def exchange_files(path: Path, other: Path) -> None:
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def exchange_blocks(path: Path, other: Path) -> None:
    start, raw = data_of(path)
    raw[start : start + 24], raw[start + 24 : start + 48] = raw[start + 24 : start + 48], raw[start : start + 24]
    path.write_bytes(raw)


def negate_two(path: Path, other: Path) -> None:
    start, raw = data_of(path)
    raw[start + 3] ^= 0x80
    raw[start + 7] ^= 0x80
    path.write_bytes(raw)


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


HARM = {
    "one bit": (flip, "'keys' of block 0 of row 0 and KV head 0 is not what was written"),
    "two signs": (negate_two, "'keys' of block 0 of row 0 and KV head 0 is not what was written"),
    "zeroed": (zero, "is not what was written"),
    "exchanged files": (exchange_files, "is not what was written"),
    "exchanged blocks": (exchange_blocks, "is not what was written"),
    "removed": (lambda path, other: path.unlink(), "removed or changed by another program .there is no such file"),
    "truncated": (cut, "was removed or changed by another program .it is shorter"),
    "emptied": (lambda path, other: path.write_bytes(b""), "was removed or changed by another program .it is shorter"),
}


@pytest.mark.parametrize(("harm", "said"), HARM.values(), ids=HARM)
@pytest.mark.parametrize("way", ["read", "parts", "fork", "select_rows"])
def test_a_file_that_was_touched_is_reported_by_name(tmp_path, harm, said, way):
    store = opened(tmp_path)
    store.write(parts(2))
    (path,) = held_files(tmp_path)
    store.write(parts(2, seed=1))
    (other,) = set(held_files(tmp_path)) - {path}
    if way == "fork":
        store = store.fork()
    elif way == "select_rows":
        store = store.select_rows(torch.tensor([0, 0]))
    harm(path, other)
    with pytest.raises(SavedCacheError, match=f"{path.name}' .*{said}.*start a new cache"):
        store.parts() if way == "parts" else store.read(everywhere(0, 1))


@given(data=st.data())
def test_any_bit_that_flips_is_noticed_by_whoever_reads_it(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flipped")
    store = opened(folder)
    store.write(parts(3))
    (path,) = held_files(folder)
    start, raw = data_of(path)
    at = data.draw(st.integers(start, len(raw) - 1), label="byte")
    raw[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    path.write_bytes(raw)
    with pytest.raises(SavedCacheError, match="is not what was written"):
        store.parts()


def test_blocks_beside_one_that_was_touched_are_still_read(tmp_path):
    store = opened(tmp_path)
    store.write(parts(2))
    flip(*held_files(tmp_path), tmp_path)
    assert torch.equal(store.read(everywhere(1))["keys"], parts(2)["keys"][:, :, 1:])


# ---------------------------------------------------------------------- full disks and vanished folders


def test_a_full_disk_gives_a_clear_error_and_loses_nothing(tmp_path):
    store = opened(tmp_path)
    store.write(parts(1))
    before = held_files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ArchiveFullError, match=r"cannot write [0-9,]+ bytes.*Nothing was lost") as refused:
            store.write(parts(300, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert held_files(tmp_path) == before
    assert "File too large" in str(refused.value)
    assert same(store, blocks_of(parts(1)))
    store.write(parts(1, seed=2))
    assert same(store, blocks_of(parts(1)) + blocks_of(parts(1, seed=2)))


def test_a_byte_limit_counts_files_and_a_refusal_changes_nothing(tmp_path):
    budget = ByteBudget(2_000)
    archive = DiskArchive(directory=str(tmp_path), limit_bytes=2_000)
    one, two = archive.open(budget), archive.open(budget)
    one.write(parts(2))
    two.write(parts(2, seed=1))
    before = held_files(tmp_path)
    assert budget.nbytes == sum(path.stat().st_size for path in before)
    with pytest.raises(ArchiveFullError, match="limit_bytes = 2,000"):
        two.write(parts(20, seed=2))
    assert held_files(tmp_path) == before
    assert same(two, blocks_of(parts(2, seed=1)))
    del one
    gc.collect()
    assert budget.nbytes == sum(path.stat().st_size for path in held_files(tmp_path))


def test_a_folder_that_vanished_is_said_so_and_a_new_cache_has_another(tmp_path):
    archive = DiskArchive(directory=str(tmp_path))
    store = archive.open(ByteBudget(None))
    store.write(parts(1))
    (path,) = held_files(tmp_path)
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(ArchiveFullError, match="the folder was removed by another program, and with it the blocks"):
        store.write(parts(1, seed=1))
    assert store.count == 1
    with pytest.raises(SavedCacheError, match=r"there is no such file.*start a new cache"):
        store.read(everywhere(0))
    fresh = archive.open(ByteBudget(None))
    fresh.write(parts(1, seed=2))
    assert same(fresh, blocks_of(parts(1, seed=2)))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchiveFullError, match=r"cannot make its folder.*choose another directory"):
        opened(tmp_path / "file" / "inside")


# ---------------------------------------------------------------------- processes that are killed, and forks

PROGRAM = """
import os, sys, torch
from kvtiers.archive import ByteBudget
from kvtiers_policies.disk import DiskArchive

archive = DiskArchive(directory=sys.argv[1])
store = archive.open(ByteBudget(None))
keys = torch.arange(24.0).view(1, 2, 3, 4)
store.write({"keys": keys})
"""

WAIT = PROGRAM + "print('ready', flush=True)\nsys.stdin.read()\n"

FORKS = (
    PROGRAM
    + """
import gc, multiprocessing

def parents():
    return sorted(os.listdir(os.path.dirname(path)))

(path,) = (entry.file.path for entry in store._entries)
before = parents()

def works():
    fork = store.fork()
    fork.write({"keys": keys + 1})  # in a folder of this process
    index = torch.tensor([0, 3]).expand(1, 2, 2)
    assert torch.equal(fork.read(index)["keys"], torch.stack([keys[:, :, 0], keys[:, :, 0] + 1], 2))
    assert parents() == before and len(os.listdir(sys.argv[1])) == 2

child = os.fork()
if not child:
    works()
    sys.exit()  # with everything that is done when a program ends
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

child = os.fork()
if not child:
    works()
    del store, archive
    gc.collect()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

process = multiprocessing.get_context("fork").Process(target=works)
process.start()
process.join()
assert process.exitcode == 0

assert parents() == before
assert torch.equal(store.parts()["keys"], keys)
print("whole")
"""
)


def program(text: str, folder: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", text, str(folder)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_holds_is_not(tmp_path):
    running = {how: program(WAIT, tmp_path) for how in ("lives", "killed", "terminated")}
    try:
        for process in running.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        running["killed"].kill()
        running["terminated"].terminate()
        running["killed"].wait()
        running["terminated"].wait()
        assert len(held_files(tmp_path)) == 3
        store = opened(tmp_path)
        assert len(held_files(tmp_path)) == 1
        assert len(list(tmp_path.iterdir())) == 2
        opened(tmp_path)
        assert len(held_files(tmp_path)) == 1
        running["lives"].communicate("")
        assert running["lives"].returncode == 0
        assert held_files(tmp_path) == []
        del store
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def test_a_forked_process_that_ends_leaves_what_its_parent_holds(tmp_path):
    said, wrong = program(FORKS, tmp_path).communicate()
    assert (said, wrong) == ("whole\n", "")


def left(parent: Path) -> Path:
    """A folder as a killed process leaves it."""
    path = Path(tempfile.mkdtemp(prefix=OURS, dir=parent))
    (path / "some.safetensors").write_bytes(b"x")
    return path


def test_only_folders_that_are_certainly_ours_are_removed(tmp_path, monkeypatch):
    ours = left(tmp_path)
    kept = {name: left(tmp_path) for name in ("open to others", "with other files", "link")}
    kept["open to others"].chmod(0o755)
    (kept["with other files"] / "notes.txt").write_text("")
    kept["elsewhere"] = kept["link"].rename(tmp_path / "elsewhere")
    kept["link"].symlink_to(kept["elsewhere"])
    kept["named otherwise"] = left(tmp_path).rename(tmp_path / "kvtiers-0badcafe-abcdefgh")
    opened(tmp_path)
    assert not ours.exists()
    assert all(path.exists() for path in kept.values())
    assert (kept["with other files"] / "notes.txt").exists()
    assert (kept["elsewhere"] / "some.safetensors").exists()
    theirs, me = left(tmp_path), os.getuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: me + 1)
        opened(tmp_path)
    assert theirs.exists()
    opened(tmp_path)
    assert not theirs.exists()


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    removed, real = [], fcntl.flock

    def raced(handle: int, how: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].rmdir()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", raced)
    store = opened(tmp_path)
    store.write(parts(1))
    assert len(removed) == 1
    assert same(store, blocks_of(parts(1)))


def test_where_nothing_can_be_locked_a_folder_is_never_taken_for_one_that_was_left(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        store = opened(tmp_path)
        store.write(parts(1))
    opened(tmp_path)
    assert same(store, blocks_of(parts(1)))
    del store
    gc.collect()
    assert list(tmp_path.iterdir()) == []
