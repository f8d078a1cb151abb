"""What a layer refuses before it changes anything: policies that do not fit it, and tokens that do not."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvtiers.blocks import Blocks
from kvtiers.errors import GeometryError, NotFiniteError, RotaryError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.policy import Policy
from kvtiers.rotary import Rotary
from kvtiers.slots import Placement

One = TypeVar("One")
Sizes = Sequence[int | tuple[int, int] | None]
"""The size that each axis must have: one of two, or, if None, any."""


def fits(x: Tensor, shape: Sizes) -> bool:
    """Whether a tensor is of `shape`."""
    return x.dim() == len(shape) and all(
        due is None or size in (due if isinstance(due, tuple) else (due,))
        for size, due in zip(x.shape, shape, strict=True)
    )


def called(layer: int, part: object, method: str) -> str:
    """The call of a policy's method, for messages: the layer, then plugin, class and method."""
    return f"layer {layer}: {type(part).__module__}.{type(part).__name__}.{method}()"


def one_of(layers: Sequence[One], index: int) -> One:
    """Layer number `index`. Raises `GeometryError` if there is none."""
    if type(index) is not int or not 0 <= index < len(layers):
        raise GeometryError(f"there is no layer {index!r}; a cache of {len(layers)} layers has 0 to {len(layers) - 1}")
    return layers[index]


def each_of(given: Any, kind: type[One]) -> list[One]:
    """The items of a list that holds nothing but `kind`. Raises `GeometryError` for anything else."""
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(one, kind) for one in given):
        also = "one Policy, or " if kind is Policy else ""
        raise GeometryError(f"a cache takes {also}a list with a {kind.__name__} for each layer, got {given!r}")
    return list(given)


def rows_of(keys: Any, values: Any, *, layer: int) -> int:
    """How many rows these tokens are of. Raises `GeometryError` for what is no tensor of four axes."""
    for name, given in (("keys", keys), ("values", values)):
        if not isinstance(given, Tensor) or given.dim() != 4:
            got = f"{tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise GeometryError(f"layer {layer} takes {name} [batch, kv_heads, tokens, width]; got {got}")
    return int(keys.shape[0])


def check_layer(policy: Policy, geometry: Geometry, rotary: Rotary | None, layer: int) -> None:
    """Raise unless `policy` can serve a layer of `geometry` that rotates as `rotary` does."""
    compressor = policy.compressor
    if policy.realigner.rotates and rotary is None:
        raise RotaryError(
            f"realigner {type(policy.realigner).__name__} rotates keys to their placed positions, but layer "
            f"{layer} has no rotary embedding; use a realigner that leaves positions alone"
        )
    for turns in (compressor, policy.retriever):
        if turns.needs_rotary and rotary is None:
            raise RotaryError(
                f"{type(turns).__name__} rotates keys or queries itself, but layer {layer} was given no Rotary; make a "
                "new cache under this policy, or pass rotaries= (of a model that does not: Rotary([torch.zeros(0)]))"
            )
    if rotary is not None and rotary.first + rotary.width > geometry.head_dim:
        raise RotaryError(
            f"the rotary embedding of layer {layer} turns {rotary.width} channels from {rotary.first} on, and its keys "
            f"have {geometry.head_dim}; give the Rotary and the Geometry of the same model"
        )
    if geometry.causal and compressor.given:
        raise SlotError(
            f"compressor {type(compressor).__name__} is given the compressed form of a block when it is committed, and "
            "text has none to give; choose a compressor of keys and values"
        )
    if not geometry.causal and geometry.even and 0 < (policy.recent or 0) < geometry.steps_per_commit:
        raise GeometryError(
            f"recent = {policy.recent} steps cannot hold one of the blocks of {geometry.steps_per_commit}; give a "
            "recent of at least a block, or 0"
        )
    counts: list[tuple[object, str, object]] = [(policy.retriever, "most", policy.retriever.most(policy.top_k))]
    if "compressed" in policy.forms:
        counts.append((compressor, "block_tokens", policy.block_tokens(geometry, "compressed")))
    if policy.retriever.needs_digests and policy.archives:
        tokens = policy.block_tokens(geometry, policy.retriever.digests)
        counts.append((policy.retriever, "digest_bytes", policy.retriever.digest_bytes(tokens, geometry)))
    for part, method, said in counts:
        if not isinstance(said, int) or said < 0:
            raise SlotError(f"{called(layer, part, method)} says {said!r}; due is a whole number of at least 0")
    policy.check_budget(geometry)


def admit(
    keys: Tensor, values: Tensor, policy: Policy, geometry: Geometry, *, layer: int, held: torch.device | None
) -> None:
    """Raise `GeometryError` unless a layer on device `held` (None: on none yet) can take these tokens."""
    want = (geometry.batch, geometry.kv_heads, geometry.head_dim, geometry.value_dim, geometry.dtype)
    got = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
    if got[:4] == want[:4] and not keys.dtype == values.dtype == geometry.dtype:
        raise GeometryError(
            f"layer {layer} holds {geometry.dtype}, got keys of {keys.dtype} and values of {values.dtype}; "
            "load the model in one dtype, and instead of torch.autocast in the dtype it would cast to"
        )
    if got != want or values.shape[:3] != keys.shape[:3] or values.dtype != keys.dtype:
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


