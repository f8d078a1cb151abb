"""What the codecs that quantise share: whole numbers with a scale and a least value, per group of channels or token.

Source: KIVI (arXiv 2402.02750) section 3.3: keys have outlier channels, so a channel of keys shares its scale over a
block's tokens; values have none, so a token's values share theirs. Deviation: the run of tokens that shares a key
channel's scale is the block, and `group` neighbouring channels share it as well.
"""

from typing import ClassVar

import attrs
import torch
from attrs import validators as v
from torch import Tensor

from kvtiers.archive import Codec, Parts
from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry


@attrs.frozen(kw_only=True)
class Quantised(Codec):
    """Keys per group of channels over a block's tokens, values per token, as unsigned whole numbers of `bits` bits.

    group: channels of a key that share a scale; it divides the head's width. Scales and least values are float16.
    """

    bits: ClassVar[int]
    group: int = attrs.field(default=1, validator=[v.instance_of(int), v.ge(1)])

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        if keys.shape[-1] % self.group:
            raise PolicyError(f"group = {self.group} does not divide the width of a key, {keys.shape[-1]} channels")
        grouped = keys.float().unflatten(-1, (-1, self.group))
        key_low, key_scale = self._range(grouped, (-3, -1))
        value_low, value_scale = self._range(values.float(), (-1,))
        return {
            "keys": self._packed(self._whole(grouped, key_low, key_scale).flatten(-2)),
            "key_low": key_low[..., 0, :, 0],
            "key_scale": key_scale[..., 0, :, 0],
            "values": self._packed(self._whole(values.float(), value_low, value_scale)),
            "value_low": value_low[..., 0],
            "value_scale": value_scale[..., 0],
        }

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        low, scale = (parts[name].float()[..., None, :, None] for name in ("key_low", "key_scale"))
        width = parts["key_low"].shape[-1] * self.group
        keys = self._unpacked(parts["keys"], width).unflatten(-1, (-1, self.group)) * scale + low
        low, scale = (parts[name].float()[..., None] for name in ("value_low", "value_scale"))
        values = self._unpacked(parts["values"], None) * scale + low
        return keys.flatten(-2).to(dtype), values.to(dtype)

    def block_bytes(self, tokens: int, geometry: Geometry) -> int:
        per_byte = 8 // self.bits
        numbers = tokens * (-(-geometry.head_dim // per_byte) + -(-geometry.value_dim // per_byte))
        scales = 4 * (geometry.head_dim // self.group + tokens)
        return geometry.batch * geometry.kv_heads * (numbers + scales)

    def tolerance(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Half a step, and what float16 rounds of scale and least value."""
        grouped = keys.float().unflatten(-1, (-1, self.group))
        of_keys = self._error(grouped, (-3, -1)).expand(grouped.shape).flatten(-2)
        return of_keys, self._error(values.float(), (-1,))

    def _error(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        largest = x.abs().amax(axes, keepdim=True)
        spread = x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)
        return spread / (2**self.bits - 1) * 0.51 + (largest + spread) * 2**-10 + 2**-14

    def _range(self, x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        low = low.half()
        scale = ((high - low.float()) / (2**self.bits - 1)).clamp(min=2**-14).half()
        return low, scale

    def _whole(self, x: Tensor, low: Tensor, scale: Tensor) -> Tensor:
        return ((x - low.float()) / scale.float()).round().clamp(0, 2**self.bits - 1).to(torch.uint8)

    def _packed(self, whole: Tensor) -> Tensor:
        if self.bits == 8:
            return whole
        if whole.shape[-1] % 2:
            whole = torch.nn.functional.pad(whole, (0, 1))
        return whole[..., ::2] << 4 | whole[..., 1::2]

    def _unpacked(self, packed: Tensor, width: int | None) -> Tensor:
        if self.bits == 8:
            return packed.float()
        return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)[..., :width].float()
