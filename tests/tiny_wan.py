"""Tiny Wan transformers: with random weights, and with those of the published causal code's rollouts."""

import json
from pathlib import Path
from typing import Any

import attrs
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
CHANNELS, WORDS, TEXT = 16, 6, 32


def build(*, layers: int = 2, heads: int = 2, head_dim: int = 24, seed: int = 0, **changes: Any) -> Any:
    """A Wan transformer in evaluation mode, the same one every time."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": layers,
    }
    return WanTransformer3DModel(**{**settings, **changes}).eval()


def vae() -> Any:
    """A small autoencoder of Wan's kind, with random weights, the same one every time."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def blocks(count: int, *, frames: int = 2, high: int = 4, wide: int = 6, rows: int = 1, seed: int = 3) -> list[Tensor]:
    """Random latents, [rows, channels, frames, high, wide] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, CHANNELS, frames, high, wide, generator=generator) for _ in range(count)]


def prompt(*, rows: int = 1, seed: int = 5) -> Tensor:
    """A random embedding, [rows, words, text_dim]."""
    return torch.randn(rows, WORDS, TEXT, generator=torch.Generator().manual_seed(seed))


@attrs.frozen(eq=False, kw_only=True)
class Golden:
    """A rollout of the published causal code: what went in and came out at every call, and what was cached at the end.

    inputs, flow: [calls, channels, frames, height, width]; the last call of each block is its clean pass.
    """

    config: dict[str, int]
    model: Any
    inputs: Tensor
    timesteps: Tensor
    flow: Tensor
    text: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def golden(name: str) -> Golden:
    """`full`, `window` or `sink_window`, with its weights in an unmodified diffusers model."""
    with safe_open(GOLDENS / f"causal_wan_{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    weights = {
        key.removeprefix("weights.").removeprefix("model."): part
        for key, part in tensors.items()
        if key.startswith("weights.")
    }
    model = build(
        layers=config["layers"],
        heads=config["heads"],
        head_dim=config["dim"] // config["heads"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        ffn_dim=config["ffn_dim"],
    )
    model.load_state_dict(convert_wan_transformer_to_diffusers(weights), strict=True)
    return Golden(
        config=config,
        model=model,
        inputs=tensors["inputs"],
        timesteps=tensors["timesteps"],
        flow=tensors["flow"],
        text=tensors["text"][None],
        keys=[tensors[f"final_k.{i}"] for i in range(config["layers"])],
        values=[tensors[f"final_v.{i}"] for i in range(config["layers"])],
    )
