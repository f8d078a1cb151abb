"""Codec `exact`: archived keys and values are written as they are."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kvtiers.archive import Codec, Parts
from kvtiers.geometry import Geometry


@attrs.frozen(kw_only=True)
class Exact(Codec):
    """What is read back is, bit for bit, what was written."""

    exact: ClassVar[bool] = True

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"keys": keys, "values": values}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return parts["keys"], parts["values"]

    def block_bytes(self, tokens: int, geometry: Geometry) -> int:
        return tokens * geometry.token_bytes
