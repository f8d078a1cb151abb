"""All or nothing: a change that fails is undone, or what was changed refuses to go on. Never silently wrong."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs

from kvtiers.errors import InterruptedForwardError
from kvtiers.state import State

Made = TypeVar("Made")
Before = Sequence[tuple[State, Mapping[str, Any], int]]
"""Pieces of state, what they were, and how often tokens had been written over."""


@attrs.define(eq=False, slots=False, kw_only=True)
class Undoable(State, ABC):
    """State in several pieces that changes as a whole. layer: its number, for messages."""

    layer: int = 0
    broken: bool = False
    """Whether a change failed midway and could not be undone."""

    @abstractmethod
    def pieces(self) -> list[State]:
        """Every piece that a change may change. Those with a count `moves` say how often tokens were written over."""

    def changing(self) -> "Change":
        """A change, as a context: if it fails it is undone, or every further one is refused."""
        self.check_whole()
        return Change(self)

    def check_whole(self) -> None:
        """Raise `InterruptedForwardError` if an earlier change failed midway."""
        if self.broken:
            raise InterruptedForwardError(
                f"an earlier change of layer {self.layer} failed midway, and what it holds is not whole; go on from a "
                "fork() made before it, or reset() the cache"
            )

    def before(self) -> Before:
        """What `go_back` needs to undo what happens from here on."""
        return [(one, one.snapshot(), getattr(one, "moves", 0)) for one in self.pieces()]

    def go_back(self, before: Before) -> None:
        """Undo what happened since `before`; it stays broken if tokens were written over."""
        if any(getattr(one, "moves", 0) != moves for one, _, moves in before):
            self.broken = True
            return
        for one, state, _ in reversed(before):
            one.undo(state)


def undone_on_error(change: Callable[[], Made], undo: Callable[[], None]) -> Made:
    """What `change` returns; if it raises, `undo` is called first.

    No context manager: Ctrl-C between the last line of a `with` and its end would leave the change made, and its caller
    told that it failed.
    """
    try:
        return change()
    except BaseException:
        undo()
        raise


def all_or_nothing(
    states: Sequence[Undoable], changes: Sequence[Callable[[], Made]], also: Callable[[], None]
) -> list[Made]:
    """What the `changes` return, one after another. If one fails, each of `states` is as it was before all of them or
    refuses to go on, and `also` is called."""
    for state in states:
        state.check_whole()
    before = [state.before() for state in states]

    def undo() -> None:
        for state, was in zip(states, before, strict=True):
            state.go_back(was)
        also()

    return undone_on_error(lambda: [change() for change in changes], undo)


class Change:
    """What happens inside is one change of `state`. A class, for it is entered in every layer at every token."""

    __slots__ = ("before", "state")

    def __init__(self, state: Undoable) -> None:
        self.state = state

    def __enter__(self) -> None:
        self.before = self.state.before()
        self.state.broken = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.state.broken = False
        else:
            self.state.go_back(self.before)
