"""What a module makes of one input: its weights, its settings and its hooks, and whether any of them changed."""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_INTERNAL = frozenset(vars(nn.Module()))
"""What every module has; of these, the parts that matter are named below."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)


class Fingerprint:
    """Knows the modules that it was shown last.

    An adapter's scale, whether it is on, whether it is merged, a hook, a replaced module, weights written in place or
    moved: all of these count as a change. What is written into a weight past autograd (`weight.data.mul_(2)`) shows
    only in the numbers, some of which are compared where that is wanted: it waits for the device.
    """

    def __init__(self) -> None:
        self._samples: dict[Hashable, Tensor] = {}
        self._known: list[Hashable] = []
        self._held: list[Any] = []
        """What is known by its identity, so that no other object takes that identity meanwhile."""

    def changes(self, roots: Iterable[nn.Module], shallow: Iterable[nn.Module], kind: str, *, look: bool) -> bool:
        """Whether anything changed since the last call.

        roots: modules that count with all that is in them. shallow: modules whose own settings and hooks count.
        kind: the kind of device that they run on, for which autocast may be on. look: whether to compare numbers.
        """
        held: list[Any] = []
        tensors: list[Tensor] = []
        known: list[Hashable] = [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
        for module in shallow:
            known += _settings(module, held)
        for root in roots:
            for module in root.modules():
                known += _settings(module, held)
            tensors += [*root.parameters(), *root.buffers()]
        known += [_state(tensor, held) for tensor in tensors]
        changed = known != self._known
        self._known, self._held = known, held
        if look:
            samples, before = _samples(tensors), self._samples
            same = samples.keys() == before.keys() and all(torch.equal(samples[at], before[at]) for at in samples)
            self._samples, changed = samples, changed or not same
        return changed


def _settings(module: nn.Module, held: list[Any]) -> Iterator[Hashable]:
    own = vars(module)
    held.append(module)
    yield id(module), own["training"], *own["_forward_pre_hooks"], *own["_forward_hooks"]
    for name, value in list(own.items()):
        if name not in _INTERNAL:
            yield name, _plain(value, held)


def _plain(value: Any, held: list[Any]) -> Hashable:
    """`value`, or what tells whether it is the same."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return tuple((name, _plain(part, held)) for name, part in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(part, held) for part in value)
    if isinstance(value, Tensor):
        return _state(value, held)
    held.append(value)
    return id(value)


def _state(tensor: Tensor, held: list[Any]) -> Hashable:
    held.append(tensor)
    version = 0 if tensor.is_inference() else tensor._version
    address = tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0  # others may have none
    return id(tensor), version, address, tensor.dtype


def _samples(tensors: Iterable[Tensor]) -> dict[Hashable, Tensor]:
    """The bits of every vector, and of the diagonal of every matrix, together by where they are and their dtype."""
    found: dict[Hashable, list[Tensor]] = {}
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.dtype.itemsize in _BITS:
            bits = tensor.detach().view(_BITS[tensor.dtype.itemsize])
            part = bits if bits.dim() < 2 else bits.diagonal()
            found.setdefault((tensor.device, tensor.dtype), []).append(part.reshape(-1))
    return {at: torch.cat(parts) for at, parts in found.items()}
