"""A `transformers.Cache` whose full-attention layers are tiers; sliding layers stay transformers' own."""

import copy
import weakref
from pathlib import Path
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from kvtiers import (
    CropError,
    InterruptedForwardError,
    LayerRows,
    MemoryUsage,
    Policy,
    SavedCacheError,
    TieredCache,
    UnsupportedModelError,
)
from kvtiers_transformers.attention import running, uncompiled


@attrs.frozen(kw_only=True)
class Outline:
    """What must agree between a model and a cache.

    shapes: (query_heads, kv_heads, head_dim, value_dim) of each tiered layer.
    rope: how the model's configuration says it rotates.
    """

    family: str
    layers: int
    tiers: list[int]
    shapes: list[tuple[int, int, int, int]]
    rope: str

    def __str__(self) -> str:
        shapes = ", ".join(map(str, sorted(set(self.shapes))))
        return (
            f"{self.family}, {self.layers} layers, {len(self.tiers)} tiered, "
            f"(query_heads, kv_heads, head_dim, value_dim) = {shapes}, rope = {self.rope}"
        )


class TieredLayer(CacheLayerMixin):
    """What transformers asks of a layer. The tiers themselves are fed by the attention function."""

    is_sliding = False
    is_compileable = False
    is_croppable = True  # or `crop` says why not

    def __init__(self, owner: "TransformersCache", layer: LayerRows) -> None:
        self.is_initialized = False
        self.owner, self.layer = weakref.ref(owner), layer  # so that `del cache` frees at once
        self.held_before = 0
        """Tokens of all rows before the forward that is running."""
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
        self.columns += key_states.shape[2]
        if forward.padding is not None:
            self.padded_until = self.columns
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.layer.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.layer.select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.layer.batch
        if rows is not None:
            self.layer.select_rows(torch.arange(rows).repeat_interleave(repeats))


