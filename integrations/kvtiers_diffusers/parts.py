"""What the parts of a pipeline must be for it to make videos of text block by block."""

from typing import Any

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils.torch_utils import unwrap_module

from kvtiers import UnsupportedModelError
from kvtiers_diffusers.admitting import check_model


def check_parts(*, transformer: Any, transformer_2: Any, vae: Any, boundary_ratio: Any) -> None:
    """Raise `UnsupportedModelError` for parts that are there and cannot serve. None is a part that is not there."""
    autoencoder: Any = vae
    models = [("transformer", transformer), ("transformer_2", transformer_2)]
    for name, model in models:
        if model is not None:
            _check_transformer(name, model)
    if vae is not None and not isinstance(vae, AutoencoderKLWan):
        raise UnsupportedModelError(
            f"vae is a {type(vae).__name__}; CausalWanPipeline decodes videos with Wan's own AutoencoderKLWan"
        )
    if vae is not None:
        for name, model in models:
            if model is not None and model.config.in_channels != autoencoder.config.z_dim:
                raise UnsupportedModelError(
                    f"the autoencoder makes latents of {autoencoder.config.z_dim} channels and {name} takes "
                    f"{model.config.in_channels}; give the autoencoder that belongs to the model"
                )
    if transformer is not None and transformer_2 is not None:
        for setting in ("in_channels", "text_dim", "patch_size"):
            both = [model.config[setting] for model in (transformer, transformer_2)]
            if both[0] != both[1]:
                raise UnsupportedModelError(
                    f"transformer and transformer_2 make one video and differ in {setting}: {both[0]} and {both[1]}"
                )
    if transformer is not None and transformer_2 is None and boundary_ratio is not None:
        raise UnsupportedModelError(
            f"boundary_ratio={boundary_ratio} gives low noise to a transformer_2, and there is none; load the pipeline "
            "with it, or set boundary_ratio to none"
        )


def check_complete(*, transformer: Any, vae: Any, why: str | None) -> None:
    """Raise `UnsupportedModelError` if there is no transformer, or no autoencoder although it is needed (`why`)."""
    if transformer is None:
        raise UnsupportedModelError("this pipeline has no transformer (it is none); load it with one")
    if vae is None and why is not None:
        raise UnsupportedModelError(f"this pipeline has no autoencoder (vae is none), and {why}; load it with one")


def _check_transformer(name: str, model: Any) -> None:
    plain: Any = unwrap_module(model)  # torch.compile may wrap it
    if not isinstance(plain, WanTransformer3DModel):
        raise UnsupportedModelError(
            f"{name} is a {type(plain).__name__}; CausalWanPipeline makes videos of text with a WanTransformer3DModel"
        )
    config: Any = model.config
    channels, made = config.in_channels, config.out_channels
    if made is not None and made != channels:
        raise UnsupportedModelError(
            f"{name} takes {channels} channels and makes {made}: it wants an image or a mask beside the noise (image "
            "to video); give the transformer of text to video, and the image as stream(image=...)"
        )
    check_model(plain)
