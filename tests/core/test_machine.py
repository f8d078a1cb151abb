"""Everything at once: a cache is appended to, read, rolled back, reordered, saved, forked and given other
policies, in any order, beside a model that is a plain list of the tokens it should remember.

What is deterministic of the tokens alone (which steps are where, what a context holds, where it lies) is recomputed by
brute force after every step; what depends on queries is held against a second cache that was spared the detours.
"""

import shutil
import tempfile
from pathlib import Path

import attrs
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtiers import testing, trials
from kvtiers.blocks import Context
from kvtiers.cache import TieredCache
from kvtiers.errors import CropError, SwapError
from strategies import Stream, copied, policies, settings_of, small_presets, stream

LONGEST = 40


class CacheMachine(RuleBasedStateMachine):
    """The tokens that were appended, by row, and the cache that should hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvtiers-machine-"))
        self.aside: list[tuple[testing.Trial, Context]] = []
        self.files: list[tuple[Path, testing.Trial]] = []

    @initialize(data=st.data())
    def start(self, data) -> None:
        self.setting = data.draw(settings_of(max_heads=2, max_batch=2))
        own = self.setting
        self.trial = testing.Trial.start(own.policy, own.geometry, own.rotary, seed=own.seed, steps=0)
        self.seed = own.seed

    @property
    def cache(self) -> TieredCache:
        return self.trial.cache

    def fresh(self, steps: int) -> Stream:
        """Tokens that nobody has seen before."""
        self.seed += 1
        return stream(self.trial.geometry, steps, self.seed)

    def extend(self, steps: int) -> None:
        new = self.fresh(steps)
        self.trial.query = torch.cat([self.trial.query, new.query], 2)
        self.trial.keys = torch.cat([self.trial.keys, new.keys], 2)
        self.trial.values = torch.cat([self.trial.values, new.values], 2)

    def cut(self) -> None:
        """Forget the tokens that the cache no longer holds."""
        seen = self.cache.num_steps
        for name in ("query", "keys", "values"):
            setattr(self.trial, name, getattr(self.trial, name)[:, :, :seen])

    # ------------------------------------------------------------------ what is done

    @precondition(lambda self: self.cache.num_steps < LONGEST)
    @rule(steps=st.integers(1, 9))
    def append(self, steps: int) -> None:
        steps = min(steps, self.trial.policy.chunk_size or 9)
        self.extend(steps)
        self.trial.feed(steps)

    @precondition(lambda self: self.cache.num_steps < LONGEST)
    @rule(steps=st.integers(1, 4))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.extend(1)
            self.trial.feed(1)

    @rule()
    def read(self) -> None:
        if self.cache.num_steps:
            testing.reading(self.trial, self.cache.context(0))

    @rule(back=st.integers(0, 6))
    def crop(self, back: int) -> None:
        steps = max(0, self.cache.num_steps - back)
        before, tier_counts = copied(self.cache.context(0)) if self.cache.num_steps else None, self.cache.tier_counts()
        try:
            self.cache.crop(steps)
        except CropError:
            assert self.cache.tier_counts() == tier_counts
            assert testing.difference(before, self.cache.context(0)) is None
            return
        assert self.cache.num_steps == steps
        self.cut()
        self.settle_selection()

    def settle_selection(self) -> None:
        """After a roll back the next forward chooses anew; until then a context is that of the last selection."""
        if self.cache.num_steps:
            self.extend(1)
            self.trial.feed(1)

    @rule(rows=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def select_rows(self, rows: list[int]) -> None:
        batch = self.trial.geometry.batch
        if self.cache.num_steps:
            self.trial.select_rows(torch.tensor([row % batch for row in rows]))

    @rule()
    def fork(self) -> None:
        """The copy is left aside; whatever happens here must not change it."""
        if self.cache.num_steps:
            other = self.trial.branch(self.cache.fork())
            self.aside.append((other, copied(other.cache.context(0))))

    @precondition(lambda self: self.aside)
    @rule()
    def return_to_a_fork(self) -> None:
        self.trial, _ = self.aside.pop()

    @rule()
    def save(self) -> None:
        path = self.folder / f"{len(self.files)}.safetensors"
        self.cache.save(path)
        self.files.append((path, attrs.evolve(self.trial, cache=self.cache.fork())))

    @precondition(lambda self: self.files)
    @rule()
    def load(self) -> None:
        """What is loaded equals the fork that was made when it was saved, now and one forward later."""
        path, original = self.files.pop()
        loaded = TieredCache(original.policy, [original.geometry], rotaries=[original.rotary])
        loaded.load(path)
        assert loaded.tier_counts() == original.cache.tier_counts()
        self.trial = original.branch(loaded)
        if loaded.num_steps:
            assert testing.difference(loaded.context(0), original.cache.context(0)) is None
        self.extend(1)
        own = self.trial.feed(1)
        theirs = self.trial.branch(original.cache).feed(1)
        assert testing.difference(own, theirs) is None

    @rule(data=st.data())
    def swap(self, data) -> None:
        other = data.draw(policies() | small_presets())
        names = ("retriever", "realigner", "top_k", "top_k_compressed", "refresh", "chunk_size")
        fields = {name: getattr(other, name) for name in data.draw(st.sets(st.sampled_from(names)))}
        changed = attrs.evolve(self.trial.policy, **fields) if self.cache.num_steps else other
        tier_counts = self.cache.tier_counts()
        try:
            self.cache.swap(changed)
        except SwapError:
            assert self.cache.policies == [self.trial.policy]
            assert self.cache.tier_counts() == tier_counts
            return
        self.trial.policy = changed
        self.files = [(path, trial) for path, trial in self.files if trial.policy is not changed]
        if self.cache.num_steps:
            self.extend(1)
            self.trial.feed(1)

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.cut()

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def the_cache_holds_what_the_list_says(self) -> None:
        if not hasattr(self, "trial") or not self.cache.every_layer() or not self.cache.num_steps:
            return
        assert self.cache.num_steps == self.trial.keys.shape[2]
        context = self.cache.context(0)
        testing.conservation(self.trial)
        testing.contents(self.trial, context)
        held = self.cache.memory_usage()
        real = trials.storages(self.trial.layer)
        for location in ("device", "host"):
            assert sum(h.bytes for h in held if h.location == location) == real[location]
        bound = self.trial.policy.bound(self.trial.geometry)
        assert bound is None or context.keys.shape[2] <= bound

    @invariant()
    def forks_are_left_alone(self) -> None:
        for trial, expected in self.aside:
            assert testing.difference(expected, trial.cache.context(0)) is None

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=max(10, settings().max_examples // 2),
    stateful_step_count=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
