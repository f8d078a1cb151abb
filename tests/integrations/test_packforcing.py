"""PackForcing on an unmodified Wan: reduced tokens beside the full ones, chosen by exact digests, placed as named."""

import atexit
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvtiers
from kvtiers import Blocks, Geometry, Layer, PolicyError, SlotError, UnsupportedModelError
from kvtiers_diffusers import CausalWan, tiered
from kvtiers_diffusers.graph_layer import GraphLayer
from kvtiers_diffusers.processors import Pass, TieredSelfAttention
from kvtiers_diffusers.streaming_vae import StreamingDecoder
from kvtiers_packforcing import DualBranch
from kvtiers_packforcing.network import HighResolution
from tiny_wan import blocks, build, prompt, vae

SMALL: dict[str, Any] = {"sink": 4, "recent": 4, "top_k": 2}
LOW: dict[str, Any] = {"compressor": ("dual-branch", {"branches": "lr"})}
SHORT: dict[str, Any] = {"sink": 2, "recent": 2, "top_k": 2}
SQUARE = {"frames": 2, "high": 8, "wide": 8}  # 64 x 64 pixels, for what goes through an autoencoder
FRAMES = {"frames": 4, "high": 16, "wide": 24}  # 8 x 12 tokens a frame, 2 x 2 x 3 cells a block


