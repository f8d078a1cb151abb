"""The rows of one layer, in groups: rows that have seen equally many tokens share a `Layer`.

A padded row is thereby the same row alone. A batch without padding is one group.
"""

from collections.abc import Callable, Iterator

import attrs
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvtiers.blocks import Context
from kvtiers.errors import GeometryError
from kvtiers.layer import Layer


class PaddingPattern:
    """Which columns of a forward are real tokens, by row. Worked out once per forward, for all layers."""

    def __init__(self, valid: Bool[Tensor, "batch steps"]) -> None:
        host = valid.cpu()
        patterns, pattern_of_row = host.unique(dim=0, return_inverse=True)
        self.pattern_of_row: list[int] = pattern_of_row.tolist()
        self.columns: list[Tensor] = [pattern.nonzero()[:, 0].to(valid.device) for pattern in patterns]
        self.tokens = int(host.sum())
        """Real tokens of all rows."""
        self.until = int((~host).any(0).nonzero().max()) + 1
        """The column after the last one in which some row has padding."""

    @staticmethod
    def of(valid: Bool[Tensor, "batch steps"] | None) -> "PaddingPattern | None":
        """None if every token of every row is real."""
        return None if valid is None or bool(valid.all()) else PaddingPattern(valid)


@attrs.frozen(eq=False, kw_only=True)
class Chunk:
    """One chunk of some rows of a forward, written and selected: attend `query` to `context`.

    rows: which rows of the batch (None: all). columns: which columns of the forward.
    query: [rows, query_heads, columns, head_dim], placed.
    """

    rows: Int[Tensor, " rows"] | None
    columns: slice | Int[Tensor, " columns"]
    query: Float[Tensor, "rows query_heads columns head_dim"]
    context: Context


@attrs.frozen(eq=False)
class RowGroup:
    """Rows with the same history extents, and their layer. rows: None means all of them."""

    rows: Int[Tensor, " rows"] | None
    layer: Layer

    def numbers(self) -> list[int]:
        """The rows by number."""
        numbers: list[int] = list(range(self.layer.geometry.batch)) if self.rows is None else self.rows.tolist()
        return numbers


