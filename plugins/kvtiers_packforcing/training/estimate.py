"""What a run would need, from its configuration alone, where its models are not at hand: parameters and memory."""

import json
from pathlib import Path
from typing import Any

import attrs
import torch
from diffusers import WanTransformer3DModel

from kvtiers_packforcing.network import HighResolution
from kvtiers_packforcing.training.config import TrainingConfig, TrainingConfigError
from kvtiers_packforcing.training.wan_config import HUB_WAN_1_3B, WAN_1_3B, WanDistillConfig

_FLOAT = 4
"""Bytes of a weight, a gradient, a moment or an average."""


@attrs.frozen(kw_only=True)
class Outline:
    """An estimate. lacks: why it is no measurement. All sizes are of one process that shares nothing, in bytes."""

    lacks: str
    parameters: dict[str, int]
    weights: int
    gradients: int
    moments: int
    average: int
    activations: int

    @property
    def lines(self) -> list[str]:
        """As a text."""
        total = self.weights + self.gradients + self.moments + self.average + self.activations
        sizes = ", ".join(
            f"{name} {getattr(self, name) / 1e9:.1f}"
            for name in ("weights", "gradients", "moments", "average", "activations")
        )
        return [
            *(f"{name}: {count:,} parameters" for name, count in self.parameters.items()),
            f"memory of one process without sharding, estimated, in GB: {sizes}; in all {total / 1e9:.0f}",
            f"time per step: not measured, since {self.lacks} is not here",
        ]


def absent_model(base: str) -> str | None:
    """`base`, if it is a hub id of which nothing is on this machine; None if it is here."""
    from huggingface_hub import try_to_load_from_cache

    if Path(base).is_dir() or isinstance(try_to_load_from_cache(base, "transformer/config.json"), str):
        return None
    return base


def outline_of(config: TrainingConfig, lacks: str) -> Outline:
    """The outline of a run of stage `distill-wan`. Its models are made without memory for their weights."""
    settings: WanDistillConfig = config.model
    shape = _shape_of(settings.base)
    with torch.device("meta"):
        transformer: Any = WanTransformer3DModel(**shape)
        width = shape["num_attention_heads"] * shape["attention_head_dim"]
        compressor = HighResolution(shape["in_channels"], width, settings.compressor_widths)
    each = sum(weight.numel() for weight in transformer.parameters())
    generator = each + sum(weight.numel() for weight in compressor.parameters())
    trained = generator + each
    return Outline(
        lacks=lacks,
        parameters={"generator": generator, "critic": each, "teacher": each},
        weights=_FLOAT * (trained + each),
        gradients=_FLOAT * generator,  # one network at a time has them
        moments=2 * _FLOAT * trained,
        average=_FLOAT * generator,
        activations=_activations(config, shape),
    )


def _activations(config: TrainingConfig, shape: dict[str, Any]) -> int:
    """Of the packed forward of one clip with its gradient: a clean stream and a noisy one.

    A token leaves in a layer about 12 vectors of its width and two of the feed-forward's, and with checkpointing its
    input alone, beside one layer in full.
    """
    settings: WanDistillConfig = config.model
    tokens = 2 * settings.frames * (settings.height // 16) * (settings.width // 16)
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    size = 2 if config.run.precision == "bfloat16" else _FLOAT
    layer, layers = size * (12 * width + 2 * shape["ffn_dim"]), shape["num_layers"]
    kept = _FLOAT * width * layers + layer if config.run.gradient_checkpointing else layer * layers
    return int(tokens * kept)


def _shape_of(base: str) -> dict[str, Any]:
    """The configuration of a transformer: in a folder, or the one that is known."""
    path = Path(base) / "transformer" / "config.json"
    if path.is_file():
        said = json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in said.items() if not name.startswith("_")}
    if base != HUB_WAN_1_3B:
        raise TrainingConfigError(
            f"[model]: base: nothing of {base!r} is on this machine, and only of {HUB_WAN_1_3B} is it known what it "
            "needs; download it first (hf download), or give its folder"
        )
    return dict(WAN_1_3B)
