"""What a policy will cost, computed from shapes: the paper's own numbers, and what a cache then holds."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.accounting import bytes_in, memory_usage_of
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.planning import Shape
from kvtiers.presets import policy
from kvtiers_models.costs import cost
from strategies import any_policy, cuts, feed, policies, settings_of

WAN = Shape(
    name="Wan 2.1 1.3B, 120 s",
    layers=30,
    geometry=Geometry(kv_heads=12, head_dim=128, grid=(30, 52), steps_per_commit=4, causal=False, dtype=torch.bfloat16),
    steps=480,
    growth_steps=240,
    growth_unit="minute",
)
"""PackForcing (arXiv 2603.25730) section 4.1."""


def test_the_paper_s_numbers_come_out_of_its_geometry():
    full, packed = cost(policy("full"), WAN), cost(policy("packforcing"), WAN)
    assert full.attended == 748_800
    assert round(full.cached_bytes / 1e9) == 138
    assert packed.attended == 27_872
    assert round(packed.cached_bytes / 1e9, 2) == 3.99
    assert packed.growth_bytes == 60 * 182 * 30 * 2 * 1536 * 2
    assert packed.archive_bytes == 117 * 182 * 30 * 2 * 1536 * 2
    assert packed.work == pytest.approx(27_872 / 748_800)
    of_three = attrs.evolve(WAN, geometry=attrs.evolve(WAN.geometry, steps_per_commit=3))
    window = cost(policy("rolling-window"), of_three)
    assert window.attended == 21 * 1560 == 32_760
    anchored = cost(policy("sink-rolling-window"), of_three)
    assert anchored.attended == 32_760
    assert (window.archive_bytes, window.growth_bytes) == (0, 0)


@given(data=st.data(), steps=st.integers(1, 48))
def test_what_is_planned_covers_what_is_then_held_and_attended(data, steps):
    setting = data.draw(settings_of(any_policy()))
    shape = Shape(name="", layers=1, geometry=setting.geometry, steps=steps, growth_steps=1, growth_unit="step")
    planned, cache, tokens = cost(setting.policy, shape), setting.cache(), setting.tokens
    for chunk in cache.layers[0].chunks(*(x[:, :, :steps] for x in (tokens.query, tokens.keys, tokens.values))):
        assert chunk.context.keys.shape[2] <= planned.attended
    cache.commit()
    assert bytes_in(cache.memory_usage(), "device") <= planned.device_bytes
    blocks = sum(layer.history.count for layer in cache.every_layer())
    of_block = cost(setting.policy, attrs.evolve(shape, growth_steps=setting.policy.block_size)).growth_bytes
    if setting.policy.archive.location != "device":
        assert planned.archive_bytes == blocks * of_block


@given(data=st.data(), steps=st.integers(1, 48))
def test_a_policy_without_a_bound_never_holds_more_than_a_quarter_above_what_it_needs(data, steps):
    setting = data.draw(settings_of(policies(recent=None) | policies(retriever="all") | policies(chunk_size=None)))
    shape = Shape(name="", layers=1, geometry=setting.geometry, steps=steps, growth_steps=1, growth_unit="step")
    planned, layer = cost(setting.policy, shape).device_bytes, setting.layer()
    for _ in feed(layer, setting.tokens, data.draw(cuts(setting.policy, most=steps, steps=steps))):
        assert bytes_in(memory_usage_of([layer]), "device") <= planned


def test_all_of_a_video_takes_up_to_a_quarter_more_than_its_size_as_its_buffer_grows():
    geometry = Geometry(kv_heads=2, head_dim=12, grid=(2, 3), steps_per_commit=4, causal=False)
    layer, held, planned = Layer(policy=policy("full"), geometry=geometry), [], []
    for number in range(1, 20):
        layer.write(*torch.zeros(2, 1, 2, 24, 12), replace=True)
        layer.commit()
        shape = attrs.evolve(WAN, layers=1, geometry=geometry, steps=4 * number)
        held.append(bytes_in(memory_usage_of([layer]), "device"))
        planned.append(cost(policy("full"), shape).device_bytes)
        assert cost(policy("full"), shape).cached_bytes * 5 // 4 == planned[-1]
    assert all(have <= most for have, most in zip(held, planned, strict=True))
    assert max(have / most for have, most in zip(held, planned, strict=True)) > 0.9


@pytest.mark.parametrize("name", ["packforcing", "rolling-window", "sink-rolling-window"])
def test_a_video_of_less_than_a_block_has_no_history(name):
    assert cost(policy(name), attrs.evolve(WAN, steps=2)).cached_bytes == 0


def test_a_short_text_is_attended_whole():
    shape = attrs.evolve(WAN, geometry=Geometry(kv_heads=2, head_dim=4), steps=100)
    for name in ("full", "streaming", "archive", "packforcing-lm"):
        assert cost(policy(name), shape).attended == 100