class TransformersCache(Cache):
    """The cache of one model under one policy per layer. `core` is the `kvtiers.TieredCache` behind it."""

    def __init__(
        self, core: TieredCache, own: dict[int, Any], outline: Outline, device: torch.device | str = "cpu"
    ) -> None:
        """own: the layers that stay transformers' own, by layer number; the others are tiered, in order.

        outline: the model's. device: the model's, to which a saved cache is loaded.
        """
        self.core, self.outline = core, outline
        self.device = torch.device(device)
        self._started: list[int] | None = None
        self._all_real: Tensor | None = None
        self._coming = 0
        self.position_shift: int | None = None
        """What position_ids exceed the number of a column by, where they do so evenly; None where they do not."""
        tiers = iter(core.layers)
        count = len(core.layers) + len(own)
        super().__init__(layers=[own[i] if i in own else TieredLayer(self, next(tiers)) for i in range(count)])

    @property
    def tiered_layers(self) -> list[TieredLayer]:
        return [layer for layer in self.layers if isinstance(layer, TieredLayer)]

    def start(self, tokens: int) -> None:
        """A forward over `tokens` real tokens, of all rows together, begins.

        Raises `InterruptedForwardError` if an earlier one stopped after changing the cache.

        Blocks that left recent are archived here, for all layers, before any layer takes new tokens: an archive that is
        full stops the forward before it began, and the same tokens can be fed again once there is room.
        """
        self._check_whole()
        self.core.commit_due()
        for layer in self.tiered_layers:
            layer.held_before = layer.layer.tokens
        self._started, self._coming = self._progress(), tokens

    def check_later(self, all_real: Tensor) -> None:
        """Look at the next forward whether the tokens of this one were all real, without waiting now."""
        self._all_real = all_real

    def check_decoded(self) -> None:
        """Raise `UnsupportedModelError` if a token that was decoded on a GPU turns out to have been padding."""
        seen, self._all_real = self._all_real, None
        if seen is not None and not bool(seen):
            raise UnsupportedModelError(
                "the attention_mask of the forward before hid the one token of some row, and it was taken for a real "
                "one; go on from a fork() made before it, and leave out rows that are done with batch_select_indices"
            )

    def finish(self) -> None:
        """The forward that began has passed every layer. Raises `UnsupportedModelError` if one did not take part."""
        for layer in self.tiered_layers:
            missed = layer.held_before + self._coming - layer.layer.tokens
            if missed:
                raise UnsupportedModelError(
                    f"layer {layer.layer.number} took {self._coming - missed} tokens of {self._coming}: its attention "
                    "does not go through transformers' attention interface once per forward, so tiers cannot serve it; "
                    "use a model whose attention does"
                )
        self._started = None

    def _progress(self) -> list[int]:
        """How far each layer, and each of its groups of rows, has come."""
        columns = [layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)]
        return columns + [layer.num_steps for layer in self.core.every_layer()]

    def _check_whole(self) -> None:
        columns = {layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)}
        if len(columns) > 1 or (self._started is not None and self._started != self._progress()):
            steps = {layer.layer.num_steps for layer in self.tiered_layers}
            raise InterruptedForwardError(
                f"an earlier forward failed midway and left the layers at {sorted(columns)} columns and "
                f"{sorted(steps)} steps; go on from a fork() made before it, or reset() the cache"
            )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._started = None

    @property
    def is_croppable(self) -> bool:
        """Whether transformers may give tokens back.

        It asks before assisted decoding, where `crop` can still say better why not. On Apple's mps it also asks before
        it decodes a token more than was asked for, which it must be able to give back for certain.
        """
        certain = self.device.type != "mps" or all(policy.recent is None for policy in self.policies)
        return certain and all(layer.is_croppable for layer in self.layers)

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

    def attended(self) -> list[int]:
        """Tokens that the last step of each tiered layer attended, per row and KV head."""
        return self.core.attended()

    def tier_counts(self, row: int = 0) -> dict[str, int]:
        """How many tokens of a row are in each tier of the first tiered layer, and how many a policy dropped."""
        return self.core.tier_counts(0, row)

    def memory_usage(self) -> list[MemoryUsage]:
        """Bytes held per tier and location, the model's own sliding layers counted as recent."""
        sliding = sum(
            part.untyped_storage().nbytes()
            for layer in self.layers
            if not isinstance(layer, TieredLayer)
            for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(part, Tensor)
        )
        own = [MemoryUsage(tier="recent", location="device", bytes=sliding)] if sliding else []
        return self.core.memory_usage() + own

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` columns from every layer, exactly, or raise and change nothing."""
        if tokens_to_remove > 0:
            raise CropError(
                f"crop() takes the number of tokens to remove as a negative number or 0, got {tokens_to_remove}"
            )
        columns = -tokens_to_remove
        for layer in self.layers:
            reason = _why_not_crop(layer, columns) if columns else None
            if reason is not None:
                raise CropError(f"cannot remove {columns} columns: {reason}")
        self.core.crop_by(columns)
        for cropped in self.layers:
            own: Any = cropped
            if isinstance(cropped, TieredLayer):
                cropped.columns -= columns
            else:
                own.crop(tokens_to_remove)

    def compact(self, *, recent: int) -> None:
        """Age now what is older than the newest `recent` tokens, whatever the policy's `recent` is.

        With `recent=None` in the policy, a prompt of any length is read in full, and compressed when all of it is
        known. The model's own sliding layers stay as they are.
        """
        self._check_whole()
        self.core.compact(recent=recent)

    def rewind_recent(self) -> int:
        """Forget the recent tokens of every row; returns how many columns must be fed again.

        Rows must have come equally far, and the model must have no layers of its own.
        """
        self._check_whole()
        own = [layer for layer in self.layers if not isinstance(layer, TieredLayer)]
        lengths = {layer.num_steps for layer in self.core.every_layer()}
        if own or len(lengths) > 1:
            what = f"{len(own)} layers keep transformers' own cache" if own else f"rows hold {sorted(lengths)} tokens"
            raise CropError(f"recent cannot be rewound: {what}; fork() the cache before what may have to be fed again")
        steps = self.core.rewind_recent()
        for layer in self.tiered_layers:
            layer.columns -= steps
        return steps

    def fork(self) -> "TransformersCache":
        """An independent copy that continues exactly from here; `copy.deepcopy` does the same."""
        own = {i: copy.deepcopy(x) for i, x in enumerate(self.layers) if not isinstance(x, TieredLayer)}
        other = TransformersCache(self.core.fork(), own, self.outline, self.device)
        other._started, other.position_shift = self._started, self.position_shift
        for mine, theirs in zip(self.tiered_layers, other.tiered_layers, strict=True):
            theirs.columns, theirs.padded_until = mine.columns, mine.padded_until
            theirs.is_initialized = mine.is_initialized
        return other

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises `SavedCacheError`: pickle, torch.save and copy.copy do not write caches."""
        raise SavedCacheError(
            "a tiered cache is never pickled; use cache.save(path), and new_cache(model, ...).load(path) to read it "
            "again, or cache.fork() for a copy in memory"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> "TransformersCache":
        return self.fork()

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file."""
        self._refuse_own_layers("saved")
        self._check_whole()
        columns = [[layer.columns, layer.padded_until] for layer in self.tiered_layers]
        self.core.save(path, extra={"columns": columns, "shift": self.position_shift, "model": str(self.outline)})

    def load(self, path: str | Path) -> None:
        """Become what was saved from a cache of the same model and policy."""
        self._refuse_own_layers("loaded")
        extra = self.core.load(path, device=self.device, expect={"model": str(self.outline)})
        self._started, self.position_shift = None, extra["shift"]
        for layer, (columns, padded_until) in zip(self.tiered_layers, extra["columns"], strict=True):
            layer.columns, layer.padded_until, layer.is_initialized = columns, padded_until, True

    def _refuse_own_layers(self, what: str) -> None:
        if len(self.tiered_layers) != len(self.layers):
            raise SavedCacheError(
                f"{len(self.layers) - len(self.tiered_layers)} layers of this model keep transformers' own sliding "
                f"cache, which cannot be {what}; fork() it instead"
            )


def _why_not_crop(layer: Any, columns: int) -> str | None:
    """Why the newest `columns` columns of `layer` cannot be removed exactly, or None if it can be."""
    held = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else columns
    if columns > held:
        return f"the cache holds {held}"
    if isinstance(layer, TieredLayer):
        if held - columns < layer.padded_until:
            return "some rows had padding there; fork() the cache before steps that may have to be undone"
    elif isinstance(layer, DynamicSlidingWindowLayer):
        kept = 0 if layer.keys is None else layer.keys.shape[2]
        if kept - columns < min(layer.sliding_window - 1, held - columns):
            return (
                "the model's own sliding layers are past their window; call cache.activate_past_recording() before "
                "steps that may have to be undone"
            )
    elif not getattr(layer, "is_croppable", False):  # older versions do not say
        return f"the model's own {type(layer).__name__} cannot be rolled back"
    return None
