"""Invariant 11: whatever raises in the middle of a verb, the layer is as it was, or it refuses to go on.

An error is raised at the n-th tensor operation, or at the n-th line of the core, of every verb in turn. Accepted is
only: the same call made again gives bit-identical results from there on (or, if `num_steps` says that the tokens were
taken, the next call), or the cache refuses to go on.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import kvtiers
from faults import Fault, points, sweep
from kvtiers import Blocks, Geometry, Policy, Rotary, TieredCache
from kvtiers.rows import LayerRows
from strategies import Stream, copied, rotary, same, stream

pytestmark = pytest.mark.usefixtures("_shapes_go_unchecked")

GEOMETRY = Geometry(kv_heads=2, query_heads=4, head_dim=8, batch=2)
LENGTHS = (6, 1, 1, 4, 1, 1, 1, 5, 1, 1, 1, 1)
SMALL = {"sink": 2, "recent": 3, "block_size": 2, "top_k": 2, "chunk_size": 6}
PRESETS = ("full", "sliding-window", "streaming", "archive", "packforcing-lm")
Verb = Callable[[TieredCache], object]


def small(name: str, sizes: dict[str, int], **changes: Any) -> Policy:
    found = kvtiers.policy(name, **changes)
    own = {key: value for key, value in sizes.items() if getattr(found, key) is not None}
    return attrs.evolve(found, **{key: value for key, value in own.items() if key != "sink" or found.sink})


def equal(a: list[Any], b: list[Any]) -> bool:
    return a[0] == b[0] and all(same(x, y) for x, y in zip(a[1:], b[1:], strict=True))


# ---------------------------------------------------------------- text


def policies() -> dict[str, Policy]:
    found = {name: small(name, SMALL) for name in PRESETS[:-1]}
    found["packforcing-lm"] = small("packforcing-lm", SMALL, reach=4)
    found["archive on disk"] = small("archive", SMALL, archive="disk", codec="int8")
    more: dict[str, Any] = {"top_k_compressed": 1, "archive": "device", "realigner": "contiguous"}
    found["both forms"] = small("packforcing-lm", SMALL, attend="full", **more)
    found["attention for a retriever"] = small("infllm", SMALL)
    found["incremental"] = small("packforcing-lm", SMALL, realigner="incremental")
    found["top-tokens by attention"] = small(
        "archive", SMALL, compressor=("top-tokens", {"by": "attention", "keep": 1}), attend="compressed"
    )
    return found


def verbs(tokens: Stream) -> Iterator[tuple[str, Verb]]:
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


def taken(said: str, before: TieredCache, after: TieredCache) -> bool:
    """Whether a write that failed has taken its tokens."""
    return said.startswith("write") and after.num_steps > before.num_steps


@points(operations=31, lines=211, slow_operations=1, slow_lines=7)
@pytest.mark.parametrize("name", policies())
def test_a_fault_in_a_verb_is_undone_or_the_cache_refuses_to_go_on(name: str, how: str, step: int) -> None:
    policy, tokens = policies()[name], stream(GEOMETRY, sum(LENGTHS) + 3)
    tried, _ = sweep(
        list(verbs(tokens)),
        lambda: TieredCache(policy, [GEOMETRY], rotaries=[rotary(8)]),
        lambda cache: outcome(cache, tokens),
        equal,
        how=how,
        step=step,
        done=taken,
    )
    assert tried > 3, "fewer points than there are in these verbs"


# ---------------------------------------------------------------- video

FRAMES = Geometry(kv_heads=2, head_dim=12, grid=(4, 4), steps_per_commit=2, causal=False)
FEW = {"sink": 2, "recent": 4, "top_k": 2}
FILLED = 6
"""Blocks before the first fault: anchors, an archive of more blocks than are attended, and recent."""


def video_policies() -> dict[str, Policy]:
    found = {name: small(name, FEW) for name in ("packforcing", "rolling-window", "sink-rolling-window", "full")}
    found["packforcing on disk, anchors rotated anew"] = small(
        "packforcing", FEW, realigner=("incremental", {"rotations": "once"}), archive="disk", codec="int8"
    )
    found["packforcing, anchors rotated again"] = small("packforcing", FEW, realigner="incremental")
    return found


class Take:
    """Random numbers for two layers: what the passes over one block hand to the cache, and its compressed form."""

    def __init__(self, policy: Policy, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        heads, width, steps = FRAMES.kv_heads, FRAMES.head_dim, FRAMES.steps_per_commit
        shape = (1, heads, steps * FRAMES.tokens_per_step, width)
        self.passes = [[torch.randn(3, *shape, generator=random) for _ in (0, 1)] for _ in range(3)]
        self.compressed: list[Blocks | None] | None = None
        if policy.compressor.given:
            offsets = policy.compressor.offsets(steps, FRAMES.grid)  # type: ignore[attr-defined]
            small = (1, heads, 1, len(offsets), width)
            self.compressed = [
                Blocks(
                    keys=torch.randn(small, generator=random),
                    values=torch.randn(small, generator=random),
                    offsets=offsets[None, None, None],
                    starts=torch.zeros(1, dtype=torch.long),
                    span=steps,
                )
                for _ in (0, 1)
            ]

    def verbs(self) -> Iterator[tuple[str, Verb]]:
        """Two denoise steps, a clean pass and the commit."""
        for number, layers in enumerate(self.passes):
            for layer, (query, keys, values) in enumerate(layers):
                yield (
                    f"write {number} of layer {layer}",
                    lambda cache, layer=layer, k=keys, v=values: cache.write(layer, k, v, replace=True),
                )
                yield (
                    f"select {number} of layer {layer}",
                    lambda cache, layer=layer, q=query: cache.select(layer, q),
                )
        yield "commit", lambda cache: cache.commit(compressed=self.compressed)


def video_verbs(policy: Policy) -> Iterator[tuple[str, Verb]]:
    """A block; what is recent leaves before its time; another, which is cut off and begun again."""
    yield from Take(policy, 100).verbs()
    yield "compact", lambda cache: cache.compact(recent=2)
    yield from list(Take(policy, 101).verbs())[:5]
    yield "reselect", lambda cache: cache.reselect()
    yield from Take(policy, 102).verbs()
    yield "rewind", lambda cache: cache.rewind_recent()
    yield from list(Take(policy, 103).verbs())[:4]


def video_outcome(cache: TieredCache, policy: Policy) -> list[Any]:
    """What the cache gives in this block and in the next two."""
    found: list[Any] = [[cache.tier_counts(layer) for layer in (0, 1)], copied(cache.context(0))]
    for seed in (104, 105):
        for said, verb in Take(policy, seed).verbs():
            if said == "commit":
                found += [copied(cache.context(layer)) for layer in (0, 1)]
            verb(cache)
    return found


@points(operations=97, lines=1499, slow_operations=1, slow_lines=7)
@pytest.mark.parametrize("name", video_policies())
@torch.no_grad()
def test_a_fault_in_a_verb_of_a_video_is_undone_or_the_cache_refuses_to_go_on(name: str, how: str, step: int) -> None:
    policy = video_policies()[name]
    turn = Rotary([torch.tensor([1.0, 0.1])] * 3, layout="interleaved")
    filled = TieredCache(policy, [FRAMES] * 2, rotaries=[turn] * 2)
    for seed in range(FILLED):
        for _, verb in Take(policy, seed).verbs():
            verb(filled)
    tried, _ = sweep(
        list(video_verbs(policy)),
        filled.fork,
        lambda cache: video_outcome(cache, policy),
        equal,
        how=how,
        step=step,
    )
    assert tried > 3


def test_a_write_that_fails_in_one_of_two_groups_of_rows_can_be_repeated() -> None:
    cache, tokens = TieredCache(policies()["archive on disk"], [GEOMETRY]), stream(GEOMETRY, 5)
    first, more = tokens.part(0, 4), tokens.part(4, 5)
    uneven = kvtiers.PaddingPattern.of(torch.tensor([[True] * 4, [False, False, True, True]]))
    for _ in cache.layers[0].chunks(first.query, first.keys, first.values, uneven):
        pass
    second = cache.layers[0].groups[1].layer
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(second, "write", fails)
        with pytest.raises(MemoryError):
            cache.write(0, more.keys, more.values)
    assert cache.layers[0].num_steps_by_row() == [4, 2]
    cache.write(0, more.keys, more.values)
    assert cache.layers[0].num_steps_by_row() == [5, 3]


def fails(*_: Any, **__: Any) -> None:
    raise MemoryError


def test_a_file_is_loaded_into_every_layer_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, path = Geometry(kv_heads=1, head_dim=4), tmp_path / "cache.safetensors"
    caches = [TieredCache(kvtiers.policy("full"), [geometry, geometry]) for _ in range(2)]
    for cache, steps in zip(caches, (3, 5), strict=True):
        for layer in (0, 1):
            cache.write(layer, torch.ones(1, 1, steps, 4), torch.ones(1, 1, steps, 4))
    saved, other = caches
    saved.save(path)

    def failing(rows: LayerRows, name: str, value: Any) -> None:
        if rows is other.layers[1] and value[0].layer.num_steps == 3:
            raise Fault
        object.__setattr__(rows, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(LayerRows, "__setattr__", failing)
        with pytest.raises(Fault):
            other.load(path)
    assert [rows.num_steps for rows in other.layers] == [5, 5]
    other.load(path)
    assert [rows.num_steps for rows in other.layers] == [3, 3]
