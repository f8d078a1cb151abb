"""Retriever `landmarks`: the blocks whose mean key the queries attend, and those that no mean can stand for.

Source: ShadowKV (arXiv 2410.21465) algorithms 1 (prefilling) and 2 (decoding): a block's landmark is the mean of its
rotated keys, its score the softmax over all landmarks, summed over queries, and the maximum over the query heads of a
KV head. Outliers, the blocks that hold the keys least like their mean, are attended whatever is asked, and do not take
part in the softmax. Deviations: outliers are found anew with every selection among what is archived, where the paper
finds them once after the prompt; and a lossy codec writes them as it writes others, where the paper keeps them exactly.
"""

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvtiers.blocks import Blocks
from kvtiers.errors import SlotError
from kvtiers.geometry import Geometry
from kvtiers.slots import Moment, Retriever
from kvtiers_policies.digests import groups, query_groups


@attrs.frozen(kw_only=True)
class Landmarks(Retriever):
    """Attend `top_k` blocks by their landmark, each KV head its own, and `outliers` more."""

    outliers: int = attrs.field(default=2, validator=[v.instance_of(int), v.ge(0)])

    def most(self, top_k: int) -> int:
        return top_k + self.outliers

    def digest(self, blocks: Blocks, moment: Moment) -> Float[Tensor, "batch kv_heads blocks 1 width"]:
        """The mean key, then the least cosine of a key with it, in float32."""
        (keys,) = groups(blocks, None)
        mean = keys.mean(3, keepdim=True)
        least = cosine_similarity(keys, mean, dim=-1).amin(-1)
        return torch.cat([mean, least[..., None, None]], -1)

    def digest_bytes(self, tokens: int, geometry: Geometry) -> int:
        return 4 * (geometry.head_dim + 1)

    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Tensor | None,
        archived: int,
        moment: Moment,
    ) -> Float[Tensor, "batch kv_heads archived"]:
        if query is None or digests is None:
            raise SlotError("retriever 'landmarks' needs a query and digests")
        landmarks, least = digests[:, :, :, 0, :-1], digests[:, :, :, 0, -1]
        if archived <= self.outliers:
            return torch.zeros_like(least)
        found = least.sort(dim=-1, stable=True).indices[..., : self.outliers]
        grouped = query_groups(query.float(), landmarks.shape[1]) / query.shape[-1] ** 0.5
        logits = torch.einsum("bkgqd,bknd->bkgqn", grouped, landmarks)
        outlier = torch.zeros_like(least, dtype=torch.bool).scatter(-1, found, True)
        shares = logits.masked_fill(outlier[:, :, None, None], -torch.inf).softmax(-1)
        return shares.sum(3).amax(2).masked_fill(outlier, torch.inf)
