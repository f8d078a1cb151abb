"""What the archives in memory share: a `TensorShelf` with a byte limit and, for the host of a GPU, pinned pages."""

import attrs
import torch

from kvtiers.archive import Archive, Shelf, TensorShelf
from kvtiers.blocks import Blocks, Location
from kvtiers_policies.ledger import Ledger, fits, ledger, limit_bytes


class MemoryShelf(TensorShelf):
    """A shelf in memory that refuses, before it writes anything, what would exceed its archive's limit."""

    def __init__(
        self, location: Location, *, ledger: Ledger, limit_bytes: int | None, device: torch.device | None, pinned: bool
    ) -> None:
        super().__init__(location, device, pinned=pinned)
        self._ledger, self._limit = ledger, limit_bytes
        ledger.enter(self)

    def under(self, ledger: Ledger, limit_bytes: int | None) -> None:
        """Count what is held here in `ledger` instead, up to `limit_bytes`."""
        self._ledger.leave(self)
        self._ledger, self._limit = ledger, limit_bytes
        ledger.enter(self)

    @property
    def nbytes(self) -> int:
        return sum(self.bytes_by_location().values())

    def write(self, blocks: Blocks) -> None:
        self.admit(blocks)
        self._ledger.admit(self._nbytes_after(blocks) - self.nbytes, self._limit, self.location)
        super().write(blocks)

    def _empty(self) -> "MemoryShelf":
        return MemoryShelf(
            self.location, ledger=self._ledger, limit_bytes=self._limit, device=self.device, pinned=self.pinned
        )

    def _nbytes_after(self, blocks: Blocks) -> int:
        offsets = blocks.offsets.to(torch.float32)
        held = self._keys.nbytes_after(blocks.keys) + self._values.nbytes_after(blocks.values)
        if blocks.alike:
            return held + offsets.numel() * offsets.element_size()
        return held + self._offsets.nbytes_after(offsets.expand(*blocks.keys.shape[:4], -1))


@attrs.frozen(kw_only=True)
class MemoryArchive(Archive):
    """An archive of `MemoryShelf`s.

    limit_bytes: the most bytes that all layers together may archive (none: no limit); then `ArchiveFullError`.
    """

    limit_bytes: int | None = limit_bytes()
    _ledger: Ledger = ledger()

    def adopts(self, other: Archive) -> bool:
        return type(self) is type(other) and (self == other or fits(other, self.limit_bytes))

    def adopt(self, shelf: Shelf) -> None:
        if isinstance(shelf, MemoryShelf):
            shelf.under(self._ledger, self.limit_bytes)
