"""Blocks of different length in one archive (video): all are stored as long as the longest, and their own is noted."""

from bisect import insort

import attrs
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from kvtiers.archive import Growing
from kvtiers.blocks import Blocks


class Lengths:
    """How many tokens and steps of each archived block, in one form, are its own. The rest is padding, not attended."""

    def __init__(self) -> None:
        self.table = Growing(0)
        """[blocks, 2]: tokens, and steps that a realigner gives them."""
        self.spans: list[int] = []
        """The steps of all blocks, ascending, so that nothing waits for the device to know the longest."""
        self.padded = False
        """Whether any block is shorter than its place."""

    def append(self, blocks: Blocks, tokens: int) -> None:
        """Note the lengths of `blocks`, whose places have `tokens` tokens."""
        row = torch.tensor([[blocks.tokens, blocks.span]], device=blocks.keys.device)
        self.table.append(row.expand(blocks.count, -1))
        self.padded |= blocks.tokens < tokens
        for _ in range(blocks.count):
            insort(self.spans, blocks.span)

    def most(self, count: int) -> int:
        """The most steps that `count` of the blocks occupy together."""
        return sum(self.spans[-count:]) if count else 0

    def spans_of(self, index: Int[Tensor, "#batch #kv_heads chosen"]) -> Int[Tensor, "#batch #kv_heads chosen"]:
        """The steps of the chosen blocks."""
        return self._rows()[:, 1][index]

    def valid(
        self, index: Int[Tensor, "#batch #kv_heads chosen"], tokens: int
    ) -> Bool[Tensor, "#batch #kv_heads mid_tokens"] | None:
        """Which tokens of the chosen blocks are their own, where each has `tokens` places; none if all are."""
        if not self.padded:
            return None
        counts = self._rows()[:, 0][index]
        return (torch.arange(tokens, device=counts.device) < counts[..., None]).flatten(-2)

    def cut(self, block: Blocks, number: int) -> Blocks:
        """Block `number` without its padding. Waits for the device."""
        tokens, span = self._rows()[number].tolist()
        return attrs.evolve(
            block,
            keys=block.keys[:, :, :, :tokens],
            values=block.values[:, :, :, :tokens],
            offsets=block.offsets[:, :, :, :tokens],
            span=span,
        )

    def fork(self) -> "Lengths":
        """An independent copy."""
        return Lengths.of(self.table.data, padded=self.padded)

    @staticmethod
    def of(table: Tensor | None, *, padded: bool) -> "Lengths":
        """The lengths that `table` says."""
        made = Lengths()
        if table is not None:
            made.table.append(table)
            made.spans = sorted(table[:, 1].tolist())
        made.padded = padded
        return made

    def _rows(self) -> Tensor:
        return torch.zeros(0, 2, dtype=torch.long) if self.table.data is None else self.table.data


def filled(blocks: Blocks, tokens: int, span: int) -> Blocks:
    """`blocks` with zeros behind them, so that each has `tokens` tokens and counts as `span` steps."""
    more = max(0, tokens - blocks.tokens)
    return attrs.evolve(
        blocks,
        keys=pad(blocks.keys, (0, 0, 0, more)),
        values=pad(blocks.values, (0, 0, 0, more)),
        offsets=pad(blocks.offsets, (0, 0, 0, more)),
        span=span,
        rotated=None,
        reduced=None,
        offsets_differ=True,
    )
