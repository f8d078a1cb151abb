"""Compressor `value-norm`: a block keeps the tokens with the largest values, each KV head its own.

VATP (arXiv 2406.12335, section 3) weighs attention by the L1 norm of values. Deviation: here the norm decides alone.
"""

from collections.abc import Callable, Mapping

import attrs
from attrs import validators as v

import kvtiers


@attrs.frozen(kw_only=True)
class ValueNorm(kvtiers.Compressor):
    """Keep `keep` tokens of every block, in order of origin."""

    keep: int = attrs.field(default=8, validator=[v.instance_of(int), v.ge(1)])

    def age(self, blocks: kvtiers.Blocks, moment: kvtiers.Moment) -> kvtiers.Blocks:
        """`blocks` with `keep` tokens each. Every field that speaks of tokens is thinned out alike."""
        if self.keep >= blocks.tokens:
            return blocks
        norms = blocks.values.float().norm(p=1, dim=-1)  # [batch, kv_heads, blocks, tokens]
        kept = norms.topk(self.keep, dim=-1).indices.sort(dim=-1).values[..., None]
        offsets = blocks.offsets.expand(*blocks.keys.shape[:4], -1)  # heads and blocks keep different tokens
        keys, values, offsets = (x.take_along_dim(kept, dim=3) for x in (blocks.keys, blocks.values, offsets))
        return attrs.evolve(blocks, keys=keys, values=values, offsets=offsets, offsets_differ=True)

    def compressed_tokens(self, tokens: int) -> int:
        return min(self.keep, tokens)


def value_norm_archive() -> kvtiers.Policy:
    """The preset `archive`, attending blocks of which only the largest values are left."""
    return kvtiers.policy("archive", compressor="value-norm", attend="compressed", top_k=32)


@kvtiers.hookimpl
def kvtiers_compressors() -> Mapping[str, Callable[..., kvtiers.Compressor]]:
    """What this package adds to the slot `compressor`."""
    return {"value-norm": ValueNorm}


@kvtiers.hookimpl
def kvtiers_policies() -> Mapping[str, Callable[[], kvtiers.Policy]]:
    """The preset that uses it."""
    return {"value-norm-archive": value_norm_archive}
