"""What an attention module hands to transformers' attention interface: the shapes of its heads, and how it rotates.

The module's own forward runs on a stand-in of the module, in float32, without any of its weights: a child that has
weights is replaced by one that makes numbers of the right shape. So it does not matter where weights are (offloaded,
on disk) or what they are (quantised, packed into buffers). A child that is neither a linear layer nor a norm is copied.
"""

import copy
import inspect
from contextlib import suppress
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvtiers import Geometry

_SHOWN = "kvtiers-shown"
_TOKENS = 3


@attrs.frozen(kw_only=True)
class Shown:
    """What the interface is given for three tokens: [1, heads, 3, width] each."""

    query: Tensor
    key: Tensor
    value: Tensor

    def geometry(self) -> Geometry:
        """The shape of what a layer of this attention stores, in float32."""
        return Geometry(
            kv_heads=self.key.shape[1],
            query_heads=self.query.shape[1],
            head_dim=self.key.shape[3],
            value_dim=self.value.shape[3],
        )


class _Reached(Exception):  # noqa: N818 (no error: it ends an attention that has shown its keys)
    """The attention interface was called; carries what it was given."""

    def __init__(self, shown: Shown) -> None:
        super().__init__()
        self.shown = shown


def _show(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> None:
    raise _Reached(Shown(query=query, key=key, value=value))


AttentionInterface.register(_SHOWN, _show)


class _Config:
    """A configuration whose attention is `_show`; everything else is the configuration's own."""

    _attn_implementation = _SHOWN

    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        if name == "own":
            raise AttributeError(name)
        return getattr(self.own, name)


class _Projection(nn.Module):
    """Stands for a linear layer, however its weights are stored: numbers that differ by token and channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        count = x[..., 0].numel() * self.width
        return torch.arange(count, device=x.device, dtype=x.dtype).sin().reshape(*x.shape[:-1], self.width)


class _Scaling(nn.Module):
    """Stands for a norm or another layer with weights that keeps the shape.

    It weighs channels differently, as trained weights do: a norm behind the rotation then shows.
    """

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x * (1.5 + torch.arange(x.shape[-1], device=x.device, dtype=x.dtype).cos())


def _width(child: nn.Module) -> int | None:
    """How wide the output of a linear layer is, by whatever name its kind has for it; None if it is none."""
    for module in (child, getattr(child, "base_layer", None)):  # an adapter's wrapper has a base layer
        for name in ("out_features", "outfeatures", "nf"):
            found = getattr(module, name, None)
            if isinstance(found, int):
                return found
    return None


class _Unknown(Exception):  # noqa: N818 (no error: the caller has another way)
    """Raised for a child of which nobody can tell how wide its output is."""


def _stand_in(child: nn.Module) -> nn.Module:
    width = _width(child)
    if width is not None:
        return _Projection(width)
    if hasattr(child, "inv_freq"):  # it makes a rotation
        return child
    held = [part.dim() for part in (*child.parameters(), *child.buffers())]
    if any(dim > 1 for dim in held):
        if all(part.is_floating_point() and not part.is_meta for part in (*child.parameters(), *child.buffers())):
            return copy.deepcopy(child).float()  # there is no other way
        raise _Unknown
    return _Scaling() if held else child


def show(attention: nn.Module, turn: Any, device: torch.device) -> Shown | None:
    """What `attention` gives the interface for three tokens, with `turn` as its position embeddings (None: none).

    None if its forward cannot be run in this way. Nothing of `attention` is changed, and none of its hooks is called.
    """
    children: dict[str, nn.Module | None] = attention.__dict__["_modules"]
    try:
        stand_ins = {name: None if child is None else _stand_in(child) for name, child in children.items()}
    except _Unknown:
        return None
    module: Any = copy.copy(attention)
    module.__dict__ |= {"_modules": stand_ins, "training": False}
    module.config = _Config(module.config)
    hidden = _Projection(int(module.config.hidden_size))(torch.zeros(1, _TOKENS, 1, device=device))
    at = torch.arange(_TOKENS, device=device)[None]
    given: dict[str, Any] = {"position_embeddings": turn, "position_ids": at, "shared_kv_states": {}}
    forward = type(attention).forward
    named = [
        p for p in inspect.signature(forward).parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    keywords = {p.name: given.get(p.name) for p in named[2:] if p.name in given or p.default is p.empty}
    with torch.no_grad(), suppress(AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        try:
            forward(module, hidden, **keywords)
        except _Reached as reached:
            shown = reached.shown
            if all(x.dim() == 4 for x in (shown.query, shown.key, shown.value)):
                return shown
    return None
