"""The conformance kit: everything that is registered passes it, and everything that is wrong is named."""

import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.nn.functional import pad

from kvtiers import hookimpl, hookspecs
from kvtiers.archive import ByteBudget, Codec
from kvtiers.blocks import Blocks
from kvtiers.geometry import Geometry
from kvtiers.plugins import registry
from kvtiers.presets import build, policy
from kvtiers.rotary import Rotary
from kvtiers.slots import Compressor, Placement, Realigner, Retriever, Sink
from kvtiers.testing import (
    INVARIANTS,
    check_archive,
    check_codec,
    check_compressor,
    check_policy,
    check_realigner,
    check_retriever,
    check_sink,
)
from kvtiers.trials import Trial, contents, selection
from kvtiers_methods.adakv import AdaKV
from kvtiers_methods.block_relativistic import BlockRelativistic
from kvtiers_methods.deep_forcing import DeepForcing
from kvtiers_methods.duo_attention import DuoAttention
from kvtiers_methods.expected_attention import ExpectedAttention
from kvtiers_methods.fademem import FadeMem
from kvtiers_methods.framepack import FramePack
from kvtiers_methods.h2o import H2O
from kvtiers_methods.infllm import InfLLM
from kvtiers_methods.kivi import Kivi
from kvtiers_methods.kvzip import KVzip
from kvtiers_methods.landmarks import Landmarks
from kvtiers_methods.low_rank import LowRank
from kvtiers_methods.memflow import MemFlow
from kvtiers_methods.memrope import MemRoPE
from kvtiers_methods.pyramidkv import PyramidKV
from kvtiers_methods.quant_videogen import QuantVideoGen
from kvtiers_methods.snapkv import SnapKV
from kvtiers_methods.token_merging import TokenMerging
from kvtiers_methods.tova import TOVA
from kvtiers_methods.triattention import TriAttention
from kvtiers_methods.unrotated import Unrotated
from strategies import first_example, names, rotary

