"""transformers' own cache, asked as kvtiers' is: a row of `kvtiers compare text`."""

import copy

from transformers import DynamicCache

from kvtiers import MemoryUsage


class PlainCache(DynamicCache):
    """A `DynamicCache` that can be forked and says what it holds and attends."""

    def fork(self) -> "PlainCache":
        """An independent copy."""
        return copy.deepcopy(self)

    def attended(self) -> list[int]:
        """Tokens that the last step of each layer attended."""
        return [int(self.get_seq_length(number)) for number in range(len(self.layers))]

    def memory_usage(self) -> list[MemoryUsage]:
        """All of it is recent, and on the device."""
        parts = [getattr(layer, name, None) for layer in self.layers for name in ("keys", "values")]
        held = sum(part.untyped_storage().nbytes() for part in parts if part is not None)
        return [MemoryUsage(tier="recent", location="device", bytes=held)]
