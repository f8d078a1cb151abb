"""Archive `host`: archived blocks live in the host's memory and are recalled when chosen (InfLLM, arXiv 2402.04617)."""

from typing import ClassVar

import attrs
import torch

from kvtiers.archive import BlockStore
from kvtiers.blocks import Location
from kvtiers_policies.memory import MemoryArchive, MemoryBlockStore


@attrs.frozen(kw_only=True)
class HostArchive(MemoryArchive):
    """Hold archived blocks in the host's memory, in pinned pages if there is a GPU to copy to.

    limit_bytes: the most bytes that all layers together may archive (none: no limit); then `ArchiveFullError`.
    """

    location: ClassVar[Location] = "host"

    def open(self) -> BlockStore:
        return MemoryBlockStore(
            "host",
            byte_budget=self._byte_budget,
            limit_bytes=self.limit_bytes,
            device=torch.device("cpu"),
            pinned=torch.cuda.is_available(),
        )
