"""An unmodified Wan from tiers, block by block: the published code's rollouts, and what a step may change."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor

import kvtiers
from kvtiers import ArchiveFullError, CropError, GeometryError, Layer, Policy, PolicyError, UnsupportedModelError
from kvtiers.window import Window
from kvtiers_diffusers import CausalWan, disable, enable, tiered
from strategies import unchecked
from tiny_wan import Golden, blocks, build, golden, prompt

ROLLING = {"sink": 2, "recent": 2, "top_k": 2}


def published(rollout: Golden, **changes: Any) -> Policy:
    """The policy that does what the published code did. Its window counts the current block."""
    config = rollout.config
    if config["window_frames"] < 0:
        return kvtiers.policy("full", **changes)
    recent = config["window_frames"] - config["sink_frames"] - config["frames_per_block"]
    if not config["sink_frames"] and "sink" not in changes:
        return kvtiers.policy("rolling-window", **{"recent": recent, **changes})
    settings = {"sink": config["sink_frames"], "recent": recent}
    return kvtiers.policy("sink-rolling-window", **{**settings, **changes})


@torch.no_grad()
def replay(rollout: Golden, policy: Policy) -> tuple[float, CausalWan]:
    """How far the worst number of any call is from the rollout's, and the `CausalWan` after it."""
    worst, calls = 0.0, rollout.config["calls_per_block"]
    with tiered(rollout.model, policy) as wan:
        for number, (block, timestep, flow) in enumerate(
            zip(rollout.inputs, rollout.timesteps, rollout.flow, strict=True)
        ):
            if number % calls < calls - 1:
                got = wan.denoise(block[None], timestep, rollout.text)
            else:
                got = wan.commit(block[None], rollout.text)
            worst = max(worst, float((got[0] - flow).abs().max()))
    return worst, wan


@pytest.mark.parametrize("name", ["full", "window", "sink_window"])
def test_every_call_of_the_published_code_is_reproduced(name: str) -> None:
    rollout = golden(name)
    worst, wan = replay(rollout, published(rollout))
    assert worst < 2e-5
    assert wan.cache is not None
    for number, (keys, values) in enumerate(zip(rollout.keys, rollout.values, strict=True)):
        layer = wan.cache.layers[number].layers()[0]
        here = slice(layer.window.head, layer.window.tail)
        length = layer.window.recent  # the published buffer still holds what the next block would push out
        assert length > 0
        for mine, theirs in ((layer.window.planes["rotated"], keys), (layer.window.planes["values"], values)):
            assert (mine[:, :, here].transpose(1, 2) - theirs[:, -length:]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("window", {"recent": 2}),
        ("window", {"recent": 6}),
        ("sink_window", {"sink": 0}),
        ("sink_window", {"sink": 4}),
        ("sink_window", {"realigner": "contiguous"}),
    ],
)
def test_the_rollouts_notice_a_block_too_many_or_too_few(name: str, off: dict[str, Any]) -> None:
    rollout = golden(name)
    worst, _ = replay(rollout, published(rollout, **off))
    assert worst > 1e-3


# ---------------------------------------------------------------- what a pass changes


def windows(layer: Layer) -> list[Window]:
    """What attention reads, and unrotated keys if there are any."""
    return layer.placed.windows()


def stored(wan: CausalWan) -> list[Tensor]:
    """Every history tensor of every layer: what lies in the tiers, and the archive."""
    assert wan.cache is not None
    found = []
    for layer in wan.cache.every_layer():
        for window in windows(layer):
            history = slice(window.head, window.tail - layer.current)
            anchors = slice(window.sink_slot, window.sink_slot + window.sink)
            found += [plane[:, :, where].clone() for plane in window.planes.values() for where in (history, anchors)]
        found += [part.clone() for store in layer.history.stores.values() for part in store.parts().values()]
        if layer.history.digests.data is not None:
            found.append(layer.history.digests.data.clone())
    return found


