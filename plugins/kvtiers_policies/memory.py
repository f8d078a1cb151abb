"""The shelf of the archives in memory: a `TensorShelf` with a byte limit and, for the host of a GPU, pinned pages."""

import torch

from kvtiers.archive import TensorShelf
from kvtiers.blocks import Blocks, Place
from kvtiers_policies.ledger import Ledger


class MemoryShelf(TensorShelf):
    """A shelf in memory that refuses, before it writes anything, what would exceed its archive's limit."""

    def __init__(
        self, place: Place, *, ledger: Ledger, limit_bytes: int | None, device: torch.device | None, pinned: bool
    ) -> None:
        super().__init__(place, device, pinned=pinned)
        self._ledger, self._limit, self._pinned = ledger, limit_bytes, pinned
        ledger.enter(self)

    @property
    def nbytes(self) -> int:
        return sum(self.bytes_by_place().values())

    def write(self, blocks: Blocks) -> None:
        self.admit(blocks)
        self._ledger.admit(self._nbytes_after(blocks) - self.nbytes, self._limit, self.place)
        super().write(blocks)

    def fork(self) -> "MemoryShelf":
        other = MemoryShelf(
            self.place, ledger=self._ledger, limit_bytes=self._limit, device=self.device, pinned=self._pinned
        )
        other.count, other.span, other.tokens = self.count, self.span, self.tokens
        other._keys, other._values, other._offsets = self._keys.fork(), self._values.fork(), self._offsets.fork()
        other._constant = None if self._constant is None else self._constant.clone()
        return other

    def _nbytes_after(self, blocks: Blocks) -> int:
        offsets = blocks.offsets.to(torch.float32)
        held = self._keys.nbytes_after(blocks.keys) + self._values.nbytes_after(blocks.values)
        if blocks.alike:
            return held + offsets.numel() * offsets.element_size()
        return held + self._offsets.nbytes_after(offsets.expand(*blocks.keys.shape[:4], -1))
