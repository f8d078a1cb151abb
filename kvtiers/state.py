"""Declared state: a class names its fields once, and fork, row selection, saving, loading and byte counts follow.

`number` declares a plain value that JSON can hold, `rows` tensors whose first axis is the batch, `broadcast` tensors
whose first axis is the batch or 1, `shared` tensors that all rows have in common, and `part` another piece of state.
A frozen value declares the same by the `metadata` of its fields. Nothing here knows caches or layers.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import attrs
import torch
from torch import Tensor

from kvtiers.errors import SavedCacheError

Own = TypeVar("Own", bound="State")
Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""Named tensors, and what JSON can hold."""

NUMBER, ROWS, BROADCAST, SHARED, PART = ({"state": kind} for kind in ("number", "rows", "broadcast", "shared", "part"))


def number(default: Any) -> Any:
    """A plain value: a number, a text, a truth value, None, or a list of those. Loading demands the default's type."""
    return attrs.field(default=default, metadata=NUMBER)


def rows(*, named: bool = False) -> Any:
    """A tensor (or None) whose first axis is the batch; `named`: a mapping of names to such tensors."""
    default: Any = attrs.Factory(dict) if named else None
    return attrs.field(default=default, metadata=ROWS)


def broadcast() -> Any:
    """A tensor (or None) whose first axis is the batch, or 1 where all rows agree."""
    return attrs.field(default=None, metadata=BROADCAST)


def shared() -> Any:
    """A tensor (or None) that does not differ by row."""
    return attrs.field(default=None, metadata=SHARED)


def part(empty: Callable[[Any], "State"] | None = None, *, named: bool = False) -> Any:
    """Another `State` (or None), or, if `named`, a mapping of names to them.

    empty: makes one, to be filled, of what has it. None: one is there whenever something is loaded.
    """
    default: Any = attrs.Factory(dict) if named else None
    return attrs.field(default=default, metadata={**PART, "empty": empty})


def select(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at` of `x`, in memory of their own that may be written under any grad mode."""
    with torch.inference_mode(False):
        return x.index_select(0, at.to(x.device))


class State:
    """Something that is remembered. Subclasses are attrs classes whose fields say what they hold.

    Values of `rows`, `broadcast`, `shared` and mappings are replaced, never changed, except where a class says so.
    """

    def declared(self) -> Iterator[tuple[str, str, Any]]:
        """Name, kind and value of every declared field."""
        for field in attrs.fields(cast(Any, type(self))):
            kind = field.metadata.get("state")
            if kind is not None:
                yield field.name, kind, getattr(self, field.name)

    def snapshot(self) -> dict[str, Any]:
        """The fields as they are; `undo` brings them back. Tensors that are written in place are not copied."""
        return self.__dict__.copy()

    def undo(self, before: Mapping[str, Any]) -> None:
        """Go back to what `snapshot` gave."""
        self.__dict__.update(before)

    def fork(self: Own) -> Own:
        """An independent copy that continues from here."""
        return self._mapped(_cloned, lambda one: one.fork())

    def select_rows(self: Own, at: Tensor) -> Own:
        """A copy whose row i is row `at[i]` of this one."""

        def taken(kind: str, x: Tensor) -> Tensor:
            if kind == "shared" or (kind == "broadcast" and x.shape[0] == 1):
                return _cloned(kind, x)
            return select(x, at)

        return self._mapped(taken, lambda one: one.select_rows(at))

    def _mapped(self: Own, tensor: Any, inner: Any) -> Own:
        other = copy.copy(self)
        for name, kind, value in self.declared():
            if kind == "number":
                continue
            each = inner if kind == "part" else lambda x, kind=kind: tensor(kind, x)
            if isinstance(value, Mapping):
                other.__dict__[name] = {key: each(one) for key, one in value.items()}
            elif value is not None:
                other.__dict__[name] = each(value)
        return other

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held, for counting bytes; an archive counts its own."""
        for _, kind, value in self.declared():
            for one in value.values() if isinstance(value, Mapping) else (value,):
                if kind == "part" and isinstance(one, State):
                    yield from one.tensors()
                elif isinstance(one, Tensor):
                    yield one

    def dump(self) -> Saved:
        """Everything that `fill` needs. Tensors may be views of what is held."""
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for name, kind, value in self.declared():
            if kind == "number":
                about[name] = list(value) if isinstance(value, tuple) else value
            elif isinstance(value, Mapping):
                about[name] = {key: _dumped(f"{name}.{key}", one, tensors) for key, one in value.items()}
            else:
                about[name] = _dumped(name, value, tensors)
        return tensors, about

    def fill(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Become what `dump` said. Raises `SavedCacheError` for what is missing, unknown or of another type."""
        names = [name for name, _, _ in self.declared()]
        if set(about) != set(names):
            raise SavedCacheError(f"{type(self).__name__} is described by {sorted(about)}, expected {sorted(names)}")
        for name, kind, value in list(self.declared()):
            said = about[name]
            if kind == "number":
                self.__dict__[name] = _plain(f"{type(self).__name__}.{name}", said, value)
            elif isinstance(value, Mapping) or (kind == "part" and isinstance(said, dict) and "state" not in said):
                self.__dict__[name] = {key: self._part_of(name, key, one, tensors) for key, one in said.items()}
            else:
                self.__dict__[name] = self._part_of(name, None, said, tensors)

    def _part_of(self, name: str, key: str | None, said: Any, tensors: Mapping[str, Tensor]) -> Any:
        """The value of one field (or of one name in a mapping), by its description."""
        path = name if key is None else f"{name}.{key}"
        if said is None:
            return None
        if said == "tensor":
            if path not in tensors:
                raise SavedCacheError(f"tensor {path!r} of {type(self).__name__} is missing")
            return tensors[path]
        if not isinstance(said, dict) or set(said) != {"state"}:
            raise SavedCacheError(f"{path!r} of {type(self).__name__} is described by {said!r}")
        empty = getattr(attrs.fields(cast(Any, type(self))), name).metadata.get("empty")
        made = getattr(self, name) if empty is None else empty(self)
        if made is None:
            raise SavedCacheError(f"{type(self).__name__} has no part {name!r}")
        start = f"{path}."
        made.fill({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}, said["state"])
        return made


def _cloned(kind: str, x: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return x.clone()


def _dumped(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        tensors[name] = value
        return "tensor"
    own, about = value.dump()
    tensors |= {f"{name}.{key}": one for key, one in own.items()}
    return {"state": about}


def _plain(name: str, said: Any, default: Any) -> Any:
    """`said`, if it is of the default's type (a tuple is a list of whole numbers, None allows a number or None)."""
    if isinstance(default, tuple):
        if isinstance(said, list) and all(_is_whole(one) for one in said):
            return tuple(said)
    elif isinstance(default, bool) or not isinstance(default, int | None):
        if type(said) is type(default):
            return said
    elif _is_whole(said) or (default is None and said is None):
        return said
    raise SavedCacheError(f"{name} is {said!r} in the file, where a {type(default).__name__} is expected")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**48
