"""Compressor `expected-attention`: what queries to come are expected to attend stays, weighed by the norm of values.

Source: Expected Attention (arXiv 2510.00636) section 3: future queries are taken to be normally distributed, with the
mean and covariance of the latest ones before rotation, rotated by the mean of the rotations of the next `future`
positions. Then E[exp(q k / sqrt(d))] = exp(q k / sqrt(d) + k S k / 2d) for their mean q and covariance S. Deviations:
the statistics are of the latest `window` queries and not of the whole prompt, and the query heads of a KV head choose
together, by the mean of their shares.
"""

from typing import ClassVar

import attrs
import torch
from attrs import validators as v
from torch import Tensor

from kvtiers.slots import Moment
from kvtiers_methods.whole_past import Past, WholePast, fraction, seen_from, unrotated_queries


@attrs.frozen(kw_only=True)
class ExpectedAttention(WholePast):
    """Each KV head keeps the `most` tokens with the largest expected attention times norm of value.

    window: how many of the latest queries say how later ones are distributed. future: how many positions these may
    have. epsilon: what is added to an expected attention before it is weighed.
    """

    window: int = attrs.field(default=128, validator=[v.instance_of(int), v.ge(2)])
    future: int = attrs.field(default=512, validator=[v.instance_of(int), v.ge(1)])
    epsilon: float = fraction(0.0, v.ge(0))
    attention: ClassVar[None] = None
    needs_rotary: ClassVar[bool] = True

    def scores(self, past: Past, moment: Moment) -> Tensor:
        queries = unrotated_queries(past, moment)
        mean = queries.mean(3)
        apart = queries - mean[:, :, :, None]
        seen = seen_from(past, moment, torch.arange(self.future, dtype=torch.float64, device=moment.device))
        channels = seen.shape[-1]
        logits = torch.einsum("bhgd,bhtd->bhgt", mean, seen) / channels**0.5
        spread = torch.einsum("bhgqd,bhtd->bhgqt", apart, seen).square().mean(3) / (2 * channels)
        share = (logits + spread + past.bias[:, :, None]).softmax(-1).mean(2)
        scores: Tensor = (share + self.epsilon) * past.values.float().norm(dim=-1) + past.bias
        return scores
