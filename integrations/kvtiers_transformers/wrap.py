"""`tiered(model, policy)`: serve an unmodified model from tiers, and restore it on every path."""

import dis
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, get_layer_types_and_kwargs

import kvtiers
from kvtiers import Geometry, PaddingPattern, Policy, TieredCache, UnsupportedModelError
from kvtiers_transformers.admitting import (
    check_dtype,
    check_encoder,
    check_kind,
    check_mask,
    check_model,
    check_positions,
    check_wishes,
)
from kvtiers_transformers.attention import NAME, Forward, running, uncompiled
from kvtiers_transformers.cache import Outline, TieredLayer, TransformersCache
from kvtiers_transformers.rope import rotary_of


class ServedConfig:
    """A model's configuration as one attention of an enabled model sees it: its attention goes through kvtiers'.

    Everything else is the configuration's own. That one is never changed, so nothing is to be put back after a forward,
    whatever ends it, and threads do not meet here.
    """

    def __init__(self, own: Any) -> None:
        self.own = own

    @property
    def _attn_implementation(self) -> str:
        return NAME

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # while it is copied
            raise AttributeError(name)
        return getattr(self.own, name)


@attrs.define(eq=False)
class _Installed:
    attentions: list[nn.Module]
    handles: list[Any]
    count: int = 1


_installed: "weakref.WeakKeyDictionary[nn.Module, _Installed]" = weakref.WeakKeyDictionary()
"""By decoder, so that a model and the decoder inside it are one."""
_installing = threading.Lock()
"""Held while hooks are installed or removed."""


def _decoder(model: nn.Module) -> nn.Module:
    """The module that makes masks and rotations and runs the layers."""
    for found in (getattr(model, "get_decoder", lambda: None)(), getattr(model, "base_model", None), model):
        if isinstance(found, nn.Module) and _attentions(found):
            return found
    raise UnsupportedModelError(
        f"{type(model).__name__} of transformers {transformers.__version__} has no self-attention that transformers' "
        "attention interface serves; kvtiers needs a decoder such as Llama, Qwen, Gemma, Phi, GPT-NeoX, OLMo or GLM, "
        "or a newer transformers, which serves more"
    )


def _attentions(module: nn.Module) -> dict[int, nn.Module]:
    """The self-attention modules by layer number: those with a `layer_idx` whose forward passes keywords on."""
    found = {}
    for name, child in module.named_modules():
        index = getattr(child, "layer_idx", None)
        if isinstance(index, int) and name.rsplit(".", 1)[-1] in ("self_attn", "attention", "attn", "self_attention"):
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


def _cache_in(values: Any) -> TransformersCache | None:
    return next((value for value in values if isinstance(value, TransformersCache)), None)


