"""Vectors in few bits, which queries are multiplied with piece by piece: digests that take little room."""

from functools import lru_cache

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

_STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 8: 0.0308}
"""The step, by bits, that quantises normally distributed numbers of size 1 with the least error (Max 1960)."""
_PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""How the bits of a code are divided, the lowest first, so that every part fills bytes evenly."""
_SCALE_BYTES = 2
_UNPACKED_AT_ONCE = 2**22
"""Numbers; 16 MiB in float32."""


@attrs.frozen
class Packing:
    """Vectors in rows of bytes, at 1, 2, 3, 4 or 8 bits per channel, which queries are multiplied with piece by piece.

    Each vector is first turned by a fixed orthogonal matrix, so that no channel is much larger than the others. Then
    its channels are rounded to equal steps around zero. A row is the step (bfloat16, two bytes) and the codes; a code
    stands for (code - (2**bits - 1) / 2) * step. With n bytes of codes, byte j holds the channels j, j + n, j + 2n,
    ..., the first in its lowest bits. At 3 bits, the lower two bits of all channels come first, then the third.
    A vector of zeros is a row of zeros. A row does not depend on the rows beside it.
    """

    bits: int = attrs.field(validator=v.in_(tuple(_STEPS)))

    def width(self, channels: int) -> int:
        """Bytes of one row."""
        return _SCALE_BYTES + sum(_bytes(channels, part) for part in _PARTS[self.bits])

    def pack(self, vectors: Float[Tensor, "*rows channels"]) -> UInt8[Tensor, "*rows width"]:
        """`vectors` as rows of bytes."""
        flat = turned(vectors.float())
        scale = (flat.square().mean(-1, keepdim=True).sqrt() * _STEPS[self.bits]).to(torch.bfloat16)
        step, top = scale.float(), 2**self.bits - 1
        codes = torch.where(step > 0, flat / step + (top + 1) / 2, 0.0).floor().clamp(0, top).to(torch.uint8)
        packed, low = [scale.view(torch.uint8)], 0
        for part in _PARTS[self.bits]:
            packed.append(_joined(codes >> low & 2**part - 1, part))
            low += part
        return torch.cat(packed, dim=-1)

    def unpack(self, rows: UInt8[Tensor, "*rows width"], channels: int) -> Float[Tensor, "*rows channels"]:
        """The vectors that `rows` stand for, in float32."""
        step, codes = self._steps_and_codes(rows, channels)
        return turned_back(((codes.float() - self._middle) * step).mT)

    def products(
        self,
        query: Float[Tensor, "*heads queries channels"],
        rows: UInt8[Tensor, "*heads rows width"],
    ) -> Float[Tensor, "*heads queries rows"]:
        """query . vector for every row, in float32. No more than 16 MiB are unpacked at a time.

        Queries are multiplied with the codes, and only the products with the steps.
        """
        query, channels = turned(query.float()), query.shape[-1]
        of_middle = query.sum(-1, keepdim=True) * self._middle
        at_once = max(1, _UNPACKED_AT_ONCE // (rows.shape[:-2].numel() * channels))
        parts = []
        for part in rows.split(at_once, dim=-2):
            step, codes = self._steps_and_codes(part, channels)
            parts.append((query @ codes.float()).sub_(of_middle).mul_(step))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @property
    def _middle(self) -> float:
        """The code, between two, that stands for 0."""
        return (int(2**self.bits) - 1) / 2

    def _steps_and_codes(
        self, rows: UInt8[Tensor, "*heads rows width"], channels: int
    ) -> tuple[Float[Tensor, "*heads 1 rows"], UInt8[Tensor, "*heads channels rows"]]:
        """The step of each row, and its codes, one column per row: bits are moved fastest along long columns."""
        step = rows[..., :_SCALE_BYTES].clone(memory_format=torch.contiguous_format)  # `view` needs it of one row, too
        columns = rows[..., _SCALE_BYTES:].mT.contiguous()
        codes, low = columns[..., :0, :], 0
        sizes = [_bytes(channels, part) for part in _PARTS[self.bits]]
        for packed, part in zip(columns.split(sizes, dim=-2), _PARTS[self.bits], strict=True):
            planes = [packed >> shift & 2**part - 1 for shift in range(0, 8, part)]
            bits = torch.cat(planes, dim=-2)[..., :channels, :]
            codes = bits if low == 0 else codes | bits << low
            low += part
        return step.view(torch.bfloat16).float().mT, codes


def _bytes(channels: int, bits: int) -> int:
    return -(-channels * bits // 8)


def _joined(codes: UInt8[Tensor, "*rows channels"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Codes of `bits` bits, as many to a byte as it holds."""
    per_byte, size = 8 // bits, _bytes(codes.shape[-1], bits)
    planes = pad(codes, (0, size * per_byte - codes.shape[-1])).unflatten(-1, (per_byte, size))
    packed: Tensor = planes[..., 0, :]
    for plane in range(1, per_byte):
        packed = packed | planes[..., plane, :] << plane * bits
    return packed


def turned(vectors: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
    """`vectors` turned by a fixed orthogonal matrix: signs, then a Hadamard matrix. Products of two vectors stay.

    The Hadamard matrix is as large as the greatest power of two that divides the number of channels. Source: QuIP#
    (arXiv 2402.04396) section 3. Deviation: the signs are the same for all.
    """
    return _hadamard(vectors * _signs(vectors.shape[-1], vectors.device))


def turned_back(vectors: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
    """The inverse of `turned`."""
    return _hadamard(vectors) * _signs(vectors.shape[-1], vectors.device)


@lru_cache(maxsize=8)
def _signs(channels: int, device: torch.device) -> Float[Tensor, " channels"]:
    """One sign per channel, without pattern: a bit of its square times the golden ratio."""
    with torch.inference_mode(False):  # they are remembered
        channel = torch.arange(1, channels + 1, device=device)
        signs: Tensor = 1.0 - 2.0 * ((channel * channel * 2_654_435_769 >> 24) & 1)
        return signs


def _hadamard(vectors: Tensor) -> Tensor:
    """By sums and differences of pairs, and not as one product: so a row does not depend on the rows beside it."""
    channels = vectors.shape[-1]
    size, half = channels & -channels, 1
    while half < size:
        first, second = vectors.unflatten(-1, (-1, 2, half)).unbind(-2)
        vectors = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    scaled: Tensor = vectors / size**0.5
    return scaled
