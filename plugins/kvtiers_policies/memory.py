"""What the archives in memory share: a `TensorBlockStore` with a byte limit, and pinned pages for the host of a GPU."""

import attrs
import torch

from kvtiers.archive import Archive, BlockStore, TensorBlockStore
from kvtiers.blocks import Blocks, Location
from kvtiers_policies.byte_budget import ByteBudget, byte_budget, fits, limit_bytes


class MemoryBlockStore(TensorBlockStore):
    """A store in memory that refuses, before it writes anything, what would exceed its archive's limit."""

    def __init__(
        self,
        location: Location,
        *,
        byte_budget: ByteBudget,
        limit_bytes: int | None,
        device: torch.device | None,
        pinned: bool,
    ) -> None:
        super().__init__(location, device, pinned=pinned)
        self._byte_budget, self._limit = byte_budget, limit_bytes
        byte_budget.enter(self)

    def under(self, byte_budget: ByteBudget, limit_bytes: int | None) -> None:
        """Count what is held here in `byte_budget` instead, up to `limit_bytes`."""
        self._byte_budget.leave(self)
        self._byte_budget, self._limit = byte_budget, limit_bytes
        byte_budget.enter(self)

    @property
    def nbytes(self) -> int:
        return sum(self.bytes_by_location().values())

    def write(self, blocks: Blocks) -> None:
        self.admit(blocks)
        self._byte_budget.admit(self._nbytes_after(blocks) - self.nbytes, self._limit, self.location)
        super().write(blocks)

    def _empty(self) -> "MemoryBlockStore":
        return MemoryBlockStore(
            self.location,
            byte_budget=self._byte_budget,
            limit_bytes=self._limit,
            device=self.device,
            pinned=self.pinned,
        )

    def _nbytes_after(self, blocks: Blocks) -> int:
        offsets = blocks.offsets.to(torch.float32)
        held = self._keys.nbytes_after(blocks.keys) + self._values.nbytes_after(blocks.values)
        if blocks.alike:
            return held + offsets.numel() * offsets.element_size()
        return held + self._offsets.nbytes_after(offsets.expand(*blocks.keys.shape[:4], -1))


@attrs.frozen(kw_only=True)
class MemoryArchive(Archive):
    """An archive of `MemoryBlockStore`s.

    limit_bytes: the most bytes that all layers together may archive (none: no limit); then `ArchiveFullError`.
    """

    limit_bytes: int | None = limit_bytes()
    _byte_budget: ByteBudget = byte_budget()

    def adopts(self, other: Archive) -> bool:
        return type(self) is type(other) and (self == other or fits(other, self.limit_bytes))

    def adopt(self, store: BlockStore) -> None:
        if isinstance(store, MemoryBlockStore):
            store.under(self._byte_budget, self.limit_bytes)
