"""Published methods for video, each against the same thing by hand: lists of unrotated tokens and where each lies.

A layer is fed random blocks; what it then attends must give the attention of the list, and that of a wrong list not.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from distances import near
from kvtiers import Geometry, Layer, Policy, Rotary, policy
from kvtiers_methods.fademem import FadeMem
from kvtiers_methods.framepack import FramePack
from strategies import attend

BLOCK, GRID, HEADS, QUERY_HEADS, WIDTH, WORDS = 3, (3, 5), 2, 4, 16, 5
FRAME = GRID[0] * GRID[1]
GEOMETRY = Geometry(
    kv_heads=HEADS, query_heads=QUERY_HEADS, head_dim=WIDTH, grid=GRID, steps_per_commit=BLOCK, causal=False
)
TURN = Rotary(
    [torch.tensor([1.0, 0.1, 0.01]), torch.tensor([0.7, 0.2]), torch.tensor([0.5, 0.3])],
    layout="interleaved",
    angle_dtype=torch.float64,
)
CLOSE, APART = 1e-5, 1e-3
Block = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, [1, heads, tokens, WIDTH], not rotated."""


def blocks(count: int) -> list[Block]:
    generator = torch.Generator().manual_seed(0)
    heads = (QUERY_HEADS, HEADS, HEADS)
    return [
        tuple(torch.randn(1, number, BLOCK * FRAME, WIDTH, generator=generator) for number in heads)
        for _ in range(count)
    ]


@attrs.frozen(eq=False)
class Listed:
    """Tokens of one KV head: unrotated keys, values, [tokens, WIDTH], and where they lie, [tokens, 3]."""

    keys: Tensor
    values: Tensor
    places: Tensor

    def __add__(self, other: "Listed") -> "Listed":
        mine, theirs = attrs.astuple(self, recurse=False), attrs.astuple(other, recurse=False)
        return Listed(*(torch.cat(pair) for pair in zip(mine, theirs, strict=True)))

    def at(self, index: Any) -> "Listed":
        return Listed(self.keys[index], self.values[index], self.places[index])

    def moved(self, time: float) -> "Listed":
        """The same, later by so many steps."""
        return attrs.evolve(self, places=self.places + torch.tensor([time, 0.0, 0.0], dtype=torch.float64))


def listed(block: Block, head: int, start: int) -> Listed:
    return Listed(block[1][0, head], block[2][0, head], GEOMETRY.positions(start, start + BLOCK))


def frames(block: Block, head: int, start: int) -> list[Listed]:
    whole = listed(block, head, start)
    return [whole.at(slice(n * FRAME, (n + 1) * FRAME)) for n in range(BLOCK)]


def fed(chosen: Policy, stream: Sequence[Block], prompt_keys: Tensor | None = None) -> Iterator[Tensor]:
    """What a layer's current block attends, block by block, after those before are history."""
    layer = Layer(policy=chosen, geometry=GEOMETRY, rotary=TURN)
    layer.prompt = None, lambda _: prompt_keys
    for number, block in enumerate(stream):
        yield current(layer, block, number * BLOCK)
        layer.commit()


def current(layer: Layer, block: Block, start: int) -> Tensor:
    queries, keys, values = block
    if not layer.policy.realigner.rotates:
        at = GEOMETRY.positions(start, start + BLOCK)
        queries, keys = TURN.rotate(queries, at), TURN.rotate(keys, at)
    layer.write(keys, values, replace=True)
    layer.select(queries)
    context = layer.context()
    seen = torch.ones(BLOCK * FRAME, context.keys.shape[2], dtype=torch.bool)
    return attend(layer.place_query(queries), context.keys, context.values, seen)


def due(block: Block, start: float, history: Sequence[Listed]) -> Tensor:
    """The attention of a block at step `start` over lists of tokens, one for each KV head, and itself."""
    found, places = [], GEOMETRY.positions(0, BLOCK)
    places[:, 0] += start
    for head, before in enumerate(history):
        every = before + attrs.evolve(listed(block, head, 0), places=places)
        queries = TURN.rotate(block[0][:, 2 * head : 2 * head + 2], places)
        keys = TURN.rotate(every.keys, every.places)
        seen = torch.ones(BLOCK * FRAME, len(keys), dtype=torch.bool)
        found.append(attend(queries, keys[None, None], every.values[None, None], seen))
    return torch.cat(found, 1)


def distance(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))


# ---------------------------------------------------------------- Deep Forcing


