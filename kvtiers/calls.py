"""Part of the conformance kit: it checks every call of a policy's methods more closely than a layer does.

A layer refuses wrong shapes, dtypes and devices. The kit also looks at values, order and declared sizes. It makes each
call again: with the same input, with one row of it, with one block of it, and on another device.
"""

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

from kvtiers.blocks import Blocks
from kvtiers.errors import KVTiersError
from kvtiers.geometry import Geometry
from kvtiers.slots import Moment, Placement

INVARIANTS: Mapping[int, str] = {
    1: "conservation", 2: "identity", 3: "masked oracle", 4: "rotation", 5: "order and contiguity", 6: "bounded",
    7: "reading changes nothing", 8: "exact index", 9: "batch algebra", 10: "memory survives", 11: "atomic",
    12: "codec",
}  # fmt: skip
METHODS = {"age": 1, "rewrite": 1, "digest": 8, "score": 8, "place": 5, "encode": 12, "decode": 12}
"""What a policy may get wrong, and the invariant that is broken by giving something else for the same input."""


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


def present(bias: Tensor | None, shape: Any) -> Tensor:
    """Which tokens are there at all, by their bias."""
    return torch.ones(shape, dtype=torch.bool) if bias is None else (bias > -torch.inf).expand(shape)


def ordered(time: Tensor, there: Tensor) -> bool:
    """Whether tokens are in order; those that are not there do not count."""
    return bool((time >= time.masked_fill(~there, -torch.inf).cummax(-1).values)[there].all())


@contextmanager
def wrapped(slots: Iterable[Any], wrap: Callable[[Any, str], Any], more: Iterable[str] = ()) -> Iterator[None]:
    """The methods of these policies (and `more`), each replaced by what `wrap` makes of it and its name."""
    with ExitStack() as stack:
        for kind, method in ((type(slot), method) for slot in slots for method in (*METHODS, *more)):
            if (original := getattr(kind, method, None)) is not None:
                stack.enter_context(patch.object(kind, method, wrap(original, method)))
        yield


@contextmanager
def compressing(compressor: Any, *, often: bool) -> Iterator[None]:
    """Raise `AssertionError` if all calls of `age` or `rewrite` together show that something is wrong.

    Either every call returned None, though the compressor does not say that it drops; or every call returned what it
    was given, so that little was checked. often: whether with so many calls one should have changed something.
    """
    forgot: list[bool] = []
    changed: list[bool] = []

    def noted(original: Any, method: str) -> Any:
        def call(slot: Any, blocks: Blocks, *args: Any, **named: Any) -> Any:
            made = original(slot, blocks, *args, **named)
            forgot.append(made is None)
            changed.append(not isinstance(made, Blocks) or made.keys.dim() != 5 or _changed(made, blocks, *args))
            return made

        return call if method in ("age", "rewrite") else original

    with wrapped([compressor], noted):
        yield
    who = f"{type(compressor).__name__}.{'rewrite' if compressor.rewrites else 'age'}()"
    silent = bool(forgot) and all(forgot) and not compressor.drops
    advice = "return what they become, or say drops = True"
    require(not silent, 1, f"{who} returned None at every call, which drops the blocks; {advice}")
    idle = often and bool(changed) and not any(changed) and not (compressor.keeps or compressor.given)
    advice = f"check it with settings that keep few tokens, as in lambda: {type(compressor).__name__}(...)"
    advice += "" if compressor.rewrites else ", or say keeps = True"
    require(not idle, 1, f"{who} kept every token at every call, so little was checked; {advice}")


def _changed(made: Blocks, blocks: Blocks, mid: Any = None, *_: Any) -> bool:
    """Whether something was left out, hidden or changed of the blocks that a compressor was given."""
    given = [part for part in (mid, blocks) if isinstance(part, Blocks)]
    if made.count * made.tokens < sum(part.count * part.tokens for part in given):
        return True
    before = (torch.cat([getattr(part, name).flatten(2, 3) for part in given], 2) for name in ("keys", "values"))
    after = (part.flatten(2, 3) for part in (made.keys, made.values))
    hidden = made.bias is not None and bool((made.bias == -torch.inf).any())
    return hidden or not all(map(torch.equal, before, after))


