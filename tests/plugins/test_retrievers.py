"""Retrievers against their declared scores, computed one query, head, key and channel at a time."""

import math
from itertools import pairwise

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.blocks import Blocks
from kvtiers.errors import SlotError
from kvtiers.geometry import Geometry, spread
from kvtiers.layer import Layer
from kvtiers.policy import choose
from kvtiers.presets import policy
from kvtiers.rotary import Rotary
from kvtiers.slots import Moment
from kvtiers_policies.affinity import Affinity
from kvtiers_policies.all_blocks import AllBlocks
from kvtiers_policies.no_blocks import NoBlocks
from kvtiers_policies.page_bounds import PageBounds
from kvtiers_policies.recency import Recency

shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 9_999),
        "batch": st.integers(1, 2),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "count": st.integers(1, 4),
        "tokens": st.integers(1, 7),
        "queries": st.integers(1, 4),
    }
)
digest_tokens = st.none() | st.integers(1, 8)


def make(*, seed, batch=2, kv_heads=2, group=2, count=4, tokens=6, queries=3, width=4):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, kv_heads, count, tokens, width, generator=g)
    query = torch.randn(batch, kv_heads * group, queries, width, generator=g)
    blocks = Blocks(
        keys=keys,
        values=keys,
        offsets=torch.zeros(1, 1, 1, tokens, 1),
        starts=torch.arange(count) * tokens,
        span=tokens,
    )
    return blocks, keys, query


def moment_of(kv_heads=2, width=4, **about):
    geometry = Geometry(kv_heads=kv_heads, head_dim=width)
    return Moment(layer=0, step=0, geometry=geometry, device=torch.device("cpu"), **about)


def score(retriever, blocks, keys, query, **about):
    moment = moment_of(keys.shape[1], keys.shape[4], **about)
    digests = retriever.digest(attrs.evolve(blocks, rotated=keys), moment)
    assert digests.dtype == torch.float32
    assert digests[0, 0, 0].nbytes == retriever.digest_bytes(keys.shape[3], moment.geometry)
    return retriever.score(query, digests, keys.shape[2], moment)


def runs(tokens, size):
    size = size or tokens
    return [range(i, min(i + size, tokens)) for i in range(0, tokens, size)]


