"""What observers are told: immutable events, most of one layer, sent to the hook `kvtiers_observe` after the fact."""

import attrs
from jaxtyping import Int
from torch import Tensor

from kvtiers.blocks import Location


@attrs.frozen
class Committed:
    """History of `layer` grew by `steps` steps, which are `tokens` tokens per batch row."""

    layer: int
    steps: int
    tokens: int


@attrs.frozen
class Compressed:
    """`blocks` blocks left recent; per row and KV head, `tokens_before` tokens became `tokens_after` (0: dropped)."""

    layer: int
    blocks: int
    tokens_before: int
    tokens_after: int


@attrs.frozen
class Archived:
    """`blocks` blocks, `bytes` bytes over all rows and KV heads, were written to the archive at `location`."""

    layer: int
    blocks: int
    location: Location
    bytes: int


@attrs.frozen
class Selected:
    """A retriever chose among `archived` blocks.

    chosen: [batch, kv_heads, chosen], block numbers in order of origin, on the cache's device: reading their values
    waits for the device. It is the cache's own tensor; do not change it.
    """

    layer: int
    chosen: Int[Tensor, "batch kv_heads chosen"] = attrs.field(eq=False)
    archived: int


@attrs.frozen
class Recalled:
    """`blocks` blocks per row and KV head, `bytes` bytes in all, were copied from `location` into the context."""

    layer: int
    blocks: int
    bytes: int
    location: Location


@attrs.frozen
class PromptChanged:
    """A video goes on with another prompt of `words` tokens, or begins with it; its keys and values are made anew."""

    words: int


Event = Committed | Compressed | Archived | Selected | Recalled | PromptChanged
