"""Compressor `top-tokens`: a block keeps its few most useful tokens, chosen per KV head, and forgets the others.

By `key-norm`: the lowest norms stay (Devoto et al., arXiv 2406.11430, section 3).
By `key-similarity`: the keys least like the block's mean direction stay (KeyDiff, arXiv 2504.15364, section 3).
By `attention`: the keys that the latest queries attend most stay (SnapKV, arXiv 2404.14469, section 4). Deviations: the
    softmax is over the block alone, since blocks are compressed one by one, and neighbours are not pooled.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry
from kvtiers.policy import Compressor, Source

_ScoredKeys = Float[Tensor, "batch kv_heads blocks tokens head_dim"]
_Scores = Float[Tensor, "batch kv_heads blocks tokens"]


@attrs.frozen(kw_only=True)
class TopTokens(Compressor):
    """Keep `keep` tokens of every block and KV head, in order of origin; of equal scores the newer token stays.

    `window` is how many of the latest queries `attention` looks at; the state is these queries, [batch, query_heads,
    <= window, head_dim], rotated at their original positions like the keys they are held against.
    """

    keep: int = attrs.field(default=8, validator=[v.instance_of(int), v.ge(1)])
    by: str = attrs.field(default="key-norm")
    window: int = attrs.field(default=32, validator=[v.instance_of(int), v.ge(1)])

    @by.validator
    def _check_by(self, _: object, value: object) -> None:
        if value not in _SCORES:
            raise PolicyError(f"by must be one of {', '.join(map(repr, _SCORES))}, got {value!r}")

    @property
    def prepares(self) -> bool:
        return self.by == "attention"

    def prepare(self, source: Source, state: Tensor | None) -> Tensor | None:
        """The latest `window` queries."""
        if not self.prepares or source.queries is None:
            return state
        latest = source.queries[:, :, -self.window :]
        if state is None or latest.shape[2] == self.window:
            return latest.clone()
        return torch.cat([state, latest], dim=2)[:, :, -self.window :].clone()

    def age(self, blocks: Blocks, state: Tensor | None) -> tuple[Blocks | None, Any]:
        if self.keep >= blocks.tokens:
            return blocks, state
        scores = _SCORES[self.by](blocks.keys if blocks.rotated is None else blocks.rotated, state)
        newest_first = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., : self.keep]
        kept = (blocks.tokens - 1 - newest_first).sort(dim=-1).values
        offsets = blocks.offsets.expand(*blocks.keys.shape[:4], -1)
        compressed = attrs.evolve(
            blocks,
            keys=blocks.keys.take_along_dim(kept[..., None], dim=3),
            values=blocks.values.take_along_dim(kept[..., None], dim=3),
            offsets=offsets.take_along_dim(kept[..., None], dim=3),
            offsets_differ=True,
            rotated=None,
        )
        return compressed, state

    def compressed_tokens(self, tokens: int) -> int:
        return min(self.keep, tokens)

    def state_bytes(self, geometry: Geometry) -> int:
        query_bytes = geometry.batch * geometry.query_heads * geometry.head_dim * geometry.dtype.itemsize
        return self.window * query_bytes if self.prepares else 0


def _low_norm(keys: _ScoredKeys, _queries: Tensor | None) -> _Scores:
    norms: _Scores = keys.float().norm(dim=-1)
    return -norms


def _unlike_the_mean(keys: _ScoredKeys, _queries: Tensor | None) -> _Scores:
    anchor = functional.normalize(keys.float(), dim=-1).mean(dim=-2, keepdim=True)
    return -functional.cosine_similarity(keys.float(), anchor, dim=-1)


def _attention_mass(keys: _ScoredKeys, queries: Tensor | None) -> _Scores:
    if queries is None:
        raise PolicyError(
            "compressor 'top-tokens' by='attention' has seen no queries; commit with queries, or choose by='key-norm'"
        )
    grouped = queries.float().unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    logits = torch.einsum("bkqd,bkntd->bknqt", grouped, keys.float()) / keys.shape[-1] ** 0.5
    mass: _Scores = logits.softmax(dim=-1).sum(dim=-2)
    return mass


_SCORES: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "key-norm": _low_norm,
    "key-similarity": _unlike_the_mean,
    "attention": _attention_mass,
}
