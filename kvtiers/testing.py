"""The conformance kit: one call from one test checks a policy against the invariants that every policy must keep.

    from kvtiers.testing import check_compressor

    def test_my_compressor_keeps_the_invariants():
        check_compressor(lambda: MyCompressor(ratio=4))

`check_sink`, `check_compressor`, `check_retriever`, `check_realigner` and `check_archive` check what is particular to a
slot and then a whole policy with the choice in it; `check_policy` runs a `Policy` of your own. Layers, tokens and the
ways to cut them are drawn by Hypothesis, so a failure comes with the smallest example found. A broken invariant raises
`AssertionError` with its number and name: "invariant 1 (conservation): ...".

Importing this module needs Hypothesis; nothing else of kvtiers imports it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import torch
from torch import Tensor

from kvtiers.archive import Archive, BlockStore
from kvtiers.blocks import Blocks, Context, Extent, Form, run_of
from kvtiers.cache import TieredCache
from kvtiers.errors import CropError, GeometryError, MissingExtraError, PolicyError
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.policy import SLOTS, Compressor, Policy, Realigner, Retriever, Sink, Source
from kvtiers.presets import build, describe
from kvtiers.rotary import Rotary

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise MissingExtraError(
        "kvtiers.testing draws its examples with Hypothesis, which is not installed; "
        "run pip install hypothesis, or pip install 'kvtiers[dev]'"
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
_CLOSE = 1e-4


def require(holds: bool, invariant: int, message: str, *values: object) -> None:
    """Raise `AssertionError` naming the invariant unless it holds; `{}` in the message stands for `values`."""
    if not holds:
        raise AssertionError(
            f"invariant {invariant} ({INVARIANTS[invariant]}): {message.format(*values) if values else message}"
        )


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
    def layer(self) -> Layer:
        """What the only group of rows holds."""
        return self.cache.every_layer()[0]

    @property
    def num_steps(self) -> int:
        return self.cache.num_steps

    def feed(self, steps: int) -> Context:
        """Write and select the next `steps` steps; returns the context."""
        now = slice(self.num_steps, self.num_steps + steps)
        self.cache.write(0, self.keys[:, :, now], self.values[:, :, now])
        self.cache.select(0, self.query[:, :, now])
        return self.cache.context(0)

    def branch(self, cache: TieredCache) -> "Trial":
        """The same stream for another cache."""
        return attrs.evolve(self, cache=cache)

    def select_rows(self, rows: Tensor) -> None:
        """Select rows of the cache, and of the stream."""
        self.cache.select_rows(rows)
        self.query, self.keys, self.values = self.query[rows], self.keys[rows], self.values[rows]
        self.geometry = attrs.evolve(self.geometry, batch=rows.numel())

    def block(self, start: int) -> Blocks:
        """The block that begins at step `start`, as it was before it was archived."""
        stop = start + self.policy.block_size
        keys, positions = self.keys[:, :, start:stop], self.geometry.positions(start, stop)
        return run_of(
            keys,
            self.values[:, :, start:stop],
            count=1,
            positions=positions,
            first=start,
            span=self.policy.block_size,
            rotated=self.rotary.rotate(keys, positions) if self.policy.realigner.rotates else keys,
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
    """Invariant 1: every step is in exactly one tier, or dropped by a policy that says so."""
    layer, policy = trial.layer, trial.policy
    tier_counts, seen = layer.tier_counts(), trial.num_steps
    require(
        sum(tier_counts.values()) == seen and min(tier_counts.values()) >= 0,
        1,
        f"{tier_counts} does not add up to {seen} steps",
    )
    timeline = layer.timeline
    tiers = [timeline.tier(step, layer.committed_steps) for step in range(seen)]
    for tier in ("sink", "recent", "current"):
        require(
            tier_counts[tier] == tiers.count(tier),
            1,
            f"{tier_counts} but the timeline has {tiers.count(tier)} {tier} steps",
        )
    gone = tier_counts["mid"] + tier_counts["dropped"]
    require(gone == tiers.count("mid"), 1, f"{tier_counts} but {tiers.count('mid')} steps have left recent")
    if policy.in_place:
        return
    starts = [] if layer.starts.data is None else layer.starts.data.tolist()
    grid = range(timeline.sink, layer.recent_start, policy.block_size)
    require(set(starts) <= set(grid) and starts == sorted(set(starts)), 1, f"archived blocks begin at {starts}")
    require(
        len(starts) * policy.block_size == tier_counts["mid"], 1, f"{len(starts)} archived blocks but {tier_counts}"
    )
    if policy.compressor.drops:
        require(not starts, 1, f"{policy.compressor} drops, but blocks {starts} were archived")
        return
    for form, store in layer.stores.items():
        require(store.count == len(starts), 1, f"the {form} store holds {store.count} of {len(starts)} archived blocks")
        _store_holds(trial, form, store, starts)


def _store_holds(trial: Trial, form: Form, store: BlockStore, starts: list[int]) -> None:
    if not starts or (form == "compressed" and trial.policy.compressor.prepares):
        return
    geometry = trial.geometry
    index = torch.arange(len(starts)).expand(geometry.batch, geometry.kv_heads, -1)
    keys, values, offsets = store.read(index)
    for number, start in enumerate(starts):
        want = trial.form(start, form)
        for name, got, expected in (("keys", keys, want.keys), ("values", values, want.values)):
            same = torch.equal if form == "full" else _close
            require(same(got[:, :, number], expected[:, :, 0]), 1, f"the {form} block of step {start} has other {name}")
        got_offsets = offsets.expand(*keys.shape[:4], -1)[:, :, number]
        want_offsets = want.offsets.expand(*want.keys.shape[:4], -1)[:, :, 0]
        require(_close(got_offsets, want_offsets), 1, f"the {form} block of step {start} lies elsewhere")


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=_CLOSE, atol=_CLOSE)


def _mid(trial: Trial) -> tuple[Tensor, Tensor, Tensor] | None:
    """Stored keys, values and origins of the attended mid tokens, worked out block by block; none if there are none."""
    layer = trial.layer
    if trial.policy.in_place:
        steps = range(layer.timeline.sink, layer.recent_start)
        at = torch.tensor(list(steps), dtype=torch.long)
        wide = at.double().expand(trial.geometry.batch, trial.geometry.kv_heads, -1)
        return trial.keys[:, :, at], trial.values[:, :, at], wide
    if layer.selection is None or layer.starts.data is None:
        return None
    starts = layer.starts.data.tolist()
    forms: dict[tuple[int, Form], Blocks] = {}
    rows = []
    for row in range(trial.geometry.batch):
        for head in range(trial.geometry.kv_heads):
            picked: list[tuple[int, Form]] = [
                (n, trial.policy.attend) for n in layer.selection.chosen[row, head].tolist()
            ]
            picked += [(n, "compressed") for n in layer.selection.compressed[row, head].tolist()]
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
    layer, geometry, policy = trial.layer, trial.geometry, trial.policy
    sink = list(range(min(layer.timeline.sink, trial.num_steps)))
    recent = list(range(max(layer.recent_start, len(sink)), trial.num_steps))
    origins = context.origins[..., 0].expand(*context.keys.shape[:3])
    placed = context.placed[..., 0].expand(*context.keys.shape[:3])
    require(bool((origins.diff(dim=-1) > 0).all()), 5, "origins are not in order: {}", origins)
    require(bool((placed.diff(dim=-1) > 0).all()), 5, "placed positions are not in order: {}", placed)
    tokens = context.keys.shape[2]
    inner = slice(len(sink), tokens - len(recent))
    for name, part, steps in (
        ("sink", origins[..., : len(sink)], sink),
        ("recent", origins[..., inner.stop :], recent),
    ):
        want = torch.tensor(steps, dtype=part.dtype).expand(part.shape[0], part.shape[1], -1)
        require(
            part.shape == want.shape and torch.equal(part, want),
            1,
            "{} should hold steps {}, got {}",
            name,
            steps,
            part,
        )
    require(context.current == trial.num_steps - layer.committed_steps, 1, f"{context.current} current tokens")
    compressor = policy.compressor
    if compressor.prepares and not policy.in_place and (policy.attend == "compressed" or policy.top_k_compressed):
        return  # what it keeps depends on queries that are gone
    keys, values = [trial.keys[:, :, sink]], [trial.values[:, :, sink]]
    mid = _mid(trial)
    if mid is not None:
        require(mid[2].shape == origins[..., inner].shape, 1, f"{inner} mid tokens, expected {mid[2].shape[-1]}")
        require(_close(origins[..., inner], mid[2]), 1, "mid tokens come from {}", origins[..., inner])
        keys.append(mid[0])
        values.append(mid[1])
    else:
        require(inner.stop == inner.start, 1, f"{inner.stop - inner.start} tokens too many are attended")
    keys.append(trial.keys[:, :, recent])
    values.append(trial.values[:, :, recent])
    only_full = policy.attend == "full" and not policy.top_k_compressed
    exact = policy.in_place or compressor.keeps or compressor.drops or only_full
    same = torch.equal if exact else _close
    require(same(context.values, torch.cat(values, 2)), 1, "values are not those of the tokens at these origins")
    stored = torch.cat(keys, 2)
    if not policy.realigner.rotates:
        require(same(context.keys, stored), 4, "keys are not those of the tokens at these origins")
        require(torch.equal(origins, placed), 4, "keys that keep the model's rotation were placed elsewhere")
        return
    turned = trial.rotary.rotate(stored, placed[..., None])
    limit = 2e-2 if geometry.dtype.itemsize < 4 else 1e-4
    if policy.realigner.rotates_again:  # one rounding for every time that the anchors moved
        limit *= 1 + (layer.recent_start - layer.timeline.sink) // layer.timeline.block_size
    close = torch.allclose(context.keys.double(), turned.double(), rtol=limit, atol=limit)
    require(close, 4, "keys are not their stored keys rotated once to their placed positions")


def tiling(trial: Trial, context: Context) -> None:
    """Invariant 5, for a realigner that closes up: the spans of placed blocks touch and do not overlap."""
    spans = _spans(trial, context)
    for before, after in pairwise(spans):
        gap = (after[0] - before[1]).abs().max().item()
        require(gap < 1e-6, 5, "blocks leave a gap or overlap by {} steps: {} then {}", gap, before, after)


def _spans(trial: Trial, context: Context) -> list[tuple[Tensor, Tensor]]:
    """First and last step (excluded) that each placed block occupies, [batch, kv_heads] each, in order."""
    layer = trial.layer
    heads = (trial.geometry.batch, trial.geometry.kv_heads)
    sink = layer.sink_tokens
    placed = context.placed[..., 0].expand(*context.keys.shape[:3])
    found = []
    if sink:
        found.append((placed[..., 0], placed[..., sink - 1] + 1))
    if layer.mid is not None:
        starts = layer.mid.placed.double().expand(*heads, -1).unbind(-1)
        found += [(start, start + trial.policy.block_size) for start in starts]
    recent = trial.num_steps - max(layer.recent_start, sink)
    if recent > 0:
        found.append((placed[..., -recent], placed[..., -1] + 1))
    return found


def bounded(trial: Trial, context: Context) -> None:
    """Invariant 6: tokens and bytes stay within their bounds, and what is reported is what is held."""
    policy, geometry, layer = trial.policy, trial.geometry, trial.layer
    bound = policy.bound(geometry)
    if bound is not None:
        require(context.keys.shape[2] <= bound, 6, f"{context.keys.shape[2]} tokens are attended, bound() says {bound}")
    held = trial.cache.memory_usage()
    device = sum(h.bytes for h in held if h.location == "device")
    limit = policy.bound_bytes(geometry, layer.archived)
    if limit is not None:
        require(device <= limit, 6, f"{device} bytes on the device, bound_bytes() says {limit}")
    real = storages(layer)
    for location in ("device", "host"):
        reported = sum(h.bytes for h in held if h.location == location)
        require(reported == real[location], 6, f"{reported} bytes reported in {location}, {real[location]} held")


def storages(layer: Layer) -> dict[str, int]:
    """Bytes of the storages that can be reached from `layer`, by location, without asking its accounting."""
    return storages_of([layer])


def storages_of(layers: Iterable[Layer]) -> dict[str, int]:
    """`storages` of several layers together; what they share is counted once."""
    found: dict[str, dict[int, int]] = {"device": {}, "host": {}, "disk": {}}
    for layer in layers:
        stores = {id(store) for store in layer.stores.values()}
        for location, tensor in _tensors(layer, "device", stores, layer.policy.archive.location, set()):
            storage = tensor.untyped_storage()
            found[location].setdefault(storage.data_ptr(), storage.nbytes())
    return {location: sum(sizes.values()) for location, sizes in found.items()}


def _tensors(
    value: object, location: str, stores: set[int], store_location: str, seen: set[int]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor reachable from `value` through attributes and containers of kvtiers and its plugins."""
    if id(value) in seen:
        return
    seen.add(id(value))
    location = store_location if id(value) in stores else location
    if isinstance(value, Tensor):
        if value.numel():
            yield location, value
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
        children = [getattr(value, name, None) for name in names if name != "_byte_budget"]
    for child in children:
        yield from _tensors(child, location, stores, store_location, seen)