class LayerRows:
    """One layer of a model, for all rows of a batch. `make` gives an empty `Layer` for a number of rows."""

    def __init__(self, make: Callable[[int], Layer], number: int) -> None:
        self._make = make
        self.number = number
        """The model's number for this layer."""
        self.groups: tuple[RowGroup, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens seen by all rows together."""
        return sum([group.layer.num_steps * group.layer.geometry.batch for group in self.groups])

    @property
    def num_steps(self) -> int:
        """Steps seen by the row that has seen most."""
        return max((group.layer.num_steps for group in self.groups), default=0)

    def num_steps_by_row(self) -> list[int]:
        """Steps seen by each row; empty before the first tokens."""
        seen = {row: group.layer.num_steps for group in self.groups for row in group.numbers()}
        return [seen[row] for row in sorted(seen)]

    @property
    def batch(self) -> int | None:
        """Rows, or None before the first tokens."""
        return sum(group.layer.geometry.batch for group in self.groups) or None

    def check_batch(self, batch: int) -> None:
        """Raise `GeometryError` unless a forward of `batch` rows can go on from here."""
        if self.num_steps and self.batch != batch:
            raise GeometryError(
                f"layer {self.number} holds {self.batch} rows, got {batch}; a filled cache cannot grow its batch by "
                "itself: use batch_repeat_interleave or batch_select_indices first, or reset() it"
            )

    def for_rows(self, batch: int) -> tuple[RowGroup, ...]:
        """The groups of a forward of `batch` rows without padding."""
        if len(self.groups) == 1 and self.groups[0].layer.geometry.batch == batch:  # asked at every token
            return self.groups
        self.check_batch(batch)
        if self.batch != batch:
            self.groups = (RowGroup(None, self._make(batch)),)
        return self.groups

    def _split(self, batch: int, padding: PaddingPattern | None) -> list[tuple[RowGroup, Tensor | None]]:
        """The groups of this forward with their real columns (None: all), split where rows part ways."""
        groups = self.for_rows(batch)
        if padding is None:
            return [(group, None) for group in groups]
        parted: list[tuple[RowGroup, Tensor | None]] = []
        for group in groups:
            rows = group.numbers()
            members: dict[int, list[int]] = {}
            for at, row in enumerate(rows):
                members.setdefault(padding.pattern_of_row[row], []).append(at)
            for pattern, those in members.items():
                columns = padding.columns[pattern]
                if len(members) == 1:
                    parted.append((group, columns))
                    continue
                own = torch.tensor(those, device=columns.device)
                layer = group.layer.select_rows(own) if group.layer.num_steps else self._make(len(those))
                layer.join(layer.history.budget)
                parted.append((RowGroup(torch.tensor([rows[m] for m in those], device=columns.device), layer), columns))
        self.groups = tuple(group for group, _ in parted)
        return parted

    def chunks(
        self,
        query: Float[Tensor, "batch query_heads steps head_dim"],
        keys: Float[Tensor, "batch kv_heads steps head_dim"],
        values: Float[Tensor, "batch kv_heads steps value_dim"],
        padding: PaddingPattern | None = None,
    ) -> Iterator[Chunk]:
        """Feed a forward of any length through the three verbs, cut on the policy's absolute chunk grid (text)."""
        for group, columns in self._split(keys.shape[0], padding):
            layer, start = group.layer, 0
            length = keys.shape[2] if columns is None else columns.numel()
            size = layer.policy.chunk_size
            while start < length:
                stop = length if size is None else min(length, start + size - layer.num_steps % size)
                where = slice(start, stop) if columns is None else columns[start:stop]
                q, k, v = query, keys, values
                if group.rows is not None or columns is not None or stop - start != keys.shape[2]:
                    q, k, v = (of_rows(x, group.rows)[:, :, where] for x in (query, keys, values))
                layer.write(k, v)
                layer.select(q)
                yield Chunk(rows=group.rows, columns=where, query=layer.place_query(q), context=layer.context())
                start = stop

    def check_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Raise `GeometryError` unless `rows` names rows that are here. Rows on a GPU are looked at only if parted."""
        if not isinstance(rows, Tensor):
            raise GeometryError(f"rows to keep are a tensor of whole numbers, got {rows!r}; give torch.tensor([...])")
        if rows.numel() == 0 or rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise GeometryError(
                f"rows to keep are named by their numbers, got a tensor {tuple(rows.shape)} of {rows.dtype}; "
                "name at least one row, or reset() the cache"
            )
        if self.batch is not None and (rows.device.type == "cpu" or len(self.groups) > 1):
            absent = sorted({row for row in rows.tolist() if not 0 <= row < self.batch})
            if absent:
                raise GeometryError(f"layer {self.number} holds rows 0 to {self.batch - 1} and no row {absent[0]}")

    def with_rows(self, rows: Int[Tensor, " rows"]) -> tuple[RowGroup, ...]:
        """The groups whose new row i is what row `rows[i]` is. Nothing here changes."""
        self.check_rows(rows)
        if len(self.groups) == 1:
            return (RowGroup(None, self.groups[0].layer.select_rows(rows)),)
        wanted, made = rows.tolist(), []
        for group in self.groups:
            own = {row: at for at, row in enumerate(group.numbers())}
            new = [(i, own[row]) for i, row in enumerate(wanted) if row in own]
            if new:
                device = rows.device if group.rows is None else group.rows.device
                layer = group.layer.select_rows(torch.tensor([at for _, at in new], device=device))
                made.append(RowGroup(torch.tensor([i for i, _ in new], device=device), layer))
        return (RowGroup(None, made[0].layer),) if len(made) == 1 else tuple(made)

    def layers(self) -> list[Layer]:
        """The layer of each group."""
        return [group.layer for group in self.groups]


def of_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of a batch (None: all)."""
    return x if rows is None else x.index_select(0, rows)
