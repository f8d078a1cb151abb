"""What is noted of the tokens of archived blocks, beside their keys and values: where they lie, and their bias."""

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers.blocks import Blocks
from kvtiers.errors import SelectionError
from kvtiers.growing import Growing
from kvtiers.state import State, part, shared


@attrs.define(eq=False, slots=False, kw_only=True)
class TokenTable(State):
    """Where the tokens of all archived blocks of one form lie, and their bias.

    As long as tokens lie alike in all blocks, rows and heads, the offsets of one block stand for all; as long as no
    block has a bias, none is held.
    """

    constant: Tensor | None = shared()
    """[1, 1, 1, tokens, axes], while tokens lie alike."""
    offsets: Growing | None = part(lambda _: Growing(2))
    """[batch, kv_heads, blocks, tokens, axes], once they lie otherwise in some block."""
    bias: Growing | None = part(lambda _: Growing(2))
    """[batch, kv_heads, blocks, tokens], from the first block on that has one."""

    def append(self, blocks: Blocks, count: int, *, alike: bool) -> None:
        """Record where the tokens of `blocks` lie, and their bias; `count` blocks are recorded already.

        alike: these tokens may lie at the same offsets as those of every other block.

        After an error, `truncate` brings back what was held.
        """
        wide, offsets, known = blocks.keys.shape[:2], blocks.offsets.float(), self.offsets
        if known is None and alike:
            self.constant = offsets.clone() if self.constant is None else self.constant
        else:
            if known is None:
                known = Growing(2)
                if self.constant is not None:
                    known.append(self.constant.expand(*wide, count, -1, -1))
            known.append(offsets.expand(*wide, blocks.count, -1, -1))
            self.constant, self.offsets = None, known
        none, bias = blocks.keys.new_zeros(1, 1, 1, 1, dtype=torch.float32), self.bias
        if bias is None and blocks.bias is not None:
            bias = Growing(2)
            if count:
                bias.append(none.expand(*wide, count, blocks.tokens))
        if bias is not None:
            own = none if blocks.bias is None else blocks.bias.float()
            bias.append(own.expand(*wide, blocks.count, blocks.tokens))
        self.bias = bias

    def truncate(self, count: int) -> None:
        """Forget all blocks but the first `count`."""
        for growing in (self.offsets, self.bias):
            if growing is not None:
                growing.length = min(growing.length, count)

    def offsets_at(self, index: Int[Tensor, "#batch #kv_heads chosen"]) -> Float[Tensor, "#b #h #chosen tokens axes"]:
        """Where the tokens of some blocks lie."""
        if self.constant is not None:
            return self.constant
        return _held(self.offsets, index)

    def bias_at(self, index: Int[Tensor, "#batch #kv_heads chosen"]) -> Float[Tensor, "b h chosen tokens"] | None:
        """The bias of the tokens of some blocks, or None if no block has one."""
        return None if self.bias is None else _held(self.bias, index)


def _held(growing: Growing | None, index: Tensor) -> Tensor:
    """The entries of the chosen blocks of every row and head."""
    if growing is None or growing.data is None:
        raise SelectionError("no block is noted here")
    table = growing.data
    return table.take_along_dim(index.view(*index.shape, *(1 for _ in table.shape[3:])), 2)
