"""What the codecs that quantise share: whole numbers with a scale and a least value, per group of channels or token.

Source: KIVI (arXiv 2402.02750) section 3.3: keys have outlier channels, so a channel of keys shares its scale over a
block's tokens; values have none, so a token's values share theirs. Deviation: the run of tokens that shares a key
channel's scale is the block, and `group` neighbouring channels share it as well; a token's values share one scale per
head, where the paper has groups of channels.
"""

from typing import ClassVar

import attrs
import torch
from attrs import validators as v
from torch import Tensor
from torch.nn.functional import pad

from kvtiers.archive import Codec, Parts
from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry

_VALUES = ("values", "odd_values", "values_less_2", "values_less_3")
"""What packed values are called, by how many numbers of the last byte do not count."""


@attrs.frozen(kw_only=True)
class Quantised(Codec):
    """Keys per group of channels over a block's tokens, values per token, as unsigned whole numbers of `bits` bits.

    group: channels of a key that share a scale; it divides the head's width. Scales and least values are float16 for
        float16 keys and bfloat16, which has float32's range, for others.
    """

    bits: ClassVar[int]
    group: int = attrs.field(default=1, validator=[v.instance_of(int), v.ge(1)])

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        if keys.shape[-1] % self.group:
            raise PolicyError(f"group = {self.group} does not divide the width of a key, {keys.shape[-1]} channels")
        grouped = self._grouped(keys)
        key_low, key_scale = self._range(grouped, (-3, -1))
        value_low, value_scale = self._range(values, (-1,))
        return {
            "keys": self._packed(self._whole(grouped, key_low, key_scale).flatten(-2)),
            "key_low": key_low[..., 0, :, 0],
            "key_scale": key_scale[..., 0, :, 0],
            self._name(values.shape[-1]): self._packed(self._whole(values, value_low, value_scale)),
            "value_low": value_low[..., 0],
            "value_scale": value_scale[..., 0],
        }

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        low, scale = (parts[name].float()[..., None, :, None] for name in ("key_low", "key_scale"))
        width = parts["key_low"].shape[-1] * self.group
        keys = self._unpacked(parts["keys"], width).unflatten(-1, (-1, self.group)) * scale + low
        low, scale = (parts[name].float()[..., None] for name in ("value_low", "value_scale"))
        spare, packed = next((spare, parts[name]) for spare, name in enumerate(_VALUES) if name in parts)
        values = self._unpacked(packed, packed.shape[-1] * self._per_byte - spare) * scale + low
        return _cast(keys.flatten(-2), dtype), _cast(values, dtype)

    def block_bytes(self, tokens: int, geometry: Geometry) -> int:
        numbers = tokens * (-(-geometry.head_dim // self._per_byte) + -(-geometry.value_dim // self._per_byte))
        scales = 4 * (geometry.head_dim // self.group + tokens)
        return geometry.batch * geometry.kv_heads * (numbers + scales)

    def tolerance(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Half a step, and what the dtype rounds."""
        return self._error(self._grouped(keys), (-3, -1)).flatten(-2), self._error(values, (-1,))

    def _error(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        low, scale = (part.float() for part in self._range(x, axes))
        number = torch.finfo(x.dtype)
        largest = x.float().abs() + scale
        in_float32 = 2**-21 * (largest + low.abs())
        return 0.5 * scale + in_float32 + 0.51 * number.eps * largest + number.eps * number.smallest_normal

    def _range(self, x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The least value, rounded down, and the step, rounded up, so that the numbers between reach every value."""
        kept = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
        x = x.float()
        low = -_rounded_up(-x.amin(axes, keepdim=True), kept)
        scale = _rounded_up((x.amax(axes, keepdim=True) - low.float()) / (2**self.bits - 1), kept)
        return low, scale

    def _grouped(self, keys: Tensor) -> Tensor:
        return keys.reshape(*keys.shape[:-1], -1, self.group)

    @property
    def _per_byte(self) -> int:
        """How many numbers fill a byte."""
        return 8 // self.bits

    def _name(self, width: int) -> str:
        """What packed values are called, which says how many numbers of the last byte do not count."""
        return _VALUES[-width % self._per_byte]

    def _whole(self, x: Tensor, low: Tensor, scale: Tensor) -> Tensor:
        step = torch.where(scale > 0, scale, 1).float()  # where all values are one, they are the least one
        return ((x.float() - low.float()) / step).round().clamp(0, 2**self.bits - 1).to(torch.uint8)

    def _packed(self, whole: Tensor) -> Tensor:
        if self._per_byte == 1:
            return whole
        parts = pad(whole, (0, -whole.shape[-1] % self._per_byte)).unflatten(-1, (-1, self._per_byte)).unbind(-1)
        packed: Tensor = parts[0]
        for part in parts[1:]:
            packed = packed << self.bits | part
        return packed

    def _unpacked(self, packed: Tensor, width: int) -> Tensor:
        if self._per_byte == 1:
            return packed.float()
        shifts = range(8 - self.bits, -1, -self.bits)
        parts = [packed >> shift & 2**self.bits - 1 for shift in shifts]
        return torch.stack(parts, -1).flatten(-2)[..., :width].float()


def _rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least number of `dtype`, or the one after, that is no less than `x`."""
    nearest, number = x.to(dtype), torch.finfo(dtype)
    more = (x + number.eps * (x.abs() + number.smallest_normal)).to(dtype)
    return torch.where(nearest.float() < x, more, nearest)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; what a step beyond its range would make infinite is its largest number."""
    number = torch.finfo(dtype)
    return x.clamp(number.min, number.max).to(dtype)
