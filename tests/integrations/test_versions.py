"""Which versions of transformers are served: what is too old is refused, and the cache has the right name."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import transformers

from kvtiers.errors import MissingExtraError
from kvtiers_transformers.versions import CACHE, OLDEST, cache_name, check_version
from tiny_models import attentions, build

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


@pytest.mark.parametrize("installed", ["4.57.6", "5.0.0", "5.13.1", "5.17.0"])
def test_an_older_transformers_is_refused_in_one_sentence(installed: str) -> None:
    with pytest.raises(MissingExtraError, match=rf"{OLDEST} or newer, and {installed} is installed; run: pip install"):
        check_version(installed)


@pytest.mark.parametrize("installed", [OLDEST, "5.23.0", "5.24.0", "5.25.0.dev0", "6.0.0rc1"])
def test_the_oldest_version_and_newer_ones_are_served(installed: str) -> None:
    check_version(installed)


def test_the_oldest_version_is_the_one_that_the_distribution_asks_for() -> None:
    assert f"transformers>={OLDEST}" in EXTRAS["transformers"]
    assert all(re.search(r">=\d+\.\d+\.\d+$", line) for line in (EXTRAS["transformers"][0], EXTRAS["diffusers"][0]))


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gpt2"])
def test_the_name_of_the_cache_is_one_that_the_installed_version_takes(family: str) -> None:
    model = build(family)
    for module in (model, model.base_model, *attentions(model)):
        assert cache_name(module.forward) in (CACHE, "layer_past")
    assert CACHE in inspect.signature(type(model).forward).parameters
    assert (CACHE == "cache") == (tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24))
