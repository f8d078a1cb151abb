"""However long a video becomes: what a denoise step attends, where its tensors lie, and what is held do not change."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from kvtiers.accounting import bytes_in, memory_usage_of
from kvtiers.blocks import Blocks, Context
from kvtiers.changes import why_not_crop
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.planning import Shape
from kvtiers.presets import policy
from kvtiers.rotary import Rotary
from kvtiers_models.costs import cost


def wan_rotary(head_dim: int) -> Rotary:
    space = 2 * (head_dim // 6)
    axes = (head_dim - 2 * space, space, space)
    return Rotary([10_000.0 ** -(torch.arange(0, n, 2) / n) for n in axes], layout="interleaved")


def one_block(layer: Layer, make: object, *, steps: int = 2) -> Context:
    """Denoise in `steps` passes, then the clean pass, with reduced tokens if the policy wants them; returns the last
    denoising context."""
    geometry, compressor = layer.geometry, layer.policy.compressor
    tokens = geometry.steps_per_commit * geometry.tokens_per_step
    shape = (geometry.batch, geometry.kv_heads, tokens, geometry.head_dim)
    for _ in range(steps):
        layer.write(make(shape), make(shape), replace=True)
        layer.select(make(shape))
        context = layer.context()
    layer.write(make(shape), make(shape), replace=True)
    layer.select(make(shape))
    if not compressor.given:
        layer.commit()
        return context
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


def tensors_of(thing: object, seen: set[int], location: str) -> Iterator[Tensor]:
    """Every tensor that can be reached from a layer, archives elsewhere than on `location` left out."""
    if id(thing) in seen or isinstance(thing, Rotary | Geometry):  # tables of angles are one for all layers
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for name, value in thing.items():
            if name != "stores" or location == "device":
                yield from tensors_of(value, seen, location)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors_of(value, seen, location)
    elif type(thing).__module__.startswith("kvtiers"):
        yield from tensors_of(vars(thing) if hasattr(thing, "__dict__") else {}, seen, location)


def held(layer: Layer) -> int:
    """Bytes of the storages that a layer really holds on the device, however they are accounted for."""
    found = tensors_of(layer, set(), layer.policy.archive.location)
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


@pytest.mark.parametrize("realigner", ["contiguous", "original", "incremental", ("incremental", {"rotations": "once"})])
@pytest.mark.parametrize("archive", ["host", "device"])
@pytest.mark.parametrize(("sink", "recent"), [(0, 4), (4, 4), (6, 7), (8, 12)])
@torch.no_grad()
def test_no_more_is_held_at_any_step_than_the_bound_says(realigner, archive, sink, recent):
    geometry = Geometry(kv_heads=2, head_dim=12, grid=(8, 8), steps_per_commit=4, causal=False, batch=2)
    found = policy("packforcing", sink=sink, recent=recent, top_k=3, archive=archive, realigner=realigner)
    layer, most = Layer(policy=found, geometry=geometry, rotary=wan_rotary(12)), 0

    def check(drawn):
        nonlocal most
        now, bound = held(layer), found.bound_bytes(geometry, layer.history.count)
        assert bytes_in(memory_usage_of([layer]), "device") == now <= bound
        most = max(most, now)
        return torch.randn(drawn)

    for _ in range(20):
        one_block(layer, check)
        check(())
    if archive == "host":
        assert most > 0.8 * found.bound_bytes(geometry, layer.history.count)
    if layer.placed.unrotated is not None:  # of what stays recent, and of the sink if it is rotated anew
        frames = found.unrotated_slots(geometry) // 64
        assert frames == (recent + 3) // 4 * 4
        anew = found.realigner.sink_moves == "anew"
        assert layer.placed.unrotated.slots == 64 * (frames + (-(-sink // 4) * 4 if anew else 0))


def test_two_minutes_of_the_published_geometry_take_no_more_than_6_gb_on_the_device():
    geometry = Geometry(
        kv_heads=12, head_dim=128, grid=(30, 52), steps_per_commit=4, causal=False, dtype=torch.bfloat16
    )
    two_minutes = Shape(name="wan", layers=30, geometry=geometry, steps=480, growth_steps=240, growth_unit="minute")
    found = cost(policy("packforcing"), two_minutes)
    assert (found.attended, found.device_bytes <= 6.0e9) == (27_872, True)
    assert found.device_bytes > found.cached_bytes + 30 * 6_240 * geometry.token_bytes  # the current block is counted


def by_tier(layer: Layer) -> dict[str, int]:
    """Steps by tier, as the layout has it; it knows no blocks that are dropped."""
    found = dict.fromkeys(("sink", "mid", "recent"), 0)
    for extent, tier in layer.timeline.layout(layer.committed_steps):
        found[tier] += extent.steps
    return found


@pytest.mark.parametrize("kept", [0, 2, 5, 9])
@pytest.mark.parametrize("name", ["packforcing", "rolling-window", "sink-rolling-window", "archive", "full"])
@torch.no_grad()
def test_the_layout_agrees_with_the_tiers_also_after_compact_and_rewind(name, kept):
    geometry = Geometry(kv_heads=1, head_dim=12, grid=(4, 4), steps_per_commit=2, causal=False)
    found = policy(name)
    sizes = {"sink": 4, "recent": 4} if name != "full" else {}
    found = policy(found, **{key: value for key, value in sizes.items() if key != "sink" or found.sink})
    layer, moved = Layer(policy=found, geometry=geometry, rotary=wan_rotary(12)), 0

    def agree() -> None:
        counts = layer.tier_counts()
        assert by_tier(layer) == {
            "sink": counts["sink"],
            "mid": counts["mid"] + counts["dropped"],
            "recent": counts["recent"],
        }

    for number in range(14):
        one_block(layer, torch.randn, steps=1)
        agree()
        if number % 5 == 4:
            before = layer.recent_start
            layer.compact(kept)
            moved += layer.recent_start - before
            agree()
        if number == 11:
            again = layer.rewind_recent()
            assert layer.num_steps == layer.recent_start == 24 - again
            agree()
    assert moved == 0 if kept > 4 and name != "full" else moved > 0


def test_a_video_can_be_rolled_back_to_blocks_that_had_left_recent_before_as_they_had_now():
    geometry = Geometry(kv_heads=1, head_dim=12, grid=(4, 4), steps_per_commit=2, causal=False)
    layer = Layer(policy=policy("archive", sink=0, recent=4), geometry=geometry, rotary=wan_rotary(12))
    for _ in range(3):
        one_block(layer, torch.randn)
    layer.compact(0)
    one_block(layer, torch.randn)
    assert why_not_crop(layer, 6) is None
    assert "have left recent since then" in str(why_not_crop(layer, 4))
    layer.crop(6)
    assert (by_tier(layer), layer.tier_counts()["mid"]) == ({"sink": 0, "mid": 6, "recent": 0}, 6)
