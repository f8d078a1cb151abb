"""One layer's memory, for rows that advance together: a timeline (numbers), a window (what attention reads) and a
history (the archive and its index), put together in three verbs.

`write` takes tokens, `select` chooses what they attend, `context` is what attention sees; `commit` makes current tokens
history. `context` is pure. A verb that fails leaves the layer as it was, or the layer refuses to go on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers import ageing, events
from kvtiers.archive import ByteBudget
from kvtiers.blocks import Blocks, Extent
from kvtiers.checks import admit_query, called, check_finite, check_layer, check_placement
from kvtiers.errors import SlotError
from kvtiers.filled import check_filled
from kvtiers.history import History
from kvtiers.layer_state import LayerState
from kvtiers.mid import Fetched
from kvtiers.placed import Placed
from kvtiers.policy import Policy
from kvtiers.watched import Watched


@attrs.define(eq=False, slots=False, kw_only=True)
class Layer(LayerState):
    """The tiers of one layer, which only the methods here change. It owns no tensor itself: its parts do."""

    def __attrs_post_init__(self) -> None:
        check_layer(self.policy, self.geometry, self.rotary, self.layer)
        self.budget = self.budget or ByteBudget(self.policy.archive.limit_bytes)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        policy, geometry = self.policy, self.geometry
        self.timeline = policy.timeline(geometry)
        self.placed = Placed.of(policy, geometry, self.rotary, self.layer)
        budget = self.budget or ByteBudget(None)
        self.history = History(policy=policy, geometry=geometry, layer=self.layer, budget=budget)
        self.watched = Watched.of(policy, geometry)
        for field in attrs.fields(type(self)):
            if field.metadata.get("state") == "number":
                setattr(self, field.name, field.default)
        self.recent_start, self.live, self.broken = self.timeline.sink, None, False

    # ------------------------------------------------------------------ the verbs

    def write(
        self,
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        *,
        replace: bool = False,
    ) -> None:
        """Take these tokens as the current ones: behind those that were current, which become history, or, with
        `replace`, in their place (video: a denoise step).

        keys: rotated by the model under a realigner that does not rotate, unrotated otherwise.
        """
        self.admit(keys, values)
        if self.check:
            per_step = self.geometry.tokens_per_step
            check_finite(keys, values, layer=self.layer, step=self.num_steps, per_step=per_step)
        with self.changing():
            if replace:
                self._retract(self.num_steps - self.committed_steps)
            else:
                self._commit()
            self._take(keys, values)
            if self.geometry.causal:
                self.tell(events.Committed, steps=self.num_steps - self.committed_steps, tokens=self.current)

    def advance(self) -> None:
        """Take one token that is in the windows already, behind their tails. The layer must be `plain`."""
        with self.changing():
            self._commit()
            self.placed.advance()
            self.live = None
            self._count(1)
            self.tell(events.Committed, steps=1, tokens=1)

    def select(self, query: Float[Tensor, "batch query_heads tokens head_dim"] | None = None) -> None:
        """Choose which archived blocks are attended, if the policy's refresh says that it is time.

        query: the current tokens' queries, rotated as keys are. May look at digests, and fetch from host or disk.
        """
        watches = query is not None and self.watched.looks
        if not (self.selects or watches):
            return
        if query is not None:
            admit_query(query, self.geometry, self.current, layer=self.layer)
            query = query.detach()
        with self.changing():
            if self.selects:
                self.renew(None if query is None else self.looked_at(query))
            if watches and query is not None:
                self.watched.look(query, self.place_query(query), self.window, masked=self.geometry.causal)

    def commit(self, compressed: Blocks | None = None) -> None:
        """Make current tokens history, and age the blocks that thereby leave recent. An error loses nothing.

        compressed: the compressed form of the current block, one block, for a compressor whose form is given.
        """
        with self.changing():
            self._commit(compressed)

    def reselect(self) -> None:
        """Choose anew at the next `select`, as if a block had just been archived."""
        self.stale = self.stale or (self.history.count > 0 and self.policy.retriever.needs_query)

    def compact(self, recent: int) -> None:
        """Age now what is older than the newest `recent` steps, whatever the policy's `recent` is.

        The last block that leaves may be shorter than others (text); a video's blocks leave whole.
        """
        with self.changing():
            self._commit()
            stop = max(self.num_steps - recent, self.recent_start)
            if self.timeline.cuts is not None:
                stop = max([cut for cut in self.timeline.cuts if cut <= stop], default=self.recent_start)
            if stop <= max(self.recent_start, self.timeline.sink):
                return
            blocks = self.timeline.blocks(self.recent_start, stop)
            self.timeline = attrs.evolve(self.timeline, origin=stop)
            self._age(blocks)

    def rewind_recent(self) -> int:
        """Forget recent and current tokens; returns how many steps must be fed again."""
        steps = max(0, self.num_steps - max(self.recent_start, self.timeline.sink))  # 0 while the sink fills
        with self.changing():
            self._retract(steps)
            if self.recent_start > self.timeline.start:  # what is left has left recent
                self.timeline = attrs.evolve(self.timeline, origin=self.recent_start)
        return steps

    def crop(self, steps: int) -> None:
        """Keep the first `steps` steps alone. The caller has asked `kvtiers.changes` whether that is exact."""
        if steps == 0:
            self.clear()
            return
        if steps == self.num_steps:  # nothing goes, nor what is noted of the current tokens
            self.check_whole()
            return
        with self.changing():
            if self.policy.in_place:
                first = min(max(self.timeline.recent_start_at(steps), self.timeline.sink), self.recent_start)
                self.window.rejoin((self.recent_start - first) * self.geometry.tokens_per_step)
                self.recent_start = first
            drafted = self.drafted
            self._retract(self.num_steps - steps)
            self.drafted = drafted and self.num_steps > self.committed_steps

    # ------------------------------------------------------------------ write and commit

    def _take(self, keys: Tensor, values: Tensor) -> None:
        """Write current tokens behind recent. The first ones after a commit are due for a selection."""
        geometry = self.geometry
        tokens, steps, noted = keys.shape[2], keys.shape[2] // geometry.tokens_per_step, None
        sink = max(0, min(self.timeline.sink - self.num_steps, steps)) * geometry.tokens_per_step
        if self.watched.counts and not self.window.planes:
            noted = keys.new_zeros((geometry.batch, geometry.query_heads, tokens, 1), dtype=torch.float32)
        if self.policy.leaves_without_keys and geometry.even and self.policy.recent:
            coming = self.committed_steps + steps  # keys of the blocks that leave at the next commit are not needed
            stays = max(self.recent_start, self.timeline.recent_start_at(coming))
            self.placed.needed = max(0, self.committed_steps - stays) * geometry.tokens_per_step
        self.placed.take(keys, values, self.num_steps, sink=sink, wait=self.stale, noted=noted)
        wants = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        self.live = (keys, values) if wants else None
        self._count(steps)

    def _count(self, steps: int) -> None:
        """Note that `steps` more steps are in the window, and choose anew if that takes no query."""
        geometry = self.geometry
        self.num_steps += steps
        if geometry.causal:
            self.pending = self.pending + 1 if steps == 1 else self.policy.refresh_steps
        elif not self.drafted or self.policy.refresh == "chunk":
            self.pending = self.policy.refresh_steps
        self.drafted = True
        if self.stale and not self.policy.retriever.needs_query:
            self.renew(None)
        self.attended = self.window.tail - self.window.begin

    def _retract(self, steps: int) -> None:
        """Give up the newest `steps` steps."""
        self.placed.retract(steps * self.geometry.tokens_per_step, self.current)
        self.num_steps -= steps
        self.pending, self.live = max(0, self.pending - steps), None
        self.watched.retract()
        if self.num_steps < self.committed_steps:
            self.committed_steps = self.num_steps
            self.history.crop(self.num_steps)
            self.timeline = self.timeline.cropped(self.num_steps)
            if self.timeline.cuts is not None:
                self.recent_start = min(self.recent_start, self.num_steps)

    def _commit(self, compressed: Blocks | None = None) -> None:
        if self.committed_steps == self.num_steps:
            return
        geometry, compressor, start = self.geometry, self.policy.compressor, self.committed_steps
        if self.placed.waiting:  # for a selection that did not come
            self.placed.settle(self.current, start)
        timeline = self.timeline if geometry.causal else self.policy.extended(self.timeline, self.num_steps)
        is_anchor = not geometry.causal and timeline.sink > start
        if compressor.given and not is_anchor:
            if compressed is not None:
                self.receive(compressed, start)
            elif str(start) not in self.history.waiting:
                raise SlotError(
                    f"layer {self.layer} got no compressed form for the block at step {start}, which "
                    f"{type(compressor).__name__} archives; commit through an integration that makes it"
                )
        self.watched.commit(self.window)
        if is_anchor:
            self.placed.anchor(self.current)
        steps = self.num_steps - start
        self.timeline, self.committed_steps = timeline, self.num_steps
        self.recent_start = max(self.recent_start, timeline.sink)
        self.drafted, self.live = False, None
        if not geometry.causal:
            self.tell(events.Committed, steps=steps, tokens=steps * geometry.tokens_per_step)
        stop = timeline.recent_start_at(self.num_steps)
        if stop > self.recent_start:
            self._age(timeline.blocks(self.recent_start, stop))
        self.placed.forget()

    def receive(self, compressed: Blocks, start: int) -> None:
        """Hold the compressed form of the current block, which begins at step `start`, until it leaves recent."""
        keys, values = compressed.keys.detach().clone(), compressed.values.detach().clone()  # it may be a view of more
        starts = torch.tensor([start], device=keys.device)
        own = attrs.evolve(compressed, keys=keys, values=values, starts=starts, rotated=None)
        self.history.waiting = {**self.history.waiting, str(start): own}

    # ------------------------------------------------------------------ age

    def _age(self, blocks: Sequence[Extent]) -> None:
        """Move `blocks`, the oldest of recent, out of it."""
        tokens = (blocks[-1].stop - blocks[0].start) * self.geometry.tokens_per_step
        compressor, stop = self.policy.compressor, blocks[-1].stop
        if self.policy.in_place or compressor.drops:
            if compressor.drops:
                self.dropped += stop - blocks[0].start
                self.tell(events.Compressed, blocks=len(blocks), tokens_before=tokens, tokens_after=0)
            self.placed.leave(tokens, stay=self.policy.in_place)
            self.recent_start = stop
            if compressor.drops:
                self.assemble(None)
            return
        got = self.attention_of_leaving(tokens)
        self.dropped += ageing.age(self.placed, self.history, blocks, got, self.moment(), self.tell)
        self.recent_start, self.stale = stop, True
        if compressor.rewrites:
            self.assemble(ageing.rewritten(self.history))

    # ------------------------------------------------------------------ choose and place

    def renew(self, query: Tensor | None) -> None:
        """Choose which archived blocks are attended, by `query` as rotated at its origin, and put them in place."""
        history = self.history
        selection = history.select(query, self.moment())
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
        placement, realigner = None, self.policy.realigner
        if realigner.rotates:
            nothing = torch.zeros(1, 1, 0, dtype=torch.long, device=self.window.device)
            starts = nothing if mid is None else mid.where.starts
            placement = realigner.place(
                sink=min(self.timeline.sink, self.num_steps),
                starts=starts,
                spans=nothing if mid is None else mid.spans,
                total=0 if mid is None else mid.total,
                recent=self.recent_start,
                moment=self.moment(),
            )
            check_placement(called(self.layer, realigner, "place"), placement, starts)
        self.placed.place(mid, placement, recent=self.recent_start, now=self.committed_steps, current=self.current)
        self.stale = False

    # ------------------------------------------------------------------ as a whole

    def fork(self) -> "Layer":
        self.check_whole()
        other = super().fork()
        other.live = None
        return other

    def select_rows(self, at: Int[Tensor, " rows"]) -> "Layer":
        self.check_whole()
        other = super().select_rows(at)
        other.geometry, other.live = attrs.evolve(self.geometry, batch=at.numel()), None
        other.placed.geometry = other.geometry
        return other

    def join(self, budget: ByteBudget) -> None:
        """Count what is archived in `budget` from now on."""
        self.budget = budget
        self.history.join(budget)

    def fill(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        super().fill(tensors, about)
        check_filled(self)

    def set_policy(self, policy: Policy) -> None:
        """Go on under `policy`; the next write or select chooses anew. The caller has asked `kvtiers.changes`."""
        if self.num_steps == 0:
            self.policy = policy
            self.clear()
            return
        with self.changing():
            history, old = self.history, self.policy
            if policy.retriever != old.retriever:
                history.digests = history.digest_again(policy, self.moment())
            self.policy = history.policy = policy
            self.placed.follow(policy)
            history.keep(policy.forms)
            self.pending = policy.refresh_steps
            if history.count:
                self.stale = True
                if not policy.retriever.needs_query:
                    self.renew(None)
            elif self.dropped or history.rewritten is not None:
                self.assemble(ageing.rewritten(history))
