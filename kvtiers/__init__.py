"""kvtiers decides what an autoregressive transformer remembers: tiers of keys and values, and policies over them."""

from importlib.metadata import version as _version

from kvtiers.accounting import MemoryUsage, bytes_in, memory_usage_of
from kvtiers.archive import Archive, BlockStore
from kvtiers.blocks import Blocks, Context, Extent, Selection
from kvtiers.cache import TieredCache
from kvtiers.errors import (
    ArchiveFullError,
    BudgetError,
    CropError,
    GeometryError,
    InterruptedForwardError,
    KVTiersError,
    MissingExtraError,
    MissingModelError,
    NotFiniteError,
    PluginError,
    PolicyError,
    RotaryError,
    SavedCacheError,
    SelectionError,
    SlotError,
    SwapError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from kvtiers.geometry import Geometry
from kvtiers.hookspecs import hookimpl
from kvtiers.layer import Layer
from kvtiers.layered import resolve
from kvtiers.plugins import observer, register, unregister
from kvtiers.policy import (
    Compressor,
    Placement,
    Policy,
    Realigner,
    Reduced,
    Reducer,
    Retriever,
    Sink,
    Source,
    SourceCompressor,
)
from kvtiers.presets import load_policy, policy
from kvtiers.rotary import Rotary
from kvtiers.rows import Chunk, LayerRows, PaddingPattern, RowGroup
from kvtiers.timeline import Timeline

__version__ = _version("kvtiers")

__all__ = [
    "Archive",
    "ArchiveFullError",
    "BlockStore",
    "Blocks",
    "BudgetError",
    "Chunk",
    "Compressor",
    "Context",
    "CropError",
    "Extent",
    "Geometry",
    "GeometryError",
    "InterruptedForwardError",
    "KVTiersError",
    "Layer",
    "LayerRows",
    "MemoryUsage",
    "MissingExtraError",
    "MissingModelError",
    "NotFiniteError",
    "PaddingPattern",
    "Placement",
    "PluginError",
    "Policy",
    "PolicyError",
    "Realigner",
    "Reduced",
    "Reducer",
    "Retriever",
    "Rotary",
    "RotaryError",
    "RowGroup",
    "SavedCacheError",
    "Selection",
    "SelectionError",
    "Sink",
    "SlotError",
    "Source",
    "SourceCompressor",
    "SwapError",
    "TieredCache",
    "Timeline",
    "UnknownPolicyError",
    "UnsupportedModelError",
    "bytes_in",
    "hookimpl",
    "load_policy",
    "memory_usage_of",
    "observer",
    "policy",
    "register",
    "resolve",
    "unregister",
]
