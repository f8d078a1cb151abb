"""Part of the conformance kit: a layer that is fed from a random stream, and the invariants of what it then holds."""

import gc
import json
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from kvtiers.archive import ByteBudget
from kvtiers.blocks import Blocks, Context
from kvtiers.cache import TieredCache
from kvtiers.calls import mapped, ordered, present, require
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.masks import causal
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary
from kvtiers.rows import RowGroup

Do = Callable[[Callable[[], None]], None]


@attrs.define(eq=False, kw_only=True)
class Trial:
    """A cache of one layer, and the stream that feeds it: query, keys, values [batch, heads, tokens, width]."""

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
        g, heads, width = torch.Generator().manual_seed(seed), geometry.kv_heads, geometry.head_dim
        lead, tokens = geometry.batch, steps * geometry.tokens_per_step
        sizes = ((geometry.query_heads, width), (heads, width), (heads, geometry.value_dim))
        q, k, v = (torch.randn(lead, n, tokens, w, generator=g).to(geometry.dtype) for n, w in sizes)
        cache = TieredCache(policy, [geometry], rotaries=[rotary])
        return cls(policy=policy, geometry=geometry, rotary=rotary, query=q, keys=k, values=v, cache=cache)

    @property
    def layer(self) -> Layer:
        """The layer of the only group of rows."""
        return self.cache.every_layer()[0]

    @property
    def num_steps(self) -> int:
        return self.cache.num_steps

    def branch(self, cache: TieredCache | None = None) -> "Trial":
        """The same stream for another cache (None: an empty one)."""
        return attrs.evolve(self, cache=cache or TieredCache(self.policy, [self.geometry], rotaries=[self.rotary]))

    def fork(self) -> "Trial":
        """A fork of the cache, and the same stream."""
        return self.branch(self.cache.fork())

    def elsewhere(self) -> "Trial":
        """A fork that goes on with other tokens than the stream's."""
        other = self.fork()
        if not self.geometry.causal:
            other.commit()
        return attrs.evolve(other, query=self.query.flip(2), keys=self.keys.flip(2), values=self.values.flip(2))

    def select_rows(self, rows: Tensor) -> None:
        """Select rows of the cache, and of the stream."""
        self.cache.select_rows(rows)
        self.query, self.keys, self.values = self.query[rows], self.keys[rows], self.values[rows]
        self.geometry = attrs.evolve(self.geometry, batch=rows.numel())

    def loaded(self) -> "Trial":
        """What a file would bring back, and the same stream."""
        other, (held, about) = self.branch(), self.layer.dump()
        layer = other.cache.new_layer(0, self.geometry.batch)
        layer.fill({name: x.clone() for name, x in held.items()}, json.loads(json.dumps(about)))
        other.cache.layers[0].groups = (RowGroup(None, layer),)
        return other

    def feed(self, steps: int, do: Do = lambda verb: verb()) -> Context:
        """Write and select the next `steps` steps, each verb through `do`; returns the context.

        Of a video they are a block, written as a draft and then as it stays; the block before is committed first.
        """
        video, per_step = not self.geometry.causal, self.geometry.tokens_per_step
        if video:
            do(self.commit)
        now = slice(self.num_steps * per_step, (self.num_steps + steps) * per_step)
        final = tuple(x[:, :, now] for x in (self.query, self.keys, self.values))
        for q, k, v in ([tuple(x.flip(2) for x in final)] if video else []) + [final]:
            do(lambda k=k, v=v: self.cache.write(0, k, v, replace=video))  # type: ignore[misc]
            do(lambda q=q: self.cache.select(0, q))  # type: ignore[misc]
        return self.cache.context(0)

    def commit(self) -> None:
        """Make current steps history. Where the compressed form is given, some of a block's tokens stand in for it."""
        compressor, geometry = self.policy.compressor, self.geometry
        steps = self.num_steps - self.cache.committed_steps
        given = None
        if compressor.given and steps:
            first, tokens = self.cache.committed_steps, steps * geometry.tokens_per_step
            at = torch.linspace(0, tokens - 1, compressor.block_tokens(steps, geometry)).long()
            given = Blocks(
                keys=self.keys[:, :, None, first * geometry.tokens_per_step + at],
                values=self.values[:, :, None, first * geometry.tokens_per_step + at],
                offsets=geometry.positions(0, steps)[at][None, None, None],
                starts=torch.tensor([first]),
                span=steps,
            )
        self.cache.commit(compressed=[given])

    def compact(self, recent: int) -> None:
        """Age what is older than `recent` steps."""
        if not self.geometry.causal:
            self.commit()
        self.cache.compact(recent=recent)


