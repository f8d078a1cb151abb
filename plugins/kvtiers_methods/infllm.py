"""Retriever `infllm`: a block is known by the few of its tokens that were attended most while they were recent.

Source: InfLLM (arXiv 2402.04617) section 3.2. The representative tokens of a block are those to which the tokens after
them, in the local window (`recent`), give the largest score; a block's relevance is the sum of q . k over all queries,
representative tokens and heads, and all heads of a layer attend the same blocks. As in the authors' code, every query
head has representatives of its own, and a token's score is the sum of attention weights (the paper's: of q . k).
Deviations: the attention is that over the whole context, which sink and fetched blocks share; and keys lie where they
were, where the paper puts all that is beyond the window at one distance (`distance=n` scores so; what is attended is
placed by the realigner).
"""

from typing import ClassVar, Literal

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.rotary import Rotary
from kvtiers.slots import Moment, Retriever
from kvtiers_methods.whole_past import positions_of
from kvtiers_policies.digests import groups, query_groups


@attrs.frozen(kw_only=True)
class InfLLM(Retriever):
    """Attend the blocks whose representative tokens the queries match best.

    representatives: how many tokens of a block they are, for each query head. distance: at how many steps from a query
    all of them are taken to lie (None: where they do lie).
    """

    attention: ClassVar[Literal["sum", "max"] | None] = "sum"
    representatives: int = attrs.field(default=4, validator=[v.instance_of(int), v.ge(1)])
    distance: int | None = attrs.field(default=None, validator=v.optional([v.instance_of(int), v.ge(0)]))

    @property
    def needs_rotary(self) -> bool:
        return self.distance is not None

    def digest(self, blocks: Blocks, moment: Moment) -> Float[Tensor, "batch kv_heads blocks group head_dim"]:
        """The sum of the representatives' keys, for each query head of a KV head: all that the score needs."""
        if blocks.attention is None:
            raise PolicyError("no attention was noted of these blocks; retriever 'infllm' works in a layer alone")
        (keys,) = groups(blocks, None)
        if self.distance is not None:
            keys = _moved(keys, -positions_of(blocks)[..., 0], moment.rotary)
        seen = query_groups(blocks.attention, keys.shape[1]).transpose(2, 3)  # [batch, kv_heads, blocks, group, tokens]
        found = seen.topk(min(self.representatives, blocks.tokens), -1).indices
        chosen = torch.zeros_like(seen).scatter(-1, found, 1)
        digests: Tensor = chosen @ keys
        return digests

    def digest_bytes(self, tokens: int, geometry: Geometry) -> int:
        return 4 * geometry.head_dim * (geometry.query_heads // geometry.kv_heads)

    def score(
        self,
        query: Float[Tensor, "batch query_heads queries head_dim"] | None,
        digests: Tensor | None,
        archived: int,
        moment: Moment,
    ) -> Float[Tensor, "batch 1 archived"]:
        if query is None or digests is None:
            raise SlotError("retriever 'infllm' needs a query and digests")
        query = query.float()
        if self.distance is not None:
            steps = -(-query.shape[2] // moment.geometry.tokens_per_step)
            were = moment.geometry.positions(moment.step, moment.step + steps, moment.device)[: query.shape[2], 0]
            query = _moved(query, self.distance - were, moment.rotary)
        asked = query_groups(query.sum(2, keepdim=True), digests.shape[1])[:, :, :, 0]
        return torch.einsum("bkgd,bkngd->bn", asked, digests)[:, None]


def _moved(x: Float[Tensor, "*batch tokens head_dim"], steps: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotated keys or queries, turned by so many steps more, [.., tokens]."""
    if rotary is None:
        return x
    further = torch.zeros(*steps.shape, rotary.axes, dtype=torch.float64, device=x.device)
    further[..., 0] = steps
    cos, sin = (part / rotary.scaling for part in rotary.table(further))
    return rotary.apply(x, (cos, sin))
