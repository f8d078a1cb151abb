"""The nouns of the cache: an extent of steps, a run of blocks, a selection, and the context that attention reads."""

from collections.abc import Callable
from typing import Literal

import attrs
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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


@attrs.frozen(eq=False, kw_only=True)
class Blocks:
    """A run of blocks of equal size, of one layer.

    keys, values: [batch, kv_heads, blocks, tokens, head_dim].
    offsets: where each token lies, counted from the start of its block, along (time, ...); axes that agree are 1.
    starts: the first step of each block.
    span: how many steps a block occupies when a realigner places it.
    rotated: the keys as attention sees them at their original positions (`keys` themselves under `original`), if known.
    reduced: the reduced-resolution K/V that the model itself projected at commit, for a `SourceCompressor`.
    offsets_differ: a compressor sets it if it leaves other offsets in other blocks, which the shape of a single block
        of a single row and head cannot show.
    """

    keys: Float[Tensor, "batch kv_heads blocks tokens head_dim"]
    values: Float[Tensor, "batch kv_heads blocks tokens value_dim"]
    offsets: Float[Tensor, "#batch #kv_heads #blocks tokens axes"]
    starts: Int[Tensor, "*selection blocks"]
    span: int
    rotated: Float[Tensor, "batch kv_heads blocks tokens head_dim"] | None = None
    reduced: "Blocks | None" = None
    offsets_differ: bool = False

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


@attrs.frozen(eq=False, kw_only=True)
class Selection:
    """Which archived blocks a context attends: indices in order of origin, the same number for every row and head."""

    chosen: Int[Tensor, "batch kv_heads chosen"]
    """Attended in the form that the policy's `attend` names."""
    compressed: Int[Tensor, "batch kv_heads compressed"]
    """Attended in compressed form."""
    shared: bool = False
    """Whether all KV heads attend the same blocks, so that what is worked out for one stands for all."""


@attrs.frozen(eq=False, kw_only=True)
class Context:
    """What one attention call sees: sink, selected mid, recent, current, in this order of origin.

    keys are placed (rotated) unless the realigner leaves gaps. `current` tokens at the end are the forward's own.
    """

    keys: Float[Tensor, "batch kv_heads tokens head_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]
    current: int
    mask: Bool[Tensor, "current tokens"] | Bool[Tensor, "batch kv_heads 1 tokens"] | None
    """True where a current token may attend; none where every token may. It differs by row and KV head where blocks of
    different length are attended (video): the shorter ones have padding behind them."""
    causal: bool
    """True when `mask` is none because plain causal order says it all (no history yet)."""
    banded: bool = False
    """True when `mask` hides more than the future: what a policy drops while these tokens pass."""
    locate: Callable[[], tuple[Tensor, Tensor]] = attrs.field(repr=False)

    @property
    def origins(self) -> Float[Tensor, "#batch #kv_heads tokens axes"]:
        """The position at which each token was seen, in steps (and grid cells)."""
        return self.locate()[0]

    @property
    def placed(self) -> Float[Tensor, "#batch #kv_heads tokens axes"]:
        """The position that each key has in this context."""
        return self.locate()[1]


def run_of(
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    count: int,
    positions: Float[Tensor, "tokens axes"],
    first: int,
    span: int,
    rotated: Float[Tensor, "batch kv_heads tokens head_dim"] | None = None,
    reduced: Blocks | None = None,
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
        reduced=reduced,
    )
