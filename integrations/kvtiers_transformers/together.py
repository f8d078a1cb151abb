"""Rows of different length in one buffer with one tail, so that one attention call serves a token of each.

Rows age and select by themselves, which is rare; a decoded token is written and attended for all rows at once. Contexts
of different length end at the same slot, and a mask hides from each row what lies before its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvtiers import Chunk, Context, Layer, LayerRows, PaddingPattern, SelectionError
from kvtiers.growing import grown, lasting
from kvtiers.rows import of_rows
from kvtiers.window import Window


@attrs.frozen(eq=False)
class Joined:
    """Windows of several layers, one for each group of rows, whose planes are parts of the same tensors."""

    planes: Mapping[str, Tensor]
    """[all rows, heads, slots, width]: one group after the other."""
    parts: Sequence[Mapping[str, Tensor]]
    """The planes of each window."""

    @staticmethod
    def of(windows: Sequence[Window], rows: Sequence[int]) -> "Joined":
        """Move `windows` of `rows` rows each into one buffer, so that they end at the same slot."""
        tail = max(window.room_before + window.recent for window in windows)
        slots = max(window.capacity or window.slots for window in windows)
        if slots <= tail:  # grow only when it is full: rows may be selected at every token
            slots = tail + 1 if windows[0].capacity else max(tail + 1, grown(slots))
        planes, parts = {}, [dict[str, Tensor]() for _ in windows]
        for name, like in windows[0].planes.items():
            planes[name] = lasting((sum(rows), like.shape[1], slots, like.shape[3]), like=like).zero_()
            for part, own in zip(parts, planes[name].split(list(rows)), strict=True):
                part[name] = own
        for window, part in zip(windows, parts, strict=True):
            window.move(part, tail)
        return Joined(planes, parts)

    def holds(self, windows: Sequence[Window], room: int) -> bool:
        """Whether `windows` still lie here, end at the same slot, and have `room` slots behind it."""
        same = all(window.planes is part for window, part in zip(windows, self.parts, strict=True))
        return same and len({window.tail for window in windows}) == 1 and windows[0].tail + room <= windows[0].slots


@attrs.frozen(eq=False)
class SharedBuffer:
    """One buffer for the windows of all row groups. order: row i of it is row `order[i]` of the batch (None: row i)."""

    rotated: Joined
    unrotated: Joined | None
    order: Int[Tensor, " batch"] | None

    @staticmethod
    def of(layers: Sequence[Layer], rows: Sequence[Sequence[int]]) -> "SharedBuffer":
        """Move what `layers` hold, which serve `rows` of the batch, into one buffer."""
        counts, flat = [len(one) for one in rows], [row for one in rows for row in one]
        device = layers[0].window.device
        second = [layer.placed.unrotated for layer in layers if layer.placed.unrotated is not None]
        return SharedBuffer(
            rotated=Joined.of([layer.window for layer in layers], counts),
            unrotated=Joined.of(second, counts) if second else None,
            order=None if flat == sorted(flat) else torch.tensor(flat, device=device),
        )

    def holds(self, layers: Sequence[Layer], room: int = 1) -> bool:
        """Whether everything still lies here, and there is `room` for a token of each row."""
        second = [layer.placed.unrotated for layer in layers if layer.placed.unrotated is not None]
        return self.rotated.holds([layer.window for layer in layers], room) and (
            self.unrotated is None or self.unrotated.holds(second, room)
        )

    def write(self, layers: Sequence[Layer], keys: Tensor, values: Tensor) -> None:
        """Take a token of each row, [all rows, kv_heads, 1, width], in the order of this buffer."""
        slot, few = layers[0].window.tail, slice(layers[0].geometry.batch)
        layers[0].admit(keys[few], values[few])
        placed = turned(layers, keys, [layer.num_steps for layer in layers])
        for name, new in (("rotated", placed), ("values", values)):
            self.rotated.planes[name][:, :, slot : slot + 1] = new
        if self.unrotated is not None and layers[0].placed.unrotated is not None:
            slot = layers[0].placed.unrotated.tail
            self.unrotated.planes["unrotated"][:, :, slot : slot + 1] = keys
        for layer, own_keys, own_values in zip(layers, _parted(layers, keys), _parted(layers, values), strict=True):
            if layer.plain:
                layer.advance()
            else:
                layer.write(own_keys, own_values)

    def select(self, layers: Sequence[Layer], query: Tensor) -> None:
        """Let those rows choose blocks whose time it is; layers that watch their queries are shown them."""
        for layer, own in zip(layers, _parted(layers, query), strict=True):
            if layer.selects or layer.watched.looks:
                layer.select(own)

    def context(self, layers: Sequence[Layer]) -> Context:
        """What all rows attend: as much as the longest, of which a mask hides what the others do not hold."""
        begins = [layer.window.begin for layer in layers for _ in range(layer.geometry.batch)]
        first, tail, planes = min(begins), layers[0].window.tail, self.rotated.planes
        device = planes["rotated"].device
        mask = None if len(set(begins)) == 1 else _held(tuple(begin - first for begin in begins), tail - first, device)
        return Context(
            keys=planes["rotated"][:, :, first:tail],
            values=planes["values"][:, :, first:tail],
            current=1,
            mask=mask,
            causal=False,
            locate=_nowhere,
        )


buffers: WeakKeyDictionary[Layer, SharedBuffer] = WeakKeyDictionary()
"""The buffer that the groups of some rows share, by the layer of the first, with which it is freed."""


def chunks(
    rows: LayerRows, query: Tensor, keys: Tensor, values: Tensor, padding: PaddingPattern | None
) -> Iterator[Chunk]:
    """As `LayerRows.chunks`; but a token of each row, [batch, heads, 1, width], is attended in one call where that can
    be, with a mask for each row.

    Where a row just chose tokens that have a bias, groups attend one by one: the shared buffer holds no biases.
    """
    layers = rows.layers()
    alone = padding is not None or keys.shape[2] != 1 or len(layers) < 2 or torch.is_grad_enabled()
    if not alone:
        rows.check_batch(keys.shape[0])
    if alone or not all(map(can_share, layers)):
        yield from rows.chunks(query, keys, values, padding)
        return
    shared = buffers.get(layers[0])
    if shared is None or not shared.holds(layers):
        shared = _joined(rows)
    query, keys, values = (of_rows(x, shared.order) for x in (query, keys, values))
    shared.write(layers, keys, values)
    shared.select(layers, query)
    if not all(map(can_share, layers)):
        for group, own in zip(rows.groups, _parted(layers, query), strict=True):
            placed, context = group.layer.place_query(own), group.layer.context()
            yield Chunk(rows=group.rows, columns=slice(0, 1), query=placed, context=context)
        return
    if not shared.holds(layers, room=0):  # mid outgrew the buffer
        shared = _joined(rows)
    placed = turned(layers, query, [layer.committed_steps for layer in layers])
    yield Chunk(rows=shared.order, columns=slice(0, 1), query=placed, context=shared.context(layers))


def _joined(rows: LayerRows) -> SharedBuffer:
    """All groups, moved into one buffer."""
    layers = rows.layers()
    buffers[layers[0]] = made = SharedBuffer.of(layers, [group.numbers() for group in rows.groups])
    return made


def _parted(layers: Sequence[Layer], x: Tensor) -> Sequence[Tensor]:
    """The rows of each layer."""
    parts: Sequence[Tensor] = x.split([layer.geometry.batch for layer in layers])
    return parts


def can_share(layer: Layer) -> bool:
    """Whether all that attention reads of `layer` is keys and values."""
    if any(window.planes.keys() != {"unrotated"} for window in layer.placed.windows()[1:]):
        return False
    return layer.window.planes.keys() == {"rotated", "values"}


def turned(layers: Sequence[Layer], x: Tensor, steps: Sequence[int]) -> Tensor:
    """A token of each row of `layers`, rotated to where step `steps` of its layer is placed."""
    rotary = layers[0].rotary
    if not layers[0].policy.realigner.rotates or rotary is None:
        return x
    at = tuple(
        step + layer.window.recent_shift
        for layer, step in zip(layers, steps, strict=True)
        for _ in range(layer.geometry.batch)
    )
    return rotary.apply(x, rotary.at(at, x.device, x.dtype))


@lru_cache(maxsize=4)
def _held(begins: tuple[int, ...], tokens: int, device: Any) -> Bool[Tensor, "rows 1 1 tokens"]:
    """Which tokens each row holds; all layers of a forward ask for the same."""
    with torch.inference_mode(False):
        first = torch.tensor(begins, device=device)[:, None, None, None]
        return torch.arange(tokens, device=device) >= first


def _nowhere() -> tuple[Tensor, Tensor]:
    raise SelectionError("rows of different length lie at different positions; read contexts(layer), a context a group")
