"""Archive `device`: archived blocks stay on the accelerator, as in Quest (arXiv 2406.10774)."""

from typing import ClassVar

import attrs

from kvtiers.archive import Archive, BlockStore, ByteBudget
from kvtiers.blocks import Location
from kvtiers_policies.memory import MemoryBlockStore


@attrs.frozen(kw_only=True)
class DeviceArchive(Archive):
    """Hold archived blocks where they were computed."""

    location: ClassVar[Location] = "device"

    def open(self, budget: ByteBudget) -> BlockStore:
        return MemoryBlockStore("device", budget)
