"""Mid tokens: blocks as they are fetched into a context, and where each token comes from and lies."""

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers.blocks import Selection
from kvtiers.state import State, broadcast


@attrs.define(eq=False, slots=False, kw_only=True)
class MidTokens(State):
    """Where the mid tokens of a context come from and lie.

    offsets: [batch | 1, kv_heads | 1, tokens, axes] from the start of each token's block; starts, placed: the blocks'
    original and placed first steps, [batch | 1, kv_heads | 1, blocks], in order; owner: each token's block (its rank),
    or None for runs of equal size.
    """

    offsets: Tensor = broadcast()
    starts: Tensor = broadcast()
    placed: Tensor = broadcast()
    owner: Tensor | None = broadcast()

    def at(self, starts: Tensor) -> Tensor:
        """Positions of the tokens when the blocks begin at `starts`."""
        if self.owner is None:
            per_token = starts.repeat_interleave(self.offsets.shape[-2] // starts.shape[-1], dim=-1)
        else:
            per_token = starts.expand(*self.owner.shape[:2], -1).gather(-1, self.owner)
        lead = [max(a, b) for a, b in zip(per_token.shape[:2], self.offsets.shape[:2], strict=True)]  # one is 1 if any
        positions = self.offsets.double().expand(*lead, *self.offsets.shape[-2:]).clone()
        positions[..., 0] += per_token
        return positions


@attrs.frozen(eq=False, kw_only=True)
class Fetched:
    """Blocks as consecutive tokens, in order of origin; spans in steps, and the most that they sum up to.

    whole: whether the tokens are every step of their blocks, in order.
    """

    keys: Float[Tensor, "batch kv_heads tokens head_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]
    bias: Float[Tensor, "#batch #kv_heads tokens"] | None
    where: MidTokens
    spans: Int[Tensor, "#batch #kv_heads blocks"]
    total: int
    whole: bool = False
    attention: Float[Tensor, "batch query_heads tokens"] | None = None


def merged(chosen: Fetched, further: Fetched, selection: Selection) -> Fetched:
    """Both runs of blocks as one, in order of origin, which differs by row and head."""
    both = (chosen, further)
    index = torch.cat([selection.chosen, selection.compressed], -1)
    order = index.argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1, stable=True)
    counts = [part.spans.shape[-1] for part in both]
    sizes = [part.keys.shape[2] // count for part, count in zip(both, counts, strict=True)]
    each = torch.tensor(sizes, device=index.device).repeat_interleave(torch.tensor(counts, device=index.device))
    owner = rank.repeat_interleave(each, dim=-1)
    at = owner.argsort(dim=-1, stable=True)
    token = at[..., None]
    lead = index.shape[:2]
    offsets = torch.cat([part.where.offsets.expand(*lead, -1, -1) for part in both], 2)
    starts = torch.cat([part.where.starts.expand(*lead, -1) for part in both], -1).gather(-1, order)
    bias = None
    if any(part.bias is not None for part in both):
        parts = [part.keys.new_zeros(part.keys.shape[:3], dtype=torch.float32) if part.bias is None else part.bias
                 for part in both]  # fmt: skip
        bias = torch.cat(parts, -1).gather(-1, at)
    return Fetched(
        keys=torch.cat([part.keys for part in both], 2).take_along_dim(token, 2),
        values=torch.cat([part.values for part in both], 2).take_along_dim(token, 2),
        bias=bias,
        where=MidTokens(
            offsets=offsets.take_along_dim(token, 2), starts=starts, placed=starts, owner=owner.gather(-1, at)
        ),
        spans=torch.cat([part.spans.expand(*lead, -1) for part in both], -1).gather(-1, order),
        total=chosen.total + further.total,
    )
