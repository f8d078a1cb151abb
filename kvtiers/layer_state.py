"""What one layer's memory consists of, and all that only reads it: contexts, masks, positions, counts."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers import events
from kvtiers.archive import ByteBudget
from kvtiers.blocks import Context
from kvtiers.checks import admit
from kvtiers.errors import SelectionError
from kvtiers.geometry import Geometry
from kvtiers.history import History
from kvtiers.masks import causal, dropping
from kvtiers.placed import Placed
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary
from kvtiers.slots import Moment
from kvtiers.state import Saved, State, number, part
from kvtiers.timeline import Timeline
from kvtiers.undoing import Undoable
from kvtiers.watched import Watched
from kvtiers.window import Window

Observe = Callable[[events.Event], None]


@attrs.frozen(eq=False, kw_only=True)
class CurrentView:
    """A further pass over the current tokens may write them here, instead of calling `write` (as a compiled step does).

    keys, values: [batch, kv_heads, tokens, head_dim], the context with the current tokens' slots at its end. table: how
    keys and queries are rotated before; logit_bias: to be added to the logits (see `Context.logit_bias`), or None.
    """

    keys: Tensor
    values: Tensor
    table: tuple[Tensor, Tensor]
    logit_bias: Tensor | None


@attrs.define(eq=False, slots=False, kw_only=True)
class LayerState(Undoable):
    """The fields of a layer, and what reads them.

    layer: the model's number for it. rotary: how it rotates, or None. observe: told of every event; it must not raise.
    check: refuse keys or values that are not finite. budget: of the archive (None: one of its own).
    """

    policy: Policy
    geometry: Geometry
    rotary: Rotary | None = None
    observe: Observe | None = None
    check: bool = False
    budget: ByteBudget | None = None
    timeline: Timeline = part()
    placed: Placed = part()
    history: History = part()
    watched: Watched = part()
    num_steps: int = number(0)
    """Steps written."""
    committed_steps: int = number(0)
    """Steps that are history; the rest are current."""
    recent_start: int = number(0)
    """The step up to which blocks have left recent."""
    dropped: int = number(0)
    """Steps that a policy dropped."""
    stale: bool = number(False)
    """Whether blocks were archived since the last selection."""
    pending: int = number(0)
    """Steps written since the last selection."""
    drafted: bool = number(False)
    """Whether the current block has been written before (video)."""
    attended: int = number(0)
    """Tokens that the last pass attends, its own included."""
    selected_at: int = number(0)
    together_at: int = number(0)
    """The step up to which several current tokens last chose blocks with one query."""
    prompt: tuple[Tensor | None, Callable[[int], Tensor | None] | None] = (None, None)
    """The embedding of the prompt, and what gives its keys in cross-attention, for policies that look at it (video)."""
    admitted: object = None
    """The kind of keys and values that was checked last; what follows is mostly of the same."""
    live: tuple[Tensor, Tensor] | None = None
    """Current keys and values with their graph, where gradients are wanted."""

    def pieces(self) -> list[State]:
        return [self, self.placed, *self.placed.windows(), self.history, self.watched]

    @property
    def window(self) -> Window:
        """The buffer that attention reads."""
        return self.placed.window

    @property
    def current(self) -> int:
        """How many current tokens there are."""
        return (self.num_steps - self.committed_steps) * self.geometry.tokens_per_step

    @property
    def due(self) -> bool:
        """Whether blocks leave recent once the current tokens are history."""
        return self.timeline.recent_start_at(self.num_steps) > self.recent_start

    def looked_at(self, query: Tensor) -> Tensor:
        """Those of the current tokens' queries that the retriever looks at, rotated at their origin."""
        first = self.num_steps - query.shape[2] // self.geometry.tokens_per_step
        return self.placed.turned(query, first, most=self.policy.retriever.queries)

    @property
    def selects(self) -> bool:
        """Whether it is time to choose archived blocks."""
        again = self.pending >= self.policy.refresh_steps and self.policy.retriever.needs_query
        return self.stale or (again and self.history.count > 0)

    def admit(self, keys: Tensor, values: Tensor) -> None:
        """Raise `GeometryError` unless the layer can take these tokens."""
        of = (keys.shape, values.shape, keys.dtype, values.dtype, keys.device, values.device)
        coming = (self.policy, self.geometry, of)
        if coming != self.admitted:
            held = self.window.device if self.window.planes else None
            admit(keys, values, self.policy, self.geometry, layer=self.layer, held=held)
            self.admitted = coming

    @property
    def plain(self) -> bool:
        """Whether one more token is only appended: it is no anchor, nothing leaves recent, no attention is noted."""
        past = not self.due and self.num_steps >= self.timeline.sink and self.live is None
        return past and not (self.stale or self.check or self.watched.looks)

    def context(self) -> Context:
        """What attention sees now. Pure: the same tensors until the next write or select; nothing is fetched."""
        self.check_whole()
        if self.stale:
            raise SelectionError(
                f"layer {self.layer} archived blocks since its last selection; call select(query) before context()"
            )
        if not self.window.planes:
            raise SelectionError(f"layer {self.layer} holds nothing yet; write keys and values first")
        where, current = self.window.attended, self.current
        keys, values = self.window.view("rotated", where), self.window.view("values", where)
        if self.live is not None:
            live_keys, live_values = self.live
            live_keys = self.placed.near(live_keys, self.committed_steps)
            keys = torch.cat([keys[:, :, :-current], live_keys], 2)
            values = torch.cat([values[:, :, :-current], live_values], 2)
        elif torch.is_grad_enabled():  # the query may need them in backward, when they have been written over
            keys, values = keys.clone(), values.clone()
        mask = self._mask(keys.shape[2])
        return Context(
            keys=keys,
            values=values,
            current=current,
            mask=mask,
            causal=self.geometry.causal and current > 1 and mask is None,
            banded=mask is not None and self._bands(),
            bias=self.window.view("bias", where)[..., 0] if "bias" in self.window.planes else None,
            locate=self._locate,
        )

    def place_query(
        self, query: Float[Tensor, "batch query_heads tokens head_dim"]
    ) -> Float[Tensor, "batch query_heads tokens head_dim"]:
        """Rotate the current tokens' queries to where their keys are placed (nothing to do if none are rotated)."""
        return self.placed.near(query, self.committed_steps)

    def place_beside(
        self, x: Float[Tensor, "batch heads tokens head_dim"], offsets: Float[Tensor, "tokens axes"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Rotate tokens that lie at `offsets` from the start of the current block to where it is placed."""
        if not self.policy.realigner.rotates or self.rotary is None:
            return x
        where = offsets.double().clone()
        where[:, 0] += self.committed_steps + self.window.recent_shift
        return self.rotary.apply(x, self.rotary.table(where, x.dtype))

    def current_view(self) -> CurrentView | None:
        """Where further passes may write the current block, if its selection holds; None if they must `write`."""
        holds = self.drafted and not self.stale and self.live is None and self.policy.refresh != "chunk"
        if not holds or self.rotary is None or self.watched.looks:
            return None
        shift = self.window.recent_shift if self.policy.realigner.rotates else 0
        steps, context = self.num_steps - self.committed_steps, self.context()
        keys, grid = context.keys, self.geometry.grid
        table = self.rotary.run(self.committed_steps + shift, steps, grid, keys.device, keys.dtype)
        bias = context.logit_bias(self.geometry.query_heads, keys.dtype)
        return CurrentView(keys=keys, values=context.values, table=table, logit_bias=bias)

    def moment(self) -> Moment:
        """What policies are told beside their input."""
        prompt, prompt_keys = self.prompt
        return Moment(
            layer=self.layer,
            step=self.committed_steps,
            geometry=self.geometry,
            device=self.window.device,
            rotary=self.rotary,
            keys_rotated=not self.policy.realigner.rotates,
            blocks_differ=not self.geometry.even or bool(self.history.spans),
            prompt=prompt,
            prompt_keys=None if prompt_keys is None else prompt_keys(self.layer),
            queries=self.watched.latest,
        )

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

    def attention_of_leaving(self, tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """What attention mid and the oldest `tokens` recent tokens got, if it is watched."""
        queries, placed = self.watched.latest, None
        if self.watched.kind == "latest" and queries is not None:
            first = self.num_steps - queries.shape[2] // self.geometry.tokens_per_step
            placed = self.placed.near(queries, first)
        stop = self.num_steps if self.geometry.causal else None
        return self.watched.of_leaving(self.window, placed, tokens, stop=stop)

    def dump(self) -> Saved:
        self.check_whole()
        return super().dump()

    def tell(self, kind: Any, **about: Any) -> None:
        """Send an event of this layer to whoever observes it."""
        if self.observe:
            self.observe(kind(layer=self.layer, **about))

    def _bands(self) -> bool:
        """Whether the policy drops blocks while the current tokens pass."""
        drops = self.geometry.causal and self.policy.compressor.drops
        return drops and self.timeline.recent_start_at(self.num_steps - 1) > self.recent_start

    def _mask(self, tokens: int) -> Tensor | None:
        """What each current token may see, or None if that goes without saying."""
        current = self.current
        if not self.geometry.causal or current <= 1:
            return None
        device = self.window.device
        if self._bands():
            return dropping(self.timeline, self.recent_start, self.committed_steps, self.num_steps, device)
        return None if tokens == current else causal(current, tokens, device)

    def _locate(self) -> tuple[Tensor, Tensor]:
        """Original and placed positions of the tokens of the context."""
        anchors = min(self.timeline.sink, self.num_steps)
        return self.placed.locate(anchors, anchors if self.policy.in_place else self.recent_start, self.num_steps)
