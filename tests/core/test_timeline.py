"""The timeline: which blocks exist and which tier each is in, against a simulation that moves one step at a time."""

import itertools

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.blocks import Extent
from kvtiers.timeline import Timeline

text = st.builds(
    Timeline,
    sink=st.integers(0, 7),
    recent=st.none() | st.integers(0, 12),
    block_size=st.integers(1, 6),
)
seen_counts = st.integers(0, 60)


@st.composite
def given_grids(draw: st.DrawFn) -> Timeline:
    """A timeline whose blocks are given, as for video: some of the first blocks are anchors."""
    ends = [0]
    for length in draw(st.lists(st.integers(1, 5), min_size=1, max_size=12)):
        ends.append(ends[-1] + length)
    sink = draw(st.sampled_from(ends[:4]))
    return Timeline(sink=sink, recent=draw(st.none() | st.integers(0, 12)), block_size=1, cuts=tuple(ends[1:]))


def simulated(timeline: Timeline, seen: int) -> dict[int, str]:
    """The tier of each step by the words of the design: a block on the absolute grid is mid once its end is at least
    `recent` steps in the past."""
    tiers = {}
    for step in range(seen):
        if step < timeline.sink:
            tiers[step] = "sink"
            continue
        if timeline.cuts is not None:
            end = next((cut for cut in timeline.cuts if cut > step), None)
        else:
            end = timeline.sink
            while end <= step:
                end += timeline.block_size
        old = timeline.recent is not None and end is not None and end <= seen - timeline.recent
        tiers[step] = "mid" if old else "recent"
    return tiers


@given(timeline=text | given_grids(), seen=seen_counts)
def test_every_step_has_the_tier_that_the_design_says(timeline, seen):
    if timeline.cuts is not None:
        seen = max((cut for cut in timeline.cuts if cut <= seen), default=0)
    assert {step: timeline.tier(step, seen) for step in range(seen)} == simulated(timeline, seen)
    assert timeline.tier(seen, seen) == "current"


@given(timeline=text, origin=st.integers(0, 40), steps=st.integers(0, 50), seen=seen_counts)
def test_a_timeline_that_was_compacted_and_cropped_tiles_history_too(timeline, origin, steps, seen):
    compacted = attrs.evolve(timeline, origin=timeline.sink + origin)
    layout = compacted.cropped(steps).layout(seen)
    ends = [0, *(block.stop for block, _ in layout)]
    assert [block.start for block, _ in layout] == ends[:-1]
    assert ends[-1] == seen


@given(timeline=text | given_grids(), seen=seen_counts)
def test_the_layout_tiles_history_and_tiers_come_in_order(timeline, seen):
    if timeline.cuts is not None:
        seen = max((cut for cut in timeline.cuts if cut <= seen), default=0)
    layout = timeline.layout(seen)
    assert [step for extent, _ in layout for step in range(extent.start, extent.stop)] == list(range(seen))
    assert all(extent.steps >= 1 for extent, _ in layout)
    order = ["sink", "mid", "recent"]
    assert [order.index(tier) for _, tier in layout] == sorted(order.index(tier) for _, tier in layout)
    for extent, tier in layout:
        assert {timeline.tier(step, seen) for step in range(extent.start, extent.stop)} == {tier}


@given(timeline=text, seen=seen_counts)
def test_mid_blocks_of_text_are_whole_and_on_an_absolute_grid(timeline, seen):
    for extent, tier in timeline.layout(seen):
        if tier == "mid":
            assert extent.steps == timeline.block_size
            assert (extent.start - timeline.sink) % timeline.block_size == 0


@given(timeline=text | given_grids(), counts=st.lists(seen_counts, min_size=2, max_size=6))
def test_each_block_leaves_recent_exactly_once_however_history_grows(timeline, counts):
    if timeline.cuts is not None:
        counts = [max((cut for cut in timeline.cuts if cut <= count), default=0) for count in counts]
    counts = [0, *sorted(counts)]
    starts = [max(timeline.recent_start_at(count), timeline.sink) for count in counts]
    left = [extent for a, b in itertools.pairwise(starts) for extent in timeline.blocks(a, b)]
    assert left == timeline.blocks(starts[0], starts[-1])
    assert left == [extent for extent, tier in timeline.layout(counts[-1]) if tier == "mid"]


@given(timeline=text, seen=st.integers(0, 200))
def test_recent_never_holds_more_than_one_unfinished_block_beyond_its_size(timeline, seen):
    recent = sum(timeline.tier(step, seen) == "recent" for step in range(seen))
    if timeline.recent is not None:
        assert recent <= timeline.recent + timeline.block_size - 1
        assert recent >= min(timeline.recent, max(0, seen - timeline.sink))


@given(timeline=text, seen=st.integers(0, 60), more=st.integers(0, 30))
def test_history_never_moves_back_towards_recent(timeline, seen, more):
    assert timeline.recent_start_at(seen + more) >= timeline.recent_start_at(seen)
    order = ["sink", "mid", "recent", "current"]
    for step in range(seen):
        now, later = timeline.tier(step, seen), timeline.tier(step, seen + more)
        assert later == now or (order.index(later) < order.index(now) and "sink" not in (now, later))


def test_a_timeline_has_no_memory_and_equal_settings_are_equal():
    timeline = Timeline(sink=2, recent=4, block_size=3)
    assert timeline == attrs.evolve(timeline)
    assert timeline.layout(12) == timeline.layout(12)
    assert timeline.layout(12) == [
        (Extent(0, 2), "sink"),
        (Extent(2, 5), "mid"),
        (Extent(5, 8), "mid"),
        (Extent(8, 11), "recent"),
        (Extent(11, 12), "recent"),
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("sink", -1, id="negative sink"),
        pytest.param("recent", -1, id="negative recent"),
        pytest.param("block_size", 0, id="block of nothing"),
        pytest.param("block_size", 1.5, id="block of one and a half"),
    ],
)
def test_sizes_out_of_range_are_refused_by_name(field, value):
    with pytest.raises((ValueError, TypeError), match=field):
        Timeline(**{"sink": 1, "recent": 2, "block_size": 2, field: value})
