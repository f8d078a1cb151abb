"""Archive `host`: archived blocks live in the host's memory and are recalled when chosen (InfLLM, arXiv 2402.04617)."""

from typing import ClassVar

import attrs
import torch

from kvtiers.archive import Shelf
from kvtiers.blocks import Location
from kvtiers_policies.memory import MemoryArchive, MemoryShelf


@attrs.frozen(kw_only=True)
class HostArchive(MemoryArchive):
    """Hold archived blocks in the host's memory, in pinned pages if there is a GPU to copy to.

    limit_bytes: the most bytes that all layers together may archive (none: no limit); then `ArchiveFullError`.
    """

    location: ClassVar[Location] = "host"

    def open(self) -> Shelf:
        return MemoryShelf(
            "host",
            ledger=self._ledger,
            limit_bytes=self.limit_bytes,
            device=torch.device("cpu"),
            pinned=torch.cuda.is_available(),
        )
