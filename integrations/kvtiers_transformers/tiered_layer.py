"""What transformers asks of a layer of a cache, answered by a layer that is tiered."""

import weakref
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvtiers import LayerRows, UnsupportedModelError
from kvtiers_transformers.attention import running, uncompiled


class TieredLayer(CacheLayerMixin):
    """What transformers asks of a layer. The tiers themselves are fed by the attention function."""

    is_sliding = False
    is_compileable = False
    is_croppable = True  # or `crop` says why not

    def __init__(self, owner: object, layer: LayerRows) -> None:
        """owner: the cache that this is a layer of."""
        self.is_initialized = False
        self.owner, self.layer = weakref.ref(owner), layer  # so that `del cache` frees at once
        self.columns = 0
        """Columns of the batch seen, padding included: what transformers calls the sequence length."""
        self.padded_until = 0
        """The column after the last one in which some row had padding."""

    @property
    def keys(self) -> NoReturn:  # type: ignore[override]  # there is nothing to write
        """Raises `AttributeError`: other layers of transformers have one tensor of keys here, this one has tiers."""
        self._say_what_to_read("keys")

    @property
    def values(self) -> NoReturn:  # type: ignore[override]
        """Raises `AttributeError`, as `keys` does."""
        self._say_what_to_read("values")

    def _say_what_to_read(self, what: str) -> NoReturn:
        i = self.layer.number
        raise AttributeError(
            f"layer {i} is tiered and has no one tensor of {what}; read cache.core.context(...).{what} for what it "
            "attended last, cache.tier_counts() for how many tokens are where, cache.memory_usage() for bytes"
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new columns and hand the current keys and values on to the attention function."""
        forward = running.get()
        if forward is None or forward.cache is not self.owner():
            raise UnsupportedModelError(
                "this cache was given to a model that is not enabled for it; use it inside "
                "`with tiered(model, ...) as cache`, or call enable(model) first"
            )
        if self in forward.updated:
            raise UnsupportedModelError(
                f"layer {self.layer.number} uses the cache twice in one forward, as cross-attention does, or a layer "
                "that runs more than once; kvtiers serves models with one self-attention per layer and forward"
            )
        forward.updated.add(self)
        self.is_initialized = True
        if forward.padding is not None:
            self.padded_until = self.columns + forward.padding.until
        self.columns += key_states.shape[2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.columns

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.layer.groups = ()
        self.columns = self.padded_until = 0

    def offload(self) -> None:
        """Nothing to do: where the archive lives is the policy's choice."""

    prefetch = offload