def copied(context: Context) -> Context:
    """`context` with tensors of its own, which later writes do not change."""
    (keys, values, bias), where = mapped([context.keys, context.values, context.bias], Tensor.clone), context.locate()
    return attrs.evolve(context, keys=keys, values=values, bias=bias, locate=lambda: where)


def difference(a: Context, b: Context) -> str | None:
    """The first field in which two contexts differ bitwise, or None."""
    for name in ("current", "causal", "banded", "mask", "bias", "keys", "values", "origins", "placed"):
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape[-2:] == y.shape[-2:]:
            same = torch.equal(*(torch.broadcast_tensors(x, y) if name in ("origins", "placed") else (x, y)))
        else:
            same = x is y or (isinstance(x, int) and x == y)
        if not same:
            x, y = (tuple(z.shape) if isinstance(z, Tensor) and name != "mask" else z for z in (x, y))
            return f"{name} differ: {x} in one and {y} in the other"
    return None


# ---------------------------------------------------------------------- the invariants


def conservation(trial: Trial) -> None:
    """Invariant 1: every step is in exactly one tier, or dropped by a policy that says so."""
    layer, counts = trial.layer, trial.layer.tier_counts()
    whole = sum(counts.values()) == trial.num_steps and min(counts.values()) >= 0
    require(whole, 1, f"{counts} does not add up to {trial.num_steps} steps")
    if trial.policy.archives and layer.history.table.data is not None:
        blocks = layer.history.table.data[: layer.history.count, :2].tolist()
        ends = [layer.timeline.sink, *(start + span for start, span in blocks)]
        tiled = counts["dropped"] or [start for start, _ in blocks] == ends[:-1]
        whole = sum(span for _, span in blocks) == counts["mid"]
        require(bool(tiled) and whole, 1, f"archived are (first step, steps) {blocks}, and tiers count {counts}")


def contents(trial: Trial, context: Context) -> None:
    """Invariants 1 to 5: a context is sink, chosen mid, recent, current, in order; keys are rotated once.

    Mid tokens that a compressor or a codec made are held to their order alone: what they are, `Calls` looks at.
    """
    layer, policy, geometry, steps = trial.layer, trial.policy, trial.geometry, trial.num_steps
    shape, per_step, rotates = context.keys.shape[:3], geometry.tokens_per_step, policy.realigner.rotates
    origins, placed = (x.expand(*shape, -1) for x in (context.origins, context.placed))
    there = present(context.bias, shape)
    require(ordered(origins[..., 0], there), 5, f"origins are not in order: {origins[..., 0].tolist()}")
    require(ordered(placed[..., 0], there), 5, f"placed positions are not in order: {placed[..., 0].tolist()}")
    index = origins[..., 0]  # the number of each token in the stream
    for axis, size in enumerate(geometry.grid, 1):
        index = index * size + origins[..., axis]
    sink, at = min(layer.timeline.sink, steps), torch.arange(shape[2])
    first = sink if policy.in_place else min(max(layer.recent_start, sink), steps)
    outer = (at < sink * per_step) | (at >= shape[2] - (steps - first) * per_step)
    due = torch.cat([torch.arange(sink * per_step), torch.arange(first * per_step, steps * per_step)])
    number = 2 if policy.in_place else 3 if policy.compressor.drops else 1
    got = index[..., outer]
    same = got.shape[-1] == due.numel() and bool((got == due).all())
    require(same, number, f"sink and recent hold tokens {got.tolist()}, due are {due.tolist()}")
    as_fed = policy.compressor.keeps or policy.compressor.given
    as_fed = as_fed or not (policy.attend == "compressed" or policy.top_k_compressed or policy.compressor.rewrites)
    there = there & (at >= 0 if as_fed and policy.codec.exact else outer)
    numbers = index.long().clamp(0, steps * per_step - 1)[..., None]
    values, keys = (x.take_along_dim(numbers, 2) for x in (trial.values, trial.keys))
    same = torch.equal(context.values[there], values[there])
    require(same, number, "values are not those of the tokens at the origins")
    keys = trial.rotary.rotate(keys.double(), placed) if rotates else keys.double()
    blocks = steps // policy.block_size if layer.timeline.cuts is None else len(layer.timeline.cuts)
    moves = 1 if policy.realigner.sink_moves != "again" else 1 + blocks
    off = float((context.keys.double() - keys)[there].abs().max())
    limit = moves * (5e-2 if context.keys.dtype.itemsize == 2 else 1e-3) * rotates
    require(off <= limit, 4, f"keys are off by {off:.2g} from the stored keys, rotated once to their places")
    if geometry.causal and context.current > 1:
        now = torch.arange(steps - context.current, steps)
        seen = causal(context.current, shape[2], at.device) if context.mask is None else context.mask
        gone = [[layer.timeline.tier(int(o), int(s)) == "mid" for o in origins[0, 0, :, 0]] for s in now]
        past = causal(context.current, shape[2], at.device) & ~(torch.tensor(gone) & policy.compressor.drops)
        require(torch.equal(seen, past), 3, "a token sees others than what the policy leaves it")