EXAMPLES = max(4, settings().max_examples // 10)
OPTIONS = {
    "top-tokens": [{"keep": 2, "by": by, "window": 3} for by in ("key-norm", "key-similarity", "attention")],
    "mean-pool": [{"ratio": 2}],
    "affinity": [
        {},
        {"heads": "per-kv", "normalise": "softmax", "digest_tokens": 2},
        {"rows": "mean", "queries": 1},
        {"form": "compressed"},
    ],
    "page-bounds": [{}, {"digest_tokens": 2}],
    "incremental": [{}, {"rotations": "once"}],
    "int8": [{}, {"group": 4}],
}


@pytest.fixture(autouse=True)
def _first_example():
    with first_example():
        yield


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


@pytest.mark.parametrize(
    ("slot", "check"),
    [
        pytest.param(slot, check, id=slot)
        for slot, check in (
            ("sinks", check_sink),
            ("realigner", check_realigner),
            ("archive", check_archive),
            ("codec", check_codec),
        )
    ],
)
def test_every_registered_choice_keeps_the_invariants(slot, check):
    for param in registered(slot):
        check(lambda choice=param.values[0]: build(slot, choice), examples=EXAMPLES)


@pytest.mark.parametrize("choice", registered("compressor"))
def test_every_registered_compressor_keeps_the_invariants(choice):
    check_compressor(lambda: build("compressor", choice), examples=EXAMPLES)


@pytest.mark.parametrize("choice", registered("retriever"))
def test_every_registered_retriever_keeps_the_invariants(choice):
    independent = choice[1].get("rows") != "mean"
    check_retriever(lambda: build("retriever", choice), rows_independent=independent, examples=EXAMPLES)


@pytest.mark.parametrize("positions", ["center", "unit"])
def test_a_compressor_whose_form_is_given_is_checked_with_tokens_that_stand_in_for_it(positions):
    check_compressor(lambda: build("compressor", ("dual-branch", {"positions": positions})), examples=EXAMPLES)


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("retriever", ["all", "affinity"])
def test_where_the_compressed_form_is_given_the_full_one_is_archived_unrotated(retriever, recent):
    geometry = Geometry(kv_heads=1, head_dim=16, grid=(4, 4), steps_per_commit=3, causal=False)
    found = policy("packforcing", attend="full", retriever=retriever, recent=recent, sink=3, top_k=2, archive="device")
    axes = [torch.tensor([1.0, 0.1]), torch.tensor([0.7]), torch.tensor([0.7])]
    trial = Trial.start(found, geometry, Rotary(axes, layout="interleaved"), seed=0, steps=24)
    for _ in range(8):
        contents(trial, trial.feed(3))
    assert trial.layer.history.count > 2


@pytest.mark.parametrize("name", ["packforcing", "rolling-window", "sink-rolling-window", "memrope", "longlive"])
def test_presets_for_video_keep_the_invariants(name):
    check_policy(policy(name), examples=EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infllm", "shadowkv", "kvzip"])
def test_published_methods_of_several_slots_keep_the_invariants(name):
    check_policy(policy(name), examples=EXAMPLES)


@pytest.mark.parametrize(
    "method",
    [
        H2O(most=5),
        TOVA(most=4),
        SnapKV(most=4, window=3, pool=3),
        PyramidKV(most=4, window=3, pool=3, layers=2),
        DuoAttention(most=99, retrieval_heads=[0]),
        TokenMerging(ratio=2),
        ExpectedAttention(most=5, window=4, future=8),
        TriAttention(most=5, window=4, farthest=8),
        KVzip(most=5),
        MemRoPE(),
        DeepForcing(frames=1, late_frames=2),
        MemFlow(frames=2),
        FramePack(frames=2, levels=3),
        FadeMem(frames=3, horizon=5),
    ],
    ids=lambda method: type(method).__name__,
)
def test_published_methods_keep_the_invariants(method):
    check_compressor(lambda: method, examples=EXAMPLES)


@pytest.mark.parametrize(
    "codec",
    [Kivi(), LowRank(rank=1), LowRank(rank=99), QuantVideoGen(centroids=3, stages=2, group=8)],
    ids=["2 bits", "rank 1", "full rank", "groups"],
)
def test_published_codecs_keep_the_invariants(codec):
    check_codec(lambda: codec, examples=EXAMPLES)


@pytest.mark.parametrize(
    "retriever",
    [Landmarks(outliers=0), Landmarks(outliers=1), InfLLM(representatives=2), InfLLM(representatives=2, distance=4)],
    ids=str,
)
def test_published_retrievers_keep_the_invariants(retriever):
    check_retriever(lambda: retriever, examples=EXAMPLES)


def test_keys_that_are_held_unrotated_keep_the_invariants():
    check_realigner(Unrotated, examples=EXAMPLES)


def test_positions_that_stop_at_a_horizon_keep_the_invariants():
    check_realigner(lambda: BlockRelativistic(onset=5), examples=EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["deep-forcing", "infinity-rope", "memflow", "framepack", "rolling-forcing", "fademem", "quant-videogen"],
)
def test_published_presets_for_video_keep_the_invariants(name):
    check_policy(policy(name), examples=EXAMPLES)


def test_a_method_for_text_and_one_whose_rows_share_a_width_say_so():
    check_policy(
        policy("archive", compressor=H2O(most=5, close_up=True), sink=0, attend="compressed"),
        video=False,
        examples=EXAMPLES,
    )
    check_policy(
        policy("archive", compressor=AdaKV(mean=3, most=9), sink=0, attend="compressed"),
        rows_independent=False,
        examples=EXAMPLES,
    )


def test_a_declared_score_is_compared_with_what_is_computed():
    def summed(query: Tensor, keys: Tensor) -> Tensor:
        half = max(1, query.shape[1] // 2)
        group = query.shape[1] // keys.shape[1]
        total = keys.float().sum(3).repeat_interleave(group, 1)
        scores = torch.einsum("bhqd,bhnd->bhn", query.float(), total) / query.shape[-1] ** 0.5
        return scores[:, :half].mean(1, keepdim=True)

    choice = ("affinity", {"heads": "mean", "normalise": "none"})
    check_retriever(lambda: build("retriever", choice), declared=summed, examples=EXAMPLES)
    with pytest.raises(AssertionError, match=r"invariant 8 \(exact index\): scores differ from the declared ones"):
        check_retriever(lambda: build("retriever", choice), declared=lambda q, k: 2 * summed(q, k) + 1, examples=40)


# ---------------------------------------------------------------------- compressors


@attrs.frozen
class Plain(Compressor):
    """Keeps the first half of a block; every class below does one thing wrong."""

    def age(self, blocks, moment):
        return self.cut(blocks, self.compressed_tokens(blocks.tokens))

    def cut(self, blocks: Blocks, kept: int, **changes) -> Blocks:
        parts = {name: getattr(blocks, name)[:, :, :, :kept] for name in ("keys", "values", "offsets")}
        return attrs.evolve(blocks, **parts | changes, rotated=None, attention=None)

    def compressed_tokens(self, tokens):
        return -(-tokens // 2)


@attrs.frozen
class OneTooMany(Plain):
    def age(self, blocks, moment):
        return self.cut(blocks, min(blocks.tokens, self.compressed_tokens(blocks.tokens) + 1))


@attrs.frozen
class InPlace(Plain):
    def age(self, blocks, moment):
        blocks.values.mul_(2)
        return super().age(blocks, moment)


@attrs.frozen
class RowsMixed(Plain):
    def age(self, blocks, moment):
        return super().age(attrs.evolve(blocks, keys=blocks.keys - blocks.keys.mean(0, keepdim=True)), moment)


@attrs.frozen
class BlocksMixed(Plain):
    def age(self, blocks, moment):
        return super().age(attrs.evolve(blocks, keys=blocks.keys.cumsum(2)), moment)


@attrs.frozen
class OutsideItsSpan(Plain):
    def age(self, blocks, moment):
        aged = super().age(blocks, moment)
        return attrs.evolve(aged, offsets=aged.offsets + blocks.span)


@attrs.frozen
class Backwards(Plain):
    def compressed_tokens(self, tokens):
        return tokens

    def age(self, blocks, moment):
        return attrs.evolve(blocks, offsets=blocks.offsets.flip(3))


@attrs.frozen
class SilentOffsets(Plain):
    """Offsets that follow the content, but does not say so."""

    def age(self, blocks, moment):
        aged = super().age(blocks, moment)
        wide = aged.offsets.expand(*aged.keys.shape[:4], -1)
        return attrs.evolve(aged, offsets=wide + aged.keys[:, :, :, :1, :1].sigmoid() / 4)


@attrs.frozen
class AlwaysFloat32(Plain):
    def age(self, blocks, moment):
        aged = super().age(blocks, moment)
        return attrs.evolve(aged, keys=aged.keys.float(), values=aged.values.float())


@attrs.frozen
class ValuesInFloat32(Plain):
    def age(self, blocks, moment):
        aged = super().age(blocks, moment)
        return attrs.evolve(aged, values=aged.values.float())


@attrs.frozen
class ForgetsItsDtype(Plain):
    """Multiplies what it is given, bfloat16 included, with float32."""

    def age(self, blocks, moment):
        mix = torch.eye(blocks.keys.shape[-1], device=moment.device)
        return super().age(attrs.evolve(blocks, keys=blocks.keys @ mix), moment)


@attrs.frozen
class RowsMixedIn16Bits(Plain):
    def age(self, blocks, moment):
        mixed = blocks.keys.mean(0, keepdim=True) if blocks.keys.dtype.itemsize == 2 else 0
        return super().age(attrs.evolve(blocks, keys=blocks.keys - mixed), moment)


@attrs.frozen
class OneTokenAStep(Plain):
    """Right for text: it takes tokens for steps."""

    def age(self, blocks, moment):
        offsets = torch.arange(blocks.tokens, device=moment.device)[None, None, None, :, None].double()
        return super().age(attrs.evolve(blocks, offsets=offsets), moment)


@attrs.frozen
class OneLength(Plain):
    """Takes every block to be as long as the longest."""

    def compressed_tokens(self, tokens):
        return min(3, tokens)

    def block_tokens(self, steps, geometry):
        return min(3, geometry.steps_per_commit * geometry.tokens_per_step)


@attrs.frozen
class WidthOfKeys(Plain):
    """Takes values to be as wide as keys."""

    def age(self, blocks, moment):
        aged = super().age(blocks, moment)
        return attrs.evolve(aged, values=aged.values[..., : aged.keys.shape[-1]])


@attrs.frozen
class OffsetsOnTheCPU(Plain):
    def age(self, blocks, moment):
        kept = self.compressed_tokens(blocks.tokens)
        offsets = torch.zeros(1, 1, 1, kept, blocks.offsets.shape[-1], dtype=torch.float64)
        return self.cut(blocks, kept, offsets=offsets)


@attrs.frozen
class MasksOnTheCPU(Plain):
    def age(self, blocks, moment):
        weights = torch.ones(blocks.keys.shape[-1], blocks.keys.shape[-1], dtype=blocks.keys.dtype)
        return super().age(attrs.evolve(blocks, keys=blocks.keys @ weights), moment)


@attrs.frozen
class NotFinite(Plain):
    def age(self, blocks, moment):
        return super().age(attrs.evolve(blocks, values=blocks.values / 0), moment)


@attrs.frozen
class NoBlocks(Plain):
    def age(self, blocks, moment):
        return blocks.keys


class NoValue(Plain):
    """Two of them are not equal."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@attrs.frozen
class KeepsAndDrops(Plain):
    keeps: ClassVar[bool] = True
    drops: ClassVar[bool] = True


def test_a_plain_compressor_passes():
    check_compressor(Plain, examples=EXAMPLES)
    check_compressor(OneTokenAStep, video=False, examples=EXAMPLES)


WRONG_COMPRESSORS = [
    pytest.param(
        OneTooMany, r"OneTooMany.age\(\), keys, .*due is .* as compressed_tokens\(\) says", id="a token too many"
    ),
    pytest.param(InPlace, r"invariant 7 .*InPlace.age\(\) changed what it was given", id="writes into its blocks"),
    pytest.param(RowsMixed, r"invariant 9 .*RowsMixed.age\(\) makes something else of row \d alone", id="mixes rows"),
    pytest.param(BlocksMixed, r"invariant 1 .*makes something else of block \d alone", id="mixes blocks"),
    pytest.param(OutsideItsSpan, r"invariant 5 .*not in order within a span", id="leaves its span"),
    pytest.param(Backwards, r"invariant 5 .*not in order within a span", id="out of order"),
    pytest.param(SilentOffsets, r"set offsets_differ=True|rows .* go on otherwise", id="offsets of its own, unsaid"),
    pytest.param(AlwaysFloat32, r"AlwaysFloat32.age\(\), keys, returned torch.float32; due is", id="dtype"),
    pytest.param(ValuesInFloat32, r"age\(\), values, returned torch.float32; due is torch.\w+16", id="values alone"),
    pytest.param(ForgetsItsDtype, r"ForgetsItsDtype.age\(\) raised RuntimeError.* was given \[", id="mixes dtypes"),
    pytest.param(RowsMixedIn16Bits, r"invariant 9 .*something else of row \d alone", id="mixes rows in 16 bits"),
    pytest.param(
        OneTokenAStep, r"offsets, returned \([\d, ]*1\); due is .*axes are time and the grid's", id="for text alone"
    ),
    pytest.param(OneLength, r"OneLength.age\(\), keys, .* as compressed_tokens\(\) says", id="of one length"),
    pytest.param(WidthOfKeys, r"WidthOfKeys.age\(\)", id="values as wide as keys"),
    pytest.param(OffsetsOnTheCPU, r"OffsetsOnTheCPU.age\(\) gave a tensor on the CPU", id="offsets on the CPU"),
    pytest.param(MasksOnTheCPU, r"MasksOnTheCPU.age\(\) makes tensors on the CPU.*moment.device", id="mixes devices"),
    pytest.param(NotFinite, r"invariant 1 .*NotFinite.age\(\) gave keys or values that are not finite", id="infinite"),
    pytest.param(NoBlocks, r"NoBlocks.age\(\) returned a Tensor; due is Blocks", id="no blocks"),
    pytest.param(NoValue, r"are not equal; make it @attrs.frozen", id="no value"),
    pytest.param(KeepsAndDrops, r"says that it drops and that it keeps", id="two things at once"),
    pytest.param(dict, r"made a dict, which is no Compressor", id="no compressor"),
]


@pytest.mark.parametrize(("factory", "message"), WRONG_COMPRESSORS)
def test_a_compressor_that_breaks_an_invariant_is_told_which(factory, message):
    with pytest.raises(AssertionError, match=message):
        check_compressor(factory, examples=150)


@attrs.frozen
class Latest(Compressor):
    """Rewrites: the newest `most` tokens of all that left recent; every class below does one thing wrong."""

    rewrites: ClassVar[bool] = True
    most: int = 3

    def age(self, blocks, moment):
        raise AssertionError("it rewrites")

    def compressed_tokens(self, tokens):
        return tokens

    def mid_tokens(self, geometry):
        return self.most

    def rewrite(self, leaving, mid, moment):
        if mid is None:
            return self.made(leaving, *self.flat(leaving), int(leaving.starts[0]))
        parts, first = [self.flat(mid), self.flat(leaving)], int(mid.starts[0])
        parts[1][2][..., 0] += int(leaving.starts[0]) - first
        return self.made(leaving, *(torch.cat(pair, 3) for pair in zip(*parts, strict=True)), first)

    def flat(self, blocks):
        """Keys, values, offsets from the first block's start, and bias, as one block."""
        wide, lead = (*blocks.keys.shape[:4], -1), blocks.keys.shape[:4]
        offsets = blocks.offsets.expand(wide).double().clone()
        offsets[..., 0] += (blocks.starts - blocks.starts[0])[:, None]
        bias = blocks.keys.new_zeros(lead, dtype=torch.float32) if blocks.bias is None else blocks.bias.expand(lead)
        return [x.flatten(2, 3)[:, :, None] for x in (blocks.keys, blocks.values, offsets, bias)]

    def made(self, leaving, keys, values, offsets, bias, first):
        keys, values, offsets, bias = (x[:, :, :, -self.most :].clone() for x in (keys, values, offsets, bias))
        return Blocks(
            keys=keys,
            values=values,
            offsets=offsets,
            bias=bias - 0.5,
            starts=leaving.starts[:1] * 0 + first,
            span=int(leaving.starts[-1]) + leaving.span - first,
        )


@attrs.frozen
class Attended(Latest):
    """Keeps what was attended most."""

    @property
    def attention(self):
        return "sum"

    def made(self, leaving, keys, values, offsets, bias, first):
        blocks = super().made(leaving, keys, values, offsets, bias, first)
        if leaving.attention is None:
            raise AssertionError("no attention was handed over")
        weight = leaving.attention.sum((1, 2, 3))[:, None, None, None]
        return attrs.evolve(blocks, bias=blocks.bias - weight.expand(blocks.bias.shape).sigmoid())


@attrs.frozen
class NeverForgets(Latest):
    def made(self, leaving, keys, values, offsets, bias, first):
        every = Latest(most=99)
        return every.made(leaving, keys, values, offsets, bias, first)


@attrs.frozen
class RowsRewritten(Latest):
    def made(self, leaving, keys, values, offsets, bias, first):
        return super().made(leaving, keys, values.mean(0, keepdim=True).expand_as(values), offsets, bias, first)


@attrs.frozen
class IntoRecent(Latest):
    def made(self, *args):
        made = super().made(*args)
        return attrs.evolve(made, span=made.span + 1)


@attrs.frozen
class BiasOfOtherTokens(Latest):
    def made(self, *args):
        made = super().made(*args)
        return attrs.evolve(made, bias=pad(made.bias, (0, 1)))


@pytest.mark.parametrize("factory", [Latest, Attended])
def test_a_compressor_that_rewrites_mid_passes(factory):
    check_compressor(factory, examples=2 * EXAMPLES)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        pytest.param(NeverForgets, r"NeverForgets.rewrite\(\), keys, .*mid_tokens\(\) says", id="more"),
        pytest.param(RowsRewritten, r"invariant 9 .*RowsRewritten.rewrite\(\) makes something else of row", id="rows"),
        pytest.param(IntoRecent, r"invariant 5 .*IntoRecent.rewrite\(\) gave blocks that span steps", id="too far"),
        pytest.param(BiasOfOtherTokens, r"BiasOfOtherTokens.rewrite\(\), bias, returned", id="bias of another shape"),
    ],
)
def test_a_compressor_that_rewrites_wrongly_is_told_what(factory, message):
    with pytest.raises(AssertionError, match=message):
        check_compressor(factory, examples=150)


# ---------------------------------------------------------------------- retrievers


@attrs.frozen
class Sums(Retriever):
    """Scores by the sum of a block's keys; every class below does one thing wrong."""

    def digest(self, blocks, moment):
        return blocks.rotated.float().sum(3, keepdim=True)

    def digest_bytes(self, tokens, geometry):
        return 4 * geometry.head_dim

    def score(self, query, digests, archived, moment):
        return digests.sum((-1, -2)) * query.float().sum((1, 2, 3))[:, None, None]


@attrs.frozen
class OfTheCompressed(Sums):
    @property
    def digests(self):
        return "compressed"


@attrs.frozen
class LargeDigests(Sums):
    def digest(self, blocks, moment):
        return blocks.rotated.float()


@attrs.frozen
class FlatDigests(Sums):
    def digest(self, blocks, moment):
        return blocks.rotated.float().sum(3)


@attrs.frozen
class RowsTogether(Sums):
    def score(self, query, digests, archived, moment):
        return super().score(query, digests, archived, moment).mean(0, keepdim=True)


@attrs.frozen
class NotANumber(Sums):
    def score(self, query, digests, archived, moment):
        return super().score(query, digests, archived, moment) * torch.nan


@attrs.frozen
class TooFew(Sums):
    def count(self, top_k, archived):
        return min(top_k, archived, 2)


@attrs.frozen
class RandomScores(Sums):
    def score(self, query, digests, archived, moment):
        return torch.rand(1, 1, archived, device=moment.device)


@attrs.frozen
class OneScoreTooFew(Sums):
    def score(self, query, digests, archived, moment):
        return super().score(query, digests, archived, moment)[..., 1:]


@attrs.frozen
class ScoresOnTheCPU(Sums):
    needs_query: ClassVar[bool] = False
    needs_digests: ClassVar[bool] = False

    def score(self, query, digests, archived, moment):
        return torch.arange(archived, dtype=torch.float32)[None, None]


@attrs.frozen
class PicksOnTheCPU(Sums):
    def score(self, query, digests, archived, moment):
        return super().score(query, digests.index_select(2, torch.arange(archived)), archived, moment)


@attrs.frozen
class DigestsMixed(Sums):
    def digest(self, blocks, moment):
        return super().digest(blocks, moment).cumsum(2)


@attrs.frozen
class NoDigestsOfTheLongest(Sums):
    """One digest a token, and says so of the block at hand alone."""

    def digest(self, blocks, moment):
        return blocks.rotated.float()

    def digest_bytes(self, tokens, geometry):
        return 4 * geometry.head_dim * min(tokens, 2)


@pytest.mark.parametrize("off", [0, 1])
def test_what_is_attended_is_held_to_the_scores_by_row_and_head(off):
    """And one block off is noticed."""
    geometry = Geometry(kv_heads=2, head_dim=4, batch=2)
    found = policy("archive", sink=0, recent=2, block_size=2, top_k=2, top_k_compressed=1, chunk_size=4)
    trial = Trial.start(found, geometry, rotary(4), seed=0, steps=24)
    for _ in range(6):
        trial.feed(4)
    chosen = trial.layer.history.selection
    scores = torch.zeros(2, 2, trial.layer.history.count)
    scores.scatter_(2, (chosen.compressed - off) % scores.shape[2], 1).scatter_(2, chosen.chosen, 2)
    with pytest.raises(AssertionError, match=r"invariant 8 .*row \d, head \d attends blocks") if off else nullcontext():
        selection(trial, scores)


def test_of_equal_scores_the_newer_block_is_due():
    found = policy("archive", retriever="recency", sink=0, recent=2, block_size=2, top_k=2, chunk_size=4)
    trial = Trial.start(found, Geometry(kv_heads=1, head_dim=4), rotary(4), seed=0, steps=16)
    for _ in range(4):
        trial.feed(4)
    selection(trial, torch.zeros(1, 1, trial.layer.history.count))
    with pytest.raises(AssertionError, match="invariant 8 "):
        selection(trial, -torch.arange(trial.layer.history.count).view(1, 1, -1))


def test_a_plain_retriever_passes():
    def declared(query: Tensor, keys: Tensor) -> Tensor:
        return keys.float().sum((3, 4)) * query.float().sum((1, 2, 3))[:, None, None]

    check_retriever(Sums, declared=declared, examples=EXAMPLES)
    check_retriever(OfTheCompressed, examples=EXAMPLES)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        pytest.param(
            LargeDigests, r"LargeDigests.digest\(\) made \d+.*digest_bytes\(\) leaves room for", id="digests too large"
        ),
        pytest.param(
            NoDigestsOfTheLongest,
            r"digest\(\) made \d+ digests of .* bytes of a block.* leaves room for \d+ in the longest",
            id="longest",
        ),
        pytest.param(FlatDigests, r"FlatDigests.digest\(\) returned \(.*due is \[batch, kv_heads, blocks", id="flat"),
        pytest.param(RowsTogether, r"invariant 8 .*RowsTogether.score\(\) makes .* of row", id="mixes rows"),
        pytest.param(TooFew, r"invariant 8 .*TooFew.count\(\)", id="never all"),
        pytest.param(RandomScores, r"invariant 8 .*when asked again", id="throws dice"),
        pytest.param(OneScoreTooFew, r"OneScoreTooFew.score\(\) returned .*due is", id="a score too few"),
        pytest.param(ScoresOnTheCPU, r"ScoresOnTheCPU.score\(\) gave a tensor on the CPU", id="scores on the CPU"),
        pytest.param(PicksOnTheCPU, r"PicksOnTheCPU.score\(\) makes tensors on the CPU", id="an index on the CPU"),
        pytest.param(DigestsMixed, r"invariant 8 .*of block \d alone", id="mixes blocks"),
        pytest.param(NotANumber, r"invariant 8 .*not a number", id="not a number"),
    ],
)
def test_a_retriever_that_breaks_an_invariant_is_told_which(factory, message):
    with pytest.raises(AssertionError, match=message):
        check_retriever(factory, examples=60)


