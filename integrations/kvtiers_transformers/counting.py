"""What a decoder does about positions: whether it counts on from what its cache holds, and which layers it rotates.

Its own forward runs on a stand-in, with some of its children replaced.
"""

import copy
import inspect
from contextlib import suppress
from typing import Any, cast

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


class _Some(nn.Module):
    """Stands where a rotary module would whose frequencies must not change."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return x, x


class _Held(DynamicCache):
    """A cache that says it holds some tokens."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return _HELD


class _Layer(nn.Module):
    """Stands where a decoder's layer would, and notes whether it is given position embeddings."""

    def __init__(self, number: int, layer: nn.Module, unrotated: set[int]) -> None:
        super().__init__()
        self.number, self.unrotated, self.real = number, unrotated, [layer]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"][0], name)

    def forward(self, hidden_states: Tensor, *_: Any, **named: Any) -> Tensor:
        if "position_embeddings" in named and named["position_embeddings"] is None:
            self.unrotated.add(self.number)
        return hidden_states


def unrotated_layers(decoder: nn.Module) -> set[int]:
    """The layers that `decoder` is known to give no position embeddings. Their attention may be able to rotate."""
    layers, found = getattr(decoder, "layers", None), set[int]()
    if isinstance(layers, nn.ModuleList):
        others: dict[str, nn.Module] = {name: _Some() for name in rotary_modules(decoder)}
        stand_ins = nn.ModuleList(_Layer(number, layer, found) for number, layer in enumerate(layers))
        _run(decoder, others | {"layers": stand_ins})
    return found


def counts_on(decoder: nn.Module) -> bool:
    """False if `decoder` is known to begin at position 0 although its cache holds tokens."""
    found = rotary_modules(decoder)
    if len(found) == 1:
        try:
            _run(decoder, {found[0]: _Rotary()})
        except _Positions as positions:
            return positions.first == _HELD
    return True


def _run(decoder: nn.Module, others: dict[str, nn.Module]) -> None:
    """Run the forward of `decoder` with some children replaced, on no tokens that mean anything.

    Where it cannot be run in this way, nothing is learned.
    """
    forward, settings = type(decoder).forward, cast(Any, decoder.config)
    taken = inspect.signature(forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in taken), None)
    if name is None or "inputs_embeds" not in taken:
        return
    module: Any = copy.copy(decoder)
    children: dict[str, nn.Module | None] = decoder.__dict__["_modules"]
    module.__dict__ |= {"_modules": children | others, "training": False}
    embedded = torch.zeros(1, _COLUMNS, int(settings.hidden_size), device=device_of(decoder))
    unknown = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
    with torch.no_grad(), suppress(*unknown):
        forward(module, inputs_embeds=embedded, use_cache=True, **{name: _Held(config=settings)})
