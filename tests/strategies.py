"""Hypothesis strategies and small oracles that tests share: random policies over everything that is installed, random
streams of tokens, random ways to cut them, and attention in its plainest form.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import attrs
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from jaxtyping import config as shapes
from torch import Tensor

from kvtiers.blocks import Context
from kvtiers.cache import TieredCache
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.plugins import registry
from kvtiers.policy import SLOTS, Policy
from kvtiers.presets import build
from kvtiers.presets import policy as preset
from kvtiers.rotary import Rotary
from kvtiers.trials import copied, difference
from kvtiers_policies.bounded import Bounded

STEPS = 48
"""How long a stream is; long enough for blocks to age many times with the sizes drawn here."""

fewer = settings(max_examples=settings().max_examples // 4)
"""For a property whose examples are long: a quarter of the profile's."""

CHECKED_IN = 4
"""Shapes are checked in one of so many examples, since checking them takes longer than what is checked."""

_OPTIONS: Mapping[tuple[str, str], Mapping[str, st.SearchStrategy[Any]]] = {
    ("compressor", "mean-pool"): {"ratio": st.integers(1, 5)},
    ("compressor", "top-tokens"): {
        "keep": st.integers(1, 3),
        "by": st.sampled_from(["key-norm", "key-similarity", "attention"]),
        "window": st.integers(1, 5),
    },
    ("retriever", "affinity"): {
        "heads": st.sampled_from(["mean", "per-kv"]),
        "normalise": st.sampled_from(["none", "softmax"]),
        "digest_tokens": st.none() | st.integers(1, 5),
        "queries": st.none() | st.integers(1, 3),
    },
    ("retriever", "page-bounds"): {"digest_tokens": st.none() | st.integers(1, 5)},
    ("realigner", "bounded"): {"reach": st.integers(0, STEPS)},
}
"""Options worth varying; the others have their defaults. `rows="mean"` mixes rows and is left out."""


_SIZES: Mapping[str, st.SearchStrategy[Any]] = {
    "sink": st.integers(0, 4),
    "recent": st.integers(0, 9) | st.none(),
    "top_k": st.integers(1, 3),
    "top_k_compressed": st.integers(0, 2),
    "attend": st.sampled_from(["full", "compressed"]),
    "block_size": st.integers(1, 4),
    "chunk_size": st.integers(1, 9) | st.none(),
    "refresh": st.sampled_from(["block", "chunk", 1, 2, 5]),
}


@contextmanager
def unchecked() -> Iterator[None]:
    """Without shape checks, which cost time and draw random numbers, which Hypothesis forbids in a strategy."""
    before = shapes.jaxtyping_disable
    shapes.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        shapes.update("jaxtyping_disable", before)


@contextmanager
def first_example() -> Iterator[None]:
    """For a test of the conformance kit: the first example that fails will do, and what a wrong policy makes is for the
    kit to find, not for the tests' shape checks."""
    profile = settings.get_current_profile_name()
    settings.register_profile("first example", settings.get_profile(profile), phases=[Phase.generate])
    settings.load_profile("first example")
    try:
        with unchecked():
            yield
    finally:
        settings.load_profile(profile)


_SHIPPED = ("kvtiers_policies", "kvtiers_packforcing")


@cache
def names(slot: str) -> tuple[str, ...]:
    """What kvtiers ships for `slot` and works on keys and values alone; `kvtiers_methods` has tests of its own."""
    with unchecked():
        ours = (name for name in registry().names(slot) if registry().provider(slot, name).module in _SHIPPED)
        return tuple(name for name in ours if not _reduces(build(slot, name)))


def _reduces(made: Any) -> bool:
    """Whether this compresses what a video model is given, which no layer by itself can."""
    return getattr(made.compressor if isinstance(made, Policy) else made, "given", False)


@cache
def _choices(slot: str, among: tuple[str, ...]) -> st.SearchStrategy[tuple[str, Mapping[str, Any]]]:
    """A name for `slot`, with options."""
    options = {name: st.fixed_dictionaries(dict(_OPTIONS.get((slot, name), {}))) for name in among}
    return st.one_of([st.tuples(st.just(name), each) for name, each in options.items()])


