"""The slots of a policy as abstract classes, except archive and codec (`kvtiers.archive`).

A policy decides; the layer moves tensors. A policy sees metadata, digests, a query or blocks, and returns a decision or
new blocks. It holds settings only (it is a frozen value), so one instance serves every layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers.blocks import Blocks, Extent, Form
from kvtiers.errors import PolicyError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.rotary import Rotary

Attention = Literal["sum", "latest", "max"]
_COUNTED = 100_000
"""Blocks that are looked at one by one to find where the anchors end."""


@attrs.frozen(eq=False, kw_only=True)
class Moment:
    """Where and when a policy is asked.

    step: how many steps are history. keys_rotated: whether stored keys are rotated to their original positions by the
    model (under a realigner that leaves positions alone) or not rotated. blocks_differ: whether archived blocks differ
    in length, so that a shorter one has zeros in place of digests that it lacks. prompt: the embedding of the prompt,
    if there is one (video). prompt_keys: the keys that the layer's cross-attention makes of it, once it has. queries:
    the latest queries, as many as `Compressor.window_queries` says, rotated as keys are. rotary: how the model rotates;
    None is possible unless the compressor or the retriever sets `needs_rotary`.
    """

    layer: int
    step: int
    geometry: Geometry
    device: torch.device
    rotary: Rotary | None = None
    keys_rotated: bool = True
    blocks_differ: bool = False
    prompt: Float[Tensor, "#batch words channels"] | None = None
    prompt_keys: Float[Tensor, "#batch query_heads words head_dim"] | None = None
    queries: Float[Tensor, "batch query_heads window head_dim"] | None = None


class Sink(ABC):
    """Decides which blocks are anchors. Anchors are the beginning: the first block that is none ends the sink tier."""

    @abstractmethod
    def is_anchor(self, block: Extent, sink: int) -> bool:
        """Whether `block` is an anchor, given the policy's `sink` setting (steps)."""

    def steps(self, sink: int, block: int = 1) -> int:
        """How many steps from the beginning are anchors, where blocks have `block` steps."""
        end = 0
        while end < sink and self.is_anchor(Extent(end, end + block), sink):
            end += block
            if end // block > _COUNTED:
                raise PolicyError(
                    f"{type(self).__name__} was asked for more than {_COUNTED:,} blocks whether they are anchors, of a "
                    f"sink of {sink:,} steps; let it define steps(), or give a smaller sink"
                )
        return end


class Compressor(ABC):
    """Decides what a block becomes when it leaves recent, or what all of mid becomes. Works on one layer's K/V."""

    drops: ClassVar[bool] = False
    """True if nothing of a block remains; then `age` is not called."""
    keeps: ClassVar[bool] = False
    """True if a block stays as it is; then `age` is not called."""
    given: ClassVar[bool] = False
    """True if the compressed form comes with the block, in `commit(compressed=...)`; then `age` is not called."""
    alike: ClassVar[bool] = False
    """True if, from blocks of one length, it makes tokens at the same offsets in every block, row and head, without a
    bias. The cache then stores these offsets once for all blocks."""
    rewrites: ClassVar[bool] = False
    """True if `rewrite` makes all of mid anew whenever blocks leave recent; then nothing is archived or retrieved."""

    @property
    def needs_rotary(self) -> bool:
        """Whether it turns keys or queries by itself, so that it must know how the model rotates (`Moment.rotary`)."""
        return False

    @property
    def attention(self) -> Attention | None:
        """Which attention `Blocks.attention` is to hold: of every token, by query head, over the real context.

        `sum` and `max` are over all queries since the token came; `latest` sums over the newest `window` queries.
        """
        return None

    @property
    def window(self) -> int:
        """How many of the latest queries the layer keeps for `attention` = "latest" and for `Moment.queries`."""
        return 0

    def window_queries(self, geometry: Geometry) -> int:
        """`window`, to be overridden where it is said in steps: one step of a video has many queries."""
        return self.window

    @abstractmethod
    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        """What `blocks` become: as many blocks, which must not be changed in place. None drops them."""

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        """What mid becomes, as one block, when `leaving` leave recent and it was `mid` (None: nothing yet)."""
        raise SlotError(f"{type(self).__name__} says that it rewrites, but defines no rewrite()")

    @abstractmethod
    def compressed_tokens(self, tokens: int) -> int:
        """How many tokens a block of `tokens` tokens becomes."""

    def block_tokens(self, steps: int, geometry: Geometry) -> int:
        """How many tokens a block of `steps` steps becomes. To be overridden where that depends on the grid."""
        return self.compressed_tokens(steps * geometry.tokens_per_step)

    def mid_tokens(self, geometry: Geometry) -> int:
        """The most tokens that `rewrite` makes of all of mid."""
        raise SlotError(f"{type(self).__name__} says that it rewrites, but defines no mid_tokens()")

    def scaled(self, share: float) -> "Compressor":
        """The same with what it keeps of the past multiplied by `share`, where that is a setting; else as it is."""
        return self

    @property
    def kept_after_reading(self) -> int | None:
        """The most tokens that `after_reading` leaves of a context; None if it leaves it as it is."""
        return None

    def after_reading(  # noqa: B027 - most have nothing left to do
        self,
        cache: Any,
        read: Callable[[Tensor], object],
        context: Int[Tensor, "rows tokens"],
        encode: Callable[[str], list[int]],
    ) -> None:
        """Compress `context`, the ids of all that `cache` holds, for methods that need to have seen the whole of it.

        read: feeds ids to the model. encode: text to ids. It is called once, by whoever knows that the context ends.
        """