def planes(wan: CausalWan) -> list[Tensor]:
    """Every plane of every layer's windows."""
    assert wan.cache is not None
    return [plane for layer in wan.cache.every_layer() for window in windows(layer) for plane in window.planes.values()]


@torch.no_grad()
def video(wan: CausalWan, clips: list[Tensor], text: Tensor, steps: int = 2) -> list[Tensor]:
    """Denoise and commit each block; the flow of every pass."""
    flows = []
    for clip in clips:
        flows += [wan.denoise(clip + step, 900.0 - 300 * step, text) for step in range(steps)]
        flows.append(wan.commit(clip, text))
    return flows


@pytest.mark.parametrize("policy", ["full", "streaming", "archive", "packforcing-lm"])
@torch.no_grad()
def test_a_denoise_step_changes_nothing_that_is_stored_and_repeats_itself(policy: str) -> None:
    model, text, clips = build(), prompt(), blocks(7)
    changes: dict[str, Any] = {} if policy == "full" else dict(ROLLING)
    if policy == "packforcing-lm":
        changes["realigner"] = "contiguous"
    with tiered(model, policy, **changes) as wan:
        video(wan, clips[:5], text)
        first = wan.denoise(clips[5], 500.0, text)
        before = stored(wan)
        wan.denoise(clips[6], 300.0, text)
        assert all(torch.equal(a, b) for a, b in zip(stored(wan), before, strict=True))
        assert torch.equal(wan.denoise(clips[5], 500.0, text), first)
        assert wan.frames == 10


@torch.no_grad()
def test_the_tiers_end_where_blocks_end_and_the_bound_is_reached_and_kept() -> None:
    model, text = build(), prompt()
    with tiered(model, "archive", sink=3, recent=3, top_k=2) as wan:  # an anchor may reach beyond `sink`
        for clip in blocks(9):
            video(wan, [clip], text, steps=1)
            assert wan.cache is not None
            bound = wan.policies[0].bound(wan.cache.geometries[0])
            assert bound == (4 + 2 * 2 + 4 + 2) * 6
            assert max(wan.attended()) <= bound
        assert wan.cache.tier_counts() == {"sink": 4, "mid": 10, "recent": 4, "current": 0, "dropped": 0}
        wan.denoise(clip, 500.0, text)
        assert max(wan.attended()) == bound


@pytest.mark.parametrize("archive", ["host", "disk"])
def test_an_archive_elsewhere_gives_the_same_video_bit_for_bit(archive: str) -> None:
    model, text, clips = build(), prompt(rows=2), blocks(8, rows=2)
    flows = []
    for location in ("device", archive):
        with tiered(model, "packforcing-lm", realigner="contiguous", archive=location, **ROLLING) as wan:
            flows.append(video(wan, clips, text))
    assert all(torch.equal(a, b) for a, b in zip(*flows, strict=True))


def test_contiguous_and_incremental_attend_alike() -> None:
    model, text, clips = build().double(), prompt().double(), [clip.double() for clip in blocks(8)]
    flows = []
    for realigner in ("contiguous", "incremental"):
        with tiered(model, "archive", realigner=realigner, **ROLLING) as wan:
            flows.append(video(wan, clips, text))
    assert max(float((a - b).abs().max()) for a, b in zip(*flows, strict=True)) < 1e-5
    with tiered(model, "archive", realigner="original", **ROLLING) as wan:
        original = video(wan, clips, text)
    assert max(float((a - b).abs().max()) for a, b in zip(flows[0], original, strict=True)) > 1e-3


@torch.no_grad()
def test_rows_do_not_mind_each_other_and_may_have_prompts_of_their_own() -> None:
    model, clips = build(), blocks(6, rows=2)
    texts = [prompt(seed=1), prompt(seed=2)]
    with tiered(model, "packforcing-lm", realigner="contiguous", **ROLLING) as wan:
        together = video(wan, clips, torch.cat(texts))
    for row, text in enumerate(texts):
        with tiered(model, "packforcing-lm", realigner="contiguous", **ROLLING) as wan:
            alone = video(wan, [clip[row : row + 1].clone() for clip in clips], text)
        assert all((a[row] - b[0]).abs().max() < 1e-5 for a, b in zip(together, alone, strict=True))


