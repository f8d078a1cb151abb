"""kvtiers decides what an autoregressive transformer remembers: tiers of keys and values, and policies over them."""

from importlib.metadata import version as _version

from kvtiers.accounting import MemoryUsage, bytes_in, memory_usage_of
from kvtiers.archive import Archive, Shelf
from kvtiers.blocks import Blocks, Context, Extent, Selection
from kvtiers.cache import Layer, Ragged, TieredCache, Turn
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
from kvtiers.store import LayerStore
from kvtiers.timeline import Timeline

__version__ = _version("kvtiers")

__all__ = [
    "Archive",
    "ArchiveFullError",
    "Blocks",
    "BudgetError",
    "Compressor",
    "Context",
    "CropError",
    "Extent",
    "Geometry",
    "GeometryError",
    "MemoryUsage",
    "InterruptedForwardError",
    "KVTiersError",
    "Layer",
    "LayerStore",
    "MissingExtraError",
    "MissingModelError",
    "NotFiniteError",
    "Placement",
    "PluginError",
    "Policy",
    "PolicyError",
    "Ragged",
    "Realigner",
    "Reduced",
    "Reducer",
    "Retriever",
    "Rotary",
    "RotaryError",
    "SavedCacheError",
    "Selection",
    "SelectionError",
    "Shelf",
    "Sink",
    "SlotError",
    "Source",
    "SourceCompressor",
    "SwapError",
    "TieredCache",
    "Timeline",
    "Turn",
    "UnknownPolicyError",
    "UnsupportedModelError",
    "bytes_in",
    "memory_usage_of",
    "hookimpl",
    "load_policy",
    "observer",
    "policy",
    "register",
    "resolve",
    "unregister",
]