def deep_forcing(stream: Sequence[Block], *, kept: int, late: int, wrong: str = "") -> list[Tensor]:
    """One block is the sink, one is recent; in between lie the best tokens, two frames long."""
    found, mid = [], [listed(stream[0], head, 0).at(slice(0, 0)) for head in range(HEADS)]
    for number, block in enumerate(stream):
        start, span = number * BLOCK, -(-len(mid[0].keys) // FRAME)
        history, first = [], min(start, BLOCK) + span
        for head in range(HEADS):
            held = listed(stream[0], head, 0) if number else mid[head]
            gap = start - BLOCK - span  # mid lies right before recent; together they come right behind the sink
            held = held + mid[head].moved(BLOCK - gap) if span else held
            held = held + listed(stream[number - 1], head, first) if number > 1 else held
            history.append(held)
        found.append(due(block, first + (BLOCK if number > 1 else 0), history))
        if number < 2:
            continue
        asked = torch.cat([x[0] for x in stream[: number + 1]], 2)[:, :, -late * FRAME :].double()
        if wrong != "unrotated":
            asked = TURN.rotate(asked, GEOMETRY.positions(0, start + BLOCK)[-late * FRAME :])
        for head in range(HEADS):
            candidates = mid[head] + listed(stream[number - 1], head, start - BLOCK)
            keys = candidates.keys.double()
            keys = keys if wrong == "unrotated" else TURN.rotate(keys, candidates.places)
            liked = sum(float(1) * (keys @ query) for query in asked[0, 2 * head : 2 * head + 2].flatten(0, 1))
            if wrong == "newest":
                liked = torch.arange(float(len(keys)))
            best = sorted(sorted(range(len(keys)), key=lambda token: -float(liked[token]))[:kept])
            stays, length = candidates.at(best), -(-len(best) // FRAME)
            places = stays.places.clone()
            places[:, 0] = start - length + torch.arange(len(best)) // FRAME
            mid[head] = attrs.evolve(stays, places=places)
    return found


def test_deep_forcing_keeps_the_tokens_that_late_queries_like_best_between_sink_and_recent():
    stream = blocks(7)
    chosen = policy("deep-forcing", sink=BLOCK, recent=BLOCK, frames=2, late_frames=4)
    got, wanted = [*fed(chosen, stream)], deep_forcing(stream, kept=2 * FRAME, late=4)
    others = [deep_forcing(stream, kept=2 * FRAME, late=4, wrong=wrong) for wrong in ("newest", "unrotated")]
    others.append(deep_forcing(stream, kept=2 * FRAME, late=3))
    near("deep-forcing", *(distance(made, wanted) for made in (got, *others)), apart=APART)


def test_a_layer_keeps_the_queries_of_as_many_frames_as_deep_forcing_asks():
    for late in (1, 4):
        chosen = policy("deep-forcing", late_frames=late)
        layer = Layer(policy=chosen, geometry=GEOMETRY, rotary=TURN)
        for number, block in enumerate(blocks(3)):
            current(layer, block, number * BLOCK)
            layer.commit()
        assert layer.watched.latest.shape[2] == late * FRAME
        more = policy("deep-forcing", late_frames=late + 1).bound_bytes(GEOMETRY) - chosen.bound_bytes(GEOMETRY)
        assert more == 2 * FRAME * QUERY_HEADS * WIDTH * 4


# ---------------------------------------------------------------- positions: Infinity-RoPE, Rolling Forcing


def windowed(stream: Sequence[Block], recent: int, place: Any) -> list[Tensor]:
    """One block is the sink, `recent` blocks stay; `place` gives the starts of sink, recent and current."""
    found = []
    for number, block in enumerate(stream):
        first = max(1, number - recent)
        anchor, window, now = place(first * BLOCK, number * BLOCK)
        history = []
        for head in range(HEADS):
            held = listed(stream[0], head, anchor) if number else listed(block, head, 0).at(slice(0, 0))
            for back in range(first, number):
                held = held + listed(stream[back], head, window + (back - first) * BLOCK)
            history.append(held)
        found.append(due(block, now, history))
    return found


def test_infinity_rope_lets_positions_go_on_until_the_horizon_and_no_further():
    stream, onset = blocks(9), 9

    def relative(first: int, now: int) -> tuple[int, int, int]:
        back = max(0, first - onset)
        return 0, first - back, now - back

    chosen = policy("infinity-rope", onset=onset)
    got, wanted = [*fed(chosen, stream)], windowed(stream, 1, relative)
    own = windowed(stream, 1, lambda first, now: (0, first, now))
    closed_up = windowed(stream, 1, lambda first, now: (0, BLOCK, BLOCK + now - first))
    near("infinity-rope", *(distance(made, wanted) for made in (got, own, closed_up)), apart=APART)


def test_a_kv_flush_leaves_the_sink_and_the_last_block():
    stream = blocks(8)
    layer = Layer(policy=policy("infinity-rope", recent=9), geometry=GEOMETRY, rotary=TURN)
    for number, block in enumerate(stream[:-1]):
        current(layer, block, number * BLOCK)
        layer.commit()
    layer.compact(recent=1)
    got = current(layer, stream[-1], 7 * BLOCK)
    history = [listed(stream[0], head, 0) + listed(stream[6], head, 15) for head in range(HEADS)]
    wanted = due(stream[-1], 18, history)
    assert (got - wanted).abs().max() < CLOSE
    more = [listed(stream[0], head, 0) + listed(stream[5], head, 15) for head in range(HEADS)]
    assert (due(stream[-1], 18, more) - wanted).abs().max() > APART


def test_rolling_forcing_sees_the_anchor_turned_to_right_before_the_window():
    """As its authors do it: recent and current where they are, the anchor's keys turned to three frames before."""
    stream = blocks(9)

    def turned(first: int, now: int) -> tuple[int, int, int]:
        return first - BLOCK, first, now

    got, wanted = [*fed(policy("rolling-forcing", recent=6), stream)], windowed(stream, 2, turned)
    own = windowed(stream, 2, lambda first, now: (0, first, now))
    longlive = [*fed(policy("longlive"), stream)]
    near("longlive", distance(longlive, own), distance(longlive, wanted), apart=APART)
    near("rolling-forcing", *(distance(made, wanted) for made in (got, own)), apart=APART)


# ---------------------------------------------------------------- FramePack


def pooled(frame: Listed, high: int, wide: int) -> Listed:
    """Means over `high` x `wide` tokens, fewer at the edges."""

    def mean(x: Tensor) -> Tensor:
        image = x.double().mT.unflatten(1, GRID)
        return avg_pool2d(image[None], (high, wide), ceil_mode=True)[0].flatten(1).mT

    return Listed(mean(frame.keys).float(), mean(frame.values).float(), mean(frame.places))


def framepack(stream: Sequence[Block], each: int, kernels: Sequence[tuple[int, int]]) -> list[Tensor]:
    """One block is recent; of `each` frames before, those of the first of `kernels`, and so on."""
    found = []
    for number, block in enumerate(stream):
        start, history = number * BLOCK, []
        for head in range(HEADS):
            old = [frame for n in range(max(0, number - 1)) for frame in frames(stream[n], head, n * BLOCK)]
            held = listed(block, head, 0).at(slice(0, 0))
            for age, frame in [*enumerate(reversed(old))][: each * len(kernels)]:
                held = pooled(frame, *kernels[age // each]) + held
            history.append(held + listed(stream[number - 1], head, start - BLOCK) if number else held)
        found.append(due(block, start, history))
    return found


def test_framepack_pools_frames_harder_from_level_to_level():
    stream, kernels = blocks(8), [(1, 2), (2, 2), (2, 4), (4, 4)]
    chosen = policy("framepack", frames=2, levels=4)
    got, wanted = [*fed(chosen, stream)], framepack(stream, 2, kernels)
    others = [framepack(stream, 2, kernels[::-1]), framepack(stream, 2, [(2, 1), *kernels[1:]])]
    others.append(framepack(stream, 3, kernels))
    near("framepack", *(distance(made, wanted) for made in (got, *others)), apart=APART)
    where = [*fed(attrs.evolve(chosen, realigner=policy("full").realigner), stream)]
    assert distance(where, wanted) < CLOSE, "keys that are rotated already are not pooled as they were before"


def test_the_levels_of_framepack_fall_geometrically():
    geometry = attrs.evolve(GEOMETRY, grid=(30, 52))
    assert FramePack(frames=1, levels=5).mid_tokens(geometry) == 780 + 390 + 195 + 8 * 13 + 8 * 7
    assert FramePack(frames=3, levels=20).mid_tokens(geometry) < 3 * 1560 + 3 * 20 * 4


# ---------------------------------------------------------------- FadeMem


def fademem(stream: Sequence[Block], slots: int, horizon: int, power: float, *, anchor: bool = True) -> list[Tensor]:
    """Nothing is recent: frames come into a bank a block late, and the bank is laid out before the current block."""
    bank: list[dict[str, Any]] = []
    found = []
    for number, block in enumerate(stream):
        now = number * BLOCK
        for n in range(BLOCK if number else 0):
            frame = [frames(stream[number - 1], head, 0)[n] for head in range(HEADS)]
            bank.append({"center": now - BLOCK + n, "span": 1, "kv": frame})
            if len(bank) <= slots:
                continue
            ages = [(now - entry["center"]) ** power for entry in bank]
            gaps = [abs(a - b) for a, b in pairwise(ages)][:-1]
            i = gaps.index(min(gaps))
            a, b = bank[i], bank[i + 1]
            total = a["span"] + b["span"]
            if anchor and i == 0:
                one = {**a, "span": total}
            else:
                wa, wb = a["span"] ** 0.5, b["span"] ** 0.5
                mixed = [
                    attrs.evolve(
                        x,
                        keys=(wa * x.keys.double() + wb * y.keys.double()).div(wa + wb).float(),
                        values=(wa * x.values.double() + wb * y.values.double()).div(wa + wb).float(),
                    )
                    for x, y in zip(a["kv"], b["kv"], strict=True)
                ]
                center = round((a["span"] * a["center"] + b["span"] * b["center"]) / total)
                one = {"center": center, "span": total, "kv": mixed}
            bank[i : i + 2] = [one]
        places = [entry["center"] for entry in bank]
        if now >= horizon and len(bank) == slots:
            places[0] = now - horizon
            places[-BLOCK:] = [now - 3, now - 2, now - 1]
            taken = horizon
            far = range(1, slots - BLOCK)
            for order, i in enumerate(far):
                own = min(max(now - bank[i]["center"], BLOCK + 1), horizon - 1)
                free = range(BLOCK + 1 + len(far) - order - 1, taken)
                taken = min(free, key=lambda gap: abs(gap**power - own**power))
                places[i] = now - taken
        history = []
        for head in range(HEADS):
            held = listed(block, head, 0).at(slice(0, 0))
            for entry, place in zip(bank, places, strict=True):
                still = entry["kv"][head]
                spot = still.places.clone()
                spot[:, 0] = place
                held = held + attrs.evolve(still, places=spot)
            history.append(held)
        found.append(due(block, now, history))
    return found


def test_fademem_merges_old_neighbours_and_places_them_within_the_horizon():
    stream = blocks(14)
    chosen = policy("fademem", frames=8, horizon=12)
    got, wanted = [*fed(chosen, stream)], fademem(stream, 8, 12, 0.3)
    others = [fademem(stream, 8, 12, 0.3, anchor=False), fademem(stream, 8, 12, 1.0), fademem(stream, 8, 13, 0.3)]
    near("fademem", *(distance(made, wanted) for made in (got, *others)), apart=APART)
    where = [*fed(attrs.evolve(chosen, realigner=policy("full").realigner), stream)]
    assert distance(where, wanted) < CLOSE, "keys that are rotated already are not merged as they were before"


def test_fademem_needs_a_place_for_every_frame():
    with pytest.raises(ValueError, match="'horizon' must leave a step to each of 'frames' = 12 frames, got 11"):
        FadeMem(horizon=11)


# ---------------------------------------------------------------- MemFlow


def memflow(stream: Sequence[Block], bank_size: int, prompt: Tensor | None, *, place: bool = False) -> list[Tensor]:
    """One block is the sink, two are recent, and the bank holds the first frames of some that left. place: close up."""
    found: list[Tensor] = []
    bank: list[int] = []
    for number, block in enumerate(stream):
        gone = number - 3
        if gone > 0:
            if len(bank) == bank_size:
                shares = torch.zeros(len(bank))
                for head in range(QUERY_HEADS):
                    held = [frames(stream[n], head // 2, n * BLOCK)[0] for n in bank]
                    keys = torch.cat([one.keys if place else TURN.rotate(one.keys, one.places) for one in held])
                    for word in range(WORDS if prompt is not None else 0):
                        share = (keys @ prompt[0, head, word] / WIDTH**0.5).softmax(0)
                        shares += share.unflatten(0, (len(bank), FRAME)).sum(1)
                worst = min(range(len(bank)), key=lambda n: float(shares[n]))
                bank.pop(worst)
            bank.append(gone)
        history, first = [], max(1, number - 2)
        shift = BLOCK + len(bank) - first * BLOCK if place else 0
        for head in range(HEADS):
            held = listed(stream[0], head, 0) if number else listed(block, head, 0).at(slice(0, 0))
            for rank, n in enumerate(bank):
                frame = frames(stream[n], head, n * BLOCK)[0]
                held = held + (frame.moved(BLOCK + rank - n * BLOCK) if place else frame)
            for n in range(first, number):
                held = held + listed(stream[n], head, n * BLOCK + shift)
            history.append(held)
        found.append(due(block, number * BLOCK + (shift if number > 2 else 0), history))
    return found


@pytest.mark.parametrize("realigner", ["original", "contiguous"])
def test_memflow_keeps_the_first_frames_that_the_prompt_attends_most(realigner):
    stream, place = blocks(11), realigner == "contiguous"
    prompt = 2 * torch.randn(1, QUERY_HEADS, WORDS, WIDTH, generator=torch.Generator().manual_seed(1))
    chosen = policy("memflow", realigner=realigner)
    got, wanted = [*fed(chosen, stream, prompt)], memflow(stream, 3, prompt, place=place)
    newest = memflow(stream, 3, None, place=place)
    negated = memflow(stream, 3, -prompt, place=place)
    near("memflow", *(distance(made, wanted) for made in (got, newest, negated)), apart=APART)
    assert distance([*fed(chosen, stream)], newest) < CLOSE, "without a prompt the newest frames stay"
