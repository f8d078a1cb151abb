"""Retriever `affinity`: how much the queries like a block's summed keys (PackForcing, arXiv 2603.25730, section 3.3).

The paper's score is linear in queries and keys, s_m = sum_i sum_j (1 / (B N)) sum_b sum_{h < N} Q[b,h,i] . K[m,b,h,j] /
sqrt(d) with N half the heads, so one summed key per block, kept in float32, is an exact index. That is `heads="mean",
normalise="none", rows="mean"` with one digest a block. Deviations, named: by default each row scores for itself. Text
needs `heads="per-kv", normalise="softmax"` and fine digests (measured: a linear score finds no fact in prose), and
`combine="max"` keeps the perplexity of prose closer to full attention than the sum does.
"""

from typing import Literal

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float, Num
from torch import Tensor

from kvtiers.blocks import Blocks, Form
from kvtiers.errors import SlotError
from kvtiers.geometry import Geometry, spread
from kvtiers.slots import Moment, Retriever
from kvtiers_policies.digests import absent, groups, query_groups
from kvtiers_policies.packing import Packing

_OPTIONAL_COUNT = v.optional([v.instance_of(int), v.ge(1)])


@attrs.frozen(kw_only=True)
class Affinity(Retriever):
    """Attend the blocks whose keys the queries match best.

    heads: `mean` averages the first half of the query heads, and all KV heads attend the same blocks; `per-kv` lets
        every KV head choose by the sum over its own query heads.
    normalise: `none` sums q . k / sqrt(d) over a block's keys; `softmax` takes, for each query, the softmax over the
        mean keys of all digests of all blocks, and sums a block's share.
    combine: `sum` adds up what a block got from all queries and digests (and heads); `max` takes the largest, so that a
        block which one query needs is not outvoted by blocks that many queries like a little.
    digest_tokens: keys that one digest covers; None: the whole block.
    digest_bits: bits per channel of a digest, 1, 2, 3, 4 or 8 (see `packing.Packing`); None: digests are float32.
    rows: `each` row of a batch chooses for itself, or by the `mean` over the batch (the paper's).
    form: whether the `full` or the `compressed` keys of a block are digested (the paper's: compressed).
    queries: how many evenly spaced queries are looked at; None: all. A query of zeros (a pad) changes no ranking.
    """

    heads: Literal["mean", "per-kv"] = attrs.field(default="mean", validator=v.in_(("mean", "per-kv")))
    normalise: Literal["none", "softmax"] = attrs.field(default="none", validator=v.in_(("none", "softmax")))
    combine: Literal["sum", "max"] = attrs.field(default="sum", validator=v.in_(("sum", "max")))
    digest_tokens: int | None = attrs.field(default=None, validator=_OPTIONAL_COUNT)
    digest_bits: int | None = attrs.field(default=None, validator=v.optional(v.in_((1, 2, 3, 4, 8))))
    rows: Literal["each", "mean"] = attrs.field(default="each", validator=v.in_(("each", "mean")))
    form: Form = attrs.field(default="full", validator=v.in_(("full", "compressed")))
    queries: int | None = attrs.field(default=None, validator=_OPTIONAL_COUNT)

    @property
    def digests(self) -> Form:
        return self.form

    @property
    def packing(self) -> Packing | None:
        """How digests are written; None: as they are."""
        return None if self.digest_bits is None else Packing(self.digest_bits)

    def digest(self, blocks: Blocks, moment: Moment) -> Num[Tensor, "batch kv_heads blocks digests width"]:
        """The sum of each group's keys; their mean for `softmax`, where the last group may be smaller."""
        softmax = self.normalise == "softmax"
        parts = [g.mean(-2) if softmax else g.sum(-2) for g in groups(blocks, self.digest_tokens)]
        digests = torch.stack(parts, dim=-2)
        return digests if self.packing is None else self.packing.pack(digests)

    def digest_bytes(self, tokens: int, geometry: Geometry) -> int:
        width = 4 * geometry.head_dim if self.packing is None else self.packing.width(geometry.head_dim)
        return width * -(-tokens // (self.digest_tokens or tokens))

    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Tensor | None,
        archived: int,
        moment: Moment,
    ) -> Float[Tensor, "#batch #kv_heads archived"]:
        if query is None or digests is None:
            raise SlotError("retriever 'affinity' needs a query and digests")
        if self.queries is not None and self.queries < query.shape[2]:
            query = query.index_select(2, spread(self.queries, query.shape[2], query.device))
        if self.heads == "mean":
            half, group = max(1, query.shape[1] // 2), query.shape[1] // digests.shape[1]
            kv_heads = -(-half // group)  # of the others nothing is looked at
            some = query[:, : kv_heads * group].float()
            per_head = self._per_head(some, digests[:, :kv_heads], moment)
            scores = per_head.flatten(1, 2)[:, :half].mean(1, keepdim=True)
        else:
            per_head = self._per_head(query.float(), digests, moment)
            scores = per_head.sum(2) if self.combine == "sum" else per_head.amax(2)
        return scores.mean(0, keepdim=True) if self.rows == "mean" else scores

    def _per_head(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"],
        digests: Num[Tensor, "batch kv_heads blocks digests width"],
        moment: Moment,
    ) -> Float[Tensor, "batch kv_heads group blocks"]:
        """The score of every block for every query head, over all queries."""
        grouped = query_groups(query, digests.shape[1]) / query.shape[-1] ** 0.5
        if self.normalise == "none" and self.combine == "sum":
            grouped = grouped.sum(3, keepdim=True)
            if self.packing is None:
                of_block = digests[:, :, :, 0] if digests.shape[3] == 1 else digests.sum(3)
                return torch.einsum("bkhd,bknd->bkhn", grouped.squeeze(3), of_block)
        logits = self._logits(grouped, digests.flatten(2, 3))
        if moment.blocks_differ and (self.normalise == "softmax" or self.combine == "max"):
            logits = logits.masked_fill(absent(digests).flatten(2)[:, :, None, None], -torch.inf)
        shares: Tensor = logits.softmax(-1) if self.normalise == "softmax" else logits
        of_block = (shares.amax(3) if self.combine == "max" else shares.sum(3)).unflatten(-1, digests.shape[2:4])
        scores: Tensor = of_block.amax(-1) if self.combine == "max" else of_block.sum(-1)
        return scores

    def _logits(
        self,
        grouped: Float[Tensor, "batch kv_heads group queries head_dim"],
        digests: Num[Tensor, "batch kv_heads digests width"],
    ) -> Float[Tensor, "batch kv_heads group queries digests"]:
        if self.packing is None:
            return torch.einsum("bkhqd,bkmd->bkhqm", grouped, digests)
        logits: Tensor = self.packing.products(grouped.flatten(2, 3), digests).unflatten(2, grouped.shape[2:4])
        return logits
