"""`tiered(model, policy)`: serve an unmodified model from tiers, and restore it on every path."""

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
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, get_layer_types_and_kwargs

import kvtiers
from kvtiers import Geometry, GeometryError, PaddingPattern, Policy, TieredCache, UnsupportedModelError
from kvtiers_transformers.attention import NAME, Forward, running
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
            served = hasattr(sys.modules[type(child).__module__], "ALL_ATTENTION_FUNCTIONS") and hasattr(
                child, "config"
            )
            if inspect.Parameter.VAR_KEYWORD in kinds and served:
                found[index] = child
    return found


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
        _check_model(outline, cache)
        _check_dtype(module, cache, inputs.device)
        _check_mask(cache, mask, rows, columns)
        cache.core.layers[0].check_batch(rows)
        if cache.rotates:
            _check_positions(given.get("position_ids"), mask, cache, rows)
        cache.check_decoded()
        padding = None if mask is None else _padding(mask[:, -columns:].bool(), cache)
        cache.start(rows * columns if padding is None else padding.tokens)
        forward.padding, forward.cache = padding, cache

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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

    return hook


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


def _check_model(wanted: Outline, cache: TransformersCache) -> None:
    """Refuse a cache that was made for another kind of model."""
    if cache.outline != wanted:
        raise GeometryError(
            f"this cache was made for another model, with {cache.outline}; this one has {wanted}; "
            "make a cache with new_cache(model, ...)"
        )


def _check_dtype(decoder: nn.Module, cache: TransformersCache, device: torch.device) -> None:
    """Refuse what would give keys of another dtype, before any layer takes them."""
    held = {geometry.dtype for geometry in cache.core.geometries}
    made = next(p.dtype for p in decoder.parameters() if p.is_floating_point())
    if held != {made} or torch.is_autocast_enabled(device.type):
        now = f"{made}, under torch.autocast" if torch.is_autocast_enabled(device.type) else str(made)
        raise GeometryError(
            f"this cache holds {', '.join(map(str, held))}, and the model computes in {now}; make a cache for the "
            "model as it is, and instead of torch.autocast load it in the dtype that would be cast to"
        )


def _check_mask(cache: TransformersCache, mask: Any, rows: int, columns: int) -> None:
    """Refuse a mask that is not one of padding, or that hides what the cache already holds."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedModelError(
            f"a tiered cache takes a padding mask of shape [batch, tokens], got {type(mask).__name__} of shape "
            f"{tuple(getattr(mask, 'shape', ()))}; a custom 4D mask names slots that a tiered context does not have"
        )
    past, length = mask.shape[1] - columns, cache.get_seq_length()
    if mask.shape[0] != rows or past not in (0, length):
        raise UnsupportedModelError(
            f"attention_mask is {tuple(mask.shape)} for {rows} rows of {columns} tokens after {length}; "
            f"give one of {(rows, length + columns)}, or of {(rows, columns)} for these tokens alone"
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


def _check_positions(positions: Any, mask: Tensor | None, cache: TransformersCache, rows: int) -> None:
    """Refuse positions that a realigner would silently replace: those with jumps, within this forward or before it."""
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return
    columns = positions.shape[-1]
    if columns == 1 and positions.device.type != "cpu":
        return  # while decoding on a GPU nobody waits for positions
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


def _before_attention() -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = running.get()
        if forward is None or not isinstance(forward.cache, TransformersCache):
            return None
        cache = forward.cache
        number: Any = module.layer_idx
        layer = cache.layers[number]
        if not isinstance(layer, TieredLayer):
            return None
        if kwargs.get("past_key_values") is not cache and _cache_in((*args, *kwargs.values())) is None:
            raise UnsupportedModelError(
                f"layer {number} was not given the cache that its model was given; gradient checkpointing does that "
                "while training: call model.eval() or model.activation_checkpointing_disable()"
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

    return hook


def _after_model(decoder: nn.Module) -> Callable[..., None]:
    original = weakref.ref(decoder)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not original():
            return
        forward = running.get()
        _end(module)
        if forward is not None and output is not None and isinstance(forward.cache, TransformersCache):
            forward.cache.finish()

    return hook


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
    decoder = _decoder(model)
    _end(decoder)
    attentions = _attentions(decoder)
    config: Any = decoder.config
    kinds, _ = get_layer_types_and_kwargs(config)
    tiers, own = tiers_of(config)
    if not tiers:
        raise UnsupportedModelError(
            f"every layer of {type(model).__name__} is a {', '.join(sorted(set(kinds)))} layer and keeps its own "
            "cache, so there is nothing to tier; set config.sliding_window to None if the model allows it"
        )
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
    """Serve `model` from tiers inside the `with` block; gives the cache to pass as `past_key_values`.

    Options as for `new_cache`. The model is restored when the block ends, however it ends.
    """
    cache = new_cache(model, policy, **options)
    enable(model)
    try:
        yield cache
    finally:
        disable(model)
