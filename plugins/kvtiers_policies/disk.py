"""Archive `disk`: archived blocks live in safetensors files, of which only the chosen blocks are read (FlexGen, arXiv
2303.06865, section 4: disk as the last level of the cache's memory hierarchy).
"""

import shutil
import tempfile
import uuid
import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvtiers.archive import Archive, BlockStore
from kvtiers.blocks import Blocks, Location
from kvtiers.errors import ArchiveFullError, GeometryError, SavedCacheError
from kvtiers_policies.byte_budget import ByteBudget, byte_budget, fits, limit_bytes


class Folder:
    """Where files go. A private temporary folder is removed with the last store and file that use it."""

    def __init__(self, directory: str | None) -> None:
        try:
            if directory is not None:
                self.path = Path(directory)
                self.path.mkdir(parents=True, exist_ok=True)
                return
            self.path = Path(tempfile.mkdtemp(prefix="kvtiers-"))
        except OSError as error:
            raise ArchiveFullError(f"archive 'disk' cannot make its folder: {error}") from error
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class File:
    """One immutable file of blocks, deleted when the last store that lists it is gone."""

    def __init__(self, folder: Folder, tensors: Mapping[str, Tensor], admit: Any) -> None:
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        self.nbytes = len(data)
        admit(self.nbytes)
        self.folder = folder  # keeps a temporary folder alive
        self.path = folder.path / f"{uuid.uuid4().hex}.safetensors"
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_bytes(data)
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ArchiveFullError(
                f"archive 'disk' cannot write {self.nbytes:,} bytes to {str(folder.path)!r}: "
                f"{error.strerror or error}; "
                + (
                    "free some space or choose another directory. Nothing was lost: the blocks are still recent"
                    if folder.path.is_dir()
                    else "the folder was removed by another program, and with it the blocks archived so far"
                )
            ) from error
        weakref.finalize(self, self.path.unlink, missing_ok=True)

    def open(self) -> Any:
        """The file, opened to read parts of its tensors."""
        try:
            return safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise SavedCacheError(
                f"archived blocks cannot be read back: {str(self.path)!r} was removed or changed "
                f"by another program ({error})"
            ) from error


@attrs.frozen(kw_only=True, eq=False)
class Entry:
    """The first `count` blocks of one file, as one store sees them: its row `i` is row `rows[i]` of the file."""

    file: File
    count: int
    rows: tuple[int, ...]


@attrs.frozen(kw_only=True, eq=False)
class Widths:
    """What an empty answer needs to know, and what later blocks must agree with."""

    key: int
    value: int
    axes: int
    dtype: torch.dtype
    offsets_differ: bool


