"""What a `CausalWan` refuses: models that it cannot serve, and blocks, prompts and timesteps that do not fit."""

from typing import Any

import torch
from torch import Tensor

from kvtiers import GeometryError, TieredCache, UnsupportedModelError


def check_model(transformer: Any) -> None:
    """Raise `UnsupportedModelError` for a Wan that attends images, or whose tokens span several latent frames."""
    config = transformer.config
    if config.added_kv_proj_dim is not None or config.image_dim is not None:
        raise UnsupportedModelError(
            "this Wan attends an image beside the prompt (image to video); kvtiers_diffusers serves text to video"
        )
    if config.patch_size[0] != 1:
        raise UnsupportedModelError(
            f"patch_size is {tuple(config.patch_size)}: a token must belong to one latent frame, so the first must be 1"
        )


def check_gradients(transformer: Any) -> None:
    """Raise `UnsupportedModelError` if backward would run layers a second time."""
    if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
        raise UnsupportedModelError(
            "gradient checkpointing runs layers again in backward, when this block's tiers have moved on; call "
            "disable_gradient_checkpointing(), or torch.no_grad() if no gradients are wanted"
        )


def check_block(config: Any, block: Tensor, text: Tensor) -> None:
    """Raise `GeometryError` for latents or a prompt that a model of this configuration does not take."""
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


def by_row(block: Tensor, timestep: float | int | Tensor) -> Tensor:
    """The timestep of each row of `block`. Raises `GeometryError` unless it is 0 to 1,000, one or one for each row."""
    known = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
    if known and not bool(((torch.as_tensor(timestep) >= 0) & (torch.as_tensor(timestep) <= 1000)).all()):
        raise GeometryError(f"timesteps are 0 (clean) to 1000 (noise), got {timestep}")
    if not isinstance(timestep, Tensor):
        return torch.full((block.shape[0],), float(timestep), device=block.device)
    if timestep.numel() not in (1, block.shape[0]):
        raise GeometryError(
            f"timestep is one number, or one for each of {block.shape[0]} rows, got {tuple(timestep.shape)}"
        )
    return timestep.to(block.device, torch.float32).reshape(-1).expand(block.shape[0])
