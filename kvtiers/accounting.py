"""How many bytes are held, per tier and location: the bytes of the storages themselves, not of what they should be."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import attrs
from torch import Tensor

from kvtiers.blocks import Location, Selection, Tier
from kvtiers.layer import Layer
from kvtiers.recall import MidTokens

Part = Tier | Literal["digests", "spare", "prompt"]


@attrs.frozen(kw_only=True)
class MemoryUsage:
    """Bytes of one tier in one location. `digests` belong to mid; `spare` are slots of a context buffer in no use now;
    `prompt` are the keys and values of cross-attention (video)."""

    tier: Part
    location: Location
    bytes: int


def memory_usage_of(layers: Iterable[Layer]) -> list[MemoryUsage]:
    """What `layers` hold together, one entry per tier and location, largest first."""
    total: Counter[tuple[Part, Location]] = Counter()
    small: dict[int, int] = {}
    waiting: dict[int, int] = {}
    graph: dict[int, int] = {}
    for layer in layers:
        for buffer in layer._all_buffers():
            _split(layer, buffer, total)
        parts = [layer.digests.buffer, layer.starts.buffer, layer.state, *_parts(layer.mid), *_parts(layer.selection)]
        parts += [part.table.buffer for part in layer.lengths.values()]
        storages = [part.untyped_storage() for part in parts if isinstance(part, Tensor)]
        small |= {storage.data_ptr(): storage.nbytes() for storage in storages}  # rows that part ways share some
        for block in layer.reduced.values():
            for part in (block.keys, block.values, block.offsets):
                waiting[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        for run in layer.graph:
            for part in (run.keys, run.values):
                graph[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        for store in layer.stores.values():
            for location, size in store.bytes_by_location().items():
                total["mid", location] += size
    total["digests", "device"] = sum(small.values())
    total["recent", "device"] += sum(waiting.values())
    total["mid", "device"] += sum(graph.values())
    return [MemoryUsage(tier=tier, location=location, bytes=n) for (tier, location), n in total.most_common() if n]


def _parts(value: MidTokens | Selection | None) -> list[object]:
    return [] if value is None else [getattr(value, field.name) for field in attrs.fields(type(value))]


def _split(layer: Layer, buffer: Tensor, total: Counter[tuple[Part, Location]]) -> None:
    """Credit the slots of a context buffer to the tiers that are in them."""
    whole = buffer.untyped_storage().nbytes()
    slot = whole // buffer.shape[2]
    recent = max(0, layer.tail - layer.head - layer.current)
    parts: dict[Part, int] = {
        "sink": layer.sink_tokens,
        "mid": 0 if layer.stale else layer.mid_tokens,
        "recent": recent,
        "current": min(layer.current, layer.tail - layer.head),
    }
    for tier, tokens in parts.items():
        total[tier, "device"] += tokens * slot
    total["spare", "device"] += whole - slot * sum(parts.values())


def bytes_in(usage: Iterable[MemoryUsage], location: Location) -> int:
    """All bytes in `location`."""
    return sum(h.bytes for h in usage if h.location == location)