def _before_model(decoder: nn.Module) -> Callable[..., None]:
    signature, outline = inspect.signature(decoder.forward), _outline(decoder)
    original = weakref.ref(decoder)

    def admit(forward: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check what comes in; if there is a tiered cache, it serves this forward from here on."""
        cache = _cache_in((*args, *kwargs.values()))
        if cache is None:
            return
        given = signature.bind_partial(*args, **kwargs).arguments
        given = given | given.get("kwargs", {})
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if inputs is None:
            return  # the model has its own words for that
        mask = given.get("attention_mask")
        rows, columns = inputs.shape[:2]
        check_model(outline, cache)
        check_dtype(module, cache, inputs.device)
        check_wishes(given, module.config)
        check_mask(cache, mask, rows, columns)
        cache.core.layers[0].check_batch(rows)
        if cache.rotates:
            check_positions(given.get("position_ids"), mask, cache, rows)
        cache.check_decoded()
        padding = None if mask is None else _padding(mask[:, -columns:].bool(), cache)
        cache.start(rows * columns if padding is None else padding.tokens)
        forward.padding, forward.cache = padding, cache

    @uncompiled
    def kvtiers_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not original():
            return  # a copy of the model, with copies of the hooks
        _end(module)
        forward = Forward(model=original, outer=running.get())
        try:
            running.set(forward)
            admit(forward, module, args, kwargs)
        except BaseException:  # torch calls no hook after a forward that did not begin
            _end(module)
            raise

    return kvtiers_hook


def _end(decoder: nn.Module) -> None:
    """The forward of `decoder` that runs in this thread has ended, or Ctrl-C ended it before its hook was called."""
    forward = running.get()
    if forward is not None and forward.model() is decoder:
        running.set(forward.outer)


def _padding(valid: Tensor, cache: TransformersCache) -> PaddingPattern | None:
    """Which columns are real; None if all are. While decoding on a GPU nobody waits to know: it is looked at later."""
    if valid.shape[1] == 1 and valid.device.type != "cpu":
        cache.check_later(valid.all())
        return None
    return PaddingPattern.of(valid)


def _outline(decoder: nn.Module) -> Outline:
    """What a cache must be made like to serve `decoder`."""
    config: Any = decoder.config
    attentions = _attentions(decoder)
    tiers, own = tiers_of(config)
    shapes = [_shape(_geometry(config, attentions[i])) for i in tiers if i in attentions]
    return Outline(
        family=str(config.model_type),
        layers=len(tiers) + len(own),
        tiers=tiers,
        shapes=shapes,
        rope=str(getattr(config, "rope_parameters", None)),
    )


def _before_attention() -> Callable[..., Any]:
    @uncompiled
    def kvtiers_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = running.get()
        if forward is None or not isinstance(forward.cache, TransformersCache):
            return None
        cache = forward.cache
        number: Any = module.layer_idx
        layer = cache.layers[number]
        if not isinstance(layer, TieredLayer):
            return None
        if _cache_in((*args, *kwargs.values())) is not cache:
            raise UnsupportedModelError(
                f"layer {number} was not given the cache that its model was given; gradient checkpointing does that "
                "while training: call model.eval(), or turn checkpointing off"
            )
        kwargs = {**kwargs, "kvtiers": layer.layer}
        turn = kwargs.get("position_embeddings")
        if turn is not None and cache.rotates:
            cos = turn[0]
            still = forward.identity
            if still is None or still[0].shape != cos.shape or still[0].device != cos.device:
                still = forward.identity = (torch.ones_like(cos), torch.zeros_like(cos))
            kwargs["position_embeddings"] = still
        return args, kwargs

    return kvtiers_hook


def _after_model(decoder: nn.Module) -> Callable[..., None]:
    original = weakref.ref(decoder)

    @uncompiled
    def kvtiers_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not original():
            return
        forward = running.get()
        _end(module)
        if forward is not None and output is not None and isinstance(forward.cache, TransformersCache):
            forward.cache.finish()

    return kvtiers_hook


def enable(model: PreTrainedModel) -> None:
    """Install the hooks that let `model` use a tiered cache. Without one it behaves exactly as before."""
    decoder = _decoder(model)
    with _installing:
        if decoder in _installed:
            _installed[decoder].count += 1
        else:
            _installed[decoder] = _install(decoder)


def _install(decoder: nn.Module) -> _Installed:
    attentions, (tiers, _) = _attentions(decoder), tiers_of(decoder.config)
    served: list[Any] = [module for number, module in attentions.items() if number in tiers]
    handles: list[Any] = []
    try:
        handles.append(decoder.register_forward_pre_hook(_before_model(decoder), with_kwargs=True))
        handles.append(decoder.register_forward_hook(_after_model(decoder), always_call=True))
        handles += [m.register_forward_pre_hook(_before_attention(), with_kwargs=True) for m in served]
        for module in served:
            if not isinstance(module.config, ServedConfig):  # as in a copy of an enabled model
                module.config = ServedConfig(module.config)
    except BaseException:
        _remove(served, handles)
        raise
    return _Installed(served, handles)


def _remove(attentions: list[Any], handles: list[Any]) -> None:
    for module in attentions:
        if isinstance(module.config, ServedConfig):
            module.config = module.config.own
    for handle in handles:
        handle.remove()


def disable(model: PreTrainedModel) -> None:
    """Undo one `enable`. Harmless on a model that is not enabled."""
    decoder = _decoder(model)
    with _installing:
        state = _installed.get(decoder)
        if state is None:
            return
        state.count -= 1
        if state.count == 0:
            del _installed[decoder]
            _remove(state.attentions, state.handles)
    _end(decoder)


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
    check_encoder(model)
    decoder = _decoder(model)
    _end(decoder)
    attentions = _attentions(decoder)
    config: Any = decoder.config
    kinds, _ = get_layer_types_and_kwargs(config)
    tiers, own = tiers_of(config)
    check_kind(model, kinds, tiers)
    missing = [i for i in tiers if i not in attentions]
    if missing or bool(getattr(config, "num_kv_shared_layers", None)):
        which = missing or "that share keys and values"
        raise UnsupportedModelError(
            f"layers {which} of {type(model).__name__} cannot be served from tiers "
            "of their own; kvtiers needs one self-attention with its own keys and values per layer"
        )
    policies = kvtiers.resolve(policy, layers=tiers, **changes)
    rotates = policies[0].realigner.rotates
    rotaries = [rotary_of(decoder, attentions[i], kinds[i], frozen=freeze_rope) if rotates else None for i in tiers]
    core = TieredCache(
        policies,
        [attrs.evolve(_geometry(config, attentions[i]), dtype=model.dtype) for i in tiers],
        rotaries=rotaries,
        numbers=tiers,
        check=check,
    )
    return TransformersCache(core, own, _outline(decoder), model.device)


def tiers_of(config: Any) -> tuple[list[int], dict[int, Any]]:
    """The layers that are tiered, and those that stay transformers' own with an empty cache for each."""
    layers = DynamicCache(config=config).layers
    own = {i: layer for i, layer in enumerate(layers) if type(layer) is not DynamicLayer}
    return [i for i in range(len(layers)) if i not in own], own


def _geometry(config: Any, attention: nn.Module) -> Geometry:
    heads = config.num_attention_heads
    width: Any = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Geometry(kv_heads=kv_heads, query_heads=heads, head_dim=int(width or config.hidden_size // heads))


def _shape(geometry: Geometry) -> tuple[int, int, int]:
    return geometry.query_heads, geometry.kv_heads, geometry.head_dim


@contextmanager
def tiered(model: PreTrainedModel, policy: str | Path | Policy, **options: Any) -> Iterator[TransformersCache]:
    """Serve `model` from tiers inside the `with` block; gives the cache to pass as `cache`.

    (Before transformers 5.24 the argument is called `past_key_values`.)

    Options as for `new_cache`. The model is restored when the block ends, however it ends.
    """
    cache = new_cache(model, policy, **options)
    enable(model)
    try:
        yield cache
    finally:
        disable(model)
