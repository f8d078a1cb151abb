"""Attention over a tiered context, by the backend that the model already uses (eager, SDPA, flex, flash)."""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvtiers import Context, LayerRows, PaddingPattern, UnsupportedModelError

NAME = "kvtiers"
_FLEX_BLOCK = 128


@attrs.define(eq=False)
class Forward:
    """A forward of an enabled model that was given a tiered cache."""

    backend: str
    """The model's own attention implementation."""
    padding: PaddingPattern | None
    cache: object
    identity: tuple[Tensor, Tensor] | None = None
    """A rotation that does nothing, made once per forward."""


running: ContextVar[Forward | None] = ContextVar("kvtiers_forward", default=None)
own_backend: dict[int, str] = {}
"""The own attention implementation of the configurations that are turned to kvtiers' now, by their id."""


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


def _allowed(context: Context, query: Tensor) -> Tensor | None:
    """What each current token may see, [queries, tokens], or none if everything."""
    if context.mask is not None or not context.causal:
        return context.mask
    return torch.ones(context.current, context.current, dtype=torch.bool, device=query.device).tril()


def _additive(context: Context, query: Tensor) -> Tensor | None:
    """The mask as numbers to add to the scores, [batch, 1, queries, tokens]."""
    allowed = _allowed(context, query)
    if allowed is None:
        return None
    lowest = torch.finfo(query.dtype).min
    numbers = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill(~allowed, lowest)
    return numbers.expand(query.shape[0], 1, -1, -1)


def _block_mask(context: Context, query: Tensor) -> Any:
    """The mask as flex attention takes it. Its kernels look beyond the edge, so the mask goes on to whole blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    allowed = _allowed(context, query)
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
    if backend == "sdpa":
        return None if context.mask is None else context.mask.expand(query.shape[0], 1, -1, -1)
    if backend == "eager":
        return _additive(context, query)
    if backend == "flex_attention":
        return _block_mask(context, query)
    if "flash" in backend and not context.banded:
        return None  # its causal order counts from the end of the keys, which is where the current tokens are
    raise UnsupportedModelError(
        f"attention {backend!r} cannot attend this context; load the model with attn_implementation='sdpa', "
        "'eager' or 'flex_attention'"
    )


def tiered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    kvtiers: LayerRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend through a layer's tiers. query, key, value: [batch, heads, tokens, head_dim]; returns
    [batch, tokens, heads, head_dim]. A layer that is not tiered gets the model's own attention and mask."""
    forward = running.get()
    if forward is None:
        raise UnsupportedModelError("attention 'kvtiers' was called outside an enabled model; use kvtiers' tiered(...)")
    attend = _own_attention(module, forward.backend)
    if kvtiers is None:
        result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **kwargs)
        return result
    out: Tensor | None = None
    for chunk in kvtiers.chunks(query, key, value, forward.padding):
        context = chunk.context
        mask = _mask_for(forward.backend, context, chunk.query)
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


def tiered_mask(**kwargs: Any) -> Any:
    """The mask of the layers that stay the model's own; tiered layers own theirs, so theirs is never made."""
    forward = running.get()
    if forward is not None:
        return None if kwargs.get("local_size") is None else ALL_MASK_ATTENTION_FUNCTIONS[forward.backend](**kwargs)
    backend = own_backend.get(id(kwargs.get("config")))
    if backend is None:
        raise UnsupportedModelError("mask 'kvtiers' was asked for outside an enabled model; use kvtiers' tiered(...)")
    return ALL_MASK_ATTENTION_FUNCTIONS[backend](**kwargs)  # another thread is in a forward of this model


AttentionInterface.register(NAME, tiered_attention)
AttentionMaskInterface.register(NAME, tiered_mask)
