"""Compressor `pyramidkv`: as `snapkv`, but lower layers keep more tokens and higher ones fewer.

Source: PyramidKV (arXiv 2406.02069) section 4.2: budgets fall evenly from layer to layer, and the highest has 1 / beta
of the mean. Deviations: those of `snapkv`.
"""

import attrs
from attrs import validators as v

from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry
from kvtiers_methods.snapkv import SnapKV


@attrs.frozen(kw_only=True)
class PyramidKV(SnapKV):
    """The layers of a model keep `most` tokens a KV head in the mean.

    layers: of the model; with too many, the mean is higher. beta: how many times less than the mean the highest layer
    keeps.
    """

    layers: int = attrs.field(default=32, validator=[v.instance_of(int), v.ge(1)])
    beta: int = attrs.field(default=20, validator=[v.instance_of(int), v.ge(1)])

    def budget(self, layer: int) -> int:
        if layer >= self.layers:
            raise PolicyError(
                f"pyramidkv was told of {self.layers} layers, and is asked for layer {layer}; set `layers`"
            )
        if self.layers == 1:
            return self.most
        top = self.most / self.beta
        down = 2 * (self.most - top) * (self.layers - 1 - layer) / (self.layers - 1)
        return max(1, round(top + down))

    def mid_tokens(self, geometry: Geometry) -> int:
        return self.budget(0)
