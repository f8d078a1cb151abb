"""What the archives with a byte limit share: one byte budget for all stores that an archive has opened."""

import weakref
from typing import Any, Protocol, runtime_checkable

import attrs
from attrs import validators as v

from kvtiers.errors import ArchiveFullError


@runtime_checkable
class Holds(Protocol):
    """Something that holds bytes while it lives."""

    @property
    def nbytes(self) -> int: ...


class ByteBudget:
    """Counts the bytes of everything that is entered, for as long as it lives."""

    def __init__(self) -> None:
        self._held: weakref.WeakSet[Holds] = weakref.WeakSet()

    def enter(self, holder: Holds) -> None:
        """Count `holder` from now on."""
        self._held.add(holder)

    def leave(self, holder: Holds) -> None:
        """Count `holder` no more."""
        self._held.discard(holder)

    @property
    def nbytes(self) -> int:
        return sum(holder.nbytes for holder in self._held)

    def admit(self, more: int, limit: int | None, archive: str) -> None:
        """Raise `ArchiveFullError` if `more` bytes would exceed `limit`."""
        if limit is not None and (held := self.nbytes) + more > limit:
            raise ArchiveFullError(
                f"archive {archive!r} holds {held:,} bytes and needs {more:,} more than its limit allows "
                f"(limit_bytes = {limit:,}); swap to a policy whose archive has a larger limit_bytes, or start "
                "with another archive or a compressor that keeps less. Nothing was lost: the blocks are still recent"
            )


def limit_bytes() -> Any:
    """The attrs field of an archive's byte limit."""
    return attrs.field(default=None, validator=v.optional([v.instance_of(int), v.ge(1)]))


def byte_budget() -> Any:
    """The attrs field of an archive's byte budget: private, and no part of its value."""
    return attrs.field(init=False, factory=ByteBudget, eq=False, repr=False)


def fits(archive: Any, limit_bytes: int | None) -> bool:
    """Whether what the stores of `archive` hold is within `limit_bytes`."""
    held: int = archive._byte_budget.nbytes
    return limit_bytes is None or held <= limit_bytes