def bounded(trial: Trial, context: Context) -> None:
    """Invariant 6: tokens and bytes stay within their bounds, and what is reported is what is held."""
    policy, geometry, tokens = trial.policy, trial.geometry, context.keys.shape[2]
    layer, most = trial.layer, policy.bound(geometry)
    limit = policy.bound_bytes(geometry, layer.history.count, steps=layer.num_steps)
    require(most is None or tokens <= most, 6, f"{tokens} tokens are attended, bound() says {most}")
    held, real = trial.cache.memory_usage(), storages(layer)
    told = {where: sum(one.bytes for one in held if one.location == where) for where in ("device", "host")}
    require(all(real[where] == told[where] for where in told), 6, f"{told} bytes are reported, and held are {real}")
    require(limit is None or told["device"] <= limit, 6, f"{told} bytes are held, bound_bytes() says {limit}")


def storages(*layers: Layer) -> dict[str, int]:
    """Bytes of the storages that can be reached from `layers`, by location, without asking their accounting; what they
    share is counted once."""
    found: dict[str, dict[int, int]] = {"device": {}, "host": {}, "disk": {}}
    for layer in layers:
        stores, seen = {id(store) for store in layer.history.stores.values()}, set()
        todo: list[tuple[Any, str]] = [(layer, "device")]
        while todo:
            value, where = todo.pop()
            other = isinstance(value, Policy | Geometry | Rotary | ByteBudget) or callable(value)
            if id(value) in seen or other:
                continue
            seen.add(id(value))
            where = layer.policy.archive.location if id(value) in stores else where
            if isinstance(value, Tensor):
                found[where].setdefault(value.untyped_storage().data_ptr(), value.untyped_storage().nbytes())
            else:
                todo += [(one, where) for one in gc.get_referents(value)]
    return {where: sum(sizes.values()) for where, sizes in found.items()}


def reading(trial: Trial, context: Context) -> None:
    """Invariant 7: reading again gives the same tensors."""
    said = difference(copied(context), trial.cache.context(0))
    require(said is None, 7, f"a second reading differs: {said}")


def selection(trial: Trial, scores: Tensor | None) -> None:
    """Invariant 8: attended are the blocks of the highest `scores`, per row and head; of equal ones the newer."""
    chosen = trial.layer.history.selection
    if scores is None or chosen is None:
        return
    wide = scores.expand(*chosen.chosen.shape[:2], -1)
    for row, head in ((row, head) for row in range(wide.shape[0]) for head in range(wide.shape[1])):
        own = wide[row, head].tolist()
        best = sorted(range(len(own)), key=lambda block: (own[block], block), reverse=True)
        for got, due in (
            (chosen.chosen[row, head], best[: chosen.chosen.shape[2]]),
            (chosen.compressed[row, head], best[chosen.chosen.shape[2] :][: chosen.compressed.shape[2]]),
        ):
            said = f"row {row}, head {head} attends blocks {got.tolist()} of scores {own}; due are {sorted(due)}"
            require(got.tolist() == sorted(due), 8, said)
