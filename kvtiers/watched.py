"""What a policy asks a layer to watch: the latest queries, and how much attention each token got.

Attention is over the real context, as placed, in float32: one more q.k per forward for `sum` and `max`, kept in a plane
of the window; `latest` is worked out of the latest queries when blocks leave.
"""

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvtiers.geometry import Geometry
from kvtiers.masks import causal
from kvtiers.policy import Policy
from kvtiers.slots import Attention
from kvtiers.state import State, rows
from kvtiers.window import Window

Got = Float[Tensor, "batch query_heads tokens"]


@attrs.define(eq=False, slots=False, kw_only=True)
class Watched(State):
    """The latest queries of a layer, and what attention the pass over the current tokens gave.

    Queries are held as the layer's keys are: rotated by the model, or unrotated if a realigner rotates.
    """

    kind: Attention | None = None
    size: int = 0
    query_heads: int = 1
    committed: Tensor | None = rows()
    """The latest queries of history, [batch, query_heads, <= size, head_dim]."""
    fresh: Tensor | None = rows()
    """Those of the current tokens."""
    got: Tensor | None = rows()
    """Attention that the current tokens gave, [batch, query_heads, tokens of the context]; noted by `commit`."""

    @staticmethod
    def of(policy: Policy, geometry: Geometry) -> "Watched":
        """What the slots of `policy` ask for."""
        size = policy.compressor.window_queries(geometry)
        return Watched(kind=policy.attention, size=size, query_heads=geometry.query_heads)

    @property
    def counts(self) -> bool:
        """Whether attention is noted with every forward."""
        return self.kind in ("sum", "max")

    @property
    def looks(self) -> bool:
        """Whether queries are looked at."""
        return self.counts or self.size > 0

    @property
    def latest(self) -> Float[Tensor, "batch query_heads window head_dim"] | None:
        """The latest queries, those of current tokens included."""
        parts = [part for part in (self.committed, self.fresh) if part is not None]
        return torch.cat(parts, 2)[:, :, -self.size :] if parts else None

    def look(self, query: Tensor, placed: Tensor, window: Window, *, masked: bool) -> None:
        """Note the current tokens' queries; `placed` are the same at their place, `masked` if they see their past."""
        if self.size:
            self.fresh = query[:, :, -self.size :].clone()
        if self.counts:
            hidden = ~causal(placed.shape[2], window.tail - window.begin, placed.device) if masked else None
            shares = attention(placed, window, [window.attended], hidden)
            self.got = shares.sum(2) if self.kind == "sum" else shares.amax(2)

    def retract(self) -> None:
        """The current tokens are given up."""
        self.fresh = self.got = None

    def commit(self, window: Window) -> None:
        """The current tokens become history."""
        if self.fresh is not None:
            latest = self.latest
            self.committed, self.fresh = None if latest is None else latest.clone(), None  # no view of more than these
        if self.got is not None:
            held = window.view("attention", window.attended)[..., 0]
            seen = held + self.got if self.kind == "sum" else torch.maximum(held, self.got)
            window.write("attention", window.attended, seen[..., None])
            self.got = None

    def of_leaving(
        self, window: Window, placed: Tensor | None, tokens: int, *, stop: int | None
    ) -> tuple[Float[Tensor, "batch query_heads mid"] | None, Got | None]:
        """What attention mid (if there is any) and the oldest `tokens` recent tokens got; None, None if not watched.

        placed: the latest queries at their place. stop: the step after the latest query, where queries see no later
        token; None where they see all (video).
        """
        if self.kind is None:
            return None, None
        first, where = window.mid, slice(window.head - window.mid, window.head + tokens)
        if self.counts:
            got = window.view("attention", where)[..., 0].clone()
        elif placed is None:
            keys = window.planes["rotated"]
            return None, keys.new_zeros(keys.shape[0], self.query_heads, tokens, dtype=torch.float32)
        else:
            parts = [slice(window.sink_slot, window.sink_slot + window.sink), slice(window.head - first, window.tail)]
            shares = attention(placed, window, parts, None if stop is None else _later(window, placed, stop)).sum(2)
            got = shares[:, :, window.sink : window.sink + first + tokens]
        return (got[:, :, :first] if first else None), got[:, :, first:]


def attention(
    query: Float[Tensor, "batch query_heads queries head_dim"],
    window: Window,
    parts: list[slice],
    hidden: Bool[Tensor, "queries tokens"] | None,
) -> Float[Tensor, "batch query_heads queries tokens"]:
    """The softmax weights of `query` over some slots of a window; a query from which all is hidden gives none."""
    keys = torch.cat([window.view("rotated", part) for part in parts], 2).float()
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    logits = grouped @ keys[:, :, None].mT / keys.shape[-1] ** 0.5
    if "bias" in window.planes:
        logits = logits + torch.cat([window.view("bias", part) for part in parts], 2)[:, :, None, None, :, 0]
    if hidden is None:
        shares: Tensor = logits.softmax(-1)
    else:
        shares = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    return shares.flatten(1, 2)


def _later(window: Window, query: Tensor, stop: int) -> Bool[Tensor, "queries tokens"]:
    """Which tokens of sink, mid and recent each query came before. Mid counts as earlier, whatever it holds now."""
    steps = torch.arange(stop - query.shape[2], stop, device=query.device)[:, None]
    sink = torch.arange(window.sink, device=query.device)
    mid = sink.new_full((window.mid,), -1)
    recent = torch.arange(stop - window.recent, stop, device=query.device)
    return torch.cat([sink, mid, recent]) > steps
