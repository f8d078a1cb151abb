"""The slots of a layer's context buffer: how room is made for new tokens, and for mid before recent.

`sink | mid | recent | current` lie side by side. Recent and current stay where they were written and slide right as
blocks leave; when the end is reached everything moves back to the beginning, into a larger buffer if there is no limit.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from kvtiers.archive import lasting

if TYPE_CHECKING:
    from kvtiers.layer import Layer


def reserve(layer: "Layer", tokens: int, keys: Tensor, values: Tensor) -> None:
    """Make sure that `tokens` more slots follow the tail, for tensors like `keys` and `values`."""
    if layer.rotated is None:
        slots = layer.policy.slots(layer.geometry)
        bound = layer.policy.mid_bound(layer.geometry) or 0
        room = bound + tokens if slots is None else slots
        layer.rotated = lasting((*keys.shape[:2], room, keys.shape[3]), like=keys)
        layer.unrotated = lasting(layer.rotated.shape, like=keys) if layer.rotates else None
        layer.values = lasting((*values.shape[:2], room, values.shape[3]), like=values)
        layer.tail = bound
    elif layer.tail + tokens > layer.rotated.shape[2]:
        _relocate(layer, _reserved(layer), tokens)


def make_room(layer: "Layer", before: int) -> None:
    """Make sure that `before` slots precede recent."""
    if layer.head < before:
        _relocate(layer, max(before, _reserved(layer)), 0)


def move_sink(layer: "Layer", slot: int) -> None:
    """Move the sink to `slot`."""
    if slot != layer.sink_slot and layer.sink_tokens:
        for buffer in layer._all_buffers():
            moved = buffer[:, :, layer.sink_slot : layer.sink_slot + layer.sink_tokens].clone()
            buffer[:, :, slot : slot + layer.sink_tokens] = moved
    layer.sink_slot = slot


def _reserved(layer: "Layer") -> int:
    """Slots before recent: what sink and mid may come to need, or need now if there is no limit."""
    bound = layer.policy.mid_bound(layer.geometry)
    if bound is None or layer.policy.in_place:
        return layer.sink_tokens + layer.mid_tokens
    return layer.policy.anchors(layer.geometry) * layer.geometry.tokens_per_step + bound


def _relocate(layer: "Layer", head: int, extra: int) -> None:
    """Move everything so that recent starts at slot `head`, with `extra` slots behind the tail; grow if need be."""
    size, old_head = layer.tail - layer.head, layer.head
    needed = head + size + extra
    sink, mid = layer.sink_tokens, 0 if layer.stale else layer.mid_tokens
    for name in ("rotated", "unrotated", "values"):
        buffer: Tensor | None = getattr(layer, name)
        if buffer is None:
            continue
        anchors = buffer[:, :, layer.sink_slot : layer.sink_slot + sink]
        rest = buffer[:, :, old_head - mid : layer.tail]
        if needed > buffer.shape[2]:
            room = max(needed, 2 * buffer.shape[2]) if layer.policy.slots(layer.geometry) is None else needed
            target = lasting((*buffer.shape[:2], room, buffer.shape[3]), like=buffer)
        else:
            anchors, rest, target = anchors.clone(), rest.clone(), buffer
        target[:, :, head - mid : head + size] = rest
        target[:, :, head - mid - sink : head - mid] = anchors
        setattr(layer, name, target)
    layer.tail = head + size
    layer.sink_slot = head - mid - sink
