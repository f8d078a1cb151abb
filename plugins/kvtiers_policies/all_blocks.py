"""Retriever `all`: every archived block is attended, as in plain attention (arXiv 1706.03762)."""

from typing import ClassVar

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers.slots import Moment, Retriever


@attrs.frozen(kw_only=True)
class AllBlocks(Retriever):
    """Attend everything, whatever `top_k` says: the context grows without limit."""

    needs_query: ClassVar[bool] = False
    needs_digests: ClassVar[bool] = False
    attends_all: ClassVar[bool] = True

    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Tensor | None,
        archived: int,
        moment: Moment,
    ) -> Float[Tensor, "1 1 archived"]:
        return torch.ones(1, 1, archived, device=moment.device)
