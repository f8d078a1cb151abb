"""Changing the policy of a filled cache: what may change goes on as if it had been so, the rest is refused."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers import testing
from kvtiers.cache import TieredCache
from kvtiers.changes import check_policy
from kvtiers.errors import ArchiveFullError, BudgetError, PolicyError, RotaryError, SwapError
from kvtiers.geometry import Geometry
from kvtiers.presets import build, policy
from kvtiers_policies.affinity import Affinity
from strategies import (
    STEPS,
    Setting,
    copied,
    cuts,
    extents,
    feed,
    policies,
    rotary,
    settings_of,
    small_presets,
    unchecked,
)

FREE = ("retriever", "realigner", "top_k", "top_k_compressed", "refresh", "chunk_size")


@given(data=st.data())
def test_after_a_swap_every_invariant_holds_or_it_was_refused(data):
    setting = data.draw(settings_of())
    trial = testing.Trial.start(setting.policy, setting.geometry, setting.rotary, seed=setting.seed, steps=STEPS)
    for steps in data.draw(cuts(setting.policy, most=5, steps=20)):
        trial.feed(steps)
    before, tier_counts = copied(trial.cache.context(0)), trial.cache.tier_counts()
    other = data.draw(policies() | small_presets(), label="other")
    changed = attrs.evolve(
        setting.policy, **{name: getattr(other, name) for name in data.draw(st.sets(st.sampled_from(FREE)))}
    )
    try:
        trial.cache.swap(changed)
    except SwapError:
        assert testing.difference(before, trial.cache.context(0)) is None
        assert trial.cache.tier_counts() == tier_counts
        assert trial.layer.policy == setting.policy
        return
    trial.policy = changed
    for steps in data.draw(cuts(changed, most=5, steps=STEPS - trial.num_steps)):
        context = trial.feed(steps)
        testing.conservation(trial)
        testing.contents(trial, context)
        testing.reading(trial, context)


@given(data=st.data())
def test_a_swapped_cache_is_what_it_would_be_under_the_new_policy_from_the_start(data):
    """Retriever, realigner, top_k, top_k_compressed, refresh decide what is attended, and nothing of what is held."""
    first = data.draw(
        policies(compressor="keep", retriever=("recency", "affinity", "page-bounds"), refresh="chunk", recent=3)
    )
    second = data.draw(policies(compressor="keep", retriever=("recency", "affinity", "page-bounds"), refresh="chunk"))
    names = [name for name in FREE if name not in ("chunk_size", "realigner", "top_k_compressed")]
    changed = attrs.evolve(first, **{name: getattr(second, name) for name in names})
    setting = data.draw(settings_of(st.just(first)))
    lengths = data.draw(cuts(first, most=6))
    swapped, fresh = setting.layer(), attrs.evolve(setting, policy=changed).layer()
    split = data.draw(st.integers(0, len(lengths)))
    done = sum(lengths[:split])
    list(feed(swapped, setting.tokens, lengths[:split]))
    list(feed(fresh, setting.tokens, lengths[:split]))
    check_policy(swapped, changed)
    swapped.set_policy(changed)
    for (_, a), (_, b) in zip(
        feed(swapped, setting.tokens, lengths[split:], done),
        feed(fresh, setting.tokens, lengths[split:], done),
        strict=True,
    ):
        assert torch.equal(a.values, b.values)
        assert torch.allclose(a.keys, b.keys, rtol=1e-5, atol=1e-5)


def filled(**changes):
    found = policy(
        "packforcing-lm", **{"sink": 1, "recent": 3, "block_size": 2, "top_k": 2, "chunk_size": 4, **changes}
    )
    setting = Setting(policy=found, geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0)
    trial = testing.Trial.start(found, setting.geometry, setting.rotary, seed=0, steps=STEPS)
    for a, b in extents([4] * 5):
        trial.feed(b - a)
    return trial


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"sink": 2}, "sink cannot change any more", id="sink"),
        pytest.param({"recent": 4}, "recent cannot change any more", id="recent"),
        pytest.param({"block_size": 3}, "block_size cannot change any more", id="block size"),
        pytest.param({"compressor": "keep"}, "compressor cannot change any more", id="compressor"),
        pytest.param({"archive": "device"}, "archive cannot change any more", id="archive"),
        pytest.param({"attend": "compressed"}, "attend cannot change any more", id="attend"),
        pytest.param(
            {"realigner": "original"},
            "cannot replace one another|stores keys as Bounded needs them",
            id="keys stored otherwise",
        ),
        pytest.param(
            {"top_k_compressed": 1}, "archived no compressed form for top_k_compressed=1", id="a form that was not kept"
        ),
    ],
)
def test_what_would_need_what_is_gone_is_refused_by_name(changes, reason):
    trial = filled()
    before = copied(trial.cache.context(0))
    slots = ("compressor", "archive", "realigner")
    other = attrs.evolve(trial.policy, **{n: build(n, v) if n in slots else v for n, v in changes.items()})
    with pytest.raises(SwapError, match=reason):
        trial.cache.swap(other)
    assert testing.difference(before, trial.cache.context(0)) is None


@pytest.mark.parametrize(("archive", "limit"), [("device", 1_500), ("host", 1_500), ("disk", 4_000)])
def test_a_full_archive_goes_on_with_a_larger_limit(archive, limit):
    trial = filled(archive=(archive, {"limit_bytes": limit}))
    with pytest.raises(ArchiveFullError, match="larger limit_bytes"):  # noqa: PT012 (some step)
        while True:
            trial.feed(1)
    trial.policy = attrs.evolve(trial.policy, archive=build("archive", (archive, {"limit_bytes": 40_000})))
    trial.cache.swap(trial.policy)
    while trial.num_steps < STEPS:
        context = trial.feed(1)
        testing.conservation(trial)
        testing.contents(trial, context)
    assert trial.cache.budget(trial.policy.archive).nbytes > limit


@pytest.mark.parametrize("given", ["archive", ["archive"], None, [None]], ids=str)
def test_what_is_no_policy_is_refused(given):
    trial = filled()
    with pytest.raises(SwapError, match="swap takes one Policy, or one for each of 1 layers"), unchecked():
        trial.cache.swap(given)
    assert trial.cache.policies == [trial.policy]


@pytest.mark.parametrize("archive", ["device", "host", "disk"])
def test_a_limit_below_what_is_held_is_refused(archive):
    trial = filled(archive=archive)
    with pytest.raises(SwapError, match="give it no less than it holds"):
        trial.cache.swap(attrs.evolve(trial.policy, archive=build("archive", (archive, {"limit_bytes": 100}))))


def test_a_fork_that_moved_to_another_limit_is_not_counted_any_more():
    trial = filled(archive=("host", {"limit_bytes": 100_000}))
    archive, larger = trial.policy.archive, build("archive", ("host", {"limit_bytes": 200_000}))
    before = trial.cache.budget(archive).nbytes
    assert before > 0
    fork = trial.cache.fork()
    assert trial.cache.budget(archive).nbytes == fork.budget(archive).nbytes == before
    fork.swap(attrs.evolve(trial.policy, archive=larger))
    assert trial.cache.budget(archive).nbytes == before
    assert (fork.budget(archive).nbytes, fork.budget(larger).nbytes) == (0, before)


def test_an_empty_cache_takes_any_policy_that_rotates_alike():
    setting = Setting(
        policy=policy("packforcing-lm"), geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0
    )
    cache = setting.cache()
    with pytest.raises(SwapError, match="cannot replace one another"):
        cache.swap(policy("full"))
    cache.swap(policy("streaming", sink=1, recent=2, block_size=1, chunk_size=4))
    now = setting.tokens.part(0, 4)
    for _ in range(3):
        cache.write(0, now.keys, now.values)
        cache.select(0, now.query)
    assert cache.tier_counts()["dropped"] == 5


class Turning(Affinity):
    """Turns keys by itself, it says."""

    needs_rotary = True


def test_what_turns_keys_by_itself_must_be_told_how_the_model_rotates():
    """It would otherwise take keys that the model rotated for keys that were not."""
    geometry, chosen = Geometry(kv_heads=2, head_dim=4), policy("archive", retriever=Turning())
    cache = TieredCache(policy("archive"), [geometry])
    for wrong in (lambda: TieredCache(chosen, [geometry]), lambda: cache.swap(chosen)):
        with pytest.raises(RotaryError, match="Turning rotates keys or queries itself, but layer 0 was given no"):
            wrong()
    TieredCache(chosen, [geometry], rotaries=[rotary(4)]).swap(policy("archive"))


def test_a_cache_that_was_rolled_back_to_nothing_begins_as_the_new_policy_says():
    """It had kept where the sink of the old policy ends."""
    trial = filled(sink=3)
    trial.cache.crop(0)
    trial.policy = policy("streaming", sink=1, recent=3, block_size=2, chunk_size=4)
    trial.cache.swap(trial.policy)
    for steps in (1, 4, 4):
        context = trial.feed(steps)
        testing.conservation(trial)
        testing.contents(trial, context)


def test_a_form_that_was_given_up_is_freed_and_cannot_come_back():
    trial = filled(top_k_compressed=1)
    assert set(trial.layer.history.stores) == {"full", "compressed"}
    with_compressed = trial.policy
    trial.policy = attrs.evolve(with_compressed, top_k_compressed=0)
    trial.cache.swap(trial.policy)
    for _ in range(2):
        context = trial.feed(4)
        testing.conservation(trial)
        testing.contents(trial, context)
    with pytest.raises(SwapError, match="archived no compressed form for top_k_compressed=1"):
        trial.cache.swap(with_compressed)


def test_digests_that_nobody_needs_any_more_are_freed():
    trial = filled()
    assert trial.layer.history.digests.nbytes > 0
    trial.policy = attrs.evolve(trial.policy, retriever=build("retriever", "recency"))
    trial.cache.swap(trial.policy)
    assert trial.layer.history.digests.nbytes == 0
    context = trial.feed(4)
    testing.contents(trial, context)
    testing.bounded(trial, context)
    trial.policy = attrs.evolve(trial.policy, retriever=build("retriever", ("affinity", {"digest_tokens": 1})))
    trial.cache.swap(trial.policy)
    testing.contents(trial, trial.feed(4))
    assert trial.layer.history.digests.length == trial.layer.history.count


def test_what_was_dropped_is_realigned_at_once():
    setting = Setting(
        policy=policy("streaming", sink=1, recent=3, block_size=2, chunk_size=4),
        geometry=Geometry(kv_heads=2, head_dim=4),
        rotary=rotary(4),
        seed=0,
    )
    cache = setting.cache()
    for a, b in extents([4] * 4):
        now = setting.tokens.part(a, b)
        cache.write(0, now.keys, now.values)
    cache.swap(attrs.evolve(setting.policy, realigner=build("realigner", "incremental")))
    assert float(cache.context(0).placed[0, 0, -1, 0]) == 15


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "filled"])
def test_a_budget_is_checked_before_anything_changes(empty):
    trial = filled()
    if empty:
        trial.cache.reset()
    with pytest.raises(BudgetError, match="more than budget = 12"):
        trial.cache.swap(attrs.evolve(trial.policy, budget=12, top_k=9))
    assert trial.cache.policies == [trial.policy]


def test_history_in_place_without_unrotated_keys_cannot_move_to_an_archive():
    """While nothing has left recent yet, nothing says that its keys, rotated already, could not be placed again."""
    full = policy(
        "packforcing-lm", compressor="keep", retriever="all", archive="device", sink=1, recent=4, block_size=2
    )
    layer = Setting(policy=full, geometry=Geometry(kv_heads=1, head_dim=4), rotary=rotary(4), seed=0)
    cache, tokens = layer.cache(), layer.tokens.part(0, 3)
    assert full.in_place
    cache.write(0, tokens.keys, tokens.values)
    with pytest.raises(SwapError, match="keeps its history in place"):
        cache.swap(attrs.evolve(full, retriever=build("retriever", "recency")))


@pytest.mark.parametrize("realigners", [("contiguous", "original"), ("original", "contiguous")])
def test_layers_that_need_keys_of_two_kinds_are_refused(realigners):
    each = [policy("archive", realigner=name) for name in realigners]
    geometry = Geometry(kv_heads=1, head_dim=4)
    with pytest.raises(PolicyError, match=r"Contiguous places keys that .* did not rotate, and Original those that it"):
        TieredCache(each, [geometry] * 2, rotaries=[rotary(4)] * 2)
    TieredCache(
        [policy("archive", realigner=name) for name in ("contiguous", "incremental")],
        [geometry] * 2,
        rotaries=[rotary(4)] * 2,
    )


@pytest.mark.parametrize("name", ["archive", "packforcing-lm"])
def test_what_was_swapped_is_saved_and_loaded_before_blocks_are_chosen_anew(name, tmp_path):
    sizes = {"sink": 2, "recent": 3, "block_size": 2, "chunk_size": 4}
    geometry, path = Geometry(kv_heads=2, head_dim=8), tmp_path / "cache"
    trial = testing.Trial.start(policy(name, **sizes, top_k=6), geometry, rotary(8), seed=0, steps=60)
    for _ in range(8):
        trial.feed(4)
    fewer = policy(name, **sizes, top_k=3)
    trial.cache.swap(fewer)
    trial.cache.save(path)
    trial = attrs.evolve(trial, policy=fewer)
    loaded = trial.branch()
    loaded.cache.load(path)
    for _ in range(3):
        assert testing.difference(trial.feed(4), loaded.feed(4)) is None


@pytest.mark.parametrize("name", ["archive", "streaming", "sliding-window", "full"])
@pytest.mark.parametrize("chunk_size", [1, 3, None], ids="chunks of {}".format)
def test_tokens_taken_in_chunks_of_another_size_are_saved_and_loaded(name, chunk_size, tmp_path):
    before = policy(name, chunk_size=8, **({} if name == "full" else {"recent": 3}))
    trial = testing.Trial.start(before, Geometry(kv_heads=2, head_dim=8), rotary(8), seed=0, steps=60)
    for _ in range(4):
        trial.feed(8)
    after = attrs.evolve(before, chunk_size=chunk_size)
    trial.cache.swap(after)
    trial.cache.save(tmp_path / "cache")
    trial = attrs.evolve(trial, policy=after)
    loaded = trial.branch()
    loaded.cache.load(tmp_path / "cache")
    for _ in range(4):
        assert testing.difference(trial.feed(1), loaded.feed(1)) is None


def test_another_realigner_places_at_once_what_a_compressor_rewrites(tmp_path):
    geometry, path = Geometry(kv_heads=1, head_dim=8), tmp_path / "cache"
    chosen = policy(
        "streaming", sink=1, recent=3, block_size=2, chunk_size=4, compressor=("h2o", {"most": 5, "close_up": True})
    )
    before, after = (attrs.evolve(chosen, realigner=build("realigner", each)) for each in ("incremental", "contiguous"))
    trial = testing.Trial.start(before, geometry, rotary(8), seed=0, steps=40)
    for _ in range(4):
        trial.feed(4)
    shift = trial.layer.window.recent_shift
    trial.cache.swap(after)
    assert trial.layer.window.recent_shift != shift
    testing.contents(trial, trial.cache.context(0))
    trial.cache.save(path)
    loaded = attrs.evolve(trial, policy=after).branch()
    loaded.cache.load(path)
    assert testing.difference(trial.feed(1), loaded.feed(1)) is None


def test_realigners_of_another_kind_are_refused_in_words_about_them():
    geometry = Geometry(kv_heads=1, head_dim=8)
    cache = TieredCache(policy("archive"), [geometry])
    with pytest.raises(SwapError, match="realigners that rotate and realigners that do not cannot replace one another"):
        cache.swap(policy("streaming"))
