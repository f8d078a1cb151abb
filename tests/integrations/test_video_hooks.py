"""Models that other tools have changed: kept elsewhere, they give the same video; where layers may be skipped or the
model is split, they are refused, and the video goes on once that is undone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import accelerate
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_layer_skip
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from kvtiers import UnsupportedModelError
from kvtiers_diffusers import CausalWan, CausalWanPipeline, tiered
from kvtiers_packforcing.network import HighResolution
from tiny_wan import blocks, build, prompt, vae

Change = Callable[[Any], object]
ROLLING = {"sink": 2, "recent": 2, "top_k": 2}
CPU = torch.device("cpu")


@torch.no_grad()
def go_on(wan: CausalWan, clips: list[Tensor]) -> list[Tensor]:
    found = []
    for clip in clips:
        found += [wan.denoise(clip, timestep, prompt()) for timestep in (900.0, 500.0)]
        found.append(wan.commit(clip, prompt()))
    return found


# ---------------------------------------------------------------- kept elsewhere


def _grouped(kind: str, *, disk: bool) -> Callable[[Any, Path], None]:
    def offload(model: Any, folder: Path) -> None:
        model.enable_group_offload(
            onload_device=CPU,
            offload_device=CPU,
            offload_type=kind,
            num_blocks_per_group=1,
            **({"offload_to_disk_path": str(folder)} if disk else {}),
        )

    return offload


def _sequential(model: Any, _: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def _from_disk(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU, offload_buffers=True)


def _whole(model: Any, _: Path) -> None:
    accelerate.cpu_offload_with_hook(model, CPU)


OFFLOADS: dict[str, Callable[[Any, Path], None]] = {
    "accelerate, layer by layer": _sequential,
    "accelerate, from disk": _from_disk,
    "accelerate, whole models": _whole,
    "groups of blocks": _grouped("block_level", disk=False),
    "groups of blocks from disk": _grouped("block_level", disk=True),
    "groups of leaves from disk": _grouped("leaf_level", disk=True),
}


def network() -> HighResolution:
    torch.manual_seed(0)
    made = HighResolution(channels=16, width=48, widths=(4, 4, 4, 4))
    torch.nn.init.normal_(made.layers[-1].weight)
    return made


def kept_video(folder: Path, offload: Callable[[Any, Path], None] | None) -> list[Tensor]:
    """A video of a model, an autoencoder and a compressor that are kept elsewhere; saved and loaded midway."""
    clips, parts = blocks(4, high=8, wide=8), {"model": build(), "vae": vae(), "compressor": network()}
    for name, part in parts.items():
        if offload is not None:
            (folder / name).mkdir()
            offload(part, folder / name)
    with tiered(
        parts["model"], "packforcing", vae=parts["vae"], compressor_network=parts["compressor"], **ROLLING
    ) as wan:
        found = go_on(wan, clips[:3])
        wan.save(folder / "video.safetensors")
        wan.reset()
        wan.load(folder / "video.safetensors")
        return found + go_on(wan, clips[3:])


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return kept_video(tmp_path_factory.mktemp("plain"), None)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_model_that_is_kept_elsewhere_makes_the_same_video(offload: str, video: list[Tensor], tmp_path: Path) -> None:
    kept = kept_video(tmp_path, OFFLOADS[offload])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(kept, video, strict=True))


PIPELINES: dict[str, Callable[[Any, Path], None]] = {
    "whole models": lambda pipe, _: pipe.enable_model_cpu_offload(device="cpu"),
    "groups of leaves from disk": _grouped("leaf_level", disk=True),
}


@pytest.mark.slow
def test_a_pipeline_that_is_kept_elsewhere_makes_the_same_video(tmp_path: Path) -> None:
    def made(change: Callable[[Any, Path], None] | None) -> Tensor:
        pipe = CausalWanPipeline(vae=vae(), transformer=build(), scheduler=FlowMatchEulerDiscreteScheduler())
        pipe.set_progress_bar_config(disable=True)
        if change is not None:
            change(pipe, tmp_path)
        frames: Tensor = pipe(
            prompt_embeds=prompt(), num_frames=17, height=64, width=64, block_frames=2, timesteps=(1000, 500),
            generator=torch.Generator().manual_seed(0), output_type="pt", **ROLLING,
        ).frames  # fmt: skip
        return frames

    wanted = made(None)
    for name, change in PIPELINES.items():
        assert torch.equal(made(change), wanted), name


# ---------------------------------------------------------------- layers that do not run


def _step_cache(config: Any) -> Change:
    return lambda model: model.enable_cache(config)


def _broadcast() -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("blocks",),
        cross_attention_block_identifiers=("blocks",),
    )


def _faster() -> FasterCacheConfig:
    return FasterCacheConfig(
        current_timestep_callback=lambda: 500, attention_weight_callback=lambda _: 0.5, tensor_format="BCFHW"
    )


def _split(model: Any) -> None:
    """What `enable_parallelism` notes on a model; by itself it asks for an accelerator."""
    model._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))


def _split_attention(model: Any) -> None:
    for processor in model.attn_processors.values():
        processor._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))


NAMED: dict[str, tuple[Change, str]] = {
    "first block cache": (_step_cache(FirstBlockCacheConfig(threshold=9.0)), "FirstBlockCacheConfig.*disable_cache"),
    "pyramid attention broadcast": (_step_cache(_broadcast()), "PyramidAttentionBroadcastConfig"),
    "faster cache": (_step_cache(_faster()), "FasterCacheConfig"),
    "mag cache": (_step_cache(MagCacheConfig(num_inference_steps=2, mag_ratios=[1.0, 1.0])), "MagCacheConfig"),
    "taylor seer": (_step_cache(TaylorSeerCacheConfig()), "TaylorSeerCacheConfig"),
    "a cache that was applied by hand": (
        lambda model: apply_first_block_cache(model, FirstBlockCacheConfig(threshold=9.0)),
        "hook 'fbc_leader_block_hook' is on blocks.0",
    ),
    "layer skip": (
        lambda model: apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks")),
        "hook 'layer_skip_hook' is on blocks.1; hooks of its kind skip layers",
    ),
    "context parallelism": (_split, "split over devices .enable_parallelism."),
}


@pytest.mark.parametrize(("change", "message"), NAMED.values(), ids=NAMED)
@pytest.mark.filterwarnings("ignore:FasterCache")
def test_what_may_skip_layers_or_splits_the_model_is_refused_before_anything_runs(change: Change, message: str) -> None:
    before, after, ran = build(), build(), []
    change(before)
    own = dict(before.attn_processors)
    with pytest.raises(UnsupportedModelError, match=message):
        CausalWan(before)
    assert before.attn_processors == own
    with torch.no_grad(), tiered(after) as wan:
        wan.denoise(blocks(1)[0], 900.0, prompt())
        change(after)
        after.patch_embedding.register_forward_hook(lambda *_: ran.append(1))
        with pytest.raises(UnsupportedModelError, match=message):
            wan.denoise(blocks(1)[0], 500.0, prompt())
        with pytest.raises(UnsupportedModelError, match=message):
            wan.commit(blocks(1)[0], prompt())
        assert not ran
        assert wan.frames == 0


def test_attention_that_is_split_over_devices_is_refused_before_and_after() -> None:
    before, after = build(), build()
    _split_attention(before)
    with pytest.raises(UnsupportedModelError, match="context parallelism"):
        CausalWan(before)
    with torch.no_grad(), tiered(after) as wan:
        _split_attention(after)
        with pytest.raises(UnsupportedModelError, match="context parallelism"):
            wan.denoise(blocks(1)[0], 500.0, prompt())


def _skipped(model: Any) -> Callable[[], None]:
    model.blocks[1].forward = lambda hidden, *_: hidden
    return lambda: model.blocks[1].__dict__.pop("forward")


def _repeated(model: Any) -> Callable[[], None]:
    block = model.blocks[0]
    forward = block.forward
    block.forward = lambda hidden, *rest: forward(forward(hidden, *rest), *rest)
    return lambda: block.__dict__.pop("forward")


def _answered(model: Any) -> Callable[[], None]:
    """Cross-attention that is answered from memory."""
    part = model.blocks[1].attn2
    part.forward = lambda hidden, *_: hidden
    return lambda: part.__dict__.pop("forward")


def _exchanged(model: Any) -> Callable[[], None]:
    part = model.blocks[0].attn1
    ours = part.processor
    part.set_processor(WanAttnProcessor())
    return lambda: part.set_processor(ours)


@pytest.mark.parametrize("steps", [0, 1], ids=["the first step of a block", "a further step"])
@pytest.mark.parametrize("patch", [_skipped, _repeated, _answered, _exchanged])
@torch.no_grad()
def test_a_pass_in_which_a_layer_did_not_run_once_is_refused_and_undone(
    patch: Callable[[Any], Callable[[], None]], steps: int
) -> None:
    clips, videos = blocks(6), []
    for patched in (False, True):
        model = build()
        with tiered(model, "packforcing-lm", realigner="contiguous", **ROLLING) as wan:
            found = go_on(wan, clips[:4])
            for timestep in (900.0, 700.0)[:steps]:
                wan.denoise(clips[4], timestep, prompt())
            if patched:
                undo = patch(model)
                for verb in (
                    lambda wan=wan: wan.denoise(clips[5], 600.0, prompt()),
                    lambda wan=wan: wan.commit(clips[5], prompt()),
                ):
                    with pytest.raises(UnsupportedModelError, match=r"did not run once in this pass.*of layer [01]"):
                        verb()
                assert wan.frames == 8
                undo()
            videos.append(found + go_on(wan, clips[4:]))
    assert all(torch.equal(a, b) for a, b in zip(*videos, strict=True))


def test_an_attention_processor_that_is_not_diffusers_own_is_refused() -> None:
    class Sparse(WanAttnProcessor):
        pass

    model = build()
    model.set_attn_processor(Sparse())
    with pytest.raises(UnsupportedModelError, match="goes through Sparse, whose arithmetic would be passed over"):
        CausalWan(model)
    assert all(type(processor) is Sparse for processor in model.attn_processors.values())
