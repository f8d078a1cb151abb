"""The shelf of the archives in memory: a `TensorShelf` with a byte limit and, for the host of a GPU, pinned pages."""

import torch
from jaxtyping import Int
from torch import Tensor

from kvtiers.archive import Growing, TensorShelf
from kvtiers.blocks import Blocks, Place
from kvtiers_policies.ledger import Ledger


class Buffer(Growing):
    """A growing tensor that says beforehand how many bytes it will hold, in pinned memory if asked."""

    def __init__(self, axis: int, *, pinned: bool = False) -> None:
        super().__init__(axis)
        self.pinned = pinned

    def nbytes_after(self, rows: Tensor) -> int:
        """Bytes held once `rows` are appended."""
        slots = self._slots_after(rows)
        return rows.element_size() * rows.numel() // rows.shape[self.axis] * slots

    def append(self, rows: Tensor) -> None:
        slots = self._slots_after(rows)
        if self.buffer is None or slots > self.buffer.shape[self.axis]:
            shape = list(rows.shape)
            shape[self.axis] = slots
            grown = torch.empty(shape, dtype=rows.dtype, device=rows.device, pin_memory=self.pinned)
            if self.data is not None:
                grown.narrow(self.axis, 0, self.length).copy_(self.data)
            self.buffer = grown
        super().append(rows)

    def take(self, rows: Int[Tensor, " rows"]) -> None:
        super().take(rows)
        self._pin()

    def fork(self) -> "Buffer":
        other = Buffer(self.axis, pinned=self.pinned)
        other.length = self.length
        other.buffer = None if self.buffer is None else self.buffer.clone()
        other._pin()
        return other

    def _slots_after(self, rows: Tensor) -> int:
        needed = self.length + rows.shape[self.axis]
        have = 0 if self.buffer is None else self.buffer.shape[self.axis]
        return have if needed <= have else max(needed, 2 * have)

    def _pin(self) -> None:
        if self.pinned and self.buffer is not None:
            self.buffer = self.buffer.pin_memory()


class MemoryShelf(TensorShelf):
    """A shelf in memory that refuses, before it writes anything, what would exceed its archive's limit."""

    _keys: Buffer
    _values: Buffer
    _offsets: Buffer

    def __init__(
        self, place: Place, *, ledger: Ledger, limit_bytes: int | None, device: torch.device | None, pinned: bool
    ) -> None:
        super().__init__(place, device)
        self._ledger, self._limit, self._pinned = ledger, limit_bytes, pinned
        self._keys, self._values, self._offsets = (Buffer(2, pinned=pinned) for _ in range(3))
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
        if max(offsets.shape[:3]) > 1:
            return held + self._offsets.nbytes_after(offsets.expand(*blocks.keys.shape[:4], -1))
        return held + offsets.numel() * offsets.element_size()