class Calls:
    """The calls of a policy's methods. rows: whether rows are independent. declared: see `testing.check_retriever`."""

    def __init__(self, rows: bool, declared: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.rows, self.declared = rows, declared
        self.scores: Tensor | None = None
        """What `score` gave last."""
        self._calls: list[Any] = []
        self._tried: list[str] = []
        self._digested: list[Tensor] = []
        self._alike: dict[int, Tensor] = {}

    def taken_down(self, original: Any, method: str) -> Any:
        """The same method, except that it must not write into its input, and that `check` looks at the call later."""

        def called(slot: Any, *args: Any, **named: Any) -> Any:
            before, who = mapped([args, named], Tensor.clone), f"{type(slot).__name__}.{method}()"
            made = _made(partial(original, slot), who, args, named)
            same = all(map(torch.equal, tensors(before), tensors([args, named])))
            require(same, 7, f"{who} changed what it was given in place; make new tensors")
            self._calls.append((slot, partial(original, slot), method, who, *before, mapped(made, Tensor.clone)))
            return made

        return called

    def check(self) -> None:
        """Hold the calls so far to what is due; the first few are made again as well."""
        while self._calls:
            slot, call, method, who, args, named, made = self._calls.pop(0)
            if method != "decode":  # what is read back is held to the tolerance where it was written
                getattr(self, f"_{method}")(slot, who, made, *args, **named)
            like = f"{method} of {'several' if getattr(args[0] if args else None, 'count', 1) != 1 else 'one'}"
            self._tried.append(like)
            if self._tried.count(like) < 3:
                self._again(call, who, method, made, args, named)

    def _age(self, slot: Any, who: str, made: Any, blocks: Blocks, *_: Any) -> None:
        if made is None:
            return
        time, end = made.offsets[..., 0].expand(made.keys.shape[:4]), int(blocks.starts[-1]) + blocks.span
        there = present(made.bias, time.shape)
        finite = all(bool(x[there].isfinite().all()) for x in (made.keys, made.values))
        require(finite, 1, f"{who} gave keys or values that are not finite")
        inside = bool(((time >= 0) & (time < made.span))[there].all()) and ordered(time, there)
        said = f"{who} gave offsets that are not in order within a span of {made.span}: {time.tolist()}"
        require(inside, 5, said)
        late = int(made.starts.max()) + made.span > end
        require(not late, 5, f"{who} gave blocks that span steps from {end} on, which are recent")
        if made.alike and not slot.rewrites:
            same = torch.equal(self._alike.setdefault(made.span, made.offsets), made.offsets)
            require(same, 1, f"{who} leaves other offsets in other blocks: set offsets_differ=True")

    _rewrite = _age

    def _digest(self, slot: Any, who: str, made: Tensor, blocks: Blocks, moment: Moment) -> None:
        self._digested.append(blocks.keys if blocks.rotated is None else blocks.rotated)

    def _score(self, slot: Any, who: str, made: Tensor, query: Any, digests: Any, archived: int, _: Moment) -> None:
        require(not bool(made.isnan().any()), 8, f"{who} gave a score that is not a number")
        self.scores = made
        if self.declared is not None and len({x.shape[3] for x in self._digested}) == 1:
            due = self.declared(query, torch.cat(self._digested, 2)).expand_as(made)
            off = float((made.double() - due.double()).abs().max())
            require(close(made, due), 8, f"scores differ from the declared ones by up to {off:.2g}")

    def _place(self, slot: Any, who: str, made: Placement, **given: Any) -> None:
        firsts, spans = made.mid_starts, given["spans"]
        moves = slot.sink_moves == "never" and made.sink_shift != 0
        require(not moves, 4, f"{who} moves the sink by {made.sink_shift} steps, but its sink_moves says 'never'")
        follow = torch.equal(firsts, ((made.mid_from or 0) + spans.cumsum(-1) - spans).to(firsts.dtype))
        said = f"{who} says mid_from = {made.mid_from}, but mid blocks begin at {firsts.tolist()}"
        require(made.mid_from is None or follow, 5, said)
        ends = pad(firsts + spans, (1, 0), value=given["sink"] + made.sink_shift)
        gaps = pad(firsts, (0, 1), value=given["recent"] + made.recent_shift) - ends
        require(bool((gaps >= 0).all()), 5, f"{who}: blocks overlap or change order, gaps are {gaps.tolist()}")

    def _encode(self, slot: Any, who: str, made: Mapping[str, Tensor], keys: Tensor, values: Tensor) -> None:
        (batch, heads, count, tokens, width), value_dim = keys.shape, values.shape[4]
        shape = Geometry(kv_heads=heads, head_dim=width, value_dim=value_dim, batch=batch, dtype=keys.dtype)
        got, declared = sum(x.nbytes for x in made.values()), slot.block_bytes(tokens, shape) * count
        require(got == declared, 12, f"{who} made {got} bytes of {count} blocks, block_bytes() says {declared}")
        back = slot.decode(made, keys.dtype)
        if not isinstance(back, tuple) or len(back) != 2:  # which the layer tells when it reads
            return
        for x, y, most in zip((keys, values), back, slot.tolerance(keys, values), strict=True):
            rounding = 0 if slot.exact else x.double().abs() * torch.finfo(x.dtype).eps
            off = float(((y.double() - x.double()).abs() - most.double() - rounding).max())
            require(off <= 0, 12, f"what {type(slot).__name__} reads back is off by {off:.2g} more than it declares")

    def _again(self, call: Callable[..., Any], who: str, method: str, made: Any, args: Any, named: Any) -> None:
        """The same is made when asked again, of every row and every block alone, and on another device."""
        rows = max((x.shape[0] for x in tensors(args) if x.dim() > 2), default=1) if self.rows else 0
        blocks = max((x.shape[2] for x in tensors(args[:1]) if x.dim() > 2), default=1)
        ways, number = [("of the same when asked again", 0, -1)], METHODS[method]
        if method != "place":
            ways += [(f"of row {n} alone than beside others", 0, n) for n in range(rows)]
        if method in ("age", "digest", "encode", "decode"):
            ways += [(f"of block {n} alone than in a run", 2, n) for n in range(blocks)]
        for said, axis, n in ways:
            got = _made(call, who, _part(args, axis, n), named)
            due = _part(made, axis, n)
            agree = (got is None) == (due is None) and all(map(close, tensors(got), tensors(due)))
            broken = 9 if number == 1 and axis == 0 <= n else number
            require(agree, broken, f"{who} makes something else {said}")
        _elsewhere(call, who, args, named)


def _part(value: Any, axis: int, n: int) -> Any:
    """Row (axis 0) or block (axis 2) `n` of every tensor; what all rows or blocks share stays; -1: everything."""
    if n < 0 or (isinstance(value, Moment) and axis):
        return value
    if isinstance(value, list | tuple):
        return [_part(one, axis, n) for one in value]
    if isinstance(value, Moment):
        value = attrs.evolve(value, geometry=attrs.evolve(value.geometry, batch=1))

    def cut(x: Tensor) -> Tensor:
        if x.dim() == 1 and axis:  # the first steps of blocks
            return x[n : n + 1]
        return x.narrow(axis, n, 1) if x.dim() > 2 and x.shape[axis] > 1 else x

    return mapped(value, cut)


def _made(call: Callable[..., Any], who: str, args: Any, named: Any) -> Any:
    """What a method makes. What torch or Python says of a mistake becomes what the method did, with which input."""
    try:
        return call(*args, **named)
    except Exception as error:
        if isinstance(error, KVTiersError | AssertionError):
            raise
        inputs = ", ".join(f"{[*x.shape]} {x.dtype}".replace("torch.", "") for x in tensors([args, named])[:3])
        raise AssertionError(f"{who} raised {type(error).__name__}: {error}; it was given {inputs}, ...") from error


def _elsewhere(call: Callable[..., Any], who: str, args: Any, named: Any) -> None:
    """What is made of tensors on another device is there too; on `meta` they have no values to look at."""
    args, named = (mapped(x, lambda x: x.to("meta")) for x in (args, named))
    advice = "make them on moment.device, or like an input"
    try:
        with _OneDevice():
            made = tensors(call(*args, **named))
    except (RuntimeError, TypeError) as error:  # what must look at values is let off
        mixes = "device" in str(error) and "numpy" not in str(error)
        require(not mixes, 6, f"{who} makes tensors on the CPU where its input is on another device; {advice}")
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