# ---------------------------------------------------------------------- realigners, codecs, archives, sinks


@attrs.frozen
class Twice(Realigner):
    """Right, and unlike any shipped one: five steps further apart. Every class below does one thing wrong."""

    def place(self, *, sink, starts, spans, total, recent, moment):
        return Placement(sink_shift=0, mid_starts=starts.double() + 5, recent_shift=9)


@attrs.frozen
class Overlapping(Realigner):
    def place(self, *, sink, starts, spans, total, recent, moment):
        before = (spans.cumsum(-1) - spans).double()
        return Placement(sink_shift=0, mid_starts=before + sink, recent_shift=sink + total - recent - 1)


@attrs.frozen
class FalseMidFrom(Twice):
    def place(self, *, starts, **given):
        return Placement(sink_shift=0, mid_starts=starts.double(), recent_shift=0, mid_from=given["sink"])


@attrs.frozen
class MovesTheSink(Twice):
    def place(self, *, starts, **given):
        return Placement(sink_shift=1, mid_starts=starts.double() + 5, recent_shift=9)


@attrs.frozen
class PlacesOnTheCPU(Twice):
    def place(self, *, starts, **given):
        spread = starts.double() + torch.full((starts.shape[-1],), 5.0)
        return Placement(sink_shift=0, mid_starts=spread, recent_shift=9)