@cache
def weights() -> str:
    """A folder with a narrow HR branch whose last layer is not zero."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    torch.manual_seed(0)
    network = HighResolution(channels=16, width=48, widths=(8, 8, 8, 8))
    for part in (network.layers[-1].weight, network.layers[-1].bias):
        torch.nn.init.normal_(part, std=0.5)
    network.save_pretrained(folder.name)
    return folder.name


def hr(**changes: Any) -> dict[str, Any]:
    return {"compressor": ("dual-branch", {"branches": "hr", "weights": weights(), **changes})}


# ---------------------------------------------------------------- shapes and positions


@pytest.mark.parametrize(
    ("steps", "grid", "cells"),
    [
        pytest.param(4, (30, 52), (2, 7, 13), id="the paper's: 182 tokens"),
        pytest.param(3, (30, 52), (1, 7, 13), id="blocks of three"),
        pytest.param(2, (15, 9), (1, 3, 2), id="odd sizes"),
        pytest.param(5, (7, 4), (2, 1, 1), id="odd length"),
    ],
)
def test_the_branch_makes_as_many_cells_as_are_counted(
    steps: int, grid: tuple[int, int], cells: tuple[int, int, int]
) -> None:
    assert DualBranch().cells(steps, grid) == cells
    geometry = Geometry(kv_heads=1, head_dim=12, grid=grid, steps_per_commit=steps, causal=False)
    assert DualBranch().block_tokens(steps, geometry) == cells[0] * cells[1] * cells[2]
    network = HighResolution(channels=16, width=8, widths=(4, 4, 4, 4))
    made = network(torch.zeros(1, 16, steps, 2 * grid[0], 2 * grid[1]))
    assert made.shape == (1, 8, *cells)
    assert not made.any()


def test_the_published_geometry_attends_as_many_tokens_as_the_paper_says() -> None:
    found = kvtiers.policy("packforcing")
    geometry = Geometry(kv_heads=12, head_dim=128, grid=(30, 52), steps_per_commit=4, causal=False)
    assert found.block_tokens(geometry, "compressed") == 182
    assert found.bound(geometry) == 27_872
    held = (27_872 - 6_240) * 30 * 2 * 1536 * 2
    assert round(held / 1e9, 2) == 3.99
    uneven = kvtiers.policy("packforcing", sink=7, recent=5)
    assert uneven.bound(geometry) == (8 + 8 + 4) * 1560 + 16 * 182


@pytest.mark.parametrize(
    ("positions", "times", "rows", "span"),
    [
        ("center", {0.5, 2.5}, {1.5, 5.5}, 4),
        ("corner", {0.0, 2.0}, {0.0, 4.0}, 4),
        ("unit", {0.0, 1.0}, {0.0, 1.0}, 2),
    ],
)
def test_reduced_tokens_lie_where_their_name_says(
    positions: Any, times: set[float], rows: set[float], span: int
) -> None:
    found = DualBranch(positions=positions)
    offsets = found.offsets(4, (8, 12))
    assert offsets.shape == (12, 3)
    assert set(offsets[:, 0].tolist()) == times
    assert set(offsets[:, 1].tolist()) == rows
    assert offsets[:, 2].max() == max(rows) + (1 if positions == "unit" else 4)
    assert found.span(4) == span
    assert offsets[0, 0] == offsets[5, 0] < offsets[6, 0]


# ---------------------------------------------------------------- one pass for both resolutions


def separately(wan: CausalWan, block: Tensor, text: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The reduced K/V of one layer as a forward of the reduced tokens alone makes them, by hand."""
    model, cache = wan.transformer, wan.cache
    assert cache is not None
    assert wan.reducer is not None
    reduced = wan.reducer.reduce(block, None)
    _, time, words, _ = model.condition_embedder(torch.zeros(1), text, None, timestep_seq_len=None)
    time, hidden = time.unflatten(1, (6, -1)), reduced.tokens
    for number, part in enumerate(model.blocks):
        layer = cache.layers[number].layers()[0]
        shift, scale, gate, *_ = (part.scale_shift_table + time.float()).chunk(6, dim=1)
        inner = part.norm1(hidden.float()) * (1 + scale) + shift
        attn = part.attn1
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.norm_q(attn.to_q(inner)), attn.norm_k(attn.to_k(inner)), attn.to_v(inner))
        )
        if number == wanted:
            return key, value
        where = reduced.offsets.clone()
        where[:, 0] += layer.committed_steps + layer.window.recent_shift
        turned = [wan.rotary.rotate(x, where) for x in (query, key)]
        history = slice(layer.window.begin, layer.window.tail - layer.current)
        planes = layer.window.planes
        keys = torch.cat([planes["rotated"][:, :, history], turned[1]], 2)
        values = torch.cat([planes["values"][:, :, history], value], 2)
        out = torch.nn.functional.scaled_dot_product_attention(turned[0], keys, values)
        hidden = hidden + attn.to_out[0](out.transpose(1, 2).flatten(2)) * gate
        hidden = hidden + part.attn2.processor.own(part.attn2, part.norm2(hidden.float()), words)
        _, _, _, shift, scale, gate = (part.scale_shift_table + time.float()).chunk(6, dim=1)
        hidden = hidden + part.ffn(part.norm3(hidden.float()) * (1 + scale) + shift) * gate
    raise AssertionError(wanted)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_the_reduced_keys_are_those_of_a_forward_of_the_reduced_tokens_alone(layer: int) -> None:
    model, text, clips = build(), prompt(), blocks(6, **FRAMES)
    with tiered(model, "packforcing", **SMALL, **hr()) as wan:
        for clip in clips[:5]:
            wan.commit(clip, text)
        wan.denoise(clips[5], 900.0, text)
        keys, values = separately(wan, clips[5], text, layer)
        wan.commit(clips[5], text)
        assert wan.cache is not None
        held = wan.cache.layers[layer].layers()[0].history.waiting["20"]
        assert (held.keys[:, :, 0] - keys).abs().max() < 1e-5
        assert (held.values[:, :, 0] - values).abs().max() < 1e-5
        assert keys.abs().max() > 0.1


@torch.no_grad()
def test_reduced_tokens_change_nothing_of_the_full_ones() -> None:
    """The clean pass with them gives the flow that it gives without."""
    model, text, clips = build(), prompt(), blocks(5, **FRAMES)
    with tiered(model, "packforcing", **SMALL, **hr()) as wan:
        for clip in clips[:4]:
            wan.commit(clip, text)
        want = wan.denoise(clips[4], 0.0, text)
        assert (wan.commit(clips[4], text) - want).abs().max() < 1e-5


