"""How a transformers model rotates: read its frequencies, and find the rest (which channels, which pairs) by trying."""

import copy
import inspect
import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvtiers import Rotary, RotaryError, UnsupportedModelError
from kvtiers.rotary import Layout
from kvtiers_transformers.showing import Shown, show

_LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")
_POSITIONS = (0, 1, 7)
_UNKNOWN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a rotary module raises that is called in another way than ours."""


def rotary_of(decoder: nn.Module, attention: nn.Module, layer_type: str, *, frozen: bool) -> Rotary | None:
    """The rotary embedding of one layer, or none if the model has none.

    A layer that the model leaves unrotated, beside others that it rotates, gets a rotary embedding of no channels.
    frozen: take the frequencies as they are now, although the model would change them with length.
    Raises RotaryError if they change and are not frozen, or if no known layout reproduces the model's own rotation.
    """
    module = _rotary_module(decoder)
    if module is None:
        return None
    if _per_type(module) and layer_type not in module.rope_type:
        return Rotary([torch.zeros(0)])  # its model does not rotate it
    prefix = f"{layer_type}_" if _per_type(module) else ""
    kind = _kind(module, layer_type)
    frequencies = getattr(module, f"{prefix}inv_freq", None)
    if frequencies is None:
        return None
    if not frozen and _changes(kind):
        raise RotaryError(
            f"the rotary frequencies of this model change with length (rope_type={kind!r}), and keys that are rotated "
            "anew need one set; use realigner='original', or freeze_rope=True to keep the frequencies it has now"
        )
    scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    turn = _turn(module, layer_type)
    taken = "position_embeddings" in inspect.signature(type(attention).forward).parameters
    plain, turned = (show(attention, x, frequencies.device) if taken else None for x in (unrotated(turn), turn))
    if plain is None or turned is None:
        raise RotaryError(
            f"how {type(attention).__name__} rotates cannot be told, because it does not hand keys to transformers' "
            "attention interface when tried; use realigner='original', which keeps the model's own rotation"
        )
    if torch.equal(plain.key, turned.key) and torch.equal(plain.query, turned.query):
        return Rotary([frequencies.new_zeros(0, dtype=torch.float32)])
    positions = torch.tensor(_POSITIONS, dtype=torch.float64, device=frequencies.device)[:, None]
    rest = plain.key.shape[-1] - 2 * frequencies.numel()
    pairs = ((plain.key, turned.key), (plain.query, turned.query))
    for layout, first, sign in itertools.product(_LAYOUTS, sorted({0, rest}) if rest >= 0 else (), (1, -1)):
        rotary = Rotary([sign * frequencies.float()], layout=layout, scaling=scaling, first=first)
        if all(_agree(rotary, positions, *pair) for pair in pairs):
            return rotary
    raise RotaryError(
        f"{type(attention).__name__} rotates in a way that kvtiers does not know: neither {' nor '.join(_LAYOUTS)} "
        "pairs of its first or last channels; use realigner='original', which keeps the model's own rotation"
    )


def _agree(rotary: Rotary, positions: Tensor, plain: Tensor, turned: Tensor) -> bool:
    """Whether `rotary` makes `turned` of `plain`, but for a rounding."""
    off = (rotary.rotate(plain.float(), positions) - turned.float()).abs().max()
    return bool(off <= 1e-5 * turned.abs().max())


def shown(decoder: nn.Module, attention: nn.Module, layer_type: str) -> Shown | None:
    """What `attention` hands to the attention interface for three tokens; None if that cannot be told."""
    turn = None
    with suppress(RotaryError):
        module = _rotary_module(decoder)
        if module is not None and not (_per_type(module) and layer_type not in module.rope_type):
            turn = _turn(module, layer_type)
    part = turn[0] if isinstance(turn, tuple | list) else turn
    return show(attention, turn, part.device if isinstance(part, Tensor) else torch.device("cpu"))


def unrotated(turn: Any) -> Any:
    """Position embeddings like `turn`, (cos, sin) or complex numbers, that rotate nothing.

    Raises RotaryError for any other kind.
    """
    if isinstance(turn, tuple | list) and len(turn) == 2:
        return torch.ones_like(turn[0]), torch.zeros_like(turn[1])
    if isinstance(turn, Tensor) and turn.is_complex():
        return torch.ones_like(turn)
    raise RotaryError(
        f"this model rotates by a {type(turn).__name__}, which kvtiers does not know; use realigner='original', which "
        "keeps the model's own rotation"
    )


def check_turn(decoder: nn.Module, layer_type: str, turn: Any, *, positions: Tensor) -> None:
    """Refuse position embeddings that are not what the decoder's rotary module makes of `positions`, [batch, columns].

    Looks at nothing while a GPU decodes.
    """
    module, part = _rotary_module(decoder), turn if isinstance(turn, Tensor) else turn[0]
    columns = positions.shape[-1]
    unknown = module is None or (_per_type(module) and layer_type not in module.rope_type)
    if unknown or _changes(_kind(module, layer_type)) or (columns == 1 and part.device.type != "cpu"):
        return
    like = torch.zeros(1, columns, 1, device=part.device, dtype=part.real.dtype)
    with torch.no_grad():
        due = _made(module, like, positions.to(part.device), *((layer_type,) if _per_type(module) else ()))
    pairs = [(turn, due)] if isinstance(turn, Tensor) else zip(turn, due, strict=True)
    if max(float((got - want).abs().max()) for got, want in pairs) > 1e-2:
        raise UnsupportedModelError(
            "this model rotates the tokens of this forward to other positions, or by other frequencies, than a "
            "realigner takes it to; use realigner='original', which keeps the model's own rotation"
        )


def rotary_modules(decoder: nn.Module) -> list[str]:
    """The names of the children that make position embeddings."""
    return [
        name
        for name, child in decoder.named_children()
        if any(held.endswith("inv_freq") for held, _ in child.named_buffers(recurse=False))
    ]


def _rotary_module(decoder: nn.Module) -> Any:
    """The module that makes position embeddings; made anew if what it holds was offloaded. None: there is none.

    Raises RotaryError if there are several.
    """
    names = rotary_modules(decoder)
    if len(names) > 1:
        raise RotaryError(
            f"{type(decoder).__name__} rotates by {' and '.join(names)}, and nobody can tell which layer is rotated by "
            "which; use realigner='original', which keeps the model's own rotation"
        )
    module: Any = decoder.get_submodule(names[0]) if names else None
    if module is not None and any(held.is_meta for held in module.buffers()):
        with torch.device("cpu"):
            return type(module)(module.config)
    return module


def _per_type(module: Any) -> bool:
    """Whether it rotates layers of different types differently."""
    return isinstance(getattr(module, "rope_type", None), dict)


def _turn(module: Any, layer_type: str) -> Any:
    """The position embeddings of `_POSITIONS`, in float32. Raises RotaryError if `module` cannot make them."""
    device = next((held.device for held in module.buffers()), torch.device("cpu"))
    inputs = torch.zeros(1, len(_POSITIONS), 1, device=device), torch.tensor([_POSITIONS], device=device)
    extra = (layer_type,) if _per_type(module) else ()
    try:
        with torch.no_grad():
            if not _changes(_kind(module, layer_type)):
                return _made(module, *inputs, *extra)
            still = copy.copy(module)  # a longer or shorter input changes its frequencies, and the model's with them
            still.rope_type = dict.fromkeys(module.rope_type, "default") if _per_type(module) else "default"
            return _made(partial(type(module).forward, still), *inputs, *extra)
    except _UNKNOWN as error:
        raise RotaryError(
            f"{type(module).__name__} makes no position embeddings when tried ({type(error).__name__}: {error}); "
            "use realigner='original', which keeps the model's own rotation"
        ) from error


def _made(module: Callable[..., Any], like: Tensor, positions: Tensor, *extra: str) -> Any:
    """Position embeddings at `positions`, [batch, tokens], which some versions want on each of three axes."""
    try:
        return module(like, positions, *extra)
    except IndexError:
        return module(like, positions.expand(3, *positions.shape), *extra)


def _kind(module: Any, layer_type: str) -> str:
    """The rope_type of layers of one type."""
    return str(module.rope_type[layer_type] if _per_type(module) else getattr(module, "rope_type", "default"))


def _changes(kind: str) -> bool:
    """Whether frequencies of this rope_type change with length."""
    return kind == "longrope" or "dynamic" in kind
