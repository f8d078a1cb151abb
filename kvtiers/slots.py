"""The slots of a layer's context buffer: how room is made for new tokens, and for mid before recent.

`sink | mid | recent | current` lie side by side. Recent and current stay where they were written and slide right as
blocks leave; when the end is reached everything moves back to the beginning, into a larger buffer if there is no limit.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from kvtiers.archive import lasting

if TYPE_CHECKING:
    from kvtiers.store import LayerStore


def reserve(store: "LayerStore", tokens: int, keys: Tensor, values: Tensor) -> None:
    """Make sure that `tokens` more slots follow the tail, for tensors like `keys` and `values`."""
    if store.rotated is None:
        slots = store.policy.slots(store.geometry)
        bound = store.policy.mid_bound(store.geometry) or 0
        room = bound + tokens if slots is None else slots
        store.rotated = lasting((*keys.shape[:2], room, keys.shape[3]), like=keys)
        store.unrotated = lasting(store.rotated.shape, like=keys) if store.rotates else None
        store.values = lasting((*values.shape[:2], room, values.shape[3]), like=values)
        store.tail = bound
    elif store.tail + tokens > store.rotated.shape[2]:
        _relocate(store, _reserved(store), tokens)


def make_room(store: "LayerStore", before: int) -> None:
    """Make sure that `before` slots precede recent."""
    if store.head < before:
        _relocate(store, max(before, _reserved(store)), 0)


def move_sink(store: "LayerStore", slot: int) -> None:
    """Move the sink to `slot`."""
    if slot != store.sink_slot and store.sink_tokens:
        for buffer in store._all_buffers():
            moved = buffer[:, :, store.sink_slot : store.sink_slot + store.sink_tokens].clone()
            buffer[:, :, slot : slot + store.sink_tokens] = moved
    store.sink_slot = slot


def _reserved(store: "LayerStore") -> int:
    """Slots before recent: what sink and mid may come to need, or need now if there is no limit."""
    bound = store.policy.mid_bound(store.geometry)
    if bound is None or store.policy.in_place:
        return store.sink_tokens + store.mid_tokens
    return store.policy.anchors(store.geometry) * store.geometry.tokens_per_step + bound


def _relocate(store: "LayerStore", head: int, extra: int) -> None:
    """Move everything so that recent starts at slot `head`, with `extra` slots behind the tail; grow if need be."""
    size, old_head = store.tail - store.head, store.head
    needed = head + size + extra
    sink, mid = store.sink_tokens, 0 if store.stale else store.mid_tokens
    for name in ("rotated", "unrotated", "values"):
        buffer: Tensor | None = getattr(store, name)
        if buffer is None:
            continue
        anchors = buffer[:, :, store.sink_slot : store.sink_slot + sink]
        rest = buffer[:, :, old_head - mid : store.tail]
        if needed > buffer.shape[2]:
            room = max(needed, 2 * buffer.shape[2]) if store.policy.slots(store.geometry) is None else needed
            target = lasting((*buffer.shape[:2], room, buffer.shape[3]), like=buffer)
        else:
            anchors, rest, target = anchors.clone(), rest.clone(), buffer
        target[:, :, head - mid : head + size] = rest
        target[:, :, head - mid - sink : head - mid] = anchors
        setattr(store, name, target)
    store.tail = head + size
    store.sink_slot = head - mid - sink
