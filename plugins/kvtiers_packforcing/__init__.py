"""PackForcing for video (arXiv 2603.25730): its compressor and presets. The other policies are kvtiers_policies'."""

from collections.abc import Callable, Mapping

from kvtiers import Compressor, Policy, hookimpl
from kvtiers_packforcing.dual_branch import DualBranch
from kvtiers_packforcing.presets import packforcing, rolling_window, sink_rolling_window


@hookimpl
def kvtiers_policies() -> Mapping[str, Callable[[], Policy]]:
    """The presets for video."""
    return {
        "packforcing": packforcing,
        "rolling-window": rolling_window,
        "sink-rolling-window": sink_rolling_window,
    }


@hookimpl
def kvtiers_compressors() -> Mapping[str, Callable[..., Compressor]]:
    """What compresses blocks before the model sees them."""
    return {"dual-branch": DualBranch}
