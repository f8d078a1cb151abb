"""The archive: every mid block, attended now or not.

`Archive` is the policy that says where blocks live, and opens a `BlockStore` for each layer and form. A store knows
nothing of keys and values: it holds named tensors, which a `Codec` made of them and turns back into them.
"""

import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kvtiers.blocks import Location
from kvtiers.errors import ArchiveFullError, GeometryError, SavedCacheError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.state import Saved, State

Parts = Mapping[str, Tensor]
"""What a codec made of a run of blocks: tensors by name, each [batch, kv_heads, blocks, ...]."""


Storages = Mapping[tuple[Location, Hashable], int]
"""Bytes by the location and the name of each storage or file. Stores that share one give it one name."""

OwnStore = TypeVar("OwnStore", bound="BlockStore")


class ByteBudget:
    """Counts the bytes that the stores of one cache hold in one archive, and refuses what would exceed the limit."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._stores: weakref.WeakSet[BlockStore] = weakref.WeakSet()

    def enter(self, store: "BlockStore") -> None:
        """Count `store` for as long as it lives and names this as its budget."""
        self._stores.add(store)

    @property
    def nbytes(self) -> int:
        """Bytes held. What several stores share counts once."""
        return sum(self._held_beside(None).values())

    def admit(self, store: "BlockStore", after: Storages) -> None:
        """Raise `ArchiveFullError` if the limit does not allow that `store` comes to hold `after`."""
        if self.limit is None:
            return
        others, held = self._held_beside(store), self.nbytes
        more = sum({**others, **after}.values()) - held
        if more > 0 and held + more > self.limit:
            raise ArchiveFullError(
                f"the archive holds {held:,} bytes and needs {more:,} more, which its limit does not allow "
                f"(limit_bytes = {self.limit:,}); swap to a policy whose archive has a larger limit_bytes, or start "
                "with another archive or a compressor that keeps less. Nothing was lost: the blocks are still recent"
            )

    def _held_beside(self, store: "BlockStore | None") -> Storages:
        """What all stores but `store` hold."""
        return storages_of(one for one in self._stores if one.budget is self and one is not store)


class BlockStore(State, ABC):
    """The archived blocks of one layer in one form, in order of origin."""

    count: int = 0
    """How many blocks are held."""
    budget: ByteBudget

    def join(self, budget: ByteBudget) -> None:
        """Count the bytes held here in `budget` from now on."""
        self.budget = budget
        budget.enter(self)

    @abstractmethod
    def write(self, parts: Parts) -> None:
        """Append a run of blocks. Either all of them are held afterwards, or an error is raised and nothing changed.

        The first run decides the names, dtypes and shapes (beyond the blocks' axis) of all.
        """

    @abstractmethod
    def drop_last(self, count: int) -> None:
        """Forget the newest `count` blocks."""

    @abstractmethod
    def read(self, index: Int[Tensor, "batch kv_heads chosen"]) -> dict[str, Tensor]:
        """The parts of the chosen blocks of every row and head, [batch, kv_heads, chosen, ...], on `index`'s device."""

    @abstractmethod
    def storages(self) -> Storages:
        """The storages (or files) held, and their bytes."""

    def bytes_by_location(self) -> dict[Location, int]:
        """Bytes of the storages (or files) held, by location."""
        return bytes_by_location([self])

    @abstractmethod
    def fork(self: OwnStore) -> OwnStore:
        """An independent copy that continues from here. It may share what is held until one side writes."""

    @abstractmethod
    def select_rows(self: OwnStore, rows: Int[Tensor, " rows"]) -> OwnStore:
        """A copy whose row i is row `rows[i]` of this one. Blocks that are held stay as they are."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """Everything held, by name as `write` takes it, to be saved."""

    def dump(self) -> Saved:
        return self.parts(), {"count": self.count}

    def fill(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        counts = {x.shape[2] if x.dim() > 2 else -1 for x in tensors.values()}
        if about != {"count": next(iter(counts), 0)} or len(counts) > 1:
            raise SavedCacheError(f"archived parts of {sorted(counts)} blocks are described by {about!r}")
        if tensors:
            self.write(tensors)

    def tensors(self) -> Iterator[Tensor]:
        """Nothing: `storages` says what is held."""
        yield from ()

    def admit(self, parts: Parts, held: Parts) -> None:
        """Raise `GeometryError` unless `parts` can follow the blocks that are held (any of which show how)."""
        for name in {*parts, *held} if held else ():
            a, b = parts.get(name), held.get(name)
            same = a is not None and b is not None and a.dtype == b.dtype
            if a is None or b is None or not same or (*a.shape[:2], *a.shape[3:]) != (*b.shape[:2], *b.shape[3:]):
                said = ["none" if x is None else f"{tuple(x.shape)} {x.dtype}" for x in (a, b)]
                raise GeometryError(
                    f"archived blocks of a layer are of one size and made of the same parts; {name!r} is {said[0]} now "
                    f"and was {said[1]} before (the third axis counts blocks); commit blocks of one length"
                )


def storages_of(stores: Iterable[BlockStore]) -> Storages:
    """What several stores hold together."""
    return {name: size for store in stores for name, size in store.storages().items()}


def bytes_by_location(stores: Iterable[BlockStore]) -> dict[Location, int]:
    """Bytes that several stores hold together. What they share counts once."""
    total: Counter[Location] = Counter()
    for (location, _), size in storages_of(stores).items():
        total[location] += size
    return dict(total)


@attrs.frozen(kw_only=True)
class Archive(ABC):
    """Decides where archived data lives. A frozen setting; `open` gives each layer its stores.

    limit_bytes: the most bytes that all layers of a cache together may archive (None: no limit); then
        `ArchiveFullError`.
    """

    location: ClassVar[Location]
    limit_bytes: int | None = attrs.field(default=None, validator=v.optional([v.instance_of(int), v.ge(1)]))

    @abstractmethod
    def open(self, budget: ByteBudget) -> BlockStore:
        """A new, empty store for one layer and one form, whose bytes count in `budget`."""

    def adopts(self, other: "Archive") -> bool:
        """Whether this archive can go on with the stores that `other` opened, as with another byte limit."""
        return attrs.evolve(self, limit_bytes=None) == attrs.evolve(other, limit_bytes=None)


class Codec(ABC):
    """Decides how archived keys and values are written. A frozen setting."""

    exact: ClassVar[bool] = False
    """Whether what is read back is, bit for bit, what was written."""

    @abstractmethod
    def encode(
        self,
        keys: Float[Tensor, "batch kv_heads blocks tokens head_dim"],
        values: Float[Tensor, "batch kv_heads blocks tokens value_dim"],
    ) -> dict[str, Tensor]:
        """Named tensors [batch, kv_heads, blocks, ...] that `decode` turns back. Blocks, heads and rows stay apart."""

    @abstractmethod
    def decode(
        self, parts: Parts, dtype: torch.dtype
    ) -> tuple[
        Float[Tensor, "batch kv_heads blocks tokens head_dim"],
        Float[Tensor, "batch kv_heads blocks tokens value_dim"],
    ]:
        """Keys and values in `dtype`, of any blocks in any order."""

    @abstractmethod
    def block_bytes(self, tokens: int, geometry: Geometry) -> int:
        """Bytes of one encoded block of `tokens` tokens, over all rows and KV heads."""

    def tolerance(
        self,
        keys: Float[Tensor, "batch kv_heads blocks tokens head_dim"],
        values: Float[Tensor, "batch kv_heads blocks tokens value_dim"],
    ) -> tuple[Tensor, Tensor]:
        """The most by which each number that is read back may differ, for keys and for values. Broadcast."""
        if not self.exact:
            raise SlotError(f"{type(self).__name__} is not exact, so it must declare a tolerance()")
        return keys.new_zeros(()), values.new_zeros(())


def pick(
    part: Shaped[Tensor, "batch kv_heads slots *block"], index: Int[Tensor, "batch kv_heads chosen"]
) -> Shaped[Tensor, "batch kv_heads chosen *block"]:
    """The chosen blocks of every row and head, in one copy of whole blocks."""
    batch, heads, slots, *block = part.shape
    first = torch.arange(batch * heads, device=part.device).view(batch, heads, 1) * slots
    whole = part.reshape(batch * heads * slots, -1)
    return whole.index_select(0, (first + index).flatten()).view(batch, heads, index.shape[-1], *block)
