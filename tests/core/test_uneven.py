"""Blocks of different length in one video: archived, chosen and placed as if nothing had been padded."""

from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvtiers.accounting import bytes_in, memory_usage_of
from kvtiers.blocks import Context, run_of
from kvtiers.cache import TieredCache
from kvtiers.errors import GeometryError
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.policy import Policy
from kvtiers.presets import policy
from kvtiers.rotary import Rotary
from kvtiers.trials import Trial
from kvtiers_policies.affinity import Affinity
from strategies import attend, copied, fewer

GRID, TOKENS = (2, 3), 6
LONGEST = 4


@attrs.frozen(eq=False, kw_only=True)
class Film:
    """Blocks of random queries, keys and values, and where each begins."""

    lengths: list[int]
    query: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def of(lengths: list[int], *, rows: int = 2, seed: int = 0) -> "Film":
        random = torch.Generator().manual_seed(seed)

        def draw(heads: int, width: int) -> list[Tensor]:
            return [torch.randn(rows, heads, n * TOKENS, width, generator=random) for n in lengths]

        return Film(lengths=lengths, query=draw(4, 12), keys=draw(2, 12), values=draw(2, 5))

    def first(self, number: int) -> int:
        return sum(self.lengths[:number])

    def number(self, first: int) -> int:
        return next(n for n in range(len(self.lengths)) if self.first(n) == first)


def rotary() -> Rotary:
    return Rotary(
        [torch.tensor([1.0, 0.1]), torch.tensor([0.7, 0.1]), torch.tensor([0.5, 0.2])],
        layout="interleaved",
        angle_dtype=torch.float64,
    )


def geometry(rows: int = 2, **changes: Any) -> Geometry:
    settings: dict[str, Any] = {"kv_heads": 2, "query_heads": 4, "head_dim": 12, "value_dim": 5, "grid": GRID}
    return Geometry(**settings, batch=rows, steps_per_commit=LONGEST, even=False, causal=False, **changes)


def kept(context: Context) -> Context:
    """`copied`, with its bias: later writes do not change it."""
    return attrs.evolve(copied(context), bias=None if context.bias is None else context.bias.clone())


def seen(context: Context) -> Tensor:
    """[batch, kv_heads, tokens]: which tokens are there at all; those that only fill a block up are not."""
    assert context.mask is None
    if context.bias is None:
        return torch.ones(context.keys.shape[:3], dtype=torch.bool)
    assert set(context.bias.unique().tolist()) <= {0.0, -torch.inf}
    return context.bias == 0


def play(layer: Layer, film: Film, numbers: range) -> list[Context]:
    """Denoise once and commit; the context of each block's last draft."""
    contexts = []
    for number in numbers:
        for _ in range(2):
            layer.write(film.keys[number], film.values[number], replace=True)
            layer.select(film.query[number])
        contexts.append(kept(layer.context()))
        layer.commit()
    return contexts


def at(film: Film, number: int, first: int | None = None) -> Tensor:
    """The positions of a block's tokens, when it begins at `first`."""
    start = film.first(number) if first is None else first
    return geometry().positions(start, start + film.lengths[number])