class Retriever(ABC):
    """Decides which archived blocks a query attends."""

    needs_query: ClassVar[bool] = True
    """False if the choice does not depend on the query."""
    needs_digests: ClassVar[bool] = True
    """False if blocks can be chosen by their number alone."""
    attends_all: ClassVar[bool] = False
    """True if every archived block is attended, however many there are."""

    @property
    def needs_rotary(self) -> bool:
        """As `Compressor.needs_rotary`."""
        return False

    @property
    def digests(self) -> Form:
        """The form of a block that `digest` is given."""
        return "full"

    @property
    def attention(self) -> Literal["sum", "max"] | None:
        """Which attention `Blocks.attention` is to hold in `digest`, where it is given full blocks.

        As `Compressor.attention`, which must ask for the same if it asks for any.
        """
        return None

    @property
    def queries(self) -> int | None:
        """How many evenly spaced queries of a pass `score` needs to be given; None: all. Others are not rotated."""
        return None

    def most(self, top_k: int) -> int:
        """The most blocks that are attended, where not all are."""
        return top_k

    def count(self, top_k: int, archived: int) -> int:
        """How many of `archived` blocks are attended."""
        return archived if self.attends_all else min(self.most(top_k), archived)

    def digest(self, blocks: Blocks, moment: Moment) -> Tensor:
        """The small tensors that are kept on the device for `blocks`: [batch, kv_heads, blocks, digests, width].

        `blocks` are of the form that `digests` names, with `rotated`. Any dtype. Where blocks differ in length, a
        shorter one may have fewer digests; `score` is given zeros in their place.
        """
        raise SlotError(f"{type(self).__name__} needs digests but defines no digest()")

    def digest_bytes(self, tokens: int, geometry: Geometry) -> int:
        """Bytes of the digests of one block of `tokens` tokens and one KV head, at most."""
        return 0

    @abstractmethod
    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Tensor | None,
        archived: int,
        moment: Moment,
    ) -> Float[Tensor, "#batch #kv_heads archived"]:
        """How much each archived block matters to `query` (rotated at its origin); the highest are attended."""


@attrs.frozen(eq=False, kw_only=True)
class Placement:
    """Where a context's blocks are put: `shift` is added to the original time of the tokens of that tier."""

    sink_shift: int
    mid_starts: Float[Tensor, "*selection chosen"]
    recent_shift: int
    mid_from: int | None = None
    """Where mid begins, if its blocks follow one another without gap: then nothing else need be looked at."""


class Realigner(ABC):
    """Decides which positions an assembled context gets."""

    rotates: ClassVar[bool] = True
    """False if keys keep the rotation that the model gave them; then a layer does not ask `place`."""

    @property
    def sink_moves(self) -> Literal["never", "again", "anew"]:
        """How anchors are rotated when their place changes: `again` from where they were, which rounds every time, or
        `anew` from their unrotated keys, of which a copy is then kept."""
        return "never"

    @abstractmethod
    def place(
        self,
        *,
        sink: int,
        starts: Int[Tensor, "*selection chosen"],
        spans: Int[Tensor, "*selection chosen"],
        total: int,
        recent: int,
        moment: Moment,
    ) -> Placement:
        """Place a context of `sink` steps, then mid blocks, then recent (and current) from step `recent`.

        starts, spans: original first steps and lengths of the mid blocks, in order; `total` is the sum of one row's and
        head's spans, or the most that it can be where blocks differ in length (given as a number, so that nothing waits
        for the device).
        """
