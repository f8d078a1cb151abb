"""Compressor `duo-attention`: some heads attend all of the past, the others only sink and recent.

Source: DuoAttention (arXiv 2410.10819) section 2. The paper finds the retrieval heads by optimisation; here they are
given, for each layer through `kvtiers.policy(compressor={0: ..., "*": ...})`. Deviation: the keys of the other heads
are held too, since a layer's heads are of one length, so nothing is saved on memory.
"""

from collections.abc import Sequence

import attrs
import torch
from attrs import validators as v

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.slots import Moment
from kvtiers_methods.whole_past import Past, WholePast


def _heads(value: Sequence[int] | int) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


@attrs.frozen(kw_only=True)
class DuoAttention(WholePast):
    """The KV heads `retrieval_heads` attend up to `most` tokens of the past, the newest; the others none of it."""

    retrieval_heads: tuple[int, ...] = attrs.field(
        default=(0,), converter=_heads, validator=v.deep_iterable([v.instance_of(int), v.ge(0)])
    )
    most: int = attrs.field(default=32768, validator=[v.instance_of(int), v.ge(1)])

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        past, (batch, heads) = Past.of(leaving, mid), leaving.keys.shape[:2]
        if absent := [head for head in self.retrieval_heads if head >= heads]:
            raise PolicyError(f"retrieval_heads = {absent}: layer {moment.layer} has KV heads 0 to {heads - 1}")
        count = past.keys.shape[2]
        newest = torch.arange(max(0, count - self.most), count, device=past.keys.device).expand(batch, heads, -1)
        bias = torch.full(newest.shape, -torch.inf, device=newest.device, dtype=past.bias.dtype)
        bias[:, list(self.retrieval_heads)] = 0
        return past.block(newest, close_up=self.close_up, bias=bias)
