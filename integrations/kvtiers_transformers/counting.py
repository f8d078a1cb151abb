"""Whether a decoder that is given no position_ids counts on from what its cache holds, or from 0 in every forward."""

import copy
import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvtiers_transformers.geometries import device_of
from kvtiers_transformers.rope import rotary_modules

_HELD, _COLUMNS = 5, 3


class _Positions(Exception):  # noqa: N818 (no error: it ends a forward that has shown its positions)
    """The rotary module was called; carries the first position."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first


class _Rotary(nn.Module):
    """Stands where a decoder's rotary module would."""

    def forward(self, x: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> None:
        raise _Positions(int(position_ids.flatten()[0]))


class _Held(DynamicCache):
    """A cache that says it holds some tokens."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return _HELD


def counts_on(decoder: nn.Module) -> bool:
    """False if `decoder` is known to begin at position 0 although its cache holds tokens.

    Its own forward runs on a stand-in until it asks for rotations, on no tokens that mean anything.
    """
    found, config, forward = rotary_modules(decoder), decoder.config, type(decoder).forward
    taken = inspect.signature(forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in taken), None)
    if len(found) != 1 or name is None or "inputs_embeds" not in taken:
        return True
    module: Any = copy.copy(decoder)
    children: dict[str, nn.Module | None] = decoder.__dict__["_modules"]
    module.__dict__ |= {"_modules": children | {found[0]: _Rotary()}, "training": False}
    settings: Any = config
    embedded = torch.zeros(1, _COLUMNS, int(settings.hidden_size), device=device_of(decoder))
    unknown = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
    with torch.no_grad(), suppress(*unknown):
        try:
            forward(module, inputs_embeds=embedded, use_cache=True, **{name: _Held(config=settings)})
        except _Positions as positions:
            return positions.first == _HELD
    return True
