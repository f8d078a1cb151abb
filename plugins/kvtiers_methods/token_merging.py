"""Compressor `token-merging`: tokens join the ones most like them, and a mean of n tokens counts n times.

Source: ToMe (arXiv 2210.09461) section 3: a bipartite match by the cosine of keys, and log n on the logits
("proportional attention"). Deviations: every `ratio`-th token of a block is one that others join, so a block always
comes to the same number; a merged token lies where the one lies that was joined.
"""

import attrs
import torch
from attrs import validators as v
from torch.nn.functional import normalize, one_hot

from kvtiers.blocks import Blocks
from kvtiers.slots import Compressor, Moment


@attrs.frozen(kw_only=True)
class TokenMerging(Compressor):
    """Of `ratio` tokens of a block one is left, which stands for all that joined it.

    proportional: whether a mean of n tokens is attended as much as n tokens.
    """

    ratio: int = attrs.field(default=4, validator=[v.instance_of(int), v.ge(1)])
    proportional: bool = attrs.field(default=True, validator=v.instance_of(bool))

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        keys, count = blocks.keys.float(), -(-blocks.tokens // self.ratio)
        unit = normalize(keys, dim=-1)
        into = (unit @ unit[..., :: self.ratio, :].mT).argmax(-1)
        into[..., :: self.ratio] = torch.arange(count, device=into.device)
        share = one_hot(into, count).to(keys.dtype).mT
        size = share.sum(-1)
        share = share / size[..., None]
        return attrs.evolve(
            blocks,
            keys=(share @ keys).to(blocks.keys.dtype),
            values=(share @ blocks.values.float()).to(blocks.values.dtype),
            offsets=blocks.offsets[..., :: self.ratio, :],
            rotated=None,
            bias=size.log() if self.proportional else None,
        )

    def compressed_tokens(self, tokens: int) -> int:
        return -(-tokens // self.ratio)
