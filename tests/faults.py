"""Errors raised in the middle of a call: at the n-th tensor operation, or at the n-th line of some folders."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from kvtiers import InterruptedForwardError


class Fault(BaseException):
    """What is raised: no `Exception`, as Ctrl-C is none."""


class AtOperation(TorchDispatchMode):
    """Raises `Fault` in place of the n-th tensor operation."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise Fault
        return func(*args, **(kwargs or {}))


@contextmanager
def at_line(number: int, *folders: str) -> Iterator[None]:
    """Raises `Fault` at the n-th line of code that lies in `folders`, such as kvtiers."""
    left = number

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal left
        if not any(f"/{folder}/" in frame.f_code.co_filename.replace("\\", "/") for folder in folders):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise Fault
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def at(how: str, number: int, *folders: str) -> AbstractContextManager[object]:
    """A fault at the n-th `operation`, or at the n-th `line` of `folders`."""
    return AtOperation(number) if how == "operation" else at_line(number, *folders)


def points(*, operations: int, lines: int, slow_operations: int, slow_lines: int) -> pytest.MarkDecorator:
    """Parameters `how` and `step` of a test that sweeps: how far apart the points are, and how far in its slow run."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        ("how", "step"),
        [
            pytest.param("operation", operations, id="operations"),
            pytest.param("line", lines, id="lines"),
            pytest.param("operation", slow_operations, id="more operations", marks=slow),
            pytest.param("line", slow_lines, id="more lines", marks=slow),
        ],
    )


def sweep(
    verbs: Sequence[tuple[str, Callable[[Any], object]]],
    new: Callable[[], Any],
    outcome: Callable[[Any], object],
    same: Callable[[Any, Any], bool],
    *,
    how: str,
    step: int,
    folders: Sequence[str] = ("kvtiers",),
    done: Callable[[str, Any, Any], bool] = lambda _said, _before, _after: False,
) -> tuple[int, int]:
    """Raise at every `step`-th point of each verb in turn, make the same call again, go on, and compare the outcome.

    new: an object that verbs change, with `fork`. done: whether a verb that failed had been carried out all the same,
    so that it is not to be called again. Returns how many points were tried, and after how many it refused to go on.
    """
    thing, snapshots = new(), []
    for _, verb in verbs:
        snapshots.append(thing.fork())
        verb(thing)
    right = outcome(thing)
    tried = refused = 0
    for place, (said, verb) in enumerate(verbs):
        number = 1 + place * 5 % min(step, 29)
        while True:
            other = snapshots[place].fork()
            try:
                with at(how, number, *folders):
                    verb(other)
            except Fault:
                tried += 1
            else:
                break  # it was over before the n-th
            try:
                for _, again in verbs[place + done(said, snapshots[place], other) :]:
                    again(other)
                assert same(outcome(other), right), f"{said}: silently wrong after a fault at {how} {number}"
            except InterruptedForwardError:
                refused += 1
            number += step
    sys.stdout.write(f"{tried} points tried, refused to go on after {refused}\n")
    return tried, refused
