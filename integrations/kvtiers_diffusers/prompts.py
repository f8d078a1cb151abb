"""The prompts of a video. Their keys and values are worked out once, and again when what makes them has changed."""

from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from kvtiers_diffusers.fingerprint import Fingerprint
from kvtiers_diffusers.tensor_identity import TensorIdentity

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of one prompt by layer; attention fills in what is missing."""

_KEPT = 2
"""Prompts that are held at a time: one, or two that alternate."""


class Prompts:
    """The prompts that came last, with their keys and values in every layer's cross-attention."""

    def __init__(self) -> None:
        self._held: list[tuple[TensorIdentity, KeysValues]] = []
        self._makers = Fingerprint()

    def find(self, text: Tensor) -> KeysValues | None:
        """The keys and values of the prompt with this embedding, if it is held."""
        return next((held for identity, held in self._held if identity.knows(text)), None)

    def begin(self, text: Tensor) -> KeysValues:
        """Hold another prompt, whose keys and values are still to be worked out; the oldest makes room."""
        identity, held = TensorIdentity(), KeysValues()
        identity.note(text)
        self._held = [*self._held[1 - _KEPT :], (identity, held)]
        return held

    def check_makers(self, transformer: Any, kind: str, *, look: bool) -> bool:
        """Forget all keys and values if what makes them has changed: weights, adapters, settings, hooks; say whether.

        kind: the kind of device that the transformer runs on. look: whether to compare some of the weights' numbers.
        """
        embedder = transformer.condition_embedder
        makers, around = [embedder.text_embedder], [transformer, embedder]
        for block in transformer.blocks:
            attn = block.attn2
            makers += [attn.to_kv] if attn.fused_projections else [attn.to_k, attn.to_v]
            makers.append(attn.norm_k)
            around += [unwrap_module(block), unwrap_module(attn)]
        changed = self._makers.changes(makers, around, kind, look=look)
        if changed:
            for _, held in self._held:
                held.clear()
        return changed

    @property
    def nbytes(self) -> int:
        """Bytes of the storages held."""
        parts = [part for _, held in self._held for both in held.values() for part in both]
        return sum(storage.nbytes() for storage in {part.untyped_storage() for part in parts})