@torch.no_grad()
def test_the_prompt_is_projected_once_and_anew_when_it_changes() -> None:
    model, clips = build(), blocks(3)
    calls = []
    model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    first, second = prompt(seed=1), prompt(seed=2)
    with tiered(model) as wan:
        video(wan, clips[:2], first)
        assert len(calls) == 1
        with_second = wan.denoise(clips[2], 500.0, second)
        assert len(calls) == 2
        with_first = wan.denoise(clips[2], 500.0, first)
        assert not torch.equal(with_first, with_second)
        first.mul_(2)
        assert not torch.equal(wan.denoise(clips[2], 500.0, first), with_first)


@torch.no_grad()
def test_blocks_of_different_length_make_one_video_where_none_is_archived() -> None:
    model, text = build(), prompt()
    lengths = [1, 3, 2, 3, 1, 2]
    clips = [blocks(1, frames=frames, seed=frames)[0] for frames in lengths]
    with tiered(model, "streaming", sink=1, recent=3, block_frames=3, even=False) as wan:
        for clip in clips:
            video(wan, [clip], text)
            assert wan.cache is not None
            bound = wan.policies[0].bound(wan.cache.geometries[0])
            assert bound is not None
            assert max(wan.attended()) <= bound
        assert wan.frames == sum(lengths)
        assert [extent.steps for extent, _ in wan.cache.layout()] == lengths
        assert wan.cache.tier_counts() == {"sink": 1, "mid": 0, "recent": 3, "current": 0, "dropped": 8}


@pytest.mark.parametrize("policy", ["archive", "packforcing-lm"])
@torch.no_grad()
def test_an_uneven_video_of_which_everything_is_attended_is_that_of_full_history(policy: str) -> None:
    model, text = build(), prompt()
    clips = [blocks(1, frames=frames, seed=frames)[0] for frames in (1, 3, 2, 3, 1, 2)]
    changes = {
        "sink": 1,
        "recent": 2,
        "top_k": 9,
        "attend": "full",
        "top_k_compressed": 0,
        "block_frames": 3,
        "even": False,
    }
    with tiered(model, "full", block_frames=3, even=False) as wan:
        wanted = video(wan, clips, text)
    with tiered(model, policy, realigner="contiguous", **changes) as wan:
        got = video(wan, clips, text)
        assert wan.cache is not None
        assert wan.cache.every_layer()[0].history.count == 4
        wan.denoise(clips[0], 500.0, text)
        bias = wan.cache.context(0).bias
        assert bias is not None
        assert set(bias.unique().tolist()) == {0.0, -torch.inf}
    assert max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)) < 2e-5


@pytest.mark.parametrize("even", [True, False])
@torch.no_grad()
def test_every_attention_backend_of_diffusers_that_runs_here_gives_the_same_video(even: bool) -> None:
    model, text = build(), prompt()
    clips = [blocks(1, frames=2 if even else 1 + n % 2, seed=n)[0] for n in range(7)]
    flows = []
    for backend in (None, "native", "_native_math"):
        if backend is not None:
            model.set_attention_backend(backend)
        with tiered(model, "archive", block_frames=2, even=even, **ROLLING) as wan:
            flows.append(video(wan, clips, text))
            flow = wan.denoise(clips[1], 500.0, text)
            with attention_backend("_native_math"):
                assert torch.allclose(wan.denoise(clips[1], 500.0, text), flow, atol=1e-5)
    for other in flows[1:]:
        assert max(float((a - b).abs().max()) for a, b in zip(other, flows[0], strict=True)) < 1e-5