class DiskBlockStore(BlockStore):
    """A store whose blocks are files. Rows are selected by indirection and forks share files: nothing is rewritten."""

    def __init__(self, folder: Folder, *, byte_budget: ByteBudget, limit_bytes: int | None) -> None:
        super().__init__()
        self._folder = folder
        self._entries: list[Entry] = []
        self._widths: Widths | None = None
        self.under(byte_budget, limit_bytes)

    def under(self, byte_budget: ByteBudget, limit_bytes: int | None) -> None:
        """Count the files of this store in `byte_budget`, up to `limit_bytes`."""
        self._byte_budget, self._limit = byte_budget, limit_bytes
        for entry in self._entries:
            byte_budget.enter(entry.file)

    def write(self, blocks: Blocks) -> None:
        self.admit(blocks)
        own = not blocks.alike
        if self._widths is not None and own != self._widths.offsets_differ:
            raise GeometryError("blocks with offsets of their own cannot follow blocks that share them")
        offsets = blocks.offsets.expand(*blocks.keys.shape[:4], -1) if own else blocks.offsets
        self._append({"keys": blocks.keys, "values": blocks.values, "offsets": offsets.to(torch.float32)}, own)
        self.count += blocks.count
        self.span, self.tokens = blocks.span, blocks.tokens

    def drop_last(self, count: int) -> None:
        left = self.count - count
        kept = []
        for entry in self._entries:
            if left > 0:
                kept.append(attrs.evolve(entry, count=min(entry.count, left)))
            left -= entry.count
        self._entries = kept
        self.count -= count

    def read(
        self, index: Int[Tensor, "batch kv_heads chosen"]
    ) -> tuple[
        Float[Tensor, "batch kv_heads chosen tokens head_dim"],
        Float[Tensor, "batch kv_heads chosen tokens value_dim"],
        Float[Tensor, "#batch #kv_heads #chosen tokens axes"],
    ]:
        widths = self._widths
        if widths is None or not self._entries:
            raise GeometryError("an empty store was read")
        shape = (*index.shape, self.tokens)
        keys = torch.empty(*shape, widths.key, dtype=widths.dtype)
        values = torch.empty(*shape, widths.value, dtype=widths.dtype)
        offsets = torch.empty(*shape, widths.axes)
        for entry, places in self._by_entry(index.tolist()):
            with entry.file.open() as file:
                parts = [(file.get_slice("keys"), keys), (file.get_slice("values"), values)]
                if widths.offsets_differ:
                    parts.append((file.get_slice("offsets"), offsets))
                for row, head, slot, block in places:
                    for part, out in parts:
                        out[row, head, slot] = part[entry.rows[row], head, block]
        if not widths.offsets_differ:
            with self._entries[0].file.open() as file:
                offsets = file.get_tensor("offsets")
        device = index.device
        return keys.to(device), values.to(device), offsets.to(device)

    def bytes_by_location(self) -> dict[Location, int]:
        return {"disk": sum(file.nbytes for file in {entry.file for entry in self._entries})}

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        taken = rows.tolist()
        self._entries = [attrs.evolve(e, rows=tuple(e.rows[row] for row in taken)) for e in self._entries]

    def fork(self) -> "DiskBlockStore":
        other = DiskBlockStore(self._folder, byte_budget=self._byte_budget, limit_bytes=self._limit)
        other.count, other.span, other.tokens = self.count, self.span, self.tokens
        other._entries, other._widths = list(self._entries), self._widths
        return other

    def tensors(self) -> dict[str, Tensor]:
        if self._widths is None or not self._entries:
            return {}
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for entry in self._entries:
            with entry.file.open() as file:
                for name in ("keys", "values", *(["offsets"] if self._widths.offsets_differ else [])):
                    parts[name].append(file.get_tensor(name)[list(entry.rows), :, : entry.count])
                constant = file.get_tensor("offsets")
        held = {name: torch.cat(tensors, dim=2) for name, tensors in parts.items()}
        return held if self._widths.offsets_differ else held | {"constant": constant}

    def restore(self, tensors: Mapping[str, Tensor], *, count: int, span: int) -> None:
        if count:
            own = "offsets" in tensors
            offsets = tensors["offsets" if own else "constant"]
            self._append({"keys": tensors["keys"], "values": tensors["values"], "offsets": offsets}, own)
            self.tokens = tensors["keys"].shape[3]
        self.count, self.span = count, span

    def _append(self, tensors: Mapping[str, Tensor], offsets_differ: bool) -> None:
        keys = tensors["keys"]
        file = File(self._folder, tensors, lambda more: self._byte_budget.admit(more, self._limit, "disk"))
        self._byte_budget.enter(file)
        self._entries.append(Entry(file=file, count=keys.shape[2], rows=tuple(range(keys.shape[0]))))
        self._widths = Widths(
            key=keys.shape[-1],
            value=tensors["values"].shape[-1],
            axes=tensors["offsets"].shape[-1],
            dtype=keys.dtype,
            offsets_differ=offsets_differ,
        )

    def _by_entry(self, index: list[list[list[int]]]) -> Sequence[tuple[Entry, list[tuple[int, int, int, int]]]]:
        """The chosen blocks by the file that holds them, as (row, head, slot, block within the file)."""
        ends = list(accumulate(entry.count for entry in self._entries))
        found: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        for row, heads in enumerate(index):
            for head, chosen in enumerate(heads):
                for slot, block in enumerate(chosen):
                    at = bisect_right(ends, block)
                    found[at].append((row, head, slot, block - (ends[at - 1] if at else 0)))
        return [(self._entries[at], places) for at, places in sorted(found.items())]


class _Shared:
    """The temporary folder that the stores of one archive share while any of them lives."""

    def __init__(self) -> None:
        self._folder: weakref.ref[Folder] | None = None

    def folder(self, directory: str | None) -> Folder:
        found = self._folder() if self._folder is not None else None
        if found is None:
            found = Folder(directory)
            self._folder = weakref.ref(found)
        return found


@attrs.frozen(kw_only=True)
class DiskArchive(Archive):
    """Hold archived blocks in files, one for each time that blocks leave recent.

    directory: where the files go (none: a private temporary folder, removed afterwards). Files are deleted when no
        cache needs them, at the end of the process at the latest; a cache that shall last is saved.
    limit_bytes: the most bytes that all layers together may write (none: what the disk has); then `ArchiveFullError`.
    """

    location: ClassVar[Location] = "disk"
    directory: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))
    limit_bytes: int | None = limit_bytes()
    _byte_budget: ByteBudget = byte_budget()
    _shared: _Shared = attrs.field(init=False, factory=_Shared, eq=False, repr=False)

    def open(self) -> BlockStore:
        return DiskBlockStore(
            self._shared.folder(self.directory), byte_budget=self._byte_budget, limit_bytes=self.limit_bytes
        )

    def adopts(self, other: Archive) -> bool:
        same = isinstance(other, DiskArchive) and other.directory == self.directory
        return same and (self == other or fits(other, self.limit_bytes))

    def adopt(self, store: BlockStore) -> None:
        if isinstance(store, DiskBlockStore):
            store.under(self._byte_budget, self.limit_bytes)