def packforcing(query, keys, *, rows):
    """PACKFORCING.md section 4, term by term. query: [B, N_h, i, d]; keys: [B, kv, m, j, d]."""
    batch, heads = query.shape[:2]
    half, group = max(1, heads // 2), heads // keys.shape[1]
    out = torch.zeros(batch, keys.shape[2], dtype=torch.float64)
    for b in range(batch):
        for m in range(keys.shape[2]):
            for j in range(keys.shape[3]):
                for i in range(query.shape[2]):
                    for h in range(half):
                        out[b, m] += query[b, h, i].double() @ keys[b, h // group, m, j].double()
    out /= half * math.sqrt(query.shape[-1])
    return out.mean(0, keepdim=True) if rows == "mean" else out


def softmax_mass(query, keys, size):
    """For each query head, the softmax share of each block, summed over queries. [B, N_h, m]."""
    batch, heads, count = query.shape[0], query.shape[1], keys.shape[2]
    group = heads // keys.shape[1]
    out = torch.zeros(batch, heads, count, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            means = [
                (m, torch.stack([keys[b, h // group, m, j].double() for j in run]).mean(0))
                for m in range(count)
                for run in runs(keys.shape[3], size)
            ]
            for q in query[b, h].double():
                weights = [math.exp(float(q @ mean) / math.sqrt(len(q))) for _, mean in means]
                for (m, _), weight in zip(means, weights, strict=True):
                    out[b, h, m] += weight / sum(weights)
    return out


@given(shape=shapes, size=digest_tokens, rows=st.sampled_from(["each", "mean"]))
def test_affinity_is_packforcings_formula(shape, size, rows):
    blocks, keys, query = make(**shape)
    got = score(Affinity(digest_tokens=size, rows=rows), blocks, keys, query)
    assert got.shape == (1 if rows == "mean" else shape["batch"], 1, shape["count"])
    assert torch.allclose(got[:, 0].double(), packforcing(query, keys, rows=rows), atol=1e-4)


@given(shape=shapes, size=digest_tokens)
def test_affinity_per_kv_head_sums_its_own_query_heads(shape, size):
    blocks, keys, query = make(**shape)
    got = score(Affinity(heads="per-kv", digest_tokens=size), blocks, keys, query)
    grouped = query.double().unflatten(1, (shape["kv_heads"], -1)).sum((2, 3))
    expected = torch.einsum("bkd,bkmjd->bkm", grouped, keys.double()) / math.sqrt(4)
    assert torch.allclose(got.double(), expected, atol=1e-4)


@given(shape=shapes, size=digest_tokens, heads=st.sampled_from(["mean", "per-kv"]))
def test_affinity_softmax_is_the_attention_share_of_each_block(shape, size, heads):
    blocks, keys, query = make(**shape)
    got = score(Affinity(heads=heads, normalise="softmax", digest_tokens=size), blocks, keys, query)
    mass = softmax_mass(query, keys, size)
    if heads == "mean":
        expected = mass[:, : max(1, query.shape[1] // 2)].mean(1, keepdim=True)
    else:
        expected = mass.unflatten(1, (shape["kv_heads"], -1)).sum(2)
        assert torch.allclose(got.sum(-1), torch.full_like(got.sum(-1), shape["group"] * shape["queries"]), atol=1e-4)
    assert torch.allclose(got.double(), expected, atol=1e-5)


@given(shape=shapes, size=digest_tokens, normalise=st.sampled_from(["none", "softmax"]))
def test_affinity_by_the_largest_takes_the_best_share_of_any_query_and_digest(shape, size, normalise):
    blocks, keys, query = make(**shape)
    retriever = Affinity(heads="per-kv", normalise=normalise, combine="max", digest_tokens=size)
    got = score(retriever, blocks, keys, query)
    group = shape["group"]
    for b in range(shape["batch"]):
        for kv in range(shape["kv_heads"]):
            best = [-math.inf] * shape["count"]
            made = [
                (m, torch.stack([keys[b, kv, m, j].double() for j in run]))
                for m in range(shape["count"])
                for run in runs(keys.shape[3], size)
            ]
            for q in query[b, kv * group : (kv + 1) * group].flatten(0, 1).double():
                digests = [(m, k.mean(0) if normalise == "softmax" else k.sum(0)) for m, k in made]
                logits = torch.stack([q @ digest for _, digest in digests]) / math.sqrt(len(q))
                shares = logits.softmax(0) if normalise == "softmax" else logits
                for (m, _), share in zip(digests, shares.tolist(), strict=True):
                    best[m] = max(best[m], share)
            assert torch.allclose(got[b, kv].double(), torch.tensor(best, dtype=torch.float64), atol=1e-4)


def test_affinity_digests_are_summed_in_float32():
    blocks, keys, _ = make(seed=1, tokens=512)
    low = keys.to(torch.bfloat16)
    digest = Affinity().digest(attrs.evolve(blocks, rotated=low), moment_of())[..., 0, :]
    assert torch.allclose(digest.double(), low.double().sum(-2), atol=1e-3)


@given(shape=shapes, size=digest_tokens)
def test_page_bounds_is_quests_bound_and_no_key_exceeds_it(shape, size):
    blocks, keys, query = make(**shape)
    got = score(PageBounds(digest_tokens=size), blocks, keys, query)
    group = shape["group"]
    for b in range(shape["batch"]):
        for h in range(shape["kv_heads"]):
            mine = query[b, h * group : (h + 1) * group].flatten(0, 1)
            for m in range(shape["count"]):
                bounds = []
                for q in mine:
                    for run in runs(shape["tokens"], size):
                        page = keys[b, h, m, list(run)]
                        bounds.append(
                            sum(max(float(c * p.min()), float(c * p.max())) for c, p in zip(q, page.T, strict=True))
                        )
                assert float(got[b, h, m]) == pytest.approx(max(bounds), abs=1e-4)
                assert float((mine @ keys[b, h, m].T).max()) <= float(got[b, h, m]) + 1e-4


ALL = [
    Affinity(),
    Affinity(heads="per-kv"),
    Affinity(normalise="softmax"),
    Affinity(heads="per-kv", normalise="softmax", digest_tokens=4),
    PageBounds(digest_tokens=4),
]


@pytest.mark.parametrize("retriever", ALL, ids=str)
def test_rows_do_not_influence_each_other(retriever):
    blocks, keys, query = make(seed=3)
    both = score(retriever, blocks, keys, query)
    assert torch.allclose(both[1:], score(retriever, blocks, keys[1:], query[1:]), atol=1e-6)


def test_the_mean_over_rows_is_the_one_choice_in_which_rows_do():
    blocks, keys, query = make(seed=3)
    assert score(Affinity(rows="mean"), blocks, keys, query).shape[0] == 1


@pytest.mark.parametrize("retriever", ALL, ids=str)
def test_a_pad_query_of_zeros_changes_no_ranking(retriever):
    blocks, keys, query = make(seed=4)
    padded = torch.cat([torch.zeros_like(query[:, :, :2]), query], dim=2)
    with_pads, without = score(retriever, blocks, keys, padded), score(retriever, blocks, keys, query)
    assert torch.equal(choose(with_pads, 4), choose(without, 4))


def test_a_pad_does_not_hide_bounds_below_zero():
    blocks, keys, query = make(seed=4)
    keys, query = keys.abs(), -query.abs()
    padded = torch.cat([torch.zeros_like(query[:, :, :2]), query], dim=2)
    bounds = score(PageBounds(), blocks, keys, query)
    assert (bounds < 0).all()
    assert torch.equal(score(PageBounds(), blocks, keys, padded), bounds)


@pytest.mark.parametrize("retriever", ALL, ids=str)
def test_a_low_precision_query_is_scored_in_float32(retriever):
    blocks, keys, query = make(seed=5)
    low = query.to(torch.bfloat16)
    assert torch.equal(score(retriever, blocks, keys, low), score(retriever, blocks, keys, low.float()))


@pytest.mark.parametrize("retriever", ALL, ids=str)
def test_scoring_without_a_query_or_digests_is_a_clear_error(retriever):
    with pytest.raises(SlotError, match="needs a query and digests"):
        retriever.score(None, None, 3, moment_of())


@given(count=st.integers(1, 20), of=st.integers(1, 50))
def test_sampled_queries_are_evenly_spaced(count, of):
    numbers = spread(count, of).tolist()
    assert len(numbers) == min(count, of)
    assert all(0 <= n < of for n in numbers)
    gaps = [b - a for a, b in pairwise(numbers)]
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
    assert numbers == sorted(of - 1 - n for n in numbers) or of % count or (of // count) % 2 == 0


def test_affinity_looks_only_at_the_sampled_queries():
    blocks, keys, query = make(seed=6, queries=9)
    got = score(Affinity(queries=3), blocks, keys, query)
    assert torch.equal(got, score(Affinity(), blocks, keys, query[:, :, [1, 4, 7]]))
    assert torch.equal(score(Affinity(queries=20), blocks, keys, query), score(Affinity(), blocks, keys, query))


@given(archived=st.integers(1, 30), top_k=st.integers(1, 40))
def test_recency_chooses_the_newest(archived, top_k):
    retriever = Recency()
    count = retriever.count(top_k, archived)
    assert count == min(top_k, archived)
    assert sorted(choose(retriever.score(None, None, archived, moment_of()), count).flatten().tolist()) == list(
        range(archived - count, archived)
    )


def test_all_attends_everything_and_none_nothing():
    assert AllBlocks().count(1, 50) == 50
    assert NoBlocks().count(16, 50) == 0
    for retriever in (AllBlocks(), NoBlocks()):
        assert retriever.score(None, None, 5, moment_of()).shape == (1, 1, 5)


@pytest.mark.parametrize("retriever", [AllBlocks(), NoBlocks(), Recency()], ids=str)
def test_retrievers_that_ignore_the_query_say_so_and_keep_no_digests(retriever):
    assert not retriever.needs_query
    assert not retriever.needs_digests
    assert retriever.digest_bytes(32, Geometry(kv_heads=2, head_dim=64)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"heads": "half"},
        {"normalise": "sigmoid"},
        {"rows": "all"},
        {"digest_tokens": 0},
        {"queries": 0},
        {"queries": 1.5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        Affinity(**options)


@pytest.mark.parametrize(
    "compressor", [("mean-pool", {"ratio": 8}), ("top-tokens", {"keep": 3}), ("mean-pool", {"ratio": 1})]
)
@pytest.mark.parametrize("realigner", ["contiguous", "original"])
def test_the_compressed_form_is_digested_by_its_own_keys_at_their_own_positions(compressor, realigner):
    found = policy(
        "archive",
        sink=0,
        recent=2,
        top_k=2,
        compressor=compressor,
        attend="compressed",
        realigner=realigner,
        retriever=("affinity", {"form": "compressed"}),
    )
    frequencies = [torch.tensor([1.0, 0.1]), torch.tensor([0.7, 0.1]), torch.tensor([0.5, 0.2])]
    turn = Rotary(frequencies, layout="interleaved", angle_dtype=torch.float64)
    geometry = Geometry(kv_heads=2, head_dim=12, grid=(4, 4), steps_per_commit=2, causal=False)
    layer, random = Layer(policy=found, geometry=geometry, rotary=turn), torch.Generator().manual_seed(0)
    for _ in range(4):
        keys = torch.randn(1, 2, 32, 12, generator=random)
        layer.write(keys, keys, replace=True)
        layer.select(keys)
        layer.commit()
    index = torch.arange(layer.history.count).expand(1, 2, -1)
    keys, _ = layer.history.parts("compressed", index)
    offsets = layer.history.tokens["compressed"].offsets_at(index)
    positions = offsets.double().expand(*keys.shape[:4], -1).clone()
    positions[..., 0] += layer.history.starts[:, None]
    if found.realigner.rotates:
        keys = turn.rotate(keys, positions)
    assert layer.history.count == 3
    assert torch.allclose(layer.history.digests.data[:, :, :, 0], keys.sum(-2), atol=1e-5)