@torch.no_grad()
def test_a_backend_that_takes_no_mask_per_head_refuses_padding() -> None:
    model, text, clips = build(), prompt(), [blocks(1, frames=1 + n % 2, seed=n)[0] for n in range(8)]
    with tiered(model, "archive", block_frames=2, even=False, **ROLLING) as wan:
        video(wan, clips[:6], text)
        for processor in model.attn_processors.values():
            processor._attention_backend = AttentionBackendName.FLASH_VARLEN
        with pytest.raises(UnsupportedModelError, match="backend 'flash_varlen' takes no mask per head"):
            wan.denoise(clips[6], 500.0, text)
        for processor in model.attn_processors.values():
            processor._attention_backend = None
        wan.denoise(clips[6], 500.0, text)


@pytest.mark.parametrize(
    ("policy", "changes"),
    [("full", {}), ("streaming", {"sink": 2, "recent": 6}), ("packforcing-lm", {**ROLLING, "realigner": "contiguous"})],
)
@torch.no_grad()
def test_a_video_rolls_back_to_the_end_of_a_block_and_its_rows_can_be_chosen(
    policy: str, changes: dict[str, Any]
) -> None:
    model, text, clips = build(), prompt(rows=2), blocks(6, rows=2)
    with tiered(model, policy, **changes) as wan:
        video(wan, clips[:3], text)
        wanted = video(wan, clips[4:], text)
    with tiered(model, policy, **changes) as wan:
        video(wan, clips[:3], text)
        wan.denoise(clips[3], 500.0, text)
        assert wan.cache is not None
        with pytest.raises(CropError, match="step 5 is inside a block"):
            wan.cache.crop(5)
        wan.cache.crop(6)
        if policy == "packforcing-lm":
            fork = wan.cache.fork()
            video(wan, clips[3:4], text)
            with pytest.raises(CropError, match="have left recent since then"):
                wan.cache.crop(6)
            wan.cache = fork
        else:
            video(wan, clips[3:4], text)
            wan.cache.crop(6)
        assert wan.frames == 6
        assert all(torch.equal(a, b) for a, b in zip(video(wan, clips[4:], text), wanted, strict=True))
        plain = wan.denoise(clips[0], 500.0, text)
        wan.cache.select_rows(torch.tensor([1, 0]))
        turned = wan.denoise(clips[0].flip(0), 500.0, text.flip(0))
        assert torch.allclose(turned.flip(0), plain, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_loaded_in_any_dtype_makes_a_video_in_either_mode(
    mode: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)  # keeps some weights in float32
    with mode(), tiered(model, "packforcing-lm", realigner="contiguous", **ROLLING) as wan:
        text = prompt().to(dtype)
        flows = video(wan, [clip.to(dtype) for clip in blocks(6)], text, steps=3)
        assert all(flow.dtype == dtype and flow.isfinite().all() for flow in flows)
        assert wan.cache is not None
        assert {plane.dtype for plane in planes(wan)} == {dtype}
    with torch.no_grad(), tiered(build(), "packforcing-lm", realigner="contiguous", **ROLLING) as wan:
        exact = video(wan, blocks(6), prompt(), steps=3)
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(flows[:6], exact[:6], strict=True))
    assert worst < (1e-5 if dtype == torch.float32 else 0.1)


# ---------------------------------------------------------------- the model


@torch.no_grad()
def test_without_a_pass_the_model_is_itself_and_afterwards_it_has_its_own_processors() -> None:
    model, text, clip = build(), prompt(), blocks(1)[0]
    own = dict(model.attn_processors)
    plain = model(clip, torch.tensor([500.0]), text, return_dict=False)[0]
    wan = CausalWan(model)
    second = CausalWan(model)
    assert torch.equal(model(clip, torch.tensor([500.0]), text, return_dict=False)[0], plain)
    assert torch.allclose(wan.denoise(clip, 500.0, text), plain, atol=1e-5)
    wan.close()
    wan.close()
    assert torch.allclose(second.denoise(clip, 500.0, text), plain, atol=1e-5)
    second.close()
    assert model.attn_processors == own
    with pytest.raises(UnsupportedModelError, match="was closed"):
        second.denoise(clip, 500.0, text)
    with pytest.raises(RuntimeError, match="midway"), tiered(model):
        raise RuntimeError("midway")
    assert model.attn_processors == own
    enable(model)
    disable(model)
    disable(model)
    assert model.attn_processors == own


