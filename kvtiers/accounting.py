"""How many bytes are held, per tier and location: the bytes of the storages themselves, not of what they should be."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import attrs
from torch import Tensor

from kvtiers.archive import BlockStore, bytes_by_location
from kvtiers.blocks import Location, Tier
from kvtiers.layer import Layer
from kvtiers.window import Window

Part = Tier | Literal["digests", "spare", "prompt"]


@attrs.frozen(kw_only=True)
class MemoryUsage:
    """Bytes of one tier in one location. `digests` belong to mid, as does what is noted of where blocks lie;
    `spare` are slots of a window in no use now; `prompt` are the keys and values of cross-attention (video)."""

    tier: Part
    location: Location
    bytes: int


def memory_usage_of(layers: Iterable[Layer]) -> list[MemoryUsage]:
    """What `layers` hold together, one entry per tier and location, largest first."""
    total: Counter[tuple[Part, Location]] = Counter()
    small: dict[int, int] = {}
    waiting: dict[int, int] = {}
    stores: list[BlockStore] = []
    for layer in layers:
        for window in layer.placed.windows():
            _split(window, layer.current, total)
        history = layer.history
        held = [part for held in (*history.waiting.values(), history.rewritten) if held for part in held.tensors()]
        waiting |= _storages(held)
        planes = _storages(plane for window in layer.placed.windows() for plane in window.planes.values())
        small |= {at: size for at, size in _storages(layer.tensors()).items() if at not in waiting and at not in planes}
        stores += history.stores.values()
    for location, size in bytes_by_location(stores).items():
        total["mid", location] += size
    total["digests", "device"] = sum(small.values())
    total["recent", "device"] += sum(waiting.values())
    return [MemoryUsage(tier=tier, location=location, bytes=n) for (tier, location), n in total.most_common() if n]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each storage once: rows that part ways share some."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def _split(window: Window, current: int, total: Counter[tuple[Part, Location]]) -> None:
    """Credit the slots of a window to the tiers that are in them."""
    now = min(current, window.recent)
    parts: dict[Part, int] = {"sink": window.sink, "mid": window.mid, "recent": window.recent - now, "current": now}
    for plane in window.planes.values():
        whole = plane.nbytes
        slot = whole // plane.shape[2]
        for tier, tokens in parts.items():
            total[tier, "device"] += tokens * slot
        total["spare", "device"] += whole - slot * sum(parts.values())


def bytes_in(usage: Iterable[MemoryUsage], location: Location) -> int:
    """All bytes in `location`."""
    return sum(one.bytes for one in usage if one.location == location)
