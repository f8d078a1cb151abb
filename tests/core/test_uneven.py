"""Blocks of different length in one video: archived, chosen and placed as if nothing had been padded."""

from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvtiers.accounting import bytes_in, held_by
from kvtiers.blocks import Context, run_of
from kvtiers.cache import TieredCache
from kvtiers.errors import GeometryError
from kvtiers.geometry import Geometry
from kvtiers.policy import Policy
from kvtiers.presets import policy
from kvtiers.rotary import Rotary
from kvtiers.store import LayerStore
from kvtiers_policies.affinity import Affinity
from strategies import attend, attend_context, copied, fewer

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


def play(store: LayerStore, film: Film, numbers: range) -> list[Context]:
    """Denoise once and commit; the context of each block's last draft."""
    seen = []
    for number in numbers:
        for _ in range(2):
            store.draft(film.keys[number], film.values[number])
            store.select(film.query[number])
        seen.append(copied(store.context()))
        store.settle()
    return seen


def at(film: Film, number: int, first: int | None = None) -> Tensor:
    """The positions of a block's tokens, when it begins at `first`."""
    start = film.first(number) if first is None else first
    return geometry().positions(start, start + film.lengths[number])


def by_hand(store: LayerStore, film: Film, current: int) -> Tensor:
    """What the current block attends, of plain tensors: sink, chosen blocks and recent, each as long as it is."""
    turn, policy = rotary(), store.policy
    assert store.starts.data is not None or store.selection is None
    anchors = [n for n in range(current) if film.first(n) < store.timeline.sink]
    recent = [n for n in range(current + 1) if film.first(n) >= store.aged_to and n not in anchors]
    rows = []
    for row in range(2):
        heads = []
        for head in range(2):
            mid = []
            if store.selection is not None and store.starts.data is not None:
                starts = store.starts.data[store.selection.chosen[row, head]].tolist()
                mid = [film.number(first) for first in starts]
            where, time = {}, 0
            for number in [*anchors, *mid]:
                where[number], time = time, time + film.lengths[number]
            everything = store.archived == len(mid)
            if not everything:  # room is left for longer blocks that might have been chosen
                spans = sorted(film.lengths[film.number(first)] for first in store.starts.data.tolist())
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
    realigner=st.sampled_from(["gaps", "anchored", "incremental"]),
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
    store = LayerStore(found, geometry(), rotary=turn)
    for number in range(len(lengths)):
        (context,) = play_current(store, given, number)
        query = store.place_query(given.query[number])
        assert (attend_context(query, context) - by_hand(store, film, number)).abs().max() < 1e-5
        assert context.keys.shape[2] <= (found.bound(geometry()) or 0)
        store.settle()
    assert bytes_in(held_by([store]), "device") <= (found.bound_bytes(geometry(), store.archived) or 0)
    assert sum(store.census().values()) == sum(lengths)


def play_current(store: LayerStore, film: Film, number: int) -> list[Context]:
    """The context of a block that is not committed yet."""
    store.draft(film.keys[number], film.values[number])
    store.select(film.query[number])
    return [store.context()]


def compressed(**changes: Any) -> Policy:
    settings: dict[str, Any] = {"sink": 2, "recent": 3, "top_k": 2, "fringe": 2, "recall": "full"}
    return policy("archive", **{**settings, "compressor": ("mean-pool", {"ratio": 5}), **changes})


@pytest.mark.parametrize(
    "found",
    [
        compressed(),
        compressed(fringe=0, recall="compressed"),
        compressed(compressor=("top-tokens", {"keep": 9})),
        compressed(archive="host"),
        compressed(archive="disk"),
    ],
    ids=["pooled fringe", "pooled", "some tokens", "host", "disk"],
)
@torch.no_grad()
def test_padding_is_masked_wherever_blocks_lie_and_a_shorter_block_never_shows_zeros(found: Policy) -> None:
    film = Film.of([3, 1, 4, 2, 1, 3, 4, 1, 2, 4])
    store = LayerStore(found, geometry(), rotary=rotary())
    hidden = 0
    for context in play(store, film, range(10)):
        zeros = (context.values == 0).all(-1)
        if context.mask is None:
            assert not zeros.any()
        else:
            assert context.mask.shape == (2, 2, 1, context.keys.shape[2])
            assert torch.equal(zeros, ~context.mask[:, :, 0])
            hidden += int(zeros.sum())
    assert hidden > 0


@torch.no_grad()
def test_blocks_that_happen_to_be_of_one_length_need_no_mask_and_attend_like_an_even_video() -> None:
    film = Film.of([LONGEST] * 8)
    found = policy("archive", sink=4, recent=4, top_k=2)
    uneven = LayerStore(found, geometry(), rotary=rotary())
    even = LayerStore(found, attrs.evolve(geometry(), even=True), rotary=rotary())
    for mine, theirs in zip(play(uneven, film, range(8)), play(even, film, range(8)), strict=True):
        assert mine.mask is None
        assert torch.equal(mine.values, theirs.values)
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-6)


