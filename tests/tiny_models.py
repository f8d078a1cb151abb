"""Tiny transformers models with random weights, sharp enough that a token more or less shows, and the masked oracle."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvtiers_transformers.versions import CACHE

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 12}
_MIXED: dict[str, Any] = {
    **_GROUPED,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 12,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", {**_COMMON, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", _GROUPED),
    "gemma2": ("Gemma2", _MIXED),
    "gemma3": ("Gemma3Text", _MIXED),
    "phi3": ("Phi3", {**_COMMON, "num_key_value_heads": 2, "sliding_window": None}),
    "gpt-neox": ("GPTNeoX", _COMMON),
    "olmo2": ("Olmo2", {**_COMMON, "num_key_value_heads": 2}),
    "glm": ("Glm", {**_GROUPED, "attention_bias": True}),
    "gpt2": ("GPT2", {k: v for k, v in _COMMON.items() if k != "intermediate_size"}),
}
"""Every family that is tested, by name: the prefix of its transformers classes, and its settings."""


def build(family: str = "llama", *, attention: str = "eager", seed: int = 0, **changes: Any) -> Any:
    """A model of `family` in evaluation mode, the same one every time. attention: its attention implementation."""
    prefix, settings = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **changes})
    torch.manual_seed(seed)
    name = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}.get(prefix, f"{prefix}ForCausalLM")
    config._attn_implementation = attention
    return getattr(transformers, name)(config).eval()


def tokens(count: int, *, rows: int = 1, seed: int = 7) -> Tensor:
    """Random token ids, [rows, count], none of them the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, count), generator=generator)


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One batch of rows of different length, [rows, columns], padded on the left, and its mask."""
    width = max(row.numel() for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - row.numel()), row.flatten()]) for row in rows])
    return ids, (ids != 0).long()


@torch.no_grad()
def feed(model: PreTrainedModel, ids: Tensor, cache: Any, splits: Sequence[int], **options: Any) -> Tensor:
    """The logits of all of `ids`, read in forwards that end at `splits` (and at the end)."""
    parts, start = [], 0
    for stop in (*splits, ids.shape[1]):
        if stop > start:
            parts.append(model(ids[:, start:stop], **given(cache), **options).logits)
            start = stop
    return torch.cat(parts, 1)


def given(cache: Any) -> dict[str, Any]:
    """The argument that gives `cache` to a model or to `generate`, as the installed transformers calls it."""
    return {CACHE: cache}


def plain(model: PreTrainedModel, ids: Tensor, splits: Sequence[int] = (), **options: Any) -> Tensor:
    """The logits that the model gives with its own cache."""
    return feed(model, ids, DynamicCache(config=model.config), splits, **options)


Masks = Mapping[int, Tensor] | Tensor


@torch.no_grad()
def masked(model: Any, ids: Tensor, masks: Masks, **options: Any) -> Tensor:
    """The logits of a model without any cache whose attention sees exactly what `masks` allow.

    masks: [rows, 1 or query_heads, tokens, tokens], true where a token (second to last axis) may see another; one for
    all layers, or one per layer. The model must use eager attention.
    """

    def hook(layer: int) -> Callable[..., Any]:
        mask = masks if isinstance(masks, Tensor) else masks[layer]
        numbers = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)

        def replace(module: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "attention_mask": numbers}

        return replace

    with ExitStack() as undo:
        for module in attentions(model):
            handle = module.register_forward_pre_hook(hook(module.layer_idx), with_kwargs=True)
            undo.callback(handle.remove)
        logits: Tensor = model(ids, use_cache=False, **options).logits
    return logits


def attentions(model: Any) -> list[Any]:
    """The self-attention modules of `model`, in order."""
    names = ("self_attn", "attention", "attn", "self_attention")
    return [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in names and isinstance(m.layer_idx, int)]


def drop_mask(count: int, *, sink: int, recent: int, block: int) -> Tensor:
    """What a policy that only drops lets every token see, [tokens, tokens]: a block goes once it ended `recent` ago."""
    now, past = torch.arange(count)[:, None], torch.arange(count)[None]
    end = sink + ((past - sink) // block + 1) * block
    return (past <= now) & ((past < sink) | (end > now - recent))


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest number in `b`."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
