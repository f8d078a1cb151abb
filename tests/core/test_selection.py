"""Invariant 8: what is selected is what the declared score says, by brute force; ties and refreshes are exact."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvtiers import testing
from kvtiers.blocks import Blocks
from kvtiers.errors import SelectionError
from kvtiers.geometry import Geometry
from kvtiers.policy import Policy, choose
from kvtiers.presets import build, policy
from kvtiers.slots import Moment, Retriever
from strategies import Setting, copied, cuts, feed, per_head, policies, rotary, settings_of, stream

SCORED = ("affinity", "page-bounds")


def brute_force(retriever: Retriever, query: Tensor, blocks: list[Tensor]) -> Tensor:
    """The declared score, from the keys of every block, one at a time, in float64: [batch, kv_heads, blocks].

    query: [batch, query_heads, queries, head_dim]; blocks: [batch, kv_heads, tokens, head_dim] each, both rotated.
    """
    query, blocks = query.double(), [block.double() for block in blocks]
    batch, kv_heads = blocks[0].shape[:2]
    group = query.shape[1] // kv_heads
    scale = query.shape[-1] ** -0.5
    name, size = type(retriever).__name__, retriever.digest_tokens
    count = getattr(retriever, "queries", None)
    if count is not None and count < query.shape[2]:
        length = query.shape[2]
        query = query[:, :, [(2 * i + 1) * length // (2 * count) for i in range(count)]]
    out = torch.zeros(batch, query.shape[1], len(blocks), dtype=torch.float64)
    for row in range(batch):
        for head in range(query.shape[1]):
            runs = [block[row, head // group].split(size or block.shape[2]) for block in blocks]
            shares = torch.zeros(len(blocks), dtype=torch.float64)
            best = torch.full((len(blocks),), -torch.inf, dtype=torch.float64)
            for q in query[row, head]:
                if name == "PageBounds":
                    for number, parts in enumerate(runs):
                        for part in parts:
                            bound = sum(
                                max(float(q[c] * part[:, c].min()), float(q[c] * part[:, c].max()))
                                for c in range(len(q))
                            )
                            best[number] = max(float(best[number]), bound)
                elif retriever.normalise == "none":
                    shares += torch.stack([(q @ block[row, head // group].T).sum() * scale for block in blocks])
                else:
                    logits = [q @ part.mean(0) * scale for parts in runs for part in parts]
                    weight = torch.stack(logits).softmax(0)
                    owner = torch.tensor([n for n, parts in enumerate(runs) for _ in parts])
                    shares.index_add_(0, owner, weight)
            out[row, head] = best if name == "PageBounds" else shares
    if name == "PageBounds":
        return out.unflatten(1, (kv_heads, group)).amax(2)
    if retriever.heads == "mean":
        half = max(1, out.shape[1] // 2)
        return out[:, :half].mean(1, keepdim=True).expand(-1, kv_heads, -1)
    return out.unflatten(1, (kv_heads, group)).sum(2)


@given(data=st.data())
def test_the_chosen_blocks_have_the_highest_declared_scores(data):
    """At every step of a run, with keys and queries rotated at their origins whatever the realigner."""
    found = data.draw(
        policies(retriever=SCORED, refresh="chunk", recent=3, compressor=("keep", "mean-pool", "top-tokens"))
    )
    setting = data.draw(settings_of(st.just(found)))
    tokens, layer = setting.tokens, setting.layer()
    at = torch.arange(setting.steps)[:, None].double()
    turned = found.realigner.rotates
    keys = setting.rotary.rotate(tokens.keys, at) if turned else tokens.keys
    queries = setting.rotary.rotate(tokens.query, at) if turned else tokens.query
    for start, _ in feed(layer, tokens, data.draw(cuts(found))):
        if not layer.history.count:
            assert layer.history.selection is None
            continue
        blocks = [keys[:, :, a : a + found.block_size] for a in layer.history.starts.tolist()]
        scores = brute_force(found.retriever, queries[:, :, start : layer.num_steps], blocks)
        for picked, more in (
            (layer.history.selection.chosen, 0),
            (layer.history.selection.compressed, layer.history.selection.chosen.shape[-1]),
        ):
            rank = scores.sort(-1, descending=True).values
            got = scores.gather(-1, picked).sort(-1, descending=True).values
            want = rank[..., more : more + picked.shape[-1]]
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
        assert layer.history.selection.chosen.shape[-1] == min(found.top_k, layer.history.count)


def test_the_brute_force_notices_another_key():
    """Negative control: one channel of one key changes the score that is compared."""
    geometry = Geometry(kv_heads=2, head_dim=4, query_heads=4)
    tokens = stream(geometry, 9)
    for name in SCORED:
        retriever = policy("archive", retriever=name).retriever
        blocks = [tokens.keys[:, :, a : a + 3].clone() for a in (0, 3, 6)]
        before = brute_force(retriever, tokens.query, blocks)
        blocks[1][0, 0, 2, 3] += 5
        after = brute_force(retriever, tokens.query, blocks)
        assert (before - after).abs().max() > 1e-3


@given(
    scores=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, -3.0]), min_size=5, max_size=5), min_size=1, max_size=3
    ),
    count=st.integers(1, 5),
)
def test_of_equal_scores_the_newer_block_wins(scores, count):
    chosen = choose(torch.tensor(scores)[:, None], count)
    for row, values in zip(chosen[:, 0].tolist(), scores, strict=True):
        assert row == sorted(range(5), key=lambda block: (values[block], block), reverse=True)[:count]


@given(data=st.data())
def test_equal_blocks_are_chosen_newest_first(data):
    """Keys that are all the same score the same, so the choice is recency's. Whole numbers, so that sums are exact."""
    retriever = data.draw(
        st.sampled_from([("affinity", {"normalise": "none"}), ("affinity", {"heads": "per-kv"}), ("page-bounds", {})])
    )
    found = data.draw(policies(refresh="chunk", realigner="original", recent=3, compressor="keep"))
    found = attrs.evolve(found, retriever=build("retriever", retriever))
    setting = data.draw(settings_of(st.just(found)))
    setting = attrs.evolve(setting, geometry=attrs.evolve(setting.geometry, head_dim=4), rotary=rotary(4))
    tokens = setting.tokens
    keys = tokens.keys[:, :, :1].round().expand(-1, -1, setting.steps, -1)
    layer = setting.layer()
    for _ in feed(layer, attrs.evolve(tokens, query=tokens.query.round(), keys=keys), data.draw(cuts(found))):
        if layer.history.count:
            newest = torch.arange(max(0, layer.history.count - found.top_k), layer.history.count)
            assert torch.equal(layer.history.selection.chosen, newest.expand_as(layer.history.selection.chosen))


