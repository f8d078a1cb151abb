"""Retriever `page-bounds`: an upper bound of a block's best logit (Quest, arXiv 2406.10774, section 3.2)."""

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor

from kvtiers.blocks import Blocks
from kvtiers.errors import SlotError
from kvtiers.geometry import Geometry
from kvtiers.slots import Moment, Retriever
from kvtiers_policies.digests import absent, groups, query_groups


@attrs.frozen(kw_only=True)
class PageBounds(Retriever):
    """Score a block by the highest possible q . k, from the least and greatest value of each key channel.

    The score is sum over channels c of max(q_c min_c, q_c max_c), and of these the maximum over the block's digests,
    over the queries, and over the query heads that share a KV head. A query of zeros (a pad) does not count.

    digest_tokens: keys that one digest covers (None: the whole block). Quest's page is a block of 16 tokens.
    """

    digest_tokens: int | None = attrs.field(default=None, validator=v.optional([v.instance_of(int), v.ge(1)]))

    def digest(self, blocks: Blocks, moment: Moment) -> Float[Tensor, "batch kv_heads blocks digests width"]:
        """Per digest, the least value of each channel, then the greatest, in float32."""
        parts = [torch.cat([g.amin(-2), g.amax(-2)], dim=-1) for g in groups(blocks, self.digest_tokens)]
        return torch.stack(parts, dim=-2)

    def digest_bytes(self, tokens: int, geometry: Geometry) -> int:
        return 4 * 2 * geometry.head_dim * -(-tokens // (self.digest_tokens or tokens))

    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Tensor | None,
        archived: int,
        moment: Moment,
    ) -> Float[Tensor, "batch kv_heads archived"]:
        if query is None or digests is None:
            raise SlotError("retriever 'page-bounds' needs a query and digests")
        least, greatest = digests.chunk(2, dim=-1)
        grouped = query_groups(query.float(), digests.shape[1]).flatten(2, 3)
        bounds = torch.einsum("bkqd,bkngd->bkqng", grouped.clamp(min=0), greatest)
        bounds += torch.einsum("bkqd,bkngd->bkqng", grouped.clamp(max=0), least)
        if moment.blocks_differ:
            bounds = bounds.masked_fill(absent(digests)[:, :, None], -torch.inf)
        pads = (grouped == 0).all(-1)
        return bounds.amax(-1).masked_fill(pads[..., None], -torch.inf).amax(2)
