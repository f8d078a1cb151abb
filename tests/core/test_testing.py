"""The conformance kit: everything that is registered passes it, and everything that is wrong is named."""

import subprocess
import sys
from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from kvtiers.archive import TensorShelf
from kvtiers.blocks import Blocks
from kvtiers.policy import Compressor, Placement, Realigner, Retriever, Sink
from kvtiers.presets import build, policy
from kvtiers.testing import (
    INVARIANTS,
    check_archive,
    check_compressor,
    check_policy,
    check_realigner,
    check_retriever,
    check_sink,
)
from strategies import names

EXAMPLES = max(4, settings().max_examples // 20)
OPTIONS = {
    "top-tokens": [{"keep": 2, "by": by, "window": 3} for by in ("key-norm", "key-similarity", "attention")],
    "mean-pool": [{"ratio": 2}],
    "affinity": [
        {},
        {"heads": "per-kv", "normalise": "softmax", "digest_tokens": 2},
        {"rows": "mean", "queries": 1},
        {"heads": "per-kv", "normalise": "softmax", "combine": "max", "digest_tokens": 1, "digest_bits": 3},
    ],
    "page-bounds": [{}, {"digest_tokens": 2}],
}


def registered(slot: str) -> list:
    """Everything that is installed for a slot, in some of its forms."""
    return [
        pytest.param((name, options), id=" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
        for name in names(slot)
        for options in OPTIONS.get(name, [{}])
    ]


@pytest.mark.parametrize("name", names("policy"))
def test_every_registered_preset_keeps_the_invariants(name):
    check_policy(policy(name), examples=2 * EXAMPLES)


@pytest.mark.parametrize("choice", registered("sinks"))
def test_every_registered_sink_keeps_the_invariants(choice):
    check_sink(lambda: build("sinks", choice), examples=EXAMPLES)


@pytest.mark.parametrize("choice", registered("compressor"))
def test_every_registered_compressor_keeps_the_invariants(choice):
    check_compressor(lambda: build("compressor", choice), examples=EXAMPLES)


@pytest.mark.parametrize("choice", registered("retriever"))
def test_every_registered_retriever_keeps_the_invariants(choice):
    independent = choice[1].get("rows") != "mean"
    check_retriever(lambda: build("retriever", choice), rows_independent=independent, examples=EXAMPLES)


@pytest.mark.parametrize("choice", registered("realigner"))
def test_every_registered_realigner_keeps_the_invariants(choice):
    check_realigner(lambda: build("realigner", choice), examples=EXAMPLES)


@pytest.mark.parametrize("choice", registered("archive"))
def test_every_registered_archive_keeps_the_invariants(choice):
    check_archive(lambda: build("archive", choice), examples=EXAMPLES)


def test_a_declared_score_is_compared_with_what_is_computed():
    def summed(query: Tensor, keys: Tensor) -> Tensor:
        half = max(1, query.shape[1] // 2)
        group = query.shape[1] // keys.shape[1]
        total = keys.sum(3).repeat_interleave(group, 1)
        scores = torch.einsum("bhqd,bhnd->bhn", query, total) / query.shape[-1] ** 0.5
        return scores[:, :half].mean(1, keepdim=True)

    choice = ("affinity", {"heads": "mean", "normalise": "none"})
    check_retriever(lambda: build("retriever", choice), declared=summed, examples=EXAMPLES)
    with pytest.raises(AssertionError, match=r"invariant 8 \(exact index\): scores differ from the declared ones"):
        check_retriever(
            lambda: build("retriever", choice), declared=lambda q, k: summed(q, k) + 1e-2, examples=EXAMPLES
        )


# ---------------------------------------------------------------------- policies that are wrong


@attrs.frozen
class Plain(Compressor):
    """Keeps the first half of a block; every class below does one thing wrong."""

    def age(self, blocks, state):
        kept = self.compressed_tokens(blocks.tokens)
        return self.cut(blocks, kept), state

    def cut(self, blocks: Blocks, kept: int) -> Blocks:
        return attrs.evolve(
            blocks,
            keys=blocks.keys[:, :, :, :kept],
            values=blocks.values[:, :, :, :kept],
            offsets=blocks.offsets[:, :, :, :kept],
        )

    def compressed_tokens(self, tokens):
        return -(-tokens // 2)


@attrs.frozen
class OneTooMany(Plain):
    def age(self, blocks, state):
        return self.cut(blocks, min(blocks.tokens, self.compressed_tokens(blocks.tokens) + 1)), state


@attrs.frozen
class InPlace(Plain):
    def age(self, blocks, state):
        blocks.values.mul_(2)
        return super().age(blocks, state)


@attrs.frozen
class RowsMixed(Plain):
    def age(self, blocks, state):
        mixed = attrs.evolve(blocks, keys=blocks.keys - blocks.keys.mean(0, keepdim=True))
        return super().age(mixed, state)


@attrs.frozen
class BlocksMixed(Plain):
    def age(self, blocks, state):
        mixed = attrs.evolve(blocks, keys=blocks.keys.cumsum(2))
        return super().age(mixed, state)


@attrs.frozen
class OutsideItsSpan(Plain):
    def age(self, blocks, state):
        aged, state = super().age(blocks, state)
        return attrs.evolve(aged, offsets=aged.offsets + blocks.span), state


@attrs.frozen
class WordyState(Plain):
    def age(self, blocks, state):
        return super().age(blocks, state)[0], "what I saw"


@attrs.frozen
class SilentOffsets(Plain):
    """Offsets that follow the content, but does not say so."""

    def age(self, blocks, state):
        aged, state = super().age(blocks, state)
        wide = aged.offsets.expand(*aged.keys.shape[:4], -1)
        return attrs.evolve(aged, offsets=wide + aged.keys[..., :1].sigmoid() / 4), state


class NoValue(Plain):
    """Two of them are not equal."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def test_a_plain_compressor_passes():
    check_compressor(Plain, examples=EXAMPLES)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        pytest.param(OneTooMany, r"invariant 6 \(bounded\): a block of \d tokens became", id="a token too many"),
        pytest.param(InPlace, r"invariant 7 .*changed the blocks", id="writes into its blocks"),
        pytest.param(RowsMixed, r"invariant 9 \(batch algebra\): row 0 becomes something else", id="mixes rows"),
        pytest.param(BlocksMixed, r"invariant 1 .*block \d becomes something else alone", id="mixes blocks"),
        pytest.param(OutsideItsSpan, r"invariant 5 .*are not in order within a span", id="leaves its span"),
        pytest.param(WordyState, r"invariant 10 .*no tensor with the batch first", id="a state of words"),
        pytest.param(SilentOffsets, r"set own_offsets=True", id="offsets of its own, unsaid"),
        pytest.param(NoValue, r"are not equal; make it @attrs.frozen", id="no value"),
        pytest.param(dict, r"made a dict, which is no Compressor", id="no compressor"),
    ],
)
def test_a_compressor_that_breaks_an_invariant_is_told_which(factory, message):
    with pytest.raises(AssertionError, match=message):
        check_compressor(factory, examples=40)


@attrs.frozen
class Sums(Retriever):
    """Scores by the sum of a block's keys; every class below does one thing wrong."""

    def digest(self, blocks):
        return blocks.rotated.float().sum(3, keepdim=True)

    def digest_floats(self, tokens, head_dim):
        return head_dim

    def score(self, query, digests, archived):
        return digests.sum((-1, -2)) * query.sum((1, 2, 3))[:, None, None]


@attrs.frozen
class LargeDigests(Sums):
    def digest(self, blocks):
        return blocks.rotated.float()


@attrs.frozen
class RowsTogether(Sums):
    def score(self, query, digests, archived):
        return super().score(query, digests, archived).mean(0, keepdim=True)


@attrs.frozen
class NotANumber(Sums):
    def score(self, query, digests, archived):
        return super().score(query, digests, archived).mean(0, keepdim=True) / 0


@attrs.frozen
class TooFew(Sums):
    def count(self, top_k, archived):
        return min(top_k, archived, 2)


@attrs.frozen
class RandomScores(Sums):
    def score(self, query, digests, archived):
        return torch.rand(1, 1, archived)


@attrs.frozen
class DigestsMixed(Sums):
    def digest(self, blocks):
        return super().digest(blocks).cumsum(2)


def test_a_plain_retriever_passes():
    check_retriever(Sums, declared=lambda q, k: k.sum((3, 4)) * q.sum((1, 2, 3))[:, None, None], examples=EXAMPLES)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        pytest.param(LargeDigests, r"invariant 6 .*digest numbers, declared 4", id="digests larger than declared"),
        pytest.param(RowsTogether, r"invariant 8 .*row \d scores otherwise alone", id="mixes rows"),
        pytest.param(TooFew, r"invariant 8 .*chooses only 2", id="never all"),
        pytest.param(RandomScores, r"invariant 8 .*scores the same blocks otherwise", id="throws dice"),
        pytest.param(DigestsMixed, r"invariant 8 .*one by one have other digests", id="mixes blocks"),
        pytest.param(NotANumber, r"invariant 8", id="not a number"),
    ],
)
def test_a_retriever_that_breaks_an_invariant_is_told_which(factory, message):
    with pytest.raises(AssertionError, match=message):
        check_retriever(factory, examples=40)


@attrs.frozen
class Overlapping(Realigner):
    def place(self, *, sink, starts, spans, total, recent):
        before = (spans.cumsum(-1) - spans).double()
        return Placement(sink_shift=0, mid_starts=before + sink, recent_shift=sink + total - recent - 1)


@attrs.frozen
class MovesWithoutRotating(Realigner):
    rotates: ClassVar[bool] = False

    def place(self, *, sink, starts, spans, total, recent):
        return Placement(sink_shift=0, mid_starts=starts.double(), recent_shift=3)


@attrs.frozen
class FalseMidFrom(Realigner):
    def place(self, *, sink, starts, spans, total, recent):
        return Placement(sink_shift=0, mid_starts=starts.double(), recent_shift=0, mid_from=sink)


@attrs.frozen
class Twice(Realigner):
    """Right, and unlike any shipped one: everything twice as far apart, on whole numbers."""

    def place(self, *, sink, starts, spans, total, recent):
        return Placement(sink_shift=0, mid_starts=starts.double() + 5, recent_shift=9)


def test_a_realigner_that_leaves_gaps_of_its_own_passes():
    check_realigner(Twice, examples=EXAMPLES)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        pytest.param(Overlapping, r"invariant 5 .*overlap or change order", id="overlaps"),
        pytest.param(MovesWithoutRotating, r"invariant 4 .*does not rotate, but places", id="moves without rotating"),
        pytest.param(FalseMidFrom, r"invariant 5 .*but mid blocks begin at", id="says that gaps are none"),
    ],
)
def test_a_realigner_that_breaks_an_invariant_is_told_which(factory, message):
    with pytest.raises(AssertionError, match=message):
        check_realigner(factory, examples=40)


