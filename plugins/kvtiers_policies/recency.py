"""Retriever `recency`: the newest archived blocks are attended, first in, first out.

It is the baseline of PackForcing's ablation (arXiv 2603.25730, section 4.3, "FIFO").
"""

from typing import ClassVar

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers.slots import Moment, Retriever


@attrs.frozen(kw_only=True)
class Recency(Retriever):
    """Attend the newest `top_k` archived blocks, whatever the query."""

    needs_query: ClassVar[bool] = False
    needs_digests: ClassVar[bool] = False

    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Tensor | None,
        archived: int,
        moment: Moment,
    ) -> Float[Tensor, "1 1 archived"]:
        return torch.arange(archived, dtype=torch.float32, device=moment.device)[None, None]
