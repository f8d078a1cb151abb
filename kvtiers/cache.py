"""`TieredCache`: the layers of a model, and what is done to all of them at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers import accounting, saving, session, swap
from kvtiers.blocks import Context, Extent, Tier
from kvtiers.errors import CropError, GeometryError, SwapError
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer, Observe
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary
from kvtiers.rows import LayerRows, rows_of


class TieredCache:
    """What a transformer remembers: one `LayerRows` per layer of the model.

    policies: one for all layers, or one each. geometries: one per layer (their `batch` is taken from the first tokens).
    rotaries: how each layer rotates, or none where it does not.
    numbers: what the model calls these layers, for messages and events (none: 0, 1, ...).
    observe: told of every `kvtiers.events.Event`.
    check: refuse keys or values that are not finite (looks at every token, so it costs a wait on a GPU).
    keep_graph: let gradients flow through compressed blocks that the model projected (see `SourceCompressor`) to what
        made them; their graphs are held as long as the cache.
    """

    def __init__(
        self,
        policies: Policy | Sequence[Policy],
        geometries: Sequence[Geometry],
        *,
        rotaries: Sequence[Rotary | None] | None = None,
        numbers: Sequence[int] | None = None,
        observe: Observe | None = None,
        check: bool = False,
        keep_graph: bool = False,
    ) -> None:
        count = len(geometries)
        each = [policies] * count if isinstance(policies, Policy) else list(policies)
        alike: dict[object, Rotary] = {}  # layers that rotate alike share the tables of one rotary
        given = list(rotaries) if rotaries is not None else [None] * count
        rotary = [None if one is None else alike.setdefault(one.fingerprint, one) for one in given]
        if len(each) != count or len(rotary) != count:
            raise GeometryError(
                f"one policy and one rotary per layer: got {len(each)} policies, {len(rotary)} rotaries "
                f"for {count} layers"
            )
        self.policies, self.geometries, self.rotaries = each, list(geometries), rotary
        self.numbers = list(range(count)) if numbers is None else list(numbers)
        self.observe, self.check, self.keep_graph = observe, check, keep_graph
        for index in range(count):
            self._layer(index, 1)
        self.layers = [self._layer_rows(index) for index in range(count)]

    def _layer(self, index: int, batch: int) -> Layer:
        return Layer(
            self.policies[index],
            attrs.evolve(self.geometries[index], batch=batch),
            layer=self.numbers[index],
            rotary=self.rotaries[index],
            observe=self.observe,
            check=self.check,
            keep_graph=self.keep_graph,
        )

    def _layer_rows(self, index: int) -> LayerRows:
        return LayerRows(lambda batch: self._layer(index, batch), self.numbers[index])

    # ------------------------------------------------------------------ the three verbs

    def write(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        *,
        replace: bool = False,
    ) -> None:
        """Add current tokens, at most one chunk, for rows without padding (with padding, use `layers[i].chunks`).

        replace: take them in place of those that are current (video: a denoise step).
        """
        for group, _ in self.layers[layer].split(keys.shape[0], None):
            group.layer.write(rows_of(keys, group.rows), rows_of(values, group.rows), replace=replace)

    def commit(self, layer: int | None = None) -> None:
        """Make the current tokens of `layer` history, or of every layer. After an error it can be called again."""
        for one in self.every_layer() if layer is None else self.layers[layer].layers():
            one.commit()

    def select(self, layer: int, query: Float[Tensor, "batch query_heads steps head_dim"] | None = None) -> None:
        """Let the policy choose which archived blocks are attended."""
        for group in self.layers[layer].groups:
            group.layer.select(None if query is None else rows_of(query, group.rows))

    def reselect(self) -> None:
        """Let every layer choose anew at its next `select`, whatever its policy's refresh says."""
        for layer in self.every_layer():
            layer.reselect()

    def context(self, layer: int) -> Context:
        """What attention sees. Pure. Rows whose histories differ in length have `contexts`."""
        return self._only(layer).context()

    def _only(self, layer: int) -> Layer:
        groups = self.layers[layer].groups
        if len(groups) != 1:
            raise GeometryError(
                f"layer {layer} has {len(groups)} groups of rows with histories of different length (or none yet); "
                "read contexts(layer) instead"
            )
        return groups[0].layer

    def place_query(
        self, layer: int, query: Float[Tensor, "batch query_heads tokens head_dim"]
    ) -> Float[Tensor, "batch query_heads tokens head_dim"]:
        """Rotate the current tokens' queries to where their keys are placed (nothing to do under `original`)."""
        return self._only(layer).place_query(query)

    def beside(
        self,
        layer: int,
        query: Float[Tensor, "batch query_heads tokens head_dim"],
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        offsets: Float[Tensor, "tokens axes"],
        span: int,
    ) -> tuple[Tensor, Context]:
        """Hold the reduced K/V of the current block (see `Layer.beside`)."""
        return self._only(layer).beside(query, keys, values, offsets, span)

    def contexts(self, layer: int) -> list[tuple[Tensor | None, Context]]:
        """The context of each group of rows (none: all rows) that has seen a token."""
        return [(group.rows, group.layer.context()) for group in self.layers[layer].groups if group.layer.num_steps]

    # ------------------------------------------------------------------ as a whole

    @property
    def num_steps(self) -> int:
        """Steps that the first layer has seen."""
        return self.layers[0].num_steps if self.layers else 0

    @property
    def committed_steps(self) -> int:
        """Steps that are history in every layer and row; later ones are current."""
        return min((layer.committed_steps for layer in self.every_layer()), default=0)

    def every_layer(self) -> list[Layer]:
        """The `Layer` of every group of rows of every layer of the model."""
        return [layer for rows in self.layers for layer in rows.layers()]

    def reset(self) -> None:
        """Forget everything; buffers and archived files are freed."""
        for layer in self.layers:
            layer.groups = []

    def crop(self, steps: int) -> None:
        """Roll every row back to its first `steps` steps, exactly, or raise `CropError` and change nothing."""
        if self.geometries and not self.geometries[0].causal:
            self._crop_to([steps for _ in self.every_layer()])  # a pass that failed may have left drafts in some layers
        else:
            self.crop_by(self.num_steps - steps)

    def crop_by(self, steps: int) -> None:
        """Remove the newest `steps` steps of every row, exactly, or raise `CropError` and change nothing."""
        self._crop_to([layer.num_steps - steps for layer in self.every_layer()])

    def _crop_to(self, wanted: Sequence[int]) -> None:
        """Roll each layer back to its own number of steps, or none."""
        for layer, steps in zip(self.every_layer(), wanted, strict=True):
            reason = session.why_not_crop(layer, steps)
            if reason is not None:
                raise CropError(
                    f"layer {layer.layer} cannot give back {layer.num_steps - steps} of {layer.num_steps} steps: "
                    f"{reason}; "
                    "fork() the cache before steps that may have to be undone"
                )
        for layer, steps in zip(self.every_layer(), wanted, strict=True):
            session.crop(layer, steps)

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Make new row i what row `rows[i]` was: reorder, repeat or select rows."""
        for layer in self.layers:
            layer.select_rows(rows)

    def fork(self) -> "TieredCache":
        """An independent copy that continues exactly from here."""
        other = TieredCache(
            self.policies,
            self.geometries,
            rotaries=self.rotaries,
            numbers=self.numbers,
            observe=self.observe,
            check=self.check,
            keep_graph=self.keep_graph,
        )
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.adopt([(group.rows, session.fork(group.layer)) for group in mine.groups])
        return other

    def swap(self, policies: Policy | Sequence[Policy]) -> None:
        """Go on under another policy. What would need tokens that are gone raises `SwapError` and changes nothing."""
        each: Any = [policies] * len(self.layers) if isinstance(policies, Policy) else policies
        listed = isinstance(each, Sequence) and len(each) == len(self.layers)
        if not listed or not all(isinstance(policy, Policy) for policy in each):
            raise SwapError(
                f"swap takes one Policy, or one for each of {len(self.layers)} layers, got {policies!r}; "
                "make one with kvtiers.policy(...)"
            )
        for policy, geometry in zip(each, self.geometries, strict=True):
            policy.check_budget(geometry)
        for rows, policy in zip(self.layers, each, strict=True):
            for layer in rows.layers():
                swap.check(layer, policy)
        rotates = [policy.realigner.rotates for policy in (*self.policies, *each)]
        if any(rotates) != all(rotates):
            raise SwapError(
                "realigners that rotate and realigners that do not cannot replace one another; start a new cache"
            )
        for rows, policy in zip(self.layers, each, strict=True):
            for layer in rows.layers():
                swap.apply(layer, policy)
        self.policies = list(each)

    def save(
        self,
        path: str | Path,
        *,
        extra: Mapping[str, Any] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write everything to one safetensors file, whole or not at all.

        extra, beside: plain data and tensors to keep with it.
        """
        saving.save(self, Path(path), dict(extra or {}), dict(beside or {}))

    def load(
        self,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        expect: Mapping[str, Any] | None = None,
        beside: dict[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Become what was saved from a cache of the same policy and geometry, on `device`; returns `extra`.

        expect: what `extra` must say. beside: is given the tensors that were kept with it. On an error
        (`SavedCacheError`) this cache is unchanged.
        """
        extra, kept = saving.load(self, Path(path), torch.device(device), dict(expect or {}))
        if beside is not None:
            beside |= kept
        return extra

    def memory_usage(self) -> list[accounting.MemoryUsage]:
        """Bytes held per tier and location."""
        return accounting.memory_usage_of(self.every_layer())

    def attended(self) -> list[int]:
        """Tokens that the last step of each layer attended, per row and KV head (of its longest row)."""
        return [max((layer.tail - layer.begin for layer in rows.layers()), default=0) for rows in self.layers]

    def tier_counts(self, layer: int = 0, row: int = 0) -> dict[str, int]:
        """How many steps of a row are in each tier, and how many a policy dropped."""
        for group in self.layers[layer].groups:
            if group.rows is None or row in group.rows.tolist():
                return group.layer.tier_counts()
        return {}

    def layout(self, layer: int = 0) -> list[tuple[Extent, Tier]]:
        """The blocks of the row that has seen most, each with its tier."""
        found = max(self.layers[layer].layers(), key=lambda one: one.num_steps, default=None)
        return [] if found is None else found.timeline.layout(found.committed_steps)