def by_hand(layer: Layer, film: Film, current: int) -> Tensor:
    """What the current block attends, of plain tensors: sink, chosen blocks and recent, each as long as it is."""
    turn, policy = rotary(), layer.policy
    assert layer.history.starts is not None or layer.history.selection is None
    anchors = [n for n in range(current) if film.first(n) < layer.timeline.sink]
    recent = [n for n in range(current + 1) if film.first(n) >= layer.recent_start and n not in anchors]
    rows = []
    for row in range(2):
        heads = []
        for head in range(2):
            mid = []
            if layer.history.selection is not None and layer.history.starts is not None:
                starts = layer.history.starts[layer.history.selection.chosen[row, head]].tolist()
                mid = [film.number(first) for first in starts]
            where, time = {}, 0
            for number in [*anchors, *mid]:
                where[number], time = time, time + film.lengths[number]
            everything = layer.history.count == len(mid)
            if not everything:  # room is left for longer blocks that might have been chosen
                spans = sorted(film.lengths[film.number(first)] for first in layer.history.starts.tolist())
                time = sum(film.lengths[n] for n in anchors) + sum(spans[len(spans) - len(mid) :])
            for number in recent:
                where[number], time = time, time + film.lengths[number]
            if not policy.realigner.rotates:
                where = {number: film.first(number) for number in where}
            parts = [
                (
                    turn.rotate(film.keys[n][row : row + 1, head : head + 1].double(), at(film, n, first)),
                    film.values[n][row : row + 1, head : head + 1],
                )
                for n, first in where.items()
            ]
            query = film.query[current][row : row + 1, 2 * head : 2 * head + 2].double()
            query = turn.rotate(query, at(film, current, where[current]))
            keys, values = (torch.cat([part[i] for part in parts], 2) for i in (0, 1))
            heads.append(attend(query, keys, values, torch.ones(1, dtype=torch.bool)))
        rows.append(torch.cat(heads, 1))
    return torch.cat(rows)


lengths_of = st.lists(st.integers(1, LONGEST), min_size=3, max_size=9)


@fewer
@given(
    lengths=lengths_of,
    sink=st.integers(0, 3),
    recent=st.integers(0, 5),
    top_k=st.integers(1, 4),
    realigner=st.sampled_from(["original", "contiguous", "incremental"]),
    retriever=st.sampled_from([("affinity", {"heads": "per-kv"}), "recency"]),
)
def test_a_context_is_what_it_would_be_without_padding(
    lengths: list[int], sink: int, recent: int, top_k: int, realigner: str, retriever: Any
) -> None:
    film = Film.of(lengths)
    found = policy("archive", sink=sink, recent=recent, top_k=top_k, realigner=realigner, retriever=retriever)
    turn = rotary()
    given = film
    if not found.realigner.rotates:
        given = attrs.evolve(
            film,
            query=[turn.rotate(q, at(film, n)) for n, q in enumerate(film.query)],
            keys=[turn.rotate(k, at(film, n)) for n, k in enumerate(film.keys)],
        )
    layer = Layer(policy=found, geometry=geometry(), rotary=turn)
    for number in range(len(lengths)):
        (context,) = play_current(layer, given, number)
        query = layer.place_query(given.query[number])
        got = attend(query, context.keys, context.values, seen(context)[:, :, None])
        assert (got - by_hand(layer, film, number)).abs().max() < 1e-5
        assert context.keys.shape[2] <= (found.bound(geometry()) or 0)
        layer.commit()
    assert bytes_in(memory_usage_of([layer]), "device") <= (found.bound_bytes(geometry(), layer.history.count) or 0)
    assert sum(layer.tier_counts().values()) == sum(lengths)


def play_current(layer: Layer, film: Film, number: int) -> list[Context]:
    """The context of a block that is not committed yet."""
    layer.write(film.keys[number], film.values[number], replace=True)
    layer.select(film.query[number])
    return [layer.context()]


def compressed(**changes: Any) -> Policy:
    settings: dict[str, Any] = {"sink": 2, "recent": 3, "top_k": 2, "top_k_compressed": 2, "attend": "full"}
    return policy("archive", **{**settings, "compressor": ("mean-pool", {"ratio": 5}), **changes})


@pytest.mark.parametrize(
    "found",
    [
        compressed(),
        compressed(top_k_compressed=0, attend="compressed"),
        compressed(compressor=("top-tokens", {"keep": 9})),
        compressed(archive="host"),
        compressed(archive="disk"),
    ],
    ids=["pooled compressed", "pooled", "some tokens", "host", "disk"],
)
@torch.no_grad()
def test_padding_is_masked_wherever_blocks_lie_and_a_shorter_block_never_shows_zeros(found: Policy) -> None:
    film = Film.of([3, 1, 4, 2, 1, 3, 4, 1, 2, 4])
    layer = Layer(policy=found, geometry=geometry(), rotary=rotary())
    hidden = 0
    for context in play(layer, film, range(10)):
        zeros = (context.values == 0).all(-1)
        assert torch.equal(zeros, ~seen(context))
        hidden += int(zeros.sum())
    assert hidden > 0


