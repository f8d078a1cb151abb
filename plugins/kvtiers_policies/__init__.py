"""The policies that come with kvtiers. They reach the core only through these hooks, as any other plugin does."""

from collections.abc import Callable, Mapping

from kvtiers.archive import Archive, Codec
from kvtiers.hookspecs import hookimpl
from kvtiers.policy import Policy
from kvtiers.slots import Compressor, Realigner, Retriever, Sink
from kvtiers_policies import presets
from kvtiers_policies.affinity import Affinity
from kvtiers_policies.all_blocks import AllBlocks
from kvtiers_policies.bounded import Bounded
from kvtiers_policies.contiguous import Contiguous
from kvtiers_policies.device import DeviceArchive
from kvtiers_policies.disk import DiskArchive
from kvtiers_policies.drop import Drop
from kvtiers_policies.exact import Exact
from kvtiers_policies.first import FirstSteps
from kvtiers_policies.host import HostArchive
from kvtiers_policies.incremental import Incremental
from kvtiers_policies.int4 import Int4
from kvtiers_policies.int8 import Int8
from kvtiers_policies.keep import Keep
from kvtiers_policies.mean_pool import MeanPool
from kvtiers_policies.no_blocks import NoBlocks
from kvtiers_policies.no_sink import NoSink
from kvtiers_policies.original import Original
from kvtiers_policies.page_bounds import PageBounds
from kvtiers_policies.recency import Recency
from kvtiers_policies.top_tokens import TopTokens


@hookimpl
def kvtiers_policies() -> Mapping[str, Callable[[], Policy]]:
    """The presets."""
    return {
        "full": presets.full,
        "sliding-window": presets.sliding_window,
        "streaming": presets.streaming,
        "archive": presets.archive,
        "packforcing-lm": presets.packforcing_lm,
    }


@hookimpl
def kvtiers_sinks() -> Mapping[str, Callable[..., Sink]]:
    """Which blocks are anchors."""
    return {"none": NoSink, "first": FirstSteps}


@hookimpl
def kvtiers_compressors() -> Mapping[str, Callable[..., Compressor]]:
    """What a block becomes when it leaves recent."""
    return {"keep": Keep, "drop": Drop, "mean-pool": MeanPool, "top-tokens": TopTokens}


@hookimpl
def kvtiers_retrievers() -> Mapping[str, Callable[..., Retriever]]:
    """Which archived blocks are attended."""
    return {
        "all": AllBlocks,
        "none": NoBlocks,
        "recency": Recency,
        "affinity": Affinity,
        "page-bounds": PageBounds,
    }


@hookimpl
def kvtiers_realigners() -> Mapping[str, Callable[..., Realigner]]:
    """Which positions a context gets."""
    return {"original": Original, "bounded": Bounded, "contiguous": Contiguous, "incremental": Incremental}


@hookimpl
def kvtiers_archives() -> Mapping[str, Callable[..., Archive]]:
    """Where archived blocks live."""
    return {"device": DeviceArchive, "host": HostArchive, "disk": DiskArchive}


@hookimpl
def kvtiers_codecs() -> Mapping[str, Callable[..., Codec]]:
    """How archived blocks are written."""
    return {"exact": Exact, "int8": Int8, "int4": Int4}
