"""What a `CausalWan` refuses: models that it cannot serve, and blocks, prompts and timesteps that do not fit."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from kvtiers import GeometryError, TieredCache, UnsupportedModelError

_HARMLESS = (
    "group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading", "layerwise_casting",
    "peft_autocast_disable",
)  # fmt: skip
"""diffusers' hooks that change where weights are, or in which dtype, and nothing else."""


def check_model(transformer: Any) -> None:
    """Raise `UnsupportedModelError` for what is no plain Wan of text to video, and for one that other tools split or
    let skip layers."""
    if not isinstance(transformer, WanTransformer3DModel):
        raise UnsupportedModelError(
            f"kvtiers_diffusers serves diffusers' WanTransformer3DModel, got {type(transformer).__name__}; of a "
            "pipeline give its transformer, of a model in a wrapper (PEFT, data parallel) the model itself"
        )
    model: Any = transformer
    config = model.config
    if config.added_kv_proj_dim is not None or config.image_dim is not None:
        raise UnsupportedModelError(
            "this Wan attends an image beside the prompt (image to video); kvtiers_diffusers serves text to video"
        )
    if config.out_channels not in (None, config.in_channels):
        raise UnsupportedModelError(
            f"this Wan takes {config.in_channels} channels and gives {config.out_channels}: it wants more than noise "
            "and a prompt (an image, a mask, a control video); kvtiers_diffusers serves text to video"
        )
    if config.patch_size[0] != 1:
        raise UnsupportedModelError(
            f"patch_size is {tuple(config.patch_size)}: a token must belong to one latent frame, so the first must be 1"
        )
    check_hooks(transformer)


def check_hooks(transformer: Any) -> None:
    """Raise `UnsupportedModelError` for a model that is split over devices, or whose hooks may skip a layer."""
    if getattr(transformer, "_parallel_config", None) is not None:
        raise UnsupportedModelError(
            "this model is split over devices (enable_parallelism), and a tiered cache holds whole sequences and all "
            "heads; load the model anew, and do not split it before or while it is tiered"
        )
    step_cache = getattr(transformer, "_cache_config", None)
    if step_cache is not None:
        raise UnsupportedModelError(
            f"a step cache is enabled ({type(step_cache).__name__}); it skips layers or reuses what they gave, and a "
            "memory needs what every layer makes of every pass: disable_cache()"
        )
    for name, module in transformer.named_modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is None:
            continue
        for hook in registry.hooks:
            if hook not in _HARMLESS:
                raise UnsupportedModelError(
                    f"diffusers' hook {hook!r} is on {name or 'the model'}; hooks of its kind skip layers, reuse what "
                    "they gave or split the sequence, and a memory needs what every layer makes of every pass: remove "
                    "it, or load the model anew"
                )


def check_gradients(transformer: Any) -> None:
    """Raise `UnsupportedModelError` if backward would run layers a second time."""
    if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
        raise UnsupportedModelError(
            "gradient checkpointing runs layers again in backward, when this block's tiers have moved on; call "
            "disable_gradient_checkpointing(), or torch.no_grad() if no gradients are wanted"
        )


def check_block(transformer: Any, block: Tensor, text: Tensor) -> None:
    """Raise `GeometryError` for latents or a prompt that this model does not take."""
    config, dtype = transformer.config, transformer.dtype
    high, wide = config.patch_size[1:]
    if block.dim() != 5 or block.shape[1] != config.in_channels:
        raise GeometryError(
            f"a block is [batch, {config.in_channels} channels, frames, height, width], got {tuple(block.shape)}"
        )
    if block.shape[3] % high or block.shape[4] % wide:
        raise GeometryError(
            f"latents of {block.shape[3]} x {block.shape[4]} cannot be cut into patches of {high} x {wide}; "
            "give a height and width that they divide"
        )
    if text.dim() != 3 or text.shape[0] not in (1, block.shape[0]) or text.shape[2] != config.text_dim:
        raise GeometryError(
            f"text is [{block.shape[0]} rows (or 1), words, {config.text_dim}], got {tuple(text.shape)}; "
            "give the prompt's embedding for each row of the block"
        )
    kind = block.device.type
    if torch.is_autocast_enabled(kind):
        if torch.get_autocast_dtype(kind) != dtype:
            raise GeometryError(
                f"torch.autocast to {torch.get_autocast_dtype(kind)} is on and this model works in {dtype}; load the "
                "model in the dtype that it is to work in, and leave autocast out"
            )
    else:
        for name, given in (("block", block), ("text", text)):
            if given.dtype != dtype:
                raise GeometryError(
                    f"this model works in {dtype}, got the {name} in {given.dtype}; give {name}.to(transformer.dtype)"
                )


def check_continues(cache: TieredCache, block: Tensor, grid: tuple[int, int], *, even: bool) -> None:
    """Raise `GeometryError` unless a block of `grid` tokens a frame can follow what `cache` remembers."""
    held = cache.geometries[0]
    if grid != held.grid:
        raise GeometryError(
            f"this video has {held.grid[0]} x {held.grid[1]} tokens a frame, got a block of {grid[0]} x {grid[1]}; "
            "use one CausalWan per video, or reset() it"
        )
    rows, frames = cache.layers[0].batch, block.shape[2]
    if rows is not None and rows != block.shape[0]:
        raise GeometryError(
            f"this video holds {rows} rows, got a block of {block.shape[0]}; use one CausalWan per batch, or reset() it"
        )
    if frames > held.steps_per_commit or (even and frames != held.steps_per_commit):
        most = "at most " if not even else ""
        raise GeometryError(
            f"this video has blocks of {most}{held.steps_per_commit} frames, got {frames}; "
            "for blocks of different length give block_frames=<the longest> and even=False"
        )


def by_row(block: Tensor, timestep: float | int | Tensor, tokens: int = 0) -> Tensor:
    """The timestep of each row of `block`. Raises `GeometryError` unless it is 0 to 1,000, and one, one for each row,
    or the same for each of a row's frames or tokens.

    tokens: how many a row of the block has.
    """
    known = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
    if known and not bool(((torch.as_tensor(timestep) >= 0) & (torch.as_tensor(timestep) <= 1000)).all()):
        raise GeometryError(f"timesteps are 0 (clean) to 1000 (noise), got {timestep}")
    rows, frames = block.shape[0], block.shape[2]
    if not isinstance(timestep, Tensor):
        return torch.full((rows,), float(timestep), device=block.device)
    if timestep.dim() == 2 and timestep.shape[0] in (1, rows) and timestep.shape[1] in (frames, tokens):
        first = timestep[:, :1]
        if not bool((timestep == first).all()):
            raise GeometryError(
                f"timestep has {timestep.shape[1]} entries a row that differ (image to video, or frames of different "
                "noise); all of a block are denoised together here: give one number a row"
            )
        timestep = first
    if timestep.numel() not in (1, rows):
        raise GeometryError(
            f"timestep is one number, or one for each of {rows} rows (or the same for each of a row's {frames} frames "
            f"or {tokens} tokens), got {tuple(timestep.shape)}"
        )
    return timestep.to(block.device, torch.float32).reshape(-1).expand(rows)
