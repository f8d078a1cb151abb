"""`tiered(model, policy)`: serve an unmodified model from tiers, and restore it on every path."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

import kvtiers
from kvtiers import PaddingPattern, Policy, Rotary, RotaryError, TieredCache, UnsupportedModelError
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
from kvtiers_transformers.cache import Outline, TransformersCache
from kvtiers_transformers.counting import counts_on, unrotated_layers
from kvtiers_transformers.decoders import attentions_of, decoder_of, tiers_of
from kvtiers_transformers.geometries import device_of, geometry_of, shape_of
from kvtiers_transformers.outer import after_outer, around, before_outer, check_layer_mask, padding_mask
from kvtiers_transformers.rope import check_turn, rotary_of, unrotated
from kvtiers_transformers.tiered_layer import TieredLayer

_MASK, _TURN = "attention_mask", "position_embeddings"


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
    outer: "weakref.WeakSet[nn.Module]" = attrs.field(factory=weakref.WeakSet)
    """The models around the decoder that have a hook."""


_installed: "weakref.WeakKeyDictionary[nn.Module, _Installed]" = weakref.WeakKeyDictionary()
"""By decoder, so that a model and the decoder inside it are one."""
_installing = threading.Lock()
"""Held while hooks are installed or removed."""


def _cache_in(values: Any) -> TransformersCache | None:
    for value in values:
        if isinstance(value, TransformersCache):
            return value
    return None


def _before_model(decoder: nn.Module) -> Callable[..., None]:
    signature, outline = inspect.signature(decoder.forward), _outline(decoder)
    original = weakref.ref(decoder)
    config: Any = decoder.config
    kinds, _ = get_layer_types_and_kwargs(config)
    tiered, known = {kinds[i] for i in outline.tiers}, list[bool]()

    def counting() -> bool:
        model = original()
        known[:] = known or [model is None or counts_on(model)]
        return known[0]

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
        rows, columns = inputs.shape[:2]
        check_model(outline, cache)
        cache.check_whole()
        check_dtype(module, cache, inputs.device)
        check_wishes(given, module.config)
        mask = padding_mask(given.get("attention_mask"), tiered, rows, columns)
        check_mask(cache, mask, rows, columns)
        cache.core.layers[0].check_batch(rows)
        if cache.rotates:
            positions = check_positions(given.get("position_ids"), mask, cache, rows, columns)
            if given.get("position_ids") is None and not counting():
                raise UnsupportedModelError(
                    f"{type(module).__name__} counts every forward from position 0 unless it is given position_ids, "
                    "and a realigner counts on; give position_ids, or use realigner='original', which keeps the model's"
                )
            if positions is not None:
                forward.turns = partial(check_turn, module, positions=positions)
        cache.check_decoded()
        padding = None if mask is None else _padding(mask[:, -columns:].bool(), cache)
        cache.start(rows * columns if padding is None else padding.tokens)
        if mask is None or mask.shape[1] == cache.get_seq_length() + columns:  # as the model takes it
            forward.looks = partial(check_layer_mask, known=mask, rows=rows, columns=columns)
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
    attentions = attentions_of(decoder)
    tiers, own = tiers_of(config)
    shapes = [shape_of(geometry_of(decoder, attentions[i])) for i in tiers if i in attentions]
    return Outline(
        family=str(config.model_type),
        layers=len(tiers) + len(own),
        tiers=tiers,
        shapes=shapes,
        rope=str(getattr(config, "rope_parameters", None)),
    )


def _before_attention(attention: nn.Module) -> Callable[..., Any]:
    names = list(inspect.signature(type(attention).forward).parameters)[1:]
    of_mask, of_turn = (names.index(name) if name in names else len(names) for name in (_MASK, _TURN))
    original, config = weakref.ref(attention), cast(Any, attention).config
    kinds, _ = get_layer_types_and_kwargs(config)

    @uncompiled
    def kvtiers_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = running.get()
        if module is not original() or forward is None or not isinstance(forward.cache, TransformersCache):
            return None  # a copy of the model has copies of the hooks
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
        own = args[of_mask] if of_mask < len(args) else kwargs.get(_MASK)
        turn = args[of_turn] if of_turn < len(args) else kwargs.get(_TURN)
        if forward.looks is not None and (forward.looked is None or forward.looked[0] is not own):
            forward.looks(module, own)
            forward.looked = (own,)
        kwargs = {**kwargs, "kvtiers": layer.layer}
        if not cache.rotates:
            return args, kwargs
        if turn is None:
            rotary = cache.core.rotaries[cache.core.numbers.index(number)]
            if rotary is not None and rotary.width:
                raise UnsupportedModelError(
                    f"layer {number} is not rotated by its model, although {type(module).__name__} can rotate; use "
                    "realigner='original', which keeps the model's own rotation"
                )
        else:
            if forward.identity is None or forward.identity[0] is not turn:
                forward.identity = turn, unrotated(turn)
                if forward.turns is not None:
                    forward.turns(kinds[number], turn)
            if _TURN in kwargs:
                kwargs[_TURN] = forward.identity[1]
            else:
                args = tuple(forward.identity[1] if value is turn else value for value in args)
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
    decoder = decoder_of(model)
    with _installing:
        if decoder in _installed:
            _installed[decoder].count += 1
        else:
            _installed[decoder] = _install(decoder)
        state = _installed[decoder]
        for outer in around(model, decoder):
            if outer not in state.outer:
                state.outer.add(outer)
                state.handles.append(outer.register_forward_pre_hook(before_outer(outer), with_kwargs=True))
                state.handles.append(outer.register_forward_hook(after_outer, always_call=True))


def _install(decoder: nn.Module) -> _Installed:
    attentions, (tiers, _) = attentions_of(decoder), tiers_of(decoder.config)
    served: list[Any] = [module for number, module in attentions.items() if number in tiers]
    handles: list[Any] = []
    try:
        handles.append(decoder.register_forward_pre_hook(_before_model(decoder), with_kwargs=True))
        handles.append(decoder.register_forward_hook(_after_model(decoder), always_call=True))
        handles += [m.register_forward_pre_hook(_before_attention(m), with_kwargs=True) for m in served]
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
    decoder = decoder_of(model)
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
    decoder = decoder_of(model)
    _end(decoder)
    attentions = attentions_of(decoder)
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
    asks = rotates or any(one.compressor.needs_rotary or one.retriever.needs_rotary for one in policies)
    try:
        rotaries = [rotary_of(decoder, attentions[i], kinds[i], frozen=freeze_rope) if asks else None for i in tiers]
    except RotaryError as error:
        if rotates:
            raise
        said = str(error).partition("; use realigner")[0]
        raise RotaryError(
            f"this policy's compressor or retriever rotates keys itself, and {said}; choose others, or "
            "freeze_rope=True where the frequencies change with length"
        ) from error
    still = unrotated_layers(decoder) if asks else set[int]()
    if asks and not rotates:
        still |= {i for i, one in zip(tiers, rotaries, strict=True) if one is None}  # nothing to turn
    rotaries = [Rotary([torch.zeros(0)]) if i in still else one for i, one in zip(tiers, rotaries, strict=True)]
    core = TieredCache(
        policies,
        [attrs.evolve(geometry_of(decoder, attentions[i]), dtype=model.dtype) for i in tiers],
        rotaries=rotaries,
        numbers=tiers,
        check=check,
    )
    return TransformersCache(core, own, _outline(decoder), device_of(model))


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
