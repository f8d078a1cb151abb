"""Codec `low-rank`: the archived keys of a block as two thin matrices, values as they are.

Source: ShadowKV (arXiv 2410.21465) algorithm 1 (prefilling): keys are of low rank before they are rotated, values are
not. So it wants a realigner under which keys are held unrotated, as `unrotated`. Deviations: the paper factors the keys
of a whole prompt, all heads together, in rank 160; here every block and KV head is factored alone, so that any of them
can be read without the others; and factors lie where values lie, where the paper keeps them on the device and offloads
values alone.
"""

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor

from kvtiers.archive import Codec, Parts
from kvtiers.geometry import Geometry


@attrs.frozen(kw_only=True)
class LowRank(Codec):
    """Write the best approximation of a block's keys in rank `rank`: their largest singular values and vectors."""

    rank: int = attrs.field(default=8, validator=[v.instance_of(int), v.ge(1)])

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        left, right, _ = self._factors(keys)
        return {"key_left": left, "key_right": right, "values": values}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        left, right = (_wide(parts[name]) for name in ("key_left", "key_right"))
        number = torch.finfo(dtype)
        return (left @ right).clamp(number.min, number.max).to(dtype), parts["values"].to(dtype)

    def block_bytes(self, tokens: int, geometry: Geometry) -> int:
        rank = min(self.rank, tokens, geometry.head_dim)
        numbers = rank * (tokens + geometry.head_dim) + tokens * geometry.value_dim
        return geometry.batch * geometry.kv_heads * numbers * geometry.dtype.itemsize

    def tolerance(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The first singular value that is left out, and what the factors and the product round."""
        number, (left, right, sizes) = torch.finfo(keys.dtype), self._factors(keys)
        left, right, sizes = _wide(left).abs(), _wide(right).abs(), _wide(sizes)[..., None]
        beyond = sizes[..., self.rank : self.rank + 1, :].sum(-2, keepdim=True)
        small = number.eps * number.smallest_normal * (left.sum(-1, keepdim=True) + right.sum(-2, keepdim=True) + 1)
        most = beyond + 1.1 * number.eps * (left @ right) + 2**-18 * sizes[..., :1, :] + small
        return most, values.new_zeros(())

    def _factors(
        self, keys: Float[Tensor, "*blocks tokens head_dim"]
    ) -> tuple[
        Float[Tensor, "*blocks tokens rank"], Float[Tensor, "*blocks rank head_dim"], Float[Tensor, "*blocks sizes"]
    ]:
        """Two factors of about one size, as they are written, and all singular values, largest first.

        The largest number of a right vector is positive, so that equal keys are written alike.
        """
        u, sizes, right = torch.linalg.svd(_wide(keys), full_matrices=False)
        largest = right.gather(-1, right.abs().argmax(-1, keepdim=True))
        root = sizes.sqrt() * torch.where(largest[..., 0] < 0, -1.0, 1.0)
        left, right = u * root[..., None, :], right * root[..., None]
        return left[..., : self.rank].to(keys.dtype), right[..., : self.rank, :].to(keys.dtype), sizes


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
