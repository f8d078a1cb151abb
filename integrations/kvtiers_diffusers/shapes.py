"""The shapes of Wan models, for `kvtiers plan`: by name, or from the configurations in a folder."""

from math import isfinite
from pathlib import Path
from typing import Any

import attrs
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from kvtiers import Geometry, PolicyError
from kvtiers.planning import Shape

_KNOWN = {
    "wan2.1-t2v-1.3b": {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128},
    "wan2.1-t2v-14b": {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128},
}
_CHANNELS = 16
"""Of a latent of Wan 2.1."""


@attrs.frozen(kw_only=True)
class Scale:
    """How many frames one latent frame stands for, and how many pixels one token. The defaults are Wan 2.1's: its
    autoencoder makes one latent of 4 frames and 8 x 8 pixels, a token takes 2 x 2 of these."""

    frames: int = 4
    height: int = 16
    width: int = 16


def shape(model: str, *, size: str, seconds: float, fps: int, block_frames: int, dtype: Any, **_: Any) -> Shape | None:
    """The shape of `model` making a video of `size` (width x height) and length; none if it is no Wan.

    model: wan2.1-t2v-1.3b, wan2.1-t2v-14b, or a folder with the config.json of a transformer, or with such a folder
        named transformer. A vae/config.json beside it tells how it scales, which is Wan 2.1's scale otherwise.

    Raises `PolicyError` for a name like a Wan's that is not known, a size that tokens do not divide, less than one
    latent frame, and a model whose scale cannot be told.
    """
    found = _found(model)
    if found is None:
        return None
    config, scale = found
    width, height = sides(size, scale)
    per_second = fps / scale.frames
    if not isfinite(seconds) or round(seconds * per_second) < 1:
        raise PolicyError(
            f"seconds must be a finite number, and long enough for a latent frame, which stands for {scale.frames} "
            f"frames, {scale.frames / fps:g} s at {fps} a second; got {seconds:g}"
        )
    return Shape(
        name=f"{model}, {width}x{height}, {seconds:g} s at {fps} frames a second",
        layers=config["num_layers"],
        geometry=Geometry(
            kv_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            grid=(height // scale.height, width // scale.width),
            steps_per_commit=block_frames,
            causal=False,
            dtype=dtype,
        ),
        steps=round(seconds * per_second),
        growth_steps=round(60 * per_second),
        growth_unit="minute",
    )


def sides(size: str, scale: Scale = Scale()) -> tuple[int, int]:
    """Width and height of `size`, as in 832x480. Raises `PolicyError` unless whole tokens make them up."""
    try:
        width, height = (int(side) for side in size.lower().split("x"))
    except ValueError as error:
        raise PolicyError(f"size is width x height in pixels, such as 832x480, got {size!r}") from error
    if min(width, height) < 1 or width % scale.width or height % scale.height:
        raise PolicyError(
            f"width and height must be multiples of {scale.width} and {scale.height} pixels, got {width} x {height}"
        )
    return width, height


def _found(model: str) -> tuple[dict[str, Any], Scale] | None:
    """What `model` says of its layers and heads, and its scale; none if it is no Wan."""
    if model.lower() in _KNOWN:
        return _KNOWN[model.lower()], Scale()
    for folder in (Path(model), Path(model) / "transformer"):
        if (folder / "config.json").is_file():
            config: dict[str, Any] = dict(WanTransformer3DModel.load_config(folder))
            if config.get("_class_name") != WanTransformer3DModel.__name__:
                return None
            return config, _scale(folder, config)
    if model.lower().startswith("wan") and "/" not in model and not Path(model).exists():  # no hub is asked about it
        raise PolicyError(f"no Wan is called {model!r}; give {', '.join(_KNOWN)}, or a folder with its config.json")
    return None


def _scale(folder: Path, config: dict[str, Any]) -> Scale:
    """The scale of the Wan in `folder`, by its patches and the autoencoder beside it."""
    vae = next((path for path in (folder / "vae", folder.parent / "vae") if (path / "config.json").is_file()), None)
    channels, patch = config.get("in_channels", _CHANNELS), config.get("patch_size", (1, 2, 2))
    if vae is None and channels != _CHANNELS:
        raise PolicyError(
            f"{folder} is a Wan of {channels} channels with no vae/config.json beside it, and Wan 2.1's autoencoder, "
            f"which is taken then, makes {_CHANNELS}; put its own autoencoder's configuration there"
        )
    if patch[0] != 1:
        raise PolicyError(f"{folder} has patch_size {tuple(patch)}; a token must belong to one latent frame: 1, ...")
    own = {} if vae is None else dict(AutoencoderKLWan.load_config(vae))
    pixels = own.get("scale_factor_spatial", 8)
    return Scale(frames=own.get("scale_factor_temporal", 4), height=pixels * patch[1], width=pixels * patch[2])
