"""PackForcing for video (arXiv 2603.25730): its compressor and its preset. The other policies are kvtiers_policies'."""

from collections.abc import Callable, Mapping

from kvtiers import Compressor, Policy, hookimpl
from kvtiers_packforcing.dual_branch import DualBranch
from kvtiers_packforcing.preset import packforcing


@hookimpl
def kvtiers_policies() -> Mapping[str, Callable[[], Policy]]:
    """The preset for video."""
    return {"packforcing": packforcing}


@hookimpl
def kvtiers_compressors() -> Mapping[str, Callable[..., Compressor]]:
    """What compresses blocks before the model sees them."""
    return {"dual-branch": DualBranch}
