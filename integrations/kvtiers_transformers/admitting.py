"""What a forward through a tiered cache is refused for, before any layer takes its tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvtiers import GeometryError, UnsupportedModelError
from kvtiers_transformers.cache import Outline, TransformersCache


def check_model(wanted: Outline, cache: TransformersCache) -> None:
    """Refuse a cache that was made for another kind of model."""
    if cache.outline != wanted:
        raise GeometryError(
            f"this cache was made for another model, with {cache.outline}; this one has {wanted}; "
            "make a cache with new_cache(model, ...)"
        )


def check_encoder(model: nn.Module) -> None:
    """Refuse a model whose decoder also attends to an encoder: both attentions would use one cache."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder, and its layers attend twice, to themselves and to it; "
            "kvtiers serves decoders alone, such as Llama, Qwen, Gemma, Phi, GPT-NeoX, OLMo or GLM"
        )


def check_kind(model: nn.Module, kinds: Sequence[str], tiers: Sequence[int]) -> None:
    """Refuse a model of which every layer keeps a cache of its own. kinds: what the layers are."""
    if tiers:
        return
    if any("sliding" in kind or "chunked" in kind for kind in kinds):
        advice = "set config.sliding_window to None if the model allows it"
    else:
        advice = "what they remember is a state of fixed size, alone or beside keys; no setting changes that"
    raise UnsupportedModelError(
        f"every layer of {type(model).__name__} is a {', '.join(sorted(set(kinds)))} layer and keeps its own "
        f"cache, so there is nothing to tier; {advice}"
    )


def check_wishes(given: Mapping[str, Any], config: Any) -> None:
    """Refuse what a forward is asked for and tiers cannot give. given: its arguments by name."""
    wish = given.get("output_attentions")
    if wish or (wish is None and getattr(config, "output_attentions", False)):
        raise UnsupportedModelError(
            "output_attentions=True asks for attention over every token, and a tiered layer attends a part of them "
            "in an order of its own; leave it out, or read the attention without a tiered cache"
        )
    if given.get("encoder_hidden_states") is not None:
        raise UnsupportedModelError(
            "encoder_hidden_states were given, and cross-attention would use the same cache as self-attention; "
            "kvtiers serves decoders alone"
        )


def check_dtype(decoder: nn.Module, cache: TransformersCache, device: torch.device) -> None:
    """Refuse what would give keys of another dtype, before any layer takes them."""
    held = {geometry.dtype for geometry in cache.core.geometries}
    made = next((p.dtype for p in decoder.parameters() if p.is_floating_point()), next(iter(held)))
    if held != {made} or torch.is_autocast_enabled(device.type):
        now = f"{made}, under torch.autocast" if torch.is_autocast_enabled(device.type) else str(made)
        raise GeometryError(
            f"this cache holds {', '.join(map(str, held))}, and the model computes in {now}; make a cache for the "
            "model as it is, and instead of torch.autocast load it in the dtype that would be cast to"
        )


def check_mask(cache: TransformersCache, mask: Any, rows: int, columns: int) -> None:
    """Refuse a mask that is not one of padding, or that hides what the cache already holds."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        more = "" if isinstance(mask, Tensor) else "; if a model around the decoder made it, give tiered() that model"
        raise UnsupportedModelError(
            f"a tiered cache takes a padding mask of shape [batch, tokens], got {type(mask).__name__} of shape "
            f"{tuple(getattr(mask, 'shape', ()))}; a custom 4D mask names slots that a tiered context does not have"
            f"{more}"
        )
    past, length = mask.shape[1] - columns, cache.get_seq_length()
    if mask.shape[0] != rows or past not in (0, length):
        raise UnsupportedModelError(
            f"attention_mask is {tuple(mask.shape)} for {rows} rows of {columns} tokens after {length}; "
            f"give one of {(rows, length + columns)}, or of {(rows, columns)} for these tokens alone. If the forward "
            "before failed behind the layers (in the head), its tokens are taken: crop() the cache before you feed "
            "them again"
        )
    if past == 0 or (columns == 1 and mask.device.type != "cpu"):
        return  # while decoding on a GPU nobody waits for a mask
    seen = mask[:, :past].bool().sum(1).tolist()
    held = cache.core.layers[0].num_steps_by_row()
    if held and seen != held:
        raise UnsupportedModelError(
            f"attention_mask says that the rows hold {seen} tokens of the past, but the cache holds {held}: padding is "
            "told apart when it is seen, so give every forward the mask of its own tokens, and never hide them later"
        )


def check_positions(
    positions: Tensor | None, mask: Tensor | None, cache: TransformersCache, rows: int, columns: int
) -> Tensor | None:
    """Refuse positions that a realigner would silently replace: those with jumps, within this forward or before it.

    positions: [batch, columns], or [axes, batch, columns] (None: those that the model makes, one per column).
    Returns them as [batch or 1, columns], or None if nothing was looked at.
    """
    if isinstance(positions, Tensor) and columns == 1 and positions.device.type != "cpu":
        return None  # while decoding on a GPU nobody waits for positions
    given = positions if isinstance(positions, Tensor) else None
    made = cache.get_seq_length() + torch.arange(columns, device=None if given is None else given.device)[None]
    positions = made if given is None else _one_axis(given)
    if cache.get_seq_length() == 0:
        cache.position_shift = None
    shift = int(positions[0, 0] - made[0, 0])
    if bool((positions - made == shift).all()):  # one per column, which a model may count from 1
        if cache.get_seq_length() == 0:
            cache.position_shift = shift
        if cache.position_shift == shift:
            return positions
    valid = torch.ones_like(positions, dtype=torch.bool)
    if mask is not None:
        valid = valid & mask[:, -columns:].bool()
    jumps = (positions.diff(dim=-1) != 1) & valid[:, 1:] & valid[:, :-1]
    if bool(jumps.any()):
        raise UnsupportedModelError(
            "position_ids jump within this forward, and a realigner gives tokens positions of its own; "
            "use realigner='original', which keeps the model's"
        )
    held = cache.core.layers[0].num_steps_by_row() or [0] * rows
    first = valid.int().argmax(-1, keepdim=True)
    begins = positions.expand(rows, -1).gather(1, first.expand(rows, -1))[:, 0].tolist()
    for row, (begin, steps) in enumerate(zip(begins, held, strict=True)):
        if begin != steps and bool(valid.expand(rows, -1)[row].any()):
            raise UnsupportedModelError(
                f"position_ids of row {row} begin at {begin}, but the cache holds {steps} tokens of it, and a realigner"
                " gives tokens positions of its own. To go on, feed only the new tokens; to try again from an earlier "
                "point, crop() the cache to it or go on from a fork(); or use realigner='original', which keeps the "
                "model's positions"
            )
    return positions


def _one_axis(positions: Tensor) -> Tensor:
    """Positions [batch, columns] of tokens that lie at one position on every axis; others are refused."""
    if positions.dim() != 3:
        return positions[None] if positions.dim() == 1 else positions
    axes = positions[1:] if positions.shape[0] == 4 else positions  # the first may be those of text, for packing
    if bool((axes != axes[:1]).any()):
        raise UnsupportedModelError(
            "the tokens of this forward lie at positions that differ by axis (time, height, width), as those of an "
            "image do, and a realigner knows one axis, that of text; use realigner='original', which keeps the "
            "model's positions"
        )
    return axes[0]