def policies(**fixed: Any) -> st.SearchStrategy[Policy]:
    """Any combination of slots, in small sizes, with the exact codec.

    A keyword fixes a field; for a slot it may be a name or several.
    """
    parts = {name: st.just(fixed[name]) if name in fixed else strategy for name, strategy in _SIZES.items()}
    for slot in SLOTS:
        among = fixed.get(slot) or (("exact",) if slot == "codec" else names(slot))
        parts[slot] = _choices(slot, (among,) if isinstance(among, str) else tuple(among))
    return st.fixed_dictionaries(parts).map(_policy)


def _policy(parts: Mapping[str, Any]) -> Policy:
    with unchecked():
        return Policy(**{name: build(name, part) if name in SLOTS else part for name, part in parts.items()})


@cache
def small_presets() -> st.SearchStrategy[Policy]:
    """A registered preset, its sizes scaled down so that a short stream exercises it."""
    return st.builds(_scaled, st.sampled_from(names("policy")), policies())


def _scaled(name: str, sizes: Policy) -> Policy:
    with unchecked():
        found = preset(name)
        realigner = found.realigner
        return attrs.evolve(
            found,
            realigner=attrs.evolve(realigner, reach=9) if isinstance(realigner, Bounded) else realigner,
            sink=min(found.sink, sizes.sink),
            recent=None if found.recent is None else sizes.recent or 0,
            block_size=min(found.block_size, sizes.block_size),
            top_k=sizes.top_k,
            chunk_size=None if found.chunk_size is None else sizes.chunk_size or 4,
        )


@cache
def any_policy() -> st.SearchStrategy[Policy]:
    """Any combination, or a preset."""
    return policies() | small_presets()


@st.composite
def geometries(draw: st.DrawFn, *, max_batch: int = 3, max_heads: int = 3) -> Geometry:
    kv_heads = draw(st.integers(1, max_heads), label="kv_heads")
    return Geometry(
        kv_heads=kv_heads,
        query_heads=kv_heads * draw(st.integers(1, 2), label="group"),
        head_dim=draw(st.sampled_from([4, 8]), label="head_dim"),
        value_dim=draw(st.sampled_from([4, 6]), label="value_dim"),
        batch=draw(st.integers(1, max_batch), label="batch"),
    )


@attrs.frozen(eq=False)
class Stream:
    """What a model would feed one layer: [batch, heads, steps, width]."""

    query: Tensor
    keys: Tensor
    values: Tensor

    def part(self, start: int, stop: int) -> "Stream":
        return Stream(*(x[:, :, start:stop] for x in (self.query, self.keys, self.values)))

    def select_rows(self, rows: Tensor) -> "Stream":
        return Stream(*(x[rows] for x in (self.query, self.keys, self.values)))


