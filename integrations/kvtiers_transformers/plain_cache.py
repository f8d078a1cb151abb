"""transformers' own caches, asked as kvtiers' are: rows of `kvtiers compare text`."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, QuantizedCache

from kvtiers import MemoryUsage, PolicyError


class _Asked:
    """What kvtiers' caches say, said by a cache of transformers, which attends all that it holds."""

    layers: list[Any]

    def fork(self) -> "_Asked":
        """An independent copy."""
        return copy.deepcopy(self)

    def attended(self) -> list[int]:
        """Tokens that the last step of each layer attended, of those that attend; a window counts the current one."""
        lengths = [(layer, layer.get_seq_length()) for layer in self.layers if hasattr(layer, "get_seq_length")]
        return [int(min(length, getattr(layer, "sliding_window", length))) for layer, length in lengths]

    def memory_usage(self) -> list[MemoryUsage]:
        """All of it is recent, and on the device."""
        parts = {id(part): part for layer in self.layers for part in _tensors(vars(layer))}
        held = sum(part.untyped_storage().nbytes() for part in parts.values())
        return [MemoryUsage(tier="recent", location="device", bytes=held)]


class PlainCache(_Asked, DynamicCache):
    """A `DynamicCache` that can be forked and says what it holds and attends."""


class _QuantizedCache(_Asked, QuantizedCache):
    """The same of a `QuantizedCache`."""

    def fork(self) -> "_Asked":
        """An independent copy. Tensors are shared: such a cache replaces what it holds, and writes into none."""
        copied = copy.copy(self)
        copied.layers = [copy.copy(layer) for layer in self.layers]
        return copied


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """The tensors in dictionaries, lists and tuples. One that is made of others is taken apart."""
    if isinstance(held, torch.Tensor):
        flatten: Any = getattr(held, "__tensor_flatten__", None)
        if flatten is None:
            yield held
        else:
            yield from _tensors([getattr(held, name) for name in flatten()[0]])
    elif isinstance(held, Mapping):
        yield from _tensors(list(held.values()))
    elif isinstance(held, list | tuple):
        for part in held:
            yield from _tensors(part)


def _quantised(backend: str) -> Callable[[PreTrainedConfig], Any]:
    def make(config: PreTrainedConfig) -> Any:
        try:
            return _QuantizedCache(backend, config)
        except (ImportError, ValueError) as error:
            raise PolicyError(f"transformers' cache quantised by {backend} cannot be made: {error}") from error

    return make


PLAIN: Mapping[str, Callable[[PreTrainedConfig], Any]] = {
    "transformers:dynamic": lambda config: PlainCache(config=config),
    "transformers:fp8": _quantised("fp8"),
    "transformers:int4": _quantised("quanto"),
}
"""Rows that have no policy: transformers' cache that keeps everything, as it is, in 8 bits (newer versions of
transformers), or in 4 bits (needs optimum-quanto)."""
