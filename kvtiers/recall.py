"""Fetching selected blocks from their stores and laying their tokens out in order of origin."""

from collections.abc import Mapping

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers.archive import BlockStore
from kvtiers.blocks import Form, Selection
from kvtiers.lengths import Lengths


@attrs.frozen(eq=False, kw_only=True)
class MidTokens:
    """Where the mid tokens of a context come from and lie.

    offsets: [batch | 1, kv_heads | 1, tokens, axes] from the start of each token's block; starts, placed: the blocks'
    original and placed first steps, in order; owner: each token's block (its rank), or none for runs of equal size.
    valid: [batch, kv_heads | 1, tokens], false for the padding that stands behind a shorter block; `None` if
        there is none.
    """

    offsets: Tensor
    starts: Tensor
    placed: Tensor
    owner: Tensor | None
    valid: Tensor | None = None

    def at(self, starts: Tensor) -> Tensor:
        """Positions of the tokens when the blocks begin at `starts`."""
        if self.owner is None:
            per_token = starts.repeat_interleave(self.offsets.shape[-2] // starts.shape[-1], dim=-1)
        else:
            per_token = starts.expand(*self.owner.shape[:2], -1).gather(-1, self.owner)
        lead = torch.broadcast_shapes(per_token.shape[:-1], self.offsets.shape[:-2])
        positions = self.offsets.double().expand(*lead, *self.offsets.shape[-2:]).clone()
        positions[..., 0] += per_token
        return positions


@attrs.frozen(eq=False, kw_only=True)
class Recalled:
    """Recalled blocks as consecutive tokens, in order of origin; spans in steps, and the most that they sum up to."""

    keys: Tensor
    values: Tensor
    where: MidTokens
    spans: Tensor
    total: int
    whole: bool = False
    """Whether the tokens are every step of their blocks, in order."""


def recall(
    stores: Mapping[Form, BlockStore],
    selection: Selection,
    form: Form,
    starts: Int[Tensor, " archived"],
    lengths: Mapping[Form, Lengths],
) -> Recalled:
    """Fetch the chosen blocks in `form`, and the others in compressed form.

    starts: all blocks' first steps. lengths: how long they are, where they differ.
    """
    one = selection.chosen[:, :1] if selection.shared else selection.chosen
    chosen = _fetch(stores[form], selection.chosen, one, starts, lengths.get(form), whole=form == "full")
    if not selection.compressed.shape[-1]:
        return chosen
    compressed = _fetch(
        stores["compressed"], selection.compressed, selection.compressed, starts, lengths.get("compressed")
    )
    merged = _merge(chosen, compressed, selection)
    if not lengths:
        return merged
    count = selection.chosen.shape[-1] + selection.compressed.shape[-1]
    return attrs.evolve(merged, total=max(part.most(count) for part in lengths.values()))


def _fetch(
    store: BlockStore,
    index: Int[Tensor, "batch kv_heads chosen"],
    one: Int[Tensor, "#batch #kv_heads chosen"],
    starts: Tensor,
    lengths: Lengths | None,
    *,
    whole: bool = False,
) -> Recalled:
    """The blocks of `index`; `one` is the same, of one KV head if that stands for all."""
    keys, values, offsets = store.read(index)
    count = index.shape[-1]
    first = starts[one]
    wide = offsets.expand(*offsets.shape[:2], count, -1, -1).flatten(2, 3)
    valid = None if lengths is None else lengths.valid(one, keys.shape[3])
    return Recalled(
        keys=keys.flatten(2, 3),
        values=values.flatten(2, 3),
        where=MidTokens(offsets=wide, starts=first, placed=first, owner=None, valid=valid),
        spans=torch.full_like(first, store.span) if lengths is None else lengths.spans_of(one),
        total=count * store.span if lengths is None else lengths.most(count),
        whole=whole and lengths is None,
    )


def _merge(chosen: Recalled, compressed: Recalled, selection: Selection) -> Recalled:
    """Both runs of blocks as one, in order of origin, which differs by row and head."""
    index = torch.cat([selection.chosen, selection.compressed], -1)
    order = index.argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1, stable=True)
    counts = [part.spans.shape[-1] for part in (chosen, compressed)]
    sizes = [part.keys.shape[2] // count for part, count in zip((chosen, compressed), counts, strict=True)]
    each = torch.tensor(sizes, device=index.device).repeat_interleave(torch.tensor(counts, device=index.device))
    owner = rank.repeat_interleave(each, dim=-1)
    at = owner.argsort(dim=-1, stable=True)
    lead = index.shape[:2]
    offsets = torch.cat([part.where.offsets.expand(*lead, -1, -1) for part in (chosen, compressed)], 2)
    starts = torch.cat([chosen.where.starts, compressed.where.starts], -1).gather(-1, order)
    valid = None
    if chosen.where.valid is not None or compressed.where.valid is not None:
        parts = [_all_valid(part) if part.where.valid is None else part.where.valid for part in (chosen, compressed)]
        valid = torch.cat(parts, -1).gather(-1, at)
    return Recalled(
        keys=_along_tokens(torch.cat([chosen.keys, compressed.keys], 2), at),
        values=_along_tokens(torch.cat([chosen.values, compressed.values], 2), at),
        where=MidTokens(
            offsets=_along_tokens(offsets, at), starts=starts, placed=starts, owner=owner.gather(-1, at), valid=valid
        ),
        spans=torch.cat([chosen.spans, compressed.spans], -1).gather(-1, order),
        total=chosen.total + compressed.total,
    )


def _all_valid(part: Recalled) -> Tensor:
    """That no token of `part` is padding."""
    return torch.ones(part.keys.shape[:3], dtype=torch.bool, device=part.keys.device)


def _along_tokens(x: Float[Tensor, "batch kv_heads tokens width"], at: Int[Tensor, "batch kv_heads tokens"]) -> Tensor:
    """Reorder tokens, for every row and head on its own."""
    return x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[-1]))