@torch.no_grad()
def test_two_videos_of_one_model_do_not_mind_each_other() -> None:
    model, text, clips, others = build(), prompt(), blocks(4), blocks(4, seed=9)
    with tiered(model, "archive", **ROLLING) as wan:
        wanted = video(wan, clips, text)
    with tiered(model, "archive", **ROLLING) as one, tiered(model, "archive", **ROLLING) as other:
        for clip, stranger, flow in zip(clips, others, wanted[2::3], strict=True):
            one.denoise(clip, 900.0, text)
            video(other, [stranger], text)
            assert torch.equal(one.commit(clip, text), flow)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_fused_projections_give_the_same(fused: bool) -> None:
    model, text, clips = build(), prompt(), blocks(4)
    with tiered(model, "archive", **ROLLING) as wan:
        wanted = video(wan, clips, text)
    if fused:
        for block in model.blocks:
            block.attn1.fuse_projections()
            block.attn2.fuse_projections()
    with tiered(model, "archive", **ROLLING) as wan:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(video(wan, clips, text), wanted, strict=True))


def test_gradients_reach_the_input_and_no_graph_is_kept_otherwise() -> None:
    model, text, clips = build(), prompt(), blocks(5)
    with tiered(model, "archive", **ROLLING) as wan:
        for clip in clips[:4]:
            wan.commit(clip, text)
        assert wan.cache is not None
        assert not any(plane.requires_grad for plane in planes(wan))
        noisy = clips[4].clone().requires_grad_()
        wan.denoise(noisy, 500.0, text).square().sum().backward()
        assert noisy.grad is not None
        direction = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ends = [wan.denoise(clips[4] + sign * 1e-2 * direction, 500.0, text).square().sum() for sign in (1, -1)]
        slope = float(ends[0] - ends[1]) / 2e-2
        assert float((noisy.grad * direction).sum()) == pytest.approx(slope, rel=2e-2)


@torch.no_grad()
def test_a_full_archive_loses_nothing_and_the_video_goes_on_once_there_is_room() -> None:
    model, text, clips = build(), prompt(), blocks(12)
    with tiered(model, "archive", archive=("host", {"limit_bytes": 30_000}), **ROLLING) as wan:
        done = 0
        with pytest.raises(ArchiveFullError, match="larger limit_bytes"):  # noqa: PT012 (some block)
            for clip in clips:
                wan.commit(clip, text)
                done += 1
        assert 2 < done < 12
        assert wan.frames == 2 * done
        assert wan.cache is not None
        with pytest.raises(ArchiveFullError, match="Nothing was lost"):
            wan.denoise(clips[0], 500.0, text)
        larger = kvtiers.policy(wan.policies[0], archive=("host", {"limit_bytes": 3_000_000}))
        wan.cache.swap(larger)
        for clip in clips[done + 1 :]:
            wan.commit(clip, text)
        flow = wan.denoise(clips[0], 500.0, text)
    with tiered(model, "archive", **ROLLING) as wan:
        for clip in clips:
            wan.commit(clip, text)
        assert torch.equal(wan.denoise(clips[0], 500.0, text), flow)


@pytest.mark.slow
def test_a_compiled_model_makes_the_same_video_and_does_not_recompile_between_blocks() -> None:
    """In a process of its own, because the checks of shapes that tests install cannot be traced."""
    program = Path(__file__).parent.parent / "compiled_wan.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [
        "archive/contiguous",
        "archive/contiguous/function",
        "archive/contiguous/blocks",
        "sink-rolling-window/original",
        "packforcing/contiguous",
        "packforcing/contiguous/uneven",
    ]
    for name, error, *counts in rows:
        assert float(error) == 0.0, name
        assert 0 < int(counts[0]) <= int(counts[-1]) <= (8 if name.endswith("/blocks") else 4), name
        assert len(set(counts[-6:])) == 1, f"{name}: the last six blocks recompiled: {counts}"


