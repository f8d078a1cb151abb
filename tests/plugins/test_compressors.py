"""Compressors `keep`, `drop`, `mean-pool` and `top-tokens` against their definitions, one token at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.policy import Source
from kvtiers_policies.drop import Drop
from kvtiers_policies.keep import Keep
from kvtiers_policies.mean_pool import MeanPool
from kvtiers_policies.top_tokens import TopTokens


def make(seed, *, batch=2, heads=2, count=2, tokens=7, width=4, own=False, axes=1, dtype=torch.float32) -> Blocks:
    g = torch.Generator().manual_seed(seed)
    shape = (batch, heads, count, tokens)
    return Blocks(
        keys=torch.randn(*shape, width, generator=g).to(dtype),
        values=torch.randn(*shape, width + 1, generator=g).to(dtype),
        offsets=torch.rand(*(shape if own else (1, 1, 1, tokens)), axes, generator=g) * tokens,
        starts=torch.arange(count) * tokens,
        span=tokens,
    )


def source(queries, width=4):
    empty = torch.empty(queries.shape[0] if queries is not None else 1, 1, 0, width)
    return Source(queries=queries, keys=empty, values=empty)


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 9_999),
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "count": st.integers(1, 3),
        "tokens": st.integers(1, 13),
        "own": st.booleans(),
        "axes": st.sampled_from([1, 3]),
    }
)


def test_keep_returns_the_block_itself():
    blocks = make(0)
    assert Keep.keeps
    assert Keep().age(blocks, "state") == (blocks, "state")
    assert Keep().compressed_tokens(7) == 7


def test_drop_leaves_nothing():
    assert Drop.drops
    assert Drop().age(make(0), "state") == (None, "state")
    assert Drop().compressed_tokens(7) == 0


@given(shape=shapes, ratio=st.integers(1, 15))
def test_mean_pool_averages_runs_of_keys_values_and_offsets(shape, ratio):
    blocks = make(**shape)
    pooled, _ = MeanPool(ratio=ratio).age(blocks, None)
    runs = [slice(i, i + ratio) for i in range(0, blocks.tokens, ratio)]
    for name in ("keys", "values", "offsets"):
        expected = torch.stack([getattr(blocks, name)[..., run, :].mean(-2) for run in runs], dim=-2)
        assert torch.allclose(getattr(pooled, name), expected, atol=1e-6)
    assert pooled.tokens == MeanPool(ratio=ratio).compressed_tokens(blocks.tokens) == len(runs)
    assert pooled.span == blocks.span
    assert pooled.starts is blocks.starts


def test_mean_pool_adds_up_in_float32():
    blocks = make(3, tokens=64, dtype=torch.bfloat16)
    pooled, _ = MeanPool(ratio=64).age(blocks, None)
    assert torch.equal(pooled.keys[..., 0, :], blocks.keys.double().mean(-2).to(torch.bfloat16))
    assert pooled.keys.dtype == torch.bfloat16


def test_pooled_tokens_lie_at_the_center_of_what_they_stand_for():
    blocks = make(0, tokens=5)
    blocks.offsets.copy_(torch.arange(5.0)[:, None])
    pooled, _ = MeanPool(ratio=2).age(blocks, None)
    assert pooled.offsets.flatten().tolist() == [0.5, 2.5, 4.0]


def brute_score(by, keys, queries):
    """The score of each token of one block of one head. keys: [tokens, width]; queries: [any number, width]."""
    if by == "key-norm":
        return [-math.sqrt(sum(x * x for x in key)) for key in keys.tolist()]
    if by == "key-similarity":
        unit = [key / key.norm() for key in keys]
        anchor = torch.stack(unit).mean(0)
        return [-(float(key @ anchor) / float(key.norm() * anchor.norm())) for key in keys]
    mass = torch.zeros(len(keys), dtype=keys.dtype)
    for query in queries:
        weights = torch.stack([(query @ key) / math.sqrt(keys.shape[1]) for key in keys]).exp()
        mass += weights / weights.sum()
    return mass.tolist()


@pytest.mark.parametrize("by", ["key-norm", "key-similarity", "attention"])
@given(shape=shapes, keep=st.integers(1, 14), group=st.integers(1, 3), window=st.integers(1, 5))
def test_top_tokens_keeps_the_highest_scores_of_every_head_in_order(by, shape, keep, group, window):
    blocks = make(**shape)
    batch, heads = blocks.keys.shape[:2]
    queries = torch.randn(batch, heads * group, 6, 4, generator=torch.Generator().manual_seed(shape["seed"] + 1))
    policy = TopTokens(keep=keep, by=by, window=window)
    state = policy.prepare(source(queries), None)
    kept, _ = policy.age(blocks, state)
    size = policy.compressed_tokens(blocks.tokens)
    assert kept.tokens == size == min(keep, blocks.tokens)
    offsets = blocks.offsets.expand(*blocks.keys.shape[:4], -1)
    kept_offsets = kept.offsets.expand(*kept.keys.shape[:4], -1)
    for b in range(batch):
        for h in range(heads):
            mine = queries[b, h * group : (h + 1) * group, -window:].flatten(0, 1).double()
            for n in range(blocks.count):
                scores = brute_score(by, blocks.keys[b, h, n].double(), mine)
                same = (kept.values[b, h, n][:, None] == blocks.values[b, h, n][None]).all(-1)
                best = same.int().argmax(-1).tolist()
                assert same.sum(-1).tolist() == [1] * size
                assert best == sorted(set(best))
                # two keys are equally like their mean, so only a margin can be asked for
                left = [score for token, score in enumerate(scores) if token not in best]
                assert not left or min(scores[token] for token in best) >= max(left) - 1e-5
                assert torch.equal(kept.keys[b, h, n], blocks.keys[b, h, n, best])
                assert torch.equal(kept_offsets[b, h, n], offsets[b, h, n, best])


@pytest.mark.parametrize("by", ["key-norm", "key-similarity", "attention"])
def test_of_equal_tokens_the_newer_ones_stay(by):
    blocks = make(0, tokens=6)
    blocks.keys.copy_(blocks.keys[:, :, :, :1])
    policy = TopTokens(keep=2, by=by)
    kept, _ = policy.age(blocks, policy.prepare(source(torch.randn(2, 4, 3, 4)), None))
    assert torch.equal(kept.values, blocks.values[:, :, :, 4:])


def test_the_lowest_norms_are_the_ones_that_stay():
    blocks = make(0, batch=1, heads=1, count=1, tokens=4)
    blocks.keys.copy_(torch.tensor([3.0, 1.0, 4.0, 2.0])[:, None])
    kept, _ = TopTokens(keep=2, by="key-norm").age(blocks, None)
    assert kept.keys[0, 0, 0, :, 0].tolist() == [1.0, 2.0]


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), window=st.integers(1, 6))
def test_the_state_is_the_latest_queries_however_they_arrived(lengths, window):
    policy = TopTokens(by="attention", window=window)
    queries = torch.randn(2, 4, sum(lengths), 4, generator=torch.Generator().manual_seed(7))
    state = None
    for part in queries.split(lengths, dim=2):
        state = policy.prepare(source(part), state)
    assert torch.equal(state, queries[:, :, -window:])


def test_the_state_does_not_keep_a_long_forward_alive_or_follow_its_changes():
    queries = torch.zeros(1, 2, 50, 4)
    state = TopTokens(by="attention", window=3).prepare(source(queries), None)
    queries += 1
    assert state.untyped_storage().nbytes() == 2 * 3 * 4 * 4
    assert not state.any()


def test_only_attention_asks_for_queries():
    assert TopTokens(by="attention").prepares
    assert not TopTokens(by="key-norm").prepares
    assert TopTokens(by="key-norm").prepare(source(torch.zeros(1, 1, 2, 4)), None) is None


def test_attention_without_queries_is_a_clear_error():
    policy = TopTokens(by="attention", keep=2)
    assert policy.prepare(source(None), None) is None
    with pytest.raises(PolicyError, match="has seen no queries"):
        policy.age(make(0), None)


@pytest.mark.parametrize("policy", [MeanPool(ratio=3), TopTokens(keep=3), TopTokens(keep=3, by="key-similarity")])
def test_compressing_changes_nothing_in_place(policy):
    blocks, same = make(5), make(5)
    policy.age(blocks, None)
    assert torch.equal(blocks.keys, same.keys)
    assert torch.equal(blocks.values, same.values)
    assert torch.equal(blocks.offsets, same.offsets)


@pytest.mark.parametrize(
    ("make_policy", "message"),
    [
        (lambda: MeanPool(ratio=0), "'ratio' must be >= 1"),
        (lambda: MeanPool(ratio=2.5), "'ratio' must be <class 'int'>"),
        (lambda: TopTokens(keep=0), "'keep' must be >= 1"),
        (lambda: TopTokens(window=0), "'window' must be >= 1"),
        (lambda: TopTokens(by="luck"), "by must be one of 'key-norm', 'key-similarity', 'attention', got 'luck'"),
    ],
)
def test_settings_out_of_range_are_refused(make_policy, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_policy()
