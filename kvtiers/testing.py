"""The conformance kit: one call from one test checks a policy against the invariants that every policy must keep.

    from kvtiers.testing import check_compressor

    def test_my_compressor_keeps_the_invariants():
        check_compressor(lambda: MyCompressor(ratio=4))

`check_policy` runs a whole `Policy`; `check_sink`, `check_compressor`, `check_retriever`, `check_realigner` and
`check_archive` check what is particular to a slot, then a whole policy with the choice in it. Layers, tokens and the
ways to cut them are drawn by Hypothesis, so a failure comes with the smallest example found. A broken invariant raises
`AssertionError` with its number and name as in the design: "invariant 1 (conservation): ...".

Needs Hypothesis; nothing else of kvtiers imports this module.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import torch
from torch import Tensor

from kvtiers.archive import Archive, Shelf
from kvtiers.blocks import Blocks, Context, Extent, Form, run_of
from kvtiers.cache import Ragged, TieredCache
from kvtiers.errors import CropError, KVTiersError, MissingExtraError, SavedCacheError
from kvtiers.geometry import Geometry
from kvtiers.policy import SLOTS, Compressor, Policy, Realigner, Retriever, Sink, choose
from kvtiers.presets import build
from kvtiers.rotary import Rotary
from kvtiers.store import LayerStore

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise MissingExtraError(
        "kvtiers.testing draws its examples with Hypothesis, which is not installed; pip install hypothesis"
    ) from error

INVARIANTS: Mapping[int, str] = {
    1: "conservation",
    2: "identity",
    3: "masked oracle",
    4: "rotation",
    5: "order and contiguity",
    6: "bounded",
    7: "reading changes nothing",
    8: "exact index",
    9: "batch algebra",
    10: "memory survives",
}
_CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def require(holds: bool, invariant: int, message: str) -> None:
    """Raise `AssertionError` naming the invariant unless it holds."""
    if not holds:
        raise AssertionError(f"invariant {invariant} ({INVARIANTS[invariant]}): {message}")


# ---------------------------------------------------------------------- a layer that knows what it must hold


@attrs.define(eq=False, kw_only=True)
class Trial:
    """One layer under a policy, fed from a random stream, beside plain tensors of everything it was fed.

    query, keys, values: [batch, heads, steps, width], the stream; `cache` has one layer.
    """

    policy: Policy
    geometry: Geometry
    rotary: Rotary
    query: Tensor
    keys: Tensor
    values: Tensor
    cache: TieredCache
    queries_given: bool = True

    @classmethod
    def start(cls, policy: Policy, geometry: Geometry, rotary: Rotary, *, seed: int, steps: int) -> "Trial":
        """An empty cache and `steps` random steps for it."""
        g = torch.Generator().manual_seed(seed)
        tokens, heads = steps * geometry.tokens_per_step, geometry.kv_heads

        def draw(count: int, width: int) -> Tensor:
            return torch.randn(geometry.batch, count, tokens, width, generator=g).to(geometry.dtype)

        return cls(
            policy=policy,
            geometry=geometry,
            rotary=rotary,
            query=draw(geometry.query_heads, geometry.head_dim),
            keys=draw(heads, geometry.head_dim),
            values=draw(heads, geometry.value_dim),
            cache=TieredCache(policy, [geometry], rotaries=[rotary]),
        )

    @property
    def store(self) -> LayerStore:
        """The store of the only lane."""
        return self.cache.stores()[0]

    @property
    def seen(self) -> int:
        return self.cache.seen

    def feed(self, steps: int) -> Context:
        """Append and select the next `steps` steps; returns the context."""
        now = slice(self.seen, self.seen + steps)
        self.cache.append(0, self.keys[:, :, now], self.values[:, :, now])
        self.cache.select(0, self.query[:, :, now])
        return self.cache.context(0)

    def branch(self, cache: TieredCache) -> "Trial":
        """The same stream for another cache."""
        return attrs.evolve(self, cache=cache)

    def take(self, rows: Tensor) -> None:
        """Select rows of the cache, and of the stream."""
        self.cache.take(rows)
        self.query, self.keys, self.values = self.query[rows], self.keys[rows], self.values[rows]
        self.geometry = attrs.evolve(self.geometry, batch=rows.numel())

    def block(self, start: int) -> Blocks:
        """The block that begins at step `start`, as it was before it was archived."""
        stop = start + self.policy.block_size
        return run_of(
            self.keys[:, :, start:stop],
            self.values[:, :, start:stop],
            count=1,
            positions=self.geometry.positions(start, stop),
            first=start,
            span=self.policy.block_size,
        )

    def form(self, start: int, form: Form) -> Blocks:
        """The block that begins at step `start` in `form`. Not for a compressor that looks at queries."""
        block = self.block(start)
        if form == "full" or self.policy.compressor.keeps:
            return block
        compressed, _ = self.policy.compressor.age(block, None)
        if compressed is None:
            raise AssertionError(f"block {start} was archived but {self.policy.compressor} drops it")
        return compressed


def copied(context: Context) -> Context:
    """`context` with tensors of its own, which later writes do not change."""
    where = context.locate()
    return attrs.evolve(context, keys=context.keys.clone(), values=context.values.clone(), locate=lambda: where)


def difference(a: Context, b: Context) -> str | None:
    """The first field in which two contexts differ bitwise, or none."""
    for name in ("current", "causal", "banded"):
        if getattr(a, name) != getattr(b, name):
            return f"{name} is {getattr(a, name)} in one and {getattr(b, name)} in the other"
    for name in ("keys", "values", "mask", "origins", "placed"):
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None):
            return f"only one has a {name}"
        if x is None:
            continue
        if name in ("origins", "placed") and x.shape[-2:] == y.shape[-2:]:
            shape = torch.broadcast_shapes(x.shape, y.shape)
            x, y = x.expand(shape), y.expand(shape)
        if x.shape != y.shape:
            return f"{name} is {tuple(x.shape)} in one and {tuple(y.shape)} in the other"
        if not torch.equal(x, y):
            return f"{name} differ by up to {(x.double() - y.double()).abs().max().item():.2g}"
    return None


# ---------------------------------------------------------------------- the invariants


def conservation(trial: Trial) -> None:
    """Invariant 1: every step is in exactly one tier or dropped by a policy that says so; the archive holds what it was given."""
    store, policy = trial.store, trial.policy
    census, seen = store.census(), trial.seen
    require(sum(census.values()) == seen and min(census.values()) >= 0, 1, f"{census} does not add up to {seen} steps")
    timeline = policy.timeline
    tiers = [timeline.tier(step, store.settled) for step in range(seen)]
    for tier in ("sink", "recent", "current"):
        require(census[tier] == tiers.count(tier), 1, f"{census} but the timeline has {tiers.count(tier)} {tier} steps")
    gone = census["mid"] + census["dropped"]
    require(gone == tiers.count("mid"), 1, f"{census} but {tiers.count('mid')} steps have left recent")
    if policy.in_place:
        return
    starts = [] if store.starts.data is None else store.starts.data.tolist()
    grid = [start for start in range(timeline.sink, store.aged_to, policy.block_size)]
    require(set(starts) <= set(grid) and starts == sorted(set(starts)), 1, f"archived blocks begin at {starts}")
    require(len(starts) * policy.block_size == census["mid"], 1, f"{len(starts)} archived blocks but {census}")
    if policy.compressor.drops:
        require(not starts, 1, f"{policy.compressor} drops, but blocks {starts} were archived")
        return
    for form, shelf in store.shelves.items():
        require(shelf.count == len(starts), 1, f"the {form} shelf holds {shelf.count} of {len(starts)} archived blocks")
        _shelf_holds(trial, form, shelf, starts)


def _shelf_holds(trial: Trial, form: Form, shelf: Shelf, starts: list[int]) -> None:
    if not starts or (form == "compressed" and trial.policy.compressor.prepares):
        return
    geometry = trial.geometry
    index = torch.arange(len(starts)).expand(geometry.batch, geometry.kv_heads, -1)
    keys, values, offsets = shelf.read(index)
    for number, start in enumerate(starts):
        want = trial.form(start, form)
        for name, got, expected in (("keys", keys, want.keys), ("values", values, want.values)):
            same = torch.equal if form == "full" else _close
            require(same(got[:, :, number], expected[:, :, 0]), 1, f"the {form} block of step {start} has other {name}")
        got_offsets = offsets.expand(*keys.shape[:4], -1)[:, :, number]
        want_offsets = want.offsets.expand(*want.keys.shape[:4], -1)[:, :, 0]
        require(_close(got_offsets, want_offsets), 1, f"the {form} block of step {start} lies elsewhere")


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), **_CLOSE)


def _mid(trial: Trial) -> tuple[Tensor, Tensor, Tensor] | None:
    """Stored keys, values and origins of the attended mid tokens, worked out block by block; none if there are none."""
    store = trial.store
    if trial.policy.in_place:
        steps = range(trial.policy.timeline.sink, store.aged_to)
        at = torch.tensor(list(steps), dtype=torch.long)
        shape = (trial.geometry.batch, trial.geometry.kv_heads, at.numel())
        return trial.keys[:, :, at], trial.values[:, :, at], at.double().expand(shape)
    if store.selection is None or store.starts.data is None:
        return None
    starts = store.starts.data.tolist()
    forms: dict[tuple[int, Form], Blocks] = {}
    rows = []
    for row in range(trial.geometry.batch):
        for head in range(trial.geometry.kv_heads):
            picked: list[tuple[int, Form]] = [
                (n, trial.policy.recall) for n in store.selection.chosen[row, head].tolist()
            ]
            picked += [(n, "compressed") for n in store.selection.fringe[row, head].tolist()]
            numbers = [n for n, _ in picked]
            require(len(set(numbers)) == len(numbers), 8, f"a selection names a block twice: {numbers}")
            parts = []
            for number, form in sorted(picked):
                if (number, form) not in forms:
                    forms[number, form] = trial.form(starts[number], form)
                block = forms[number, form]
                offsets = block.offsets.expand(*block.keys.shape[:4], -1)[row, head, 0, :, 0].double()
                parts.append((block.keys[row, head, 0], block.values[row, head, 0], offsets + starts[number]))
            rows.append([torch.cat([part[i] for part in parts]) for i in range(3)])
    shape = (trial.geometry.batch, trial.geometry.kv_heads)
    keys, values, origins = (torch.stack([row[i] for row in rows]).unflatten(0, shape) for i in range(3))
    return keys, values, origins


def contents(trial: Trial, context: Context) -> None:
    """Invariants 1, 4 and 5: a context is sink, selected mid, recent, current; every key rotated once to its place."""
    store, geometry, policy = trial.store, trial.geometry, trial.policy
    sink = list(range(min(policy.timeline.sink, trial.seen)))
    recent = list(range(max(store.aged_to, len(sink)), trial.seen))
    origins = context.origins[..., 0].expand(*context.keys.shape[:3])
    placed = context.placed[..., 0].expand(*context.keys.shape[:3])
    require(bool((origins.diff(dim=-1) > 0).all()), 5, f"origins are not in order: {origins.tolist()}")
    require(bool((placed.diff(dim=-1) > 0).all()), 5, f"placed positions are not in order: {placed.tolist()}")
    tokens = context.keys.shape[2]
    inner = slice(len(sink), tokens - len(recent))
    for name, part, steps in (
        ("sink", origins[..., : len(sink)], sink),
        ("recent", origins[..., inner.stop :], recent),
    ):
        want = torch.tensor(steps, dtype=part.dtype).expand(part.shape[0], part.shape[1], -1)
        require(
            part.shape == want.shape and torch.equal(part, want), 1, f"{name} should hold steps {steps}, got {part}"
        )
    require(context.current == trial.seen - store.settled, 1, f"{context.current} current tokens")
    compressor = policy.compressor
    if compressor.prepares and not policy.in_place and not (policy.recall == "full" and not policy.fringe):
        return
    keys, values = [trial.keys[:, :, sink]], [trial.values[:, :, sink]]
    mid = _mid(trial)
    if mid is not None:
        require(mid[2].shape == origins[..., inner].shape, 1, f"{inner} mid tokens, expected {mid[2].shape[-1]}")
        require(_close(origins[..., inner], mid[2]), 1, f"mid tokens come from {origins[..., inner].tolist()}")
        keys.append(mid[0])
        values.append(mid[1])
    else:
        require(inner.stop == inner.start, 1, f"{inner.stop - inner.start} tokens too many are attended")
    keys.append(trial.keys[:, :, recent])
    values.append(trial.values[:, :, recent])
    exact = policy.in_place or compressor.keeps or compressor.drops or policy.recall == "full" and not policy.fringe
    same = torch.equal if exact else _close
    require(same(context.values, torch.cat(values, 2)), 1, "values are not those of the tokens at these origins")
    stored = torch.cat(keys, 2)
    if not policy.realigner.rotates:
        require(same(context.keys, stored), 4, "keys are not those of the tokens at these origins")
        require(torch.equal(origins, placed), 4, "keys that keep the model's rotation were placed elsewhere")
        return
    turned = trial.rotary.rotate(stored, placed[..., None])
    limit = 2e-2 if geometry.dtype != torch.float32 else 1e-4
    close = torch.allclose(context.keys.double(), turned.double(), rtol=limit, atol=limit)
    require(close, 4, "keys are not their stored keys rotated once to their placed positions")


def tiling(trial: Trial, context: Context) -> None:
    """Invariant 5, for a realigner whose blocks tile: the spans of sink, mid, recent and current touch and do not overlap."""
    spans = _spans(trial, context)
    for before, after in zip(spans, spans[1:], strict=False):
        gap = (after[0] - before[1]).abs().max().item()
        require(gap < 1e-6, 5, f"blocks leave a gap or overlap by {gap} steps: {before} then {after}")


def _spans(trial: Trial, context: Context) -> list[tuple[Tensor, Tensor]]:
    """First and last step (excluded) that each placed block occupies, [batch, kv_heads] each, in order."""
    store = trial.store
    heads = (trial.geometry.batch, trial.geometry.kv_heads)
    sink = store.sink_tokens
    placed = context.placed[..., 0].expand(*context.keys.shape[:3])
    found = []
    if sink:
        found.append((placed[..., 0], placed[..., sink - 1] + 1))
    if store.mid is not None:
        for start in store.mid.placed.double().expand(*heads, -1).unbind(-1):
            found.append((start, start + trial.policy.block_size))
    recent = trial.seen - max(store.aged_to, sink)
    if recent > 0:
        found.append((placed[..., -recent], placed[..., -1] + 1))
    return found


def bounded(trial: Trial, context: Context) -> None:
    """Invariant 6: tokens and bytes stay within their bounds, and what is reported is what is held."""
    policy, geometry, store = trial.policy, trial.geometry, trial.store
    bound = policy.bound(geometry)
    if bound is not None:
        require(context.keys.shape[2] <= bound, 6, f"{context.keys.shape[2]} tokens are attended, bound() says {bound}")
    held = trial.cache.held()
    device = sum(h.bytes for h in held if h.place == "device")
    limit = policy.bound_bytes(geometry, store.archived)
    if limit is not None:
        require(device <= limit, 6, f"{device} bytes on the device, bound_bytes() says {limit}")
    real = storages(store)
    for place in ("device", "host"):
        reported = sum(h.bytes for h in held if h.place == place)
        require(reported == real[place], 6, f"{reported} bytes reported in {place}, {real[place]} held")


def storages(store: LayerStore) -> dict[str, int]:
    """Bytes of the storages that can be reached from `store`, by place, without asking its accounting."""
    return storages_of([store])


def storages_of(stores: Iterable[LayerStore]) -> dict[str, int]:
    """`storages` of several stores together; what they share is counted once."""
    found: dict[str, dict[int, int]] = {"device": {}, "host": {}, "disk": {}}
    for store in stores:
        shelves = {id(shelf) for shelf in store.shelves.values()}
        for place, tensor in _tensors(store, "device", shelves, store.policy.archive.place, set()):
            storage = tensor.untyped_storage()
            found[place].setdefault(storage.data_ptr(), storage.nbytes())
    return {place: sum(sizes.values()) for place, sizes in found.items()}


def _tensors(
    value: object, place: str, shelves: set[int], shelf_place: str, seen: set[int]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor reachable from `value` through attributes and containers of kvtiers and its plugins."""
    if id(value) in seen:
        return
    seen.add(id(value))
    place = shelf_place if id(value) in shelves else place
    if isinstance(value, Tensor):
        if value.numel():
            yield place, value
        return
    if isinstance(value, Mapping):
        children: list[object] = list(value.values())
    elif isinstance(value, list | tuple):
        children = list(value)
    elif isinstance(value, Rotary | Policy | Geometry | type) or callable(value):
        return
    else:
        names = list(getattr(value, "__dict__", {}))
        names += [n for c in type(value).__mro__ for n in getattr(c, "__slots__", ()) if n != "__weakref__"]
        children = [getattr(value, name, None) for name in names if name != "_ledger"]
    for child in children:
        yield from _tensors(child, place, shelves, shelf_place, seen)


def reading(trial: Trial, context: Context) -> None:
    """Invariant 7: reading again gives the same tensors, and changes no byte of the store."""
    first = copied(context)
    numbers = (trial.store.census(), trial.store.seen, trial.store.settled)
    for _ in range(2):
        said = difference(first, trial.cache.context(0))
        require(said is None, 7, f"a second reading differs: {said}")
    require(numbers == (trial.store.census(), trial.store.seen, trial.store.settled), 7, "reading changed the counts")
