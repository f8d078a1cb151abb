"""A `transformers.Cache` whose full-attention layers are tiers; sliding layers stay transformers' own."""

import copy
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from kvtiers import (
    CropError,
    GeometryError,
    InterruptedForwardError,
    MemoryUsage,
    Policy,
    PolicyError,
    SavedCacheError,
    TieredCache,
    UnsupportedModelError,
    resolve,
)
from kvtiers.undoing import Made
from kvtiers_transformers.tiered_layer import TieredLayer

_PADDED = "some rows had padding there; fork() the cache before steps that may have to be undone"


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
        self._held: list[int] = []
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
        """A forward over `tokens` real tokens, of all rows together, begins. `check_whole` has been called.

        Blocks that left recent are archived here, for all layers, before any layer takes new tokens: an archive that is
        full stops the forward before it began, and the same tokens can be fed again once there is room.
        """
        self.core.commit_due()
        self._held = [layer.tokens for layer in self.core.layers]
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
        for layer, held in zip(self.core.layers, self._held, strict=True):
            taken = layer.tokens - held
            if taken != self._coming:
                raise UnsupportedModelError(
                    f"layer {layer.number} took {taken} tokens of {self._coming}: its attention "
                    "does not go through transformers' attention interface once per forward, so tiers cannot serve it; "
                    "use a model whose attention does"
                )
        self._started = None

    def _progress(self) -> list[int]:
        """How far each layer, and each of its groups of rows, has come."""
        columns = [layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)]
        return columns + [layer.num_steps for layer in self.core.every_layer()]

    def check_whole(self) -> None:
        """Raise `InterruptedForwardError` if an earlier forward stopped after some layers had taken its tokens."""
        columns = {layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)}
        if len(columns) > 1 or (self._started is not None and self._started != self._progress()):
            raise InterruptedForwardError(
                "an earlier forward failed midway, and some layers or rows hold its tokens while others do not; go on "
                "from a fork() made before it, or reset() the cache"
            )

    def reset(self) -> None:
        """Forget everything. If that is interrupted, the cache refuses to go on until it is reset."""
        self._started = []
        super().reset()
        self._started = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make new row i what row `beam_idx[i]` was, in every layer or (on an error) in none."""
        self._change_rows(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, named by number or by a mask, in every layer or (on an error) in none."""
        given: Any = indices
        if not isinstance(given, Tensor):
            raise GeometryError(f"rows are named by a tensor of numbers or a mask, got {given!r}")
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._change_rows(rows, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make every row `repeats` rows, one behind the other, in every layer or (on an error) in none."""
        given: Any = repeats
        if isinstance(given, Tensor) or not hasattr(given, "__index__") or operator.index(given) < 0:
            raise GeometryError(f"a row cannot be repeated {repeats!r} times; give a whole number of at least 1")
        rows = torch.arange(self.core.layers[0].batch or 0).repeat_interleave(repeats)
        self._change_rows(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    def _change_rows(self, rows: Tensor, change: Callable[[Any], None]) -> None:
        """Select `rows` of the tiers, and `change` the layers that stay transformers' own."""

        def change_all() -> None:
            if self.core.layers[0].batch is not None:
                self.core.select_rows(rows)
            for layer in self.layers:
                if not isinstance(layer, TieredLayer):
                    change(layer)

        self._all_or_nothing(change_all)

    def _all_or_nothing(self, change: Callable[[], Made]) -> Made:
        """What `change` returns. If it fails, tiers and the layers that transformers asks are as they were before."""
        before, told = [dict(vars(layer)) for layer in self.layers], (self._started, self.position_shift)

        def back() -> None:
            for layer, was in zip(self.layers, before, strict=True):
                vars(layer).update(was)
            self._started, self.position_shift = told

        return self.core.all_or_nothing(change, also=back)[0]

    @property
    def is_croppable(self) -> bool:
        """Whether transformers may give tokens back.

        It asks before assisted decoding, which reads several tokens at once and must give what one at a time gives:
        only policies that attend everything do, and those that drop and leave positions alone. On Apple's mps it also
        asks before it decodes a token more than was asked for, which it must be able to give back for certain.
        """
        forgets = [policy for policy in self.policies if policy.recent is not None]
        alike = all(one.in_place or (one.compressor.drops and not one.realigner.rotates) for one in forgets)
        certain = self.device.type != "mps" or not forgets
        return alike and certain and all(layer.is_croppable for layer in self.layers)

    @property
    def rotates(self) -> bool:
        """Whether keys are stored unrotated and placed by a realigner."""
        return self.core.policies[0].realigner.rotates

    @property
    def policies(self) -> list[Policy]:
        """The policy of each tiered layer."""
        return self.core.policies

    def swap(self, policy: str | Path | Policy | list[Policy], **changes: Any) -> None:
        """Go on under another policy, named with changes as for `tiered`, or a list: one for each tiered layer.

        Changes start from the preset, not from what the cache has: name all that differ from it. What needs tokens that
        are gone, or keys of another kind, raises `SwapError` and changes nothing.
        """
        if not isinstance(policy, list):
            policy = resolve(policy, layers=self.outline.tiers, **changes)
        elif changes:
            raise PolicyError(f"changes go with one policy, got {', '.join(changes)} with a list of {len(policy)}")
        self.core.swap(policy)

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
        columns = -operator.index(tokens_to_remove) if hasattr(tokens_to_remove, "__index__") else -1
        if columns < 0:
            raise CropError(
                "crop() takes the number of tokens to remove as a negative whole number or 0, got "
                f"{tokens_to_remove!r}; crop(-3) removes the newest three"
            )
        for layer in self.layers:
            reason = _why_not_crop(layer, columns) if columns else None
            if reason is not None:
                raise CropError(f"cannot remove {columns} columns: {reason}")

        def crop_all() -> None:
            self.core.crop_by(columns)
            for cropped in self.layers:
                own: Any = cropped
                if isinstance(cropped, TieredLayer):
                    cropped.columns -= columns
                else:
                    own.crop(tokens_to_remove)

        self._all_or_nothing(crop_all)

    def compact(self, *, recent: int) -> None:
        """Age now what is older than the newest `recent` tokens, whatever the policy's `recent` is.

        With `recent=None` in the policy, a prompt of any length is read in full, and compressed when all of it is
        known. The model's own sliding layers stay as they are.
        """
        self.check_whole()
        self.core.compact(recent=recent)

    def rewind_recent(self) -> int:
        """Forget the recent tokens of every row; returns how many columns must be fed again.

        Rows must have come equally far, without padding among the recent tokens, and the model must have no layers of
        its own; raises `CropError` otherwise, and nothing changes.
        """
        self.check_whole()
        own = [layer for layer in self.layers if not isinstance(layer, TieredLayer)]
        lengths = {layer.num_steps for layer in self.core.every_layer()}
        if own or len(lengths) > 1:
            what = f"{len(own)} layers keep transformers' own cache" if own else f"rows hold {sorted(lengths)} tokens"
            raise CropError(f"recent cannot be rewound: {what}; fork() the cache before what may have to be fed again")

        def rewind() -> int:
            steps = self.core.rewind_recent()
            for layer in self.tiered_layers:
                if layer.columns - steps < layer.padded_until:
                    raise CropError(f"{steps} recent tokens cannot be rewound: {_PADDED}")
                layer.columns -= steps
            return steps

        return self._all_or_nothing(rewind)

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
        self.check_whole()
        columns = [[layer.columns, layer.padded_until] for layer in self.tiered_layers]
        self.core.save(path, extra={"columns": columns, "shift": self.position_shift, "model": str(self.outline)})

    def load(self, path: str | Path) -> None:
        """Become what was saved from a cache of the same model and policy."""
        self._refuse_own_layers("loaded")

        def fill() -> None:
            extra = self.core.load(path, device=self.device, expect={"model": str(self.outline)})
            counts, shift = self._counts_in(extra), extra.get("shift")
            if counts is None or not isinstance(shift, int | None):
                raise SavedCacheError(f"{path} does not say how many columns each layer has seen; save the cache again")
            self._started, self.position_shift = None, shift
            for layer, (columns, padded_until) in zip(self.tiered_layers, counts, strict=True):
                layer.columns, layer.padded_until, layer.is_initialized = columns, padded_until, True

        self._all_or_nothing(fill)

    def _counts_in(self, extra: dict[str, Any]) -> list[list[int]] | None:
        """Columns, and the last padded one, of each layer as a file says; None if that cannot be."""
        told, layers = extra.get("columns"), self.tiered_layers
        if not isinstance(told, list) or len(told) != len(layers):
            return None
        for layer, counts in zip(layers, told, strict=True):
            whole = isinstance(counts, list) and len(counts) == 2 and all(type(count) is int for count in counts)
            if not whole or not 0 <= counts[1] <= counts[0] or counts[0] != told[0][0]:
                return None
            if counts[0] < layer.layer.num_steps:
                return None
        return told

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
            return _PADDED
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