def test_a_realigner_that_leaves_gaps_of_its_own_passes():
    check_realigner(Twice, examples=EXAMPLES)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        pytest.param(Overlapping, r"invariant 5 .*overlap or change order", id="overlaps"),
        pytest.param(FalseMidFrom, r"invariant 5 .*but mid blocks begin at", id="says that gaps are none"),
        pytest.param(MovesTheSink, r"invariant 4 .*sink_moves says 'never'", id="moves the sink, unsaid"),
        pytest.param(PlacesOnTheCPU, r"PlacesOnTheCPU.place\(\) makes tensors on the CPU", id="places on the CPU"),
    ],
)
def test_a_realigner_that_breaks_an_invariant_is_told_which(factory, message):
    with pytest.raises(AssertionError, match=message):
        check_realigner(factory, examples=60)


@attrs.frozen
class Halves(Codec):
    """Writes 16 bits a number; every class below does one thing wrong."""

    def encode(self, keys, values):
        return {"keys": keys.half(), "values": values.half()}

    def decode(self, parts, dtype):
        return parts["keys"].to(dtype), parts["values"].to(dtype)

    def block_bytes(self, tokens, geometry):
        return 2 * tokens * geometry.batch * geometry.kv_heads * (geometry.head_dim + geometry.value_dim)

    def tolerance(self, keys, values):
        return keys.abs() * 2**-10 + 2**-25, values.abs() * 2**-10 + 2**-25


