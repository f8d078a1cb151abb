"""What holds for every test: shapes are checked, Hypothesis has its profiles, torch does not fight over the cores.

Import nothing of kvtiers above the hook: a module that is imported before it goes unchecked.
"""

import gc
import os

# Before MKL is loaded: the same bits wherever in memory a matrix lies, for the tests that compare bit for bit. Without
# STRICT, five of them fail on CPUs with AVX-512.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config as shapes

import shape_checks

shape_checks.install(
    ["kvtiers", "kvtiers_policies", "kvtiers_packforcing", "kvtiers_transformers", "kvtiers_diffusers"]
)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The first example of a property pays for imports and kernels, so neither a deadline nor a slow start says anything.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=40, **_COMMON)
settings.register_profile("ci", max_examples=40, print_blob=True, derandomize=True, database=None, **_COMMON)
settings.register_profile("quick", max_examples=12, **_COMMON)
settings.register_profile("deep", max_examples=2_000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What collecting imports stays, so Python's collector of garbage need not look through it time and again."""
    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(*thresholds)


@pytest.fixture
def _shapes_go_unchecked() -> Iterator[None]:
    """For tests that make the same calls some thousand times: their shapes are checked elsewhere."""
    shapes.update("jaxtyping_disable", True)
    yield
    shapes.update("jaxtyping_disable", False)


def pytest_addoption(parser: Any) -> None:
    """`--distances` prints how far published methods are from their references."""
    parser.addoption("--distances", action="store_true", help="Print how far methods are from their references.")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """The table of `--distances`; not with several processes, which measure for themselves."""
    if not config.getoption("--distances"):
        return
    from distances import MEASURED

    terminalreporter.write_line("| method | distance from its reference | nearest control |")
    terminalreporter.write_line("| --- | ---: | ---: |")
    for method, (off, control) in sorted(MEASURED.items()):
        terminalreporter.write_line(f"| `{method}` | {off:.1e} | {control:.2g} |")