@torch.no_grad()
def test_further_steps_of_a_block_are_what_they_would_be_if_the_store_were_asked() -> None:
    model, text, clips = build(), prompt(), blocks(6)
    flows = []
    for asked in (False, True):
        with tiered(model, "packforcing-lm", realigner="contiguous", **ROLLING) as wan:
            if asked:
                wan.runner.further_step = lambda *_: None  # type: ignore[method-assign]
            flows.append(video(wan, clips, text, steps=3))
    assert all(torch.equal(a, b) for a, b in zip(*flows, strict=True))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("clip", "text", "message"),
    [
        pytest.param(torch.zeros(1, 8, 2, 4, 6), prompt(), "16 channels, frames, height, width", id="channels"),
        pytest.param(torch.zeros(16, 2, 4, 6), prompt(), "16 channels, frames, height, width", id="no batch"),
        pytest.param(torch.zeros(1, 16, 2, 5, 6), prompt(), "5 x 6 cannot be cut into patches of 2 x 2", id="patches"),
        pytest.param(torch.zeros(1, 16, 2, 4, 8), prompt(), "2 x 3 tokens a frame, got a block of 2 x 4", id="grid"),
        pytest.param(torch.zeros(1, 16, 3, 4, 6), prompt(), "blocks of 2 frames, got 3", id="longer"),
        pytest.param(torch.zeros(1, 16, 1, 4, 6), prompt(), "blocks of 2 frames, got 1; .*even=False", id="shorter"),
        pytest.param(torch.zeros(2, 16, 2, 4, 6), prompt(), "holds 1 rows, got a block of 2", id="another batch"),
        pytest.param(torch.zeros(1, 16, 2, 4, 6), prompt(rows=2), "text is .1 rows", id="prompt of another batch"),
        pytest.param(torch.zeros(1, 16, 2, 4, 6), prompt()[..., :5], "words, 32., got", id="prompt of another width"),
    ],
)
@torch.no_grad()
def test_what_does_not_fit_the_model_or_the_video_is_refused_and_changes_nothing(
    clip: Tensor, text: Tensor, message: str
) -> None:
    model, clips = build(), blocks(3)
    with tiered(model, "archive", **ROLLING) as wan:
        wan.commit(clips[0], prompt())
        for verb in (lambda: wan.denoise(clip, 500.0, text), lambda: wan.commit(clip, text)):
            with pytest.raises(GeometryError, match=message), unchecked():
                verb()
        assert wan.frames == 2
        got = wan.commit(clips[1], prompt())
    with tiered(model, "archive", **ROLLING) as wan:
        wan.commit(clips[0], prompt())
        assert torch.equal(wan.commit(clips[1], prompt()), got)


@torch.no_grad()
def test_a_block_is_committed_once() -> None:
    model, text, clips = build(), prompt(), blocks(2)
    with tiered(model) as wan:
        wan.commit(clips[0], text)
        with pytest.raises(GeometryError, match="this block is committed already"):
            wan.commit(clips[0], text)
        assert wan.frames == 2
        wan.commit(clips[0].clone(), text)
        wan.reset()
        assert (wan.frames, wan.memory_usage(), wan.attended()) == (0, [], [])
        wan.commit(clips[0], text)


def test_a_model_of_images_or_of_tokens_over_time_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="attends an image beside the prompt"):
        CausalWan(build(image_dim=8, added_kv_proj_dim=48))
    with pytest.raises(UnsupportedModelError, match="must belong to one latent frame"):
        CausalWan(build(patch_size=(2, 2, 2)))
    with pytest.raises(PolicyError, match="unknown policy"):
        CausalWan(build(), "packforcng")