@attrs.frozen
class SaysExact(Halves):
    exact: ClassVar[bool] = True

    def tolerance(self, keys, values):
        return Codec.tolerance(self, keys, values)


@attrs.frozen
class TooSure(Halves):
    def tolerance(self, keys, values):
        return keys.abs() * 2**-14 + 2**-25, values.abs() * 2**-14 + 2**-25


@attrs.frozen
class AsWide(Halves):
    def block_bytes(self, tokens, geometry):
        return 4 * tokens * geometry.batch * geometry.kv_heads * geometry.head_dim


@attrs.frozen
class StaysHalf(Halves):
    def decode(self, parts, dtype):
        return parts["keys"], parts["values"]


@attrs.frozen
class DecodesOnTheCPU(Halves):
    def decode(self, parts, dtype):
        return super().decode({name: x * torch.ones(1) for name, x in parts.items()}, dtype)


@attrs.frozen
class OneScale(Halves):
    """One scale for all blocks of a run."""

    def encode(self, keys, values):
        scale = keys.abs().amax()
        return {"keys": (keys / scale).half(), "values": values.half()}


def test_a_lossy_codec_passes_by_the_tolerance_that_it_declares():
    check_codec(Halves, examples=EXAMPLES)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        pytest.param(SaysExact, r"invariant 12 \(codec\): what SaysExact reads back is off by", id="not exact"),
        pytest.param(TooSure, r"invariant 12 .*TooSure reads back is off by .* more than it declares", id="too sure"),
        pytest.param(AsWide, r"invariant 12 .*AsWide.encode\(\) made \d+ bytes .*block_bytes\(\) says", id="bytes"),
        pytest.param(StaysHalf, r"StaysHalf.decode\(\) returned torch.float16; due is torch.(b?)float", id="dtype"),
        pytest.param(OneScale, r"invariant 12 ", id="mixes blocks"),
        pytest.param(DecodesOnTheCPU, r"DecodesOnTheCPU.decode\(\) makes tensors on the CPU", id="decodes on the CPU"),
    ],
)
def test_a_codec_that_breaks_an_invariant_is_told_which(factory, message):
    with pytest.raises(AssertionError, match=message):
        check_codec(factory, examples=60)


