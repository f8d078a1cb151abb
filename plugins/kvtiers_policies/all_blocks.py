"""Retriever `all`: every archived block is attended, as in plain attention (arXiv 1706.03762)."""

from typing import ClassVar

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers.policy import Retriever


@attrs.frozen(kw_only=True)
class AllBlocks(Retriever):
    """Attend everything, whatever `top_k` says: the context grows without limit."""

    needs_query: ClassVar[bool] = False
    needs_digests: ClassVar[bool] = False

    def count(self, top_k: int, archived: int) -> int:
        return archived

    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Float[Tensor, "batch kv_heads blocks digests width"] | None,
        archived: int,
    ) -> Float[Tensor, "1 1 archived"]:
        return torch.ones(1, 1, archived, device=None if query is None else query.device)
