"""`Policy`: one choice per slot, and how many steps (or blocks) each tier holds."""

from typing import Any, Literal

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers.archive import Archive, Codec
from kvtiers.blocks import Extent, Form
from kvtiers.bounds import Bounds
from kvtiers.errors import BudgetError, PolicyError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.slots import Compressor, Realigner, Retriever, Sink
from kvtiers.timeline import Timeline

SLOTS = ("sinks", "compressor", "retriever", "realigner", "archive", "codec")
_MOST = 2**31 - 1
"""The largest setting: steps and blocks beyond are a mistake."""


def _slot(kind: type) -> Any:
    def check(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
        if not isinstance(value, kind):
            raise SlotError(
                f"slot {field.name!r} takes an object of class {kind.__name__}, got {type(value).__name__}; "
                "give one, or its name through kvtiers.policy(...)"
            )

    return attrs.field(validator=check)


def _shown(value: object) -> str:
    """`value` for a message: a number may have more digits than Python writes out."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return repr(value)


def _count(default: Any, minimum: int, *, optional: bool = False) -> Any:
    def check(_: Any, field: "attrs.Attribute[Any]", value: object) -> None:
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _MOST:
            also = " or None" if optional else ""
            large = isinstance(value, int) and value > _MOST
            raise PolicyError(
                f"{field.name} must be a whole number of at least {minimum}{also}"
                f"{f' and at most {_MOST}' if large else ''}, got {_shown(value)}"
            )

    return attrs.field(default=default, validator=check, metadata={"optional": optional})


@attrs.frozen(kw_only=True)
class Policy(Bounds):
    """One choice per slot, and how many steps (or blocks) each tier holds. Built by name with `kvtiers.policy`."""

    sinks: Sink = _slot(Sink)
    compressor: Compressor = _slot(Compressor)
    retriever: Retriever = _slot(Retriever)
    realigner: Realigner = _slot(Realigner)
    archive: Archive = _slot(Archive)
    codec: Codec = _slot(Codec)
    sink: int = _count(0, 0)
    """Steps at the beginning that are anchors."""
    recent: int | None = _count(None, 0, optional=True)
    """Newest steps kept in full detail, without the current ones. None: nothing ever leaves recent."""
    top_k: int = _count(16, 1)
    """Archived blocks attended in the form that `attend` names."""
    top_k_compressed: int = _count(0, 0)
    """Next-ranked archived blocks attended in compressed form beside them."""
    attend: Form = attrs.field(default="compressed")
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

    @attend.validator
    def _check_attend(self, _: object, value: object) -> None:
        if value not in ("full", "compressed"):
            raise PolicyError(f"attend must be 'full' or 'compressed', got {value!r}")

    @refresh.validator
    def _check_refresh(self, _: object, value: object) -> None:
        if value not in ("block", "chunk") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PolicyError(
                f"refresh must be 'block', 'chunk' or a number of steps of at least 1, got {_shown(value)}"
            )

    def __attrs_post_init__(self) -> None:
        digests = self.retriever.digests if self.retriever.needs_digests else "full"
        if digests == "compressed" and digests not in self.forms and not self.compressor.drops:
            raise PolicyError(
                "the retriever digests the compressed form of blocks, which attend = 'full' and top_k_compressed = 0 "
                "never make; add attend='compressed' or top_k_compressed=n, or let it digest the full form"
            )
        asked = (self.compressor.attention, self.retriever.attention)
        if self.archives and None not in asked and asked[0] != asked[1]:
            raise PolicyError(
                f"{type(self.compressor).__name__} asks for the {asked[0]!r} of attention and "
                f"{type(self.retriever).__name__} for the {asked[1]!r}, and a layer notes one; choose others together"
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

    def scaled(self, share: float) -> "Policy":
        """The same with `recent`, `top_k` (at least 1), `top_k_compressed` and what the compressor keeps of the past
        multiplied by `share`."""
        return attrs.evolve(
            self,
            recent=None if self.recent is None else round(self.recent * share),
            top_k=max(1, round(self.top_k * share)),
            top_k_compressed=round(self.top_k_compressed * share),
            compressor=self.compressor.scaled(share),
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


FIELDS = tuple(field.name for field in attrs.fields(Policy))
"""The slots and settings of a policy, by name."""


def choose(scores: Float[Tensor, "batch kv_heads archived"], count: int) -> Int[Tensor, "batch kv_heads chosen"]:
    """The indices of the `count` highest scores, best first; of equal scores the newer block wins."""
    newest_first = scores.flip(-1)
    order = torch.sort(newest_first, dim=-1, descending=True, stable=True).indices[..., :count]
    return scores.shape[-1] - 1 - order
