"""Archive `disk`: archived blocks live in safetensors files, of which only the chosen blocks are read (FlexGen, arXiv
2303.06865, section 4: disk as the last level of the cache's memory hierarchy).

Each write makes one file, which never changes and which forks and row selections share. Its checksums stay in memory.
The files of a process lie in a private folder that it holds locked until it ends, however it ends. An unlocked folder
was left by a process that was killed, and is removed when the next archive is opened.
"""

import json
import os
import uuid
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from attrs import validators as v
from jaxtyping import Int, Int64, UInt8
from safetensors.torch import save
from torch import Tensor

from kvtiers.archive import Archive, BlockStore, ByteBudget, Parts, Storages
from kvtiers.blocks import Location
from kvtiers.errors import ArchiveFullError, GeometryError, SavedCacheError
from kvtiers_policies.folders import Folder, Home

_AT_ONCE = 2**18
"""So many words are summed at a time: their products stay in the processor's cache."""


@attrs.frozen(kw_only=True, eq=False)
class Kind:
    """How one part of the blocks in a file is laid out: its shape and dtype, and its first byte."""

    shape: torch.Size
    dtype: torch.dtype
    start: int

    @property
    def width(self) -> int:
        """Bytes of one block of one row and head."""
        return self.shape[3:].numel() * self.dtype.itemsize


