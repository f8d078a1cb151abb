"""What a video remembers besides keys and values, what comes twice, and what is refused before anything changes."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor

import kvtiers
from kvtiers import (
    ArchiveFullError,
    CropError,
    GeometryError,
    PolicyError,
    SavedCacheError,
    UnsupportedModelError,
)
from kvtiers.events import PromptChanged, Selected
from kvtiers_diffusers import CausalWan, tiered
from kvtiers_diffusers.streaming_vae import StreamingDecoder
from kvtiers_packforcing.network import HighResolution
from strategies import unchecked
from tiny_wan import blocks, build, prompt

ROLLING = {"sink": 2, "recent": 2, "top_k": 2}
SQUARE = {"frames": 2, "high": 8, "wide": 8}
LOW: dict[str, Any] = {"compressor": ("dual-branch", {"branches": "lr"})}


def vae(channels: int = 16) -> Any:
    torch.manual_seed(0)
    made = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    return made.eval()


def low(**changes: Any) -> Any:
    return tiered(build(), "packforcing", vae=vae(), **{**ROLLING, **LOW, **changes})


@torch.no_grad()
def go_on(wan: CausalWan, clips: list[Tensor]) -> list[Tensor]:
    text = prompt()
    return [part for clip in clips for part in (wan.denoise(clip, 500.0, text), wan.commit(clip, text))]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- fork, save, roll back


def test_what_encodes_pixels_is_forked_and_saved_with_the_video(tmp_path: Path) -> None:
    clips = blocks(7, **SQUARE)
    with low() as wan:
        go_on(wan, clips[:4])
        fork = wan.fork()
        wan.save(tmp_path / "video")
        wanted = go_on(wan, clips[4:])
        assert same(go_on(fork, clips[4:]), wanted)
        fork.close()
        wan.load(tmp_path / "video")
        assert wan.frames == 8
        assert same(go_on(wan, clips[4:]), wanted)
    with low() as other:
        other.load(tmp_path / "video")
        assert same(go_on(other, clips[4:]), wanted)


def test_a_video_whose_pixels_were_seen_is_not_rolled_back_behind_its_back() -> None:
    clips = blocks(6, **SQUARE)
    with low() as wan:
        go_on(wan, clips[:2])
        fork = wan.fork()
        go_on(wan, clips[2:3])
        with pytest.raises(CropError, match=r"seen the pixels of later frames; fork\(\) before"):
            wan.crop(4)
        assert wan.frames == 6
        assert fork.cache is not None
        wan.cache = fork.cache.fork()
        with torch.no_grad(), pytest.raises(GeometryError, match=r"4 frames, and the compressor has seen .* of 6"):
            wan.commit(clips[3], prompt())
        wan.crop(0)
        begun = go_on(wan, clips[:2])
        fork.crop(0)
        assert same(go_on(fork, clips[:2]), begun)
        fork.close()


def test_a_file_that_holds_no_video_is_refused_and_the_video_stays(tmp_path: Path) -> None:
    clips = blocks(3)
    with tiered(build(), "streaming", **{k: ROLLING[k] for k in ("sink", "recent")}) as wan:
        go_on(wan, clips)
        assert wan.cache is not None
        wan.cache.save(tmp_path / "cache")
        for name, message in (("cache", "holds no video"), ("missing", "is no file")):
            with pytest.raises(SavedCacheError, match=message):
                wan.load(tmp_path / name)
        assert wan.frames == 6


def test_a_saved_video_without_pixels_goes_on_with_every_length_of_blocks(tmp_path: Path) -> None:
    clips = [blocks(1, frames=n, seed=n)[0] for n in (1, 3, 2, 3, 1, 2, 3)]
    changes = {"block_frames": 3, "even": False, **ROLLING, "recent": 3}
    with tiered(build(), "archive", **changes) as wan:
        go_on(wan, clips[:5])
        wan.save(tmp_path / "video")
        wanted = go_on(wan, clips[5:])
    with tiered(build(), "archive", **changes) as wan:
        wan.load(tmp_path / "video")
        assert same(go_on(wan, clips[5:]), wanted)


def test_a_file_of_another_autoencoder_or_without_a_part_is_refused_and_the_video_stays(tmp_path: Path) -> None:
    clips = blocks(6, **SQUARE)
    with low() as wan:
        go_on(wan, clips[:3])
        wan.save(tmp_path / "video")
        remembered = wan.sources.remembered()
        remembered["decoder.999"] = torch.zeros(1)
        assert wan.cache is not None
        about = {"video": {"grid": [4, 4], "block_frames": 2, "even": True, "encoded": 6, "given": False}}
        wan.cache.save(tmp_path / "other", extra=about, beside=remembered)
        del about["video"]["encoded"]
        wan.cache.save(tmp_path / "part", extra=about)
        fork = wan.fork()
        for name, message in (("other", "another autoencoder"), ("part", "does not say encoded")):
            with pytest.raises(SavedCacheError, match=message):
                wan.load(tmp_path / name)
        assert same(go_on(wan, clips[3:]), go_on(fork, clips[3:]))
        fork.close()
        with torch.inference_mode():
            wan.load(tmp_path / "video")
        go_on(wan, clips[3:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grid", 5),
        ("grid", [2.0, 3]),
        ("grid", "ab"),
        ("block_frames", 0),
        ("block_frames", "x"),
        ("even", "x"),
        ("encoded", None),
        ("encoded", -1),
        ("given", "x"),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_a_file_says_of_its_video_is_checked(name: str, value: Any, tmp_path: Path) -> None:
    text, path = prompt(), tmp_path / "video"
    about = {"grid": [4, 4], "block_frames": 2, "even": True, "encoded": 4, "given": None, name: value}
    with tiered(build(), "sink-rolling-window", sink=2, recent=2, block_frames=2) as wan:
        for clip in blocks(2, **SQUARE):
            wan.commit(clip, text)
        assert wan.cache is not None
        wan.cache.save(path, extra={"video": about})
        with pytest.raises(SavedCacheError, match=f"does not say {name} of its video"):
            wan.load(path)
        assert wan.frames == 4


def test_a_branch_that_nobody_has_any_more_gives_the_model_back() -> None:
    model = build()
    own, hooks = dict(model.attn_processors), [len(block._forward_hooks) for block in model.blocks]
    with tiered(model, "archive", **ROLLING) as wan:
        go_on(wan, blocks(2))
        fork = wan.fork()
    assert model.attn_processors != own
    go_on(fork, blocks(1))
    del fork
    assert model.attn_processors == own
    assert [len(block._forward_hooks) for block in model.blocks] == hooks


def test_a_closed_video_is_not_forked() -> None:
    model = build()
    own = dict(model.attn_processors)
    wan = CausalWan(model, "archive", **ROLLING)
    go_on(wan, blocks(2))
    wan.close()
    with pytest.raises(UnsupportedModelError, match="was closed"):
        wan.fork()
    assert model.attn_processors == own


# ---------------------------------------------------------------- pixels


def test_pixels_come_with_every_block_or_with_none() -> None:
    clips, decoder = blocks(3, **SQUARE), StreamingDecoder(vae())
    pixels = [decoder.decode(clip) for clip in clips]
    with torch.no_grad(), low() as wan:
        wan.commit(clips[0], prompt(), pixels[0])
        with pytest.raises(GeometryError, match="the blocks before came with pixels and this one without"):
            wan.commit(clips[1], prompt())
        assert wan.frames == 2
        wan.commit(clips[1], prompt(), pixels[1])
    with torch.no_grad(), low() as wan:
        wan.commit(clips[0], prompt())
        with pytest.raises(GeometryError, match="without pixels and this one with them"):
            wan.commit(clips[1], prompt(), pixels[1])


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda p, _: p[:, :, :3], id="too few frames"),
        pytest.param(lambda _, clip: StreamingDecoder(vae()).decode(clip), id="a block decoded alone"),
        pytest.param(lambda p, _: p[..., ::2, ::2], id="half the size"),
        pytest.param(lambda p, _: p[:, :1], id="grey"),
        pytest.param(lambda p, _: p.repeat(2, 1, 1, 1, 1), id="two rows"),
    ],
)
def test_pixels_of_another_shape_are_refused_and_the_right_ones_can_follow(wrong: Any) -> None:
    clips, decoder = blocks(3, **SQUARE), StreamingDecoder(vae())
    pixels = [decoder.decode(clip) for clip in clips]
    with torch.no_grad(), low(sink=0) as wan:
        flows = [wan.commit(clip, prompt(), part) for clip, part in zip(clips, pixels, strict=True)]
    with torch.no_grad(), low(sink=0) as wan:
        wan.commit(clips[0], prompt(), pixels[0])
        with unchecked(), pytest.raises(PolicyError, match=r"the pixels of this block are .* = \(1, 3, 8, 64, 64\)"):
            wan.commit(clips[1], prompt(), wrong(pixels[1], clips[1]))
        assert torch.equal(wan.commit(clips[1], prompt(), pixels[1]), flows[1])
        assert torch.equal(wan.commit(clips[2], prompt(), pixels[2]), flows[2])


def test_a_failed_commit_can_be_repeated_with_a_copy_or_with_other_frames() -> None:
    clips = blocks(4, **SQUARE)
    with torch.no_grad(), low(sink=0) as wan:
        wanted = [wan.commit(clip, prompt()) for clip in clips]
    with torch.no_grad(), low(sink=0) as wan:
        for number, clip in enumerate(clips):
            handle = wan.transformer.blocks[1].ffn.register_forward_pre_hook(_fail)
            with pytest.raises(RuntimeError, match="out of luck"):
                wan.commit(clips[3 - number], prompt())
            handle.remove()
            assert wan.frames == 2 * number
            assert torch.equal(wan.commit(clip.clone(), prompt()), wanted[number])


def _fail(*_: object) -> None:
    raise RuntimeError("out of luck")


def test_an_autoencoder_of_another_width_is_refused() -> None:
    with pytest.raises(PolicyError, match="latents of 8 channels and the model takes 16"):
        CausalWan(build(), "packforcing", vae=vae(8), **LOW)


# ---------------------------------------------------------------- a block that comes twice


@torch.no_grad()
def test_the_same_frames_are_committed_once_however_they_are_named() -> None:
    film = torch.cat(blocks(4), 2)
    with tiered(build(), "archive", **ROLLING) as wan:
        for start in (0, 2):
            wan.commit(film[:, :, start : start + 2], prompt())
            with pytest.raises(GeometryError, match="committed already"):
                wan.commit(film[:, :, start : start + 2], prompt())
        assert wan.frames == 4
        wan.commit(film[:, :, 2:4].clone(), prompt())
        assert wan.frames == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_buffer_with_new_frames_is_another_block_and_so_is_one_that_was_taken_back(mode: Any) -> None:
    with mode(), tiered(build(), "streaming", sink=2, recent=20) as wan:
        room = torch.empty_like(blocks(1)[0])
        for clip in blocks(3):
            room.copy_(clip)
            wan.commit(room, prompt())
        assert wan.frames == 6
        wan.crop(4)
        wan.commit(room, prompt())
        fork = wan.fork()
        with pytest.raises(GeometryError, match="committed already"):
            fork.commit(room, prompt())
        fork.crop(4)
        fork.commit(room, prompt())
        fork.close()
        assert wan.frames == fork.frames == 6


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_a_video_goes_back_to_its_blocks_wherever_a_pass_failed(layer: int) -> None:
    clips, text = blocks(5), prompt()
    with tiered(build(), "streaming", sink=2, recent=20) as wan:
        go_on(wan, clips[:3])
        wanted = go_on(wan, clips[3:])
    with tiered(build(), "streaming", sink=2, recent=20) as wan:
        go_on(wan, clips[:3])
        handle = wan.transformer.blocks[layer].register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            wan.denoise(clips[3], 900.0, text)
        handle.remove()
        wan.crop(6)
        assert wan.cache is not None
        assert [layer.num_steps for layer in wan.cache.every_layer()] == [6, 6]
        assert same(go_on(wan, clips[3:]), wanted)


@torch.no_grad()
def test_what_a_first_step_that_failed_had_chosen_is_not_attended() -> None:
    clips, others, text = blocks(7), blocks(2, seed=9), prompt()
    flows = []
    for fails in (False, True):
        with tiered(build(), "archive", **ROLLING) as wan:
            go_on(wan, clips[:6])
            if fails:
                handle = wan.transformer.blocks[1].ffn.register_forward_pre_hook(_fail)
                with pytest.raises(RuntimeError, match="out of luck"):
                    wan.denoise(others[0], 900.0, text)
                handle.remove()
            flows.append(wan.denoise(others[1], 900.0, text))
    assert torch.equal(*flows)


@torch.no_grad()
def test_a_block_that_a_full_archive_could_not_take_is_committed_once() -> None:
    clips, text = blocks(12), prompt()
    with tiered(build(), "archive", archive=("host", {"limit_bytes": 30_000}), **ROLLING) as wan:
        done = 0
        with pytest.raises(ArchiveFullError):  # noqa: PT012 (some block)
            for clip in clips:
                wan.commit(clip, text)
                done += 1
        with pytest.raises(ArchiveFullError):
            wan.commit(clips[done], text)
        wan.swap(wan.policies[0], archive=("host", {"limit_bytes": 3_000_000}))
        with pytest.raises(GeometryError, match="committed already"):
            wan.commit(clips[done], text)
        assert wan.frames == 2 * (done + 1)
        wan.reset()
        go_on(wan, clips)  # what was swapped stays


@pytest.mark.parametrize("where", ["one-prompt", "prompt-each"])
@torch.no_grad()
def test_after_a_pass_that_failed_another_batch_may_begin(where: str) -> None:
    text = prompt() if where == "one-prompt" else prompt(rows=2)
    (both,), (one,) = blocks(1, rows=2), blocks(1)
    with tiered(build(), "archive", **ROLLING) as wan:
        handle = wan.transformer.blocks[1].register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            wan.denoise(both, 900.0, text)
        handle.remove()
        flow = wan.denoise(one, 900.0, text[:1])
        assert flow.shape == one.shape
        with pytest.raises(GeometryError, match="holds 1 rows, got a block of 2"):
            wan.denoise(both, 500.0, text)
        assert torch.equal(wan.denoise(one, 900.0, text[:1]), flow)


@torch.no_grad()
def test_a_compressor_that_looks_at_queries_looks_at_those_of_the_clean_pass_alone() -> None:
    changes = {"compressor": ("top-tokens", {"by": "attention", "keep": 4}), "attend": "compressed"}
    clips, text, states = blocks(6), prompt(), []
    for steps in (0, 2):
        with tiered(build(), "archive", **ROLLING, **changes) as wan:
            for clip in clips:
                for step in range(steps):
                    wan.denoise(clip + 1, 900.0 - step, text)
                wan.commit(clip, text)
            assert wan.cache is not None
            layer = wan.cache.every_layer()[0]
            assert layer.watched.committed is not None
            assert layer.watched.fresh is None
            states.append([layer.watched.committed, *layer.history.stores["compressed"].parts().values()])
    assert same(*states)


# ---------------------------------------------------------------- two videos


@torch.no_grad()
def test_a_denoise_that_begins_again_chooses_again() -> None:
    clips, others, text = blocks(7), blocks(2, seed=9), prompt()
    flows = []
    for interrupted in (False, True):
        with tiered(build(), "archive", **ROLLING) as wan:
            go_on(wan, clips[:6])
            if interrupted:
                wan.denoise(others[0], 900.0, text)
                wan.denoise(others[0], 500.0, text)
            flows.append([wan.denoise(others[1], 900.0, text), wan.denoise(others[1], 500.0, text)])
            chosen = [layer.history.selection.chosen for layer in wan.cache.every_layer()]  # type: ignore[union-attr]
    assert same(*flows)
    with tiered(build(), "archive", **ROLLING) as wan:
        go_on(wan, clips[:6])
        wan.denoise(others[0], 900.0, text)
        assert wan.cache is not None
        assert not same([layer.history.selection.chosen for layer in wan.cache.every_layer()], chosen)  # type: ignore[union-attr]


@torch.no_grad()
def test_two_prompts_in_turns_are_projected_once_and_choose_once() -> None:
    model, calls, chosen, clips = build(), [], [], blocks(6)
    one, other = prompt(seed=1), prompt(seed=2)
    model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    with tiered(model, "archive", **ROLLING) as wan:
        for clip in clips[:5]:
            wan.commit(clip, one)
        assert wan.cache is not None
        for layer in wan.cache.every_layer():
            layer.observe = chosen.append
        for timestep in (900.0, torch.tensor(600.0), 300):
            wan.denoise(clips[5], timestep, one)
            wan.denoise(clips[5], timestep, other)
        assert len(calls) == 2
        assert len([event for event in chosen if isinstance(event, Selected)]) == 2  # once a layer


@torch.no_grad()
def test_two_videos_do_not_share_a_cache() -> None:
    model, clips = build(), blocks(3)
    with tiered(model, "archive", **ROLLING) as one, tiered(model, "archive", **ROLLING) as other:
        go_on(one, clips[:2])
        other.cache = one.cache
        with pytest.raises(GeometryError, match=r"the video of another CausalWan; .* fork\(\) it"):
            other.denoise(clips[2], 500.0, prompt())
        assert one.cache is not None
        other.cache = one.cache.fork()
        assert same(go_on(other, clips[2:]), go_on(one, clips[2:]))


# ---------------------------------------------------------------- prompts


@torch.no_grad()
def test_a_prompt_is_known_again_and_a_change_is_told() -> None:
    seen: list[PromptChanged] = []

    class Listener:
        @kvtiers.hookimpl
        def kvtiers_observe(self, event: object) -> None:
            if isinstance(event, PromptChanged):
                seen.append(event)

    both, model, calls = prompt(rows=2), build(), []
    model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    plugin = Listener()
    kvtiers.register(plugin, name="listener")
    try:
        with tiered(model, "archive", **ROLLING) as wan:
            for clip in blocks(3):
                wan.denoise(clip, 500.0, both[:1])
                wan.commit(clip, both[:1])
            assert (len(calls), len(seen)) == (1, 1)
            wan.denoise(clip, 500.0, both[1:])
            assert (len(calls), seen) == (2, [PromptChanged(words=6)] * 2)
    finally:
        kvtiers.unregister("listener")


def test_a_prompt_is_projected_anew_when_weights_change_and_when_gradients_are_wanted() -> None:
    model, text, clips = build(), prompt(), blocks(4)
    with tiered(model, "archive", **ROLLING) as wan:
        with torch.no_grad():
            go_on(wan, clips[:2])
            model.blocks[0].attn2.to_v.weight.mul_(3)
            go_on(wan, clips[2:3])
            fork = wan.fork()
            fork.forget_prompts()
            assert torch.equal(wan.denoise(clips[3], 500.0, text), fork.denoise(clips[3], 500.0, text))
            fork.close()
        wan.denoise(clips[3], 500.0, text).sum().backward()
        assert model.blocks[0].attn2.to_k.weight.grad is not None


def test_inference_first_and_gradients_afterwards() -> None:
    model, text, clips = build(), prompt(), blocks(5)
    with tiered(model, "packforcing-lm", realigner="contiguous", **ROLLING) as wan:
        with torch.inference_mode():
            for clip in clips[:4]:
                wan.denoise(clip, 500.0, text)
                wan.commit(clip, text)
            wan.denoise(clips[4], 900.0, text)
        noisy = clips[4].clone().requires_grad_()
        wan.denoise(noisy, 500.0, text).sum().backward()
        assert noisy.grad is not None


@torch.no_grad()
def test_the_prompts_keys_and_values_are_counted() -> None:
    with tiered(build(), "archive", **ROLLING) as wan:
        go_on(wan, blocks(2))
        held = {h.tier: h.bytes for h in wan.memory_usage()}
    assert held["prompt"] == 2 * 2 * 6 * 48 * 4  # layers, keys and values, words, channels, float32


# ---------------------------------------------------------------- what is refused


@torch.no_grad()
def test_a_video_that_could_not_begin_has_no_size() -> None:
    with tiered(build(), "archive", block_frames=2, **ROLLING) as wan:
        for wrong in (blocks(1, frames=3)[0], blocks(1, high=8)[0].double()):
            with pytest.raises((GeometryError, RuntimeError)):
                wan.denoise(wrong, 500.0, prompt())
            assert wan.cache is None
        wan.denoise(blocks(1)[0], 500.0, prompt())


@pytest.mark.parametrize("timestep", [1500.0, -3, float("nan"), torch.tensor([1.0, 2.0])], ids=str)
@torch.no_grad()
def test_a_timestep_out_of_range_or_of_other_rows_is_refused(timestep: Any) -> None:
    with tiered(build(), "archive", **ROLLING) as wan, pytest.raises(GeometryError, match=r"timesteps? (are|is)"):
        wan.denoise(blocks(1)[0], timestep, prompt())


@pytest.mark.parametrize("frames", [0, -1])
def test_blocks_have_frames(frames: int) -> None:
    model = build()
    own = dict(model.attn_processors)
    with pytest.raises(GeometryError, match="block_frames is a whole number of at least 1"):
        CausalWan(model, "archive", block_frames=frames)
    assert model.attn_processors == own


def test_blocks_that_recent_cannot_hold_are_refused() -> None:
    with tiered(build(), "archive", sink=0, recent=1, top_k=2) as wan:
        with torch.no_grad(), pytest.raises(GeometryError, match=r"recent = 1 .* blocks of 2"):
            wan.denoise(blocks(1)[0], 500.0, prompt())
        assert wan.cache is None


# ---------------------------------------------------------------- the compressor and the model


def test_an_untrained_high_resolution_branch_alone_is_warned_of_and_draws_nothing_of_the_callers() -> None:
    torch.manual_seed(3)
    wanted = torch.randn(4)
    torch.manual_seed(3)
    with (
        pytest.warns(UserWarning, match="makes tokens of zeros until it is trained"),
        tiered(build_quietly(), "packforcing", compressor=("dual-branch", {"branches": "hr"})),
    ):
        assert torch.equal(torch.randn(4), wanted)


def build_quietly() -> Any:
    with torch.random.fork_rng():
        return build()


def test_weights_that_are_none_are_refused_in_one_line(tmp_path: Path) -> None:
    def bound(weights: str) -> None:
        CausalWan(build(), "packforcing", compressor=("dual-branch", {"branches": "hr", "weights": weights}))

    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyError, match="no compressor can be read from"):
        bound(str(tmp_path / "empty"))
    build().save_pretrained(tmp_path / "wan")
    with pytest.raises(PolicyError, match=r"not those of the network|no compressor can be read"):
        bound(str(tmp_path / "wan"))
    network = HighResolution(channels=16, width=48, widths=(8, 8, 8, 8))
    network.save_pretrained(tmp_path / "hr")
    bound(str(tmp_path / "hr"))


def test_an_attention_backend_that_was_chosen_meanwhile_stays_chosen() -> None:
    model = build()
    with tiered(model, "archive", **ROLLING):
        model.set_attention_backend("_native_math")
    chosen = {processor._attention_backend for processor in model.attn_processors.values()}
    assert chosen == {AttentionBackendName._NATIVE_MATH}


def test_an_autoencoder_that_is_kept_elsewhere_is_fetched_to_decode() -> None:
    class Hook:
        calls = 0

        def pre_forward(self, _: Any) -> None:
            self.calls += 1

    autoencoder = vae()
    autoencoder._hf_hook = Hook()
    StreamingDecoder(autoencoder).decode(blocks(1, **SQUARE)[0])
    assert autoencoder._hf_hook.calls == 1


@torch.no_grad()
def test_the_window_is_computed_anew_with_a_new_prompt_when_recent_is_rewound() -> None:
    clips, old, new = blocks(4, frames=2), prompt(), prompt(seed=9)

    def video(prompts: list[Tensor]) -> Any:
        wan = CausalWan(build(), "sink-rolling-window", sink=2, recent=4)
        for clip, text in zip(clips, prompts, strict=False):
            wan.commit(clip, text)
        return wan

    wan, due, kept = video([old] * 3), video([old, new, new]), video([old] * 3)
    assert wan.tier_counts() == {"sink": 2, "mid": 0, "recent": 4, "current": 0, "dropped": 0}
    assert wan.rewind_recent() == 4
    for clip in clips[1:3]:
        wan.commit(clip, new)
    got = wan.denoise(clips[3], 500.0, new)
    assert torch.equal(got, due.denoise(clips[3], 500.0, new))
    assert not torch.allclose(got, kept.denoise(clips[3], 500.0, new), atol=1e-3)


def test_a_video_whose_pixels_were_seen_is_not_rewound() -> None:
    with low() as wan:
        go_on(wan, blocks(3, **SQUARE))
        with pytest.raises(CropError, match=r"cannot be rewound: its compressor has seen the pixels.*fork\(\) before"):
            wan.rewind_recent()
        assert wan.frames == 6


@torch.no_grad()
def test_compact_ages_a_video_before_its_time() -> None:
    clips, text = blocks(4, frames=2), prompt()
    early = CausalWan(build(), "archive", sink=2, recent=4, top_k=9, block_frames=2)
    due = CausalWan(build(), "archive", sink=2, recent=2, top_k=9, block_frames=2)
    for clip in clips[:3]:
        early.commit(clip, text)
        due.commit(clip, text)
    assert early.tier_counts()["mid"] == 0
    early.compact(recent=2)
    assert early.tier_counts() == due.tier_counts()
    got = early.denoise(clips[3], 500.0, text)
    assert torch.allclose(got, due.denoise(clips[3], 500.0, text), atol=1e-5)
