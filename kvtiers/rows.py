"""The rows of a batch in one layer of a model. Rows that advance together are one group and share one `Layer`."""

from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvtiers import session
from kvtiers.blocks import Context
from kvtiers.errors import GeometryError
from kvtiers.layer import Layer


class PaddingPattern:
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
    def of(valid: Bool[Tensor, "batch steps"] | None) -> "PaddingPattern | None":
        """None if every token of every row is real."""
        return None if valid is None or bool(valid.all()) else PaddingPattern(valid)


@attrs.frozen(eq=False, kw_only=True)
class Chunk:
    """One chunk of some rows of a forward, written and selected: attend `query` to `context`.

    rows: which rows of the batch (none: all). columns: which columns of the forward.
    query: [rows, query_heads, columns, head_dim], placed.
    """

    rows: Int[Tensor, " rows"] | None
    columns: slice | Int[Tensor, " columns"]
    query: Float[Tensor, "rows query_heads columns head_dim"]
    context: Context


@attrs.define(eq=False)
class RowGroup:
    """Rows with the same history extents, and their layer. rows: `None` means all of them."""

    rows: Int[Tensor, " rows"] | None
    layer: Layer


class LayerRows:
    """One layer of the model: its groups of rows. A batch without padding is one group."""

    def __init__(self, make: Callable[[int], Layer], number: int) -> None:
        self._make = make
        self.number = number
        """The model's number for this layer."""
        self.groups: list[RowGroup] = []

    @property
    def tokens(self) -> int:
        """Tokens seen by all rows together."""
        return sum(group.layer.num_steps * group.layer.geometry.batch for group in self.groups)

    @property
    def num_steps(self) -> int:
        """Steps seen by the row that has seen most."""
        return max((group.layer.num_steps for group in self.groups), default=0)

    def num_steps_by_row(self) -> list[int]:
        """Steps seen by each row; empty before the first tokens."""
        seen = {row: group.layer.num_steps for group in self.groups for row in _numbers(group)}
        return [seen[row] for row in sorted(seen)]

    @property
    def batch(self) -> int | None:
        """Rows, or none before the first tokens."""
        return sum(group.layer.geometry.batch for group in self.groups) or None

    def check_batch(self, batch: int) -> None:
        """Raise `GeometryError` unless a forward of `batch` rows can go on from here."""
        if self.num_steps and self.batch != batch:
            raise GeometryError(
                f"layer {self.number} holds {self.batch} rows, got {batch}; a filled cache cannot grow its batch by "
                "itself: use batch_repeat_interleave or batch_select_indices first, or reset() it"
            )

    def split(self, batch: int, padding: PaddingPattern | None) -> list[tuple[RowGroup, Tensor | None]]:
        """The groups of this forward with their valid columns (none: all), split where rows part ways."""
        self.check_batch(batch)
        if self.batch != batch:
            self.groups = [RowGroup(None, self._make(batch))]
        if padding is None:
            return [(group, None) for group in self.groups]
        groups: list[tuple[RowGroup, Tensor | None]] = []
        for group in self.groups:
            rows = list(range(batch)) if group.rows is None else group.rows.tolist()
            members_of: dict[int, list[int]] = {}
            for at, row in enumerate(rows):
                members_of.setdefault(padding.pattern_of_row[row], []).append(at)
            for pattern, members in members_of.items():
                columns = padding.columns[pattern]
                if len(members_of) == 1:
                    groups.append((group, columns))
                    continue
                own = session.fork(group.layer) if group.layer.num_steps else self._make(len(members))
                if group.layer.num_steps:
                    session.select_rows(own, torch.tensor(members, device=columns.device))
                groups.append((RowGroup(torch.tensor([rows[m] for m in members], device=columns.device), own), columns))
        self.groups = [group for group, _ in groups]
        return groups

    def chunks(
        self,
        query: Float[Tensor, "batch query_heads steps head_dim"],
        keys: Float[Tensor, "batch kv_heads steps head_dim"],
        values: Float[Tensor, "batch kv_heads steps value_dim"],
        padding: PaddingPattern | None = None,
    ) -> Iterator[Chunk]:
        """Feed a forward of any length through the three verbs, cut on the policy's absolute chunk grid (text)."""
        for group, columns in self.split(keys.shape[0], padding):
            length = keys.shape[2] if columns is None else columns.numel()
            size = group.layer.policy.chunk_size
            start = 0
            while start < length:
                stop = length if size is None else min(length, start + size - group.layer.num_steps % size)
                where = slice(start, stop) if columns is None else columns[start:stop]
                q, k, v = (_part(x, group.rows, where, stop - start) for x in (query, keys, values))
                group.layer.write(k, v)
                group.layer.select(q)
                yield Chunk(
                    rows=group.rows, columns=where, query=group.layer.place_query(q), context=group.layer.context()
                )
                start = stop

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Make new row i what row `rows[i]` was."""
        if rows.numel() == 0 or rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise GeometryError(
                f"rows to keep are named by their numbers, got a tensor {tuple(rows.shape)} of {rows.dtype}; "
                "name at least one row, or reset() the cache"
            )
        if self.batch is not None and (rows.device.type == "cpu" or len(self.groups) > 1):
            absent = sorted({row for row in rows.tolist() if not 0 <= row < self.batch})
            if absent:  # rows on a GPU are not looked at, which would wait for it
                raise GeometryError(f"layer {self.number} holds rows 0 to {self.batch - 1} and no row {absent[0]}")
        if len(self.groups) == 1:
            session.select_rows(self.groups[0].layer, rows)
            self.groups[0].rows = None
            return
        wanted = rows.tolist()
        groups = []
        for group in self.groups:
            own = {row: at for at, row in enumerate(group.rows.tolist())} if group.rows is not None else {}
            new = [(i, own[row]) for i, row in enumerate(wanted) if row in own]
            if new:
                session.select_rows(group.layer, torch.tensor([at for _, at in new], device=rows.device))
                groups.append(RowGroup(torch.tensor([i for i, _ in new], device=rows.device), group.layer))
        if len(groups) == 1:
            groups[0].rows = None
        self.groups = groups

    def layers(self) -> list[Layer]:
        return [group.layer for group in self.groups]

    def adopt(self, groups: Sequence[tuple[Tensor | None, Layer]]) -> None:
        """Become `groups`: the rows (`None`: all) and layer of each."""
        self.groups = [RowGroup(rows, layer) for rows, layer in groups]


def _numbers(group: RowGroup) -> list[int]:
    """The rows of a group by number."""
    numbers: list[int] = list(range(group.layer.geometry.batch)) if group.rows is None else group.rows.tolist()
    return numbers


def _part(x: Tensor, rows: Tensor | None, where: slice | Tensor, length: int) -> Tensor:
    """Some rows and columns of a forward; the tensor itself where that is all of them."""
    x = rows_of(x, rows)
    return x if isinstance(where, slice) and length == x.shape[2] else x[:, :, where]


def rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of a forward; the tensor itself where `rows` is `None`."""
    return x if rows is None else x.index_select(0, rows)
