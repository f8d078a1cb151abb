"""Sinks and realigners: which blocks are anchors, and where a context is placed."""

import attrs
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.blocks import Extent
from kvtiers.geometry import Geometry
from kvtiers.slots import Moment
from kvtiers_policies.bounded import Bounded
from kvtiers_policies.contiguous import Contiguous
from kvtiers_policies.first import FirstSteps
from kvtiers_policies.incremental import Incremental
from kvtiers_policies.no_sink import NoSink
from kvtiers_policies.original import Original

MOMENT = Moment(layer=0, step=0, geometry=Geometry(kv_heads=1, head_dim=4), device=torch.device("cpu"))


@given(start=st.integers(0, 50), steps=st.integers(1, 9), sink=st.integers(0, 50))
def test_a_block_is_an_anchor_if_it_starts_within_the_first_steps(start, steps, sink):
    assert FirstSteps().is_anchor(Extent(start, start + steps), sink) == (start < sink)
    assert not NoSink().is_anchor(Extent(start, start + steps), sink)


@given(sink=st.integers(0, 30))
def test_text_anchors_are_as_many_steps_as_asked_for(sink):
    assert FirstSteps().steps(sink) == sink
    assert NoSink().steps(sink) == 0


@st.composite
def contexts(draw):
    """A sink, chosen mid blocks (with gaps between), and the first recent step; per row and head, or shared."""
    sink = draw(st.integers(0, 8))
    spans = draw(st.lists(st.integers(1, 9), max_size=6))
    skips = [draw(st.lists(st.integers(0, 9), min_size=len(spans), max_size=len(spans))) for _ in range(2)]
    starts, ends = [], []
    for row in skips:
        at, mine = sink, []
        for skip, span in zip(row, spans, strict=True):
            mine.append(at + skip)
            at += skip + span
        starts.append(mine)
        ends.append(at)
    recent = max(ends) + draw(st.integers(0, 9))
    return {
        "sink": sink,
        "starts": torch.tensor(starts, dtype=torch.int64).reshape(2, 1, len(spans)),
        "spans": torch.tensor(spans, dtype=torch.int64).expand(2, 1, -1),
        "recent": recent,
        "total": sum(spans),
        "moment": MOMENT,
    }


@given(context=contexts(), reach=st.none() | st.integers(0, 80), known=st.none() | st.integers(1, 160))
def test_bounded_keeps_distances_and_gets_no_further_than_it_may(context, reach, known):
    context["moment"] = attrs.evolve(MOMENT, geometry=attrs.evolve(MOMENT.geometry, known_positions=known))
    placed, sink, recent = Bounded(reach=reach).place(**context), context["sink"], context["recent"]
    if reach is None:
        reach = 3072 if known is None else min(3072, known // 2)
    begins = recent + placed.recent_shift
    assert placed.sink_shift == 0
    assert begins == max(sink + context["total"], min(recent, reach))
    if recent <= reach:
        assert placed.mid_starts.tolist() == context["starts"].tolist()
    for starts, spans, firsts in zip(context["starts"], context["spans"], placed.mid_starts, strict=True):
        free = sink
        for start, span, first in zip(starts[0].tolist(), spans[0].tolist(), firsts[0].tolist(), strict=True):
            assert first == max(free, begins - (recent - start)), "as far before recent as it was, or the first free"
            free = first + span
        assert free <= begins


@given(context=contexts())
def test_gaps_moves_nothing_and_keeps_the_models_rotation(context):
    placed = Original().place(**context)
    assert not Original.rotates
    assert (placed.sink_shift, placed.recent_shift) == (0, 0)
    assert placed.mid_starts.is_floating_point()
    assert placed.mid_starts.tolist() == context["starts"].tolist()


@given(context=contexts(), realigner=st.sampled_from([Contiguous(), Incremental()]))
def test_the_spans_of_a_realigned_context_tile_the_time_axis(context, realigner):
    placed = realigner.place(**context)
    assert realigner.rotates
    for row, spans in zip(placed.mid_starts[:, 0].tolist(), context["spans"][:, 0].tolist(), strict=True):
        at = placed.sink_shift + context["sink"]
        for start, span in zip(row, spans, strict=True):
            assert start == at
            at += span
        assert context["recent"] + placed.recent_shift == at


@given(context=contexts())
def test_contiguous_holds_the_sink_and_incremental_holds_recent(context):
    assert Contiguous().place(**context).sink_shift == 0
    assert Incremental().place(**context).recent_shift == 0


@given(context=contexts())
def test_contiguous_and_incremental_agree_up_to_one_common_shift(context):
    contiguous, incremental = Contiguous().place(**context), Incremental().place(**context)
    shift = incremental.sink_shift - contiguous.sink_shift
    assert incremental.recent_shift - contiguous.recent_shift == shift
    assert (incremental.mid_starts - contiguous.mid_starts == shift).all()


def test_the_papers_own_example():
    # S0 S1 M2..M7 R8 R9 with M2 and M6 not selected: after it, S0 S1 M3 M4 M5 M7 R R lie at 2..9
    placed = Incremental().place(
        sink=2,
        starts=torch.tensor([3, 4, 5, 7]),
        spans=torch.ones(4, dtype=torch.int64),
        recent=8,
        total=4,
        moment=MOMENT,
    )
    assert placed.sink_shift == 2
    assert placed.mid_starts.tolist() == [4, 5, 6, 7]
    assert placed.recent_shift == 0
