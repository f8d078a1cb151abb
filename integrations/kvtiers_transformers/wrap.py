"""`tiered(model, policy)`: serve an unmodified model from tiers, and restore it on every path."""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, get_layer_types_and_kwargs

import kvtiers
from kvtiers import Geometry, InterruptedForwardError, Policy, Ragged, TieredCache, UnsupportedModelError
from kvtiers_transformers.attention import NAME, Forward, running
from kvtiers_transformers.cache import TieredLayer, TransformersCache
from kvtiers_transformers.rope import rotary_of


@attrs.define(eq=False)
class _Installed:
    handles: list[Any]
    count: int = 1


_installed: "weakref.WeakKeyDictionary[nn.Module, _Installed]" = weakref.WeakKeyDictionary()


def _decoder(model: nn.Module) -> nn.Module:
    """The module that makes masks and rotations and runs the layers."""
    for found in (getattr(model, "get_decoder", lambda: None)(), getattr(model, "base_model", None), model):
        if isinstance(found, nn.Module) and _attentions(found):
            return found
    raise UnsupportedModelError(
        f"{type(model).__name__} has no self-attention that transformers' attention interface serves; "
        "kvtiers needs a decoder such as Llama, Qwen, Gemma, Phi, GPT-NeoX, OLMo or GLM"
    )


def _attentions(module: nn.Module) -> dict[int, nn.Module]:
    """The self-attention modules by layer number: those with a `layer_idx` whose forward passes keywords on."""
    found = {}
    for name, child in module.named_modules():
        index = getattr(child, "layer_idx", None)
        if isinstance(index, int) and name.rsplit(".", 1)[-1] in ("self_attn", "attention", "attn", "self_attention"):
            kinds = [p.kind for p in inspect.signature(child.forward).parameters.values()]
            if inspect.Parameter.VAR_KEYWORD in kinds:
                found[index] = child
    return found


def _cache_in(values: Any) -> TransformersCache | None:
    return next((value for value in values if isinstance(value, TransformersCache)), None)


