"""The versions of transformers that are served, and the name under which each takes a cache."""

import inspect
from collections.abc import Callable
from typing import Any, Final

import transformers
from packaging.version import Version

from kvtiers.errors import MissingExtraError

OLDEST: Final = "5.18.0"
"""The oldest version that is served; `make test-versions` runs the tests with it, `make test` with the newest."""


def check_version(installed: str) -> None:
    """Raise `MissingExtraError` if `installed` is too old to be served."""
    if Version(installed).release < Version(OLDEST).release:
        raise MissingExtraError(
            f"kvtiers_transformers needs transformers {OLDEST} or newer, and {installed} is installed; "
            f"run: pip install 'transformers>={OLDEST}'"
        )


check_version(transformers.__version__)  # before anything is imported that an older version does not have

CACHE: Final = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"
"""What the models and `generate` of the installed version call the cache. 5.24 renamed it."""

_NAMES: Final = (CACHE, "past_key_values", "layer_past")


def cache_name(forward: Callable[..., Any]) -> str:
    """What the `forward` of one module calls the cache: some modules have names of their own."""
    taken = inspect.signature(forward).parameters
    return next((name for name in _NAMES if name in taken), CACHE)
