"""The nouns of the cache: an extent of steps, a run of blocks, a selection, and the context that attention reads."""

from collections.abc import Callable
from typing import Literal

import attrs
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvtiers.state import BROADCAST, NUMBER, ROWS, SHARED, State

Tier = Literal["sink", "mid", "recent", "current"]
Form = Literal["full", "compressed"]
Location = Literal["device", "host", "disk"]


@attrs.frozen
class Extent:
    """A run of consecutive steps, `start` included, `stop` not."""

    start: int
    stop: int

    @property
    def steps(self) -> int:
        return self.stop - self.start


@attrs.frozen(eq=False, slots=False, kw_only=True)
class Blocks(State):
    """A run of blocks of equal size, of one layer.

    keys, values: [batch, kv_heads, blocks, tokens, head_dim]; keys as the layer stores them (`Moment.keys_rotated`).
    offsets: where each token lies, counted from the start of its block, along (time, ...); axes that agree are 1.
    starts: the first step of each block.
    span: how many steps a block occupies when a realigner places it.
    rotated: the keys rotated to their original positions, if known.
    attention: how much each token was attended, by query head, for a compressor or a retriever that asks (`attention`).
    bias: added to a token's logits: log n where it stands for n tokens, -inf where there is none. None means 0.
    offsets_differ: a compressor sets it if offsets may differ between blocks, rows or heads. Their shape cannot say so
        when there is only one block, row and head.
    """

    keys: Float[Tensor, "batch kv_heads blocks tokens head_dim"] = attrs.field(metadata=ROWS)
    values: Float[Tensor, "batch kv_heads blocks tokens value_dim"] = attrs.field(metadata=ROWS)
    offsets: Float[Tensor, "#batch #kv_heads #blocks tokens axes"] = attrs.field(metadata=BROADCAST)
    starts: Int[Tensor, " blocks"] = attrs.field(metadata=SHARED)
    span: int = attrs.field(metadata=NUMBER)
    rotated: Float[Tensor, "batch kv_heads blocks tokens head_dim"] | None = attrs.field(default=None, metadata=ROWS)
    attention: Float[Tensor, "batch query_heads blocks tokens"] | None = attrs.field(default=None, metadata=ROWS)
    bias: Float[Tensor, "#batch #kv_heads #blocks tokens"] | None = attrs.field(default=None, metadata=BROADCAST)
    offsets_differ: bool = attrs.field(default=False, metadata=NUMBER)

    @property
    def alike(self) -> bool:
        """Whether tokens lie alike in every block, so that the offsets of one stand for all."""
        return not self.offsets_differ and max(self.offsets.shape[:3]) == 1

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    @property
    def tokens(self) -> int:
        return self.keys.shape[3]


@attrs.frozen(eq=False, slots=False, kw_only=True)
class Selection(State):
    """Which archived blocks a context attends: indices in order of origin, the same number for every row and head."""

    chosen: Int[Tensor, "batch kv_heads chosen"] = attrs.field(metadata=ROWS)
    """Attended in the form that the policy's `attend` names."""
    compressed: Int[Tensor, "batch kv_heads compressed"] = attrs.field(metadata=ROWS)
    """Attended in compressed form beside them."""
    shared: bool = attrs.field(default=False, metadata=NUMBER)
    """Whether all KV heads attend the same blocks, so that what is worked out for one stands for all."""

    @property
    def both(self) -> Int[Tensor, "batch kv_heads blocks"]:
        """All attended blocks in order of origin."""
        more = self.compressed.shape[-1]
        return torch.cat([self.chosen, self.compressed], -1).sort(-1).values if more else self.chosen


@attrs.frozen(eq=False, kw_only=True)
class Context:
    """What one attention call sees: sink, selected mid, recent, current, in this order of origin.

    keys are rotated to where they are placed. `current` tokens at the end are the forward's own.
    """

    keys: Float[Tensor, "batch kv_heads tokens head_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]
    current: int
    mask: Bool[Tensor, "current tokens"] | Bool[Tensor, "batch 1 current tokens"] | None
    """True where a current token may attend; None where every token may, or where plain causal order says it all.
    Layers may share it: it must not be changed."""
    causal: bool
    """True when `mask` is None because plain causal order says it all (no history yet)."""
    banded: bool = False
    """True when `mask` hides more than the future: what a policy drops while these tokens pass."""
    bias: Float[Tensor, "batch kv_heads tokens"] | None = None
    """Added to every query's logits of a token; None where all is 0."""
    locate: Callable[[], tuple[Tensor, Tensor]] = attrs.field(repr=False)

    @property
    def origins(self) -> Float[Tensor, "#batch #kv_heads tokens axes"]:
        """The position at which each token was seen, in steps (and grid cells)."""
        return self.locate()[0]

    @property
    def placed(self) -> Float[Tensor, "#batch #kv_heads tokens axes"]:
        """The position that each key has in this context."""
        return self.locate()[1]

    def logit_bias(
        self, query_heads: int, dtype: torch.dtype
    ) -> Float[Tensor, "batch query_heads queries tokens"] | None:
        """Mask and bias as one tensor to add to the logits of `query_heads` heads; None if there is neither.

        `queries` is 1 where all current tokens may see the same.
        """
        if self.bias is None and self.mask is None and not self.causal:
            return None
        allowed = self.mask
        if allowed is None and self.causal:
            allowed = torch.ones(self.current, self.keys.shape[2], dtype=torch.bool, device=self.keys.device).tril()
        if self.bias is None:
            added = torch.zeros(1, 1, 1, 1, dtype=dtype, device=self.keys.device)
        else:
            added = self.bias.to(dtype).repeat_interleave(query_heads // self.bias.shape[1], 1)[:, :, None]
        return added if allowed is None else added.masked_fill(~allowed, -torch.inf)


def run_of(
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    count: int,
    positions: Float[Tensor, "tokens axes"],
    first: int,
    span: int,
    rotated: Float[Tensor, "batch kv_heads tokens head_dim"] | None = None,
    attention: Float[Tensor, "batch query_heads tokens"] | None = None,
) -> Blocks:
    """Cut a run of `count` equal blocks out of consecutive tokens whose first step is `first`, without copying."""
    tokens = keys.shape[2] // count
    offsets = positions[:tokens].clone()
    offsets[:, 0] -= first
    return Blocks(
        keys=keys.unflatten(2, (count, tokens)),
        values=values.unflatten(2, (count, tokens)),
        offsets=offsets[None, None, None],
        starts=first + span * torch.arange(count, device=keys.device),
        span=span,
        rotated=None if rotated is None else rotated.unflatten(2, (count, tokens)),
        attention=None if attention is None else attention.unflatten(2, (count, tokens)),
    )
