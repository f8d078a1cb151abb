"""A tensor that grows by a quarter, shared by forks until one of them writes: what tables and archives are made of."""

import math
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvtiers.errors import SavedCacheError
from kvtiers.state import Saved, State


def grown(slots: int) -> int:
    """The slots that a full buffer is given instead: a quarter more. On average a token is copied at most 4 times."""
    return slots + slots // 4


def lasting(shape: Sequence[int], *, like: Tensor, pinned: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor that is written in place later: one made under inference mode could not be, outside of it."""
    with torch.inference_mode(False):
        return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device, pin_memory=pinned)


class _Storage:
    """A buffer, and who uses it: several do after a fork, until one of them writes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.users: weakref.WeakSet[Growing] = weakref.WeakSet()


class Growing(State):
    """A tensor that grows along one axis by a quarter, so that appending is cheap and nothing is concatenated.

    pinned: in page-locked host memory, from which a GPU copies without waiting. Forks share the memory until one side
    appends.
    """

    def __init__(self, axis: int, *, pinned: bool = False) -> None:
        self.axis = axis
        self.pinned = pinned
        self.length = 0
        self._storage: _Storage | None = None

    @property
    def buffer(self) -> Tensor | None:
        return None if self._storage is None else self._storage.tensor

    @property
    def nbytes(self) -> int:
        return 0 if self._storage is None else self._storage.tensor.untyped_storage().nbytes()

    @property
    def data(self) -> Tensor | None:
        """What has been appended so far (a view)."""
        return None if self._storage is None else self._storage.tensor.narrow(self.axis, 0, self.length)

    def storages(self) -> dict[Hashable, int]:
        """The bytes of the buffer, by a name that forks share with it."""
        return {} if self._storage is None else {self._storage: self.nbytes}

    def storages_after(self, rows: Tensor) -> dict[Hashable, int]:
        """`storages` once `rows` are appended."""
        if self._fits(rows):
            return self.storages()
        of_one = math.prod(rows.shape[: self.axis]) * math.prod(rows.shape[self.axis + 1 :])
        return {object(): rows.element_size() * of_one * self._slots_after(rows)}

    def _fits(self, rows: Tensor) -> bool:
        """Whether `rows` may be written into the buffer that is there."""
        held = self._storage
        return held is not None and self._slots_after(rows) == held.tensor.shape[self.axis] and len(held.users) == 1

    def append(self, rows: Tensor) -> None:
        """Append `rows` along the axis. An error leaves what is held as it was."""
        held = self._storage
        if held is None or not self._fits(rows):
            shape = list(rows.shape)
            shape[self.axis] = self._slots_after(rows)
            wider = lasting(shape, like=rows, pinned=self.pinned)
            if self.data is not None:
                wider.narrow(self.axis, 0, self.length).copy_(self.data)
            held = _Storage(wider)
        held.tensor.narrow(self.axis, self.length, rows.shape[self.axis]).copy_(rows)
        self._hold(held)
        self.length += rows.shape[self.axis]

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "Growing":
        """A copy with rows selected along the first axis (rows that all agree on, of length 1, stay)."""
        if self.axis == 0 or self._storage is None or self._storage.tensor.shape[0] == 1 == rows.shape[0]:
            return self.fork()
        with torch.inference_mode(False):
            taken = self._storage.tensor.index_select(0, rows.to(self._storage.tensor.device))
            return self._with(_Storage(taken.pin_memory() if self.pinned else taken))

    def fork(self) -> "Growing":
        """A copy that shares the memory until one side appends."""
        return self._with(self._storage)

    def tensors(self) -> Iterator[Tensor]:
        if self._storage is not None:
            yield self._storage.tensor

    def dump(self) -> Saved:
        return ({} if self.data is None else {"data": self.data}), {"axis": self.axis}

    def fill(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        if about != {"axis": self.axis} or set(tensors) - {"data"}:
            raise SavedCacheError(f"a tensor that grows along axis {self.axis} is described by {about!r}")
        if "data" in tensors:
            if tensors["data"].dim() <= self.axis:
                raise SavedCacheError(f"a tensor that grows along axis {self.axis} has {tensors['data'].dim()} axes")
            self.append(tensors["data"])

    def _with(self, storage: _Storage | None) -> "Growing":
        other = Growing(self.axis, pinned=self.pinned)
        other.length = self.length
        if storage is not None:
            other._hold(storage)
        return other

    def _slots_after(self, rows: Tensor) -> int:
        needed = self.length + rows.shape[self.axis]
        have = 0 if self._storage is None else self._storage.tensor.shape[self.axis]
        return have if needed <= have else max(needed, grown(have))

    def _hold(self, storage: _Storage | None) -> None:
        if storage is not self._storage:
            if self._storage is not None:
                self._storage.users.discard(self)
            if storage is not None:
                storage.users.add(self)
            self._storage = storage
