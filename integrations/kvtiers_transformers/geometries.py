"""The shape of what each layer of a model stores."""

from typing import Any

import attrs
import torch
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs

from kvtiers import Geometry
from kvtiers_transformers.rope import shown


def geometry_of(decoder: nn.Module, attention: nn.Module) -> Geometry:
    """What a layer of this attention stores, in float32: as its forward shows it, or else as the configuration says."""
    config: Any = decoder.config
    number: Any = attention.layer_idx
    found = shown(decoder, attention, get_layer_types_and_kwargs(config)[0][number])
    if found is not None:
        return attrs.evolve(found.geometry(), known_positions=known_positions(config))
    heads = config.num_attention_heads
    width: Any = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Geometry(
        kv_heads=kv_heads,
        query_heads=heads,
        head_dim=int(width or config.hidden_size // heads),
        known_positions=known_positions(config),
    )


def known_positions(config: Any) -> int | None:
    """How many positions a model was made for, as its configuration says; None if it does not say."""
    known = getattr(config, "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None


def shape_of(geometry: Geometry) -> tuple[int, int, int, int]:
    """(query_heads, kv_heads, head_dim, value_dim)."""
    return geometry.query_heads, geometry.kv_heads, geometry.head_dim, geometry.value_dim


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes. Weights that were offloaded say `meta`; buffers, as a rule, were not."""
    held = (part.device for part in (*model.parameters(), *model.buffers()))
    return next((device for device in held if device.type != "meta"), torch.device("cpu"))
