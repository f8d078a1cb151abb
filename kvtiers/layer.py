"""One layer's history for rows that advance together: a context buffer written in place, and an archive.

The buffer is laid out `sink | mid | recent | current`. Recent tokens stay where they were written and slide right as
blocks leave; the sink and what is attended of the archive are written right before them, so that attention reads one
slice and history is never concatenated. Rows with other padding have a layer of their own (see `kvtiers.rows`):
extents are then equal within a layer, a context needs no validity mask, and a padded row is the same row alone.
"""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from kvtiers import archiving, events, slots
from kvtiers.archive import BlockStore, Growing
from kvtiers.blocks import Blocks, Context, Form, Selection
from kvtiers.errors import GeometryError, NotFiniteError, RotaryError, SelectionError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.lengths import Lengths
from kvtiers.masks import causal, dropping, padding
from kvtiers.policy import Placement, Policy, Source, SourceCompressor, choose
from kvtiers.recall import MidTokens, Recalled, recall
from kvtiers.rotary import Rotary

Observe = Callable[[events.Event], None]


class Layer:
    """The tiers of one layer. `write`, `select` and `context` are the three verbs."""

    def __init__(
        self,
        policy: Policy,
        geometry: Geometry,
        *,
        layer: int = 0,
        rotary: Rotary | None = None,
        observe: Observe | None = None,
        check: bool = False,
        keep_graph: bool = False,
    ) -> None:
        if policy.realigner.rotates and rotary is None:
            raise RotaryError(
                f"realigner {type(policy.realigner).__name__} rotates keys to their placed positions, but layer "
                f"{layer} has no rotary embedding; use realigner='original'"
            )
        if geometry.causal and isinstance(policy.compressor, SourceCompressor):
            raise SlotError(
                f"compressor {type(policy.compressor).__name__} reduces the frames of a video before the model sees "
                "them, and text has none; choose a compressor of keys and values, such as 'mean-pool'"
            )
        if keep_graph and not (isinstance(policy.compressor, SourceCompressor) and policy.attend == "compressed"):
            raise SlotError(
                f"keep_graph lets gradients reach a compressor that the model's own layers follow, with "
                f"attend='compressed'; this policy has {type(policy.compressor).__name__} and {policy.attend!r}"
            )
        if not geometry.causal and geometry.even and 0 < (policy.recent or 0) < geometry.steps_per_commit:
            raise GeometryError(
                f"recent = {policy.recent} steps cannot hold one of the blocks of {geometry.steps_per_commit}; give a "
                "recent of at least a block, or 0"
            )
        policy.check_budget(geometry)
        self.policy, self.geometry, self.layer = policy, geometry, layer
        self.rotary, self.observe, self.check, self.keep_graph = rotary, observe, check, keep_graph
        self.rotates = policy.realigner.rotates
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.timeline = self.policy.timeline(self.geometry)
        self.num_steps = 0
        """Steps written."""
        self.committed_steps = 0
        """Steps that are history; the rest are current."""
        self.recent_start = self.timeline.sink
        """The step up to which blocks have left recent."""
        self.dropped = 0
        """Steps that a policy dropped."""
        self.rotated: Tensor | None = None
        self.unrotated: Tensor | None = None
        self.values: Tensor | None = None
        self.tail = 0
        self.mid_tokens = 0
        self.sink_slot = 0
        self.sink_shift = self.recent_shift = 0
        self.reduced: dict[int, Blocks] = {}
        """The reduced K/V of blocks that have not left recent yet, by their first step (video)."""
        self.graph: list[Blocks] = []
        """What was archived, with its graph, if that is kept (training)."""
        self.stores: dict[Form, BlockStore] = {}
        self.lengths: dict[Form, Lengths] = {}
        """How long the archived blocks are, where they may differ (video)."""
        self.digests, self.starts = Growing(2), Growing(0)
        self.state: Any = None
        self.source: Source | None = None
        """What a compressor that prepares is to look at once the current block is committed (video)."""
        self.selection: Selection | None = None
        self.mid: MidTokens | None = None
        self.padding: Tensor | None = None
        """The mask over what stands behind shorter mid blocks, made once per selection."""
        self.stale = False
        self.pending = 0
        self.drafted = False
        """Whether the current block has been written before (video)."""
        self.selected_at = 0
        self.together_at = 0
        """The step up to which several current tokens last chose blocks with one query."""
        self._live: tuple[Tensor, Tensor] | None = None

    # ------------------------------------------------------------------ where things are

    @property
    def archived(self) -> int:
        """How many blocks the archive holds."""
        return next((store.count for store in self.stores.values()), 0)

    @property
    def sink_tokens(self) -> int:
        return min(self.timeline.sink, self.num_steps) * self.geometry.tokens_per_step

    @property
    def head(self) -> int:
        """The slot of the first recent token."""
        return self.tail - max(0, self.num_steps - self.recent_start) * self.geometry.tokens_per_step

    @property
    def begin(self) -> int:
        """The slot at which the context starts."""
        return self.head - self.mid_tokens - self.sink_tokens

    @property
    def current(self) -> int:
        """How many current tokens there are."""
        return (self.num_steps - self.committed_steps) * self.geometry.tokens_per_step

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Placed keys, keys as stored (the same tensor unless a realigner rotates), values."""
        if self.rotated is None or self.values is None:
            raise SelectionError(f"layer {self.layer} holds nothing yet; write keys and values first")
        return self.rotated, self.unrotated if self.unrotated is not None else self.rotated, self.values

    def _all_buffers(self) -> list[Tensor]:
        return [buffer for buffer in (self.rotated, self.unrotated, self.values) if buffer is not None]

    def _turn(self, keys: Tensor, first: int) -> Tensor:
        """Rotate consecutive tokens to the positions from step `first`."""
        if self.rotary is None:
            raise RotaryError(f"layer {self.layer} has no rotary embedding")
        steps = keys.shape[-2] // self.geometry.tokens_per_step
        return self.rotary.apply(keys, self.rotary.run(first, steps, self.geometry.grid, keys.device, keys.dtype))

    # ------------------------------------------------------------------ write

    def write(
        self,
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        *,
        replace: bool = False,
    ) -> None:
        """Make what was current history, age the blocks that left recent, and take these tokens as the current ones.

        keys: rotated by the model under `original`, unrotated otherwise. An error leaves the layer as it was.
        replace: take them in place of those that are current (video: a denoise step). History stays.
        """
        self._admit(keys, values)
        if replace:
            self._retract()
        else:
            self.commit()
        self._take(keys, values)
        if self.geometry.causal and not replace:
            self._tell_committed()

    def beside(
        self,
        query: Float[Tensor, "batch query_heads tokens head_dim"],
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        offsets: Float[Tensor, "tokens axes"],
        span: int,
    ) -> tuple[Tensor, Context]:
        """Hold the reduced K/V of the current block, its compressed form once it leaves recent.

        query, keys, values: of the block's reduced tokens, which lie at `offsets` from its start; rotated by the model
        under `original`, unrotated otherwise. Returns their placed queries, and what they attend: history and one
        another.
        """
        one = offsets.detach()[None, None, None]
        kept = (keys, values) if self.keep_graph else (keys.detach(), values.detach())
        self.reduced[self.committed_steps] = Blocks(
            keys=kept[0][:, :, None].clone(),
            values=kept[1][:, :, None].clone(),
            offsets=one,
            starts=torch.tensor([self.committed_steps], device=keys.device),
            span=span,
        )
        past = self.context()
        history = slice(0, past.keys.shape[2] - past.current)
        mask = None if past.mask is None else pad(past.mask[..., history], (0, keys.shape[2]), value=True)
        where = offsets.double().clone()
        where[:, 0] += self.committed_steps + self.recent_shift
        if self.rotates and self.rotary is not None:
            table = self.rotary.table(where, keys.dtype)
            query, keys = self.rotary.apply(query, table), self.rotary.apply(keys, table)

        def locate() -> tuple[Tensor, Tensor]:
            own = offsets.double().clone()
            own[:, 0] += self.committed_steps
            parts = zip(past.locate(), (own, where), strict=True)
            both = [
                torch.cat([old[..., history, :], new.to(old).expand(*old.shape[:-2], -1, -1)], -2) for old, new in parts
            ]
            return both[0], both[1]

        return query, Context(
            keys=torch.cat([past.keys[:, :, history], keys], 2),
            values=torch.cat([past.values[:, :, history], values], 2),
            current=keys.shape[2],
            mask=mask,
            causal=False,
            locate=locate,
        )

    def _retract(self) -> None:
        """Give up the current tokens."""
        self.tail -= self.current
        self.num_steps = self.committed_steps
        self._live = self.source = None

    def _take(self, keys: Tensor, values: Tensor) -> None:
        """Write current tokens behind recent. The first ones after a commit are due for a selection."""
        tokens = keys.shape[2]
        steps = tokens // self.geometry.tokens_per_step
        slots.reserve(self, tokens, keys, values)
        placed, unrotated, stored = self._buffers()
        here = slice(self.tail, self.tail + tokens)
        plain = keys.detach()
        if self.rotates:
            unrotated[:, :, here] = plain
            plain = self._turn(plain, self.num_steps + self.recent_shift)
        placed[:, :, here] = plain
        stored[:, :, here] = values.detach()
        live = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        self._live = (keys, values) if live else None
        if self.num_steps == 0:
            self.sink_slot = self.tail
        self.num_steps += steps
        self.tail += tokens
        if self.geometry.causal:
            self.pending = self.pending + 1 if steps == 1 else self.policy.refresh_steps
        elif not self.drafted or self.policy.refresh == "chunk":
            self.pending = self.policy.refresh_steps
        self.drafted = True
        if self.stale and not self.policy.retriever.needs_query:
            self._renew(None)

    def _tell_committed(self) -> None:
        if self.observe is not None:
            steps, tokens = self.num_steps - self.committed_steps, self.current
            self.observe(events.Committed(layer=self.layer, steps=steps, tokens=tokens))

    def _admit(self, keys: Tensor, values: Tensor) -> None:
        geometry = self.geometry
        want = (geometry.batch, geometry.kv_heads, geometry.head_dim, geometry.value_dim, geometry.dtype)
        got = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        if got[:4] == want[:4] and {keys.dtype, values.dtype} != {geometry.dtype}:
            raise GeometryError(
                f"layer {self.layer} holds {geometry.dtype}, got keys of {keys.dtype} and values of {values.dtype}; "
                "load the model in one dtype, and instead of torch.autocast in the dtype it would cast to"
            )
        if got != want or values.shape[:3] != keys.shape[:3]:
            raise GeometryError(
                f"layer {self.layer} holds (rows, kv_heads, head_dim, value_dim, dtype) = {want}, got keys "
                f"{tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype}; "
                "use one cache per model and batch, or reset() it"
            )
        if keys.shape[2] == 0 or keys.shape[2] % geometry.tokens_per_step:
            raise GeometryError(
                f"layer {self.layer} takes whole steps of {geometry.tokens_per_step} tokens, got {keys.shape[2]} tokens"
            )
        limit = self.policy.chunk_size if geometry.causal else geometry.steps_per_commit
        if limit is not None and keys.shape[2] > limit * geometry.tokens_per_step:
            raise GeometryError(
                f"layer {self.layer} takes at most {limit} steps at once, got {keys.shape[2]} tokens; "
                "commit blocks one by one, or cut the forward on multiples of chunk_size, as LayerRows.chunks does"
            )
        block = geometry.steps_per_commit * geometry.tokens_per_step
        if not geometry.causal and geometry.even and keys.shape[2] != block:
            raise GeometryError(
                f"layer {self.layer} takes blocks of {geometry.steps_per_commit} steps, got {keys.shape[2]} tokens; "
                "make a cache for blocks of different length (even=False)"
            )
        if values.device != keys.device or (self.rotated is not None and self.rotated.device != keys.device):
            held = "nothing yet" if self.rotated is None else str(self.rotated.device)
            raise GeometryError(
                f"layer {self.layer} holds tensors on {held}, got keys on {keys.device} and values on "
                f"{values.device}; keep a layer on one device"
            )
        if self.check and not bool(torch.isfinite(keys).all() & torch.isfinite(values).all()):
            raise NotFiniteError(
                f"layer {self.layer} was given keys or values with NaN or infinity at steps "
                f"{self.num_steps} to {self.num_steps + keys.shape[2] // geometry.tokens_per_step}; this layer "
                "stored nothing of them, the layers before it did: go on from a fork(), or reset() the cache"
            )

    def commit(self) -> None:
        """Make current tokens history and age the blocks that thereby leave recent. An error loses nothing."""
        if self.committed_steps == self.num_steps:
            return
        timeline = self.timeline if self.geometry.causal else self.policy.extended(self.timeline, self.num_steps)
        if timeline.sink > self.committed_steps:
            self.reduced.pop(self.committed_steps, None)  # an anchor stays as it is
        elif isinstance(self.policy.compressor, SourceCompressor) and self.committed_steps not in self.reduced:
            raise SlotError(
                f"layer {self.layer} got no reduced tokens for the block at step {self.committed_steps}, which "
                f"{type(self.policy.compressor).__name__} archives; commit through an integration that projects them"
            )
        if self.source is not None:
            self.state, self.source = self.policy.compressor.prepare(self.source, self.state), None
        now = timeline.recent_start_at(self.num_steps)
        if now > max(self.recent_start, timeline.sink):
            archiving.age(self, timeline.blocks(max(self.recent_start, timeline.sink), now))
        if not self.geometry.causal:
            self._tell_committed()
        self.timeline, self.committed_steps = timeline, self.num_steps
        self.recent_start = max(self.recent_start, timeline.sink)
        self.drafted, self._live = False, None

    # ------------------------------------------------------------------ select

    def select(self, query: Float[Tensor, "batch query_heads tokens head_dim"] | None = None) -> None:
        """Choose which archived blocks are attended, if the policy's refresh says that it is time.

        query: the current tokens' queries, rotated by the model under `original`, unrotated otherwise. May look at
        digests, and recall blocks from host or disk.
        """
        compressor = self.policy.compressor
        due = self.stale or (
            self.archived > 0 and self.policy.retriever.needs_query and self.pending >= self.policy.refresh_steps
        )
        if not due and not compressor.prepares:
            return
        if query is not None:
            query = query.detach()
            if self.rotates:
                query = self._turn(query, self.num_steps - query.shape[2] // self.geometry.tokens_per_step)
            if compressor.prepares:
                _, unrotated, stored = self._buffers()
                now = slice(self.tail - query.shape[2], self.tail)
                source = Source(queries=query, keys=unrotated[:, :, now], values=stored[:, :, now])
                if self.geometry.causal:
                    self.state = compressor.prepare(source, self.state)
                else:
                    self.source = source  # of the latest pass: a draft is nothing to remember
        if due:
            self._renew(query)

    def reselect(self) -> None:
        """Choose anew at the next `select`, as if a block had just been archived."""
        self.stale = self.stale or (self.archived > 0 and self.policy.retriever.needs_query)

    def _renew(self, query: Tensor | None) -> None:
        retriever, archived = self.policy.retriever, self.archived
        if query is None and retriever.needs_query and archived:
            raise SelectionError(
                f"{type(retriever).__name__} chooses by the query, but layer {self.layer} was given none; "
                "pass the current tokens' queries to select()"
            )
        count = retriever.count(self.policy.top_k, archived)
        more = min(self.policy.top_k_compressed, archived - count) if count else 0
        selection = None
        if count:
            scores = retriever.score(query, self.digests.data, archived)
            ranked = choose(scores, count + more)
            best, next_best = ranked[..., :count].sort(-1).values, ranked[..., count:].sort(-1).values
            each = (self.geometry.batch, self.geometry.kv_heads, -1)
            selection = Selection(
                chosen=best.expand(each), compressed=next_best.expand(each), shared=scores.shape[1] == 1 and not more
            )
        self._assemble(selection)
        self.pending, self.selected_at = 0, self.num_steps
        if count and retriever.needs_query and self.current > self.geometry.tokens_per_step:
            self.together_at = self.num_steps
        if self.observe is not None and selection is not None:
            both = torch.cat([selection.chosen, selection.compressed], -1).sort(-1).values
            self.observe(events.Selected(layer=self.layer, chosen=both, archived=archived))

    def _assemble(self, selection: Selection | None) -> None:
        """Write the sink and the selected blocks right before recent, and place everything."""
        mid = None if selection is None else self._recall(selection)
        tokens = 0 if mid is None else mid.keys.shape[2]
        slots.make_room(self, self.sink_tokens + tokens)
        self.mid_tokens = tokens
        slots.move_sink(self, self.begin)
        placed, unrotated, stored = self._buffers()
        nothing = torch.zeros(0, dtype=torch.long, device=placed.device)
        placement = self.policy.realigner.place(
            sink=min(self.timeline.sink, self.num_steps),
            starts=nothing if mid is None else mid.where.starts,
            spans=nothing if mid is None else mid.spans,
            total=0 if mid is None else mid.total,
            recent=self.recent_start,
        )
        self.mid = self.padding = None
        if mid is not None:
            self.mid = attrs.evolve(mid.where, placed=placement.mid_starts)
            where = slice(self.head - tokens, self.head)
            turned = mid.keys
            if self.rotates and self.rotary is not None:
                if mid.whole and placement.mid_from is not None:
                    turned = self._turn(mid.keys, placement.mid_from)
                else:
                    turned = self.rotary.rotate(mid.keys, self.mid.at(placement.mid_starts))
                unrotated[:, :, where] = mid.keys
            placed[:, :, where] = turned
            stored[:, :, where] = mid.values
        self._shift(placement)
        self.selection, self.stale = selection, False

    def _recall(self, selection: Selection) -> Recalled:
        starts = self.starts.data
        if starts is None:
            raise SelectionError(f"layer {self.layer} has no archived blocks to select")
        found = recall(self.stores, selection, self.policy.attend, starts, self.lengths)
        if self.observe is not None:
            size = found.keys.nbytes + found.values.nbytes
            blocks = selection.chosen.numel() + selection.compressed.numel()
            location = self.policy.archive.location
            self.observe(events.Recalled(layer=self.layer, blocks=blocks, bytes=size, location=location))
        return found

    def _shift(self, placement: Placement) -> None:
        """Rotate sink and recent (with current) where their place has changed: anew, from their unrotated keys."""
        if self.rotates:
            placed, unrotated, _ = self._buffers()
            if placement.sink_shift != self.sink_shift and self.sink_tokens:
                where = slice(self.begin, self.begin + self.sink_tokens)
                if self.policy.realigner.rotates_again and self.rotary is not None:
                    further = placement.sink_shift - self.sink_shift
                    placed[:, :, where] = self.rotary.advance(placed[:, :, where], further)
                else:
                    placed[:, :, where] = self._turn(unrotated[:, :, where], placement.sink_shift)
            if placement.recent_shift != self.recent_shift and self.tail > self.head:
                where = slice(self.head, self.tail)
                placed[:, :, where] = self._turn(unrotated[:, :, where], self.recent_start + placement.recent_shift)
        self.sink_shift, self.recent_shift = placement.sink_shift, placement.recent_shift

    # ------------------------------------------------------------------ context

    def context(self) -> Context:
        """What attention sees now. Pure: the same tensors until the next write or select; nothing is fetched."""
        if self.stale:
            raise SelectionError(
                f"layer {self.layer} archived blocks since its last selection; call select(query) before context()"
            )
        placed, _, stored = self._buffers()
        where = slice(self.begin, self.tail)
        keys, values = placed[:, :, where], stored[:, :, where]
        current = self.current
        if self._live is not None:
            live_keys, live_values = self._live
            if self.rotates:
                live_keys = self._turn(live_keys, self.committed_steps + self.recent_shift)
            keys = torch.cat([keys[:, :, :-current], live_keys], 2)
            values = torch.cat([values[:, :, :-current], live_values], 2)
        elif torch.is_grad_enabled():  # the query may need them in backward, when they have been written over
            keys, values = keys.clone(), values.clone()
        if self.graph and self.mid_tokens and torch.is_grad_enabled():
            before, after = self.sink_tokens, self.sink_tokens + self.mid_tokens
            keys, values = (
                torch.cat([part[:, :, :before], mid, part[:, :, after:]], 2)
                for part, mid in zip((keys, values), self._mid_with_graph(), strict=True)
            )
        mask = self._mask(current, keys.shape[2])
        plain = self.geometry.causal and current > 1 and mask is None
        return Context(
            keys=keys,
            values=values,
            current=current,
            mask=mask,
            causal=plain,
            banded=mask is not None and self._bands(),
            locate=self._locate,
        )

    def _mid_with_graph(self) -> tuple[Tensor, Tensor]:
        """The selected blocks, placed, as they were computed: gradients flow through them."""
        if self.selection is None or self.mid is None:
            raise SelectionError(f"layer {self.layer} has no archived blocks to select")
        index = torch.cat([self.selection.chosen, self.selection.compressed], -1).sort(-1).values[..., None, None]
        keys, values = (torch.cat([getattr(run, name) for run in self.graph], 2) for name in ("keys", "values"))
        keys, values = (part.take_along_dim(index, 2).flatten(2, 3) for part in (keys, values))
        if self.rotates and self.rotary is not None:
            keys = self.rotary.rotate(keys, self.mid.at(self.mid.placed))
        return keys, values

    def draft_table(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        """The rotation to where the current block of `tokens` tokens is placed, if its selection holds for further
        drafts of it (video); none if the next draft must go through the layer."""
        if (
            self._live is not None
            or not self.drafted
            or self.stale
            or tokens != self.current
            or self.policy.refresh == "chunk"
        ):
            return None
        if self.rotary is None:
            return None
        shift = self.recent_shift if self.rotates else 0
        steps = tokens // self.geometry.tokens_per_step
        buffer = self._buffers()[0]
        return self.rotary.run(self.committed_steps + shift, steps, self.geometry.grid, buffer.device, buffer.dtype)

    def place_query(
        self, query: Float[Tensor, "batch query_heads tokens head_dim"]
    ) -> Float[Tensor, "batch query_heads tokens head_dim"]:
        """Rotate the current tokens' queries to where their keys are placed (nothing to do under `original`)."""
        return self._turn(query, self.committed_steps + self.recent_shift) if self.rotates else query

    def _bands(self) -> bool:
        """Whether the policy drops blocks while the current tokens pass."""
        drops = self.geometry.causal and self.policy.compressor.drops
        return drops and self.timeline.recent_start_at(self.num_steps - 1) > self.recent_start

    def _mask(self, current: int, tokens: int) -> Tensor | None:
        """What each current token may see, or none if that goes without saying."""
        if self.mid is not None and self.mid.valid is not None and self.mid_tokens:
            if self.padding is None or self.padding.shape[-1] != tokens:
                both = (self.geometry.batch, self.geometry.kv_heads)
                self.padding = padding(self.mid.valid, self.sink_tokens, tokens).expand(*both, -1, -1)
            return self.padding
        if not self.geometry.causal or current <= 1:
            return None
        device = self._buffers()[0].device
        if self._bands():
            return dropping(self.timeline, self.recent_start, self.committed_steps, self.num_steps, device)
        return None if tokens == current else causal(current, tokens, device)

    def _locate(self) -> tuple[Tensor, Tensor]:
        """Original and placed positions of the tokens of the context."""
        device = self._buffers()[0].device
        sink = self.geometry.positions(0, min(self.timeline.sink, self.num_steps), device)
        recent = self.geometry.positions(self.recent_start, max(self.num_steps, self.recent_start), device)
        if self.policy.in_place:
            recent = self.geometry.positions(min(self.timeline.sink, self.num_steps), self.num_steps, device)
        shift = torch.zeros(self.geometry.positions(0, 1).shape[-1], dtype=sink.dtype, device=device)
        shift[0] = 1
        parts = [(sink, sink + shift * self.sink_shift), (recent, recent + shift * self.recent_shift)]
        if self.mid is not None:
            parts.insert(1, (self.mid.at(self.mid.starts), self.mid.at(self.mid.placed)))
        both = []
        for which in (0, 1):
            wide = [part[which].to(sink.dtype) for part in parts]
            lead = torch.broadcast_shapes(*(p.shape[:-2] for p in wide), (1, 1))
            both.append(torch.cat([p.expand(*lead, *p.shape[-2:]) for p in wide], -2))
        return both[0], both[1]

    def tier_counts(self) -> dict[str, int]:
        """How many steps are in each tier, and how many were dropped. They add up to `num_steps`."""
        sink = min(self.timeline.sink, self.committed_steps)
        aged = max(0, self.recent_start - self.timeline.sink)
        return {
            "sink": sink,
            "mid": aged - self.dropped,
            "recent": max(0, self.committed_steps - max(self.recent_start, sink)),
            "current": self.num_steps - self.committed_steps,
            "dropped": self.dropped,
        }
