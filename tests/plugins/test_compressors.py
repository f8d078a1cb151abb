"""Compressors `keep`, `drop`, `mean-pool` and `top-tokens` against their definitions, one token at a time."""

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.presets import policy as preset
from kvtiers.slots import Compressor, Moment
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


MOMENT = Moment(layer=0, step=0, geometry=Geometry(kv_heads=2, head_dim=4), device=torch.device("cpu"))


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
    assert Keep().age(blocks, MOMENT) is blocks
    assert Keep().compressed_tokens(7) == 7


def test_drop_leaves_nothing():
    assert Drop.drops
    assert Drop().age(make(0), MOMENT) is None
    assert Drop().compressed_tokens(7) == 0


@given(shape=shapes, ratio=st.integers(1, 15))
def test_mean_pool_averages_runs_of_keys_values_and_offsets(shape, ratio):
    blocks = make(**shape)
    pooled = MeanPool(ratio=ratio).age(blocks, MOMENT)
    runs = [slice(i, i + ratio) for i in range(0, blocks.tokens, ratio)]
    for name in ("keys", "values", "offsets"):
        expected = torch.stack([getattr(blocks, name)[..., run, :].mean(-2) for run in runs], dim=-2)
        assert torch.allclose(getattr(pooled, name), expected, atol=1e-6)
    assert pooled.tokens == MeanPool(ratio=ratio).compressed_tokens(blocks.tokens) == len(runs)
    assert pooled.span == blocks.span
    assert pooled.starts is blocks.starts


def test_mean_pool_adds_up_in_float32():
    blocks = make(3, tokens=64, dtype=torch.bfloat16)
    pooled = MeanPool(ratio=64).age(blocks, MOMENT)
    assert torch.equal(pooled.keys[..., 0, :], blocks.keys.double().mean(-2).to(torch.bfloat16))
    assert pooled.keys.dtype == torch.bfloat16


def test_pooled_tokens_lie_at_the_center_of_what_they_stand_for():
    blocks = make(0, tokens=5)
    blocks.offsets.copy_(torch.arange(5.0)[:, None])
    pooled = MeanPool(ratio=2).age(blocks, MOMENT)
    assert pooled.offsets.flatten().tolist() == [0.5, 2.5, 4.0]


def brute_score(by, keys, attention):
    """The score of each token of one block of one head. keys: [tokens, width]; attention: [query_heads, tokens]."""
    if by == "key-norm":
        return [-math.sqrt(sum(x * x for x in key)) for key in keys.tolist()]
    if by == "key-similarity":
        unit = [key / key.norm() for key in keys]
        anchor = torch.stack(unit).mean(0)
        return [-(float(key @ anchor) / float(key.norm() * anchor.norm())) for key in keys]
    return [sum(float(head[token]) for head in attention) for token in range(len(keys))]


@pytest.mark.parametrize("by", ["key-norm", "key-similarity", "attention"])
@given(shape=shapes, keep=st.integers(1, 14), group=st.integers(1, 3))
def test_top_tokens_keeps_the_highest_scores_of_every_head_in_order(by, shape, keep, group):
    blocks = make(**shape)
    batch, heads = blocks.keys.shape[:2]
    generator = torch.Generator().manual_seed(shape["seed"] + 1)
    attention = torch.rand(batch, heads * group, blocks.count, blocks.tokens, generator=generator)
    blocks = attrs.evolve(blocks, attention=attention)
    policy = TopTokens(keep=keep, by=by)
    kept = policy.age(blocks, MOMENT)
    assert kept.attention is None
    size = policy.compressed_tokens(blocks.tokens)
    assert kept.tokens == size == min(keep, blocks.tokens)
    offsets = blocks.offsets.expand(*blocks.keys.shape[:4], -1)
    kept_offsets = kept.offsets.expand(*kept.keys.shape[:4], -1)
    for b in range(batch):
        for h in range(heads):
            for n in range(blocks.count):
                mine = attention[b, h * group : (h + 1) * group, n].double()
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
    blocks = attrs.evolve(blocks, attention=torch.rand(2, 4, 2, 1).expand(-1, -1, -1, 6))
    kept = TopTokens(keep=2, by=by).age(blocks, MOMENT)
    assert torch.equal(kept.values, blocks.values[:, :, :, 4:])


def test_the_lowest_norms_are_the_ones_that_stay():
    blocks = make(0, batch=1, heads=1, count=1, tokens=4)
    blocks.keys.copy_(torch.tensor([3.0, 1.0, 4.0, 2.0])[:, None])
    kept = TopTokens(keep=2, by="key-norm").age(blocks, MOMENT)
    assert kept.keys[0, 0, 0, :, 0].tolist() == [1.0, 2.0]


def layer_of(compressor, *, kv_heads=2, query_heads=4, batch=2, **changes):
    """A layer that attends nothing of its archive, so that its context is sink and recent."""
    found = preset("archive", retriever="none", attend="compressed", **{"sink": 0, "chunk_size": 9, **changes})
    geometry = Geometry(kv_heads=kv_heads, query_heads=query_heads, head_dim=4, batch=batch)
    return Layer(policy=attrs.evolve(found, compressor=compressor), geometry=geometry)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), window=st.integers(1, 6))
def test_the_latest_queries_are_kept_however_they_arrived(lengths, window):
    layer = layer_of(TopTokens(by="attention", window=window))
    queries = torch.randn(2, 4, sum(lengths), 4, generator=torch.Generator().manual_seed(7))
    for part in queries.split(lengths, dim=2):
        layer.write(part[:, :2], part[:, :2])
        layer.select(part)
    assert torch.equal(layer.watched.latest, queries[:, :, -window:])


