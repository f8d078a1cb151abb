"""The shapes of language models, for `kvtiers plan`: from the configuration on the hub or in a folder."""

from typing import Any

from transformers import AutoConfig

from kvtiers import Geometry
from kvtiers.planning import Shape
from kvtiers_transformers.smollm2 import load_smollm2
from kvtiers_transformers.wrap import tiers_of


def shape(model: str, *, tokens: int, dtype: Any, **_: Any) -> Shape | None:
    """The shape of `model` after `tokens` tokens; none if transformers knows no such configuration."""
    try:
        config = load_smollm2()[0].config if model == "smollm2" else AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return None
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return Shape(
        name=f"{model}, {tokens:,} tokens",
        layers=len(tiers_of(config)[0]),
        geometry=Geometry(
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            query_heads=heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=dtype,
        ),
        steps=tokens,
        growth_steps=1000,
        growth_unit="1,000 tokens",
    )
