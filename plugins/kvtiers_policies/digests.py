"""What the retrievers that score by digests share: cutting a block's keys into groups, and queries into KV heads."""

from collections.abc import Sequence

from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kvtiers.blocks import Blocks


def groups(blocks: Blocks, size: int | None) -> Sequence[Float[Tensor, "batch kv_heads blocks group head_dim"]]:
    """The blocks' rotated keys in float32, in runs of `size` tokens (none: all); the last may be shorter."""
    keys = (blocks.keys if blocks.rotated is None else blocks.rotated).float()
    runs: Sequence[Tensor] = keys.split(size or keys.shape[-2], dim=-2)
    return runs


def absent(
    digests: Shaped[Tensor, "batch kv_heads blocks digests width"],
) -> Bool[Tensor, "batch kv_heads blocks digests"]:
    """Which digests are none: a block that is shorter than others may have fewer, and zeros in their place."""
    return (digests == 0).all(-1)


def query_groups(
    query: Float[Tensor, "batch query_heads queries head_dim"], kv_heads: int
) -> Float[Tensor, "batch kv_heads group queries head_dim"]:
    """Query heads by the KV head that serves them; consecutive query heads share one."""
    grouped: Tensor = query.unflatten(1, (kv_heads, -1))
    return grouped
