"""Archive `host`: archived blocks live in the host's memory and are recalled when chosen (InfLLM, arXiv 2402.04617)."""

from typing import ClassVar

import attrs
import torch

from kvtiers.archive import Archive, BlockStore, ByteBudget
from kvtiers.blocks import Location
from kvtiers_policies.memory import MemoryBlockStore


@attrs.frozen(kw_only=True)
class HostArchive(Archive):
    """Hold archived blocks in the host's memory, in pinned pages if there is a GPU to copy to."""

    location: ClassVar[Location] = "host"

    def open(self, budget: ByteBudget) -> BlockStore:
        return MemoryBlockStore("host", budget, torch.device("cpu"))