MemoryStore = type(build("archive", "device").open(ByteBudget(None)))


class Forgetful(MemoryStore):
    """Takes the first row for every row."""

    def select_rows(self, rows):
        return super().select_rows(rows * 0)


class Careless(MemoryStore):
    def admit(self, parts, held):
        pass

    def write(self, parts):
        count, self.count, self._parts = self.count, 0, {}
        super().write(parts)
        self.count += count


class SharedFork(MemoryStore):
    def fork(self):
        return self


class Boundless(MemoryStore):
    def write(self, parts):
        self.budget = ByteBudget(None)
        super().write(parts)


class Reversed(MemoryStore):
    def read(self, index):
        return super().read(index.flip(-1))


@pytest.mark.parametrize(
    ("store", "message"),
    [
        pytest.param(Forgetful, r"invariant 9 .*selected, go on otherwise", id="rows"),
        pytest.param(SharedFork, r"invariant (1|10) ", id="a fork that is none"),
        pytest.param(Boundless, r"invariant 11 .*limit_bytes", id="no limit"),
        pytest.param(Reversed, r"invariant 1 .*is read as others than written", id="order"),
        pytest.param(Careless, r"invariant 11 .*parts of another kind were taken", id="takes anything"),
    ],
)
def test_an_archive_that_breaks_an_invariant_is_told_which(store, message):
    @attrs.frozen
    class Wrong(type(build("archive", "device"))):
        def open(self, budget):
            return store("device", budget)

    with pytest.raises(AssertionError, match=message):
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


