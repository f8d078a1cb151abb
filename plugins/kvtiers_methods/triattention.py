"""Compressor `triattention`: what queries like the latest ones prefer by content and distance stays.

Source: TriAttention (arXiv 2604.04921), its score of a key: before rotation, the queries of a head lie around a center,
so what they give a key is a trigonometric series in its distance, S_trig = sum over pairs of channels f of
|E q_f| |k_f| cos(w_f D + arg E q_f - arg k_f), the mean over D = now + 1, 2, 4, ... steps from the key; and where they
scatter, their norms say the rest, S_norm = sum over f of (E |q_f| - |E q_f|) |k_f|. As in the authors' code, each query
head's scores are standardised, and the largest of a KV head's counts. Deviations: the centers are those of the latest
`window` queries, where the paper measures them once on other text; the prompt competes as all else does; and it is
chosen anew when a block leaves recent.
"""

from typing import ClassVar

import attrs
import torch
from attrs import validators as v
from torch import Tensor

from kvtiers.rotary import Rotary
from kvtiers.slots import Moment
from kvtiers_methods.whole_past import Past, WholePast, seen_from, unrotated_queries


@attrs.frozen(kw_only=True)
class TriAttention(WholePast):
    """Each KV head keeps the `most` tokens with the largest score.

    window: how many of the latest queries say where the center is. farthest: the last of the distances, in steps.
    """

    window: int = attrs.field(default=128, validator=[v.instance_of(int), v.ge(1)])
    farthest: int = attrs.field(default=65536, validator=[v.instance_of(int), v.ge(1)])
    attention: ClassVar[None] = None
    needs_rotary: ClassVar[bool] = True

    def scores(self, past: Past, moment: Moment) -> Tensor:
        queries, rotary = unrotated_queries(past, moment), moment.rotary
        center = queries.mean(3)
        distances = 2.0 ** torch.arange(self.farthest.bit_length(), dtype=torch.float64, device=moment.device)
        scores = center @ seen_from(past, moment, distances).mT  # the series, its pairs written out
        if rotary is not None and rotary.width:
            scattered = _norms(queries, rotary).mean(3) - _norms(center, rotary)
            scaling = rotary.scaling if moment.keys_rotated else rotary.scaling**2
            scores = scores + scaling * scattered @ _norms(past.keys.float(), rotary).mT
        apart = scores - scores.mean(-1, keepdim=True)
        standard = apart / apart.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        largest: Tensor = standard.amax(2) + past.bias
        return largest


def _norms(x: Tensor, rotary: Rotary) -> Tensor:
    """The norm of each pair of channels that is rotated together, [..., pairs]; turning does not change it."""
    turned = x[..., rotary.first : rotary.first + rotary.width]
    pairs = turned.unflatten(-1, (2, -1)) if rotary.layout == "half" else turned.unflatten(-1, (-1, 2)).mT
    norms: Tensor = pairs.norm(dim=-2)
    return norms