@torch.no_grad()
def test_a_fork_a_saved_video_and_chosen_rows_go_on_alike(tmp_path: Any) -> None:
    film = Film.of([3, 1, 4, 2, 1, 3, 4, 1, 2, 4])
    found = compressed()
    cache = TieredCache(found, [geometry()], rotaries=[rotary()])

    def go_on(held: TieredCache, numbers: range, rows: Tensor) -> list[Context]:
        seen = []
        for number in numbers:
            held.draft(0, film.keys[number][rows], film.values[number][rows])
            held.select(0, film.query[number][rows])
            seen.append(copied(held.context(0)))
            held.settle()
        return seen

    both, turned = torch.tensor([0, 1]), torch.tensor([1, 0])
    go_on(cache, range(7), both)
    cache.save(tmp_path / "film")
    fork = cache.fork()
    loaded = TieredCache(found, [geometry()], rotaries=[rotary()])
    loaded.load(tmp_path / "film")
    swapped = cache.fork()
    swapped.take(turned)
    wanted = go_on(cache, range(7, 10), both)
    for held, rows in ((fork, both), (loaded, both), (swapped, turned)):
        for mine, theirs in zip(go_on(held, range(7, 10), rows), wanted, strict=True):
            if rows is both:
                assert torch.equal(mine.keys, theirs.keys)
            assert mine.mask is not None
            assert theirs.mask is not None
            assert torch.equal(mine.mask, theirs.mask[rows])
            assert torch.equal(mine.origins.expand(2, 2, -1, 3), theirs.origins.expand(2, 2, -1, 3)[rows])


@torch.no_grad()
def test_another_retriever_digests_every_block_at_its_own_length() -> None:
    film = Film.of([3, 1, 4, 2, 1, 3, 4, 1])
    one = ("affinity", {"heads": "per-kv", "normalise": "softmax"})
    start = policy("archive", sink=2, recent=3, top_k=2, retriever="recency")
    wanted = LayerStore(policy(start, retriever=one), geometry(), rotary=rotary())
    play(wanted, film, range(8))
    cache = TieredCache(start, [geometry()], rotaries=[rotary()])
    for number in range(8):
        cache.draft(0, film.keys[number], film.values[number])
        cache.select(0, film.query[number])
        cache.settle()
    cache.swap(policy(start, retriever=one))
    mine, theirs = cache.stores()[0].digests.data, wanted.digests.data
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
        ("affinity", {"heads": "per-kv", "combine": "max", "digest_tokens": 4, "digest_bits": 3}),
        ("page-bounds", {"digest_tokens": 4}),
    ],
    ids=["best share", "shares", "best", "sum", "best of three bits", "bounds"],
)
@torch.no_grad()
def test_a_shorter_block_is_scored_by_its_own_digests_alone(retriever: Any) -> None:
    film = Film.of([1, 4, 2, 1, 3, 2])
    found = policy("archive", sink=0, recent=0, top_k=2, retriever=retriever, realigner="anchored")
    store = LayerStore(found, geometry(), rotary=rotary())
    play(store, film, range(6))
    turn, judge = rotary(), found.retriever
    query = turn.rotate(film.query[5], at(film, 5))
    got = judge.score(query, store.digests.data, 6)
    for block in range(6):
        if getattr(judge, "normalise", "") == "softmax":
            continue  # there a block's score depends on the others
        keys = turn.rotate(film.keys[block], at(film, block))
        alone = judge.digest(
            run_of(keys, film.values[block], count=1, positions=at(film, block), first=0, span=film.lengths[block])
        )
        assert torch.allclose(judge.score(query, alone, 1)[..., 0], got[..., block], atol=1e-4)
    assert got.isfinite().all()
    padded = torch.nn.functional.pad(store.digests.data, (0, 0, 0, 3))
    assert torch.allclose(judge.score(query, padded, 6), got, atol=1e-5)
    if getattr(judge, "normalise", "") == "softmax" and getattr(judge, "combine", "") == "sum":
        assert torch.allclose(got.sum(-1), torch.tensor(2.0 * query.shape[2]), atol=1e-3)


@torch.no_grad()
def test_a_retriever_that_makes_more_digests_than_it_says_is_refused_and_nothing_is_lost() -> None:
    @attrs.frozen(kw_only=True)
    class Chatty(Affinity):
        def digest_floats(self, tokens: int, head_dim: int) -> int:
            return head_dim

    film = Film.of([1, 4, 1])
    found = policy("archive", sink=0, recent=0, retriever=Chatty(digest_tokens=6, normalise="softmax"))
    store = LayerStore(found, geometry(), rotary=rotary())
    play(store, film, range(1))
    with pytest.raises(GeometryError, match=r"Chatty made 4 digests of a block of 24 tokens, and .* says 1"):
        play(store, film, range(1, 2))
    assert (store.archived, store.settled, store.seen) == (1, 1, 5)
