"""What has left recent: the table of archived blocks, their digests and stores, or what a compressor made of it all.

It knows blocks and no slots. `add` takes blocks in, all or none; `select` scores and chooses; `fetch` brings tokens.
"""

from collections.abc import Collection, Mapping
from typing import Any

import attrs
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from kvtiers.archive import BlockStore, ByteBudget
from kvtiers.blocks import Blocks, Form, Selection
from kvtiers.checks import Sizes, called, check_decoded, check_encoded, check_returned
from kvtiers.errors import GeometryError, SelectionError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.growing import Growing
from kvtiers.mid import Fetched, MidTokens, merged
from kvtiers.policy import Policy, choose
from kvtiers.slots import Moment
from kvtiers.state import PART, State, number, part
from kvtiers.tokens import TokenTable

_NOTHING: Mapping[str, Any] = dict.fromkeys(("keys", "values", "offsets", "starts"))
_UNCHOSEN: Mapping[str, Any] = dict.fromkeys(("chosen", "compressed"))
"""What a file fills."""


@attrs.define(eq=False, slots=False, kw_only=True)
class History(State):
    """The archived blocks of a layer. Fields that hold tensors are shared with forks until one side writes.

    Whatever is behind `count` blocks (in stores, tables, digests) was left by a failure and does not exist.
    """

    policy: Policy
    geometry: Geometry
    layer: int
    budget: ByteBudget
    count: int = number(0)
    """How many blocks are archived."""
    spans: tuple[int, ...] = number(())
    """The length in steps of each block that is shorter than `longest`, ascending."""
    compressed_spans: tuple[int, ...] = number(())
    """The steps that each block's compressed form spans, ascending. Empty while all span what their block does."""
    table: Growing = attrs.field(factory=lambda: Growing(0), metadata=PART)
    """[blocks, 3]: the first step of each block, the steps that it spans, and those at which its compressed form counts
    when it is placed."""
    digests: Growing = attrs.field(factory=lambda: Growing(2), metadata=PART)
    stores: dict[Form, BlockStore] = part(lambda history: history.opened(), named=True)
    tokens: dict[Form, TokenTable] = part(lambda _: TokenTable(), named=True)
    """Where the tokens of the blocks lie, and their bias."""
    waiting: dict[str, Blocks] = part(lambda _: Blocks(**_NOTHING, span=0), named=True)
    """Compressed forms that came with blocks that have not left recent yet, by their first step."""
    rewritten: Blocks | None = part(lambda _: Blocks(**_NOTHING, span=0))
    """All of mid, where a compressor rewrites it."""
    selection: Selection | None = part(lambda _: Selection(**_UNCHOSEN))
    """Which blocks are attended now."""

    @property
    def wide(self) -> tuple[int, int]:
        """Rows and KV heads."""
        return self.geometry.batch, self.geometry.kv_heads

    @property
    def longest(self) -> int:
        """Steps of the longest block."""
        return self.policy.block_steps(self.geometry)

    @property
    def most_tokens(self) -> Mapping[Form, int]:
        """Tokens of the longest block in each form that is archived or digested."""
        return self.policy.archived_tokens(self.geometry)

    # ------------------------------------------------------------------ add

    def add(
        self, kept: Mapping[Form, Blocks], digested: Blocks, first: int, span: int, moment: Moment
    ) -> dict[Form, int]:
        """Archive blocks of `span` steps from step `first` on, in every form, or raise and archive none.

        digested: the same blocks in the form that the retriever digests. Returns the bytes written, by form.
        """
        self._truncate()
        forms = {form: self._lengthened(form, blocks) for form, blocks in kept.items()}
        codec = self.policy.codec
        encoded = {form: codec.encode(blocks.keys.detach(), blocks.values.detach()) for form, blocks in forms.items()}
        for parts in encoded.values():
            check_encoded(called(self.layer, codec, "encode"), parts, (*self.wide, digested.count))
        count = next(iter(forms.values())).count
        compressed_span = kept["compressed"].span if "compressed" in kept else span
        digest = self._digested(digested, moment)
        starts = first + span * torch.arange(count, device=moment.device)
        try:
            stores = {form: self.stores.get(form) or self.opened() for form in forms}
            for form, parts in encoded.items():
                stores[form].write(parts)
            self.stores = stores
            self.tokens = {form: self.tokens.get(form) or TokenTable() for form in forms}
            for form, blocks in forms.items():
                alike = blocks.alike and self.geometry.even and span == self.longest
                self.tokens[form].append(blocks, self.count, alike=alike)
            if digest is not None:
                self.digests.append(digest)
            steps = (torch.full_like(starts, span), torch.full_like(starts, compressed_span))
            self.table.append(torch.stack([starts, *steps], 1))
        except BaseException:
            self._truncate()
            raise
        if compressed_span != span or self.compressed_spans:
            before = self.compressed_spans or (*self.spans, *[self.longest] * (self.count - len(self.spans)))
            self.compressed_spans = tuple(sorted((*before, *[compressed_span] * count)))
        shorter = () if span == self.longest else (span,) * count
        self.count, self.spans = self.count + count, tuple(sorted((*self.spans, *shorter))) if shorter else self.spans
        return {form: sum(x.nbytes for x in parts.values()) for form, parts in encoded.items()}

    def opened(self) -> BlockStore:
        """A new, empty store."""
        archive = self.policy.archive
        made: object = archive.open(self.budget)
        if not isinstance(made, BlockStore):
            who = called(self.layer, archive, "open")
            raise SlotError(f"{who} returned a {type(made).__name__}; due is a BlockStore")
        return made

    def _truncate(self) -> None:
        """Forget what a failed `add` left behind."""
        for store in self.stores.values():
            if store.count > self.count:
                store.drop_last(store.count - self.count)
        for growing in (self.table, self.digests):
            growing.length = min(growing.length, self.count)
        for table in self.tokens.values():
            table.truncate(self.count)
        if not self.count:
            self.tokens = {}

    def _lengthened(self, form: Form, blocks: Blocks) -> Blocks:
        """Blocks that are shorter than others get tokens that count for nothing behind theirs."""
        most = self.most_tokens[form]
        if blocks.tokens > most:
            raise GeometryError(
                f"{called(self.layer, self.policy.compressor, 'age')} made blocks of {blocks.tokens} tokens, and its "
                f"compressed_tokens() says {most}"
            )
        more, bias = most - blocks.tokens, blocks.bias
        if not more:
            return blocks
        if bias is None:
            bias = blocks.keys.new_zeros(1, 1, 1, blocks.tokens, dtype=torch.float32)
        keys, values, offsets = (pad(x, (0, 0, 0, more)) for x in (blocks.keys, blocks.values, blocks.offsets))
        bias = pad(bias, (0, more), value=-torch.inf)
        return attrs.evolve(
            blocks, keys=keys, values=values, offsets=offsets, bias=bias, rotated=None, offsets_differ=True
        )

    def _digested(self, blocks: Blocks, moment: Moment) -> Tensor | None:
        """The digests of blocks that are archived, all of one size."""
        retriever = self.policy.retriever
        if not retriever.needs_digests:
            return None
        if blocks.rotated is None:
            blocks = attrs.evolve(blocks, rotated=_rotated(blocks, moment))
        made, held = retriever.digest(blocks, moment), self.digests.data
        what = called(self.layer, retriever, "digest")
        dtype = getattr(made, "dtype", None) if held is None else held.dtype
        shape = (*self.wide, blocks.count, None, None if held is None else held.shape[4])
        due = "[batch, kv_heads, blocks, digests, width]"
        check_returned(what, made, due, shape, dtype=dtype, device=moment.device)
        made = made.detach()
        longest = self.most_tokens[retriever.digests]
        room = retriever.digest_bytes(longest, moment.geometry) // (made.shape[4] * made.element_size())
        most = room if held is None else held.shape[3]
        if made.shape[3] > most:
            raise GeometryError(
                f"{what} made {made.shape[3]} digests of {made.shape[4] * made.element_size()} bytes of a block of "
                f"{blocks.tokens} tokens, and its digest_bytes() leaves room for {most} in the longest block, of "
                f"{longest} tokens; let it say the bytes of all digests of a block"
            )
        return pad(made, (0, 0, 0, most - made.shape[3]))

    def digest_again(self, policy: Policy, moment: Moment, count: int | None = None) -> Growing:
        """The digests of the first `count` archived blocks (None: of all) for the retriever of another policy."""
        made = Growing(2)
        if policy.retriever.needs_digests and self.count:
            wanted: Form = policy.retriever.digests
            form = wanted if wanted in self.stores else next(iter(self.stores))
            other = attrs.evolve(self, policy=policy, digests=made)
            for block in range(self.count if count is None else count):
                again = self.block(form, block)
                if policy.retriever.attention:  # none is kept; the digests show their shape alone
                    none = again.keys.new_zeros(len(again.keys), self.geometry.query_heads, 1, again.tokens).float()
                    again = attrs.evolve(again, attention=none)
                digest = other._digested(again, moment)
                if digest is not None:
                    made.append(digest)
        return made

    # ------------------------------------------------------------------ select and fetch

    @property
    def starts(self) -> Tensor | None:
        """The first step of every block, ascending."""
        return None if self.table.data is None else self.table.data[: self.count, 0]

    def select(self, query: Tensor | None, moment: Moment) -> Selection | None:
        """Score every block by `query` and choose; None if no block is to be attended."""
        policy, retriever = self.policy, self.policy.retriever
        if query is None and retriever.needs_query and self.count:
            raise SelectionError(
                f"{type(retriever).__name__} chooses by the query, but layer {self.layer} was given none; "
                "pass the current tokens' queries to select()"
            )
        count = retriever.count(policy.top_k, self.count)
        more = min(policy.top_k_compressed, self.count - count) if count else 0
        if not count:
            return None
        digests = self.digests.data
        scores = retriever.score(query, None if digests is None else digests[:, :, : self.count], self.count, moment)
        wide, who = self.wide, called(self.layer, retriever, "score")
        due = "[batch, kv_heads, archived], where the first two may be 1,"
        shape: Sizes = (*((1, n) for n in wide), self.count)
        check_returned(who, scores, due, shape, dtype=None, device=moment.device)
        ranked = choose(scores, count + more)
        best, next_best = ranked[..., :count].sort(-1).values, ranked[..., count:].sort(-1).values
        return Selection(
            chosen=best.expand(*wide, -1),
            compressed=next_best.expand(*wide, -1),
            shared=scores.shape[1] == 1 and not more,
        )

    def fetch(self, selection: Selection) -> Fetched:
        """The chosen blocks in the form that the policy attends, and those attended in compressed form beside them."""
        attend = self.policy.attend
        one = selection.chosen[:, :1] if selection.shared else selection.chosen
        chosen = self._fetch(attend, selection.chosen, one)
        if not selection.compressed.shape[-1]:
            return chosen
        both = merged(chosen, self._fetch("compressed", selection.compressed, selection.compressed), selection)
        if self.compressed_spans:
            return both
        total = self._most_steps(attend, selection.chosen.shape[-1] + selection.compressed.shape[-1])
        return attrs.evolve(both, total=total)

    def block(self, form: Form, number: int) -> Blocks:
        """Archived block `number` of every row and head, with its own length. Waits for the device."""
        device = None if self.table.data is None else self.table.data.device
        index = torch.full((*self.wide, 1), number, device=device)
        found = self._fetch(form, index, index[:, :1])
        tokens, offsets = self.most_tokens[form], found.where.offsets
        valid = tokens if found.bias is None else int((found.bias > -torch.inf).any(0).any(0).sum())
        return Blocks(
            keys=found.keys[:, :, None, :valid],
            values=found.values[:, :, None, :valid],
            offsets=offsets[:, :, None, :valid],
            starts=found.where.starts.flatten()[:1],
            span=int(found.spans.flatten()[0]),
            bias=None if found.bias is None else found.bias[:, :, None, :valid],
        )

    def parts(self, form: Form, index: Int[Tensor, "batch kv_heads chosen"]) -> tuple[Tensor, Tensor]:
        """Keys and values of some blocks as the codec reads them back, [batch, kv_heads, chosen, tokens, width]."""
        codec, geometry, lead = self.policy.codec, self.geometry, (*index.shape, self.most_tokens[form])
        made = codec.decode(self.stores[form].read(index), geometry.dtype)
        who, widths = called(self.layer, codec, "decode"), (geometry.head_dim, geometry.value_dim)
        return check_decoded(who, made, lead, widths, geometry.dtype, index.device)

    def _fetch(self, form: Form, index: Tensor, one: Tensor) -> Fetched:
        """The blocks of `index`; `one` is the same, of one KV head if that stands for all."""
        if self.table.data is None or not self.count:
            raise SelectionError(f"layer {self.layer} has no archived blocks to select")
        keys, values = self.parts(form, index)
        count = index.shape[-1]
        where, table = self.table.data[one], self.tokens[form]
        offsets, bias = table.offsets_at(index), table.bias_at(index)
        return Fetched(
            keys=keys.flatten(2, 3),
            values=values.flatten(2, 3),
            bias=None if bias is None else bias.flatten(2, 3),
            where=MidTokens(
                offsets=offsets.expand(*offsets.shape[:2], count, -1, -1).flatten(2, 3),
                starts=where[..., 0],
                placed=where[..., 0],
            ),
            spans=where[..., 1 if form == "full" else 2],
            total=self._most_steps(form, count),
            whole=form == "full" and not self.spans and table.constant is not None,
        )

    def _most_steps(self, form: Form, count: int) -> int:
        """The most steps that `count` of the blocks span together in one form."""
        if form == "compressed" and self.compressed_spans:
            return sum(self.compressed_spans[-count:])
        long = min(count, self.count - len(self.spans))
        rest = count - long
        return long * self.longest + (sum(self.spans[-rest:]) if rest else 0)

    # ------------------------------------------------------------------ as a whole

    def keep(self, forms: Collection[Form]) -> None:
        """Forget what is archived in other forms than these."""
        for name in ("stores", "tokens"):
            setattr(self, name, {form: held for form, held in getattr(self, name).items() if form in forms})

    def crop(self, steps: int) -> None:
        """Forget what waits for blocks beyond `steps`."""
        self.waiting = {start: held for start, held in self.waiting.items() if int(start) < steps}

    def join(self, budget: ByteBudget) -> None:
        """Count what the stores hold in `budget` from now on."""
        self.budget = budget
        for store in self.stores.values():
            store.join(budget)

    def undo(self, before: Mapping[str, Any]) -> None:
        super().undo(before)
        self._truncate()

    def select_rows(self, at: Tensor) -> "History":
        other = super().select_rows(at)
        other.geometry = attrs.evolve(self.geometry, batch=at.numel())
        return other


def _rotated(blocks: Blocks, moment: Moment) -> Tensor:
    """The keys of `blocks` at their original positions."""
    if moment.keys_rotated or moment.rotary is None:
        return blocks.keys
    positions = blocks.offsets.double().expand(*blocks.offsets.shape[:2], blocks.count, -1, -1).clone()
    positions[..., 0] += blocks.starts[:, None]
    return moment.rotary.rotate(blocks.keys, positions)