class File:
    """One file of blocks, checked whenever it is read, and deleted when the last store that lists it is gone.

    admit: is told the file's bytes, and raises `ArchiveFullError` if they are too many, before anything is written.
    """

    def __init__(self, folder: Folder, parts: Parts, admit: Callable[[int], None]) -> None:
        whole = {name: _own(name, parts) for name in sorted(parts)}
        data = save(whole)
        admit(len(data))
        self.nbytes = len(data)
        self.kinds = _kinds(data, whole)
        _, self.kv_heads, self.blocks, *_ = next(iter(whole.values())).shape
        self._sums = torch.stack([checksums(_entries(part)) for part in whole.values()])
        self._folder = folder  # lives as long as its files
        self.path = folder.path / f"{uuid.uuid4().hex}.safetensors"
        weakref.finalize(self, _delete, self.path, os.getpid())
        try:
            with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
        except OSError as error:
            _delete(self.path, os.getpid())  # at once: the error keeps this object alive
            raise ArchiveFullError(
                f"archive 'disk' cannot write {self.nbytes:,} bytes to {str(folder.path)!r}: "
                f"{error.strerror or error}; "
                + (
                    "free some space or choose another directory. Nothing was lost: the blocks are still recent"
                    if folder.path.is_dir()
                    else "the folder was removed by another program, and with it the blocks archived so far"
                )
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "File":
        return self

    def pick(
        self, at: Int[Tensor, " picked"], into: Mapping[str, UInt8[Tensor, "picked _"]]
    ) -> Int64[Tensor, "_ picked"]:
        """Copy the entries `at` of every part (counted over rows, heads and blocks), and return their due checksums."""
        try:
            mapped = torch.from_file(str(self.path), shared=False, size=self.nbytes, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            reason = "it is shorter" if self.path.is_file() else "there is no such file"
            raise SavedCacheError(self.blame(f"was removed or changed by another program ({reason})")) from error
        entries = self._sums.shape[1]
        for name, kind in self.kinds.items():
            part = mapped.narrow(0, kind.start, entries * kind.width).view(entries, kind.width)
            torch.index_select(part, 0, at, out=into[name])  # only the pages that hold them are read
        return self._sums.index_select(1, at)

    def blame(self, what: str) -> str:
        """The message that says what happened to this file, and what to do."""
        return (
            f"archived blocks cannot be read back: {str(self.path)!r} {what}; start a new cache, for nothing that was "
            "archived in this file can be trusted"
        )


@attrs.frozen(kw_only=True, eq=False)
class Entry:
    """The first `count` blocks of a file, as one store sees them: its row `i` is row `rows[i]` of the file."""

    file: File
    count: int
    rows: Int[Tensor, " rows"]


class DiskBlockStore(BlockStore):
    """Blocks in files. Rows are selected by indirection and forks share files: nothing is rewritten."""

    def __init__(self, home: Home, folder: Folder, budget: ByteBudget) -> None:
        self._home = home
        self._folder = folder
        self._entries: tuple[Entry, ...] = ()
        self.join(budget)

    def write(self, parts: Parts) -> None:
        leads = {tuple(part.shape[:3]) for part in parts.values()}
        if len(leads) != 1:
            raise GeometryError(
                f"parts of archived blocks begin with different axes {sorted(leads)}; due is the same [batch, "
                "kv_heads, blocks] for all"
            )
        self.admit(parts, self._held())
        ((batch, _, count),) = leads
        if count:
            folder = self._folder if self._folder.process == os.getpid() else self._home.folder()
            entry = Entry(file=File(folder, parts, self._admit_bytes), count=count, rows=torch.arange(batch))
            self._folder, self._entries, self.count = folder, (*self._entries, entry), self.count + count

    def _admit_bytes(self, more: int) -> None:
        """Raise `ArchiveFullError` if a file of `more` bytes would exceed the limit."""
        self.budget.admit(self, {**self.storages(), ("disk", "new"): more})

    def _held(self) -> dict[str, Tensor]:
        """What is held, in shape and dtype only."""
        if not self._entries:
            return {}
        last = self._entries[-1]
        return {
            name: torch.empty(len(last.rows), heads, self.count, *block, dtype=kind.dtype, device="meta")
            for name, kind in last.file.kinds.items()
            for _, heads, _, *block in [kind.shape]
        }

    def drop_last(self, count: int) -> None:
        left, kept = self.count - count, []
        for entry in self._entries:
            if left > 0:
                kept.append(attrs.evolve(entry, count=min(entry.count, left)))
            left -= entry.count
        self._entries, self.count = tuple(kept), self.count - count

    def read(self, index: Int[Tensor, "batch kv_heads chosen"]) -> dict[str, Tensor]:
        if not self.count:
            raise GeometryError("an empty store was read")
        chosen = index.cpu().contiguous()
        kinds = self._entries[-1].file.kinds
        number, at = self._located(chosen)
        order = number.argsort(stable=True)  # file by file
        runs = torch.bincount(number, minlength=len(self._entries)).tolist()
        found = {name: torch.empty(len(at), kind.width, dtype=torch.uint8) for name, kind in kinds.items()}
        due = torch.empty(len(kinds), len(at), dtype=torch.int64)
        start = 0
        for entry, places, run in zip(self._entries, at[order].split(runs), runs, strict=True):
            if run:
                into = {name: data[start : start + run] for name, data in found.items()}
                due[:, start : start + run] = entry.file.pick(places, into)
                start += run
        self._check(found, due, chosen, number, order)
        back = order.argsort()
        return {
            name: data[back].view(kinds[name].dtype).view(*chosen.shape, *kinds[name].shape[3:]).to(index.device)
            for name, data in found.items()
        }

    def _check(self, found: Parts, due: Tensor, chosen: Tensor, number: Tensor, order: Tensor) -> None:
        """Raise `SavedCacheError` unless everything that was found, in `order`, has the checksums that are due."""
        for (name, data), sums in zip(found.items(), due, strict=True):
            wrong = (checksums(data) != sums).nonzero()
            if len(wrong):
                place = order[int(wrong[0])]
                row, head, _ = (int(axis) for axis in torch.unravel_index(place, chosen.shape))
                raise SavedCacheError(
                    self._entries[int(number[place])].file.blame(
                        f"was changed by another program or by its disk: {name!r} of block "
                        f"{int(chosen.flatten()[place])} of row {row} and KV head {head} is not what was written"
                    )
                )

    def _located(self, chosen: Int[Tensor, "batch kv_heads chosen"]) -> tuple[Tensor, Tensor]:
        """For each chosen block the number of its entry, and its place within the file."""
        counts = torch.tensor([entry.count for entry in self._entries])
        sizes = torch.tensor([entry.file.blocks for entry in self._entries])
        rows = torch.stack([entry.rows for entry in self._entries])
        batch, heads, _ = chosen.shape
        number = torch.bucketize(chosen.contiguous(), counts.cumsum(0), right=True)
        row = rows[number, torch.arange(batch)[:, None, None]]
        block = chosen - (counts.cumsum(0) - counts)[number]
        at = (row * heads + torch.arange(heads)[:, None]) * sizes[number] + block
        return number.flatten(), at.flatten()

    def storages(self) -> Storages:
        return {("disk", entry.file): entry.file.nbytes for entry in self._entries}

    def fork(self) -> "DiskBlockStore":
        return self._with(self._entries)

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "DiskBlockStore":
        at = rows.cpu()
        return self._with(tuple(attrs.evolve(entry, rows=entry.rows[at]) for entry in self._entries))

    def _with(self, entries: tuple[Entry, ...]) -> "DiskBlockStore":
        other = DiskBlockStore(self._home, self._folder, self.budget)
        other._entries, other.count = entries, self.count
        return other

    def parts(self) -> dict[str, Tensor]:
        if not self._entries:
            return {}
        last = self._entries[-1]
        return self.read(torch.arange(self.count).expand(len(last.rows), last.file.kv_heads, -1))


@attrs.frozen(kw_only=True)
class DiskArchive(Archive):
    """Hold archived blocks in files, one for each time that blocks leave recent.

    directory: where this archive makes its private folder (None: where temporary files go). A file is deleted when no
        cache needs it, at the end of the process at the latest; save a cache that shall last. What a killed process
        left is removed when the next archive opens there.
    limit_bytes: the most bytes that all layers together may write (None: what the disk has); then `ArchiveFullError`.
    """

    location: ClassVar[Location] = "disk"
    directory: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))
    _home: Home = attrs.field(
        init=False, eq=False, repr=False, default=attrs.Factory(lambda self: Home(self.directory), takes_self=True)
    )

    def open(self, budget: ByteBudget) -> BlockStore:
        return DiskBlockStore(self._home, self._home.folder(), budget)


