"""Invariants 1, 5 and 7: every step is somewhere, in order; reading changes nothing. Over all installed policies."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers import testing
from kvtiers.blocks import Context, Extent
from kvtiers.events import Archived, Committed, Compressed, Recalled, Selected
from kvtiers.geometry import Geometry
from kvtiers.policy import Policy
from kvtiers.presets import policy
from strategies import STEPS, Setting, cuts, feed, policies, settings_of, stream


def archive_holds(trial: testing.Trial) -> None:
    """Every block that left recent is in the archive, in full form as it was fed, wherever it is not compressed."""
    layer, policy, block = trial.layer, trial.policy, trial.policy.block_size
    timeline, history = layer.timeline, layer.history
    tiers = [timeline.tier(step, layer.committed_steps) for step in range(trial.num_steps)]
    counts = layer.tier_counts()
    assert [counts[name] for name in ("sink", "recent", "current")] == [
        tiers.count(n) for n in ("sink", "recent", "current")
    ]
    assert counts["mid"] + counts["dropped"] == tiers.count("mid")
    if not policy.archives:
        assert history.count == 0
        return
    starts = [] if history.starts is None else history.starts.tolist()
    assert starts == list(range(timeline.sink, layer.recent_start, block))
    assert len(starts) * block == counts["mid"]
    for form, store in history.stores.items():
        assert store.count == len(starts)
        index = torch.arange(len(starts)).expand(trial.geometry.batch, trial.geometry.kv_heads, -1)
        if starts and (form == "full" or policy.compressor.keeps) and policy.codec.exact:
            keys, values = history.parts(form, index)
            for at, start in enumerate(starts):
                now = slice(start, start + block)
                assert torch.equal(keys[:, :, at], trial.keys[:, :, now]), (
                    f"the {form} block of step {start} has other keys"
                )
                assert torch.equal(values[:, :, at], trial.values[:, :, now])


def tiles(trial: testing.Trial, context: Context) -> None:
    """Invariant 5, for a realigner that closes up: tiers and blocks of one size touch and do not overlap."""
    window, mid, placed = (
        trial.layer.window,
        trial.layer.placed.mid,
        context.placed[..., 0].expand(context.keys.shape[:3]),
    )
    starts = [] if mid is None else list(mid.placed.double().expand(*placed.shape[:2], -1).unbind(-1))
    edges = [placed[..., window.sink - 1] + 1] if window.sink else []
    ends = [*edges, *(start + trial.policy.block_size for start in starts)]
    begins = [*starts, *([placed[..., -window.recent]] if window.recent else [])]
    for end, begin in zip(ends, begins[len(begins) - len(ends) :] if edges else begins[1:], strict=False):
        assert bool(((begin - end).abs() < 1e-6).all()), f"blocks leave a gap or overlap: {end} then {begin}"


def trial_of(setting: Setting) -> testing.Trial:
    return testing.Trial.start(setting.policy, setting.geometry, setting.rotary, seed=setting.seed, steps=setting.steps)


@given(data=st.data())
def test_every_step_is_in_exactly_one_tier_and_the_archive_holds_what_left_recent(data):
    trial = trial_of(data.draw(settings_of()))
    for steps in data.draw(cuts(trial.policy)):
        trial.feed(steps)
        testing.conservation(trial)
        archive_holds(trial)


@given(data=st.data())
def test_a_context_holds_the_tokens_that_the_policy_names_each_turned_to_its_place(data):
    trial = trial_of(data.draw(settings_of()))
    for steps in data.draw(cuts(trial.policy)):
        testing.contents(trial, trial.feed(steps))


@given(data=st.data())
def test_placed_blocks_touch_and_do_not_overlap(data):
    trial = trial_of(data.draw(settings_of(policies(realigner=("contiguous", "incremental")))))
    for steps in data.draw(cuts(trial.policy)):
        tiles(trial, trial.feed(steps))


@given(data=st.data())
def test_contiguous_positions_begin_at_zero_and_incremental_ones_end_at_now(data):
    trial = trial_of(data.draw(settings_of(policies(realigner=("contiguous", "incremental")))))
    for steps in data.draw(cuts(trial.policy)):
        placed = trial.feed(steps).placed
        if type(trial.policy.realigner).__name__ == "Contiguous":
            first = (
                trial.layer.placed.mid.placed
                if trial.layer.placed.mid is not None and not trial.layer.window.sink
                else placed
            )
            assert float(first.flatten()[0]) == 0
        else:
            assert float(placed[0, 0, -1, 0]) == trial.num_steps - 1


@given(data=st.data())
def test_reading_any_number_of_times_changes_nothing(data):
    trial = trial_of(data.draw(settings_of()))
    for steps in data.draw(cuts(trial.policy)):
        testing.reading(trial, trial.feed(steps))


@given(data=st.data())
def test_a_run_with_readings_equals_one_without(data):
    setting = data.draw(settings_of())
    lengths = data.draw(cuts(setting.policy))
    read, unread = setting.layer(), setting.layer()
    for _ in feed(read, setting.tokens, lengths):
        read.context()
        read.context().origins.add_(100)
        read.tier_counts()
    start = 0
    for length in lengths:
        now = setting.tokens.part(start, start + length)
        unread.write(now.keys, now.values)
        unread.select(now.query)
        start += length
    assert testing.difference(read.context(), unread.context()) is None


@given(data=st.data())
def test_selecting_again_without_new_tokens_changes_nothing(data):
    setting = data.draw(settings_of(policies(refresh="block")))
    layer = setting.layer()
    lengths = data.draw(cuts(setting.policy))
    for start, context in feed(layer, setting.tokens, lengths):
        before = testing.copied(context)
        layer.select(setting.tokens.part(start, layer.num_steps).query)
        assert testing.difference(before, layer.context()) is None


def test_the_kit_notices_a_step_that_went_missing():
    trial = testing.Trial.start(
        policy("archive", recent=3, block_size=2, sink=1, top_k=1),
        Geometry(kv_heads=2, head_dim=4),
        Setting.plain_rotary(4),
        seed=0,
        steps=STEPS,
    )
    for _ in range(6):
        trial.feed(2)
    testing.conservation(trial)
    archive_holds(trial)
    trial.layer.dropped += 1
    with pytest.raises(AssertionError, match=r"invariant 1 \(conservation\)"):
        testing.conservation(trial)
    trial.layer.dropped -= 1
    trial.layer.history.stores["full"].parts()["keys"][0, 0, 1, 0, 0] += 1
    with pytest.raises(AssertionError, match="the full block of step 3 has other keys"):
        archive_holds(trial)


@pytest.mark.parametrize("off", ["origin", "value", "place", "order"])
def test_the_kit_notices_one_token_that_is_off(off):
    trial = testing.Trial.start(
        policy("streaming", recent=3, block_size=2, sink=2),
        Geometry(kv_heads=2, head_dim=4),
        Setting.plain_rotary(4),
        seed=0,
        steps=STEPS,
    )
    for _ in range(6):
        context = trial.feed(2)
    testing.contents(trial, context)
    layer = trial.layer
    if off == "value":
        layer.window.planes["values"][0, 1, layer.window.head] += 1e-3
    elif off == "place":
        plain = layer.placed.unrotated.view(
            "unrotated", slice(layer.placed.unrotated.head, layer.placed.unrotated.head + 1)
        )
        turned = layer.placed.turned(plain, layer.recent_start + layer.window.recent_shift + 1)
        layer.window.write("rotated", slice(layer.window.head, layer.window.head + 1), turned)
    elif off == "order":
        keys, first = layer.window.planes["rotated"], layer.window.head
        keys[0, 0, [first, first + 1]] = keys[0, 0, [first + 1, first]]
    context = layer.context()
    if off == "origin":
        origins, placed = context.locate()
        origins[..., -1, 0] += 1
        context = attrs.evolve(context, locate=lambda: (origins, placed))
    with pytest.raises(AssertionError, match="invariant"):
        testing.contents(trial, context)
    assert trial.num_steps == 12


def test_observers_are_told_what_happened_to_every_step():
    told = []
    setting = Setting(
        policy=policy("packforcing-lm", sink=2, recent=4, block_size=3, top_k=1, top_k_compressed=1, archive="device"),
        geometry=Geometry(kv_heads=2, head_dim=4, query_heads=4),
        rotary=Setting.plain_rotary(4),
        seed=1,
    )
    layer = setting.layer(observe=told.append)
    list(feed(layer, setting.tokens, [5, 5, 5, 1, 1, 1]))
    assert sum(event.steps for event in told if isinstance(event, Committed)) == 18
    full, compressed = layer.history.stores["full"], layer.history.stores["compressed"]
    assert sum(event.blocks for event in told if isinstance(event, Archived)) == full.count + compressed.count
    assert (
        sum(event.blocks for event in told if isinstance(event, Compressed)) == full.count == layer.history.count == 3
    )
    selections = [event for event in told if isinstance(event, Selected)]
    assert all(event.chosen.shape[-1] <= 2 for event in selections)
    assert sum(isinstance(event, Recalled) for event in told) == len(selections)


def test_layout_says_which_blocks_exist_from_the_first_step_on():
    found = policy("archive", sink=2, recent=3, block_size=2, top_k=1)
    setting = Setting(policy=found, geometry=Geometry(kv_heads=1, head_dim=4), rotary=Setting.plain_rotary(4), seed=0)
    cache, tokens = setting.cache(), setting.tokens
    assert cache.layout() == []
    for start in range(9):
        now = tokens.part(start, start + 1)
        cache.write(0, now.keys, now.values)
        cache.select(0, now.query)
        assert sum(extent.steps for extent, _ in cache.layout()) == start
    assert cache.layout() == [
        (Extent(0, 2), "sink"),
        (Extent(2, 4), "mid"),
        (Extent(4, 6), "recent"),
        (Extent(6, 8), "recent"),
    ]


@given(
    geometry=st.builds(
        Geometry,
        kv_heads=st.integers(1, 2),
        head_dim=st.just(8),
        grid=st.sampled_from([(2,), (2, 3)]),
        steps_per_commit=st.integers(1, 2),
        causal=st.just(False),
    ),
    commits=st.integers(1, 8),
    base=policies(recent=4),
)
def test_a_video_layer_holds_every_token_of_every_step(geometry, commits, base):
    """Steps of several tokens; what a commit brings is a block, and tiers end where blocks end."""
    commit = geometry.steps_per_commit
    found = Policy(
        sinks=base.sinks,
        compressor=base.compressor,
        retriever=base.retriever,
        realigner=policy("archive").realigner,
        archive=base.archive,
        codec=base.codec,
        sink=commit,
        recent=2 * commit,
        top_k=base.top_k,
        top_k_compressed=base.top_k_compressed,
        attend=base.attend,
        block_size=commit,
        refresh=base.refresh,
    )
    layer = Setting(policy=found, geometry=geometry, rotary=Setting.plain_rotary(8), seed=0).layer()
    tokens, per = stream(geometry), geometry.tokens_per_step * commit
    for number in range(commits):
        now = tokens.part(number * per, (number + 1) * per)
        layer.write(now.keys, now.values)
        layer.select(now.query)
        context = layer.context()
        assert sum(layer.tier_counts().values()) == (number + 1) * commit
        assert context.mask is None
        assert not context.causal
        assert context.current == per
        assert torch.equal(context.keys[:, :, -per:], now.keys)
        assert context.origins.shape[-1] == 1 + len(geometry.grid)
        bound = found.bound(geometry)
        assert bound is None or context.keys.shape[2] <= bound
