"""The four policies of a tiered cache and its archive, as abstract classes, and `Policy`, one choice of each.

A policy decides; the store moves tensors. A policy sees metadata, digests, a query or blocks, and returns a decision or
new blocks. It holds settings only (they are frozen values), so one instance serves every layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import attrs
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from kvtiers.archive import Archive
from kvtiers.blocks import Blocks, Extent, Form
from kvtiers.errors import BudgetError, PolicyError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.timeline import Timeline

_LARGE_BLOCK, _LEAST_SLACK = 16, 64
"""Steps: a block from which on moving recent for each one costs little beside the forwards between; spare slots."""

SLOTS = ("sinks", "compressor", "retriever", "realigner", "archive")


class Sink(ABC):
    """Decides which blocks are anchors. Anchors are the beginning: the first block that is none ends the sink tier."""

    @abstractmethod
    def is_anchor(self, block: Extent, sink: int) -> bool:
        """Whether `block` is an anchor, given the policy's `sink` setting (steps)."""

    def steps(self, sink: int) -> int:
        """How many single steps from the beginning are anchors (text)."""
        count = 0
        while count < sink and self.is_anchor(Extent(count, count + 1), sink):
            count += 1
        return count


@attrs.frozen(eq=False, kw_only=True)
class Source:
    """What a compressor may look at when tokens are committed.

    queries: [batch, query_heads, tokens, head_dim], rotated at their original positions.
    keys, values: the K/V of the tokens being committed, as stored.
    """

    queries: Float[Tensor, "batch query_heads tokens head_dim"] | None
    keys: Float[Tensor, "batch kv_heads tokens head_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]


class Compressor(ABC):
    """Decides what a block becomes when it leaves recent. Works on the K/V of one layer."""

    drops: ClassVar[bool] = False
    """True if nothing of a block remains; then `age` is not called."""
    keeps: ClassVar[bool] = False
    """True if a block stays as it is; then `age` is not called."""

    @property
    def prepares(self) -> bool:
        """Whether `prepare` must be called with the queries of every forward."""
        return False

    def prepare(self, source: Source, state: Any) -> Any:
        """Look at tokens as they are committed; returns the new state, given to `age`.

        A state is a tensor whose first axis is the batch, or none.
        """
        return state

    @abstractmethod
    def age(self, blocks: Blocks, state: Any) -> tuple[Blocks | None, Any]:
        """What `blocks` become, and the new state. `blocks` must not be changed in place; none drops them."""

    @abstractmethod
    def compressed_tokens(self, tokens: int) -> int:
        """How many tokens a block of `tokens` tokens becomes."""

    def state_bytes(self, geometry: Geometry) -> int:
        """The most bytes that the state of one layer holds, for `Policy.bound_bytes`."""
        return 0


@attrs.frozen(eq=False, kw_only=True)
class Reduced:
    """Input tokens of the transformer that stand for one block at reduced resolution.

    tokens: [batch, tokens, channels], what the patch embedding would have yielded.
    offsets: [tokens, axes], positions from the start of the block; span: steps it occupies when placed.
    """

    tokens: Float[Tensor, "batch tokens channels"]
    offsets: Float[Tensor, "tokens axes"]
    span: int


@runtime_checkable
class Reducer(Protocol):
    """A `SourceCompressor` at work on one model and one video."""

    needs_pixels: bool
    """Whether `reduce` must be given the pixels."""

    def reduce(self, latents: Tensor, pixels: Tensor | None) -> Reduced:
        """The reduced tokens of a clean block; called once per commit, in order, unless `skip` is. After a commit that
        failed, `restore` takes it back.

        latents: [batch, channels, frames, height, width]. pixels: [batch, 3, frames, height, width] from -1 to 1, what
        was streamed of the block; none if nobody decoded it.
        """

    def skip(self, latents: Tensor, pixels: Tensor | None) -> None:
        """A clean block goes by that is an anchor in every layer, so that nobody will ask for its reduced tokens."""

    def remembered(self) -> dict[str, Tensor]:
        """What later blocks depend on of those before; the tensors are not written in place afterwards."""

    def restore(self, remembered: Mapping[str, Tensor]) -> None:
        """Go on from what `remembered` gave."""

    def reset(self) -> None:
        """Another video begins."""


class SourceCompressor(Compressor):
    """Compresses the source of a block; the model itself projects the result to each layer's K/V at commit.

    Source: PackForcing (arXiv 2603.25730) section 3.2, dual-branch compression.
    """

    @abstractmethod
    def bind(self, model: Any, vae: Any, network: Any = None) -> Reducer:
        """What reduces blocks for `model`. vae: its autoencoder, or none; `PolicyError` is raised if it needs one.
        network: trained weights at hand, instead of those that the settings name."""

    @abstractmethod
    def reduced_tokens(self, steps: int, grid: tuple[int, ...]) -> int:
        """How many tokens a block of `steps` steps of `grid` tokens becomes."""

    def compressed_tokens(self, tokens: int) -> int:
        raise SlotError(f"{type(self).__name__} reduces blocks of a grid; ask reduced_tokens()")

    def age(self, blocks: Blocks, state: Any) -> tuple[Blocks | None, Any]:
        """The reduced K/V that the model computed when the block was committed."""
        return blocks.reduced, state


class Retriever(ABC):
    """Decides which archived blocks a query attends."""

    needs_query: ClassVar[bool] = True
    """False if the choice does not depend on the query."""
    needs_digests: ClassVar[bool] = True
    """False if blocks can be chosen by their number alone."""

    @property
    def digests(self) -> Form:
        """The form of a block that `digest` is given."""
        return "full"

    def count(self, top_k: int, archived: int) -> int:
        """How many of `archived` blocks are attended."""
        return min(top_k, archived)

    def digest(self, blocks: Blocks) -> Num[Tensor, "batch kv_heads blocks digests width"]:
        """The small tensors that are kept hot for `blocks` (of the form that `digests` names), made of `rotated`.

        Where blocks differ in length, those that a shorter one has fewer of are zeros when `score` is given them.
        """
        raise SlotError(f"{type(self).__name__} needs digests but defines no digest()")

    def digest_floats(self, tokens: int, head_dim: int) -> int:
        """Digest numbers per block of `tokens` tokens and KV head, for `Policy.bound_bytes`."""
        return 0

    def digest_bytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of the digests of a block of `tokens` tokens, per row and KV head; 4 a number unless said otherwise."""
        return 4 * self.digest_floats(tokens, head_dim)

    @abstractmethod
    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Num[Tensor, "batch kv_heads blocks digests width"] | None,
        archived: int,
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
    """False if keys keep the rotation that the model gave them."""

    @property
    def accumulates(self) -> bool:
        """Whether anchors that move are rotated on from where they were, as often as that happens, and rounded each
        time; otherwise every key is rotated once, from its unrotated value, to where it is placed."""
        return False

    @abstractmethod
    def place(
        self,
        *,
        sink: int,
        starts: Int[Tensor, "*selection chosen"],
        spans: Int[Tensor, "*selection chosen"],
        total: int,
        recent: int,
    ) -> Placement:
        """Place a context of `sink` steps, then mid blocks, then recent (and current) from step `recent`.

        starts, spans: original first steps and lengths of the mid blocks, in order; `total` is the sum of one row's and
        head's spans, or the most that it can be where blocks differ in length (given as a number, so that nothing waits
        for the device).
        """


Recall = Literal["full", "compressed"]


def _slot(kind: type) -> Any:
    def check(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
        if not isinstance(value, kind):
            raise SlotError(
                f"slot {field.name!r} takes a {kind.__name__}, got {type(value).__name__}; "
                f"give a {kind.__name__}, or its name through kvtiers.policy(...)"
            )

    return attrs.field(validator=check)


def _count(default: Any, minimum: int, *, optional: bool = False) -> Any:
    def check(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            also = " or None" if optional else ""
            raise PolicyError(f"{field.name} must be a whole number of at least {minimum}{also}, got {value!r}")

    return attrs.field(default=default, validator=check)


@attrs.frozen(kw_only=True)
class Policy:
    """One choice per slot, and how many steps (or blocks) each tier holds. Built by name with `kvtiers.policy`."""

    sinks: Sink = _slot(Sink)
    compressor: Compressor = _slot(Compressor)
    retriever: Retriever = _slot(Retriever)
    realigner: Realigner = _slot(Realigner)
    archive: Archive = _slot(Archive)
    sink: int = _count(0, 0)
    """Steps at the beginning that are anchors."""
    recent: int | None = _count(None, 0, optional=True)
    """Newest steps kept in full detail, without the current ones. None: nothing ever leaves recent."""
    top_k: int = _count(16, 1)
    """Archived blocks attended in the form that `recall` names."""
    fringe: int = _count(0, 0)
    """Next-ranked archived blocks attended in compressed form beside them."""
    recall: Recall = attrs.field(default="compressed")
    """The form in which selected blocks are attended."""
    block_size: int = _count(32, 1)
    """Steps of a block (text; a video's blocks are what is committed)."""
    chunk_size: int | None = _count(128, 1, optional=True)
    """A forward over more steps is cut on multiples of this. None: a forward is one chunk."""
    refresh: int | Literal["block", "chunk"] = attrs.field(default="block")
    """How often a selection is renewed while single steps are decoded: per block, per forward, or every n steps. It is
    always renewed by a chunk of several steps, and when a block was just archived."""
    budget: int | None = _count(None, 1, optional=True)
    """The most tokens one attention call may see; checked against `bound`."""

    @recall.validator
    def _check_recall(self, _: object, value: object) -> None:
        if value not in ("full", "compressed"):
            raise PolicyError(f"recall must be 'full' or 'compressed', got {value!r}")

    @refresh.validator
    def _check_refresh(self, _: object, value: object) -> None:
        if value not in ("block", "chunk") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PolicyError(f"refresh must be 'block', 'chunk' or a number of steps of at least 1, got {value!r}")

    def __attrs_post_init__(self) -> None:
        digests = self.retriever.digests if self.retriever.needs_digests else "full"
        if digests == "compressed" and digests not in self.forms and not self.compressor.drops:
            raise PolicyError(
                "the retriever digests the compressed form of blocks, which recall = 'full' and fringe = 0 never make; "
                "add recall='compressed' or fringe=n, or let it digest the full form"
            )
        sink = self.sink_steps
        if self.budget is not None and self.recent is not None and sink + self.recent > self.budget:
            raise BudgetError(
                f"sink + recent = {sink} + {self.recent} = {sink + self.recent} steps is more than "
                f"budget = {self.budget}; lower sink or recent, or raise budget"
            )

    @property
    def sink_steps(self) -> int:
        """Steps that are anchors, by the `sinks` policy."""
        return self.sinks.steps(self.sink)

    @property
    def refresh_steps(self) -> int:
        """`refresh` as a number of steps."""
        if isinstance(self.refresh, int):
            return self.refresh
        return self.block_size if self.refresh == "block" else 1

    @property
    def forms(self) -> frozenset[Form]:
        """The forms in which blocks are archived; a compressor that drops archives none."""
        return frozenset({self.recall, "compressed"} if self.fringe else {self.recall})

    @property
    def in_place(self) -> bool:
        """Whether history stays where it is because every block is kept, attended, and on the device."""
        return self.recent is None or (
            self.compressor.keeps and self.archive.place == "device" and self.retriever.count(1, 2) == 2
        )

    def timeline(self, geometry: Geometry) -> Timeline:
        """The timeline before the first step."""
        if geometry.causal:
            return Timeline(sink=self.sink_steps, recent=self.recent, block_size=self.block_size)
        return Timeline(sink=0, recent=self.recent, block_size=1, cuts=())

    def extended(self, timeline: Timeline, stop: int) -> Timeline:
        """`timeline` of committed blocks with one more, which ends at `stop`."""
        cuts = timeline.cuts or ()
        block = Extent(cuts[-1] if cuts else 0, stop)
        anchor = timeline.sink == block.start and self.sinks.is_anchor(block, self.sink)
        return attrs.evolve(timeline, cuts=(*cuts, stop), sink=stop if anchor else timeline.sink)

    def anchors(self, geometry: Geometry) -> int:
        """The most steps that the sink tier comes to hold."""
        if geometry.causal:
            return self.sink_steps
        timeline, commit = self.timeline(geometry), geometry.steps_per_commit
        while timeline.sink < self.sink and self.extended(timeline, timeline.sink + commit).sink > timeline.sink:
            timeline = self.extended(timeline, timeline.sink + commit)
        uneven = 0 if geometry.even or not timeline.sink else self.sink + commit - 1
        return max(timeline.sink, uneven)

    def block_steps(self, geometry: Geometry) -> int:
        """Steps of a block, at most."""
        return self.block_size if geometry.causal else geometry.steps_per_commit

    def block_tokens(self, geometry: Geometry, form: Form) -> int:
        """Tokens of one archived block in `form`, at most."""
        full = self.block_steps(geometry) * geometry.tokens_per_step
        if form == "full" or self.compressor.keeps:
            return full
        if isinstance(self.compressor, SourceCompressor):
            return self.compressor.reduced_tokens(self.block_steps(geometry), geometry.grid)
        return self.compressor.compressed_tokens(full)

    def mid_bound(self, geometry: Geometry) -> int | None:
        """The most mid tokens attended, or none if there is no limit."""
        if self.recent is None or self.compressor.drops:
            return 0
        if self.retriever.count(self.top_k, 2**40) == 2**40:
            return None
        chosen = self.retriever.count(self.top_k, 2**40)
        return chosen * self.block_tokens(geometry, self.recall) + self.fringe * self.block_tokens(
            geometry, "compressed"
        )

    def bound(self, geometry: Geometry) -> int | None:
        """The most tokens that one attention call sees, per row and KV head; none if there is no limit."""
        mid, block = self.mid_bound(geometry), self.block_steps(geometry)
        current = self.chunk_size if geometry.causal else block
        if mid is None or self.recent is None or current is None:
            return None
        recent = self.recent + block - 1
        if not geometry.causal and geometry.even:
            recent = recent // block * block
        return (self.anchors(geometry) + recent + current) * geometry.tokens_per_step + mid

    def slots(self, geometry: Geometry) -> int | None:
        """Token slots of a layer's context buffer: `bound`, and room for the recent tier to slide; none if it grows."""
        bound = self.bound(geometry)
        return None if bound is None else bound + self.slack(geometry)

    def slack(self, geometry: Geometry) -> int:
        """Spare slots behind the current ones, so that small blocks do not move the whole recent tier each time."""
        if self.recent is None or not geometry.causal or self.block_size >= _LARGE_BLOCK:
            return 0
        return self.recent // 2 + _LEAST_SLACK

    def bound_bytes(self, geometry: Geometry, archived_blocks: int = 0) -> int | None:
        """The most bytes one layer holds on the device, everything counted; none if there is no limit.

        Counted: the context buffer with current slots and slack, the unrotated copies of its keys, digests, a
        compressor's state, and (for an archive on the device) `archived_blocks` blocks. Growing tensors hold at most
        twice what they need.
        """
        slots = self.slots(geometry)
        if slots is None:
            return None
        held = slots * (geometry.token_bytes + (geometry.key_bytes if self.realigner.rotates else 0))
        held += self.compressor.state_bytes(geometry)
        if isinstance(self.compressor, SourceCompressor) and self.recent is not None:
            waiting = -(-self.recent // self.block_steps(geometry)) + 1
            held += waiting * self.block_tokens(geometry, "compressed") * (geometry.token_bytes + 8 * 4)
        full = self.block_tokens(geometry, "full")
        digest = self.retriever.digest_bytes(full, geometry.head_dim) * geometry.batch * geometry.kv_heads
        length = 0 if geometry.even else 16 * len(self.forms)
        hot = archived_blocks * (digest + 8 + length)
        if not self.compressor.drops:
            chosen = self.retriever.count(self.top_k, archived_blocks) + self.fringe
            axes = 1 + len(geometry.grid)
            tokens = max(self.block_tokens(geometry, form) for form in ("full", "compressed"))
            held += (
                chosen * geometry.batch * geometry.kv_heads * (3 * 8 + tokens * (8 * (axes + 1) + (not geometry.even)))
            )
        if self.archive.place == "device" and not self.compressor.drops:
            offsets = 4 * geometry.batch * geometry.kv_heads * (1 + len(geometry.grid))
            tokens = sum(self.block_tokens(geometry, form) for form in self.forms)
            hot += archived_blocks * tokens * (geometry.token_bytes + offsets)
        return held + 2 * hot

    def check_budget(self, geometry: Geometry) -> None:
        """Raise `BudgetError` if a context could exceed the stated budget."""
        bound = self.bound(geometry)
        if self.budget is not None and (bound is None or bound > self.budget):
            raise BudgetError(
                f"this policy attends {'any number of' if bound is None else f'up to {bound}'} tokens, more than "
                f"budget = {self.budget}; lower sink, recent, top_k or chunk_size, or raise budget"
            )


def choose(scores: Float[Tensor, "batch kv_heads archived"], count: int) -> Int[Tensor, "batch kv_heads chosen"]:
    """The indices of the `count` highest scores, best first; of equal scores the newer block wins."""
    newest_first = scores.flip(-1)
    order = torch.sort(newest_first, dim=-1, descending=True, stable=True).indices[..., :count]
    return scores.shape[-1] - 1 - order
