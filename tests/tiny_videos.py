"""Models of the tiny world's kind with random weights, which no layer swallows, the same ones every time."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from kvtiers_packforcing.network import HighResolution
from kvtiers_packforcing.tiny_world.gather import gather
from kvtiers_packforcing.tiny_world.weights import Models


def tiny_models(seed: int = 0) -> Models:
    """Models that make a block within a few hundredths of a second."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    )
    compressor = HighResolution(16, 32, (8, 8, 8, 16))
    torch.nn.init.normal_(compressor.layers[-1].weight, std=0.1)  # which begins at zero
    autoencoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    parts = {"transformer": transformer, "compressor": compressor, "autoencoder": autoencoder}
    return Models(**{name: part.eval().requires_grad_(requires_grad=False) for name, part in parts.items()})


def save_models(models: Models, folder: Path) -> Path:
    """Write them as they are shipped: float16, with sums."""
    with TemporaryDirectory() as runs:
        for name in ("transformer", "compressor", "autoencoder"):
            getattr(models, name).save_pretrained(Path(runs) / name)
        gather(Path(runs) / "autoencoder", [Path(runs)], folder)
    return folder
