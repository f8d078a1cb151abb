"""Whether a tensor comes again: the same memory, unchanged."""

import torch
from torch import Tensor


class TensorIdentity:
    """Knows the tensor that was noted last. It is held on to, so that its memory does not become another's meanwhile.

    A tensor made under inference mode does not count its changes: what it holds is compared, which waits for the
    device.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._held: Tensor | None = None
        self._copy: Tensor | None = None
        self._version = 0

    def note(self, tensor: Tensor) -> None:
        """Take `tensor` as the one to know again."""
        self._held, self._version = tensor, _version(tensor)
        self._copy = tensor.clone() if tensor.is_inference() else None

    def knows(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what was noted: the same part of the same memory, unchanged since."""
        held = self._held
        if held is None:
            return False
        if tensor is not held:
            mine, theirs = ((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in (held, tensor))
            if mine != theirs or held.is_meta:
                return False
        if self._copy is not None:
            return torch.equal(tensor, self._copy)
        return _version(tensor) == self._version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
