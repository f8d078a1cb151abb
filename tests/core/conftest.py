"""Shapes are checked in every test, unless its strategies or its module say in which part of it."""

from collections.abc import Iterator

import pytest
from jaxtyping import config as shapes


@pytest.fixture(autouse=True)
def _shapes_are_checked() -> Iterator[None]:
    shapes.update("jaxtyping_disable", False)
    yield
    shapes.update("jaxtyping_disable", False)
