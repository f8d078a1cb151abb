"""The conformance kit: one call from one test checks a policy against the invariants that every policy must keep.

    from kvtiers.testing import check_compressor

    def test_my_compressor_keeps_the_invariants():
        check_compressor(lambda: MyCompressor(ratio=4))

Every check runs small layers that Hypothesis draws: of text, and of video (blocks of one length or of several), in
float32, bfloat16 and float16, with the choice under test in one slot and any that comes with kvtiers in the others.
`kvtiers.calls` looks at calls of its methods, `kvtiers.trials` at what the layer then holds. A broken invariant raises
`AssertionError` with its number and name; a return of the wrong shape, dtype or device is told in the layer's words.

Importing this module needs Hypothesis; nothing else of kvtiers imports it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from kvtiers.archive import Archive, BlockStore, ByteBudget, Codec
from kvtiers.blocks import Context, Extent
from kvtiers.calls import INVARIANTS, Calls, close, compressing, require, wrapped
from kvtiers.errors import CropError, InterruptedForwardError, KVTiersError, MissingExtraError, SavedCacheError
from kvtiers.geometry import Geometry
from kvtiers.plugins import registry
from kvtiers.policy import SLOTS, Policy
from kvtiers.presets import build
from kvtiers.rotary import Rotary
from kvtiers.slots import Compressor, Realigner, Retriever, Sink
from kvtiers.trials import Do, Trial, bounded, conservation, contents, copied, difference, reading, selection

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
    "selection",
]  # fmt: skip
Declared = Callable[[Tensor, Tensor], Tensor]
_OFTEN = 20  # of so many examples, one has longer blocks than of two tokens


# ---------------------------------------------------------------------- what an author calls


def check_policy(policy: Policy, *, rows_independent: bool = True, video: bool = True, examples: int = 25) -> None:
    """Check a whole policy against every invariant. Sizes are scaled down; slots stay as they are.

    rows_independent: false if the policy says that rows of a batch decide together. video: false if it is for text.
    """
    _check_layers(st.just(policy), examples, slots=SLOTS, rows=rows_independent, video=video)


def check_sink(factory: Callable[[], Sink], *, examples: int = 25) -> None:
    """Check a sink policy: it decides by the block alone, and what it calls anchors is the beginning."""
    sink: Sink = _value(factory, Sink)

    def check(drawn: tuple[int, int, int]) -> None:
        setting, block, count = drawn[0], Extent(drawn[1], drawn[1] + drawn[2]), sink.steps(drawn[0])
        require(sink.is_anchor(block, setting) == sink.is_anchor(block, setting), 1, f"{block} is and is no anchor")
        require(0 <= count <= setting, 1, f"steps({setting}) says {count}")
        require(count == 0 or sink.is_anchor(Extent(count - 1, count), setting), 1, f"step {count - 1} is no anchor")

    _for_all(examples, st.tuples(st.integers(0, 8), st.integers(0, 20), st.integers(1, 5)), check)
    _check_layers(_policies(sinks=sink), examples)


def check_compressor(factory: Callable[[], Compressor], *, video: bool = True, examples: int = 25) -> None:
    """Check a compressor: blocks, rows and devices stay apart, tokens in order, numbers as declared.

    Give it settings at which a few tokens stay, for blocks are short. It may rewrite or look at attention. Where its
    form is given, some tokens of each block stand in for that.
    video: false if it is for text alone, one token a step.
    """
    compressor: Compressor = _value(factory, Compressor)
    says = [name for name in ("drops", "keeps", "given", "rewrites") if getattr(compressor, name)]
    if len(says) > 1:
        raise AssertionError(f"{type(compressor).__name__} says that it {' and that it '.join(says)}; say one")
    with compressing(compressor, often=examples >= _OFTEN):
        _check_layers(_policies(compressor=compressor), examples, slots=["compressor"], video=video)


def check_retriever(
    factory: Callable[[], Retriever],
    *,
    declared: Declared | None = None,
    rows_independent: bool = True,
    examples: int = 25,
) -> None:
    """Check a retriever: counts and digests as declared, scores pure, the best attended, rows independent.

    declared: the score by brute force, from queries [batch, query_heads, queries, head_dim] and the rotated keys of
        every block [batch, kv_heads, blocks, tokens, head_dim], for invariant 8; None if there is none to compare with.
    rows_independent: false if the score says that rows decide together.
    """
    retriever: Retriever = _value(factory, Retriever)
    for top_k in range(1, 6):
        counts = [retriever.count(top_k, archived) for archived in range(8)]
        least = [min(top_k, archived) for archived in range(8)]
        fits = all(0 <= n <= archived for archived, n in enumerate(counts)) and counts == sorted(counts)
        enough = counts[-1] == 0 or all(n >= m for n, m in zip(counts, least, strict=True))
        said = f"{type(retriever).__name__}.count() chooses {counts} of 0, 1, 2, ... blocks by top_k = {top_k}"
        require(fits and enough, 8, said)
    _check_layers(
        _policies(retriever=retriever), examples, slots=["retriever"], rows=rows_independent, declared=declared
    )


def check_realigner(factory: Callable[[], Realigner], *, examples: int = 25) -> None:
    """Check a realigner: blocks keep their order and never overlap, and lie where it says."""
    _check_layers(_policies(realigner=_value(factory, Realigner)), examples, slots=["realigner"])


def check_codec(factory: Callable[[], Codec], *, examples: int = 25) -> None:
    """Check a codec: what is read back is off by no more than `tolerance` and a rounding; bytes are as declared."""
    _check_layers(_policies(codec=_value(factory, Codec)), examples, slots=["codec"])


def check_archive(factory: Callable[[], Archive], *, examples: int = 25) -> None:
    """Check an archive: its stores hold what was written, and refuse what is of another kind or exceeds the limit."""
    archive: Archive = _value(factory, Archive)
    store, full = archive.open(ByteBudget(None)), archive.open(ByteBudget(1))
    if not isinstance(store, BlockStore):
        raise AssertionError(f"{type(archive).__name__}.open() returned a {type(store).__name__}; due is a BlockStore")
    parts = {"a": torch.rand(2, 1, 2, 3), "b": torch.ones(2, 1, 2, dtype=torch.uint8)}
    store.write(parts)
    for one, wrong, count, advice in (
        (store, {"a": parts["a"]}, 2, "parts of another kind were taken; call self.admit(parts, held) in write()"),
        (store, {**parts, "a": torch.rand(2, 1, 2, 5)}, 2, "blocks of another size were taken; call self.admit()"),
        (full, parts, 0, "more than limit_bytes was taken; call self.budget.admit(self, ...) in write()"),
    ):
        with suppress(KVTiersError):
            one.write(wrong)
            require(False, 11, advice)
        require(one.count == count, 11, "a write that was refused left something behind")
    for name, x in store.read(torch.tensor([[[1, 0]], [[1, 0]]])).items():
        require(torch.equal(x, parts[name].flip(2)), 1, f"{name!r} is read as others than written")
    _check_layers(_policies(archive=archive), examples)


# ---------------------------------------------------------------------- what is drawn


@attrs.frozen(kw_only=True)
class _Example:
    """A stream for a layer, the forwards in which it comes, and what happens after the first `split` of them."""

    trial: Trial
    lengths: list[int]
    split: int
    back: list[int]
    compact: int | None
    rows: list[int]
    fault: int

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        then = f"after {self.split} compact(recent={self.compact}), rows {self.rows}, back {self.back}"
        printer.text(f"{self.trial.policy}, {self.trial.geometry}, forwards {self.lengths}, {then}, {self.fault}")

    def run(self, trial: Trial, *, part: slice = slice(None), do: Do = lambda verb: verb()) -> Iterator[Context]:
        """Feed these of the forwards, each verb through `do`, and compact after the first `split`, if need be."""
        for number in range(len(self.lengths))[part]:
            yield trial.feed(self.lengths[number], do)
            if number + 1 == self.split and self.compact is not None:
                do(partial(trial.compact, self.compact))


@st.composite
def _examples(draw: Callable[..., Any], policies: st.SearchStrategy[Policy], may_be_video: bool) -> _Example:
    """A small layer under one of `policies`, in sizes at which blocks move within few tokens."""

    def number(least: int, most: int) -> int:
        return int(draw(st.integers(least, most)))

    chosen, heads = draw(policies), number(1, 2)
    given = chosen.compressor.given
    video, longest = given or (may_be_video and number(0, 2) == 2), number(2 if given else 1, 4)
    geometry = Geometry(
        kv_heads=heads,
        query_heads=heads * number(1, 2),
        head_dim=16,
        value_dim=draw(st.sampled_from([16, 24])),
        batch=3 - number(1, 2),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        causal=not video,
        grid=() if not video else (4, 4) if given else draw(st.sampled_from([(2,), (1, 3)])),
        steps_per_commit=longest if video else 1,
        even=not video or draw(st.booleans()),
    )
    recent, chunk = number(0, 6 if video else 3), longest if video else number(2, 6)
    policy = attrs.evolve(
        chosen,
        sink=min(chosen.sink, number(0, 3)),
        recent=None if chosen.recent is None else max(recent, longest) if recent and video else recent,
        block_size=min(chosen.block_size, number(1, 3)),
        chunk_size=None if chosen.chunk_size is None else chunk,
        top_k=min(chosen.top_k, number(1, 3)),
        budget=None,
    )
    least = longest if video and geometry.even else 2 if given else 1
    lengths = draw(st.lists(st.integers(least, chunk), min_size=6, max_size=9))
    layout: Any = "interleaved" if video else draw(st.sampled_from(["half", "interleaved"]))
    axes = [torch.tensor([1.0, 0.1, 0.01]), *(torch.tensor([0.7, 0.2]) for _ in geometry.grid)]
    rotary, back = Rotary(axes, layout=layout, angle_dtype=torch.float64), [least] * number(0, 1 if video else 2)
    return _Example(
        trial=Trial.start(policy, geometry, rotary, seed=number(0, 9_999), steps=sum(lengths) + sum(back)),
        lengths=lengths,
        split=number(len(lengths) // 2, len(lengths) - 2),
        back=back,
        compact=draw(st.none() | st.integers(0, 3)),
        rows=draw(st.lists(st.integers(0, geometry.batch - 1), min_size=1, max_size=3)),
        fault=number(2, 30),
    )


def _policies(**slots: Any) -> st.SearchStrategy[Policy]:
    """Policies with these choices, and any that comes with kvtiers in the other slots, which archives blocks."""
    known, drawn, gone = registry(), {}, ("given", "drops", "rewrites")
    for slot in set(SLOTS) - set(slots):
        ours = [build(slot, x) for x in known.names(slot) if known.provider(slot, x).distribution == "kvtiers"]
        drawn[slot] = st.sampled_from([x for x in ours if not any(getattr(x, no, False) for no in gone)])
    forms = [("compressed", 0), ("full", 1), ("compressed", 1), ("full", 0)][: 3 if "compressor" in slots else 4]

    def make(form: tuple[str, int], **others: Any) -> Policy:
        sizes: Any = {"sink": 3, "recent": 6, "block_size": 4, "chunk_size": 6, "top_k": 3, "attend": form[0]}
        try:
            return Policy(**slots, **others, **sizes, top_k_compressed=form[1])
        except KVTiersError:  # they do not go together
            reject()

    return st.builds(make, form=st.sampled_from(forms), **drawn)


def _value(factory: Callable[[], Any], kind: type) -> Any:
    """What `factory` makes, after checking that it makes equal ones; a saved cache and a swap rely on it."""
    made, again = factory(), factory()
    if not isinstance(made, kind):
        raise AssertionError(f"the factory made a {type(made).__name__}, which is no {kind.__name__}")
    if made != again:
        raise AssertionError(f"two {type(made).__name__} of equal settings are not equal; make it @attrs.frozen")
    return made


# ---------------------------------------------------------------------- what holds of every example


def _for_all(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    quiet = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None,
                     report_multiple_bugs=False)  # fmt: skip
    quiet(given(strategy)(check))()


def _check_layers(
    policies: st.SearchStrategy[Policy], examples: int, *, slots: Sequence[str] = (), rows: bool = True,
    video: bool = True, declared: Declared | None = None,
) -> None:  # fmt: skip
    """Check layers under these policies, with a look at the calls of what is in `slots`."""

    def check(example: _Example) -> None:
        try:
            contexts = _check_running(example, slots, Calls(rows, declared))
            _check_going_on(example, contexts, rows)
            _check_interrupted(example, contexts)
        except SavedCacheError as error:
            raise AssertionError(f"invariant 10 ({INVARIANTS[10]}): {error}") from error
        except KVTiersError as error:  # the layer has looked at what a method gave, or the method refused
            raise AssertionError(str(error)) from error

    _for_all(examples, _examples(policies, video), check)


def _check_running(example: _Example, slots: Sequence[str], calls: Calls) -> list[Context]:
    """Invariants 1 to 8, and 12, at every step; returns the contexts."""
    trial, contexts = example.trial.branch(), []
    with wrapped([getattr(trial.policy, slot) for slot in slots], calls.taken_down):
        for context in example.run(trial):
            calls.check()
            conservation(trial)
            for holds in (contents, bounded, reading):
                holds(trial, context)
            selection(trial, calls.scores)
            contexts.append(copied(context))
    return contexts


def _check_going_on(example: _Example, contexts: list[Context], rows: bool) -> None:
    """Invariants 9 and 10: forked, loaded, rolled back, or with other rows, a cache goes on as it would have."""
    trial, index, rest = example.trial.branch(), torch.tensor(example.rows), slice(example.split, None)
    for _ in example.run(trial, part=slice(example.split)):
        pass
    ways = {"forked": trial.fork(), "loaded": trial.loaded()}
    back = trial.elsewhere()
    with suppress(CropError):
        for steps in example.back:
            back.feed(steps)
        back.cache.crop(trial.num_steps)
        ways["rolled back"] = trial.branch(back.cache)
    other = trial.elsewhere()
    if rows:
        trial.select_rows(index)
        ways["selected"] = trial
    ways["other"] = other  # goes elsewhere in the meantime, which the rest must not notice
    for due, *every in zip(contexts[rest], *(example.run(one, part=rest) for one in ways.values()), strict=True):
        for way, got in zip(ways, every, strict=True):
            if way == "selected":
                same = close(got.keys, due.keys[index]) and close(got.values, due.values[index])
                require(same, 9, f"rows {example.rows}, selected, go on otherwise than in their batch")
            elif way != "other":
                said = difference(due, got)
                require(said is None, 10, f"a {way} cache goes on otherwise: {said}")


def _check_interrupted(example: _Example, contexts: list[Context]) -> None:
    """Invariant 11: after an error out of any method, the verb called again goes on exactly, or refuses to go on."""
    trial, calls = example.trial.branch(), [""]
    store = trial.policy.archive.open(ByteBudget(None))

    def failing(original: Any, method: str) -> Any:
        def call(slot: Any, *args: Any, **named: Any) -> Any:
            calls.append(f"{type(slot).__name__}.{method}()")
            if len(calls) == example.fault:
                raise InterruptedError
            return original(slot, *args, **named)

        return call

    def insist(verb: Callable[[], None]) -> None:
        try:
            verb()
        except InterruptedError:
            verb()

    slots = [store, *(getattr(trial.policy, slot) for slot in SLOTS)]
    with wrapped(slots, failing, more=("write", "read")), suppress(InterruptedForwardError):
        for due, got in zip(contexts, example.run(trial, do=insist), strict=True):
            said = difference(due, got)
            which = f"after {calls[: example.fault][-1]} raised and the verb was called again, a context differs"
            require(said is None, 11, f"{which}: {said}")
