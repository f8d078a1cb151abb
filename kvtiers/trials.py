"""What the conformance kit is made of: a watch over a policy's methods, a layer that runs beside a stream of tokens,
and invariants. `kvtiers.testing` is what a plugin's author calls.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from kvtiers.archive import ByteBudget
from kvtiers.blocks import Blocks, Context
from kvtiers.cache import TieredCache
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.masks import causal
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary
from kvtiers.slots import Moment, Placement

INVARIANTS: Mapping[int, str] = {
    1: "conservation", 2: "identity", 3: "masked oracle", 4: "rotation", 5: "order and contiguity", 6: "bounded",
    7: "reading changes nothing", 8: "exact index", 9: "batch algebra", 10: "memory survives", 11: "atomic",
    12: "codec",
}  # fmt: skip
_METHODS = ("age", "rewrite", "digest", "score", "place", "encode")


def require(holds: bool, invariant: int, message: str) -> None:
    """Raise `AssertionError` naming the invariant unless it holds."""
    if not holds:
        raise AssertionError(f"invariant {invariant} ({INVARIANTS[invariant]}): {message}")


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree, but for a rounding."""
    most = (2e-2 if a.dtype.itemsize == 2 else 1e-4) * (1 + b.double().abs())
    return a.shape == b.shape and bool(((a == b) | ((a.double() - b.double()).abs() <= most)).all())


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor in it changed, and the device of a moment."""
    if isinstance(value, Tensor | torch.device):
        return change(value) if isinstance(value, Tensor) else change(torch.empty(0, device=value)).device
    if isinstance(value, Blocks | Moment | Placement):
        names = [field.name for field in attrs.fields(type(value))]
        return attrs.evolve(value, **{name: mapped(getattr(value, name), change) for name in names})
    if isinstance(value, Mapping):
        return {name: mapped(one, change) for name, one in value.items()}
    return [mapped(one, change) for one in value] if isinstance(value, list | tuple) else value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in `value`."""
    found: list[Tensor] = []
    mapped(value, lambda x: (found.append(x), x)[1])  # type: ignore[func-returns-value]
    return found


def ordered(time: Tensor, there: Tensor) -> bool:
    """Whether tokens are in order; those that are not there do not count."""
    return bool((time >= time.masked_fill(~there, -torch.inf).cummax(-1).values)[there].all())


def _present(bias: Tensor | None, shape: Any) -> Tensor:
    return torch.ones(shape, dtype=torch.bool) if bias is None else (bias > -torch.inf).expand(shape)


# ---------------------------------------------------------------------- what is due from a policy's methods


