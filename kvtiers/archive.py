"""The archive: every mid block, attended now or not. `Archive` is the policy, a `BlockStore` holds a layer's blocks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers.blocks import Blocks, Location
from kvtiers.errors import GeometryError


class BlockStore(ABC):
    """The archived blocks of one layer in one form, all of one size, in order of origin."""

    def __init__(self) -> None:
        self.count = 0
        self.span = 0
        self.tokens = 0

    @abstractmethod
    def write(self, blocks: Blocks) -> None:
        """Append `blocks`. Either all of them are held afterwards, or an error is raised and nothing changed."""

    @abstractmethod
    def drop_last(self, count: int) -> None:
        """Forget the newest `count` blocks, which the last `write` brought."""

    @abstractmethod
    def read(
        self, index: Int[Tensor, "batch kv_heads chosen"]
    ) -> tuple[
        Float[Tensor, "batch kv_heads chosen tokens head_dim"],
        Float[Tensor, "batch kv_heads chosen tokens value_dim"],
        Float[Tensor, "#batch #kv_heads #chosen tokens axes"],
    ]:
        """Keys, values and offsets of the chosen blocks, on the device of `index`."""

    @abstractmethod
    def bytes_by_location(self) -> dict[Location, int]:
        """Bytes of the storages (or files) held, by location."""

    @abstractmethod
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Make new row i what row `rows[i]` was."""

    @abstractmethod
    def fork(self) -> "BlockStore":
        """An independent copy that continues from here."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything held, as named tensors, to be saved."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], *, count: int, span: int) -> None:
        """Become what `tensors` of a saved store say."""

    def admit(self, blocks: Blocks) -> None:
        """Check that `blocks` are of the size of those already here."""
        if self.count and (blocks.tokens != self.tokens or blocks.span != self.span):
            raise GeometryError(
                f"archived blocks of a layer are of one size, {self.tokens} tokens over {self.span} steps; got "
                f"{blocks.tokens} tokens over {blocks.span} steps; commit blocks of one length"
            )


class Archive(ABC):
    """Decides where archived data lives. A frozen setting; `open` gives each layer its store."""

    location: ClassVar[Location]

    @abstractmethod
    def open(self) -> BlockStore:
        """A new, empty store for one layer and one form."""

    def adopts(self, other: "Archive") -> bool:
        """Whether `adopt` can go on with the stores that `other` opened, as with another byte limit."""
        return self == other

    def adopt(self, store: BlockStore) -> None:  # noqa: B027 (there may be nothing to do)
        """Go on with a store that an archive which this one `adopts` has opened."""


def lasting(shape: Sequence[int], *, like: Tensor, pinned: bool = False) -> Tensor:
    """An empty tensor that is written in place later: one made under inference mode could not be, outside of it."""
    with torch.inference_mode(False):
        return torch.empty(*shape, dtype=like.dtype, device=like.device, pin_memory=pinned)


class Growing:
    """A tensor that grows along one axis by doubling, so that appending is cheap and nothing is concatenated.

    pinned: in page-locked host memory, from which a GPU copies without waiting.
    """

    def __init__(self, axis: int, *, pinned: bool = False) -> None:
        self.axis = axis
        self.pinned = pinned
        self.length = 0
        self.buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.untyped_storage().nbytes()

    @property
    def data(self) -> Tensor | None:
        """What has been appended so far (a view)."""
        return None if self.buffer is None else self.buffer.narrow(self.axis, 0, self.length)

    def nbytes_after(self, rows: Tensor) -> int:
        """Bytes that will be held once `rows` are appended."""
        return rows.element_size() * (rows.numel() // rows.shape[self.axis]) * self._slots_after(rows)

    def append(self, rows: Tensor) -> None:
        """Append `rows` along the axis."""
        slots = self._slots_after(rows)
        if self.buffer is None or slots > self.buffer.shape[self.axis]:
            shape = list(rows.shape)
            shape[self.axis] = slots
            grown = lasting(shape, like=rows, pinned=self.pinned)
            if self.data is not None:
                grown.narrow(self.axis, 0, self.length).copy_(self.data)
            self.buffer = grown
        self.buffer.narrow(self.axis, self.length, rows.shape[self.axis]).copy_(rows)
        self.length += rows.shape[self.axis]

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Select along the first axis."""
        if self.buffer is not None:
            with torch.inference_mode(False):
                self._hold(self.buffer.index_select(0, rows.to(self.buffer.device)))

    def fork(self) -> "Growing":
        other = Growing(self.axis, pinned=self.pinned)
        other.length = self.length
        if self.buffer is not None:
            with torch.inference_mode(False):
                other._hold(self.buffer.clone())
        return other

    def _slots_after(self, rows: Tensor) -> int:
        needed = self.length + rows.shape[self.axis]
        have = 0 if self.buffer is None else self.buffer.shape[self.axis]
        return have if needed <= have else max(needed, 2 * have)

    def _hold(self, buffer: Tensor) -> None:
        self.buffer = buffer.pin_memory() if self.pinned else buffer


