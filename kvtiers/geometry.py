"""The shape of one layer's keys and values, and where a step's tokens lie."""

import math
from functools import cached_property, lru_cache
from typing import Any

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers.errors import GeometryError


def _positive(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise GeometryError(f"{field.name} must be a whole number of at least 1, got {value!r}")


@attrs.frozen(kw_only=True)
class Geometry:
    """What one layer stores per step.

    `grid` is the extent of one step beyond time: `()` for text (one token a step), `(30, 52)` for a latent video frame.
    `causal` says whether current tokens see only their past, one step after the other (text), or one another both ways
    as one block that is committed as a whole (video). `steps_per_commit` is the length of such a block, 1 for text.
    """

    kv_heads: int = attrs.field(validator=_positive)
    head_dim: int = attrs.field(validator=_positive)
    query_heads: int = attrs.field(validator=_positive)
    value_dim: int = attrs.field(validator=_positive)
    batch: int = attrs.field(default=1, validator=_positive)
    grid: tuple[int, ...] = ()
    steps_per_commit: int = attrs.field(default=1, validator=_positive)
    even: bool = True
    """Whether all committed blocks are of `steps_per_commit` steps; else that is the most."""
    causal: bool = True
    dtype: torch.dtype = torch.float32
    known_positions: int | None = attrs.field(default=None, validator=v.optional(_positive))
    """How many positions the model was made for; None if nobody knows. A saved cache may be loaded where it differs."""

    @query_heads.default
    def _as_many_as_kv(self) -> int:
        return self.kv_heads

    @value_dim.default
    def _as_wide_as_keys(self) -> int:
        return self.head_dim

    def __attrs_post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise GeometryError(
                f"query_heads must be a multiple of kv_heads, got {self.query_heads} and {self.kv_heads}; "
                "every key/value head serves the same number of query heads"
            )

    @cached_property
    def tokens_per_step(self) -> int:
        """Tokens of one step: 1 for text, height x width for a latent frame."""
        return math.prod(self.grid)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value over all rows and key/value heads of this layer."""
        return self.batch * self.kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's key alone, over all rows and key/value heads."""
        return self.batch * self.kv_heads * self.head_dim * self.dtype.itemsize

    def positions(self, start: int, stop: int, device: torch.device | None = None) -> Float[Tensor, "tokens axes"]:
        """The positions of the tokens of steps `start` to `stop`: time first, then the axes of `grid`."""
        time = torch.arange(start, stop, dtype=torch.float64, device=device)
        if not self.grid:
            return time[:, None]
        axes = [time, *(torch.arange(n, dtype=torch.float64, device=device) for n in self.grid)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


@lru_cache(maxsize=8)
def spread(count: int, of: int, device: torch.device | None = None) -> Int[Tensor, " numbers"]:
    """`count` evenly spaced numbers below `of` (the middles of equal parts), or all of them if there are no more."""
    count = min(count, of)
    with torch.inference_mode(False):  # it is remembered
        return (2 * torch.arange(count, device=device) + 1) * of // (2 * count)
