"""kvtiers for Hugging Face language models: `with tiered(model, "packforcing-lm") as cache: model.generate(...)`."""

try:
    from kvtiers_transformers import versions as _versions  # noqa: F401 (refuses what is missing or too old)
except ModuleNotFoundError as error:
    from kvtiers.errors import MissingExtraError

    raise MissingExtraError(
        "kvtiers_transformers needs transformers, which is not installed; run: pip install 'kvtiers[transformers]'"
    ) from error

from kvtiers_transformers.cache import TransformersCache
from kvtiers_transformers.smollm2 import load_model, load_smollm2
from kvtiers_transformers.wrap import disable, enable, new_cache, tiered

__all__ = ["TransformersCache", "disable", "enable", "load_model", "load_smollm2", "new_cache", "tiered"]
