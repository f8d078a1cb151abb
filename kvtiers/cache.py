"""`TieredCache`: the layers of a model, and the rows of a batch."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers import saving
from kvtiers.accounting import MemoryUsage, memory_usage_of
from kvtiers.archive import Archive, ByteBudget
from kvtiers.blocks import Blocks, Context, Extent, Tier
from kvtiers.changes import check_policy, check_realigners, check_steps, check_together, one_per_layer, why_not_crop
from kvtiers.checks import check_layer, each_of, given_forms, one_of, rows_of
from kvtiers.errors import CropError, GeometryError
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.layer_state import Observe
from kvtiers.observers import Observers
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary
from kvtiers.rows import LayerRows, RowGroup, of_rows
from kvtiers.undoing import Made, all_or_nothing


class TieredCache:
    """What a transformer remembers: one `LayerRows` per layer of the model.

    policies: one for all layers, or one each. geometries: one per layer (their `batch` is taken from the first tokens).
    rotaries: how each layer rotates, or None where it does not.
    numbers: what the model calls these layers, for messages and events (None: 0, 1, ...).
    observe: told of every `kvtiers.events.Event`, as observers of plugins are; one that raises is not called again.
    check: refuse keys or values that are not finite (looks at every token, so it costs a wait on a GPU).
    layer: the class of each layer, for one that does more (training).
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
        layer: type[Layer] = Layer,
    ) -> None:
        shapes = each_of(geometries, Geometry)
        count = len(shapes)
        each = [policies] * count if isinstance(policies, Policy) else each_of(policies, Policy)
        alike: dict[object, Rotary] = {}  # layers that rotate alike share the tables of one rotary
        given = list(rotaries) if rotaries is not None else [None] * count
        rotary = [None if one is None else alike.setdefault(one.fingerprint, one) for one in given]
        self.numbers = list(range(count)) if numbers is None else list(numbers)
        if not len(each) == len(rotary) == len(self.numbers) == count:
            raise GeometryError(
                f"one policy, one rotary and one number per layer: got {len(each)} policies, {len(rotary)} rotaries "
                f"and {len(self.numbers)} numbers for {count} layers"
            )
        check_realigners(each)
        self.policies, self.geometries, self.rotaries = each, shapes, rotary
        self.observe, self.check, self.layer_class = observe, check, layer
        self.tell = Observers(observe)
        """Tells every observer of an event; false while there is none."""
        self._prompt: tuple[Tensor | None, Callable[[int], Tensor | None] | None] = (None, None)
        self._budgets: dict[Archive, ByteBudget] = {}
        for index in range(count):
            self.new_layer(index, 1)
        self.layers = [self._rows_of(index) for index in range(count)]

    def new_layer(self, index: int, batch: int) -> Layer:
        """An empty layer like number `index` of the cache, for `batch` rows."""
        policy = self.policies[index]
        return self.layer_class(
            policy=policy,
            geometry=attrs.evolve(self.geometries[index], batch=batch),
            layer=self.numbers[index],
            rotary=self.rotaries[index],
            observe=self.tell,
            check=self.check,
            budget=self.budget(policy.archive),
            prompt=self._prompt,
        )

    def budget(self, archive: Archive) -> ByteBudget:
        """The byte budget of this cache in `archive`."""
        return self._budgets.setdefault(archive, ByteBudget(archive.limit_bytes))

    def _rows_of(self, index: int) -> LayerRows:
        me = weakref.ref(self)  # so that `del cache` frees at once

        def make(batch: int) -> Layer:
            cache = me()
            if cache is None:
                raise GeometryError("this layer's cache is gone; keep the cache as long as its layers are fed")
            return cache.new_layer(index, batch)

        return LayerRows(make, self.numbers[index])

    # ------------------------------------------------------------------ the verbs

    def write(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        *,
        replace: bool = False,
    ) -> None:
        """Take current tokens, at most one chunk, for rows without padding (with padding, use `layers[i].chunks`).

        replace: in place of the current ones, which otherwise become history (video: a denoise step).
        """
        groups = one_of(self.layers, layer).for_rows(rows_of(keys, values, layer=layer))
        parts = [(one.layer, of_rows(keys, one.rows), of_rows(values, one.rows)) for one in groups]
        writes = [partial(layer.write, *tensors, replace=replace) for layer, *tensors in parts]
        writes[0]() if len(writes) == 1 else self.all_or_nothing(*writes)

    def select(self, layer: int, query: Float[Tensor, "batch query_heads steps head_dim"] | None = None) -> None:
        """Let the policy choose which archived blocks are attended. Due after a write, before `context`."""
        for group in one_of(self.layers, layer).groups:
            group.layer.select(None if query is None else of_rows(query, group.rows))

    def context(self, layer: int) -> Context:
        """What attention sees. Pure. Rows whose histories differ in length have `contexts`."""
        return self.only(layer).context()

    def contexts(self, layer: int) -> list[tuple[Tensor | None, Context]]:
        """The context of each group of rows (None: all rows) that has seen a token."""
        groups = one_of(self.layers, layer).groups
        return [(group.rows, group.layer.context()) for group in groups if group.layer.num_steps]

    def commit(self, layer: int | None = None, *, compressed: Sequence[Blocks | None] | None = None) -> None:
        """Make the current tokens of a layer (None: of all) history. After an error it can be called again.

        compressed: for each layer the compressed form of its current block, where the policy is given it (video).
        """
        given = given_forms(compressed, self.policies)
        for index in range(len(self.layers)) if layer is None else [layer]:
            for one in one_of(self.layers, index).layers():
                one.commit(given[index])

    def commit_due(self) -> None:
        """Make current tokens history in those layers alone in which blocks thereby leave recent (text)."""
        for layer in self.every_layer():
            if layer.due:
                layer.commit()

    def reselect(self) -> None:
        """Let every layer choose anew at its next `select`, whatever its policy's refresh says."""
        for layer in self.every_layer():
            layer.reselect()

    def only(self, layer: int) -> Layer:
        """The layer that serves all rows. Raises `GeometryError` if rows have parted ways, or none have come."""
        groups = one_of(self.layers, layer).groups
        if len(groups) != 1:
            raise GeometryError(
                f"layer {layer} has {len(groups)} groups of rows with histories of different length (or none yet); "
                "read contexts(layer) instead"
            )
        return groups[0].layer

    def set_prompt(self, prompt: Tensor | None, keys: Callable[[int], Tensor | None] | None = None) -> None:
        """Tell policies the embedding of the prompt, and what gives a layer's keys of it (see `Moment`)."""
        self._prompt = prompt, keys
        for layer in self.every_layer():
            layer.prompt = self._prompt

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
        """Every `Layer`, of all layers of the model and all groups of rows."""
        return [layer for rows in self.layers for layer in rows.layers()]

    def all_or_nothing(self, *changes: Callable[[], Made], also: Callable[[], None] = lambda: None) -> list[Made]:
        """What `changes` return. If one fails, every layer is as it was, or refuses to go on; `also` is called then."""
        groups, policies = [rows.groups for rows in self.layers], self.policies

        def back() -> None:
            for rows, held in zip(self.layers, groups, strict=True):
                rows.groups = held
            self.policies = policies
            also()

        return all_or_nothing(self.every_layer(), changes, back)

    def reset(self) -> None:
        """Forget everything; buffers and archived files are freed."""
        for layer in self.layers:
            layer.groups = ()

    def crop(self, steps: int) -> None:
        """Roll every row back to its first `steps` steps, exactly, or raise `CropError` and change nothing."""
        check_steps(steps)
        if self.geometries and not self.geometries[0].causal:
            self._crop_to([steps for _ in self.every_layer()])  # a pass that failed may have left drafts in some layers
        else:
            self.crop_by(self.num_steps - steps)

    def crop_by(self, steps: int) -> None:
        """Remove the newest `steps` steps of every row, exactly, or raise `CropError` and change nothing."""
        check_steps(steps)
        self._crop_to([layer.num_steps - steps for layer in self.every_layer()])

    def _crop_to(self, wanted: Sequence[int]) -> None:
        """Roll each layer back to its own number of steps, or none."""
        layers = self.every_layer()
        for layer, steps in zip(layers, wanted, strict=True):
            reason = why_not_crop(layer, steps)
            if reason is not None:
                raise CropError(
                    f"layer {layer.layer} cannot give back {layer.num_steps - steps} of {layer.num_steps} steps: "
                    f"{reason}; fork() the cache before steps that may have to be undone"
                )
        self.all_or_nothing(*(partial(one.crop, steps) for one, steps in zip(layers, wanted, strict=True)))

    def compact(self, *, recent: int) -> None:
        """Age now, in every layer, what is older than the newest `recent` steps, whatever the policy's `recent` is."""
        if type(recent) is not int or recent < 0:
            raise GeometryError(f"compact() keeps a whole number of recent steps of at least 0, got recent={recent!r}")
        self.all_or_nothing(*(partial(layer.compact, recent) for layer in self.every_layer()))

    def rewind_recent(self) -> int:
        """Forget the recent and current steps of every row; returns how many must be fed again.

        Rows must have come equally far. What has left recent stays.
        """

        def rewind() -> int:
            steps = {layer.rewind_recent() for layer in self.every_layer()}
            if len(steps) > 1:
                raise CropError(f"rows and layers would have to be fed {sorted(steps)} steps again; rewind rows alone")
            return next(iter(steps), 0)

        return self.all_or_nothing(rewind)[0]

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Make new row i what row `rows[i]` was, in every layer or (on an error) in none."""
        changes = [partial(setattr, layer, "groups", layer.with_rows(rows)) for layer in self.layers]
        self.all_or_nothing(*changes, self._join)

    def _join(self) -> None:
        """Count what every layer has archived in this cache's budgets."""
        for index, rows in enumerate(self.layers):
            for layer in rows.layers():
                layer.join(self.budget(self.policies[index].archive))

    def fork(self) -> "TieredCache":
        """An independent copy that continues exactly from here. Archived blocks are shared until one side writes."""
        other = TieredCache(
            self.policies,
            self.geometries,
            rotaries=self.rotaries,
            numbers=self.numbers,
            observe=self.tell.own,
            check=self.check,
            layer=self.layer_class,
        )
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.groups = tuple(RowGroup(group.rows, group.layer.fork()) for group in mine.groups)
        other._join()
        return other

    def swap(self, policies: Policy | Sequence[Policy]) -> None:
        """Go on under another policy. What would need tokens that are gone raises `SwapError` and changes nothing."""
        each, changes = one_per_layer(policies, self.policies), []
        parts = zip(each, self.geometries, self.rotaries, self.numbers, self.layers, strict=True)
        for policy, geometry, rotary, number, rows in parts:
            check_layer(policy, geometry, rotary, number)
            for layer in rows.layers():
                check_policy(layer, policy)
                changes.append(partial(layer.set_policy, policy))
        check_together(self.policies, each, {one.archive: self.budget(one.archive).nbytes for one in self.policies})

        def follow() -> None:
            self.policies = each
            self._join()

        self.all_or_nothing(*changes, follow)

    def save(
        self,
        path: str | Path,
        *,
        extra: Mapping[str, Any] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write everything to one safetensors file, whole or not at all; `extra` and `beside` are kept with it."""
        saving.save(self.layers, self._outline(), saving.file_path(path), extra or {}, beside or {})

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
        where, due = saving.usable_device(device), dict(expect or {})
        groups, extra, kept = saving.load(self.new_layer, self._outline(), saving.file_path(path), where, due)
        changes = [partial(setattr, layer, "groups", those) for layer, those in zip(self.layers, groups, strict=True)]
        self.all_or_nothing(*changes)
        if beside is not None:
            beside |= kept
        return extra

    def _outline(self) -> list[dict[str, Any]]:
        """What must agree between the cache that was saved and the one that loads, for each layer."""
        return [saving.outline(*each) for each in zip(self.policies, self.geometries, self.rotaries, strict=True)]

    def memory_usage(self) -> list[MemoryUsage]:
        """Bytes held per tier and location."""
        return memory_usage_of(self.every_layer())

    def attended(self) -> list[int]:
        """Tokens that the last step of each layer attended, per row and KV head (of its longest row)."""
        return [max((layer.attended for layer in rows.layers()), default=0) for rows in self.layers]

    def tier_counts(self, layer: int = 0, row: int = 0) -> dict[str, int]:
        """How many steps of a row are in each tier, and how many a policy dropped."""
        rows = one_of(self.layers, layer)
        if rows.batch is not None and not 0 <= row < rows.batch:
            raise GeometryError(f"there is no row {row!r}; layer {layer} holds {rows.batch} rows")
        return next((group.layer.tier_counts() for group in rows.groups if row in group.numbers()), {})

    def layout(self, layer: int = 0) -> list[tuple[Extent, Tier]]:
        """The blocks of the row that has seen most, each with its tier."""
        longest = max(one_of(self.layers, layer).layers(), key=lambda one: one.num_steps, default=None)
        return [] if longest is None else longest.timeline.layout(longest.committed_steps)
