"""kvtiers decides what an autoregressive transformer remembers: tiers of keys and values, and policies over them."""

from importlib.metadata import version as _version

from kvtiers.accounting import MemoryUsage, bytes_in, memory_usage_of
from kvtiers.archive import Archive, BlockStore, ByteBudget, Codec
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
from kvtiers.layer_state import CurrentView
from kvtiers.layered import resolve
from kvtiers.plugins import register, unregister
from kvtiers.policy import Policy
from kvtiers.presets import load_policy, policy
from kvtiers.rotary import Rotary
from kvtiers.rows import Chunk, LayerRows, PaddingPattern, RowGroup
from kvtiers.slots import Compressor, Moment, Placement, Realigner, Retriever, Sink
from kvtiers.timeline import Timeline

__version__ = _version("kvtiers")

__all__ = [
    "Archive",
    "ArchiveFullError",
    "Blocks",
    "BlockStore",
    "BudgetError",
    "ByteBudget",
    "Chunk",
    "Codec",
    "Compressor",
    "Context",
    "CropError",
    "CurrentView",
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
    "Moment",
    "NotFiniteError",
    "PaddingPattern",
    "Placement",
    "PluginError",
    "Policy",
    "PolicyError",
    "Realigner",
    "Retriever",
    "Rotary",
    "RotaryError",
    "RowGroup",
    "SavedCacheError",
    "Selection",
    "SelectionError",
    "Sink",
    "SlotError",
    "SwapError",
    "TieredCache",
    "Timeline",
    "UnknownPolicyError",
    "UnsupportedModelError",
    "bytes_in",
    "hookimpl",
    "load_policy",
    "memory_usage_of",
    "policy",
    "register",
    "resolve",
    "unregister",
]