@given(data=st.data())
def test_as_many_blocks_as_there_are_selects_all_of_them(data):
    found = data.draw(policies(retriever=("affinity", "page-bounds", "recency"), compressor="keep", top_k=64, recent=3))
    setting = data.draw(settings_of(st.just(found)))
    layer, every = setting.layer(), attrs.evolve(setting, policy=policy("full")).layer()
    lengths = data.draw(cuts(found))
    for (_, mine), (_, whole) in zip(
        feed(layer, setting.tokens, lengths), feed(every, setting.tokens, lengths), strict=True
    ):
        assert torch.equal(mine.values, whole.values)
        assert torch.equal(per_head(mine.origins, mine), per_head(whole.origins, whole))


@given(data=st.data())
def test_rows_and_heads_do_not_influence_what_others_choose(data):
    found = data.draw(policies(retriever=(*SCORED, "recency"), recent=3, refresh="chunk"))
    setting = data.draw(settings_of(st.just(found)))
    lengths = data.draw(cuts(found))
    tokens, row = setting.tokens, data.draw(st.integers(0, setting.geometry.batch - 1))
    together, alone = setting.layer(), attrs.evolve(setting, geometry=attrs.evolve(setting.geometry, batch=1)).layer()
    own = tokens.select_rows(torch.tensor([row]))
    for (_, all_rows), (_, one_row) in zip(feed(together, tokens, lengths), feed(alone, own, lengths), strict=True):
        assert torch.allclose(all_rows.values[row], one_row.values[0], rtol=1e-6, atol=1e-6)
        assert torch.allclose(all_rows.keys[row], one_row.keys[0], rtol=1e-5, atol=1e-5)


@attrs.frozen
class Forgotten(Retriever):
    """Scores in float32 by the sum of a block's keys; counts how often it is asked."""

    asked: list = attrs.field(factory=list, eq=False)

    def digest(self, blocks: Blocks, moment: Moment) -> Tensor:
        return blocks.rotated.float().sum(3, keepdim=True)

    def digest_bytes(self, tokens: int, geometry: Geometry) -> int:
        return 4 * geometry.head_dim

    def score(self, query, digests, archived, moment):
        self.asked.append(archived)
        return digests.sum((-1, -2))


