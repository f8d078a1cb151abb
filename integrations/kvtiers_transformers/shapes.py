"""The shapes of language models, for `kvtiers plan`: from the configuration on the hub or in a folder."""

from contextlib import suppress
from typing import Any

import attrs
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvtiers import Geometry, KVTiersError
from kvtiers.planning import Shape
from kvtiers_transformers.decoders import geometries_of, tiers_of
from kvtiers_transformers.smollm2 import load_smollm2

_UNBUILT = (AttributeError, KeyError, RuntimeError, TypeError, ValueError, KVTiersError)
"""What is raised for a configuration of which no model can be made."""


def shape(model: str, *, tokens: int, dtype: Any, **_: Any) -> Shape | None:
    """The shape of `model` after `tokens` tokens; none if transformers knows no such configuration."""
    try:
        config = load_smollm2()[0].config if model == "smollm2" else AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return None
    config = config.get_text_config(decoder=True)
    return Shape(
        name=f"{model}, {tokens:,} tokens",
        layers=len(tiers_of(config)[0]),
        geometry=attrs.evolve(_geometry(config), dtype=dtype),
        steps=tokens,
        growth_steps=1000,
        growth_unit="1,000 tokens",
    )


def _geometry(config: Any) -> Geometry:
    """The largest of the tiered layers: as a model without weights shows it, or else as the configuration says."""
    for kind in (AutoModelForCausalLM, AutoModel):
        with (
            suppress(AttributeError, KeyError, RuntimeError, TypeError, ValueError, KVTiersError),
            torch.device("meta"),
        ):
            return max(geometries_of(kind.from_config(config)), key=lambda geometry: geometry.token_bytes)
    heads = config.num_attention_heads
    return Geometry(
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        query_heads=heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