# ---------------------------------------------------------------------- a whole policy


@attrs.frozen
class Remembers(Sums):
    """Keeps state between calls, so that a call that is made again scores otherwise."""

    calls: list = attrs.field(factory=list, eq=False)

    def score(self, query, digests, archived, moment):
        self.calls.append(archived)
        return super().score(query, digests, archived, moment) * (-1) ** len(self.calls)


def test_a_policy_that_keeps_state_of_its_own_is_told_so():
    with pytest.raises(AssertionError, match=r"invariant (8|10|11)"):
        check_policy(policy("archive", retriever=Remembers()), examples=60)


def test_without_hypothesis_the_kit_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None; import kvtiers; import kvtiers.testing"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    assert "MissingExtraError: kvtiers.testing draws its examples with Hypothesis" in ran.stderr
    assert "pip install hypothesis" in ran.stderr


def test_the_kit_counts_the_invariants_of_the_design():
    assert list(INVARIANTS) == list(range(1, 13))


def test_the_code_in_contributing_runs_and_keeps_the_invariants():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    space = {**vars(hookspecs), "__name__": "contributing"}
    space["testing"] = SimpleNamespace(
        check_retriever=partial(check_retriever, examples=EXAMPLES), check_codec=partial(check_codec, examples=EXAMPLES)
    )
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(block, space)
    assert len(blocks) == 4
    check_compressor(lambda: space["SmallKeys"](most=5), examples=EXAMPLES)
    geometry = Geometry(kv_heads=1, head_dim=4)
    assert space["small_keys"]().bound(geometry) == policy("h2o").bound(geometry)
    check_compressor(space["ValueNorm"], examples=EXAMPLES)
    made = policy("archive", retriever=space["MeanKey"](), codec=space["BFloat16"]())
    assert (type(made.retriever).__name__, made.codec.exact) == ("MeanKey", False)


