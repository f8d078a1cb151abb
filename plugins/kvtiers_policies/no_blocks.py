"""Retriever `none`: no archived block is attended (StreamingLLM, arXiv 2309.17453: sinks and window only)."""

from typing import ClassVar

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers.slots import Moment, Retriever


@attrs.frozen(kw_only=True)
class NoBlocks(Retriever):
    """Attend sink and recent only, whatever `top_k` says."""

    needs_query: ClassVar[bool] = False
    needs_digests: ClassVar[bool] = False

    def most(self, top_k: int) -> int:
        return 0

    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Tensor | None,
        archived: int,
        moment: Moment,
    ) -> Float[Tensor, "1 1 archived"]:
        return torch.zeros(1, 1, archived, device=moment.device)
