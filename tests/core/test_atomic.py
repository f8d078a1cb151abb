"""Invariant 11: whatever raises in the middle of a verb, the layer is as it was, or it refuses to go on.

An error is raised at the n-th tensor operation, or at the n-th line of the core, of every verb in turn. Accepted is
only: the same call made again gives bit-identical results from there on (or, if `num_steps` says that the tokens were
taken, the next call), or the cache refuses to go on.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvtiers
from kvtiers import Geometry, InterruptedForwardError, Policy, TieredCache
from strategies import Stream, copied, rotary, same, stream

GEOMETRY = Geometry(kv_heads=2, query_heads=4, head_dim=8, batch=2)
LENGTHS = (6, 1, 1, 4, 1, 1, 1, 5, 1, 1, 1, 1)
SMALL = {"sink": 2, "recent": 3, "block_size": 2, "top_k": 2, "chunk_size": 6}
PRESETS = ("full", "sliding-window", "streaming", "archive", "packforcing-lm")


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
def at_line(number: int) -> Iterator[list[int]]:
    """Raises `Fault` at the n-th line of the core; gives how many were left."""
    left = [number]

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        if "/kvtiers/" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                raise Fault
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield left
    finally:
        sys.settrace(before)


def small(name: str, **changes: Any) -> Policy:
    found = kvtiers.policy(name, **changes)
    sizes = {key: value for key, value in SMALL.items() if getattr(found, key) is not None}
    return attrs.evolve(found, **{key: value for key, value in sizes.items() if key != "sink" or found.sink})


def policies() -> dict[str, Policy]:
    found = {name: small(name) for name in PRESETS}
    found["archive on disk"] = small("archive", archive="disk", codec="int8")
    found["both forms"] = small("packforcing-lm", attend="full", top_k_compressed=1, archive="device")
    found["incremental"] = small("packforcing-lm", realigner="incremental")
    found["top-tokens by attention"] = small(
        "archive", compressor=("top-tokens", {"by": "attention", "keep": 1}), attend="compressed"
    )
    return found


def verbs(tokens: Stream) -> Iterator[tuple[str, Callable[[TieredCache], None]]]:
    """Every verb of a stream of forwards, and then changes of the whole cache."""
    start = 0
    for length in LENGTHS:
        now = tokens.part(start, start + length)
        yield f"write {start}", lambda cache, now=now: cache.write(0, now.keys, now.values)
        yield f"select {start}", lambda cache, now=now: cache.select(0, now.query)
        start += length
    yield "select_rows", lambda cache: cache.select_rows(torch.tensor([1, 0]))
    yield "commit", lambda cache: cache.commit()
    yield "compact", lambda cache: cache.compact(recent=1)
    yield "swap", lambda cache: cache.swap(attrs.evolve(cache.policies[0], top_k=1))


def made(policy: Policy) -> TieredCache:
    return TieredCache(policy, [GEOMETRY], rotaries=[rotary(8)])


def outcome(cache: TieredCache, tokens: Stream) -> list[Any]:
    """What the cache gives from here on."""
    found, start = [cache.tier_counts()], sum(LENGTHS)
    for step in range(start, start + 3):
        now = tokens.part(step, step + 1)
        rows = torch.tensor([0, 1])
        cache.write(0, now.keys[rows], now.values[rows])
        cache.select(0, now.query[rows])
        found.append(copied(cache.context(0)))
    return found


def equal(a: list[Any], b: list[Any]) -> bool:
    return a[0] == b[0] and all(same(x, y) for x, y in zip(a[1:], b[1:], strict=True))


SWEEPS = [
    pytest.param("operation", 7, id="operations"),
    pytest.param("line", 89, id="lines"),
    pytest.param("operation", 1, id="every operation", marks=pytest.mark.slow),
    pytest.param("line", 7, id="every seventh line", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("how", "step"), SWEEPS)
@pytest.mark.parametrize("name", policies())
def test_a_fault_in_a_verb_is_undone_or_the_cache_refuses_to_go_on(
    name: str, how: str, step: int, record_property: Callable[[str, object], None]
) -> None:
    policy, tokens = policies()[name], stream(GEOMETRY, sum(LENGTHS) + 3)
    every = list(verbs(tokens))
    cache, snapshots = made(policy), []
    for _, verb in every:
        snapshots.append(cache.fork())
        verb(cache)
    right = outcome(cache, tokens)
    tried = refused = 0
    for at, (said, verb) in enumerate(every):
        number = 1 + at % step
        while True:
            other = snapshots[at].fork()
            try:
                if how == "operation":
                    with AtOperation(number):
                        verb(other)
                else:
                    with at_line(number):
                        verb(other)
            except Fault:
                tried += 1
            else:
                break  # it was over before the n-th
            done = said.startswith("write") and other.num_steps > snapshots[at].num_steps
            try:
                for _, again in every[at + done :]:
                    again(other)
                assert equal(outcome(other, tokens), right), f"{said}: silently wrong after a fault at {how} {number}"
            except InterruptedForwardError:
                refused += 1
            number += step
    record_property("points", f"{tried} tried, {refused} refused")
    assert tried > 10
