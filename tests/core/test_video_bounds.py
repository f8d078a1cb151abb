"""However long a video becomes: what a denoise step attends, where its tensors lie, and what is held do not change."""

import pytest
import torch

from kvtiers.accounting import bytes_in, memory_usage_of
from kvtiers.blocks import Blocks, Context
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.presets import policy
from kvtiers.rotary import Rotary


def wan_rotary(head_dim: int) -> Rotary:
    space = 2 * (head_dim // 6)
    axes = (head_dim - 2 * space, space, space)
    return Rotary([10_000.0 ** -(torch.arange(0, n, 2) / n) for n in axes], layout="interleaved")


def one_block(layer: Layer, make: object, *, steps: int = 2) -> Context:
    """Denoise in `steps` passes, then the clean pass with reduced tokens; returns the last denoising context."""
    geometry, compressor = layer.geometry, layer.policy.compressor
    tokens = geometry.steps_per_commit * geometry.tokens_per_step
    shape = (geometry.batch, geometry.kv_heads, tokens, geometry.head_dim)
    for _ in range(steps):
        layer.write(make(shape), make(shape), replace=True)
        layer.select(make(shape))
        context = layer.context()
    layer.write(make(shape), make(shape), replace=True)
    layer.select(make(shape))
    offsets = compressor.offsets(geometry.steps_per_commit, geometry.grid).to(make((1,)).device)
    small = (*shape[:2], len(offsets), shape[3])
    layer.commit(
        Blocks(
            keys=make(small)[:, :, None],
            values=make(small)[:, :, None],
            offsets=offsets[None, None, None],
            starts=torch.tensor([layer.committed_steps]),
            span=compressor.span(geometry.steps_per_commit),
        )
    )
    return context


def test_a_video_of_an_hour_attends_27_872_tokens_a_step():
    """The published geometry, on the meta device: shapes are real, numbers are not."""
    geometry = Geometry(
        kv_heads=12, head_dim=128, grid=(30, 52), steps_per_commit=4, causal=False, dtype=torch.bfloat16
    )
    found = policy("packforcing", archive="device")
    layer = Layer(policy=found, geometry=geometry, rotary=wan_rotary(128))
    with torch.device("meta"):
        seen = [one_block(layer, lambda shape: torch.empty(shape, dtype=torch.bfloat16), steps=1) for _ in range(40)]
    counts = [context.keys.shape[2] for context in seen]
    assert counts == [min(i, 2) * 6240 + (i > 2) * 6240 + min(max(i - 3, 0), 16) * 182 + 6240 for i in range(40)]
    assert counts[-1] == found.bound(geometry) == 27_872


@pytest.mark.slow
def test_an_hour_really_is_an_hour():
    geometry = Geometry(kv_heads=1, head_dim=12, grid=(4, 4), steps_per_commit=4, causal=False)
    found = policy("packforcing", archive="host")
    layer = Layer(policy=found, geometry=geometry, rotary=wan_rotary(12))
    bound = found.bound(geometry)
    for number in range(3_600):
        context = one_block(layer, torch.randn, steps=1)
        assert context.keys.shape[2] == bound or number < 19
        assert context.keys.shape[2] <= bound
    assert (layer.history.count, layer.committed_steps) == (3_600 - 3, 14_400)
    assert bytes_in(memory_usage_of([layer]), "device") <= found.bound_bytes(geometry, layer.history.count)


@pytest.mark.parametrize("archive", ["host", "disk"])
@torch.no_grad()  # else a context is a copy, which backward can rely on
def test_past_top_k_nothing_of_a_denoise_step_moves(archive):
    geometry = Geometry(kv_heads=2, head_dim=12, grid=(4, 4), steps_per_commit=4, causal=False)
    found = policy("packforcing", archive=archive, top_k=3)
    layer = Layer(policy=found, geometry=geometry, rotary=wan_rotary(12))
    seen = [one_block(layer, torch.randn) for _ in range(14)]
    steady = seen[7:]
    places = {(c.keys.data_ptr(), c.values.data_ptr(), c.keys.shape, c.current) for c in steady}
    assert len(places) == 1
    assert len({(c.keys.data_ptr(), c.keys.shape) for c in seen}) > 3
    last = one_block(layer, torch.randn).placed
    context = one_block(layer, torch.randn)
    assert torch.equal(context.placed, last)
    assert not torch.equal(context.origins, last)
    device = {h.tier: h.bytes for h in memory_usage_of([layer]) if h.location == "device" and h.tier != "digests"}
    for _ in range(6):
        one_block(layer, torch.randn)
    assert {
        h.tier: h.bytes for h in memory_usage_of([layer]) if h.location == "device" and h.tier != "digests"
    } == device