class TensorBlockStore(BlockStore):
    """A store in memory, on the device the blocks come from or on the one that is named."""

    def __init__(self, location: Location, device: torch.device | None = None, *, pinned: bool = False) -> None:
        super().__init__()
        self.location: Location = location
        self.device, self.pinned = device, pinned
        self._keys, self._values, self._offsets = (Growing(2, pinned=pinned) for _ in range(3))
        self._constant: Tensor | None = None

    def write(self, blocks: Blocks) -> None:
        self.admit(blocks)
        device = self.device or blocks.keys.device
        if self.count and blocks.alike == (self._constant is None):
            raise GeometryError("blocks with offsets of their own cannot follow blocks that share them")
        if blocks.alike:
            self._constant = blocks.offsets.to(device, torch.float32)
        else:
            self._offsets.append(blocks.offsets.expand(*blocks.keys.shape[:4], -1).to(device, torch.float32))
        self._keys.append(blocks.keys.to(device))
        self._values.append(blocks.values.to(device))
        self.count += blocks.count
        self.span, self.tokens = blocks.span, blocks.tokens

    def drop_last(self, count: int) -> None:
        for part in (self._keys, self._values, self._offsets):
            part.length = max(0, part.length - count)
        self.count -= count

    def read(self, index: Int[Tensor, "batch kv_heads chosen"]) -> Any:
        at = index.to(self.device) if self.device is not None else index
        offsets = self._constant.clone() if self._constant is not None else pick(self._offsets, at)
        parts = (pick(self._keys, at), pick(self._values, at), offsets)
        return tuple(part.to(index.device, non_blocking=True) for part in parts)

    def bytes_by_location(self) -> dict[Location, int]:
        constant = 0 if self._constant is None else self._constant.untyped_storage().nbytes()
        return {self.location: self._keys.nbytes + self._values.nbytes + self._offsets.nbytes + constant}

    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        for part in (self._keys, self._values, self._offsets):
            part.select_rows(rows)

    def fork(self) -> "TensorBlockStore":
        other = self._empty()
        other.count, other.span, other.tokens = self.count, self.span, self.tokens
        other._keys, other._values, other._offsets = self._keys.fork(), self._values.fork(), self._offsets.fork()
        other._constant = None if self._constant is None else self._constant.clone()
        return other

    def _empty(self) -> "TensorBlockStore":
        return TensorBlockStore(self.location, self.device, pinned=self.pinned)

    def tensors(self) -> dict[str, Tensor]:
        held = {"keys": self._keys.data, "values": self._values.data, "offsets": self._offsets.data}
        held["constant"] = self._constant
        return {name: part for name, part in held.items() if part is not None}

    def restore(self, tensors: Mapping[str, Tensor], *, count: int, span: int) -> None:
        self.count, self.span = count, span
        for name, part in (("keys", self._keys), ("values", self._values), ("offsets", self._offsets)):
            if name in tensors:
                part.append(tensors[name].to(self.device or tensors[name].device))
        if "constant" in tensors:
            self._constant = tensors["constant"].to(self.device or tensors["constant"].device)
        self.tokens = tensors["keys"].shape[3] if count else 0


def pick(
    part: Growing, index: Int[Tensor, "batch kv_heads chosen"]
) -> Float[Tensor, "batch kv_heads chosen tokens width"]:
    """The chosen blocks of every row and head, in one copy of whole blocks."""
    if part.buffer is None:
        raise GeometryError("an empty store was read")
    batch, heads, slots, tokens, width = part.buffer.shape
    start = torch.arange(batch * heads, device=part.buffer.device).view(batch, heads, 1) * slots
    whole = part.buffer.view(batch * heads * slots, tokens * width)
    return whole.index_select(0, (start + index).flatten()).view(batch, heads, index.shape[-1], tokens, width)
