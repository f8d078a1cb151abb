"""What holds for every test: shapes are checked, Hypothesis has its profiles, torch does not fight over the cores.

Import nothing of kvtiers above the hook: a module that is imported before it goes unchecked.
"""

import os

import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook(
    ["kvtiers", "kvtiers_policies", "kvtiers_packforcing", "kvtiers_transformers", "kvtiers_diffusers"],
    "beartype.beartype",
)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The first example of a property pays for imports and kernels, so neither a deadline nor a slow start says anything.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=40, **_COMMON)
settings.register_profile("ci", max_examples=75, print_blob=True, derandomize=True, database=None, **_COMMON)
settings.register_profile("quick", max_examples=12, **_COMMON)
settings.register_profile("deep", max_examples=2_000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))
