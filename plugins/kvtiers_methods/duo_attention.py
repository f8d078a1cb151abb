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


def _written(value: Sequence[int] | int | str) -> str:
    """Heads as an option can be written down: their numbers, with spaces between."""
    return value if isinstance(value, str) else " ".join(map(str, [value] if isinstance(value, int) else value))


@attrs.frozen(kw_only=True)
class DuoAttention(WholePast):
    """The KV heads `retrieval_heads` attend up to `most` tokens of the past, the newest; the others none of it.

    retrieval_heads: their numbers, as a sequence or as text with spaces between.
    """

    retrieval_heads: str = attrs.field(default="0", converter=_written)
    most: int = attrs.field(default=32768, validator=[v.instance_of(int), v.ge(1)])

    @retrieval_heads.validator
    def _check_heads(self, _: object, value: str) -> None:
        if not all(head.isascii() and head.isdigit() for head in value.split()):
            raise PolicyError(f"retrieval_heads are whole numbers, as in '0 2', got {value!r}")

    @property
    def heads(self) -> list[int]:
        """The numbers of the heads that retrieve."""
        return [int(head) for head in self.retrieval_heads.split()]

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        past, (batch, heads) = Past.of(leaving, mid), leaving.keys.shape[:2]
        if absent := [head for head in self.heads if head >= heads]:
            raise PolicyError(f"retrieval_heads has {absent}, but layer {moment.layer} has KV heads 0 to {heads - 1}")
        count = past.keys.shape[2]
        newest = torch.arange(max(0, count - self.most), count, device=past.keys.device).expand(batch, heads, -1)
        bias = torch.full(newest.shape, -torch.inf, device=newest.device, dtype=past.bias.dtype)
        bias[:, self.heads] = 0
        return past.block(newest, close_up=self.close_up, bias=bias)