def reading(trial: Trial, context: Context) -> None:
    """Invariant 7: reading again gives the same tensors, and changes no byte of the layer."""
    first = copied(context)
    numbers = (trial.layer.tier_counts(), trial.layer.num_steps, trial.layer.committed_steps)
    for _ in range(2):
        said = difference(first, trial.cache.context(0))
        require(said is None, 7, f"a second reading differs: {said}")
    require(
        numbers == (trial.layer.tier_counts(), trial.layer.num_steps, trial.layer.committed_steps),
        7,
        "reading changed the counts",
    )


def rows_alone(trial: Trial, lengths: list[int]) -> None:
    """Invariant 9: every row of a batch is what it would be alone."""
    together = [copied(trial.feed(steps)) for steps in lengths]
    for row in range(trial.geometry.batch):
        alone = _row_of(trial, row)
        for context in together:
            own = alone.feed(context.current)
            for name, a, b in (("keys", context.keys, own.keys), ("values", context.values, own.values)):
                require(_close(a[row], b[0]), 9, f"row {row} of {trial.geometry.batch} has other {name} than alone")


def _row_of(trial: Trial, row: int) -> Trial:
    """An empty cache of one row, with the tokens of `row`."""
    geometry = attrs.evolve(trial.geometry, batch=1)
    return attrs.evolve(
        trial,
        geometry=geometry,
        query=trial.query[row : row + 1],
        keys=trial.keys[row : row + 1],
        values=trial.values[row : row + 1],
        cache=TieredCache(trial.policy, [geometry], rotaries=[trial.rotary]),
    )