def stream(geometry: Geometry, steps: int = STEPS, seed: int = 0) -> Stream:
    """Random tokens for `geometry`, the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    lead = (geometry.batch, geometry.kv_heads, steps * geometry.tokens_per_step)
    query = (geometry.batch, geometry.query_heads, steps * geometry.tokens_per_step, geometry.head_dim)
    return Stream(
        torch.randn(*query, generator=g).to(geometry.dtype),
        torch.randn(*lead, geometry.head_dim, generator=g).to(geometry.dtype),
        torch.randn(*lead, geometry.value_dim, generator=g).to(geometry.dtype),
    )


def rotary(head_dim: int, *, layout: str = "half", partial: bool = False, angle: torch.dtype = torch.float64) -> Rotary:
    """A rotary embedding of moderate frequencies, over all channels or all but two."""
    pairs = max(1, head_dim // 2 - partial)
    return Rotary([torch.linspace(1.0, 0.05, pairs)], layout=layout, angle_dtype=angle)  # type: ignore[arg-type]


@st.composite
def rotaries(draw: st.DrawFn, head_dim: int) -> Rotary:
    layout, partial = draw(st.sampled_from(["half", "interleaved"])), draw(st.booleans())
    with unchecked():
        return rotary(head_dim, layout=layout, partial=partial)


@attrs.frozen(eq=False, kw_only=True)
class Setting:
    """A policy on a layer, and tokens for it."""

    policy: Policy
    geometry: Geometry
    rotary: Rotary
    seed: int
    steps: int = STEPS

    @staticmethod
    def plain_rotary(head_dim: int) -> Rotary:
        return rotary(head_dim)

    @property
    def tokens(self) -> Stream:
        return stream(self.geometry, self.steps, self.seed)

    def layer(self, **changes: Any) -> Layer:
        return Layer(policy=self.policy, geometry=self.geometry, rotary=self.rotary, **changes)

    def cache(self, **changes: Any) -> TieredCache:
        return TieredCache(self.policy, [self.geometry], rotaries=[self.rotary], **changes)


@st.composite
def settings_of(draw: st.DrawFn, chosen: st.SearchStrategy[Policy] | None = None, **shape: Any) -> Setting:
    """A random policy (or one of `chosen`, or a preset) on a random layer."""
    geometry = draw(geometries(**shape))
    chosen = any_policy() if chosen is None else chosen
    seed = draw(st.integers(0, 999), label="seed")
    shapes.update("jaxtyping_disable", seed % CHECKED_IN != 0)
    return Setting(
        policy=draw(chosen, label="policy"), geometry=geometry, rotary=draw(rotaries(geometry.head_dim)), seed=seed
    )


@st.composite
def cuts(draw: st.DrawFn, policy: Policy, *, most: int = 12, steps: int = STEPS) -> list[int]:
    """Lengths of consecutive forwards, each at most a chunk, together at most `steps`."""
    longest = min(policy.chunk_size or 9, steps)
    lengths = st.integers(1, longest) | st.just(1) | st.just(longest)
    drawn = draw(st.lists(lengths, min_size=1, max_size=most), label="forwards")
    total, kept = 0, []
    for length in drawn:
        if total + length <= steps:
            kept.append(length)
            total += length
    return kept


def extents(lengths: Sequence[int], start: int = 0) -> Iterator[tuple[int, int]]:
    for length in lengths:
        yield start, start + length
        start += length


def feed(layer: Layer, tokens: Stream, lengths: Sequence[int], start: int = 0) -> Iterator[tuple[int, Context]]:
    """Write and select forward by forward; yields the first current step and the context of each."""
    for a, b in extents(lengths, start):
        now = tokens.part(a, b)
        layer.write(now.keys, now.values)
        layer.select(now.query)
        yield a, layer.context()


def feed_all(layer: Layer, tokens: Stream, lengths: Sequence[int], start: int = 0) -> list[Context]:
    """`feed`, every context copied so that later writes do not change it."""
    return [copied(context) for _, context in feed(layer, tokens, lengths, start)]


def same(a: Context, b: Context) -> bool:
    """Whether two contexts are equal, bitwise."""
    return difference(a, b) is None


def allowed(context: Context) -> Tensor:
    """[current, tokens]: what each current token may see, said in full."""
    current, tokens = context.current, context.keys.shape[2]
    if context.mask is not None:
        return context.mask
    everything = torch.ones(current, tokens, dtype=torch.bool)
    return everything.tril(tokens - current) if context.causal else everything


def attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain attention in float64. query: [batch, query_heads, queries, head_dim]; `seen` is [queries, tokens], or
    [batch, kv_heads, 1, tokens], or broadcasts to them; `bias` [batch, kv_heads, tokens] is added to the logits."""
    group = query.shape[1] // keys.shape[1]
    per_kv_head = seen.dim() == 4 and seen.shape[1] == keys.shape[1]
    seen = seen.repeat_interleave(group, 1) if per_kv_head else seen
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    logits = query.double() @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias.double().repeat_interleave(group, 1)[:, :, None]
    result: Tensor = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return result


def attend_context(query: Tensor, context: Context) -> Tensor:
    return attend(query, context.keys, context.values, allowed(context), context.bias)


def per_head(positions: Tensor, context: Context) -> Tensor:
    """`origins` or `placed` of a context, time only, [batch, kv_heads, tokens]."""
    return positions[..., 0].expand(*context.keys.shape[:3])