@torch.no_grad()
def test_after_a_commit_too_what_the_last_pass_attended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the block is history there is less in the window, but nothing has attended that yet."""
    model, text, seen = build(), prompt(), {0: 0, 1: 0}
    attend = TieredSelfAttention._attend

    def listen(self: TieredSelfAttention, query: Tensor, keys: Tensor, *others: Any) -> Tensor:
        seen[self.layer] = max(seen[self.layer], keys.shape[2])
        return attend(self, query, keys, *others)

    monkeypatch.setattr(TieredSelfAttention, "_attend", listen)
    told = []
    with tiered(model, "packforcing", **SMALL, **hr()) as wan:
        for clip in blocks(6, frames=4, high=8, wide=16):  # 128 tokens, 4 of them reduced
            for timestep in (900.0, 500.0, None):
                seen.update({0: 0, 1: 0})
                wan.commit(clip, text) if timestep is None else wan.denoise(clip, timestep, text)
                assert wan.attended() == [seen[0], seen[1]]
            told.append(wan.attended()[0])
        assert wan.cache is not None
        layer = wan.cache.every_layer()[0]
        assert layer.window.tail - layer.window.begin == 256
    assert told == [128, 256, 384, 388, 392, 392]


@torch.no_grad()
def test_anchors_are_not_compressed_and_what_has_aged_is() -> None:
    model, text = build(), prompt()
    with tiered(model, "packforcing", **SMALL, **hr()) as wan:
        for number, clip in enumerate(blocks(8, **FRAMES)):
            wan.commit(clip, text)
            assert wan.cache is not None
            layer = wan.cache.layers[0].layers()[0]
            assert set(layer.history.waiting) == {str(4 * number)} - {"0"}
            assert layer.history.count == max(0, number - 1)
        wan.denoise(clip, 500.0, text)
        assert max(wan.attended()) == wan.policies[0].bound(wan.cache.geometries[0]) == (4 + 4 + 4) * 96 + 2 * 12
        (store,) = layer.history.stores.values()
        tokens, spans = store.parts()["keys"].shape[3], layer.history.table.data
        assert spans is not None
        assert (set(layer.history.stores), tokens, set(spans[:, 2].tolist())) == ({"compressed"}, 12, {4})


@pytest.mark.parametrize("positions", ["center", "unit"])
@torch.no_grad()
def test_blocks_of_different_length_are_compressed_and_attended_and_the_first_may_be_one_frame(positions: str) -> None:
    model, text = build(), prompt()
    lengths = [1, 3, 4, 2, 4, 5, 3, 2, 4, 5]
    clips = [blocks(1, **{**FRAMES, "frames": n}, seed=n)[0] for n in lengths]
    changes = {"sink": 1, "recent": 5, "top_k": 6, "block_frames": 5, "even": False}
    with tiered(model, "packforcing", **changes, **hr(positions=positions)) as wan:
        for clip in clips:
            flow = wan.denoise(clip, 500.0, text)
            assert torch.equal(wan.denoise(clip, 500.0, text), flow)
            wan.commit(clip, text)
            assert wan.cache is not None
            assert max(wan.attended()) <= (wan.policies[0].bound(wan.cache.geometries[0]) or 0)
        layer = wan.cache.layers[0].layers()[0]
        assert layer.history.count == 8
        bias, table = layer.history.tokens["compressed"].bias, layer.history.table.data
        assert bias is not None
        assert table is not None
        bias = bias.data
        own = bias == 0
        assert ((bias == -torch.inf) == ~own).all()
        assert (own.sum(-1) == torch.tensor([n // 2 * 6 for n in lengths[1:9]])).all()
        assert table[:, 1].tolist() == lengths[1:9]
        assert table[:, 2].tolist() == [n // 2 if positions == "unit" else n for n in lengths[1:9]]
        wan.denoise(clips[3], 500.0, text)
        context = wan.cache.context(0)
        assert context.bias is not None
        hidden = context.bias == -torch.inf
        assert hidden.any()
        at = layer.window.attended
        want = wan.denoise(clips[4], 500.0, text)
        for name in ("rotated", "values"):  # whatever stands in the padding, nothing of it is seen
            layer.window.view(name, at)[hidden] = 7.0
        assert torch.equal(wan.denoise(clips[4], 500.0, text), want)


@torch.no_grad()
def test_an_anchor_passes_the_low_resolution_branch_by_which_remembers_its_last_frame() -> None:
    model, text, autoencoder = build(), prompt(), vae()
    clips = [blocks(1, **{**SQUARE, "frames": n}, seed=n)[0] for n in (1, 2, 2, 2)]
    with tiered(
        model, "packforcing", vae=autoencoder, sink=1, recent=2, top_k=2, block_frames=2, even=False, **LOW
    ) as wan:
        wan.commit(clips[0], text)
        assert wan.reducer is not None
        first = wan.reducer._last
        assert first is not None
        for clip in clips[1:]:
            wan.commit(clip, text)
            assert not torch.equal(wan.reducer._last, first)
        assert wan.cache is not None
        assert wan.cache.layers[0].layers()[0].history.count == 2
    with tiered(model, "packforcing", vae=autoencoder, sink=0, recent=2, block_frames=2, even=False, **LOW) as wan:
        with pytest.raises(PolicyError, match="at least 2 frames of 4 x 4 tokens, got 1 frames"):
            wan.commit(clips[0], text)
        assert wan.frames == 0


@pytest.mark.parametrize("realigner", ["original", "contiguous", "incremental"])
@pytest.mark.parametrize("positions", ["center", "corner", "unit"])
@torch.no_grad()
def test_every_realigner_places_reduced_blocks_and_keys_are_rotated_once(realigner: str, positions: str) -> None:
    model, text, clips = build(), prompt(), blocks(8, **FRAMES)
    passes: list[list[Tensor]] = [[], []]  # by layer, the keys that each pass made, before any rotation
    for block, made in zip(model.blocks, passes, strict=True):
        block.attn1.norm_k.register_forward_hook(
            lambda _m, _a, out, made=made: made.append(out.unflatten(2, (2, -1)).transpose(1, 2).clone())
        )
    with tiered(model, "packforcing", **SMALL, realigner=realigner, **hr(positions=positions)) as wan:
        for clip in clips[:7]:
            wan.commit(clip, text)
        wan.denoise(clips[7], 500.0, text)
        assert wan.cache is not None
        for number in (0, 1):
            layer, context = wan.cache.layers[number].layers()[0], wan.cache.context(number)
            origins, placed = (part.expand(1, 2, -1, 3) for part in (context.origins.double(), context.placed.double()))
            assert torch.equal(origins[..., 1:], placed[..., 1:])
            times = placed[0, 0, :, 0].unique()
            mid = 1 if positions == "unit" else 2
            want = {"original": 32, "contiguous": 4 + 2 * (2 * mid) + 8, "incremental": 32}[realigner]
            assert times.max() == want - 1
            assert layer.history.selection is not None
            chosen, own = layer.history.selection.chosen[0, 0].tolist(), 4 * 96
            keys = [passes[number][block + 1][:, :, own:] for block in chosen]  # the first block is an anchor
            keys = [passes[number][0], *keys, passes[number][6][:, :, :own], passes[number][7]]
            assert (wan.rotary.rotate(torch.cat(keys, 2), placed) - context.keys).abs().max() < 1e-5


@torch.no_grad()
def test_the_untrained_compressor_is_the_low_resolution_branch_alone() -> None:
    model, text, clips = build(), prompt(), blocks(4, **SQUARE)
    found = []
    for branches in ("both", "lr"):
        with tiered(
            model, "packforcing", vae=vae(), compressor=("dual-branch", {"branches": branches}), **SHORT
        ) as wan:
            for clip in clips:
                flow = wan.commit(clip, text)
            found.append(flow)
            assert wan.cache is not None
            assert wan.cache.layers[0].layers()[0].history.count == 2
    assert torch.equal(*found)


@torch.no_grad()
def test_pixels_that_were_streamed_are_used_and_else_the_block_is_decoded() -> None:
    model, text, clips, autoencoder = build(), prompt(), blocks(5, **SQUARE), vae()
    decoder, flows = StreamingDecoder(autoencoder), []
    for give in (True, False):
        with tiered(model, "packforcing", vae=autoencoder, **SHORT, **LOW) as wan:
            for clip in clips:
                flow = wan.commit(clip.clone(), text, decoder.decode(clip) if give else None)
            flows.append(flow)
    assert torch.equal(*flows)


@torch.no_grad()
def test_a_clean_pass_that_failed_can_be_repeated() -> None:
    """The branches remember the block before; they must not see one twice."""
    model, text, clips, autoencoder = build(), prompt(), blocks(5, **SQUARE), vae()
    flows = []
    for fails in (False, True):
        with tiered(model, "packforcing", vae=autoencoder, **SHORT, **LOW) as wan:
            for clip in clips:
                if fails:
                    handle = model.blocks[1].ffn.register_forward_pre_hook(_fail)
                    with pytest.raises(RuntimeError, match="out of luck"):
                        wan.commit(clip, text)
                    handle.remove()
                flow = wan.commit(clip, text)
            flows.append(flow)
            assert wan.frames == 10
            wan.reset()  # what was refused is forgotten with the video
            for clip in clips:
                flow = wan.commit(clip, text)
            assert torch.equal(flow, flows[-1])
    assert torch.equal(*flows)


def _fail(*_: object) -> None:
    raise RuntimeError("out of luck")


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("realigner", ["contiguous", "original"])
@pytest.mark.parametrize("lengths", [[4] * 6, [4, 4, 2, 4, 3, 4]], ids=["even", "uneven"])
def test_gradients_flow_through_archived_blocks_to_the_compressor(realigner: str, lengths: list[int]) -> None:
    model, text = build().double(), prompt().double()
    clips = [blocks(1, **{**FRAMES, "frames": n}, seed=n)[0].double() for n in lengths]
    even = len(set(lengths)) == 1
    changes = {**SMALL, "realigner": realigner, "block_frames": 4, "even": even, "keep_graph": True}
    with tiered(model, "packforcing", **changes, **hr()) as wan:
        assert wan.reducer is not None
        weight = wan.reducer.network.layers[-1].weight

        def loss() -> Tensor:
            wan.reset()
            for clip in clips[:-1]:
                wan.commit(clip, text)
            return wan.denoise(clips[-1], 500.0, text).square().sum()

        (slope,) = torch.autograd.grad(loss(), weight)
        assert wan.cache is not None
        assert wan.cache.every_layer()[0].history.count >= 2
        with torch.no_grad():
            calm = loss()
            direction = slope / slope.norm()
            ends = []
            for sign in (1, -1):
                weight += sign * direction
                ends.append(loss())
                weight -= sign * direction
        # Wan's norms are in float32, whatever the model's dtype: hence a long step and a rough comparison
        assert float(slope.norm()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=5e-2)
        assert loss().item() == pytest.approx(calm.item(), rel=1e-6)


def test_without_being_asked_no_graph_of_a_video_is_kept() -> None:
    model, text, clips = build(), prompt(), blocks(5, **FRAMES)
    with tiered(model, "packforcing", **SMALL, **hr()) as wan:
        for clip in clips[:4]:
            wan.commit(clip, text)
        wan.denoise(clips[4], 500.0, text).sum().backward()
        assert wan.reducer is not None
        assert wan.reducer.network.layers[-1].weight.grad is None
        assert wan.cache is not None
        layer = wan.cache.every_layer()[0]
        assert not isinstance(layer, GraphLayer)
        assert not any(block.keys.requires_grad for block in layer.history.waiting.values())


def test_a_graph_survives_a_fork_and_a_saved_video_goes_on_without_the_old_one(tmp_path: Path) -> None:
    model, text, clips = build(), prompt(), blocks(7, **FRAMES)
    with tiered(model, "packforcing", keep_graph=True, **{**SMALL, "top_k": 9}, **hr()) as wan:
        for clip in clips[:5]:
            wan.commit(clip, text)
        assert wan.cache is not None
        assert wan.reducer is not None
        fork = wan.cache.fork()
        wan.cache.save(tmp_path / "video")
        weight = wan.reducer.network.layers[-1].weight
        flow = wan.denoise(clips[5], 500.0, text)
        wan.cache = fork
        again = wan.denoise(clips[5], 500.0, text)
        slopes = [torch.autograd.grad(part.sum(), weight, retain_graph=True)[0] for part in (flow, again)]
        assert torch.equal(*slopes)
        wan.cache.reset()
        wan.cache.load(tmp_path / "video")
        loaded = wan.denoise(clips[5], 500.0, text)
        assert torch.allclose(loaded, flow, atol=1e-6)
        assert torch.autograd.grad(loaded.sum(), weight, allow_unused=True)[0] is None
        wan.commit(clips[5], text)
        wan.commit(clips[6], text)
        wan.denoise(clips[0], 500.0, text).sum().backward()
        assert weight.grad is not None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policy": "archive", "keep_graph": True}, SlotError, "keep_graph lets gradients reach a compressor"),
        ({"policy": "archive"}, UnsupportedModelError, "gradient checkpointing runs layers again"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model, (clip,) = build(), blocks(1)
    model.enable_gradient_checkpointing()
    own = dict(model.attn_processors)
    with pytest.raises(error, match=message), tiered(model, **changes, sink=2, recent=2) as wan:  # noqa: PT012 (at either)
        with torch.no_grad():
            wan.denoise(clip, 500.0, prompt())
        wan.denoise(clip, 500.0, prompt())
    assert model.attn_processors == own


# ---------------------------------------------------------------- what is chosen


@given(
    data=st.data(),
    archived=st.integers(1, 7),
    top_k=st.integers(1, 8),
    rows=st.integers(1, 2),
    heads=st.sampled_from([1, 2, 3, 4]),
    samples=st.none() | st.integers(1, 5),
)
def test_digests_choose_what_the_formula_chooses(
    data: st.DataObject, archived: int, top_k: int, rows: int, heads: int, samples: int | None
) -> None:
    """PackForcing section 3.3, brute force: every sampled query against every key of every block, half the heads."""
    frames, grid, cells = data.draw(st.sampled_from([(2, (4, 4), 1), (4, (4, 4), 2), (2, (8, 4), 2), (2, (8, 8), 4)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    geometry = Geometry(
        kv_heads=heads, head_dim=12, grid=grid, steps_per_commit=frames, causal=False, batch=rows, dtype=dtype
    )
    rotary = kvtiers.Rotary(
        [torch.tensor([1.0, 0.1]), torch.tensor([0.7, 0.1]), torch.tensor([0.5, 0.2])], layout="interleaved"
    )
    found = kvtiers.policy(
        "packforcing",
        sink=0,
        recent=frames,
        top_k=top_k,
        retriever=("affinity", {"form": "compressed", "queries": samples}),
        **hr(),
    )
    layer, random = (
        Layer(policy=found, geometry=geometry, rotary=rotary),
        torch.Generator().manual_seed(data.draw(st.integers(0, 99))),
    )
    shape = (rows, heads, frames * grid[0] * grid[1])
    reduced = DualBranch(branches="hr").offsets(frames, grid)
    kept = []
    for _ in range(archived + 1):
        layer.write(*(torch.randn(*shape, 12, generator=random).to(dtype) for _ in range(2)), replace=True)
        layer.select(torch.randn(*shape, 12, generator=random).to(dtype))
        small = [torch.randn(rows, heads, cells, 12, generator=random).to(dtype) for _ in range(3)]
        layer.commit(
            Blocks(
                keys=small[1][:, :, None],
                values=small[2][:, :, None],
                offsets=reduced[None, None, None],
                starts=torch.tensor([layer.committed_steps]),
                span=frames,
            )
        )
        kept.append(small[1])
    query = torch.randn(*shape, 12, generator=random).to(dtype)
    layer.write(*(torch.randn(*shape, 12, generator=random).to(dtype) for _ in range(2)), replace=True)
    layer.select(query)
    positions = geometry.positions(layer.committed_steps, layer.committed_steps + frames)
    half = max(1, heads // 2)
    turned = rotary.rotate(query, positions).double()[:, :half]
    count = turned.shape[2]
    at = (
        range(count)
        if samples is None or samples >= count
        else [(2 * i + 1) * count // (2 * samples) for i in range(samples)]
    )
    scores = torch.zeros(rows, archived, dtype=torch.float64)
    for number in range(archived):
        where = reduced.clone()
        where[:, 0] += number * frames
        keys = rotary.rotate(kept[number], where).double()[:, :half]
        pairs = turned[:, :, list(at), None] * keys[:, :, None]
        scores[:, number] = pairs.sum((1, 2, 3, 4)) / 12**0.5 / half
    assert layer.history.selection is not None
    chosen = layer.history.selection.chosen
    assert chosen.shape == (rows, heads, min(top_k, archived))
    for row in range(rows):
        for head in range(heads):
            picked = chosen[row, head].tolist()
            others = [number for number in range(archived) if number not in picked]
            assert len(set(picked)) == len(picked)  # none that was left out is better, but for float32's rounding
            assert not others or scores[row, picked].min() > scores[row, others].max() - 1e-4
    digests = layer.history.digests.data
    assert digests is not None
    assert digests.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"compressor": "mean-pool"}, id="compressor"),
        pytest.param(hr(), id="branches"),
        pytest.param({"retriever": "recency"}, id="retriever"),
        pytest.param({"realigner": "original"}, id="realigner"),
        pytest.param({"realigner": "incremental"}, id="incremental"),
        pytest.param({"sink": 0}, id="sink"),
        pytest.param({"archive": "device"}, id="archive"),
    ],
)
@torch.no_grad()
def test_every_ablation_is_one_word(change: dict[str, Any]) -> None:
    model, text = build(), prompt()
    with tiered(model, "packforcing", **{**SMALL, **hr(), **change}) as wan:
        for clip in blocks(6, **FRAMES):
            wan.denoise(clip, 900.0, text)
            flow = wan.commit(clip, text)
        assert flow.isfinite().all()
        assert wan.cache is not None
        assert max(wan.attended()) <= wan.policies[0].bound(wan.cache.geometries[0])  # type: ignore[operator]


@pytest.mark.parametrize("moved", ["host", "disk", "fork", "file"])
@torch.no_grad()
def test_memory_elsewhere_or_copied_continues_bit_for_bit(moved: str, tmp_path: Path) -> None:
    model, text, clips = build(), prompt(), blocks(9, **FRAMES)
    flows = []
    for place in ("device", moved):
        archive = place if place in ("device", "host", "disk") else "device"
        with tiered(model, "packforcing", archive=archive, **SMALL, **hr()) as wan:
            for number, clip in enumerate(clips):
                wan.denoise(clip, 900.0, text)
                flow = wan.commit(clip, text)
                if number == 5 and place == "fork":
                    assert wan.cache is not None
                    wan.cache = wan.cache.fork()
                if number == 5 and place == "file":
                    assert wan.cache is not None
                    wan.cache.save(tmp_path / "video.safetensors")
                    geometry = wan.cache.geometries[0]
                    wan.cache = kvtiers.TieredCache(wan.policies, [geometry] * 2, rotaries=[wan.rotary] * 2)
                    wan.cache.load(tmp_path / "video.safetensors")
            flows.append(flow)
    assert torch.equal(*flows)


# ---------------------------------------------------------------- decoding block by block


@pytest.mark.parametrize("cuts", [[4, 4, 1], [1, 3, 5], [9]])
@torch.no_grad()
def test_a_streamed_decode_equals_the_whole(cuts: list[int]) -> None:
    autoencoder = vae()
    latents = torch.randn(1, 16, 9, 6, 8, generator=torch.Generator().manual_seed(1))
    mean, deviation = (
        torch.tensor(numbers).view(1, -1, 1, 1, 1)
        for numbers in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )
    whole = autoencoder.decode(latents * deviation + mean).sample
    decoder = StreamingDecoder(autoencoder)
    for _ in range(2):
        pieces = [decoder.decode(part) for part in latents.split(cuts, 2)]
        assert pieces[0].shape[2] == 4 * cuts[0] - 3
        assert torch.allclose(torch.cat(pieces, 2), whole, atol=1e-5)
        decoder.reset()


# ---------------------------------------------------------------- weights, and what is refused


def test_weights_survive_being_saved_and_those_of_another_width_are_refused(tmp_path: Path) -> None:
    network = HighResolution(channels=16, width=48, widths=(4, 4, 4, 4))
    torch.nn.init.normal_(network.layers[-1].weight)
    network.save_pretrained(tmp_path)
    wan = CausalWan(build(), "packforcing", **hr(weights=str(tmp_path)))
    assert torch.equal(wan.reducer.network.layers[-1].weight, network.layers[-1].weight)  # type: ignore[union-attr]
    wan.close()
    wider = build(heads=3)
    own = dict(wider.attn_processors)
    with pytest.raises(PolicyError, match="to a width of 48, and this model has 16 and 72"):
        CausalWan(wider, "packforcing", **hr(weights=str(tmp_path)))
    assert wider.attn_processors == own


def _text_store() -> object:
    turn = kvtiers.Rotary([torch.ones(1)])
    return Layer(policy=kvtiers.policy("packforcing"), geometry=Geometry(kv_heads=1, head_dim=8), rotary=turn)


def _without_reduced() -> object:
    geometry = Geometry(kv_heads=1, head_dim=8, grid=(4, 4), steps_per_commit=2, causal=False)
    found, turn = kvtiers.policy("packforcing", sink=0), kvtiers.Rotary([torch.ones(1)])
    layer = Layer(policy=found, geometry=geometry, rotary=turn)
    layer.write(torch.zeros(1, 1, 32, 8), torch.zeros(1, 1, 32, 8), replace=True)
    return layer.commit()


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(lambda: CausalWan(build(), "packforcing"), PolicyError, "give vae=", id="no autoencoder"),
        pytest.param(
            _text_store, SlotError, "text has none to give; choose a compressor of keys and values", id="text"
        ),
        pytest.param(
            _without_reduced, SlotError, "got no compressed form for the block at step 0", id="no reduced K/V"
        ),
        pytest.param(lambda: DualBranch().cells(1, (30, 52)), PolicyError, "commit longer blocks", id="one frame"),
        pytest.param(lambda: DualBranch().cells(4, (3, 52)), PolicyError, "of 3 x 52; commit", id="small frames"),
        pytest.param(
            lambda: kvtiers.policy("packforcing", attend="full"),
            PolicyError,
            "let it digest the full form",
            id="digests",
        ),
        pytest.param(lambda: kvtiers.policy("packforcing", top_k=0), PolicyError, "top_k must be", id="top_k"),
        pytest.param(
            lambda: kvtiers.policy("packforcing", compressor=("dual-branch", {"branches": "hlr"})),
            PolicyError,
            "branches",
            id="branches",
        ),
    ],
)
def test_what_cannot_be_is_refused(attempt: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attempt()


def test_a_pass_without_reduced_tokens_is_the_usual_one() -> None:
    assert Pass(cache=None, rotary=None, grid=(), text={}, compressed=[]).reduced is None  # type: ignore[arg-type]