@torch.no_grad()
def test_blocks_that_happen_to_be_of_one_length_need_no_mask_and_attend_like_an_even_video() -> None:
    film = Film.of([LONGEST] * 8)
    found = policy("archive", sink=4, recent=4, top_k=2)
    uneven = Layer(policy=found, geometry=geometry(), rotary=rotary())
    even = Layer(policy=found, geometry=attrs.evolve(geometry(), even=True), rotary=rotary())
    for mine, theirs in zip(play(uneven, film, range(8)), play(even, film, range(8)), strict=True):
        assert seen(mine).all()
        assert mine.logit_bias(4, torch.float32) is None
        assert torch.equal(mine.values, theirs.values)
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-6)


@torch.no_grad()
def test_a_fork_a_saved_video_and_chosen_rows_go_on_alike(tmp_path: Any) -> None:
    film = Film.of([3, 1, 4, 2, 1, 3, 4, 1, 2, 4])
    found = compressed()
    cache = TieredCache(found, [geometry()], rotaries=[rotary()])

    def go_on(held: TieredCache, numbers: range, rows: Tensor) -> list[Context]:
        contexts = []
        for number in numbers:
            held.write(0, film.keys[number][rows], film.values[number][rows], replace=True)
            held.select(0, film.query[number][rows])
            contexts.append(kept(held.context(0)))
            held.commit()
        return contexts

    both, turned = torch.tensor([0, 1]), torch.tensor([1, 0])
    go_on(cache, range(7), both)
    cache.save(tmp_path / "film")
    fork = cache.fork()
    loaded = TieredCache(found, [geometry()], rotaries=[rotary()])
    loaded.load(tmp_path / "film")
    swapped = cache.fork()
    swapped.select_rows(turned)
    wanted = go_on(cache, range(7, 10), both)
    for held, rows in ((fork, both), (loaded, both), (swapped, turned)):
        for mine, theirs in zip(go_on(held, range(7, 10), rows), wanted, strict=True):
            if rows is both:
                assert torch.equal(mine.keys, theirs.keys)
            assert mine.bias is not None
            assert theirs.bias is not None
            assert not seen(theirs).all()
            assert torch.equal(mine.bias, theirs.bias[rows])
            assert torch.equal(mine.origins.expand(2, 2, -1, 3), theirs.origins.expand(2, 2, -1, 3)[rows])