# ---------------------------------------------------------------------- bytes


def checksums(data: UInt8[Tensor, "entries _"]) -> Int64[Tensor, " entries"]:
    """A sum of each entry's words, every word weighted by its place: no change of a single word leaves it as it is."""
    if data.shape[1] % 4:
        words = data
    else:
        words = (data.clone() if data.storage_offset() % 4 else data).view(torch.int32)
    weights = _weights(words.shape[1])
    run = max(1, _AT_ONCE // max(1, len(weights)))
    return torch.cat([(some * weights).sum(-1) for some in words.split(run)])


@lru_cache(maxsize=16)
def _weights(count: int) -> Int64[Tensor, " words"]:
    """Odd random numbers, the same ones each time."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) | 1


def _entries(part: Tensor) -> UInt8[Tensor, "entries _"]:
    """The bytes of each block of each row and head."""
    return part.reshape(part.shape[:3].numel(), -1).view(torch.uint8)


def _own(name: str, parts: Parts) -> Tensor:
    """A part in the host's memory, copied if another one shares its memory, which safetensors refuses to write."""
    own = parts[name].detach().cpu().contiguous()
    storage = parts[name].untyped_storage().data_ptr()
    shared = any(other != name and x.untyped_storage().data_ptr() == storage for other, x in parts.items())
    return own.clone() if shared else own


def _kinds(data: bytes, parts: Parts) -> dict[str, Kind]:
    """How `parts` are laid out in the bytes of a safetensors file: a length, a JSON header of offsets, and tensors."""
    first = 8 + int.from_bytes(data[:8], "little")
    offsets = {name: about["data_offsets"][0] for name, about in json.loads(data[8:first]).items()}
    return {name: Kind(shape=x.shape, dtype=x.dtype, start=first + offsets[name]) for name, x in parts.items()}


def _delete(path: Path, process: int) -> None:
    """Delete a file, unless `process` is not this one but its parent."""
    if process == os.getpid():
        path.unlink(missing_ok=True)
