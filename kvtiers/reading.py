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
from kvtiers.errors import RotaryError, SelectionError
from kvtiers.geometry import Geometry
from kvtiers.history import History
from kvtiers.masks import causal, dropping
from kvtiers.mid import MidTokens
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary
from kvtiers.slots import Moment
from kvtiers.state import State, number, part
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
class Reading(Undoable):
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
    timeline: Timeline = attrs.field(init=False)
    window: Window = part(None)
    unrotated: Window | None = part(None)
    """Unrotated keys of recent and current (and of the sink, if a realigner rotates it anew)."""
    history: History = part(None)
    watched: Watched = part(None)
    mid: MidTokens | None = part(None)
    """Where the mid tokens of the window come from and lie; None if there are none, or history stays in place."""
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
    unplaced: bool = number(False)
    """Whether the current keys wait, unrotated, for the selection."""
    pending: int = number(0)
    """Steps written since the last selection."""
    drafted: bool = number(False)
    """Whether the current block has been written before (video)."""
    attended: int = number(0)
    """Tokens that the last pass attends, its own included."""
    selected_at: int = number(0)
    together_at: int = number(0)
    """The step up to which several current tokens last chose blocks with one query."""
    prompt: Tensor | None = None
    """The embedding of the prompt, for policies that look at it (video)."""
    live: tuple[Tensor, Tensor] | None = None
    """Current keys and values with their graph, where gradients are wanted."""

    def pieces(self) -> list[State]:
        return [self, self.window, self.history, self.watched, *([] if self.unrotated is None else [self.unrotated])]

    @property
    def current(self) -> int:
        """How many current tokens there are."""
        return (self.num_steps - self.committed_steps) * self.geometry.tokens_per_step

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
            live_keys = self.turned(live_keys, self.committed_steps + self.window.recent_shift)
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

    def turned(self, keys: Tensor, first: int) -> Tensor:
        """Consecutive tokens, rotated to the positions from step `first`, if a realigner rotates."""
        if not self.policy.realigner.rotates:
            return keys
        if self.rotary is None:
            raise RotaryError(f"layer {self.layer} has no rotary embedding")
        per_step = self.geometry.tokens_per_step
        if keys.shape[-2] % per_step:  # the last tokens of a step
            steps = -(-keys.shape[-2] // per_step)
            cos, sin = self.rotary.run(first, steps, self.geometry.grid, keys.device, keys.dtype)
            return self.rotary.apply(keys, (cos[-keys.shape[-2] :], sin[-keys.shape[-2] :]))
        steps = keys.shape[-2] // per_step
        return self.rotary.apply(keys, self.rotary.run(first, steps, self.geometry.grid, keys.device, keys.dtype))

    def place_query(
        self, query: Float[Tensor, "batch query_heads tokens head_dim"]
    ) -> Float[Tensor, "batch query_heads tokens head_dim"]:
        """Rotate the current tokens' queries to where their keys are placed (nothing to do if none are rotated)."""
        return self.turned(query, self.committed_steps + self.window.recent_shift)

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

    def moment(self, device: torch.device) -> Moment:
        """What policies are told beside their input."""
        return Moment(
            layer=self.layer,
            step=self.committed_steps,
            geometry=self.geometry,
            device=device,
            rotary=self.rotary,
            keys_rotated=not self.policy.realigner.rotates,
            blocks_differ=not self.geometry.even or bool(self.history.spans),
            prompt=self.prompt,
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
        device = self.window.planes["rotated"].device
        if self._bands():
            return dropping(self.timeline, self.recent_start, self.committed_steps, self.num_steps, device)
        return None if tokens == current else causal(current, tokens, device)

    def _locate(self) -> tuple[Tensor, Tensor]:
        """Original and placed positions of the tokens of the context."""
        device, geometry, window = self.window.planes["rotated"].device, self.geometry, self.window
        anchors = min(self.timeline.sink, self.num_steps)
        sink = geometry.positions(0, anchors, device)
        first = anchors if self.policy.in_place else self.recent_start
        recent = geometry.positions(first, max(self.num_steps, first), device)
        shift = torch.zeros(sink.shape[-1], dtype=sink.dtype, device=device)
        shift[0] = 1
        parts = [(sink, sink + shift * window.sink_shift), (recent, recent + shift * window.recent_shift)]
        if self.mid is not None:
            parts.insert(1, (self.mid.at(self.mid.starts), self.mid.at(self.mid.placed)))
        both = []
        for which in (0, 1):
            wide = [part[which].to(sink.dtype) for part in parts]
            lead = torch.broadcast_shapes(*(p.shape[:-2] for p in wide), (1, 1))
            both.append(torch.cat([p.expand(*lead, *p.shape[-2:]) for p in wide], -2))
        return both[0], both[1]
