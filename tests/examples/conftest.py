"""The examples as modules, and a tiny model for them to run."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import tiny_chat
from kvtiers_transformers import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `load_model` reads."""
    return tiny_chat.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    """The model in that folder, and its tokenizer."""
    return load_model(str(tiny_folder))


@pytest.fixture
def example() -> Callable[[str], dict[str, Any]]:
    """The names that an example defines; its `if __name__ == "__main__"` is not run."""
    return lambda path: runpy.run_path(str(EXAMPLES / path))
