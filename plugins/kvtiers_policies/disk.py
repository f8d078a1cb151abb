"""Stand-in until the disk archive is written (held in host memory)."""

from typing import ClassVar

import attrs
import torch
from attrs import validators as v

from kvtiers.archive import Archive, BlockStore, ByteBudget
from kvtiers.blocks import Location
from kvtiers_policies.memory import MemoryBlockStore


@attrs.frozen(kw_only=True)
class DiskArchive(Archive):
    location: ClassVar[Location] = "disk"
    directory: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))

    def open(self, budget: ByteBudget) -> BlockStore:
        return MemoryBlockStore("disk", budget, torch.device("cpu"))
