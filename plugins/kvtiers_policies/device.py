"""Archive `device`: archived blocks stay on the accelerator, as in Quest (arXiv 2406.10774)."""

from typing import ClassVar

import attrs

from kvtiers.archive import BlockStore
from kvtiers.blocks import Location
from kvtiers_policies.memory import MemoryArchive, MemoryBlockStore


@attrs.frozen(kw_only=True)
class DeviceArchive(MemoryArchive):
    """Hold archived blocks where they were computed.

    limit_bytes: the most bytes that all layers together may archive (none: no limit); then `ArchiveFullError`.
    """

    location: ClassVar[Location] = "device"

    def open(self) -> BlockStore:
        return MemoryBlockStore(
            "device", byte_budget=self._byte_budget, limit_bytes=self.limit_bytes, device=None, pinned=False
        )