def _before_model(decoder: nn.Module, configs: list[Any]) -> Callable[..., None]:
    signature = inspect.signature(decoder.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _cache_in((*args, *kwargs.values()))
        if cache is None:
            return
        given = signature.bind_partial(*args, **kwargs).arguments
        given = given | given.get("kwargs", {})
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given["inputs_embeds"]
        mask = given.get("attention_mask")
        _check_forward(cache, mask)
        ragged = None if mask is None else Ragged.of(mask[:, -inputs.shape[1] :].bool())
        backend = configs[0]._attn_implementation
        running.set(Forward(backend=backend, ragged=ragged, cache=cache))
        for config in configs:
            config._attn_implementation = NAME

    return hook


def _check_forward(cache: TransformersCache, mask: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise UnsupportedModelError(
            f"a tiered cache takes a padding mask of shape [batch, tokens], got {type(mask).__name__} of shape "
            f"{tuple(getattr(mask, 'shape', ()))}; a custom 4D mask names slots that a tiered context does not have"
        )
    columns = {layer.columns for layer in cache.tiered_layers}
    steps = {layer.layer.seen for layer in cache.tiered_layers}
    if len(columns) > 1 or len(steps) > 1:
        raise InterruptedForwardError(
            f"an earlier forward failed midway and left the layers at {sorted(columns)} columns and {sorted(steps)} "
            "steps; go on from a fork() made before it, or reset() the cache"
        )


def _after_model(configs: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, *_: Any) -> None:
        forward = running.get()
        if forward is not None:
            for config in configs:
                config._attn_implementation = forward.backend
            running.set(None)

    return hook


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    forward = running.get()
    cache = _cache_in((*args, *kwargs.values())) if forward is not None else None
    if forward is None or cache is None:
        return None
    layer = cache.layers[module.layer_idx]  # type: ignore[index]
    if not isinstance(layer, TieredLayer):
        return None
    kwargs = {**kwargs, "kvtiers": layer.layer}
    turn = kwargs.get("position_embeddings")
    if turn is not None and cache.rotates:
        cos = turn[0]
        if forward.identity is None or forward.identity[0].shape != cos.shape:
            forward.identity = (torch.ones_like(cos), torch.zeros_like(cos))
        kwargs["position_embeddings"] = forward.identity
    return args, kwargs


def enable(model: PreTrainedModel) -> None:
    """Install the hooks that let `model` use a tiered cache. Without one it behaves exactly as before."""
    if model in _installed:
        _installed[model].count += 1
        return
    decoder = _decoder(model)
    attentions = _attentions(decoder)
    configs = list({id(m.config): m.config for m in (decoder, *attentions.values())}.values())
    handles: list[Any] = []
    try:
        handles.append(decoder.register_forward_pre_hook(_before_model(decoder, configs), with_kwargs=True))
        handles.append(decoder.register_forward_hook(_after_model(configs), always_call=True))
        handles += [m.register_forward_pre_hook(_before_attention, with_kwargs=True) for m in attentions.values()]
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    _installed[model] = _Installed(handles)


def disable(model: PreTrainedModel) -> None:
    """Undo one `enable`. Harmless on a model that is not enabled."""
    state = _installed.get(model)
    if state is None:
        return
    state.count -= 1
    if state.count == 0:
        for handle in state.handles:
            handle.remove()
        del _installed[model]


def new_cache(
    model: PreTrainedModel,
    policy: str | Path | Policy,
    *,
    freeze_rope: bool = False,
    check: bool = False,
    **changes: Any,
) -> TransformersCache:
    """An empty tiered cache for `model`.

    policy: a preset's name, the path of a .toml file, or a `kvtiers.Policy`. changes: slots and settings to change;
    a setting may differ by layer (`recent={0: 1024, "*": 256}`, or a function of the layer's number).
    freeze_rope: keep the rotary frequencies the model has now, where they would change with length.
    check: refuse keys and values that are not finite.
    """
    decoder = _decoder(model)
    attentions = _attentions(decoder)
    config = decoder.config
    kinds, _ = get_layer_types_and_kwargs(config)
    theirs = DynamicCache(config=config).layers
    own = {i: layer for i, layer in enumerate(theirs) if type(layer) is not DynamicLayer}
    tiers = [i for i in range(len(theirs)) if i not in own]
    if not tiers:
        raise UnsupportedModelError(
            f"every layer of {type(model).__name__} is a {', '.join(sorted(set(kinds)))} layer and keeps its own cache, "
            "so there is nothing to tier; set config.sliding_window to None if the model allows it"
        )
    missing = [i for i in tiers if i not in attentions]
    if missing or getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"layers {missing or 'that share keys and values'} of {type(model).__name__} cannot be served from tiers "
            "of their own; kvtiers needs one self-attention with its own keys and values per layer"
        )
    policies = kvtiers.resolve(policy, layers=tiers, **changes)
    rotates = policies[0].realigner.rotates
    rotaries = [rotary_of(decoder, attentions[i], kinds[i], frozen=freeze_rope) if rotates else None for i in tiers]
    observe = kvtiers.observer()
    core = TieredCache(
        policies,
        [_geometry(config, attentions[i], model.dtype) for i in tiers],
        rotaries=rotaries,
        observe=observe,
        check=check,
    )
    return TransformersCache(core, own)


def _geometry(config: Any, attention: nn.Module, dtype: torch.dtype) -> Geometry:
    heads = config.num_attention_heads
    width = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Geometry(kv_heads=kv_heads, query_heads=heads, head_dim=int(width), dtype=dtype)


@contextmanager
def tiered(model: PreTrainedModel, policy: str | Path | Policy, **options: Any) -> Iterator[TransformersCache]:
    """Serve `model` from tiers inside the `with` block; gives the cache to pass as `past_key_values`.

    Options as for `new_cache`. The model is restored when the block ends, however it ends.
    """
    cache = new_cache(model, policy, **options)
    enable(model)
    try:
        yield cache
    finally:
        disable(model)
