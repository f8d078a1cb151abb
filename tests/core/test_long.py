"""100,000 tokens through a tiny layer: attended tokens and device bytes stay within what each preset promises."""

import attrs
import pytest
import torch

from kvtiers import trials
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.presets import policy
from strategies import names, rotary

TOKENS = 100_000
GEOMETRY = Geometry(kv_heads=1, head_dim=4)
BOUNDED = [name for name in names("policy") if policy(name).bound(GEOMETRY) is not None]


def test_which_presets_are_bounded():
    """Those for video are bounded by their blocks; as text, in one chunk of any length, they are not."""
    assert set(names("policy")) - set(BOUNDED) == {"full", "rolling-window", "sink-rolling-window"}
    video = attrs.evolve(GEOMETRY, causal=False, steps_per_commit=3)
    assert all(policy(name).bound(video) == 21 for name in ("rolling-window", "sink-rolling-window"))


def runs() -> list:
    """Presets that score their whole archive for every chunk take long; in the quick run they read less."""
    quick = [name for name in BOUNDED if policy(name).compressor.drops]
    scored = [name for name in BOUNDED if name not in quick]
    return [
        *(pytest.param(name, TOKENS, id=name) for name in quick),
        *(pytest.param(name, TOKENS // 8, id=f"{name} for an eighth") for name in scored),
        *(pytest.param(name, TOKENS, id=name, marks=pytest.mark.slow) for name in scored),
    ]


@pytest.mark.parametrize(("name", "tokens"), runs())
def test_a_hundred_thousand_tokens_stay_within_bounds(name, tokens):
    """In chunks, and one by one now and then, as a long conversation would."""
    found = policy(name)
    layer = Layer(policy=found, geometry=GEOMETRY, rotary=rotary(4))
    bound, chunk = found.bound(GEOMETRY), found.chunk_size
    flat: set[int] = set()
    pool = torch.randn(3, 1, 1, chunk * 7, 4, generator=torch.Generator().manual_seed(0))
    number = 0
    while layer.num_steps < tokens:
        steps = 1 if number % 100 < 5 else chunk
        query, keys, values = pool[..., (number % 7) * chunk :, :][..., :steps, :]
        layer.write(keys, values)
        layer.select(query)
        assert layer.context().keys.shape[2] <= bound
        if number % 20 == 0:
            limit = found.bound_bytes(GEOMETRY, layer.history.count)
            held = trials.storages(layer)
            assert held["device"] <= limit
            if number:
                flat.add(held["device"])
        number += 1
    assert sum(layer.tier_counts().values()) == layer.num_steps >= tokens
    if found.compressor.drops:
        assert len(flat) == 1
        assert layer.tier_counts()["dropped"] > 0.9 * tokens
    else:
        assert layer.history.count * found.block_size == layer.tier_counts()["mid"] > 0.9 * tokens
