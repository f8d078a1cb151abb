"""Packed training: one forward over a clip equals `CausalWan` block by block, and its loss reaches the compressor."""

import pytest
import torch

from kvtiers import GeometryError, UnsupportedModelError
from kvtiers_diffusers import tiered
from kvtiers_packforcing.dual_branch import DualBranch
from kvtiers_packforcing.network import HighResolution
from kvtiers_packforcing.training.layout import Layout
from kvtiers_packforcing.training.packed import packed
from tiny_wan import CHANNELS, TEXT, build

BLOCKS, FRAMES, HIGH, WIDE = 5, 4, 8, 16
OFFSETS = DualBranch().offsets(FRAMES, (HIGH // 2, WIDE // 2))


def parts(seed=0):
    model = build(cross_attn_norm=True)
    torch.manual_seed(1)
    network = HighResolution(CHANNELS, 48, (8, 16, 16, 16))
    torch.nn.init.normal_(network.layers[-1].weight, std=0.3)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 3, CHANNELS, BLOCKS * FRAMES, HIGH, WIDE, generator=generator)
    sigmas = torch.rand(2, 3, BLOCKS, generator=generator)
    sigmas[:, 0] = 0
    text = torch.randn(2, BLOCKS, 3, TEXT, generator=generator)
    return model, network, latents, sigmas, text


def reduced_tokens(network, layout, latents):
    cut = latents[:, 0].unflatten(2, (BLOCKS, FRAMES))
    tokens = [network(cut[:, :, block]).flatten(2).transpose(1, 2) for block in layout.compressed(BLOCKS)]
    return {"reduced": torch.stack(tokens, 1), "offsets": OFFSETS} if tokens else {}


def block_by_block(model, policy, latents, sigmas, text, **options):
    """The flow of every stream, from a `CausalWan` that commits stream 0."""
    flows = torch.empty_like(latents)
    with torch.no_grad(), tiered(model, policy, block_frames=FRAMES, **options) as wan:
        for block in range(BLOCKS):
            cut = slice(block * FRAMES, (block + 1) * FRAMES)
            for stream in range(1, latents.shape[1]):
                flows[:, stream, :, cut] = wan.denoise(
                    latents[:, stream, :, cut], sigmas[:, stream, block] * 1000, text[:, block]
                )
            flows[:, 0, :, cut] = wan.commit(latents[:, 0, :, cut], text[:, block])
    return flows


LIKE = {
    "full": (Layout(mid="full"), {}),
    "packforcing": (Layout(), {"sink": 4, "recent": 4, "branches": "hr"}),
    "rolling-window": (Layout(sink_blocks=0, recent_blocks=2, mid="none"), {"recent": 8}),
    "sink-rolling-window": (Layout(recent_blocks=2, mid="none"), {"sink": 4, "recent": 8}),
}


@pytest.mark.parametrize("policy", LIKE)
@torch.no_grad()
def test_a_packed_forward_equals_the_cache_block_by_block(policy):
    model, network, latents, sigmas, text = parts()
    layout, options = LIKE[policy]
    if policy == "packforcing":
        options = options | {"compressor_network": network}
    with packed(model, layout) as wan:
        found = wan(latents, sigmas, text, **reduced_tokens(network, layout, latents))
        swapped = wan(latents, sigmas, text.flip(1), **reduced_tokens(network, layout, latents))
    wanted = block_by_block(model, policy, latents, sigmas, text, **options)
    assert (found - wanted).abs().max() < 2e-6
    assert (swapped - wanted).abs().max() > 1e-3, "prompts make no difference"
    others = [Layout(mid=mid) for mid in ("full", "none") if Layout(mid=mid) != layout]
    for other in others:
        with packed(model, other) as wan:
            assert (wan(latents, sigmas, text) - wanted).abs().max() > 1e-4, "the layout makes no difference"


def test_affinities_are_of_the_form_that_is_attended():
    """Recomputed from what the norms gave: whole sink and recent block, reduced tokens of what lies between."""
    model, network, latents, sigmas, text = parts()
    layout, found, normed = Layout(), [], []
    for layer in model.blocks:
        for norm in (layer.attn1.norm_q, layer.attn1.norm_k):
            norm.register_forward_hook(lambda _, __, out: normed.append(out))
    with packed(model, layout) as wan:
        wan(latents, sigmas, text, affinities=found, **reduced_tokens(network, layout, latents))
    rotary, (batch, streams, blocks), heads = wan.rotary, sigmas.shape, model.config.num_attention_heads
    own = FRAMES * (HIGH // 2) * (WIDE // 2)
    whole = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (FRAMES, HIGH // 2, WIDE // 2)), indexing="ij"), -1)

    def mean(tokens, positions, at):
        moved = positions.double() + torch.tensor([at * FRAMES, 0, 0])
        return rotary.apply(tokens, rotary.table(moved, tokens.dtype)).mean(-2)

    for layer, affinity in enumerate(found):
        query, key = (
            part.unflatten(2, (heads, -1)).transpose(1, 2).unflatten(0, (batch, streams, blocks))
            for part in normed[2 * layer : 2 * layer + 2]
        )
        for block in range(blocks):
            of_block = mean(query[:, 1:, block, :, :own], whole.flatten(0, 2), block)
            for past, form in layout.history(block):
                part, at = (slice(own), whole.flatten(0, 2)) if form == "full" else (slice(own, None), OFFSETS)
                wanted = (of_block * mean(key[:, 0, past, :, part], at, past)[:, None]).sum(-1) / query.shape[-1] ** 0.5
                assert torch.allclose(affinity[:, :, block, past], wanted, atol=1e-5), (layer, block, past)
    assert len(found) == len(model.blocks) == 2
    (of_compressor,) = torch.autograd.grad(found[0][:, :, 3, 1].sum(), network.layers[-1].weight, retain_graph=True)
    (of_none,) = torch.autograd.grad(
        found[0][:, :, 3, 0].sum(), network.layers[-1].weight, retain_graph=True, materialize_grads=True
    )
    assert of_compressor.norm() > 0
    assert of_none.norm() == 0, "the first layer's whole keys know nothing of the compressor"


@torch.no_grad()
def test_only_the_distance_between_blocks_counts():
    model, network, latents, sigmas, text = parts()
    layout, starts = Layout(), torch.tensor([[0, 4, 8, 12, 16], [0, 4, 40, 44, 60]])
    more = reduced_tokens(network, layout, latents)
    with packed(model, layout) as wan:
        plain = wan(latents, sigmas, text, **more)
        gaps = wan(latents, sigmas, text, starts=starts, **more)
        later = wan(latents, sigmas, text, starts=starts + 100, **more)
    assert torch.allclose(plain[0], gaps[0], atol=1e-6)
    assert (plain[1] - gaps[1]).abs().max() > 1e-4
    assert torch.allclose(gaps, later, atol=2e-5)


@torch.no_grad()
def test_a_block_that_attends_itself_compressed_has_an_earlier_block_that_was_the_same():
    model, network, latents, sigmas, text = parts()
    latents, sigmas, text = latents[..., : 2 * FRAMES, :, :].clone(), sigmas[:, :, :2], text[:, :2].clone()
    latents[:, 0, :, FRAMES:], text[:, 1] = latents[:, 0, :, :FRAMES], text[:, 0]
    tokens = network(latents[:, 0, :, :FRAMES]).flatten(2).transpose(1, 2)[:, None]
    starts = torch.tensor([[0, 3 * FRAMES]]).expand(2, -1)
    twice = Layout(sink_blocks=0, recent_blocks=0)
    with packed(model, twice) as wan:
        wanted = wan(latents, sigmas, text, starts=starts, reduced=tokens, offsets=OFFSETS)
    found = {}
    for earlier in (3, 1):
        offsets = OFFSETS - torch.tensor([earlier * FRAMES, 0, 0])
        with packed(model, Layout(sink_blocks=0, recent_blocks=0, mid="none", itself=True)) as wan:
            both = tokens.expand(-1, 2, -1, -1)
            found[earlier] = wan(latents, sigmas, text, starts=starts, reduced=both, offsets=offsets)
    off = {earlier: (flow - wanted)[:, :, :, FRAMES:].abs().max() for earlier, flow in found.items()}
    assert off[3] < 2e-6
    assert off[1] > 1e-4, "the distance makes no difference"


def gradients(checkpointed):
    model, network, latents, sigmas, text = parts()
    if checkpointed:
        model.enable_gradient_checkpointing()
    model.train()
    layout = Layout()
    with packed(model, layout) as wan:
        flow = wan(latents, sigmas, text, **reduced_tokens(network, layout, latents))
        flow[:, 1:, :, -FRAMES:].square().mean().backward()
    return [*model.named_parameters(), *network.named_parameters()]


def test_the_last_blocks_loss_reaches_the_compressor_with_and_without_checkpointing():
    plain, checkpointed = gradients(False), gradients(True)
    for (name, one), (_, other) in zip(plain, checkpointed, strict=True):
        assert one.grad is not None, name
        assert one.grad.any(), name
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-8), name


def test_a_block_learns_nothing_of_later_ones():
    model, network, latents, sigmas, text = parts()
    layout = Layout()
    latents.requires_grad_()
    with packed(model, layout) as wan:
        flow = wan(latents, sigmas, text, **reduced_tokens(network, layout, latents))
    flow[:, :, :, 2 * FRAMES : 3 * FRAMES].sum().backward()
    assert latents.grad[:, :, :, : 3 * FRAMES].any()
    assert not latents.grad[:, :, :, 3 * FRAMES :].any()
    assert not latents.grad[:, 1:, :, : 2 * FRAMES].any(), "a noisy past is attended"


def test_a_model_is_given_back_as_it_was_and_refused_where_it_cannot_be_packed():
    model, _, latents, sigmas, text = parts()
    own = dict(model.attn_processors)
    with packed(model, Layout()) as wan:
        with pytest.raises(GeometryError, match="attends 2 of 5 blocks compressed, got reduced tokens of 0"):
            wan(latents, sigmas, text)
        with pytest.raises(GeometryError, match="20 latent frames cannot be cut into 3 blocks"):
            wan(latents, sigmas[:, :, :3], text[:, :3])
        with pytest.raises(UnsupportedModelError, match="not directly"):
            model(latents[:, 0], sigmas[:, 0, 0], text[:, 0])
    assert model.attn_processors == own
    assert not model.blocks[0]._forward_pre_hooks
    assert not model.blocks[-1]._forward_hooks


def test_the_compressors_gradient_through_the_mid_tokens_is_right_by_finite_differences(monkeypatch):
    """In float64: diffusers casts to float32 here and there by `.float()`, which would hide a wrong digit."""
    cast = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else cast(x))
    model, network, latents, sigmas, text = parts()
    model, network, layout = model.double(), network.double(), Layout()
    latents, sigmas, text = latents.double(), sigmas.double(), text.double()

    def loss():
        with packed(model, layout) as wan:
            flow = wan(latents, sigmas, text, **reduced_tokens(network, layout, latents))
        return flow[:, 1:, :, -FRAMES:].square().sum()  # of the block whose history is compressed

    weights = list(network.parameters())
    for weight, slope in zip(weights, torch.autograd.grad(loss(), weights), strict=True):
        way = slope / slope.norm()
        with torch.no_grad():
            around = []
            for step in (1e-5, -2e-5):
                weight.add_(way, alpha=step)
                around.append(loss())
            weight.add_(way, alpha=1e-5)
        assert slope.norm() > 1e-3
        assert torch.allclose(slope.norm(), (around[0] - around[1]) / 2e-5, rtol=2e-7)
