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

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.slots import Moment
from kvtiers_methods.whole_past import Past, WholePast, best, fraction, unturned


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

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        past = Past.of(leaving, mid)
        return past.block(best(self.scores(past, moment), self.most), close_up=self.close_up)

    def scores(self, past: Past, moment: Moment) -> Tensor:
        """How much each token matters, [batch, kv_heads, tokens]."""
        if moment.queries is None:
            raise PolicyError("no queries were noted; a compressor says in `window` how many it needs")
        count, per_step = moment.queries.shape[2], moment.geometry.tokens_per_step
        were = moment.geometry.positions(moment.step - -(-count // per_step), moment.step, moment.device)[-count:]
        queries = unturned(moment.queries.float(), were, moment).unflatten(1, (past.keys.shape[1], -1))
        mean = queries.mean(3)
        apart = queries - mean[:, :, :, None]
        seen = self._as_they_will_be_seen(past, moment)
        channels = seen.shape[-1]
        logits = torch.einsum("bhgd,bhtd->bhgt", mean, seen) / channels**0.5
        spread = torch.einsum("bhgqd,bhtd->bhgqt", apart, seen).square().mean(3) / (2 * channels)
        share = (logits + spread + past.bias[:, :, None]).softmax(-1).mean(2)
        scores: Tensor = (share + self.epsilon) * past.values.float().norm(dim=-1) + past.bias
        return scores

    def _as_they_will_be_seen(self, past: Past, moment: Moment) -> Tensor:
        """Keys, so that the product with an unrotated query is the mean over the positions to come."""
        keys, rotary = past.keys.float(), moment.rotary
        if rotary is None:
            return keys
        if not moment.keys_rotated:
            keys = rotary.rotate(keys, past.offsets)
        to_come = torch.zeros(self.future, past.offsets.shape[-1], dtype=torch.float64, device=keys.device)
        to_come[:, 0] = moment.step + torch.arange(self.future, device=keys.device)
        cos, sin = (part.mean(0).expand(keys.shape[2], -1) for part in rotary.table(-to_come))
        seen: Tensor = rotary.apply(keys, (cos, sin))
        return seen
