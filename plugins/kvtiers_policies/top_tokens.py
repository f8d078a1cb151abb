"""Compressor `top-tokens`: a block keeps its few most useful tokens, chosen per KV head, and forgets the others.

By `key-norm`: the lowest norms stay (Devoto et al., arXiv 2406.11430, section 3).
By `key-similarity`: the keys least like the block's mean direction stay (KeyDiff, arXiv 2504.15364, section 3).
By `attention`: the keys that the latest queries attend most stay (SnapKV, arXiv 2404.14469, section 4). Deviations:
    blocks are compressed one by one, and neighbours are not pooled.
"""

from collections.abc import Callable, Mapping

import attrs
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.slots import Attention, Compressor, Moment

_Keys = Float[Tensor, "batch kv_heads blocks tokens head_dim"]
_Scores = Float[Tensor, "batch kv_heads blocks tokens"]


@attrs.frozen(kw_only=True)
class TopTokens(Compressor):
    """Keep `keep` tokens of every block and KV head, in order of origin; of equal scores the newer token stays.

    window: how many of the latest queries `attention` looks at.
    """

    keep: int = attrs.field(default=8, validator=[v.instance_of(int), v.ge(1)])
    by: str = attrs.field(default="key-norm")
    latest: int = attrs.field(default=32, alias="window")

    @by.validator
    def _check_by(self, _: object, value: object) -> None:
        if value not in _SCORES:
            raise PolicyError(f"by must be one of {', '.join(map(repr, _SCORES))}, got {value!r}")

    @latest.validator
    def _check_latest(self, _: object, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PolicyError(f"'window' must be >= 1, a whole number of queries, got {value!r}")

    @property
    def attention(self) -> Attention | None:
        return "latest" if self.by == "attention" else None

    @property
    def window(self) -> int:
        return self.latest if self.by == "attention" else 0

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        if self.keep >= blocks.tokens:
            return attrs.evolve(blocks, attention=None)
        scores = _SCORES[self.by](blocks)
        newest_first = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., : self.keep]
        kept = (blocks.tokens - 1 - newest_first).sort(dim=-1).values
        offsets = blocks.offsets.expand(*blocks.keys.shape[:4], -1)
        return attrs.evolve(
            blocks,
            keys=blocks.keys.take_along_dim(kept[..., None], dim=3),
            values=blocks.values.take_along_dim(kept[..., None], dim=3),
            offsets=offsets.take_along_dim(kept[..., None], dim=3),
            offsets_differ=True,
            rotated=None,
            attention=None,
        )

    def compressed_tokens(self, tokens: int) -> int:
        return min(self.keep, tokens)


def _keys(blocks: Blocks) -> _Keys:
    """The keys as attention sees them at their original positions."""
    return (blocks.keys if blocks.rotated is None else blocks.rotated).float()


def _low_norm(blocks: Blocks) -> _Scores:
    norms: _Scores = _keys(blocks).norm(dim=-1)
    return -norms


def _unlike_the_mean(blocks: Blocks) -> _Scores:
    keys = _keys(blocks)
    anchor = functional.normalize(keys, dim=-1).mean(dim=-2, keepdim=True)
    return -functional.cosine_similarity(keys, anchor, dim=-1)


def _attention_mass(blocks: Blocks) -> _Scores:
    if blocks.attention is None:
        raise PolicyError("compressor 'top-tokens' by='attention' was given no attention; it works in a layer alone")
    mass: _Scores = blocks.attention.unflatten(1, (blocks.keys.shape[1], -1)).sum(2)
    return mass


_SCORES: Mapping[str, Callable[[Blocks], Tensor]] = {
    "key-norm": _low_norm,
    "key-similarity": _unlike_the_mean,
    "attention": _attention_mass,
}
