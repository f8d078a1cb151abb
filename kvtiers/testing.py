"""The conformance kit: one call from one test checks a policy against the invariants that every policy must keep.

    from kvtiers.testing import check_compressor

    def test_my_compressor_keeps_the_invariants():
        check_compressor(lambda: MyCompressor(ratio=4))

Every check runs small layers that Hypothesis draws, in several dtypes, with the choice under test in one slot and any
that comes with kvtiers in the others; every call of its methods is watched (`kvtiers.trials`). A broken invariant
raises `AssertionError` with its number and name, and what the method did: "invariant 1 (conservation): ...".

Importing this module needs Hypothesis; nothing else of kvtiers imports it.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import attrs
import torch
from torch import Tensor

from kvtiers.archive import Archive, ByteBudget, Codec
from kvtiers.blocks import Extent
from kvtiers.cache import TieredCache
from kvtiers.errors import (
    ArchiveFullError,
    CropError,
    GeometryError,
    InterruptedForwardError,
    MissingExtraError,
    PolicyError,
    SavedCacheError,
    SelectionError,
    SlotError,
)  # fmt: skip
from kvtiers.geometry import Geometry
from kvtiers.plugins import registry
from kvtiers.policy import SLOTS, Policy
from kvtiers.presets import build, describe
from kvtiers.rotary import Rotary
from kvtiers.rows import RowGroup
from kvtiers.slots import Compressor, Realigner, Retriever, Sink
from kvtiers.trials import (
    INVARIANTS,
    Trial,
    Watch,
    bounded,
    close,
    conservation,
    contents,
    copied,
    difference,
    reading,
    require,
    storages,
    storages_of,
    tiling,
)  # fmt: skip

try:
    from hypothesis import HealthCheck, given, reject, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise MissingExtraError(
        "kvtiers.testing draws its examples with Hypothesis, which is not installed; "
        "run pip install hypothesis, or pip install 'kvtiers[dev]'"
    ) from error

__all__ = [
    "INVARIANTS", "Trial", "bounded", "check_archive", "check_codec", "check_compressor", "check_policy",
    "check_realigner", "check_retriever", "check_sink", "conservation", "contents", "copied", "difference", "reading",
    "require", "storages", "storages_of", "tiling",
]  # fmt: skip
Declared = Callable[[Tensor, Tensor], Tensor]


@attrs.frozen(kw_only=True)
class _Example:
    """A trial, the forwards that it is fed, and what happens after the first `split` of them."""

    trial: Trial
    lengths: list[int]
    split: int
    back: int
    compact: int | None
    rows: list[int]
    fault: int

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        then = f"after {self.split} compact(recent={self.compact}), rows {self.rows}, back {self.back}"
        printer.text(f"{self.trial.policy}, {self.trial.geometry}, forwards {self.lengths}, {then}, {self.fault}")

    def fed(self, trial: Trial) -> Trial:
        """`trial` after the first forwards, compacted if need be."""
        for steps in self.lengths[: self.split]:
            trial.feed(steps)
        if self.compact is not None:
            trial.cache.compact(recent=self.compact)
        return trial


@st.composite
def _examples(draw: Callable[..., Any], policies: st.SearchStrategy[Policy]) -> _Example:
    """A small layer under one of `policies`, in sizes at which blocks move within few tokens."""

    def number(least: int, most: int) -> int:
        return int(draw(st.integers(least, most)))

    chosen, heads = draw(policies), number(1, 2)
    geometry = Geometry(
        kv_heads=heads,
        query_heads=heads * number(1, 2),
        head_dim=16,
        value_dim=draw(st.sampled_from([16, 24])),
        batch=number(1, 2),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
    )
    chunk = number(1, 6)
    policy = attrs.evolve(
        chosen,
        sink=min(chosen.sink, number(0, 3)),
        recent=None if chosen.recent is None else number(0, 4),
        block_size=min(chosen.block_size, number(1, 4)),
        chunk_size=None if chosen.chunk_size is None else chunk,
        top_k=min(chosen.top_k, number(1, 3)),
        budget=None,
    )
    lengths = draw(st.lists(st.integers(1, chunk), min_size=4, max_size=10))
    layout: Any = draw(st.sampled_from(["half", "interleaved"]))
    rotary = Rotary([torch.tensor([1.0, 0.1, 0.01])], layout=layout, angle_dtype=torch.float64)
    trial = Trial.start(policy, geometry, rotary, seed=number(0, 9_999), steps=sum(lengths) + 2)
    return _Example(
        trial=trial,
        lengths=lengths,
        split=number(1, len(lengths) - 1),
        back=number(0, 2),
        compact=draw(st.none() | st.integers(0, 3)),
        rows=draw(st.lists(st.integers(0, geometry.batch - 1), min_size=1, max_size=3)),
        fault=number(0, 40),
    )


def _for_all(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    quiet = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None,
                     report_multiple_bugs=False)  # fmt: skip
    quiet(given(strategy)(check))()


def check_policy(policy: Policy, *, examples: int = 25, rows_independent: bool = True) -> None:
    """Check a whole policy against every invariant. Sizes are scaled down; slots stay as they are.

    rows_independent: false if the policy says that rows of a batch decide together.
    """
    _check_all(st.just(policy), examples, rows_independent)


def _check_all(policies: st.SearchStrategy[Policy], examples: int, rows: bool = True, declared: Any = None) -> None:
    def check(example: _Example) -> None:
        _check_running(example, rows, declared)
        try:
            _check_memory(example, rows)
        except (SavedCacheError, GeometryError, SelectionError) as error:
            raise AssertionError(f"invariant 10 ({INVARIANTS[10]}): {error}") from error
        _check_atomic(example)

    _for_all(examples, _examples(policies), check)


def _check_running(example: _Example, rows: bool, declared: Declared | None) -> None:
    """Invariants 1 to 8, and 12, at every step."""
    trial, watch = _fresh(example.trial), Watch(rows, declared)
    with watch.over(trial.policy):
        for number, steps in enumerate(example.lengths):
            try:
                context = trial.feed(steps)
                watch.check()
                conservation(trial)
                for holds in (contents, bounded, reading):
                    holds(trial, context)
                if number + 1 == example.split and example.compact is not None:
                    trial.cache.compact(recent=example.compact)
                    conservation(trial)
            except (SlotError, GeometryError) as error:  # the layer has looked at what a method gave
                raise AssertionError(f"invariant 6 ({INVARIANTS[6]}): {error}") from error


def _fresh(trial: Trial) -> Trial:
    return trial.branch(TieredCache(trial.policy, [trial.geometry], rotaries=[trial.rotary]))


def _check_memory(example: _Example, rows: bool) -> None:
    """Invariants 9 and 10: saved, forked, rolled back, and with other rows, a cache goes on as it would have."""
    trial = example.fed(_fresh(example.trial))
    ways = {"forked": trial.branch(trial.cache.fork()), "rolled back": trial.branch(trial.cache.fork())}
    for _ in range(example.back):
        ways["rolled back"].feed(1)
    try:
        ways["rolled back"].cache.crop_by(example.back)
    except CropError:
        del ways["rolled back"]
    ways["loaded"] = trial.branch(_loaded(trial))
    index, alone = torch.tensor(example.rows), {}
    if rows and trial.geometry.dtype == torch.float32:  # others round, and scores that tie round otherwise
        names = ("query", "keys", "values")
        geometry = attrs.evolve(trial.geometry, batch=index.numel())
        few = attrs.evolve(trial, geometry=geometry, **{name: getattr(trial, name)[index] for name in names})
        alone = {"fed by themselves": example.fed(_fresh(few))}
        alone["selected"] = example.fed(_fresh(example.trial))
        alone["selected"].select_rows(index)
    for steps in example.lengths[example.split :]:
        context = copied(trial.feed(steps))
        for way, other in ways.items():
            said = difference(context, other.feed(steps))
            require(said is None, 10, f"a {way} cache goes on otherwise: {said}")
        for way, other in alone.items():
            got = other.feed(steps)
            same = close(got.keys, context.keys[index]) and close(got.values, context.values[index])
            require(same, 9, f"rows {example.rows}, {way}, go on otherwise than in their batch")


def _loaded(trial: Trial) -> TieredCache:
    """The cache of `trial`, saved and loaded; as a file, if every slot is installed by name."""
    cache = _fresh(trial).cache
    try:
        describe(trial.policy)
    except PolicyError:
        (held, about), layer = trial.layer.dump(), cache.new_layer(0, trial.geometry.batch)
        layer.fill({name: x.clone() for name, x in held.items()}, json.loads(json.dumps(about)))
        cache.layers[0].groups = (RowGroup(None, layer),)
    else:
        with TemporaryDirectory() as folder:
            trial.cache.save(Path(folder) / "cache.safetensors")
            cache.load(Path(folder) / "cache.safetensors")
    return cache


class _RaisedOnPurposeError(Exception):
    pass


def _check_atomic(example: _Example) -> None:
    """Invariant 11: after an error out of a method, the call made again goes on exactly, or it refuses to go on."""
    calm, trial = _fresh(example.trial), _fresh(example.trial)
    policy, left = calm.policy, [1 + example.fault % 3]
    store = type(policy.archive.open(ByteBudget(None)))
    points = [(policy.compressor, "age"), (policy.compressor, "rewrite"), (policy.retriever, "digest"), (store, "read"),
              (policy.retriever, "score"), (policy.realigner, "place"), (policy.codec, "encode"), (store, "write"),
              (policy.codec, "decode")]  # fmt: skip
    at, method = points[example.fault % len(points)]
    kind = at if isinstance(at, type) else type(at)
    original, said = getattr(kind, method), f"after {kind.__name__}.{method}() raised and the call was made again, "

    def failing(*args: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise _RaisedOnPurposeError
        return original(*args, **named)

    def insist(verb: Callable[[], None]) -> None:
        try:
            verb()
        except _RaisedOnPurposeError:
            verb()

    for steps in example.lengths:
        due = calm.feed(steps)
        try:
            with patch.object(kind, method, failing):
                differs = difference(due, trial.feed(steps, insist))
        except InterruptedForwardError:
            return
        require(differs is None, 11, f"{said}a context differs: {differs}")


# ---------------------------------------------------------------------- one slot


def _with(**slots: Any) -> st.SearchStrategy[Policy]:
    """Policies with these choices, and any that comes with kvtiers in the other slots."""
    known = registry()
    ours = {
        slot: [build(slot, name) for name in known.names(slot) if known.provider(slot, name).distribution == "kvtiers"]
        for slot in SLOTS
        if slot not in slots
    }
    drawn = {slot: st.sampled_from([one for one in found if not getattr(one, "given", False)])
             for slot, found in ours.items()}  # fmt: skip
    forms = [("compressed", 0), ("full", 1), ("compressed", 1), ("full", 0)][: 3 if "compressor" in slots else 4]

    def make(form: tuple[str, int], **others: Any) -> Policy:
        sizes: Any = {"sink": 3, "recent": 6, "block_size": 4, "chunk_size": 6, "top_k": 3, "attend": form[0]}
        try:
            return Policy(**slots, **others, **sizes, top_k_compressed=form[1])
        except PolicyError:
            reject()

    return st.builds(make, form=st.sampled_from(forms), **drawn)


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

    def check(drawn: tuple[int, int, int]) -> None:
        setting, block, count = drawn[0], Extent(drawn[1], drawn[1] + drawn[2]), sink.steps(drawn[0])
        require(sink.is_anchor(block, setting) == sink.is_anchor(block, setting), 1, f"{block} is and is no anchor")
        require(0 <= count <= setting, 1, f"steps({setting}) says {count}")
        require(count == 0 or sink.is_anchor(Extent(count - 1, count), setting), 1, f"step {count - 1} is no anchor")

    _for_all(examples, st.tuples(st.integers(0, 8), st.integers(0, 20), st.integers(1, 5)), check)
    _check_all(_with(sinks=sink), examples)


def check_compressor(factory: Callable[[], Compressor], *, examples: int = 25) -> None:
    """Check a compressor, one that rewrites or looks at attention included.

    Raises `SlotError` for one whose form is given: only what makes that form can feed it.
    """
    compressor: Compressor = _is_a_value(factory, Compressor)
    says = [name for name in ("drops", "keeps", "given", "rewrites") if getattr(compressor, name)]
    if len(says) > 1:
        raise AssertionError(f"{type(compressor).__name__} says that it {' and that it '.join(says)}; say one")
    _check_all(_with(compressor=compressor), examples)


def check_retriever(
    factory: Callable[[], Retriever],
    *,
    declared: Declared | None = None,
    rows_independent: bool = True,
    examples: int = 25,
) -> None:
    """Check a retriever: counts and digests as declared, scores pure, rows independent.

    declared: the score by brute force, from queries [batch, query_heads, queries, head_dim] and the rotated keys of
        every block [batch, kv_heads, blocks, tokens, head_dim], for invariant 8; none if there is none to compare with.
    rows_independent: false if the score says that rows decide together.
    """
    retriever: Retriever = _is_a_value(factory, Retriever)
    for top_k in range(1, 6):
        counts = [retriever.count(top_k, archived) for archived in range(8)]
        least = [min(top_k, archived) for archived in range(8)]
        fits = all(0 <= n <= archived for archived, n in enumerate(counts)) and counts == sorted(counts)
        enough = counts[-1] == 0 or all(n >= m for n, m in zip(counts, least, strict=True))
        said = f"{type(retriever).__name__}.count() chooses {counts} of 0, 1, 2, ... blocks by top_k = {top_k}"
        require(fits and enough, 8, said)
    _check_all(_with(retriever=retriever), examples, rows_independent, declared)


def check_realigner(factory: Callable[[], Realigner], *, examples: int = 25) -> None:
    """Check a realigner: blocks keep their order and never overlap, and lie where it says."""
    _check_all(_with(realigner=_is_a_value(factory, Realigner)), examples)


def check_codec(factory: Callable[[], Codec], *, examples: int = 25) -> None:
    """Check a codec: what is read back is off by no more than `tolerance` and a rounding; bytes are as declared."""
    _check_all(_with(codec=_is_a_value(factory, Codec)), examples)


def check_archive(factory: Callable[[], Archive], *, examples: int = 25) -> None:
    """Check an archive: its stores hold what was written, and refuse what is of another kind or exceeds the limit."""
    archive: Archive = _is_a_value(factory, Archive)
    store, full = archive.open(ByteBudget(None)), archive.open(ByteBudget(1))
    parts = {"a": torch.rand(2, 1, 2, 3), "b": torch.ones(2, 1, 2, dtype=torch.uint8)}
    store.write(parts)
    for one, wrong, count, advice in (
        (store, {"a": parts["a"]}, 2, "parts of another kind were taken; call self.admit(parts, held) in write()"),
        (store, {**parts, "a": torch.rand(2, 1, 2, 5)}, 2, "blocks of another size were taken; call self.admit()"),
        (full, parts, 0, "more than limit_bytes was taken; call self.budget.admit(self, ...) in write()"),
    ):
        with suppress(GeometryError, ArchiveFullError):
            one.write(wrong)
            require(False, 11, advice)
        require(one.count == count, 11, "a write that was refused left something behind")
    for name, x in store.read(torch.tensor([[[1, 0]], [[1, 0]]])).items():
        require(torch.equal(x, parts[name].flip(2)), 1, f"{name!r} is read as others than written")
    _check_all(_with(archive=archive), examples)
