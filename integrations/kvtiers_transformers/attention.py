"""Attention over a tiered context, by the backend that the model already uses (eager, SDPA, flex, flash)."""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvtiers import Context, LayerRows, PaddingPattern, UnsupportedModelError
from kvtiers_transformers import together

_Function = TypeVar("_Function", bound=Callable[..., Any])

NAME = "kvtiers"
_FLEX_BLOCK = 128
_WITH_MASKS_BY_ROW = ("eager", "sdpa")
"""The backends that take a mask of its own for each row."""


@attrs.define(eq=False)
class Forward:
    """A forward of an enabled model. cache: the tiered cache that it was given, or None.

    model: whose it is. outer: the forward that this one runs in, if any.
    """

    model: Callable[[], object]
    padding: PaddingPattern | None = None
    cache: object = None
    identity: tuple[Any, Any] | None = None
    """The model's position embeddings, and some like them that rotate nothing, made once per forward."""
    looks: Callable[[nn.Module, Any], None] | None = None
    """Refuses a mask that the model made for an attention, unless it says what the tiers assume."""
    looked: tuple[Any] | None = None
    """The mask that was looked at last, in a tuple."""
    turns: Callable[[str, Any], None] | None = None
    """Refuses position embeddings, of layers of a type, that are not those of the tokens that come next."""
    outer: "Forward | None" = None
    updated: set[object] = attrs.field(factory=set)
    """The layers that were given their new keys."""
    functions: dict[tuple[type, str], Callable[..., Any]] = attrs.field(factory=dict)
    """The model's own attention functions, found once per forward."""

    def own_attention(self, module: nn.Module, backend: str) -> Callable[..., Any]:
        """The attention function that the model would use by itself."""
        found = self.functions.get((type(module), backend))
        if found is None:
            found = self.functions[type(module), backend] = _own_attention(module, backend)
        return found


def uncompiled(function: _Function) -> _Function:
    """`function`, which torch.compile runs as it is; it compiles what lies between."""
    disable: Any = torch.compiler.disable  # has no types
    marked: _Function = disable(function)
    return marked


running: ContextVar[Forward | None] = ContextVar("kvtiers_forward", default=None)


def _own_attention(module: nn.Module, backend: str) -> Callable[..., Any]:
    """The attention function that the model would use by itself."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager)
    if function is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no attention function for {backend!r}; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    return function


def _block_mask(context: Context, query: Tensor) -> Any:
    """The mask as flex attention takes it. Its kernels look beyond the edge, so the mask goes on to whole blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    allowed = context.mask
    if allowed is None and context.causal:
        allowed = torch.ones(context.current, context.keys.shape[2], dtype=torch.bool, device=query.device).tril()
    if allowed is None:
        return None
    rows, columns = allowed.shape
    whole = functional.pad(allowed, (0, -columns % _FLEX_BLOCK, 0, -rows % _FLEX_BLOCK))
    return create_block_mask(
        lambda batch, head, row, column: whole[row, column],
        B=query.shape[0],
        H=None,
        Q_LEN=rows,
        KV_LEN=columns,
        device=query.device,
    )


def _mask_for(backend: str, context: Context, query: Tensor) -> Any:
    """What the backend adds to logits, or may look at: mask and bias of a context."""
    if backend == "eager" or (backend == "sdpa" and context.bias is not None):
        added = context.logit_bias(query.shape[1], query.dtype)
        if added is None:  # eager attention of transformers always gets a mask, and some of it takes that for granted
            return query.new_zeros(1).expand(query.shape[0], 1, query.shape[2], context.keys.shape[2])
        lowest = torch.finfo(query.dtype).min
        return added.clamp(min=lowest).expand(query.shape[0], -1, query.shape[2], -1)
    if backend == "sdpa":
        return None if context.mask is None else context.mask.expand(query.shape[0], 1, -1, -1)
    if backend == "flex_attention" and context.bias is None:
        return _block_mask(context, query)
    if "flash" in backend and not context.banded and context.bias is None:
        return None  # its causal order counts from the end of the keys, which is where the current tokens are
    raise UnsupportedModelError(
        f"attention {backend!r} cannot attend this context, of which tokens are hidden or weighed; load the model with "
        "attn_implementation='sdpa' or 'eager'"
    )


@uncompiled
def tiered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float | None = None,
    *,
    kvtiers: LayerRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend through a layer's tiers. query, key, value: [batch, heads, tokens, head_dim]; returns
    [batch, tokens, heads, head_dim]. A layer that is not tiered gets the model's own attention and mask.

    dropout: models name it; a library that wraps attention functions, as kvpress does, may give it by its place.
    """
    forward = running.get()
    if dropout is not None:
        kwargs["dropout"] = dropout
    config: Any = module.config
    backend: str = getattr(config, "own", config)._attn_implementation
    if backend == NAME:
        raise UnsupportedModelError("attention 'kvtiers' was called outside an enabled model; use kvtiers' tiered(...)")
    attend = _own_attention(module, backend) if forward is None else forward.own_attention(module, backend)
    if kvtiers is None or forward is None or forward.cache is None:
        result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **kwargs)
        return result
    out: Tensor | None = None
    chunks = together.chunks if backend in _WITH_MASKS_BY_ROW else LayerRows.chunks
    for chunk in chunks(kvtiers, query, key, value, forward.padding):
        context = chunk.context
        mask = _mask_for(backend, context, chunk.query)
        if mask is None and backend == "eager" and attention_mask is not None:
            mask = query.new_zeros(1, 1, 1, 1)  # some models add it without looking
        ordered = context.causal or "flash" in backend
        if mask is None and ordered and not getattr(module, "is_causal", True):
            kwargs["is_causal"] = True  # as its own mask says
        part = attend(module, chunk.query, context.keys, context.values, mask, **kwargs)[0]
        if chunk.rows is None and context.current == query.shape[2]:
            return part, None
        if out is None:
            out = part.new_zeros(query.shape[0], query.shape[2], *part.shape[2:])
        if chunk.rows is None:
            out[:, chunk.columns] = part
        elif isinstance(chunk.columns, slice):
            out[chunk.rows, chunk.columns] = part
        else:
            out[chunk.rows[:, None], chunk.columns[None]] = part
    if out is None:
        out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    return out, None


AttentionInterface.register(NAME, tiered_attention)
