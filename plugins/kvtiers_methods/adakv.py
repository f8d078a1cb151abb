"""Compressor `adakv`: the KV heads of a layer share a budget, so that a head which needs more tokens has more.

Source: Ada-KV (arXiv 2407.11550) section 3.2, with the attention of H2O as its score. Deviations: no head is promised
a least share (the paper's safeguard), and heads are padded to the widest one's tokens, which are then not attended.
"""

from typing import ClassVar

import attrs
import torch
from attrs import validators as v

from kvtiers.blocks import Blocks
from kvtiers.slots import Attention, Compressor, Moment
from kvtiers_methods.whole_past import Past, WholePast


@attrs.frozen(kw_only=True)
class AdaKV(WholePast):
    """The KV heads of a layer keep the tokens with the most attention: `mean` a head on average, never above `most`."""

    attention: ClassVar[Attention | None] = "sum"
    mean: int = attrs.field(default=508, validator=[v.instance_of(int), v.ge(1)])
    most: int = attrs.field(default=1016, validator=[v.instance_of(int), v.ge(1)])

    def scaled(self, share: float) -> Compressor:
        return attrs.evolve(self, mean=max(1, round(self.mean * share)), most=max(1, round(self.most * share)))

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        past = Past.of(leaving, mid)
        scores = past.mass()
        first = torch.full_like(scores, -torch.inf)  # of each head no more than `most` compete
        strongest = scores.topk(min(self.most, scores.shape[-1]), -1)
        scores = first.scatter(-1, strongest.indices, strongest.values)
        chosen = scores.flatten(1).topk(min(self.mean * scores.shape[1], scores[0].numel())).indices
        alive = torch.zeros_like(scores, dtype=torch.bool).flatten(1).scatter(1, chosen, value=True).view_as(scores)
        alive &= scores > -torch.inf
        width = int(alive.sum(-1).max())
        at = alive.int().sort(dim=-1, descending=True, stable=True).indices[..., :width]
        bias = torch.zeros_like(scores).masked_fill(~alive, -torch.inf).gather(-1, at)
        return past.block(at, close_up=self.close_up, bias=bias)