def test_a_strangers_plugin_in_the_environment_is_drawn_by_no_check_and_no_strategy():
    class Stranger:
        @hookimpl
        def kvtiers_compressors(self):
            return {"broken": NoBlocks}

        @hookimpl
        def kvtiers_retrievers(self):
            return {"broken": RandomScores}

    with registry().registered(Stranger(), "stranger"):
        assert "broken" in registry().names("compressor")
        assert "broken" not in names.__wrapped__("compressor")
        check_realigner(Twice, examples=EXAMPLES)


@attrs.frozen
class Rounds(Plain):
    """Every token stays; its key is rounded."""

    def age(self, blocks, moment):
        return attrs.evolve(blocks, keys=blocks.keys.float().round().to(blocks.keys.dtype), rotated=None)

    def compressed_tokens(self, tokens):
        return tokens


@attrs.frozen
class Hides(Rounds):
    """Every token stays in its slot, and a bias hides all but the first of a block."""

    def age(self, blocks, moment):
        bias = torch.full((1, 1, 1, blocks.tokens), -torch.inf, device=moment.device)
        bias[..., 0] = 0
        return attrs.evolve(blocks, bias=bias, rotated=None)


@pytest.mark.parametrize("compressor", [Rounds, Hides])
def test_a_compressor_that_changes_or_hides_tokens_compresses_too(compressor):
    check_compressor(compressor, examples=25)


def test_a_compressor_that_is_too_large_to_be_checked_is_told_so():
    with pytest.raises(AssertionError, match=r"Latest.rewrite\(\) kept every token at every call, so little was"):
        check_compressor(lambda: Latest(most=10_000))


def test_a_compressor_that_forgets_to_return_is_told_so():
    @attrs.frozen
    class Forgets(Plain):
        def age(self, blocks, moment):
            super().age(blocks, moment)

    with pytest.raises(AssertionError, match=r"Forgets.age\(\) returned None at every call, which drops the blocks"):
        check_compressor(Forgets, examples=5)
