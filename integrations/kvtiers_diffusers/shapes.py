"""The shapes of Wan models, for `kvtiers plan`: by name, or from the configuration in a folder or on the hub."""

from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel

from kvtiers import Geometry, PolicyError
from kvtiers.planning import Shape

_KNOWN = {
    "wan2.1-t2v-1.3b": {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128},
    "wan2.1-t2v-14b": {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128},
}
_FRAMES_PER_LATENT, _PIXELS_PER_TOKEN = 4, 16
"""Of Wan 2.1: its autoencoder makes one latent of 4 frames and 8 x 8 pixels, a token takes 2 x 2 of these."""


def shape(model: str, *, size: str, seconds: float, fps: int, block_frames: int, dtype: Any, **_: Any) -> Shape | None:
    """The shape of `model` making a video of `size` (width x height) and length; none if it is no Wan.

    Raises `PolicyError` for a size that tokens do not divide.
    """
    config = _config(model)
    if config is None:
        return None
    try:
        width, height = (int(side) for side in size.lower().split("x"))
    except ValueError as error:
        raise PolicyError(f"size is width x height in pixels, such as 832x480, got {size!r}") from error
    if min(width, height) < 1 or width % _PIXELS_PER_TOKEN or height % _PIXELS_PER_TOKEN:
        raise PolicyError(f"width and height must be multiples of {_PIXELS_PER_TOKEN} pixels, got {width} x {height}")
    per_second = fps / _FRAMES_PER_LATENT
    return Shape(
        name=f"{model}, {width}x{height}, {seconds:g} s at {fps} frames a second",
        layers=config["num_layers"],
        geometry=Geometry(
            kv_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            grid=(height // _PIXELS_PER_TOKEN, width // _PIXELS_PER_TOKEN),
            steps_per_commit=block_frames,
            causal=False,
            dtype=dtype,
        ),
        steps=round(seconds * per_second),
        growth_steps=round(60 * per_second),
        growth_unit="minute",
    )


def _config(model: str) -> dict[str, Any] | None:
    """What `model` says of its layers and heads, or none if it is no Wan."""
    if model.lower() in _KNOWN:
        return _KNOWN[model.lower()]
    for folder in (Path(model), Path(model) / "transformer"):
        if (folder / "config.json").is_file():
            found: dict[str, Any] = dict(WanTransformer3DModel.load_config(folder))
            return found if found.get("_class_name") == WanTransformer3DModel.__name__ else None
    return None
