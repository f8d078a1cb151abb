"""`TieredCache`: the layers of a model, and the rows of a batch. Rows that advance together share one store."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvtiers import accounting, saving, session, swap
from kvtiers.blocks import Context, Extent, Tier
from kvtiers.errors import CropError, GeometryError, SwapError
from kvtiers.geometry import Geometry
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary
from kvtiers.store import LayerStore, Observe


class Ragged:
    """Which columns of a forward are real tokens, by row. Worked out once per forward, for all layers."""

    def __init__(self, valid: Bool[Tensor, "batch steps"]) -> None:
        host = valid.cpu()
        patterns: dict[bytes, int] = {}
        self.pattern_of_row: list[int] = []
        self.columns: list[Tensor] = []
        for row in host:
            key = bytes(row.tolist())
            if key not in patterns:
                patterns[key] = len(patterns)
                self.columns.append(row.nonzero()[:, 0].to(valid.device))
            self.pattern_of_row.append(patterns[key])
        self.tokens = int(host.sum())
        """Real tokens of all rows."""

    @staticmethod
    def of(valid: Bool[Tensor, "batch steps"] | None) -> "Ragged | None":
        """None if every token of every row is real."""
        return None if valid is None or bool(valid.all()) else Ragged(valid)


@attrs.frozen(eq=False, kw_only=True)
class Turn:
    """One chunk of some rows of a forward, written and selected: attend `query` to `context`.

    rows: which rows of the batch (none: all). columns: which columns of the forward.
    query: [rows, query_heads, columns, head_dim], placed.
    """

    rows: Int[Tensor, " rows"] | None
    columns: slice | Int[Tensor, " columns"]
    query: Float[Tensor, "rows query_heads columns head_dim"]
    context: Context


@attrs.define(eq=False)
class Lane:
    """Rows with the same history extents, and their store. rows: none means all of them."""

    rows: Int[Tensor, " rows"] | None
    store: LayerStore


class Layer:
    """One layer: its lanes. A batch without padding is one lane."""

    def __init__(self, make: Callable[[int], LayerStore], number: int) -> None:
        self._make = make
        self.number = number
        """The model's number for this layer."""
        self.lanes: list[Lane] = []

    @property
    def tokens(self) -> int:
        """Tokens seen by all rows together."""
        return sum(lane.store.num_steps * lane.store.geometry.batch for lane in self.lanes)

    @property
    def num_steps(self) -> int:
        """Steps seen by the row that has seen most."""
        return max((lane.store.num_steps for lane in self.lanes), default=0)

    def num_steps_by_row(self) -> list[int]:
        """Steps seen by each row; empty before the first tokens."""
        seen = {row: lane.store.num_steps for lane in self.lanes for row in _numbers(lane)}
        return [seen[row] for row in sorted(seen)]

    @property
    def batch(self) -> int | None:
        """Rows, or none before the first tokens."""
        return sum(lane.store.geometry.batch for lane in self.lanes) or None

    def check_batch(self, batch: int) -> None:
        """Raise `GeometryError` unless a forward of `batch` rows can go on from here."""
        if self.num_steps and self.batch != batch:
            raise GeometryError(
                f"layer {self.number} holds {self.batch} rows, got {batch}; a filled cache cannot grow its batch by "
                "itself: use batch_repeat_interleave or batch_select_indices first, or reset() it"
            )

    def _split(self, batch: int, ragged: Ragged | None) -> list[tuple[Lane, Tensor | None]]:
        """The lanes of this forward with their valid columns (none: all), split where rows part ways."""
        self.check_batch(batch)
        if self.batch != batch:
            self.lanes = [Lane(None, self._make(batch))]
        if ragged is None:
            return [(lane, None) for lane in self.lanes]
        lanes: list[tuple[Lane, Tensor | None]] = []
        for lane in self.lanes:
            rows = list(range(batch)) if lane.rows is None else lane.rows.tolist()
            groups: dict[int, list[int]] = {}
            for at, row in enumerate(rows):
                groups.setdefault(ragged.pattern_of_row[row], []).append(at)
            for pattern, members in groups.items():
                columns = ragged.columns[pattern]
                if len(groups) == 1:
                    lanes.append((lane, columns))
                    continue
                own = session.fork(lane.store) if lane.store.num_steps else self._make(len(members))
                if lane.store.num_steps:
                    session.select_rows(own, torch.tensor(members, device=columns.device))
                lanes.append((Lane(torch.tensor([rows[m] for m in members], device=columns.device), own), columns))
        self.lanes = [lane for lane, _ in lanes]
        return lanes

    def turns(
        self,
        query: Float[Tensor, "batch query_heads steps head_dim"],
        keys: Float[Tensor, "batch kv_heads steps head_dim"],
        values: Float[Tensor, "batch kv_heads steps value_dim"],
        ragged: Ragged | None = None,
    ) -> Iterator[Turn]:
        """Feed a forward of any length through the three verbs, cut on the policy's absolute chunk grid (text)."""
        for lane, columns in self._split(keys.shape[0], ragged):
            length = keys.shape[2] if columns is None else columns.numel()
            size = lane.store.policy.chunk_size
            start = 0
            while start < length:
                stop = length if size is None else min(length, start + size - lane.store.num_steps % size)
                where = slice(start, stop) if columns is None else columns[start:stop]
                q, k, v = (_part(x, lane.rows, where, stop - start) for x in (query, keys, values))
                lane.store.write(k, v)
                lane.store.select(q)
                yield Turn(rows=lane.rows, columns=where, query=lane.store.place_query(q), context=lane.store.context())
                start = stop

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Make new row i what row `rows[i]` was."""
        if rows.numel() == 0 or rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise GeometryError(
                f"rows to keep are named by their numbers, got a tensor {tuple(rows.shape)} of {rows.dtype}; "
                "name at least one row, or reset() the cache"
            )
        if self.batch is not None and (rows.device.type == "cpu" or len(self.lanes) > 1):
            absent = sorted({row for row in rows.tolist() if not 0 <= row < self.batch})
            if absent:  # rows on a GPU are not looked at, which would wait for it
                raise GeometryError(f"layer {self.number} holds rows 0 to {self.batch - 1} and no row {absent[0]}")
        if len(self.lanes) == 1:
            session.select_rows(self.lanes[0].store, rows)
            self.lanes[0].rows = None
            return
        wanted = rows.tolist()
        lanes = []
        for lane in self.lanes:
            own = {row: at for at, row in enumerate(lane.rows.tolist())} if lane.rows is not None else {}
            new = [(i, own[row]) for i, row in enumerate(wanted) if row in own]
            if new:
                session.select_rows(lane.store, torch.tensor([at for _, at in new], device=rows.device))
                lanes.append(Lane(torch.tensor([i for i, _ in new], device=rows.device), lane.store))
        if len(lanes) == 1:
            lanes[0].rows = None
        self.lanes = lanes

    def stores(self) -> list[LayerStore]:
        return [lane.store for lane in self.lanes]

    def adopt(self, lanes: Sequence[tuple[Tensor | None, LayerStore]]) -> None:
        """Become `lanes`: the rows (none: all) and store of each."""
        self.lanes = [Lane(rows, store) for rows, store in lanes]


def _numbers(lane: Lane) -> list[int]:
    """The rows of a lane by number."""
    numbers: list[int] = list(range(lane.store.geometry.batch)) if lane.rows is None else lane.rows.tolist()
    return numbers


def _part(x: Tensor, rows: Tensor | None, where: slice | Tensor, length: int) -> Tensor:
    """Some rows and columns of a forward; the tensor itself where that is all of them."""
    x = _rows(x, rows)
    return x if isinstance(where, slice) and length == x.shape[2] else x[:, :, where]


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


class TieredCache:
    """What a transformer remembers: one `Layer` per layer of the model.

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
            self._store(index, 1)
        self.layers = [self._layer(index) for index in range(count)]

    def _store(self, index: int, batch: int) -> LayerStore:
        return LayerStore(
            self.policies[index],
            attrs.evolve(self.geometries[index], batch=batch),
            layer=self.numbers[index],
            rotary=self.rotaries[index],
            observe=self.observe,
            check=self.check,
            keep_graph=self.keep_graph,
        )

    def _layer(self, index: int) -> Layer:
        return Layer(lambda batch: self._store(index, batch), self.numbers[index])

    # ------------------------------------------------------------------ the three verbs

    def write(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        *,
        replace: bool = False,
    ) -> None:
        """Add current tokens, at most one chunk, for rows without padding (with padding, use `layers[i].turns`).

        replace: take them in place of those that are current (video: a denoise step).
        """
        for lane, _ in self.layers[layer]._split(keys.shape[0], None):
            lane.store.write(_rows(keys, lane.rows), _rows(values, lane.rows), replace=replace)

    def commit(self, layer: int | None = None) -> None:
        """Make the current tokens of `layer` history, or of every layer. After an error it can be called again."""
        for store in self.stores() if layer is None else self.layers[layer].stores():
            store.commit()

    def select(self, layer: int, query: Float[Tensor, "batch query_heads steps head_dim"] | None = None) -> None:
        """Let the policy choose which archived blocks are attended."""
        for lane in self.layers[layer].lanes:
            lane.store.select(None if query is None else _rows(query, lane.rows))

    def reselect(self) -> None:
        """Let every layer choose anew at its next `select`, whatever its policy's refresh says."""
        for store in self.stores():
            store.reselect()

    def context(self, layer: int) -> Context:
        """What attention sees. Pure. Rows whose histories differ in length have `contexts`."""
        return self._only(layer).context()

    def _only(self, layer: int) -> LayerStore:
        lanes = self.layers[layer].lanes
        if len(lanes) != 1:
            raise GeometryError(
                f"layer {layer} has {len(lanes)} groups of rows with histories of different length (or none yet); "
                "read contexts(layer) instead"
            )
        return lanes[0].store

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
        """Hold the reduced K/V of the current block (see `LayerStore.beside`)."""
        return self._only(layer).beside(query, keys, values, offsets, span)

    def contexts(self, layer: int) -> list[tuple[Tensor | None, Context]]:
        """The context of each group of rows (none: all rows) that has seen a token."""
        return [(lane.rows, lane.store.context()) for lane in self.layers[layer].lanes if lane.store.num_steps]

    # ------------------------------------------------------------------ as a whole

    @property
    def num_steps(self) -> int:
        """Steps that the first layer has seen."""
        return self.layers[0].num_steps if self.layers else 0

    @property
    def committed_steps(self) -> int:
        """Steps that are history in every layer and row; later ones are current."""
        return min((store.committed_steps for store in self.stores()), default=0)

    def stores(self) -> list[LayerStore]:
        """Every store of every layer."""
        return [store for layer in self.layers for store in layer.stores()]

    def reset(self) -> None:
        """Forget everything; buffers and archived files are freed."""
        for layer in self.layers:
            layer.lanes = []

    def crop(self, steps: int) -> None:
        """Roll every row back to its first `steps` steps, exactly, or raise `CropError` and change nothing."""
        if self.geometries and not self.geometries[0].causal:
            self._crop_to([steps for _ in self.stores()])  # a pass that failed may have left drafts in some layers
        else:
            self.crop_by(self.num_steps - steps)

    def crop_by(self, steps: int) -> None:
        """Remove the newest `steps` steps of every row, exactly, or raise `CropError` and change nothing."""
        self._crop_to([store.num_steps - steps for store in self.stores()])

    def _crop_to(self, wanted: Sequence[int]) -> None:
        """Roll each store back to its own number of steps, or none."""
        for store, steps in zip(self.stores(), wanted, strict=True):
            reason = session.why_not_crop(store, steps)
            if reason is not None:
                raise CropError(
                    f"layer {store.layer} cannot give back {store.num_steps - steps} of {store.num_steps} steps: "
                    f"{reason}; "
                    "fork() the cache before steps that may have to be undone"
                )
        for store, steps in zip(self.stores(), wanted, strict=True):
            session.crop(store, steps)

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
            theirs.adopt([(lane.rows, session.fork(lane.store)) for lane in mine.lanes])
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
        for layer, policy in zip(self.layers, each, strict=True):
            for store in layer.stores():
                swap.check(store, policy)
        rotates = [policy.realigner.rotates for policy in (*self.policies, *each)]
        if any(rotates) != all(rotates):
            raise SwapError(
                "realigners that rotate and realigners that do not cannot replace one another; start a new cache"
            )
        for layer, policy in zip(self.layers, each, strict=True):
            for store in layer.stores():
                swap.apply(store, policy)
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
        return accounting.memory_usage_of(self.stores())

    def attended(self) -> list[int]:
        """Tokens that the last step of each layer attended, per row and KV head (of its longest row)."""
        return [max((store.tail - store.begin for store in layer.stores()), default=0) for layer in self.layers]

    def tier_counts(self, layer: int = 0, row: int = 0) -> dict[str, int]:
        """How many steps of a row are in each tier, and how many a policy dropped."""
        for lane in self.layers[layer].lanes:
            if lane.rows is None or row in lane.rows.tolist():
                return lane.store.tier_counts()
        return {}

    def layout(self, layer: int = 0) -> list[tuple[Extent, Tier]]:
        """The blocks of the row that has seen most, each with its tier."""
        stores = self.layers[layer].stores()
        store = max(stores, key=lambda s: s.num_steps) if stores else None
        return [] if store is None else store.timeline.layout(store.committed_steps)