def taking(trial: Trial, lengths: list[int], rows: Tensor) -> None:
    """Invariant 9: taking rows of a filled cache equals having written those rows from the start."""
    half = len(lengths) // 2
    for steps in lengths[:half]:
        trial.feed(steps)
    trial.select_rows(rows)
    cache = TieredCache(trial.policy, [trial.geometry], rotaries=[trial.rotary])
    other = trial.branch(cache)
    for steps in lengths[:half]:
        other.feed(steps)
    for steps in lengths[half:]:
        a, b = trial.feed(steps), other.feed(steps)
        alike = _close(a.keys, b.keys) and _close(a.values, b.values)
        require(alike, 9, f"after taking rows {rows.tolist()} the cache goes on otherwise than those rows would")


def memory(trial: Trial, lengths: list[int], split: int, back: int) -> None:
    """Invariant 10: saved, forked and rolled back, a cache goes on exactly.

    The first `split` forwards are before, the others after; `back` steps are fed too much and rolled back.
    """
    for steps in lengths[:split]:
        trial.feed(steps)
    fork = trial.branch(trial.cache.fork())
    ways = {"forked": fork}
    if _has_a_name(trial.policy):
        loaded = trial.branch(TieredCache(trial.policy, [trial.geometry], rotaries=[trial.rotary]))
        with TemporaryDirectory() as folder:
            trial.cache.save(Path(folder) / "cache.safetensors")
            loaded.cache.load(Path(folder) / "cache.safetensors")
        ways["loaded"] = loaded
    cropped = trial.branch(trial.cache.fork())
    if back and split:
        for _ in range(back):
            cropped.feed(1)
        try:
            cropped.cache.crop_by(back)
            ways["rolled back"] = cropped
        except CropError:
            pass
    for steps in lengths[split:]:
        context = copied(trial.feed(steps))
        for way, other in ways.items():
            said = difference(context, other.feed(steps))
            require(said is None, 10, f"a {way} cache goes on otherwise: {said}")
            require(other.layer.tier_counts() == trial.layer.tier_counts(), 10, f"a {way} cache counts otherwise")


