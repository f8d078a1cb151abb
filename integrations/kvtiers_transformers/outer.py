"""Models around a decoder, which make its masks: what those masks say of padding, or why they cannot be served."""

import inspect
import weakref
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from kvtiers import UnsupportedModelError

_given: ContextVar[tuple[Any] | None] = ContextVar("kvtiers_given_mask", default=None)
"""The attention_mask that the model around the decoder was given, in a tuple; None if there is none around it."""


def around(model: nn.Module, decoder: nn.Module) -> Iterator[nn.Module]:
    """The modules from `model` down to `decoder` (left out) that take an attention_mask and may make another of it."""
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    parts = name.split(".") if name else []
    for depth in range(len(parts)):
        module = model.get_submodule(".".join(parts[:depth]))
        other = getattr(module, "config", None) is not getattr(decoder, "config", None)
        if other and "attention_mask" in inspect.signature(module.forward).parameters:
            yield module


def before_outer(model: nn.Module) -> Callable[..., None]:
    """A hook that remembers the attention_mask that `model` is given."""
    original, position = weakref.ref(model), list(inspect.signature(model.forward).parameters).index("attention_mask")

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is original():  # and no copy of it
            mask = args[position] if len(args) > position else kwargs.get("attention_mask")
            _given.set(None if isinstance(mask, dict) else (mask,))  # a dictionary of masks is the user's own

    undisturbed: Callable[..., None] = torch.compiler.disable(hook)
    return undisturbed


def _forget(*_: Any) -> None:
    _given.set(None)


after_outer: Callable[..., None] = torch.compiler.disable(_forget)
"""A hook that forgets what `before_outer` remembered, however the forward of the outer model ended."""


def padding_mask(made: Any, kinds: Collection[str], rows: int, columns: int) -> Any:
    """The padding mask, [batch, tokens], of a forward whose decoder was handed the mask `made`; None if there is none.

    kinds: the types of the tiered layers. A mask that was made outside the decoder, of shape
    [batch, 1, columns, columns] or one for each type of layer, must be causal but for padding.
    """
    given = _given.get()
    _given.set(None)
    if given is None or (isinstance(made, Tensor) and made.dim() == 2):
        return made  # nothing was made of it
    mask = given[0]
    known: Tensor | None = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    for one in [made.get(kind) for kind in kinds] if isinstance(made, dict) else [made]:
        check_made(one, known, rows, columns)
    return mask


def check_made(mask: Any, known: Tensor | None, rows: int, columns: int) -> None:
    """Refuse a mask for new tokens, [rows, 1, columns, columns], unless it is causal but for padding.

    known: the padding mask that the model was given, [rows or 1, tokens].
    """
    if mask is None or (columns == 1 and _on_gpu(mask)):
        return  # while decoding on a GPU nobody waits for a mask
    dense: Tensor = mask if isinstance(mask, Tensor) else _dense(mask, rows, columns)
    if dense.dim() == 2:
        return
    if dense.dim() != 4 or dense.shape[-2:] != (columns, columns):
        raise UnsupportedModelError(_refusal(f"is of shape {tuple(dense.shape)} for {columns} new tokens"))
    numbers = dense.dtype != torch.bool
    allowed = dense > torch.finfo(dense.dtype).min / 2 if numbers else dense
    if numbers and bool((allowed & (dense != 0)).any()):
        raise UnsupportedModelError(_refusal("adds numbers to the logits of tokens that are seen"))
    valid = torch.ones(rows, columns, dtype=torch.bool, device=dense.device)
    if known is not None:
        valid = valid & known[:, -columns:].to(dense.device).bool()
    due = valid[:, None, None, :] & torch.ones(columns, columns, dtype=torch.bool, device=dense.device).tril()
    if bool(((allowed != due) & valid[:, None, :, None]).any()):
        raise UnsupportedModelError(
            _refusal(
                "is not causal but for padding: tokens see later ones, as those of an image do, or not all earlier"
            )
        )


def check_layer_mask(attention: nn.Module, mask: Any, known: Tensor | None, rows: int, columns: int) -> None:
    """Refuse the mask that an attention is handed for its own new tokens unless it is causal but for padding.

    known: as for `check_made`. None for a mask means causal, if the attention is.
    """
    if columns == 1:
        return
    if mask is None and not getattr(attention, "is_causal", True):
        raise UnsupportedModelError(
            f"{type(attention).__name__} lets tokens see later ones where it is handed no mask, and tiers serve the "
            "causal order; load the model with attn_implementation='eager', which makes a mask, or use the model's own "
            "cache"
        )
    if not isinstance(mask, Tensor) or mask.shape[-2:] == (columns, columns):
        check_made(mask, known, rows, columns)


def _on_gpu(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.device.type != "cpu"


def _dense(mask: Any, rows: int, columns: int) -> Tensor:
    """A mask of flex attention as [rows, 1, columns, columns]."""
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(mask, BlockMask):
        raise UnsupportedModelError(_refusal(f"is a {type(mask).__name__}"))
    return create_mask(mask.mask_mod, rows, 1, columns, columns, device=str(mask.kv_num_blocks.device))


def _refusal(what: str) -> str:
    return (
        f"the mask that the model made {what}. Tiers serve the causal order with padding alone; "
        "give a prompt of text, or use the model's own cache for this one"
    )
