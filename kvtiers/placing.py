"""How a layer's context is put together: mid is chosen and fetched, and every key is rotated once to its place."""

import attrs
import torch
from torch import Tensor

from kvtiers import events
from kvtiers.checks import check_returned
from kvtiers.errors import SelectionError, SlotError
from kvtiers.mid import Fetched, MidTokens
from kvtiers.reading import Reading
from kvtiers.slots import Placement


@attrs.define(eq=False, slots=False, kw_only=True)
class Placing(Reading):
    """A layer that assembles its window."""

    def renew(self, query: Tensor | None) -> None:
        """Choose which archived blocks are attended, by `query` as rotated at its origin, and put them in place."""
        history = self.history
        selection = history.select(query, self.moment(self.window.planes["rotated"].device))
        fetched = None if selection is None else history.fetch(selection)
        if selection is not None and fetched is not None:
            blocks = selection.chosen.shape[-1] + selection.compressed.shape[-1]
            size, location = fetched.keys.nbytes + fetched.values.nbytes, self.policy.archive.location
            self.tell(events.Recalled, blocks=blocks, bytes=size, location=location)
        self.assemble(fetched)
        self.attended = self.window.tail - self.window.begin
        history.selection, self.pending, self.selected_at = selection, 0, self.num_steps
        if selection is not None:
            if self.policy.retriever.needs_query and self.current > self.geometry.tokens_per_step:
                self.together_at = self.num_steps
            self.tell(events.Selected, chosen=selection.both, archived=history.count)

    def assemble(self, mid: Fetched | None) -> None:
        """Write the sink and mid right before recent, and place everything."""
        window, device = self.window, self.window.planes["rotated"].device
        nothing = torch.zeros(1, 1, 0, dtype=torch.long, device=device)
        placement = self.policy.realigner.place(
            sink=min(self.timeline.sink, self.num_steps),
            starts=nothing if mid is None else mid.where.starts,
            spans=nothing if mid is None else mid.spans,
            total=0 if mid is None else mid.total,
            recent=self.recent_start,
            moment=self.moment(device),
        )
        self._check_placement(placement, nothing if mid is None else mid.where.starts)
        where, parts = None, None
        if mid is not None:
            where = attrs.evolve(mid.where, placed=placement.mid_starts)
            parts = {"rotated": self._placed_mid(mid, where, placement), "values": mid.values}
            if mid.bias is not None:
                if "bias" not in window.planes:
                    window.add_plane("bias", window.planes["rotated"])
                parts["bias"] = mid.bias[..., None]
            if mid.attention is not None and self.watched.counts:
                parts["attention"] = mid.attention[..., None]
        window.insert(parts)
        self.mid, self.stale = where, False
        self._shift(placement)

    def _check_placement(self, made: object, starts: Tensor) -> None:
        """Raise `SlotError` unless a realigner placed the blocks that begin at `starts`."""
        who = f"layer {self.layer}: {type(self.policy.realigner).__name__}.place()"
        if not isinstance(made, Placement):
            raise SlotError(f"{who} returned a {type(made).__name__}; due is a Placement")
        for name in ("sink_shift", "recent_shift", "mid_from"):
            value = getattr(made, name)
            if not isinstance(value, int) and not (name == "mid_from" and value is None):
                raise SlotError(f"{who} gave {name} as a {type(value).__name__}; due is a whole number")
        due, shape = "mid_starts [..., chosen], as starts are,", tuple(starts.shape)
        check_returned(f"{who}, mid_starts,", made.mid_starts, due, shape, dtype=None, device=starts.device)

    def _placed_mid(self, mid: Fetched, where: MidTokens, placement: Placement) -> Tensor:
        """The keys of mid, rotated once to where they are placed."""
        if not self.policy.realigner.rotates or self.rotary is None:
            return mid.keys
        if mid.whole and placement.mid_from is not None:
            return self.turned(mid.keys, placement.mid_from)
        return self.rotary.rotate(mid.keys, where.at(placement.mid_starts))

    def _shift(self, placement: Placement) -> None:
        """Rotate sink, recent and current to their place where it has changed, from their unrotated keys."""
        window, plain, rotary = self.window, self.unrotated, self.rotary
        if plain is not None and rotary is not None:
            sink = slice(window.begin, window.begin + window.sink)
            if placement.sink_shift != window.sink_shift and window.sink:
                if self.policy.realigner.sink_moves == "anew":
                    anchors = plain.view("unrotated", slice(plain.sink_slot, plain.sink_slot + plain.sink))
                    window.write("rotated", sink, self.turned(anchors, placement.sink_shift))
                else:  # "never" moves them once, after a swap
                    further = placement.sink_shift - window.sink_shift
                    window.write("rotated", sink, rotary.advance(window.view("rotated", sink), further))
            late = self.current if self.unplaced else 0
            first, stop = self.recent_start + placement.recent_shift, window.tail - late
            if placement.recent_shift != window.recent_shift and window.recent > late:
                if plain.recent < window.recent - late:
                    raise SelectionError(
                        f"layer {self.layer} cannot move recent in the middle of a block; commit first"
                    )
                keys = plain.view("unrotated", slice(plain.tail - (window.recent - late), plain.tail))
                window.write("rotated", slice(window.head, stop), self.turned(keys, first))
            if late:
                keys = window.view("rotated", slice(stop, window.tail)).clone()
                self.keep_unrotated(keys, 0)
                at = self.committed_steps + placement.recent_shift
                window.write("rotated", slice(stop, window.tail), self.turned(keys, at))
                self.unplaced = False
        window.sink_shift, window.recent_shift = placement.sink_shift, placement.recent_shift

    def keep_unrotated(self, keys: Tensor, sink: int) -> None:
        """Keep unrotated what may be rotated again, or archived, once it is not current; the first `sink` are anchors.

        Where blocks leave without their keys, those of blocks that leave at the next commit are not needed.
        """
        window, per_step = self.unrotated, self.geometry.tokens_per_step
        if window is None:
            return
        if self.policy.leaves_without_keys and self.geometry.even and self.policy.recent:
            steps = self.committed_steps + keys.shape[2] // per_step
            first = max(self.recent_start, self.policy.extended(self.timeline, steps).recent_start_at(steps))
            window.leave(max(0, window.recent - max(0, self.committed_steps - first) * per_step))
        kept = sink if self.policy.realigner.sink_moves == "anew" else 0
        if kept or sink < keys.shape[2]:
            window.append({"unrotated": keys[:, :, sink - kept :]}, sink=kept)