def _has_a_name(policy: Policy) -> bool:
    """Whether every slot is installed by name; only then can a cache be saved."""
    try:
        describe(policy)
    except PolicyError:
        return False
    return True


# ---------------------------------------------------------------------- what a plugin's author calls


@attrs.frozen(kw_only=True)
class _Layer:
    """A small layer and the forwards that it sees, as drawn."""

    kv_heads: int
    group: int
    batch: int
    layout: str
    seed: int
    sink: int
    recent: int
    block_size: int
    chunk_size: int
    top_k: int
    lengths: tuple[int, ...]
    split: int
    back: int
    rows: tuple[int, ...]

    @property
    def geometry(self) -> Geometry:
        heads = self.kv_heads * self.group
        return Geometry(kv_heads=self.kv_heads, query_heads=heads, head_dim=4, value_dim=6, batch=self.batch)

    @property
    def forwards(self) -> list[int]:
        return [min(length, self.chunk_size) for length in self.lengths]

    def scaled(self, policy: Policy) -> Policy:
        """`policy` in sizes at which blocks move within few tokens."""
        return attrs.evolve(
            policy,
            sink=min(policy.sink, self.sink),
            recent=None if policy.recent is None else self.recent,
            block_size=min(policy.block_size, self.block_size),
            chunk_size=None if policy.chunk_size is None else self.chunk_size,
            top_k=min(policy.top_k, self.top_k),
            budget=None,
        )

    def trial(self, policy: Policy) -> Trial:
        layout: Any = self.layout
        rotary = Rotary([torch.tensor([1.0, 0.1])], layout=layout, angle_dtype=torch.float64)
        steps = sum(self.forwards) + self.back
        return Trial.start(self.scaled(policy), self.geometry, rotary, seed=self.seed, steps=steps)


_layers = st.builds(
    _Layer,
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    batch=st.integers(1, 2),
    layout=st.sampled_from(["half", "interleaved"]),
    seed=st.integers(0, 9_999),
    sink=st.integers(0, 3),
    recent=st.integers(0, 6),
    block_size=st.integers(1, 4),
    chunk_size=st.integers(1, 6),
    top_k=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=9).map(tuple),
    split=st.integers(0, 9),
    back=st.integers(0, 2),
    rows=st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple),
)


