"""kvtiers for diffusers' video models: `with tiered(transformer, "packforcing") as wan: wan.denoise(...)`."""

try:
    import diffusers as _diffusers  # noqa: F401 (only to say clearly what is missing)
except ImportError as error:
    from kvtiers.errors import MissingExtraError

    raise MissingExtraError(
        "kvtiers_diffusers needs diffusers, which is not installed; run: pip install 'kvtiers[diffusers]'"
    ) from error

from kvtiers_diffusers.causal_wan import CausalWan, tiered
from kvtiers_diffusers.processors import disable, enable

__all__ = ["CausalWan", "disable", "enable", "tiered"]
