"""Compressor `snapkv`: what the latest queries attend most stays, with its neighbours.

Source: SnapKV (arXiv 2404.14469) section 4. The paper compresses a prompt once, when it was read: `recent=None`, then
`cache.compact(recent=window)`. With a number for `recent`, tokens are chosen anew whenever some leave it, by the
queries of that moment. Deviations: the query heads of a KV head choose together, pooling takes the mean, and the
neighbours of a token are those that are left.
"""

from typing import ClassVar

import attrs
from attrs import validators as v
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvtiers.slots import Attention, Moment
from kvtiers_methods.whole_past import Past, WholePast


@attrs.frozen(kw_only=True)
class SnapKV(WholePast):
    """Each KV head keeps the `most` tokens that the latest queries attend most, after pooling.

    window: how many of the latest queries are looked at. pool: over so many neighbouring tokens the mean is taken; odd.
    """

    attention: ClassVar[Attention | None] = "latest"
    window: int = attrs.field(default=32, validator=[v.instance_of(int), v.ge(1)])
    pool: int = attrs.field(default=5, validator=[v.instance_of(int), v.ge(1)])

    @pool.validator
    def _check_odd(self, _: object, value: int) -> None:
        if value % 2 == 0:
            raise ValueError(f"'pool' must be odd, so that a token lies in the middle, got {value}")

    def scores(self, past: Past, moment: Moment) -> Tensor:
        return avg_pool1d(past.mass(), self.pool, 1, self.pool // 2)