@pytest.mark.parametrize(
    ("refresh", "singles", "times"),
    [
        pytest.param("chunk", 6, 6, id="every forward"),
        pytest.param("block", 8, 2, id="every block"),
        pytest.param(3, 9, 3, id="every three steps"),
        pytest.param(100, 9, 0, id="rarely"),
    ],
)
def test_a_selection_is_renewed_as_often_as_refresh_says(refresh, singles, times):
    """Single steps within one unfinished block, so that nothing is archived between them."""
    retriever = Forgotten()
    found = attrs.evolve(
        policy("archive"), retriever=retriever, sink=0, recent=4, top_k=1, block_size=4, refresh=refresh
    )
    setting = Setting(policy=found, geometry=Geometry(kv_heads=1, head_dim=4), rotary=rotary(4), seed=0, steps=64)
    found = attrs.evolve(found, recent=40)
    layer = attrs.evolve(setting, policy=found).layer()
    list(feed(layer, setting.tokens, [44, 4]))
    before = len(retriever.asked)
    assert before == 1
    asked = []
    for _count in range(singles):
        list(feed(layer, setting.tokens, [1], start=layer.num_steps))
        asked.append(layer.history.count)
    by_archiving = sum(b > a for a, b in zip([1, *asked], asked, strict=False))
    assert len(retriever.asked) - before >= times
    assert len(retriever.asked) - before <= times + by_archiving


def test_a_chunk_and_a_block_that_was_archived_always_renew_the_selection():
    retriever = Forgotten()
    found = attrs.evolve(policy("archive"), retriever=retriever, sink=0, recent=2, top_k=1, block_size=2, refresh=1000)
    setting = Setting(policy=found, geometry=Geometry(kv_heads=1, head_dim=4), rotary=rotary(4), seed=0, steps=64)
    layer = setting.layer()
    list(feed(layer, setting.tokens, [4, 1, 2, 2, 2]))
    assert len(retriever.asked) == 4
    list(feed(layer, setting.tokens, [1, 1, 1, 1], start=layer.num_steps))
    assert len(retriever.asked) == 7  # history of 11, 12 and 14 steps ends a block each, 13 does not


@given(data=st.data())
def test_between_renewals_the_mid_tokens_stay_what_they_were(data):
    found = data.draw(policies(refresh=5, recent=9, retriever=SCORED, compressor="keep", block_size=1, sink=0))
    setting = data.draw(settings_of(st.just(attrs.evolve(found, block_size=4))))
    layer = setting.layer()
    list(feed(layer, setting.tokens, [min(found.chunk_size or 9, 9)] * 3))
    selection, archived = layer.history.selection, layer.history.count
    for _ in range(4):
        list(feed(layer, setting.tokens, [1], start=layer.num_steps))
        if layer.history.count == archived and selection is not None:
            assert layer.history.selection is selection


def test_a_context_before_the_selection_that_it_needs_is_a_clear_error():
    found = policy("archive", sink=0, recent=2, block_size=2, top_k=1)
    setting = Setting(policy=found, geometry=Geometry(kv_heads=1, head_dim=4), rotary=rotary(4), seed=0)
    layer, tokens = setting.layer(), setting.tokens
    with pytest.raises(SelectionError, match="holds nothing yet; write"):
        layer.context()
    list(feed(layer, tokens, [4]))
    now = tokens.part(4, 6)
    layer.write(now.keys, now.values)
    with pytest.raises(SelectionError, match=r"call select\(query\) before context"):
        layer.context()
    with pytest.raises(SelectionError, match="Affinity chooses by the query, but layer 0 was given none"):
        layer.select()
    layer.select(now.query)
    assert layer.context().current == 2


@given(data=st.data())
def test_a_retriever_that_needs_no_query_is_served_without_one(data):
    found: Policy = data.draw(policies(retriever=("all", "none", "recency"), compressor=("keep", "drop", "mean-pool")))
    setting = data.draw(settings_of(st.just(found)))
    with_query, without = setting.layer(), setting.layer()
    start = 0
    for length in data.draw(cuts(found)):
        now = setting.tokens.part(start, start + length)
        start += length
        with_query.write(now.keys, now.values)
        with_query.select(now.query)
        without.write(now.keys, now.values)
        assert testing.difference(copied(with_query.context()), without.context()) is None
