"""With gradients the same context is functional: backward works, is right, and later writes do not reach it."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kvtiers.blocks import Blocks
from kvtiers.geometry import Geometry
from kvtiers.presets import build, policy
from kvtiers.rotary import Rotary
from strategies import (
    Setting,
    allowed,
    attend,
    attend_context,
    cuts,
    feed,
    fewer,
    per_head,
    policies,
    rotary,
    settings_of,
)


def attend32(query, context):
    """Attention that keeps the context itself for backward, not a copy."""
    return scaled_dot_product_attention(query, context.keys, context.values, attn_mask=allowed(context))


@fewer
@given(data=st.data())
def test_gradients_of_current_tokens_are_those_of_plain_attention(data):
    setting = data.draw(settings_of(policies(attend="full", top_k_compressed=0)))
    layer, tokens = setting.layer(), setting.tokens
    lengths = data.draw(cuts(setting.policy, most=6))
    for _ in feed(layer, tokens, lengths[:-1]):
        pass
    start = sum(lengths[:-1])
    now = tokens.part(start, start + lengths[-1])
    query, keys, values = (x.clone().requires_grad_() for x in (now.query, now.keys, now.values))
    layer.write(keys, values)
    layer.select(query)
    context = layer.context()
    origins, placed = per_head(context.origins, context), per_head(context.placed, context)
    own, past = (
        [x.clone().requires_grad_() for x in (now.query, now.keys, now.values)],
        origins[..., : -context.current],
    )

    def at(x, where):
        return x.gather(2, where.long()[..., None].expand(-1, -1, -1, x.shape[-1]))

    every_key = torch.cat([at(tokens.keys, past), own[1]], 2)
    every_value = torch.cat([at(tokens.values, past), own[2]], 2)
    placed_query = own[0]
    if setting.policy.realigner.rotates:
        every_key = setting.rotary.rotate(every_key, placed[..., None])
        current = placed[..., -context.current :, None].repeat_interleave(query.shape[1] // keys.shape[1], 1)
        placed_query = setting.rotary.rotate(own[0], current)
    want = attend(placed_query, every_key, every_value, allowed(context))
    got = attend(layer.place_query(query), context.keys, context.values, allowed(context))
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(0), dtype=want.dtype)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    for mine, theirs in zip((query, keys, values), own, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", ["keys", "values", "query", "all"])
@pytest.mark.parametrize("name", ["full", "sliding-window", "streaming", "archive", "packforcing-lm"])
def test_later_appends_do_not_corrupt_an_earlier_backward(name, needs):
    found = policy(name)
    found = attrs.evolve(found, recent=None if found.recent is None else 3, block_size=2, sink=1, top_k=1)
    setting = Setting(policy=found, geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0)

    def loss_and_grads(*, more: bool):
        layer, grads, outputs = setting.layer(), [], []
        for start in range(0, 12, 3):
            now = setting.tokens.part(start, start + 3)
            leaves = {name: x.clone() for name, x in (("query", now.query), ("keys", now.keys), ("values", now.values))}
            for leaf_name, leaf in leaves.items():
                leaf.requires_grad_(needs in (leaf_name, "all"))
            layer.write(leaves["keys"], leaves["values"])
            layer.select(leaves["query"])
            outputs.append(attend32(layer.place_query(leaves["query"]), layer.context()).square().sum())
            grads += [leaf for leaf in leaves.values() if leaf.requires_grad]
            if not more:
                outputs.pop().backward()
        if more:
            sum(outputs).backward()
        return [leaf.grad for leaf in grads]

    for late, at_once in zip(loss_and_grads(more=True), loss_and_grads(more=False), strict=True):
        assert torch.allclose(late, at_once, rtol=1e-5, atol=1e-6)


def test_a_context_that_was_read_with_gradients_is_not_written_over():
    setting = Setting(
        policy=policy("streaming", sink=1, recent=2, block_size=1, chunk_size=4),
        geometry=Geometry(kv_heads=1, head_dim=4),
        rotary=rotary(4),
        seed=0,
        steps=200,
    )
    layer, tokens = setting.layer(), setting.tokens
    now = tokens.part(0, 4)
    keys = now.keys.clone().requires_grad_()
    layer.write(keys, now.values)
    layer.select(now.query)
    context = layer.context()
    before = context.keys.detach().clone()
    list(feed(layer, tokens, [4] * 40, start=4))
    assert torch.equal(context.keys, before)


def test_without_gradients_a_context_is_a_view_and_nothing_is_copied():
    setting = Setting(
        policy=policy("streaming", sink=1, recent=4, block_size=1, chunk_size=4),
        geometry=Geometry(kv_heads=1, head_dim=4),
        rotary=rotary(4),
        seed=0,
    )
    layer = setting.layer()
    with torch.no_grad():
        list(feed(layer, setting.tokens, [4, 4]))
        context = layer.context()
    assert context.keys.untyped_storage().data_ptr() == layer.window.planes["rotated"].untyped_storage().data_ptr()
    assert context.values.untyped_storage().data_ptr() == layer.window.planes["values"].untyped_storage().data_ptr()


def test_history_holds_no_graph():
    setting = Setting(
        policy=policy("archive", sink=1, recent=2, block_size=1, top_k=2, realigner=build("realigner", "contiguous")),
        geometry=Geometry(kv_heads=1, head_dim=4),
        rotary=rotary(4),
        seed=0,
    )
    layer, tokens = setting.layer(), setting.tokens
    for start in range(0, 12, 2):
        now = tokens.part(start, start + 2)
        layer.write(now.keys.clone().requires_grad_(), now.values.clone().requires_grad_())
        layer.select(now.query.clone().requires_grad_())
    planes = [*layer.window.planes.values(), *layer.placed.unrotated.planes.values(), layer.history.digests.buffer]
    assert len(planes) == 4
    assert not any(plane.requires_grad for plane in planes)
    assert not any(part.requires_grad for part in layer.history.stores["full"].parts().values())
    now = tokens.part(12, 13)
    layer.write(now.keys, now.values)
    layer.select(now.query)
    assert not layer.context().keys.requires_grad


@pytest.mark.parametrize("realigner", ["contiguous", "original", "incremental"])
def test_gradients_through_archived_blocks_are_those_of_the_numbers(realigner):
    """What the model projected of a compressed block, by finite differences in float64."""
    pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")
    from kvtiers_diffusers.graph_layer import GraphLayer

    geometry = Geometry(kv_heads=2, head_dim=12, grid=(4, 4), steps_per_commit=2, causal=False, dtype=torch.float64)
    turn = Rotary(
        [torch.tensor([1.0, 0.1]), torch.tensor([0.7, 0.1]), torch.tensor([0.5, 0.2])],
        layout="interleaved",
        angle_dtype=torch.float64,
    )
    found = policy(
        "packforcing", sink=2, recent=2, top_k=2, realigner=realigner, compressor=("dual-branch", {"branches": "hr"})
    )
    offsets, random = found.compressor.offsets(2, (4, 4)), torch.Generator().manual_seed(0)
    full = torch.randn(6, 3, 1, 2, 32, 12, generator=random, dtype=torch.float64)

    def attended(keys, values):
        layer = GraphLayer(policy=found, geometry=geometry, rotary=turn)
        for number in range(6):
            query, key, value = full[number]
            layer.write(key, value, replace=True)
            layer.select(query)
            if number < 5:
                layer.commit(
                    Blocks(
                        keys=keys[number][:, :, None],
                        values=values[number][:, :, None],
                        offsets=offsets[None, None, None],
                        starts=torch.tensor([layer.committed_steps]),
                        span=2,
                    )
                )
        assert layer.history.count == 3
        return attend_context(layer.place_query(full[5, 0]), layer.context())

    shape = (5, 1, 2, 1, 12)
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(attended, inputs, atol=1e-6, fast_mode=True)
    moved = torch.autograd.grad(attended(*inputs).sum(), inputs[1])[0]
    assert moved.any()
