"""How many tokens and bytes a policy can come to need: one set of formulas, for bounds, buffers and `kvtiers plan`."""

from kvtiers.archive import Archive, Codec
from kvtiers.blocks import Form
from kvtiers.errors import BudgetError
from kvtiers.geometry import Geometry
from kvtiers.growing import grown
from kvtiers.slots import Attention, Compressor, Realigner, Retriever, Sink

_BLOCK_WITHOUT_SLACK = 16
"""Steps. From this block size on, moving `recent` once per block is cheap."""
_LEAST_SLACK = 64
"""Spare slots, so that smaller blocks do not move all of `recent` each time one leaves it."""


class Bounds:
    """What `kvtiers.Policy` can say of its costs. Sizes are per layer; `geometry` is the layer's."""

    sinks: Sink
    compressor: Compressor
    retriever: Retriever
    realigner: Realigner
    archive: Archive
    codec: Codec
    sink: int
    recent: int | None
    top_k: int
    top_k_compressed: int
    attend: Form
    block_size: int
    chunk_size: int | None
    budget: int | None

    @property
    def forms(self) -> frozenset[Form]:
        """The forms in which blocks are archived; a compressor that drops archives none."""
        return frozenset({self.attend, "compressed"} if self.top_k_compressed else {self.attend})

    @property
    def in_place(self) -> bool:
        """Whether history stays where it is because every block is kept exactly, attended, and on the device."""
        keeps = self.compressor.keeps and self.archive.location == "device" and self.codec.exact
        return keeps and self.retriever.attends_all

    @property
    def archives(self) -> bool:
        """Whether blocks that leave recent are archived."""
        return not (self.in_place or self.compressor.drops or self.compressor.rewrites)

    @property
    def leaves_without_keys(self) -> bool:
        """Whether nobody looks at the keys of a block that leaves recent: its compressed form was given, and is all."""
        digested = self.retriever.needs_digests and self.retriever.digests == "full"
        return self.compressor.given and "full" not in self.forms and not digested

    @property
    def attention(self) -> Attention | None:
        """Which attention is noted, for the compressor or for the retriever of blocks that are archived."""
        return self.compressor.attention or (self.retriever.attention if self.archives else None)

    def anchors(self, geometry: Geometry) -> int:
        """The most steps that the sink tier comes to hold."""
        if geometry.causal:
            return self.sinks.steps(self.sink)
        commit = geometry.steps_per_commit
        exact = self.sinks.steps(self.sink, commit)
        return exact if geometry.even or not exact else max(exact, self.sink + commit - 1)

    def block_steps(self, geometry: Geometry) -> int:
        """Steps of a block, at most."""
        return self.block_size if geometry.causal else geometry.steps_per_commit

    def block_tokens(self, geometry: Geometry, form: Form) -> int:
        """Tokens of one archived block in `form`, at most."""
        steps = self.block_steps(geometry)
        if form == "full" or self.compressor.keeps:
            return steps * geometry.tokens_per_step
        return self.compressor.block_tokens(steps, geometry)

    def mid_bound(self, geometry: Geometry) -> int | None:
        """The most mid tokens attended, or None if there is no limit."""
        if self.recent is None or self.compressor.drops:
            return 0
        if self.compressor.rewrites:
            return self.compressor.mid_tokens(geometry)
        if self.retriever.attends_all:
            return None
        chosen = self.retriever.most(self.top_k) * self.block_tokens(geometry, self.attend)
        return chosen + self.top_k_compressed * (
            self.block_tokens(geometry, "compressed") if self.top_k_compressed else 0
        )

    def _recent_bound(self, geometry: Geometry) -> int:
        """The most steps that recent comes to hold."""
        block = self.block_steps(geometry)
        most = (self.recent or 0) + block - 1
        return most // block * block if not geometry.causal and geometry.even else most

    def bound(self, geometry: Geometry) -> int | None:
        """The most tokens that one attention call sees, per row and KV head; None if there is no limit."""
        mid = self.mid_bound(geometry)
        current = self.chunk_size if geometry.causal else self.block_steps(geometry)
        if mid is None or self.recent is None or current is None:
            return None
        return (self.anchors(geometry) + self._recent_bound(geometry) + current) * geometry.tokens_per_step + mid

    def slack(self, geometry: Geometry) -> int:
        """Spare slots behind the current ones, so that small blocks do not move the whole recent tier each time."""
        if self.recent is None or not geometry.causal or self.block_size >= _BLOCK_WITHOUT_SLACK:
            return 0
        return self.recent // 2 + _LEAST_SLACK

    def slots(self, geometry: Geometry) -> int | None:
        """Token slots of a layer's window: `bound`, and room for the recent tier to slide; None if it grows."""
        bound = self.bound(geometry)
        return None if bound is None else bound + self.slack(geometry)

    def slots_before(self, geometry: Geometry) -> int | None:
        """Slots before recent that sink and mid may come to need; None if there is no limit."""
        mid = None if self.in_place or self.recent is None else self.mid_bound(geometry)
        return None if mid is None else mid + self.anchors(geometry) * geometry.tokens_per_step

    def archived_tokens(self, geometry: Geometry) -> dict[Form, int]:
        """Tokens of the longest block in each form that is archived or digested."""
        forms = {*self.forms, self.retriever.digests} if self.archives else set()
        return {form: self.block_tokens(geometry, form) for form in forms}

    def unrotated_slots(self, geometry: Geometry) -> int:
        """Slots of the buffer of unrotated keys: of recent and current tokens, which are rotated or archived later.

        0: there is none, or it grows. If nobody reads the keys of a block that leaves recent, the blocks that leave at
        the next commit give their slots to the current block.
        """
        recent, current = self._recent_bound(geometry), self.chunk_size or 0
        if not self.realigner.rotates or self.recent is None or (geometry.causal and not current):
            return 0
        if not geometry.causal:
            current = 0 if self.leaves_without_keys and geometry.even and recent else self.block_steps(geometry)
        return (recent + current) * geometry.tokens_per_step + self.slack(geometry)

    def _cut_short(self, geometry: Geometry) -> bool:
        """Whether some block may be shorter than others: of a video that says so, of text after `compact`."""
        return not geometry.even or (geometry.causal and self.block_size > 1)

    def _alike(self, geometry: Geometry) -> bool:
        """Whether the tokens of all archived blocks lie alike and have no bias."""
        return (self.compressor.keeps or self.compressor.alike) and not self._cut_short(geometry)

    def token_bytes(self, geometry: Geometry) -> int:
        """Bytes of one token of the window: key, value, the attention it got if that is kept, a bias if it may have."""
        biased = self.compressor.rewrites or (self.archives and not self._alike(geometry))
        bias = 4 * geometry.batch * geometry.kv_heads if biased else 0
        return geometry.token_bytes + self.attention_bytes(geometry) + bias

    def attention_bytes(self, geometry: Geometry) -> int:
        """Bytes of what is noted of the attention that one token gets, if that is kept with every forward."""
        return 4 * geometry.batch * geometry.query_heads if self.attention in ("sum", "max") else 0

    def bound_bytes(self, geometry: Geometry, archived_blocks: int = 0, *, steps: int | None = None) -> int | None:
        """The most bytes one layer holds on the device, everything counted. Where there is no limit: what it comes to
        hold within so many `steps` (None: the answer is None).

        Counted: the window with current slots and slack, unrotated keys, the latest queries and what attention they
        gave, biases, digests, what is noted of the selection, and an archive on the device of `archived_blocks` blocks.
        Growing tensors hold at most a quarter more than they need.
        """
        bound, slots, plain = self.bound(geometry), self.slots(geometry), self.unrotated_slots(geometry)
        if bound is not None and slots is not None:
            return self._bytes_of(geometry, archived_blocks, attended=bound, slots=slots, plain=plain)
        if steps is None:
            return None
        anchors = self.anchors(geometry) * geometry.tokens_per_step
        slots = steps * geometry.tokens_per_step + (0 if self.in_place else anchors + (self.mid_bound(geometry) or 0))
        if self.mid_bound(geometry) is None and self.archives and self._cut_short(geometry):  # they are padded
            current = self.chunk_size if geometry.causal else self.block_steps(geometry)
            near = self.anchors(geometry) + self._recent_bound(geometry) + (steps if current is None else current)
            padded = archived_blocks * max(self.block_tokens(geometry, form) for form in self.forms)
            slots = max(slots, min(steps, near) * geometry.tokens_per_step + padded)
        plain = (plain or slots) if self.realigner.rotates and not self.in_place else 0
        return grown(self._bytes_of(geometry, archived_blocks, attended=slots, slots=slots, plain=plain))

    def _bytes_of(self, geometry: Geometry, archived_blocks: int, *, attended: int, slots: int, plain: int) -> int:
        """What a layer holds with a window of `slots`, of which `attended` are seen, and `plain` unrotated keys."""
        rows, axes = geometry.batch * geometry.kv_heads, 1 + len(geometry.grid)
        held = slots * self.token_bytes(geometry) + attended * self.attention_bytes(geometry)
        held += plain * geometry.key_bytes
        if self.realigner.sink_moves == "anew":
            held += self.anchors(geometry) * geometry.tokens_per_step * geometry.key_bytes
        queries = geometry.batch * geometry.query_heads * geometry.head_dim * geometry.dtype.itemsize
        held += 2 * self.compressor.window_queries(geometry) * queries
        if self.compressor.rewrites:
            of_token = self.token_bytes(geometry) + 4 * geometry.batch * geometry.query_heads + rows * 16 * axes
            return held + 3 * 8 + min(self.compressor.mid_tokens(geometry), attended) * of_token
        if self.compressor.given and self.recent is not None:
            waiting = -(-self.recent // self.block_steps(geometry)) + 1
            lies = 8 * 4 if self.compressor.alike else rows * 8 * (axes + 1)
            held += waiting * self.block_tokens(geometry, "compressed") * (geometry.token_bytes + lies)
        if not self.archives:
            return held
        held += 4 * axes * sum(self.block_tokens(geometry, form) for form in self.forms)  # where a block's tokens lie
        chosen = self.retriever.count(self.top_k, archived_blocks) + self.top_k_compressed
        tokens = max(self.block_tokens(geometry, form) for form in self.forms)
        held += chosen * rows * (4 * 8 + tokens * 8 * (axes + 1))
        return held + grown(archived_blocks * self.hot_bytes(geometry))

    def hot_bytes(self, geometry: Geometry) -> int:
        """Bytes that one archived block keeps on the device: digests, where it lies, and itself if it is there."""
        rows = geometry.batch * geometry.kv_heads
        of_digest = self.block_tokens(geometry, self.retriever.digests) if self.retriever.needs_digests else 0
        hot = self.retriever.digest_bytes(of_digest, geometry) * rows + 24
        for form in self.forms:  # where each token lies, and its bias
            alike = self._alike(geometry) or (form == "full" and not self._cut_short(geometry))
            hot += 0 if alike else self.block_tokens(geometry, form) * 4 * rows * (len(geometry.grid) + 2)
        return hot + (self.archived_bytes(geometry) if self.archive.location == "device" else 0)

    def archived_bytes(self, geometry: Geometry) -> int:
        """Bytes that one block takes in the archive, in all its forms, as the codec writes it."""
        return sum(self.codec.block_bytes(self.block_tokens(geometry, form), geometry) for form in self.forms)

    def check_budget(self, geometry: Geometry) -> None:
        """Raise `BudgetError` if a context could exceed the stated budget."""
        bound = self.bound(geometry)
        if self.budget is not None and (bound is None or bound > self.budget):
            raise BudgetError(
                f"this policy attends {'any number of' if bound is None else f'up to {bound}'} tokens, more than "
                f"budget = {self.budget}; lower sink, recent, top_k or chunk_size, or raise budget"
            )