@torch.no_grad()
def test_another_retriever_digests_every_block_at_its_own_length() -> None:
    film = Film.of([3, 1, 4, 2, 1, 3, 4, 1])
    one = ("affinity", {"heads": "per-kv", "normalise": "softmax"})
    start = policy("archive", sink=2, recent=3, top_k=2, retriever="recency")
    wanted = Layer(policy=policy(start, retriever=one), geometry=geometry(), rotary=rotary())
    play(wanted, film, range(8))
    cache = TieredCache(start, [geometry()], rotaries=[rotary()])
    for number in range(8):
        cache.write(0, film.keys[number], film.values[number], replace=True)
        cache.select(0, film.query[number])
        cache.commit()
    cache.swap(policy(start, retriever=one))
    mine, theirs = cache.every_layer()[0].history.digests.data, wanted.history.digests.data
    assert mine is not None
    assert theirs is not None
    assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "retriever",
    [
        ("affinity", {"heads": "per-kv", "normalise": "softmax", "combine": "max", "digest_tokens": 4}),
        ("affinity", {"heads": "per-kv", "normalise": "softmax", "digest_tokens": 4}),
        ("affinity", {"heads": "per-kv", "combine": "max", "digest_tokens": 4}),
        ("affinity", {"heads": "per-kv", "digest_tokens": 4}),
        ("page-bounds", {"digest_tokens": 4}),
    ],
    ids=["best share", "shares", "best", "sum", "bounds"],
)
@torch.no_grad()
def test_a_shorter_block_is_scored_by_its_own_digests_alone(retriever: Any) -> None:
    film = Film.of([1, 4, 2, 1, 3, 2])
    found = policy("archive", sink=0, recent=0, top_k=2, retriever=retriever, realigner="contiguous")
    layer = Layer(policy=found, geometry=geometry(), rotary=rotary())
    play(layer, film, range(6))
    turn, judge = rotary(), found.retriever
    query, moment = turn.rotate(film.query[5], at(film, 5)), layer.moment()
    assert moment.blocks_differ
    got = judge.score(query, layer.history.digests.data, 6, moment)
    for block in range(6):
        if getattr(judge, "normalise", "") == "softmax":
            continue  # there a block's score depends on the others
        keys = turn.rotate(film.keys[block], at(film, block))
        alone = judge.digest(
            run_of(keys, film.values[block], count=1, positions=at(film, block), first=0, span=film.lengths[block]),
            moment,
        )
        assert torch.allclose(judge.score(query, alone, 1, moment)[..., 0], got[..., block], atol=1e-4)
    assert got.isfinite().all()
    padded = torch.nn.functional.pad(layer.history.digests.data, (0, 0, 0, 3))
    assert torch.allclose(judge.score(query, padded, 6, moment), got, atol=1e-5)
    if getattr(judge, "normalise", "") == "softmax" and getattr(judge, "combine", "") == "sum":
        assert torch.allclose(got.sum(-1), torch.tensor(2.0 * query.shape[2]), atol=1e-3)


@torch.no_grad()
def test_a_retriever_that_makes_more_digests_than_it_says_is_refused_and_nothing_is_lost() -> None:
    @attrs.frozen(kw_only=True)
    class Chatty(Affinity):
        def digest_bytes(self, tokens: int, geometry: Geometry) -> int:
            return 4 * geometry.head_dim

    film = Film.of([1, 4, 1])
    found = policy("archive", sink=0, recent=0, retriever=Chatty(digest_tokens=6, normalise="softmax"))
    layer = Layer(policy=found, geometry=geometry(), rotary=rotary())
    play(layer, film, range(1))
    with pytest.raises(
        GeometryError, match=r"Chatty.digest\(\) made 4 digests of 48 bytes of a block of 24 tokens, and .* room for 1"
    ):
        play(layer, film, range(1, 2))
    assert (layer.history.count, layer.committed_steps, layer.num_steps) == (1, 1, 5)


def test_padding_of_short_blocks_counts_in_the_bound_where_all_are_attended() -> None:
    chosen = policy("archive", sink=0, recent=4, retriever="all", realigner="contiguous", archive="host")
    geometry = Geometry(kv_heads=1, head_dim=16, grid=(2,), steps_per_commit=4, even=False, causal=False)
    turns = Rotary([torch.tensor([1.0, 0.1, 0.01]), torch.tensor([0.7, 0.2])], layout="interleaved")
    trial = Trial.start(chosen, geometry, turns, seed=0, steps=40)
    for nth, steps in enumerate((1, 4, 2, 2, 4, 3, 3, 1, 1, 1, 1, 4, 4)):
        if nth == 4:
            trial.compact(0)
        trial.feed(steps)
        layer, limit = trial.layer, chosen.bound_bytes(geometry, trial.layer.history.count, steps=trial.num_steps)
        held = sum(one.bytes for one in memory_usage_of([layer]) if one.location == "device")
        assert limit is not None
        assert held <= limit, f"after {trial.num_steps} steps"