class Forgetful(TensorShelf):
    def take(self, rows):
        self._keys.take(rows)
        self._values.take(rows.sort().values)
        self._offsets.take(rows)


class Careless(TensorShelf):
    def admit(self, blocks):
        pass

    def write(self, blocks):
        self._keys, self._values, self._offsets = (type(self._keys)(2) for _ in range(3))
        held = self.count
        super().write(blocks)
        self.count = held + blocks.count


class SharedFork(TensorShelf):
    def fork(self):
        return self


@pytest.mark.parametrize("shelf", [Forgetful, Careless, SharedFork])
def test_an_archive_that_breaks_an_invariant_is_told_which(shelf):
    @attrs.frozen
    class Wrong(type(build("archive", "device")).__mro__[1]):
        place: ClassVar = "device"

        def open(self):
            return shelf("device")

    with pytest.raises((AssertionError, IndexError, ExceptionGroup)):
        check_archive(Wrong, examples=100)


@attrs.frozen
class Undecided(Sink):
    """Changes its mind whenever it is asked."""

    asked: list = attrs.field(factory=list, eq=False)

    def is_anchor(self, block, sink):
        self.asked.append(block)
        return len(self.asked) % 2 == 0


def test_a_sink_that_changes_its_mind_is_told_so():
    with pytest.raises(AssertionError, match="invariant 1"):
        check_sink(Undecided, examples=40)


def test_without_hypothesis_the_kit_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None; import kvtiers; import kvtiers.testing"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    assert "MissingExtraError: kvtiers.testing draws its examples with Hypothesis" in ran.stderr
    assert "pip install hypothesis" in ran.stderr


def test_the_kit_counts_the_invariants_of_the_design():
    assert list(INVARIANTS) == list(range(1, 11))