def _for_all(examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run a function for `examples` draws of `strategies`, at once."""

    def run(check: Callable[..., None]) -> None:
        quiet = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        quiet(given(*strategies)(check))()

    return run


def check_policy(policy: Policy, *, examples: int = 25, rows_independent: bool = True) -> None:
    """Check a whole policy against invariants 1, 4, 5, 6, 7, 9 and 10, over `examples` small layers.

    Saving is checked if every slot is installed by name, since nothing else can be saved. Sizes are scaled down, so
    that blocks move within few tokens; slots stay as they are.
    rows_independent: false if the policy says that rows of a batch decide together.
    """
    _check_running(policy, examples)
    _check_memory(policy, examples)
    if rows_independent:
        _check_rows(policy, examples)


def _check_running(policy: Policy, examples: int) -> None:
    @_for_all(examples, _layers)
    def _(layer: _Layer) -> None:
        trial = layer.trial(policy)
        for steps in layer.forwards:
            context = trial.feed(steps)
            conservation(trial)
            contents(trial, context)
            bounded(trial, context)
            reading(trial, context)


def _check_memory(policy: Policy, examples: int) -> None:
    @_for_all(examples, _layers)
    def _(layer: _Layer) -> None:
        memory(layer.trial(policy), layer.forwards, min(layer.split, len(layer.lengths)), layer.back)


def _check_rows(policy: Policy, examples: int) -> None:
    @_for_all(examples, _layers)
    def _(layer: _Layer) -> None:
        rows_alone(layer.trial(policy), layer.forwards)
        taking(layer.trial(policy), layer.forwards, torch.tensor([row % layer.batch for row in layer.rows]))


def _policy_of(**slots: Any) -> Policy:
    """A policy of plain choices, but for `slots` and settings."""
    plain = {
        "sinks": "first",
        "compressor": "keep",
        "retriever": "recency",
        "realigner": "original",
        "archive": "host",
    }
    chosen = {slot: build(slot, slots.pop(slot, plain[slot])) for slot in SLOTS}
    return Policy(**{**chosen, "sink": 3, "recent": 6, "block_size": 4, "chunk_size": 6, "top_k": 3, **slots})


def _is_a_value(factory: Callable[[], Any], kind: type) -> Any:
    """What `factory` makes, after checking that it makes equal ones; a saved cache and a swap rely on it."""
    made, again = factory(), factory()
    if not isinstance(made, kind):
        raise AssertionError(f"the factory made a {type(made).__name__}, which is no {kind.__name__}")
    if made != again:
        raise AssertionError(f"two {type(made).__name__} of equal settings are not equal; make it @attrs.frozen")
    return made


def check_sink(factory: Callable[[], Sink], *, examples: int = 25) -> None:
    """Check a sink policy: it decides by the block alone, and what it calls anchors is the beginning."""
    sink: Sink = _is_a_value(factory, Sink)

    @_for_all(examples, st.integers(0, 8), st.integers(0, 20), st.integers(1, 5))
    def _(setting: int, start: int, steps: int) -> None:
        block = Extent(start, start + steps)
        require(sink.is_anchor(block, setting) == sink.is_anchor(block, setting), 1, f"{block} is and is no anchor")
        count = sink.steps(setting)
        require(0 <= count <= setting, 1, f"steps({setting}) says {count}")
        require(count == 0 or sink.is_anchor(Extent(count - 1, count), setting), 1, f"step {count - 1} is no anchor")

    check_policy(_policy_of(sinks=sink), examples=examples)
    check_policy(_policy_of(sinks=sink, compressor="drop", realigner="contiguous"), examples=examples)


@attrs.frozen(kw_only=True)
class _Run:
    """Some blocks and queries, as drawn."""

    batch: int
    kv_heads: int
    group: int
    count: int
    tokens: int
    queries: int
    seed: int

    def blocks(self) -> Blocks:
        g = torch.Generator().manual_seed(self.seed)
        lead = (self.batch, self.kv_heads, self.count * self.tokens)
        return run_of(
            torch.randn(*lead, 4, generator=g),
            torch.randn(*lead, 6, generator=g),
            count=self.count,
            positions=Geometry(kv_heads=1, head_dim=4).positions(8, 8 + self.tokens * self.count),
            first=8,
            span=self.tokens,
            rotated=torch.randn(*lead, 4, generator=g),
        )

    def query(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, self.kv_heads * self.group, self.queries, 4, generator=g)


_runs = st.builds(
    _Run,
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    count=st.integers(1, 4),
    tokens=st.integers(1, 6),
    queries=st.integers(1, 3),
    seed=st.integers(0, 9_999),
)


def _one(blocks: Blocks, number: int) -> Blocks:
    """One block of a run."""
    at = slice(number, number + 1)
    rotated = None if blocks.rotated is None else blocks.rotated[:, :, at]
    return attrs.evolve(
        blocks,
        keys=blocks.keys[:, :, at],
        values=blocks.values[:, :, at],
        starts=blocks.starts[at],
        rotated=rotated,
    )


def _row(blocks: Blocks, row: int) -> Blocks:
    """One row of a run."""
    at = slice(row, row + 1)
    rotated = None if blocks.rotated is None else blocks.rotated[at]
    return attrs.evolve(blocks, keys=blocks.keys[at], values=blocks.values[at], rotated=rotated)


def check_compressor(factory: Callable[[], Compressor], *, examples: int = 25) -> None:
    """Check a compressor of K/V: sizes as declared, nothing changed in place, rows independent, then whole policies."""
    compressor: Compressor = _is_a_value(factory, Compressor)
    if compressor.drops and compressor.keeps:
        raise AssertionError(f"{compressor} says both that it drops and that it keeps")
    if not (compressor.drops or compressor.keeps):
        _check_ageing(compressor, examples)
    for changes in ({"attend": "compressed"}, {"attend": "full", "top_k_compressed": 1, "realigner": "contiguous"}):
        check_policy(_policy_of(compressor=compressor, **changes), examples=examples)


def _state_for(compressor: Compressor, run: _Run, blocks: Blocks, row: int | None = None) -> Any:
    """The state after queries were shown to the compressor, if it asks for them."""
    if not compressor.prepares:
        return None
    queries, keys, values = run.query(), blocks.keys.flatten(2, 3), blocks.values.flatten(2, 3)
    if row is not None:
        queries = queries[row : row + 1]
    return compressor.prepare(Source(queries=queries, keys=keys, values=values), None)


def _check_ageing(compressor: Compressor, examples: int) -> None:
    @_for_all(examples, _runs)
    def _(run: _Run) -> None:
        blocks = run.blocks()
        before = [x.clone() for x in (blocks.keys, blocks.values, blocks.offsets, blocks.starts)]
        state = _state_for(compressor, run, blocks)
        kept_state = state.clone() if isinstance(state, Tensor) else state
        aged, after = compressor.age(blocks, state)
        for was, now in zip(before, (blocks.keys, blocks.values, blocks.offsets, blocks.starts), strict=True):
            require(torch.equal(was, now), 7, f"{compressor} changed the blocks that it was given")
        if isinstance(state, Tensor):
            require(torch.equal(state, kept_state), 7, f"{compressor} changed its state in place")
        ok = after is None or (isinstance(after, Tensor) and after.dim() > 0 and after.shape[0] == run.batch)
        require(ok, 10, f"{compressor} returned a state that is no tensor with the batch first; it cannot be saved")
        if aged is None:
            return
        want = compressor.compressed_tokens(run.tokens)
        require(aged.tokens == want, 6, f"a block of {run.tokens} tokens became {aged.tokens}, declared {want}")
        require(aged.count == run.count and aged.span >= 1, 1, f"{run.count} blocks became {aged.count}")
        require(aged.keys.dtype == blocks.keys.dtype, 6, f"keys became {aged.keys.dtype}")
        finite = bool(torch.isfinite(aged.keys).all() and torch.isfinite(aged.values).all())
        require(finite, 1, "keys or values are no longer finite")
        time = aged.offsets[..., 0]
        inside = bool((time.diff(dim=-1) > 0).all() and (time >= 0).all() and (time < aged.span).all())
        require(inside, 5, "offsets {} are not in order within a span of {}", time, aged.span)
        for row in range(run.batch):
            own = _row(blocks, row)
            alone, _ = compressor.age(own, _state_for(compressor, run, own, row))
            same = alone is not None and _close(alone.keys[0], aged.keys[row])
            require(same, 9, f"row {row} becomes something else alone than beside other rows")
        if after is not None and not compressor.prepares:
            return  # a running state: what a block becomes depends on those before it
        for number in range(run.count):
            alone, _ = compressor.age(_one(blocks, number), state)
            same = alone is not None and _close(alone.keys[:, :, 0], aged.keys[:, :, number])
            require(same, 1, f"block {number} becomes something else alone than in a run of {run.count}")
        one = attrs.evolve(run, batch=1, kv_heads=1, group=1, count=1)
        first, second = (attrs.evolve(one, seed=run.seed + i).blocks() for i in (0, 1))
        ages = [compressor.age(b, _state_for(compressor, one, b))[0] for b in (first, second)]
        found = [aged for aged in ages if aged is not None]
        if len(found) == 2 and not torch.equal(found[0].offsets, found[1].offsets):
            require(
                not found[0].alike, 1, f"{compressor} leaves other offsets in other blocks: set offsets_differ=True"
            )


def check_retriever(
    factory: Callable[[], Retriever],
    *,
    declared: Callable[[Tensor, Tensor], Tensor] | None = None,
    rows_independent: bool = True,
    examples: int = 25,
) -> None:
    """Check a retriever: counts and digests as declared, scores pure, rows independent, then a whole policy.

    declared: the score by brute force, from queries [batch, query_heads, queries, head_dim] and the rotated keys of
        every block [batch, kv_heads, blocks, tokens, head_dim], for invariant 8; none if there is none to compare with.
    rows_independent: false if the score says that rows decide together.
    """
    retriever: Retriever = _is_a_value(factory, Retriever)

    @_for_all(examples, st.integers(1, 8), st.integers(0, 12))
    def _(top_k: int, archived: int) -> None:
        count = retriever.count(top_k, archived)
        require(0 <= count <= archived, 8, f"count({top_k}, {archived}) says {count}")
        require(retriever.count(top_k, archived + 1) >= count, 8, "fewer blocks are chosen of more")
        if top_k >= archived and count:
            require(count == archived, 8, f"top_k = {top_k} of {archived} blocks chooses only {count}")

    @_for_all(examples, _runs)
    def _(run: _Run) -> None:
        _check_scores(retriever, run, declared, rows_independent)

    for changes in ({"refresh": "chunk"}, {"realigner": "contiguous", "compressor": "mean-pool", "attend": "full"}):
        found = _policy_of(retriever=retriever, **changes)
        check_policy(found, examples=examples, rows_independent=rows_independent)


def _check_scores(
    retriever: Retriever, run: _Run, declared: Callable[[Tensor, Tensor], Tensor] | None, rows_independent: bool
) -> None:
    blocks, query, wide = run.blocks(), run.query(), (run.batch, run.kv_heads, run.count)

    def score(blocks: Blocks, query: Tensor, *shape: int) -> Tensor:
        digests = retriever.digest(blocks) if retriever.needs_digests else None
        if digests is not None:
            floats = retriever.digest_floats(run.tokens, 4)
            got = digests.shape[3] * digests.shape[4]
            require(got <= floats, 6, f"a block of {run.tokens} tokens has {got} digest numbers, declared {floats}")
        return retriever.score(query if retriever.needs_query else None, digests, run.count).expand(*shape)

    before = [x.clone() for x in (blocks.keys, blocks.rotated, query) if x is not None]
    scores = score(blocks, query, *wide)
    for was, now in zip(before, (blocks.keys, blocks.rotated, query), strict=True):
        require(now is not None and torch.equal(was, now), 7, f"{retriever} changed what it was given")
    require(not bool(scores.isnan().any()), 8, "a score is not a number")
    require(torch.equal(scores, score(blocks, query, *wide)), 8, "the same query scores the same blocks otherwise")
    if retriever.needs_digests:
        apart = torch.cat([retriever.digest(_one(blocks, number)) for number in range(run.count)], 2)
        require(_close(apart, retriever.digest(blocks)), 8, "blocks digested one by one have other digests")
    if rows_independent:
        for row in range(run.batch):
            alone = score(_row(blocks, row), query[row : row + 1], 1, *wide[1:])
            require(_close(alone[0], scores[row]), 8, f"row {row} scores otherwise alone than beside other rows")
    if declared is not None and blocks.rotated is not None:
        want = declared(query, blocks.rotated).expand(*wide)
        worst = (scores.double() - want.double()).abs().max().item()
        require(_close(scores, want), 8, f"scores differ from the declared ones by up to {worst:.2g}")


def check_realigner(factory: Callable[[], Realigner], *, examples: int = 25) -> None:
    """Check a realigner: blocks keep their order and never overlap, nothing changes in place; then whole policies."""
    realigner: Realigner = _is_a_value(factory, Realigner)

    @_for_all(
        examples, st.integers(0, 4), st.lists(st.integers(0, 9), max_size=5), st.integers(1, 4), st.integers(0, 9)
    )
    def _(sink: int, gaps: list[int], span: int, last_gap: int) -> None:
        starts, at = [], sink
        for gap in gaps:
            starts.append(at + gap)
            at += gap + span
        recent = at + last_gap
        where = torch.tensor(starts, dtype=torch.long)
        spans = torch.full_like(where, span)
        given_starts = where.clone()
        placed = realigner.place(sink=sink, starts=where, spans=spans, total=span * len(starts), recent=recent)
        require(torch.equal(where, given_starts), 7, f"{realigner} changed the starts that it was given")
        mids = placed.mid_starts.double().expand(len(starts)).tolist()
        edges: list[tuple[float, float]] = [(placed.sink_shift, sink + placed.sink_shift)] if sink else []
        edges += [(start, start + span) for start in mids]
        edges.append((recent + placed.recent_shift, float("inf")))
        for before, after in pairwise(edges):
            require(after[0] >= before[1], 5, f"placed blocks overlap or change order: {edges}")
        if placed.mid_from is not None:
            want = [placed.mid_from + number * span for number in range(len(starts))]
            require(mids == want, 5, f"mid_from = {placed.mid_from}, but mid blocks begin at {mids}")
        if not realigner.rotates:
            shifted = placed.sink_shift or placed.recent_shift or mids != starts
            require(not shifted, 4, f"{realigner} does not rotate, but places blocks elsewhere")

    for changes in ({"attend": "full"}, {"compressor": "mean-pool", "top_k_compressed": 1}, {"compressor": "drop"}):
        check_policy(_policy_of(realigner=realigner, **changes), examples=examples)


def check_archive(factory: Callable[[], Archive], *, examples: int = 25) -> None:
    """Check an archive: a store holds what a list would, through rows, forks and saving; then a whole policy."""
    archive: Archive = _is_a_value(factory, Archive)
    actions = st.lists(st.sampled_from(["write", "write", "write", "drop", "select_rows", "fork", "save"]), max_size=8)

    @_for_all(examples, _runs, actions, st.booleans())
    def _(run: _Run, actions: list[str], own: bool) -> None:
        store, held = _written(archive.open(), run, own)
        for number, action in enumerate(actions):
            run = attrs.evolve(run, seed=run.seed + 2)
            store, held = _act(archive, store, held, run, own, action, number)
            _store_is(archive, store, held)
        before = store.count
        try:
            store.write(_with_offsets(attrs.evolve(run, tokens=run.tokens + 1, batch=len(held[0][0])).blocks(), own))
        except GeometryError:
            require(store.count == before, 1, "a write that was refused left something behind")
        else:
            require(False, 1, "blocks of another size were taken; call self.admit(blocks) in write()")

    for attend, top_k_compressed in (("compressed", 0), ("full", 1)):
        found = _policy_of(archive=archive, compressor="mean-pool", attend=attend, top_k_compressed=top_k_compressed)
        check_policy(found, examples=examples)


_Held = list[tuple[Tensor, Tensor, Tensor]]
"""Keys, values and offsets of every block, [batch, kv_heads, tokens, width]."""


def _with_offsets(blocks: Blocks, own: bool) -> Blocks:
    if not own:
        return blocks
    wide = blocks.offsets.expand(*blocks.keys.shape[:4], -1)
    return attrs.evolve(blocks, offsets=wide + blocks.keys[..., :1].sigmoid() / 2, offsets_differ=True)


def _written(store: BlockStore, run: _Run, own: bool) -> tuple[BlockStore, _Held]:
    blocks = _with_offsets(run.blocks(), own)
    store.write(blocks)
    offsets = blocks.offsets.float().expand(*blocks.keys.shape[:4], -1)
    return store, list(zip(blocks.keys.unbind(2), blocks.values.unbind(2), offsets.unbind(2), strict=True))


def _act(
    archive: Archive, store: BlockStore, held: _Held, run: _Run, own: bool, action: str, number: int
) -> tuple[BlockStore, _Held]:
    """Do `action` to a store and to the list that it is compared with."""
    batch = held[0][0].shape[0]
    if action == "write":
        return store, held + _written(store, attrs.evolve(run, batch=batch), own)[1]
    if action == "drop" and len(held) > 1:
        store.drop_last(1)
        return store, held[:-1]
    if action == "select_rows":
        kept = batch if number % 2 == 0 else 1 + number % 3
        rows = torch.tensor([(number - 1 - i) % batch for i in range(kept)])
        store.select_rows(rows)
        return store, [(k[rows], v[rows], o[rows]) for k, v, o in held]
    if action == "fork":
        fork = store.fork()
        _written(store, attrs.evolve(run, batch=batch), own)
        return fork, held
    if action == "save":
        loaded = archive.open()
        saved = {name: part.clone() for name, part in store.tensors().items()}
        loaded.restore(saved, count=store.count, span=store.span)
        return loaded, held
    return store, held


def _store_is(archive: Archive, store: BlockStore, held: _Held) -> None:
    """Compare a store with the list, block by block."""
    require(store.count == len(held), 1, f"the store counts {store.count} blocks of {len(held)}")
    batch, kv_heads = held[0][0].shape[:2]
    index = torch.arange(len(held)).flip(0).expand(batch, kv_heads, -1)
    read = store.read(index)
    for name, got, want in zip(("keys", "values", "offsets"), read, zip(*reversed(held), strict=True), strict=True):
        expected = torch.stack(want, 2)
        same = torch.equal(got.expand(expected.shape), expected)
        require(same, 1, f"the {name} that are read are not those that were written")
    size = store.bytes_by_location()
    least = sum(k.nbytes + v.nbytes for k, v, _ in held)
    least = least if archive.location != "disk" else 0  # rows of a file are shared
    require(size.get(archive.location, 0) >= least, 6, f"{size} is less than the {least} bytes that are held")
