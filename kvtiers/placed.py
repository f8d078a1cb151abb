"""What attention reads of a layer: its window, in which every key is rotated once to its place, and the unrotated keys
of what may be placed again.

It knows tokens, tiers and positions, and neither blocks nor archives.
"""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from kvtiers.errors import RotaryError, SelectionError
from kvtiers.geometry import Geometry, spread
from kvtiers.mid import Fetched, MidTokens
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary
from kvtiers.slots import Placement
from kvtiers.state import State, number, part
from kvtiers.window import Window


@attrs.define(eq=False, slots=False, kw_only=True)
class Placed(State):
    """A window and its positions. rotates: whether a realigner places keys; else they stay as the model rotated them.

    anew: whether the sink, too, is rotated anew from unrotated keys when its place changes. layer: for messages.
    """

    geometry: Geometry
    rotary: Rotary | None
    rotates: bool
    anew: bool
    layer: int
    window: Window = part()
    unrotated: Window | None = part()
    """Unrotated keys of recent and current (and of the sink, if it is rotated anew)."""
    mid: MidTokens | None = part(lambda _: MidTokens())
    """Where the mid tokens of the window come from and lie; None if there are none, or history stays in place."""
    waiting: bool = number(False)
    """Whether the current keys wait, unrotated, for the selection."""
    needed: int | None = number(None)
    """How many recent tokens keep their unrotated keys when current tokens are written. None: all of them."""

    @staticmethod
    def of(policy: Policy, geometry: Geometry, rotary: Rotary | None, layer: int) -> "Placed":
        """Empty windows for `policy`."""
        realigner, unrotated = policy.realigner, None
        anew = realigner.sink_moves == "anew"
        if realigner.rotates and not policy.in_place:
            kept = policy.anchors(geometry) * geometry.tokens_per_step if anew else 0
            slots = policy.unrotated_slots(geometry)
            unrotated = Window(capacity=slots + kept if slots else None, front=kept)
        window = Window(capacity=policy.slots(geometry), front=policy.slots_before(geometry))
        return Placed(
            geometry=geometry,
            rotary=rotary,
            rotates=realigner.rotates,
            anew=anew,
            layer=layer,
            window=window,
            unrotated=unrotated,
        )

    def windows(self) -> Sequence[Window]:
        """The window, and that of unrotated keys if there is one."""
        return [self.window] if self.unrotated is None else [self.window, self.unrotated]

    def follow(self, policy: Policy) -> None:
        """Go on under `policy`, which stores keys in the same way."""
        self.window.capacity, self.window.front = policy.slots(self.geometry), policy.slots_before(self.geometry)
        self.anew = policy.realigner.sink_moves == "anew"

    # ------------------------------------------------------------------ rotate

    def turned(self, x: Tensor, first: int, *, most: int | None = None) -> Tensor:
        """Consecutive tokens, or at `most` so many of them, evenly spaced, rotated to the positions from step `first`
        if a realigner rotates."""
        geometry, tokens = self.geometry, x.shape[-2]
        if most is not None and most < tokens:
            x = x.index_select(2, spread(most, tokens, x.device))
        if not self.rotates:
            return x
        if self.rotary is None:
            raise RotaryError(f"layer {self.layer} has no rotary embedding")
        steps = -(-tokens // geometry.tokens_per_step)
        cos, sin = self.rotary.run(first, steps, geometry.grid, x.device, x.dtype, most=most)
        if tokens < steps * geometry.tokens_per_step:  # the last tokens of a step
            cos, sin = cos[-tokens:], sin[-tokens:]
        return self.rotary.apply(x, (cos, sin))

    def near(self, x: Tensor, first: int) -> Tensor:
        """As `turned`, to where recent and current tokens from step `first` on are placed."""
        return self.turned(x, first + self.window.recent_shift)

    # ------------------------------------------------------------------ tokens come and go

    def take(self, keys: Tensor, values: Tensor, first: int, *, sink: int, wait: bool, noted: Tensor | None) -> None:
        """Write tokens from step `first` on behind recent, of which the first `sink` are anchors.

        wait: leave keys unrotated until `place`. noted: what the plane of attention begins with, if there is to be one.
        """
        plain = keys.detach()
        self.waiting = wait and self.unrotated is not None
        parts = {"rotated": plain if self.waiting else self.near(plain, first), "values": values.detach()}
        if noted is not None:
            parts["attention"] = noted
        if not self.waiting:
            self._keep(plain, sink)
        self.window.append(parts, sink=sink)

    def advance(self) -> None:
        """Take in one token that lies behind the tails already."""
        for window in self.windows():
            window.advance(1, recent=1)
        self.waiting = False

    def retract(self, tokens: int, current: int) -> None:
        """Give up the newest `tokens` tokens; `current` are current."""
        self.window.retract(tokens)
        if self.unrotated is not None:
            kept = tokens - (current if self.waiting else 0)
            self.unrotated.retract(min(max(kept, 0), self.unrotated.recent + self.unrotated.sink))
        self.waiting = self.waiting and tokens < current

    def anchor(self, tokens: int) -> None:
        """Make the oldest `tokens` recent tokens part of the sink."""
        self.window.anchor(tokens)
        if self.unrotated is not None and self.anew:
            self.unrotated.anchor(tokens)

    def leave(self, tokens: int, *, stay: bool = False) -> None:
        """The oldest `tokens` recent tokens leave; they become mid where they are if they `stay`."""
        self.window.leave(tokens, stay=stay)
        self.mid = None

    def forget(self) -> None:
        """Give up the unrotated keys of what is no longer recent."""
        if self.unrotated is not None:
            self.unrotated.leave(max(0, self.unrotated.recent - self.window.recent))

    def oldest(self, tokens: int, first: int, *, unrotated: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, the same rotated to their original positions from step `first` on, and values of the oldest recent
        tokens. Keys are unrotated if they are wanted `unrotated` and held."""
        where, plain = slice(self.window.head, self.window.head + tokens), self.unrotated
        keys, values = self.window.view("rotated", where), self.window.view("values", where)
        if plain is None or not unrotated:
            return keys, keys, values
        keys = plain.view("unrotated", slice(plain.head, plain.head + tokens))
        return keys, self.turned(keys, first), values

    def _keep(self, keys: Tensor, sink: int) -> None:
        """Append the unrotated keys of new tokens, of which the first `sink` are anchors.

        Recent first gives up the keys beyond `needed`. Anchors are kept only if they are rotated anew.
        """
        window = self.unrotated
        if window is None:
            return
        if self.needed is not None:
            window.leave(max(0, window.recent - self.needed))
        kept = sink if self.anew else 0
        if kept or sink < keys.shape[2]:
            window.append({"unrotated": keys[:, :, sink - kept :]}, sink=kept)

    # ------------------------------------------------------------------ place

    def place(self, mid: Fetched | None, placement: Placement | None, *, recent: int, now: int, current: int) -> None:
        """Write the sink and mid right before recent, and rotate every key to its place (None: leave keys as they are).

        recent, now: the steps at which recent and current tokens begin; `current` is how many of those there are.
        """
        window, where, parts = self.window, None, None
        if mid is not None:
            where = mid.where if placement is None else attrs.evolve(mid.where, placed=placement.mid_starts)
            keys = mid.keys if placement is None else self._placed_mid(mid, where, placement)
            parts = {"rotated": keys, "values": mid.values}
            if mid.bias is not None:
                if "bias" not in window.planes:
                    window.add_plane("bias", window.planes["rotated"])
                parts["bias"] = mid.bias[..., None]
            if mid.attention is not None:
                parts["attention"] = mid.attention[..., None]
        window.insert(parts)
        self.mid = where
        if placement is not None:
            if self.unrotated is not None:
                self._shift(self.unrotated, placement, recent, now, current if self.waiting else 0)
            window.sink_shift, window.recent_shift = placement.sink_shift, placement.recent_shift

    def _placed_mid(self, mid: Fetched, where: MidTokens, placement: Placement) -> Tensor:
        """The keys of mid, rotated once to where they are placed."""
        if self.rotary is None:
            return mid.keys
        if mid.whole and placement.mid_from is not None:
            return self.turned(mid.keys, placement.mid_from)
        return self.rotary.rotate(mid.keys, where.at(placement.mid_starts))

    def _shift(self, plain: Window, placement: Placement, recent: int, now: int, late: int) -> None:
        """Rotate sink, recent and the `late` current tokens that wait to their place, where it has changed, from their
        unrotated keys."""
        window, shift = self.window, placement.recent_shift
        sink, stop = slice(window.begin, window.begin + window.sink), window.tail - late
        if placement.sink_shift != window.sink_shift and window.sink:
            if self.anew:
                anchors = plain.view("unrotated", slice(plain.sink_slot, plain.sink_slot + plain.sink))
                window.write("rotated", sink, self.turned(anchors, placement.sink_shift))
            elif self.rotary is not None:  # once, after a swap, or a realigner that rounds every time
                further = placement.sink_shift - window.sink_shift
                window.write("rotated", sink, self.rotary.advance(window.view("rotated", sink), further))
        if shift != window.recent_shift and window.recent > late:
            if plain.recent < window.recent - late:
                raise SelectionError(f"layer {self.layer} cannot move recent in the middle of a block; commit first")
            keys = plain.view("unrotated", slice(plain.tail - (window.recent - late), plain.tail))
            window.write("rotated", slice(window.head, stop), self.turned(keys, recent + shift))
        if late:
            self._rotate_late(late, now + shift)

    def settle(self, current: int, first: int) -> None:
        """Rotate the `current` tokens, which wait from step `first` on, to where recent is."""
        self._rotate_late(current, first + self.window.recent_shift)

    def _rotate_late(self, tokens: int, step: int) -> None:
        """Rotate the newest `tokens` tokens, which are unrotated, to the positions from `step` on."""
        late = slice(self.window.tail - tokens, self.window.tail)
        keys = self.window.view("rotated", late)
        self._keep(keys, 0)
        self.window.write("rotated", late, self.turned(keys, step))
        self.waiting = False

    # ------------------------------------------------------------------ look

    def locate(self, anchors: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Original and placed positions of the tokens of the context: `anchors` steps, mid, steps `first` to `stop`."""
        window, geometry = self.window, self.geometry
        device = window.device
        sink, recent = geometry.positions(0, anchors, device), geometry.positions(first, max(stop, first), device)
        shift = torch.zeros(sink.shape[-1], dtype=sink.dtype, device=device)
        shift[0] = 1
        parts = [(sink, sink + shift * window.sink_shift), (recent, recent + shift * window.recent_shift)]
        if self.mid is not None:
            parts.insert(1, (self.mid.at(self.mid.starts), self.mid.at(self.mid.placed)))
        both = []
        for which in (0, 1):
            wide = [one[which].to(sink.dtype) for one in parts]
            lead = torch.broadcast_shapes(*(p.shape[:-2] for p in wide), (1, 1))
            both.append(torch.cat([p.expand(*lead, *p.shape[-2:]) for p in wide], -2))
        return both[0], both[1]
