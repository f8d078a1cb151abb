"""One layer's memory, for rows that advance together: a timeline (numbers), a window (what attention reads) and a
history (the archive and its index), put together in three verbs.

`write` takes tokens, `select` chooses what they attend, `context` is what attention sees; `commit` makes current tokens
history. `context` is pure. A verb that fails leaves the layer as it was, or the layer refuses to go on.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers import ageing, events
from kvtiers.archive import ByteBudget
from kvtiers.blocks import Blocks, Extent, Form, run_of
from kvtiers.checks import admit, check_finite, check_layer
from kvtiers.errors import SavedCacheError, SlotError
from kvtiers.filled import check_filled
from kvtiers.history import History
from kvtiers.mid import HeldBlocks, MidTokens
from kvtiers.placing import Placing
from kvtiers.policy import Policy
from kvtiers.state import Saved, State
from kvtiers.watched import Watched
from kvtiers.window import Window


@attrs.define(eq=False, slots=False, kw_only=True)
class Layer(Placing):
    """The tiers of one layer. It owns no tensor itself: window, history and what is watched do.

    Its fields and what only reads them are in `kvtiers.reading`, how a context is put together in `kvtiers.placing`.
    """

    def __attrs_post_init__(self) -> None:
        check_layer(self.policy, self.geometry, self.rotary, self.layer)
        self.budget = self.budget or ByteBudget(self.policy.archive.limit_bytes)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.begin(self.policy)
        for field in attrs.fields(type(self)):
            if field.metadata.get("state") == "number":
                setattr(self, field.name, field.default)
        self.recent_start = self.timeline.sink
        self.mid = self.live = None
        self.broken = False

    def begin(self, policy: Policy) -> None:
        """Empty tiers for `policy`."""
        geometry = self.geometry
        per_step, anchors = geometry.tokens_per_step, policy.anchors(geometry)
        self.policy, self.timeline = policy, policy.timeline(geometry)
        self.window = Window(capacity=policy.slots(geometry), front=self._front(policy))
        self.unrotated = None
        if policy.realigner.rotates and not policy.in_place:
            kept = anchors * per_step if policy.realigner.sink_moves == "anew" else 0
            slots = policy.unrotated_slots(geometry)
            self.unrotated = Window(capacity=slots + kept if slots else None, front=kept)
        self.history = History(
            policy=policy,
            batch=geometry.batch,
            kv_heads=geometry.kv_heads,
            even=geometry.even,
            dtype=geometry.dtype,
            widths=(geometry.head_dim, geometry.value_dim),
            most_tokens=self._most_tokens(policy),
            longest=policy.block_steps(geometry),
            layer=self.layer,
            budget=self.budget or ByteBudget(None),
        )
        self.watched = Watched.of(policy.compressor)

    def _most_tokens(self, policy: Policy) -> dict[Form, int]:
        """Tokens of the longest block in each form that `policy` archives or digests."""
        forms = {*policy.forms, policy.retriever.digests} if policy.archives else set()
        return {form: policy.block_tokens(self.geometry, form) for form in forms}

    def _front(self, policy: Policy) -> int | None:
        """Slots before recent that sink and mid may come to need; None if there is no limit."""
        mid = None if policy.in_place or policy.recent is None else policy.mid_bound(self.geometry)
        return None if mid is None else mid + policy.anchors(self.geometry) * self.geometry.tokens_per_step

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
        planes, per_step = self.window.planes, self.geometry.tokens_per_step
        held = planes["rotated"].device if planes else None
        admit(keys, values, self.policy, self.geometry, layer=self.layer, held=held)
        if self.check:
            check_finite(keys, values, layer=self.layer, step=self.num_steps, per_step=per_step)
        with self.changing():
            if replace:
                self._retract(self.num_steps - self.committed_steps)
            else:
                self._commit()
            self._take(keys, values)
            if self.geometry.causal:
                self.tell(events.Committed, steps=self.num_steps - self.committed_steps, tokens=self.current)

    def select(self, query: Float[Tensor, "batch query_heads tokens head_dim"] | None = None) -> None:
        """Choose which archived blocks are attended, if the policy's refresh says that it is time.

        query: the current tokens' queries, rotated as keys are. May look at digests, and fetch from host or disk.
        """
        retriever = self.policy.retriever
        again = self.pending >= self.policy.refresh_steps and retriever.needs_query and self.history.count > 0
        watches = query is not None and self.watched.looks
        if not (self.stale or again or watches):
            return
        query = None if query is None else query.detach()
        with self.changing():
            if self.stale or again:
                first = 0 if query is None else self.num_steps - query.shape[2] // self.geometry.tokens_per_step
                self.renew(None if query is None else self.turned(query, first))
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
            if self.timeline.cuts is None:
                self.timeline = attrs.evolve(self.timeline, origin=stop)
            self._age(blocks)

    def rewind_recent(self) -> int:
        """Forget recent and current tokens; returns how many steps must be fed again."""
        steps = self.num_steps - max(self.recent_start, min(self.timeline.sink, self.num_steps))
        with self.changing():
            self._retract(steps)
        return steps

    def crop(self, steps: int) -> None:
        """Keep the first `steps` steps alone. The caller has asked `kvtiers.cropping` whether that is exact."""
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
        tokens, steps, plain = keys.shape[2], keys.shape[2] // geometry.tokens_per_step, keys.detach()
        sink = max(0, min(self.timeline.sink - self.num_steps, steps)) * geometry.tokens_per_step
        self.unplaced = self.stale and self.unrotated is not None  # rotated once, after the selection
        placed = plain if self.unplaced else self.turned(plain, self.num_steps + self.window.recent_shift)
        parts = {"rotated": placed, "values": values.detach()}
        if self.watched.counts and not self.window.planes:
            shape = (geometry.batch, geometry.query_heads, tokens, 1)
            parts["attention"] = plain.new_zeros(shape, dtype=torch.float32)
        if not self.unplaced:
            self.keep_unrotated(plain, sink)
        self.window.append(parts, sink=sink)
        wants = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        self.live = (keys, values) if wants else None
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
        per_step = self.geometry.tokens_per_step
        self.window.retract(steps * per_step)
        if self.unrotated is not None:
            kept = steps * per_step - (self.current if self.unplaced else 0)
            self.unrotated.retract(min(max(kept, 0), self.unrotated.recent + self.unrotated.sink))
        self.num_steps -= steps
        self.pending = max(0, self.pending - steps)
        self.unplaced, self.live = False, None
        self.watched.retract()
        if self.num_steps < self.committed_steps:
            self.committed_steps = self.num_steps
            self.history.crop(self.num_steps)
            if self.timeline.cuts is not None:
                cuts = tuple(cut for cut in self.timeline.cuts if cut <= self.num_steps)
                sink = min(self.timeline.sink, self.num_steps)
                self.timeline = attrs.evolve(self.timeline, cuts=cuts, sink=sink)
                self.recent_start = min(self.recent_start, self.num_steps)

    def _commit(self, compressed: Blocks | None = None) -> None:
        if self.committed_steps == self.num_steps:
            return
        geometry, compressor, start = self.geometry, self.policy.compressor, self.committed_steps
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
            self.window.anchor(self.current)
            if self.unrotated is not None and self.policy.realigner.sink_moves == "anew":
                self.unrotated.anchor(self.current)
        steps = self.num_steps - start
        self.timeline, self.committed_steps = timeline, self.num_steps
        self.recent_start = max(self.recent_start, timeline.sink)
        self.drafted, self.live = False, None
        if not geometry.causal:
            self.tell(events.Committed, steps=steps, tokens=steps * geometry.tokens_per_step)
        stop = timeline.recent_start_at(self.num_steps)
        if stop > self.recent_start:
            self._age(timeline.blocks(self.recent_start, stop))
        self._forget_unrotated()

    def receive(self, compressed: Blocks, start: int) -> None:
        """Hold the compressed form of the current block, which begins at step `start`, until it leaves recent."""
        held = attrs.evolve(
            compressed,
            keys=compressed.keys.detach().clone(),  # they may be views of far more
            values=compressed.values.detach().clone(),
            starts=torch.tensor([start], device=compressed.keys.device),
        )
        self.history.waiting = {**self.history.waiting, str(start): HeldBlocks.of(held)}

    def _forget_unrotated(self) -> None:
        """Unrotated keys are held of what is recent (and current), no longer."""
        if self.unrotated is not None:
            self.unrotated.leave(max(0, self.unrotated.recent - self.window.recent))

    # ------------------------------------------------------------------ age

    def _age(self, blocks: Sequence[Extent]) -> None:
        """Move `blocks`, the oldest of recent, out of it."""
        per_step = self.geometry.tokens_per_step
        stop, tokens = blocks[-1].stop, (blocks[-1].stop - blocks[0].start) * per_step
        compressor, device = self.policy.compressor, self.window.planes["rotated"].device
        if self.policy.in_place or compressor.drops:
            if compressor.drops:
                self.dropped += stop - blocks[0].start
                self.tell(events.Compressed, blocks=len(blocks), tokens_before=tokens, tokens_after=0)
            self.window.leave(tokens, stay=self.policy.in_place)
            self.recent_start = stop
            if compressor.drops:
                self.assemble(None)
            return
        (mid_got, got), done, window = self._attention(tokens), 0, self.window
        for _, alike in groupby(blocks, key=lambda block: block.start if compressor.given else block.steps):
            run = list(alike)
            span = run[0].steps
            size = len(run) * span * per_step
            leaving = self._leaving(run, None if got is None else got[:, :, done : done + size])
            if compressor.rewrites:
                ageing.rewrite(self.history, leaving, mid_got, self.moment(device))
                mid_got = None if self.history.rewritten is None else self.history.rewritten.attention
                mid_got = None if mid_got is None else mid_got.flatten(2, 3)
            elif not ageing.archived(self.history, leaving, run[0].start, span, self.moment(device), self.tell):
                self.dropped += len(run) * span
            window.leave(size)
            self._forget_unrotated()
            self.recent_start, self.stale, self.mid, done = run[-1].stop, True, None, done + size
        if compressor.rewrites:
            self.assemble(ageing.rewritten(self.history))

    def _attention(self, tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """What attention mid and the oldest `tokens` recent tokens got, if it is watched."""
        queries, placed = self.watched.latest, None
        if self.watched.kind == "latest" and queries is not None:
            first = self.num_steps - queries.shape[2] // self.geometry.tokens_per_step + self.window.recent_shift
            placed = self.turned(queries, first)
        stop = self.num_steps if self.geometry.causal else None
        return self.watched.of_leaving(self.window, placed, tokens, stop=stop)

    def _leaving(self, run: Sequence[Extent], attention: Tensor | None) -> Blocks:
        """The oldest blocks of recent, all of one length."""
        first, span, count = run[0].start, run[0].steps, len(run)
        tokens = count * span * self.geometry.tokens_per_step
        where = slice(self.window.head, self.window.head + tokens)
        keys, rotated = self.window.view("rotated", where), None
        if self.unrotated is not None and not self.policy.compressor.given:
            keys = self.unrotated.view("unrotated", slice(self.unrotated.head, self.unrotated.head + tokens))
            rotated = self.turned(keys, first)
        return run_of(
            keys,
            self.window.view("values", where),
            count=count,
            positions=self.geometry.positions(first, first + count * span, keys.device),
            first=first,
            span=span,
            rotated=keys if rotated is None else rotated,
            attention=attention,
        )

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
        return other

    def join(self, budget: ByteBudget) -> None:
        """Count what is archived in `budget` from now on."""
        self.budget = budget
        self.history.join(budget)

    def dump(self) -> Saved:
        self.check_whole()
        tensors, about = super().dump()
        line = self.timeline
        cuts = None if line.cuts is None else list(line.cuts)
        return tensors, about | {"timeline": {"sink": line.sink, "origin": line.origin, "cuts": cuts}}

    def fill(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        line = about.get("timeline")
        if not isinstance(line, dict) or set(line) != {"sink", "origin", "cuts"}:
            raise SavedCacheError(f"layer {self.layer} is saved without its timeline")
        super().fill(tensors, {name: value for name, value in about.items() if name != "timeline"})
        self.timeline = self.timeline.restored(**line)
        check_filled(self)

    def empty(self, name: str) -> State:
        return MidTokens() if name == "mid" else getattr(self, name) or super().empty(name)

    def set_policy(self, policy: Policy) -> None:
        """Go on under `policy`; the next write or select chooses anew. The caller has asked `kvtiers.changes`."""
        if self.num_steps == 0:
            self.begin(policy)
            self.clear()
            return
        with self.changing():
            history, old = self.history, self.policy
            if policy.retriever != old.retriever:
                history.digests = history.digest_again(policy, self.moment(self.window.planes["rotated"].device))
            self.policy = history.policy = policy
            history.most_tokens = self._most_tokens(policy)
            self.window.capacity = policy.slots(self.geometry)
            self.window.front = self._front(policy)
            history.keep(policy.forms)
            self.pending = policy.refresh_steps
            if history.count:
                self.stale = True
                if not policy.retriever.needs_query:
                    self.renew(None)
            elif self.dropped:
                self.assemble(None)
