"""What a layer refuses before it changes anything: policies that do not fit it, and tokens that do not."""

import torch
from torch import Tensor

from kvtiers.errors import GeometryError, NotFiniteError, RotaryError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary


def check_layer(policy: Policy, geometry: Geometry, rotary: Rotary | None, layer: int) -> None:
    """Raise unless `policy` can serve a layer of `geometry` that rotates as `rotary` does."""
    compressor = policy.compressor
    if policy.realigner.rotates and rotary is None:
        raise RotaryError(
            f"realigner {type(policy.realigner).__name__} rotates keys to their placed positions, but layer "
            f"{layer} has no rotary embedding; use a realigner that leaves positions alone, such as 'original'"
        )
    if geometry.causal and compressor.given:
        raise SlotError(
            f"compressor {type(compressor).__name__} is given the compressed form of a block when it is committed, and "
            "text has none to give; choose a compressor of keys and values, such as 'mean-pool'"
        )
    if not geometry.causal and geometry.even and 0 < (policy.recent or 0) < geometry.steps_per_commit:
        raise GeometryError(
            f"recent = {policy.recent} steps cannot hold one of the blocks of {geometry.steps_per_commit}; give a "
            "recent of at least a block, or 0"
        )
    policy.check_budget(geometry)


def admit(
    keys: Tensor, values: Tensor, policy: Policy, geometry: Geometry, *, layer: int, held: torch.device | None
) -> None:
    """Raise `GeometryError` unless a layer on device `held` (None: on none yet) can take these tokens."""
    want = (geometry.batch, geometry.kv_heads, geometry.head_dim, geometry.value_dim, geometry.dtype)
    got = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
    if got[:4] == want[:4] and {keys.dtype, values.dtype} != {geometry.dtype}:
        raise GeometryError(
            f"layer {layer} holds {geometry.dtype}, got keys of {keys.dtype} and values of {values.dtype}; "
            "load the model in one dtype, and instead of torch.autocast in the dtype it would cast to"
        )
    if got != want or values.shape[:3] != keys.shape[:3]:
        raise GeometryError(
            f"layer {layer} holds (rows, kv_heads, head_dim, value_dim, dtype) = {want}, got keys "
            f"{tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype}; "
            "use one cache per model and batch, or reset() it"
        )
    tokens, per_step = keys.shape[2], geometry.tokens_per_step
    if tokens == 0 or tokens % per_step:
        raise GeometryError(f"layer {layer} takes whole steps of {per_step} tokens, got {tokens} tokens")
    limit = policy.chunk_size if geometry.causal else geometry.steps_per_commit
    if limit is not None and tokens > limit * per_step:
        raise GeometryError(
            f"layer {layer} takes at most {limit} steps at once, got {tokens} tokens; "
            "commit blocks one by one, or cut the forward on multiples of chunk_size, as LayerRows.chunks does"
        )
    if not geometry.causal and geometry.even and tokens != geometry.steps_per_commit * per_step:
        raise GeometryError(
            f"layer {layer} takes blocks of {geometry.steps_per_commit} steps, got {tokens} tokens; "
            "make a cache for blocks of different length (even=False)"
        )
    if values.device != keys.device or (held is not None and held != keys.device):
        raise GeometryError(
            f"layer {layer} holds tensors on {held or 'nothing yet'}, got keys on {keys.device} and values on "
            f"{values.device}; keep a layer on one device"
        )


def check_finite(keys: Tensor, values: Tensor, *, layer: int, step: int, per_step: int) -> None:
    """Raise `NotFiniteError` for NaN or infinity. Waits for the device."""
    if not bool(torch.isfinite(keys).all() & torch.isfinite(values).all()):
        raise NotFiniteError(
            f"layer {layer} was given keys or values with NaN or infinity at steps {step} to "
            f"{step + keys.shape[2] // per_step}; this layer "
            "stored nothing of them, the layers before it did: go on from a fork(), or reset() the cache"
        )