def admit_query(query: object, geometry: Geometry, current: int, *, layer: int) -> None:
    """Raise `GeometryError` unless these may be queries of the `current` tokens."""
    due = (geometry.batch, geometry.query_heads, geometry.head_dim)
    right = isinstance(query, Tensor) and fits(query, (*due[:2], None, due[2])) and query.is_floating_point()
    if not isinstance(query, Tensor) or not right or not 0 < query.shape[2] <= (current or query.shape[2]):
        got = f"{tuple(query.shape)} {query.dtype}" if isinstance(query, Tensor) else f"a {type(query).__name__}"
        raise GeometryError(
            f"layer {layer} takes queries [batch, query_heads, tokens, head_dim] = ({due[0]}, {due[1]}, {current}, "
            f"{due[2]}) of the current tokens, of a floating dtype; got {got}"
        )


def given_forms(compressed: object, policies: Sequence[Policy]) -> Sequence[Blocks | None]:
    """The compressed form of the current block of each layer, of what was given to `commit` (None: none at all)."""
    if compressed is None:
        return [None] * len(policies)
    if not isinstance(compressed, Sequence) or isinstance(compressed, str) or len(compressed) != len(policies):
        many = f"{len(compressed)} entries" if isinstance(compressed, Sequence) else f"a {type(compressed).__name__}"
        raise GeometryError(f"compressed has {many}; due are {len(policies)}, one per layer")
    for layer, (form, policy) in enumerate(zip(compressed, policies, strict=True)):
        if form is not None and not (isinstance(form, Blocks) and policy.compressor.given):
            own = f"None, for {type(policy.compressor).__name__} makes it"
            due = "kvtiers.Blocks or None" if policy.compressor.given else own
            raise GeometryError(f"compressed[{layer}] is a {type(form).__name__}; due is {due}")
    return compressed


def check_returned(
    who: str, made: object, due: str, shape: Sizes, *, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Raise `SlotError` unless a policy returned a tensor of `shape` on `device`.

    due: the shape in words. dtype: None for any that floats. Waits for nothing.
    """
    if not isinstance(made, Tensor):
        raise SlotError(f"{who} returned a {type(made).__name__}; due is a tensor {due}")
    if not fits(made, shape):
        sizes = ", ".join("any" if n is None else str(max(n) if isinstance(n, tuple) else n) for n in shape)
        raise SlotError(f"{who} returned {tuple(made.shape)}; due is {due} = ({sizes})")
    if made.dtype != dtype and (dtype is not None or not made.is_floating_point()):
        raise SlotError(f"{who} returned {made.dtype}; due is {dtype or 'a floating dtype'}")
    if made.device != device:
        raise SlotError(f"{who} returned a tensor on {made.device}; due is {device}, as Moment.device says")


def check_placement(who: str, made: object, starts: Tensor) -> None:
    """Raise `SlotError` unless a realigner placed the blocks that begin at `starts`."""
    if not isinstance(made, Placement):
        raise SlotError(f"{who} returned a {type(made).__name__}; due is a Placement")
    for name in ("sink_shift", "recent_shift", "mid_from"):
        value = getattr(made, name)
        if not isinstance(value, int) and not (name == "mid_from" and value is None):
            raise SlotError(f"{who} gave {name} as a {type(value).__name__}; due is a whole number")
    due, shape = "mid_starts [..., chosen], as starts are,", tuple(starts.shape)
    check_returned(f"{who}, mid_starts,", made.mid_starts, due, shape, dtype=None, device=starts.device)


def check_encoded(who: str, parts: object, lead: tuple[int, ...]) -> None:
    """Raise `SlotError` unless a codec made named tensors of `lead` = (rows, kv_heads, blocks)."""
    if not isinstance(parts, Mapping) or not parts:
        raise SlotError(f"{who} returned a {type(parts).__name__}; due are tensors by name")
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.shape[:3] != lead:
            got = tuple(part.shape) if isinstance(part, Tensor) else f"a {type(part).__name__}"
            raise SlotError(f"{who} made {name!r} {got}; due is [batch, kv_heads, blocks, ...] = {lead} and more")


def check_decoded(
    who: str, made: object, lead: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys and values as a codec returned them; `SlotError` unless they are what is due."""
    if not isinstance(made, tuple) or len(made) != 2:
        raise SlotError(f"{who} returned a {type(made).__name__}; due are keys and values, a tuple of two tensors")
    for name, part, width in zip(("keys", "values"), made, widths, strict=True):
        due = f"[batch, kv_heads, chosen, tokens, width] of {name}"
        check_returned(who, part, due, (*lead, width), dtype=dtype, device=device)
    return made


def check_finite(keys: Tensor, values: Tensor, *, layer: int, step: int, per_step: int) -> None:
    """Raise `NotFiniteError` for NaN or infinity. Waits for the device."""
    if not bool(torch.isfinite(keys).all() & torch.isfinite(values).all()):
        raise NotFiniteError(
            f"layer {layer} was given keys or values with NaN or infinity at steps {step} to "
            f"{step + keys.shape[2] // per_step}; this layer "
            "stored nothing of them, the layers before it did: go on from a fork(), or reset() the cache"
        )
