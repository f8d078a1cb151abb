"""The buffer that attention reads: `sink | mid | recent | current` side by side in one slice per call.

Recent and current tokens stay where they were written and slide right as blocks leave. Sink and mid are written right
before them, so that history is never concatenated. When the end is reached, everything moves back to the beginning,
into a larger buffer if there is no limit. A window knows slots and tokens, and no policies.
"""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from kvtiers.growing import grown, lasting
from kvtiers.state import State, number, rows

Planes = Mapping[str, Tensor]
"""Per-token tensors by name, each [batch, heads, tokens, width]."""


@attrs.define(eq=False, slots=False, kw_only=True)
class Window(State):
    """Named planes of per-token tensors, [batch, heads, slots, width], that are written in place.

    capacity: slots; None: as many as it takes. front: slots kept free before recent for sink and mid;
    None: as many as they have. A layer has one window that attention reads, and one of unrotated keys if keys may be
    rotated again, whose tokens are recent and current alone.
    """

    capacity: int | None = None
    front: int | None = 0
    planes: dict[str, Tensor] = rows(named=True)
    tail: int = number(0)
    """The slot after the last token."""
    sink: int = number(0)
    """Tokens of the sink, which begin at `sink_slot`."""
    sink_slot: int = number(0)
    mid: int = number(0)
    """Mid tokens, which end where recent begins."""
    recent: int = number(0)
    """Tokens of recent and current, which end at `tail`."""
    sink_shift: int = number(0)
    """Steps by which the sink's keys are placed beyond their origin."""
    recent_shift: int = number(0)
    """Steps by which the keys of recent and current are placed beyond their origin."""
    moves: int = 0
    """How often tokens were written over: `undo` does not bring those back."""

    @property
    def head(self) -> int:
        """The slot of the first recent token."""
        return self.tail - self.recent

    @property
    def begin(self) -> int:
        """The slot at which the context starts."""
        return self.head - self.mid - self.sink

    @property
    def attended(self) -> slice:
        """The slots of the context."""
        return slice(self.begin, self.tail)

    def append(self, parts: Planes, *, sink: int = 0) -> None:
        """Write tokens behind recent; the first `sink` of them are anchors. Planes without a part get zeros."""
        tokens = next(iter(parts.values())).shape[2]
        self._reserve(tokens, parts)
        here = slice(self.tail, self.tail + tokens)
        for name, plane in self.planes.items():
            plane[:, :, here] = parts.get(name, 0)
        if sink and not self.sink:
            self.sink_slot = self.tail
        self.sink += sink
        self.advance(tokens, recent=tokens - sink)

    def advance(self, tokens: int, *, recent: int) -> None:
        """Take in `tokens` tokens that lie behind the tail already, the last `recent` of them as recent."""
        self.tail, self.recent = self.tail + tokens, self.recent + recent

    def retract(self, tokens: int) -> None:
        """Give up the newest `tokens` tokens."""
        recent = min(tokens, self.recent)
        self.tail, self.recent, self.sink = self.tail - tokens, self.recent - recent, self.sink - (tokens - recent)

    def anchor(self, tokens: int) -> None:
        """Make the oldest `tokens` recent tokens part of the sink. There is no mid yet."""
        if not self.sink:
            self.sink_slot = self.head
        self.sink, self.recent = self.sink + tokens, self.recent - tokens

    def leave(self, tokens: int, *, stay: bool = False) -> None:
        """The oldest `tokens` recent tokens leave. They become mid where they are if they `stay`; else mid is empty."""
        self.recent, self.mid = self.recent - tokens, self.mid + tokens if stay else 0

    def rejoin(self, tokens: int) -> None:
        """The newest `tokens` mid tokens, which stayed where they are, are recent again."""
        self.recent, self.mid = self.recent + tokens, self.mid - tokens

    def insert(self, parts: Planes | None) -> None:
        """Put mid tokens (None: no mid) before recent, in place of those that are there, and the sink before them."""
        tokens = 0 if parts is None else next(iter(parts.values())).shape[2]
        if self.head < self.sink + tokens:
            self.mid = 0
            self._relocate(max(self.sink + tokens, self.room_before), 0)
        slot = self.head - tokens - self.sink
        self.moves += 1
        for plane in self.planes.values():
            _move(plane, self.sink_slot, slot, self.sink, plane)
        for name, plane in self.planes.items():
            if parts is not None:
                plane[:, :, self.head - tokens : self.head] = parts.get(name, 0)
        self.sink_slot, self.mid = slot, tokens

    def add_plane(self, name: str, like: Tensor) -> None:
        """A plane of zeros, float32, with the heads of `like` and one number a token."""
        made = lasting((*like.shape[:2], self.slots, 1), like=like, dtype=torch.float32).zero_()
        self.planes = {**self.planes, name: made}

    def view(self, name: str, where: slice) -> Tensor:
        """Some slots of a plane, to be read; `write` changes them."""
        return self.planes[name].narrow(2, where.start, where.stop - where.start)

    def write(self, name: str, where: slice, x: Tensor) -> None:
        """Write over tokens that are here."""
        self.moves += 1
        self.planes[name][:, :, where] = x

    @property
    def device(self) -> torch.device:
        """Where the planes are, once there are any."""
        return next(iter(self.planes.values())).device

    @property
    def slots(self) -> int:
        return next(iter(self.planes.values())).shape[2] if self.planes else 0

    def dump(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """As `State.dump`; slots in no use, and mid that is to be chosen anew, are saved as zeros."""
        tensors, about = super().dump()
        used = (slice(self.sink_slot, self.sink_slot + self.sink), slice(self.head - self.mid, self.tail))
        for name, plane in self.planes.items():
            kept = plane.new_zeros(plane.shape)
            for where in used:
                kept[:, :, where] = plane[:, :, where]
            tensors[f"planes.{name}"] = kept
        return tensors, about

    @property
    def room_before(self) -> int:
        """Slots before recent: what sink and mid may come to need, and at least what they have."""
        return max(self.front or 0, self.sink + self.mid)

    def _reserve(self, tokens: int, parts: Planes) -> None:
        """Make sure that `tokens` more slots follow the tail."""
        if not self.planes:
            front = self.front or 0
            room = front + tokens if self.capacity is None else max(self.capacity, front + tokens)
            self.planes = {name: lasting((*x.shape[:2], room, x.shape[3]), like=x) for name, x in parts.items()}
            self.tail = self.sink_slot = front
        elif self.tail + tokens > self.slots:
            self._relocate(self.room_before, tokens)

    def _relocate(self, head: int, extra: int) -> None:
        """Move everything so that recent starts at slot `head`, with `extra` slots behind the tail; grow if need be."""
        needed, made = head + self.recent + extra, self.planes
        if needed > self.slots:
            room = needed if self.capacity is not None else max(needed, grown(self.slots))
            made = {name: lasting((*x.shape[:2], room, x.shape[3]), like=x) for name, x in self.planes.items()}
        self.move(made, head + self.recent)

    def move(self, planes: dict[str, Tensor], tail: int) -> None:
        """Move everything into `planes` (they may be the own ones), so that it ends at slot `tail`.

        Sometimes the sink lies apart from mid and recent until the next `insert` joins them. Then it keeps its slots if
        it can.
        """
        old, head, own = self.head, tail - self.recent, planes is self.planes
        start = head - self.mid - self.sink
        slot = start if self.sink_slot == self.begin else min(start, self.sink_slot)
        stays = own and slot == self.sink_slot
        self.moves += own
        for name, plane in self.planes.items():
            anchors = plane[:, :, self.sink_slot : self.sink_slot + self.sink]
            anchors = anchors.clone() if own and not stays else anchors  # recent may be written over them
            _move(plane, old - self.mid, head - self.mid, self.mid + self.recent, planes[name])
            if not stays:
                planes[name][:, :, slot : slot + self.sink] = anchors
        self.__dict__.update(planes=planes, tail=tail, sink_slot=slot)  # at once, whatever interrupts


def _move(plane: Tensor, old: int, new: int, tokens: int, target: Tensor) -> None:
    """Copy `tokens` tokens from slot `old` of a plane to slot `new` of `target`, which may be the same plane."""
    if not tokens or (target is plane and old == new):
        return
    source = plane[:, :, old : old + tokens]
    overlaps = target is plane and abs(old - new) < tokens
    target[:, :, new : new + tokens] = source.clone() if overlaps else source