def test_the_kept_queries_do_not_keep_a_long_forward_alive_or_follow_its_changes():
    queries = torch.zeros(1, 2, 50, 4)
    layer = layer_of(TopTokens(by="attention", window=3), kv_heads=1, query_heads=2, batch=1, chunk_size=50)
    layer.write(queries[:, :1], queries[:, :1])
    layer.select(queries)
    queries += 1
    held = [part.untyped_storage().nbytes() for part in layer.watched.tensors()]
    assert held == [2 * 3 * 4 * 4]
    assert not layer.watched.latest.any()
    for count in (50, 2, 1, 50, 2):
        part = torch.zeros(1, 2, count, 4)
        layer.write(part[:, :1], part[:, :1])
        layer.select(part)
        assert sum(part.untyped_storage().nbytes() for part in layer.watched.tensors()) <= 2 * held[0]


def test_only_attention_asks_for_queries():
    assert (TopTokens(by="attention", window=3).attention, TopTokens(by="attention", window=3).window) == ("latest", 3)
    assert (TopTokens(by="key-norm").attention, TopTokens(by="key-norm").window) == (None, 0)
    layer = layer_of(TopTokens(by="key-norm"))
    layer.write(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4))
    layer.select(torch.zeros(2, 4, 3, 4))
    assert list(layer.watched.tensors()) == []


def test_attention_that_nobody_watched_is_a_clear_error():
    with pytest.raises(PolicyError, match="was given no attention"):
        TopTokens(by="attention", keep=2).age(make(0), MOMENT)


@attrs.frozen(kw_only=True)
class Noting(Compressor):
    """Keeps blocks, and notes what attention they came with."""

    kind: str = "latest"
    latest: int = 4
    noted: dict[int, torch.Tensor] = attrs.field(factory=dict, eq=False)

    @property
    def attention(self):
        return self.kind

    @property
    def window(self):
        return self.latest if self.kind == "latest" else 0

    def age(self, blocks, moment):
        for number, start in enumerate(blocks.starts.tolist()):
            self.noted[start] = blocks.attention[:, :, number]
        return attrs.evolve(blocks, attention=None)

    def compressed_tokens(self, tokens):
        return tokens


def shares(query, keys, step, visible):
    """What the query of one head at `step` gives to each of the steps `visible` that it can see."""
    seen = [s for s in visible if s <= step]
    if not seen:
        return {}
    logits = torch.stack([query @ keys[s] for s in seen]).double() / len(query) ** 0.5
    return dict(zip(seen, logits.softmax(0).tolist(), strict=True))


@given(data=st.data())
@pytest.mark.parametrize("kind", ["latest", "sum", "max"])
def test_blocks_come_with_the_attention_that_their_tokens_got_over_the_real_context(kind, data):
    """One step, head and query at a time. Of `latest` queries those older than what is left of recent see the sink."""
    sizes = {"sink": st.integers(0, 2), "recent": st.integers(0, 5), "block_size": st.integers(1, 3)}
    changes = data.draw(st.fixed_dictionaries(sizes))
    compressor = Noting(kind=kind, latest=data.draw(st.integers(1, 6), label="window"))
    layer = layer_of(compressor, **changes)
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=8), label="forwards")
    total, generator = sum(lengths), torch.Generator().manual_seed(3)
    queries = torch.randn(2, 4, total, 4, generator=generator)
    keys = torch.randn(2, 2, total, 4, generator=generator)
    sink, recent, block = changes["sink"], changes["recent"], changes["block_size"]
    got = torch.zeros(2, 4, total, dtype=torch.float64)
    expected, start, left = {}, 0, sink
    for length in lengths:
        # what left recent when the forward before became history
        leaves = sink + max(0, start - recent - sink) // block * block
        context = [*range(min(sink, start)), *range(left, start)]
        if kind == "latest":
            got.zero_()
            for row, head, step in cells(start, compressor.latest):
                for s, share in shares(queries[row, head, step], keys[row, head // 2], step, context).items():
                    got[row, head, s] += share
        while left < leaves:
            expected[left] = got[:, :, left : left + block].clone()
            left += block
        part = slice(start, start + length)
        layer.write(keys[:, :, part], keys[:, :, part])
        layer.select(queries[:, :, part])
        start += length
        context = [*range(min(sink, start)), *range(left, start)]
        for row, head, step in cells(start, length) if kind != "latest" else ():
            for s, share in shares(queries[row, head, step], keys[row, head // 2], step, context).items():
                got[row, head, s] = got[row, head, s] + share if kind == "sum" else max(got[row, head, s], share)
    assert sorted(compressor.noted) == sorted(expected)
    for first, attention in compressor.noted.items():
        assert torch.allclose(attention.double(), expected[first], atol=1e-5)


def test_without_a_query_every_query_head_gave_nothing():
    compressor = Noting()
    layer = layer_of(compressor, sink=0, recent=2, block_size=2)
    for _ in range(4):
        keys = torch.randn(2, 2, 2, 4)
        layer.write(keys, keys)
        layer.select(None)
    assert compressor.noted
    for attention in compressor.noted.values():
        assert torch.equal(attention, torch.zeros(2, 4, 2))


def cells(stop, count):
    """Every row, query head and one of the `count` steps before `stop`."""
    return [(row, head, step) for row in range(2) for head in range(4) for step in range(max(0, stop - count), stop)]


@pytest.mark.parametrize("policy", [MeanPool(ratio=3), TopTokens(keep=3), TopTokens(keep=3, by="key-similarity")])
def test_compressing_changes_nothing_in_place(policy):
    blocks, same = make(5), make(5)
    policy.age(blocks, MOMENT)
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
