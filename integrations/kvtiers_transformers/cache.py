"""A `transformers.Cache` whose full-attention layers are tiers; sliding layers stay transformers' own."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from kvtiers import CropError, Held, Layer, Policy, SavedCacheError, TieredCache, UnsupportedModelError
from kvtiers_transformers.attention import running


class TieredLayer(CacheLayerMixin):
    """What transformers asks of a layer. The tiers themselves are fed by the attention function."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, owner: "TransformersCache", layer: Layer) -> None:
        super().__init__()
        self.owner, self.layer = owner, layer
        self.columns = 0
        """Columns of the batch seen, padding included: what transformers calls the sequence length."""
        self.ragged_until = 0
        """The column after the last one in which some row had padding."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new columns and hand the current keys and values on to the attention function."""
        forward = running.get()
        if forward is None or forward.cache is not self.owner:
            raise UnsupportedModelError(
                "this cache was given to a model that is not enabled for it; use it inside "
                "`with tiered(model, ...) as cache`, or call enable(model) first"
            )
        self.is_initialized = True
        self.columns += key_states.shape[2]
        if forward.ragged is not None:
            self.ragged_until = self.columns
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.columns

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.layer.lanes = []
        self.columns = self.ragged_until = 0

    def offload(self) -> None:
        """Nothing to do: where the archive lives is the policy's choice."""

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.layer.take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.layer.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.layer.batch
        if rows is not None:
            self.layer.take(torch.arange(rows).repeat_interleave(repeats))


class TransformersCache(Cache):
    """The cache of one model under one policy per layer. `core` is the `kvtiers.TieredCache` behind it."""

    def __init__(self, core: TieredCache, own: dict[int, CacheLayerMixin]) -> None:
        """own: the layers that stay transformers' own, by layer number; the others are tiered, in order."""
        self.core = core
        tiers = iter(core.layers)
        count = len(core.layers) + len(own)
        super().__init__(layers=[own[i] if i in own else TieredLayer(self, next(tiers)) for i in range(count)])

    @property
    def tiered_layers(self) -> list[TieredLayer]:
        return [layer for layer in self.layers if isinstance(layer, TieredLayer)]

    @property
    def rotates(self) -> bool:
        """Whether keys are stored unrotated and placed by a realigner."""
        return self.core.policies[0].realigner.rotates

    @property
    def policies(self) -> list[Policy]:
        """The policy of each tiered layer."""
        return self.core.policies

    def swap(self, policies: Policy | list[Policy]) -> None:
        """Go on under another policy (see `kvtiers.TieredCache.swap`)."""
        self.core.swap(policies)

    def held(self) -> list[Held]:
        """Bytes held per tier and place, the model's own sliding layers counted as recent."""
        sliding = sum(
            part.untyped_storage().nbytes()
            for layer in self.layers
            if not isinstance(layer, TieredLayer)
            for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(part, Tensor)
        )
        own = [Held(tier="recent", place="device", bytes=sliding)] if sliding else []
        return self.core.held() + own

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` columns from every layer, exactly, or raise and change nothing."""
        if tokens_to_remove > 0:
            raise CropError(
                f"crop() takes the number of tokens to remove as a negative number or 0, got {tokens_to_remove}"
            )
        columns = -tokens_to_remove
        for layer in self.tiered_layers:
            if columns and layer.columns - columns < layer.ragged_until:
                raise CropError(
                    f"cannot remove {columns} of {layer.columns} columns: some rows had padding there; "
                    "fork() the cache before steps that may have to be undone"
                )
        for other in self.layers:
            recording = isinstance(other, DynamicSlidingWindowLayer)
            if columns and recording and other.get_seq_length() >= other.sliding_window and not other.record_past:
                raise CropError(
                    "the model's own sliding layers are past their window and cannot be rolled back; "
                    "call cache.activate_past_recording() before steps that may have to be undone"
                )
        self.core.crop_by(columns)
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                layer.columns -= columns
            else:
                layer.crop(tokens_to_remove)

    def fork(self) -> "TransformersCache":
        """An independent copy that continues exactly from here; `copy.deepcopy` does the same."""
        own = {i: copy.deepcopy(x) for i, x in enumerate(self.layers) if not isinstance(x, TieredLayer)}
        other = TransformersCache(self.core.fork(), own)
        for mine, theirs in zip(self.tiered_layers, other.tiered_layers, strict=True):
            theirs.columns, theirs.ragged_until = mine.columns, mine.ragged_until
            theirs.is_initialized = mine.is_initialized
        return other

    def __deepcopy__(self, memo: dict[int, object]) -> "TransformersCache":
        return self.fork()

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file."""
        self._refuse_own_layers("saved")
        columns = [[layer.columns, layer.ragged_until] for layer in self.tiered_layers]
        self.core.save(path, extra={"columns": columns})

    def load(self, path: str | Path) -> None:
        """Become what was saved from a cache of the same model and policy."""
        self._refuse_own_layers("loaded")
        extra = self.core.load(path)
        for layer, (columns, ragged_until) in zip(self.tiered_layers, extra["columns"], strict=True):
            layer.columns, layer.ragged_until, layer.is_initialized = columns, ragged_until, True

    def _refuse_own_layers(self, what: str) -> None:
        if len(self.tiered_layers) != len(self.layers):
            raise SavedCacheError(
                f"{len(self.layers) - len(self.tiered_layers)} layers of this model keep transformers' own sliding "
                f"cache, which cannot be {what}; fork() it instead"
            )