class Watch:
    """Holds the calls of a policy's methods to what is due, beyond the shapes that a layer looks at itself.

    rows: whether rows are independent. What takes further calls is looked at in the first few.
    """

    def __init__(self, rows: bool, declared: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.rows, self.declared = rows, declared
        self.digested: list[Tensor] = []
        self.calls: list[Any] = []
        self.alike: dict[int, Tensor] = {}
        self.tried: list[str] = []

    @contextmanager
    def over(self, policy: Policy) -> Iterator[None]:
        """Watch the slots of `policy`."""
        with ExitStack() as stack:
            for slot in (policy.compressor, policy.retriever, policy.realigner, policy.codec):
                for method in _METHODS:
                    if (original := getattr(type(slot), method, None)) is not None:
                        stack.enter_context(patch.object(type(slot), method, self._held(original, method)))
            yield

    def _held(self, original: Any, method: str) -> Any:
        def call(slot: Any, *args: Any, **named: Any) -> Any:
            before = tensors(mapped([args, named], Tensor.clone))
            made = original(slot, *args, **named)
            same = all(map(torch.equal, before, tensors([args, named])))
            who = f"{type(slot).__name__}.{method}()"
            require(same, 7, f"{who} changed what it was given in place; make new tensors")
            self.calls.append((original, slot, method, who, mapped([args, named], Tensor.clone), made))
            if method in ("place", "encode"):
                self.check()
            return made

        return call

    def check(self) -> None:
        """Hold the calls so far to what is due."""
        while self.calls:
            original, slot, method, who, (args, named), made = self.calls.pop(0)
            getattr(self, f"_{method}")(slot, who, made, *args, **named)
            like = f"{method} of {'several' if getattr(args[0] if args else None, 'count', 1) != 1 else 'one'}"
            self.tried.append(like)
            if self.tried.count(like) < 3:
                if method != "place":
                    self._alone(partial(original, slot), who, method, made, args)
                self._elsewhere(original, slot, who, args, named)

    def _age(self, slot: Any, who: str, made: Any, blocks: Blocks, moment: Moment) -> None:
        if made is not None:
            time, end = made.offsets[..., 0].expand(made.keys.shape[:4]), int(blocks.starts[-1]) + blocks.span
            there = _present(made.bias, time.shape)
            finite = all(bool(x[there].isfinite().all()) for x in (made.keys, made.values))
            require(finite, 1, f"{who} gave keys or values that are not finite")
            inside = bool(((time >= 0) & (time < made.span))[there].all()) and ordered(time, there)
            said = f"{who} gave offsets that are not in order within a span of {made.span}: {time.tolist()}"
            require(inside, 5, said)
            late = int(made.starts.max()) + made.span > end
            require(not late, 5, f"{who} gave blocks that span steps from {end} on, which are recent")
            if made.alike and not slot.rewrites:
                same = torch.equal(self.alike.setdefault(made.span, made.offsets), made.offsets)
                said = f"{who} leaves other offsets in other blocks: set offsets_differ=True"
                require(same, 1, said)

    def _rewrite(self, slot: Any, who: str, made: Any, leaving: Blocks, mid: Blocks | None, moment: Moment) -> None:
        self._age(slot, who, made, leaving, moment)

    def _digest(self, slot: Any, who: str, made: Tensor, blocks: Blocks, moment: Moment) -> None:
        got, most = made[0, 0, 0].nbytes, slot.digest_bytes(blocks.tokens, moment.geometry)
        require(got <= most, 6, f"{who} made {got} bytes for a block and KV head, digest_bytes() says {most}")
        self.digested.append(blocks.keys if blocks.rotated is None else blocks.rotated)

    def _score(self, slot: Any, who: str, made: Tensor, query: Any, digests: Any, archived: int, _: Moment) -> None:
        require(not bool(made.isnan().any()), 8, f"{who} gave a score that is not a number")
        if self.declared is not None and len({x.shape[3] for x in self.digested}) == 1:
            due = self.declared(query, torch.cat(self.digested, 2)).expand_as(made)
            off = float((made.double() - due.double()).abs().max())
            require(close(made, due), 8, f"scores differ from the declared ones by up to {off:.2g}")

    def _place(self, slot: Any, who: str, made: Placement, **given: Any) -> None:
        firsts, starts, spans = made.mid_starts, given["starts"], given["spans"]
        said = f"{who} gave mid_starts {[*firsts.shape]} in {firsts.dtype}; due is {[*starts.shape]}, floating"
        require(firsts.shape == starts.shape and firsts.is_floating_point(), 5, said)
        moves = slot.sink_moves == "never" and made.sink_shift != 0
        require(not moves, 4, f"{who} moves the sink by {made.sink_shift} steps, but its sink_moves says 'never'")
        follow = torch.equal(firsts, ((made.mid_from or 0) + spans.cumsum(-1) - spans).to(firsts.dtype))
        said = f"{who} says mid_from = {made.mid_from}, but mid blocks begin at {firsts.tolist()}"
        require(made.mid_from is None or follow, 5, said)
        stays = made.sink_shift == made.recent_shift == 0 and torch.equal(firsts, starts.to(firsts.dtype))
        require(slot.rotates or stays, 4, f"{type(slot).__name__} does not rotate, but places blocks elsewhere")
        ends = pad(firsts + spans, (1, 0), value=given["sink"] + made.sink_shift)
        gaps = pad(firsts, (0, 1), value=given["recent"] + made.recent_shift) - ends
        require(bool((gaps >= 0).all()), 5, f"{who}: blocks overlap or change order, gaps are {gaps.tolist()}")

    def _encode(self, slot: Any, who: str, made: Mapping[str, Tensor], keys: Tensor, values: Tensor) -> None:
        for name, x in made.items():
            due = f"{who} made {name!r} {[*x.shape]}; due is {[*keys.shape[:3]]} (batch, kv_heads, blocks) and more"
            require(x.shape[:3] == keys.shape[:3], 12, due)
        (batch, heads, count, tokens, width), value_dim = keys.shape, values.shape[4]
        shape = Geometry(kv_heads=heads, head_dim=width, value_dim=value_dim, batch=batch, dtype=keys.dtype)
        got, declared = sum(x.nbytes for x in made.values()), slot.block_bytes(tokens, shape) * count
        require(got == declared, 12, f"{who} made {got} bytes of {count} blocks, block_bytes() says {declared}")
        back = slot.decode(made, keys.dtype)
        for x, y, most in zip((keys, values), back, slot.tolerance(keys, values), strict=True):
            said = f"{type(slot).__name__}.decode() gave {[*y.shape]} in {y.dtype}; due is {[*x.shape]} in {x.dtype}"
            require(y.shape == x.shape and y.dtype == x.dtype, 12, said)
            rounding = 0 if slot.exact else x.double().abs() * torch.finfo(x.dtype).eps
            off = float(((y.double() - x.double()).abs() - most.double() - rounding).max())
            require(off <= 0, 12, f"what {type(slot).__name__} reads back is off by {off:.2g} more than it declares")

    def _alone(self, call: Callable[..., Any], who: str, method: str, made: Any, args: Any) -> None:
        """The same is made when asked again, of every row alone and of every block alone."""

        def row(value: Any) -> Any:
            if isinstance(value, Moment):
                value = attrs.evolve(value, geometry=attrs.evolve(value.geometry, batch=1))
            return mapped(value, lambda x: x[n : n + 1] if x.dim() > 2 and x.shape[0] > 1 else x)

        def block(value: Any) -> Any:
            if isinstance(value, Moment):
                return value
            at = slice(n, n + 1)
            return mapped(value, lambda x: x[at] if x.dim() == 1 else x[:, :, at] if x.shape[2] > 1 else x)

        def same(a: Any, b: Any, number: int, said: str) -> None:
            agree = (a is None) == (b is None) and all(map(close, tensors(a), tensors(b)))
            require(agree, number, f"{who} makes something else {said}")

        number = {"digest": 8, "score": 8, "encode": 12}.get(method, 1)
        same(call(*args), made, number, "of the same when asked again")
        for n in range(max((x.shape[0] for x in tensors(args) if x.dim() > 3), default=1) if self.rows else 0):
            same(call(*map(row, args)), row(made), 9 if number == 1 else number, f"of row {n} alone than beside others")
        for n in range(0 if method in ("rewrite", "score") else max(x.shape[2] for x in tensors(args) if x.dim() > 4)):
            same(call(*map(block, args)), block(made), number, f"of block {n} alone than in a run")

    def _elsewhere(self, original: Any, slot: Any, who: str, args: Any, named: Any) -> None:
        """What is made of tensors on another device is there too; on `meta` they have no values to look at."""
        args, named = (mapped(x, lambda x: x.to("meta")) for x in (args, named))
        advice = "make them on moment.device, or like an input"
        try:
            with _OneDevice():
                made = tensors(original(slot, *args, **named))
        except (RuntimeError, TypeError) as error:  # what must look at values is let off
            mixes = "device" in str(error) and "numpy" not in str(error)
            said = f"{who} makes tensors on the CPU where its input is on another device; {advice}"
            require(not mixes, 6, said)
        else:
            strays = [x for x in made if not x.is_meta]
            require(not strays, 6, f"{who} gave a tensor on the CPU where its input is on another device; {advice}")


class _OneDevice(TorchFunctionMode):
    """Refuses to bring tensors of two devices together, which some operations on `meta` let pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        together = len({x.device for x in tensors([args, kwargs or {}]) if x.dim()}) < 2
        if not together and func.__name__ not in ("__getitem__", "to", "copy_"):
            raise RuntimeError(f"{func.__name__}() was given tensors on more than one device")
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------- a layer that knows what it must hold


@attrs.define(eq=False, kw_only=True)
class Trial:
    """One layer under a policy, fed from a random stream: query, keys and values [batch, heads, tokens, width]."""

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
        sizes = ((geometry.query_heads, width), (heads, width), (heads, geometry.value_dim))
        q, k, v = (torch.randn(geometry.batch, n, steps, w, generator=g).to(geometry.dtype) for n, w in sizes)
        cache = TieredCache(policy, [geometry], rotaries=[rotary])
        return cls(policy=policy, geometry=geometry, rotary=rotary, query=q, keys=k, values=v, cache=cache)

    @property
    def layer(self) -> Layer:
        """The layer of the only group of rows."""
        return self.cache.every_layer()[0]

    @property
    def num_steps(self) -> int:
        return self.cache.num_steps

    def feed(self, steps: int, do: Callable[[Callable[[], None]], None] = lambda verb: verb()) -> Context:
        """Write and select the next `steps` steps, each verb through `do`; returns the context."""
        now = slice(self.num_steps, self.num_steps + steps)
        do(lambda: self.cache.write(0, self.keys[:, :, now], self.values[:, :, now]))
        do(lambda: self.cache.select(0, self.query[:, :, now]))
        return self.cache.context(0)

    def branch(self, cache: TieredCache) -> "Trial":
        """The same stream for another cache."""
        return attrs.evolve(self, cache=cache)

    def select_rows(self, rows: Tensor) -> None:
        """Select rows of the cache, and of the stream."""
        self.cache.select_rows(rows)
        self.query, self.keys, self.values = self.query[rows], self.keys[rows], self.values[rows]
        self.geometry = attrs.evolve(self.geometry, batch=rows.numel())


def copied(context: Context) -> Context:
    """`context` with tensors of its own, which later writes do not change."""
    own, where = mapped([context.keys, context.values, context.bias], Tensor.clone), context.locate()
    return attrs.evolve(context, keys=own[0], values=own[1], bias=own[2], locate=lambda: where)


def difference(a: Context, b: Context) -> str | None:
    """The first field in which two contexts differ bitwise, or none."""
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

    Mid tokens that a compressor or a codec made are held to their order alone: what they are, `Watch` looks at.
    """
    layer, policy, steps = trial.layer, trial.policy, trial.num_steps
    shape, at, rotates = context.keys.shape[:3], torch.arange(context.keys.shape[2]), policy.realigner.rotates
    origins, placed = (x[..., 0].expand(shape) for x in (context.origins, context.placed))
    there = _present(context.bias, shape)
    require(ordered(origins, there), 5, f"origins are not in order: {origins.tolist()}")
    require(ordered(placed, there), 5, f"placed positions are not in order: {placed.tolist()}")
    sink = min(layer.timeline.sink, steps)
    first = sink if policy.in_place else min(max(layer.recent_start, sink), steps)
    outer = (at < sink) | (at >= shape[2] - (steps - first))
    due = torch.cat([torch.arange(sink), torch.arange(first, steps)]).to(origins.dtype)
    number = 2 if policy.in_place else 3 if policy.compressor.drops else 1
    got = origins[..., outer]
    same = got.shape[-1] == due.numel() and bool((got == due).all())
    require(same, number, f"sink and recent hold steps {got.tolist()}, due are {due.tolist()}")
    full = policy.compressor.keeps or (policy.attend == "full" and not policy.top_k_compressed)
    there = there & (outer if policy.compressor.rewrites or not full or not policy.codec.exact else at >= 0)
    index = origins.long().clamp(0, steps - 1)[..., None]
    values, keys = (x.take_along_dim(index, 2) for x in (trial.values, trial.keys))
    same = torch.equal(context.values[there], values[there])
    require(same, number, "values are not those of the tokens at the origins")
    keys = trial.rotary.rotate(keys.double(), placed[..., None]) if rotates else keys.double()
    moves = 1 if policy.realigner.sink_moves != "again" else 1 + steps // policy.block_size
    off = float((context.keys.double() - keys)[there].abs().max())
    limit = moves * (5e-2 if context.keys.dtype.itemsize == 2 else 1e-3) * rotates
    require(off <= limit, 4, f"keys are off by {off:.2g} from the stored keys, rotated once to their places")
    if context.current > 1:
        now = torch.arange(steps - context.current, steps)
        seen = causal(context.current, shape[2], at.device) if context.mask is None else context.mask
        gone = [[layer.timeline.tier(int(o), int(s)) == "mid" for o in origins[0, 0]] for s in now]
        due = causal(context.current, shape[2], at.device) & ~(torch.tensor(gone) & policy.compressor.drops)
        require(torch.equal(seen, due), 3, "a token sees others than what the policy leaves it")


def bounded(trial: Trial, context: Context) -> None:
    """Invariant 6: tokens and bytes stay within their bounds, and what is reported is what is held."""
    policy, geometry, tokens = trial.policy, trial.geometry, context.keys.shape[2]
    most, limit = policy.bound(geometry), policy.bound_bytes(geometry, trial.layer.history.count)
    require(most is None or tokens <= most, 6, f"{tokens} tokens are attended, bound() says {most}")
    held, real = trial.cache.memory_usage(), storages(trial.layer)
    told = {where: sum(one.bytes for one in held if one.location == where) for where in ("device", "host")}
    more = context.bias is not None or trial.layer.timeline.origin is not None  # what biases take is in no bound yet
    require(more or limit is None or told["device"] <= limit, 6, f"{told} bytes are held, bound_bytes() says {limit}")
    require(all(real[where] == told[where] for where in told), 6, f"{told} bytes are reported, and held are {real}")


def storages(layer: Layer) -> dict[str, int]:
    """Bytes of the storages that can be reached from `layer`, by location, without asking its accounting."""
    return storages_of([layer])


def storages_of(layers: Iterable[Layer]) -> dict[str, int]:
    """`storages` of several layers together; what they share is counted once."""
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


def tiling(trial: Trial, context: Context) -> None:
    """Invariant 5, for a realigner that closes up: tiers and blocks of one size touch and do not overlap."""
    window, mid, placed = (
        trial.layer.window,
        trial.layer.placed.mid,
        context.placed[..., 0].expand(context.keys.shape[:3]),
    )
    starts = [] if mid is None else list(mid.placed.double().expand(*placed.shape[:2], -1).unbind(-1))
    edges = [placed[..., window.sink - 1] + 1] if window.sink else []
    ends = [*edges, *(start + trial.policy.block_size for start in starts)]
    begins = [*starts, *([placed[..., -window.recent]] if window.recent else [])]
    for end, begin in zip(ends, begins[len(begins) - len(ends) :] if edges else begins[1:], strict=False):
        require(bool(((begin - end).abs() < 1e-6).all()), 5, f"blocks leave a gap or overlap: {end} then {begin}")
