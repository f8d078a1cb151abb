"""The prompts of a video. Their keys and values are worked out once, and again when the weights behind them change."""

from typing import Any

from torch import Tensor

from kvtiers_diffusers.tensor_identity import TensorIdentity

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of one prompt by layer; attention fills in what is missing."""

_KEPT = 2
"""Prompts that are held at a time: one, or two that alternate."""


class Prompts:
    """The prompts that came last, with their keys and values in every layer's cross-attention."""

    def __init__(self) -> None:
        self._held: list[tuple[TensorIdentity, KeysValues]] = []
        self._weights: tuple[tuple[int, int], ...] = ()

    def find(self, text: Tensor) -> KeysValues | None:
        """The keys and values of the prompt with this embedding, if it is held."""
        return next((held for identity, held in self._held if identity.knows(text)), None)

    def begin(self, text: Tensor) -> KeysValues:
        """Hold another prompt, whose keys and values are still to be worked out; the oldest makes room."""
        identity, held = TensorIdentity(), KeysValues()
        identity.note(text)
        self._held = [*self._held[1 - _KEPT :], (identity, held)]
        return held

    def check_weights(self, transformer: Any) -> None:
        """Forget all keys and values if what makes them has changed: trained, loaded, replaced."""
        makers = [transformer.condition_embedder.text_embedder]
        for block in transformer.blocks:
            attn = block.attn2
            makers += [attn.to_kv] if attn.fused_projections else [attn.to_k, attn.to_v]
            makers.append(attn.norm_k)
        parameters = [parameter for maker in makers for parameter in maker.parameters()]
        weights = tuple((id(one), 0 if one.is_inference() else one._version) for one in parameters)
        if weights != self._weights:
            self._weights = weights
            for _, held in self._held:
                held.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the storages held."""
        parts = [part for _, held in self._held for both in held.values() for part in both]
        return sum(storage.nbytes() for storage in {part.untyped_storage() for part in parts})
