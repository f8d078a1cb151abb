"""Which part of a model runs its layers, which are their self-attentions, and which layers can be tiered."""

import dis
import inspect
import sys
from typing import Any

import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvtiers import Geometry, UnsupportedModelError
from kvtiers_transformers.geometries import geometry_of

_NAMES = ("self_attn", "attention", "attn", "self_attention", "mixer")
"""What models call a layer's self-attention."""


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that makes masks and rotations and runs the layers."""
    for found in (getattr(model, "get_decoder", lambda: None)(), getattr(model, "base_model", None), model):
        if isinstance(found, nn.Module) and attentions_of(found):
            return _innermost(found)
    raise UnsupportedModelError(
        f"{type(model).__name__} of transformers {transformers.__version__} has no self-attention that transformers' "
        "attention interface serves; kvtiers needs a decoder such as Llama, Qwen, Gemma, Phi, GPT-NeoX, OLMo or GLM, "
        "or a newer transformers, which serves more"
    )


def _innermost(module: nn.Module) -> nn.Module:
    """The model inside `module` that has all its attentions: some models call themselves their decoder."""
    for child in module.children():
        if isinstance(child, PreTrainedModel) and len(attentions_of(child)) == len(attentions_of(module)):
            return _innermost(child)
    return module


def attentions_of(module: nn.Module) -> dict[int, nn.Module]:
    """The self-attention modules by layer number: those with a `layer_idx` whose forward passes keywords on."""
    found = {}
    for name, child in module.named_modules():
        index, last = getattr(child, "layer_idx", None), next((x for x in name.split(".")[::-1] if not x.isdigit()), "")
        if isinstance(index, int) and last in _NAMES:
            kinds = [p.kind for p in inspect.signature(child.forward).parameters.values()]
            if inspect.Parameter.VAR_KEYWORD in kinds and hasattr(child, "config") and _attends_once(child):
                found[index] = child
    return found


def _attends_once(module: nn.Module) -> bool:
    """Whether `module` calls transformers' attention interface, and does not call it twice with parts of its heads."""
    if not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return False
    code = inspect.unwrap(type(module).forward).__code__
    called = [i for i in dis.get_instructions(code) if i.argval == "attention_interface" and i.opname != "STORE_FAST"]
    return len(called) < 2


def tiers_of(config: Any) -> tuple[list[int], dict[int, Any]]:
    """The layers that are tiered, and those that stay transformers' own with an empty cache for each."""
    layers = DynamicCache(config=config).layers
    own = {i: layer for i, layer in enumerate(layers) if type(layer) is not DynamicLayer}
    return [i for i in range(len(layers)) if i not in own], own


def geometries_of(model: nn.Module) -> list[Geometry]:
    """What each layer that would be tiered stores, in float32. The model may be on the device `meta`."""
    decoder = decoder_of(model)
    attentions, (tiers, _) = attentions_of(decoder), tiers_of(decoder.config)
    return [geometry_of(decoder, attentions[i]) for i in tiers if i in attentions]
