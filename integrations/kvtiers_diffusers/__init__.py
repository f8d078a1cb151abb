"""kvtiers for diffusers' video models: `with tiered(transformer, "packforcing") as wan: wan.denoise(...)`."""

try:
    import diffusers as _diffusers  # noqa: F401 (only to say clearly what is missing)
except ImportError as error:
    from kvtiers.errors import MissingExtraError

    raise MissingExtraError(
        "kvtiers_diffusers needs diffusers, which is not installed; run: pip install 'kvtiers[diffusers]'"
    ) from error

from kvtiers_diffusers.causal_wan import CausalWan, tiered
from kvtiers_diffusers.checkpoints import load_causal_checkpoint
from kvtiers_diffusers.clips import Clips
from kvtiers_diffusers.pipeline import CausalWanPipeline
from kvtiers_diffusers.processors import disable, enable
from kvtiers_diffusers.streaming_vae import StreamingDecoder
from kvtiers_diffusers.video_file import write_video

__all__ = [
    "CausalWan",
    "CausalWanPipeline",
    "Clips",
    "StreamingDecoder",
    "disable",
    "enable",
    "load_causal_checkpoint",
    "tiered",
    "write_video",
]
