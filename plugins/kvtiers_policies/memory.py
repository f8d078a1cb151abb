"""What the archives in memory share: a store whose parts grow, on the device or in the host's memory."""

from collections.abc import Hashable, Iterable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from kvtiers.archive import BlockStore, ByteBudget, Parts, Storages, pick
from kvtiers.blocks import Location
from kvtiers.errors import GeometryError
from kvtiers.growing import Growing


class MemoryBlockStore(BlockStore):
    """Blocks in memory, on the device that they come from or on the one that is named.

    It refuses, before it writes anything, what would exceed its budget.
    """

    def __init__(self, location: Location, budget: ByteBudget, device: torch.device | None = None) -> None:
        self.location: Location = location
        self.device = device
        self.pinned = device is not None and device.type == "cpu" and torch.cuda.is_available()
        self._parts: dict[str, Growing] = {}
        self.join(budget)

    def write(self, parts: Parts) -> None:
        held = {name: part.data for name, part in self._parts.items() if part.data is not None}
        self.admit(parts, held)
        grown = {name: self._parts.get(name) or Growing(2, pinned=self.pinned) for name in parts}
        self.budget.admit(self, self._named(part.storages_after(parts[name]) for name, part in grown.items()))
        for name, part in grown.items():
            part.length = self.count  # what a write that failed left behind is overwritten
            part.append(parts[name].to(self.device or parts[name].device))
        self._parts, self.count = grown, self.count + next(iter(parts.values())).shape[2]

    def drop_last(self, count: int) -> None:
        self.count -= count
        if not self.count:
            self._parts = {}  # what comes next may be of another size
        for part in self._parts.values():
            part.length = self.count

    def read(self, index: Int[Tensor, "batch kv_heads chosen"]) -> dict[str, Tensor]:
        if not self.count:
            raise GeometryError("an empty store was read")
        at = index.to(self.device or index.device)
        found = {name: pick(part.buffer, at) for name, part in self._parts.items() if part.buffer is not None}
        if self.pinned and index.device.type == "cuda":  # only pages that stay in place are copied while nothing waits
            found = {name: part.pin_memory() for name, part in found.items()}
        return {name: part.to(index.device, non_blocking=True) for name, part in found.items()}

    def storages(self) -> Storages:
        return self._named(part.storages() for part in self._parts.values())

    def _named(self, buffers: Iterable[Mapping[Hashable, int]]) -> Storages:
        return {(self.location, name): size for buffer in buffers for name, size in buffer.items()}

    def fork(self) -> "MemoryBlockStore":
        return self._with({name: part.fork() for name, part in self._parts.items()})

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "MemoryBlockStore":
        return self._with({name: part.select_rows(rows) for name, part in self._parts.items()})

    def _with(self, parts: dict[str, Growing]) -> "MemoryBlockStore":
        other = MemoryBlockStore(self.location, self.budget, self.device)
        other._parts, other.count = parts, self.count
        return other

    def parts(self) -> dict[str, Tensor]:
        return {name: part.data[:, :, : self.count] for name, part in self._parts.items() if part.data is not None}
