"""Every error kvtiers raises, each with the moment it belongs to. All are `KVTiersError` and a standard type too.

`suggest` and `explain` are words that their messages share.
"""

import difflib
from collections.abc import Iterable


class KVTiersError(Exception):
    """Base of every error that kvtiers raises on purpose."""


class PolicyError(KVTiersError, ValueError):
    """When a policy's settings are out of range or contradict each other."""


class UnknownPolicyError(PolicyError, LookupError):
    """When no installed plugin provides the name that was asked for."""


class SlotError(KVTiersError, TypeError):
    """When a slot is given a policy of another kind, or something that is no policy at all."""


class BudgetError(PolicyError):
    """When a policy can attend more tokens than its stated `budget`."""


class GeometryError(KVTiersError, ValueError):
    """When a shape cannot be, or tensors have another shape, dtype or device than the cache was filled with."""


class RotaryError(KVTiersError, ValueError):
    """When a realigner must rotate keys and the model's rotary embedding is absent, unknown or changes with length."""


class NotFiniteError(KVTiersError, ValueError):
    """When checking is on and keys or values hold NaN or infinity."""


class SelectionError(KVTiersError, RuntimeError):
    """When a context is read although blocks were archived since the last selection."""


class CropError(KVTiersError, ValueError):
    """When a roll back would need tokens, or a selection, that the cache no longer has."""


class SwapError(KVTiersError, ValueError):
    """When a filled cache is asked to change to a policy that would need what it no longer has."""


class InterruptedForwardError(KVTiersError, RuntimeError):
    """When a cache is used after a forward failed midway and left its layers at different steps."""


class ArchiveFullError(KVTiersError, OSError):
    """When an archive's byte limit is reached or its disk is full. Nothing was lost: the blocks are still recent."""


class SavedCacheError(KVTiersError, ValueError):
    """When a saved cache is truncated, was changed, or belongs to another policy or geometry."""


class PluginError(KVTiersError, RuntimeError):
    """When a plugin that failed to load, or clashes with another, is asked for what it would have provided."""


class MissingExtraError(KVTiersError, ImportError):
    """When a part of kvtiers is imported without the optional dependencies it needs."""


class MissingModelError(KVTiersError, ImportError):
    """When a bundled model is asked for and the package that carries it is not installed."""


class UnsupportedModelError(KVTiersError, ValueError):
    """When a model has no attention that kvtiers knows how to serve."""


def suggest(name: object, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` if a known name is near `name`, else nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def explain(error: BaseException) -> str:
    """An exception on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
