"""Training clips: some blocks of a walk, in a row or with gaps in time, so that a few seconds can hold a return.

A clip with gaps is what a memory of sink, chosen history and recent blocks shows a model: the first block of the walk,
a room as it was seen long ago, the second before it comes back, and its return.
"""

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers_packforcing.tiny_world.houses import Houses
from kvtiers_packforcing.tiny_world.prompts import embed_walks
from kvtiers_packforcing.tiny_world.rendering import render
from kvtiers_packforcing.tiny_world.vocabulary import FIRST_FRAME, FRAMES_PER_BLOCK
from kvtiers_packforcing.tiny_world.walks import Segment, Walks

CLIP_BLOCKS = 5
"""As many as a clip has at least."""
WALK_BLOCKS = 128
"""Blocks of a walk that clips are taken from: as long as the longest video that is shown."""

KINDS = ("consecutive", "return", "scattered")
_SHARES = (0.4, 0.45, 0.15)
_STARTS_AT_ZERO = 0.5


@attrs.frozen(eq=False, kw_only=True)
class Clips:
    """A batch of clips. `blocks` are true times in seconds, ascending; a gap is where they do not follow each other."""

    houses: Houses
    walks: Walks
    blocks: Int[Tensor, "batch blocks"]
    kinds: tuple[str, ...]

    def returns(self, row: int) -> int | None:
        """Of a clip of kind `return`: which of its blocks shows again what an earlier one showed."""
        if self.kinds[row] != "return":
            return None
        moves = (self.walks.entered() | self.walks.opened())[row, self.blocks[row]]
        return int(moves.nonzero().max())

    @classmethod
    def of_seeds(cls, seeds: Sequence[int | str], kind: str | None = None, length: int = CLIP_BLOCKS) -> "Clips":
        """A clip of `length` blocks per seed, each of a kind that is drawn, or of `kind`.

        A clip depends on its own seed only. length: 5 to 32.
        """
        walks = Walks.of_seeds(seeds, WALK_BLOCKS)
        chosen = [_choose(random.Random(f"clip {seed}"), walks, row, kind, length) for row, seed in enumerate(seeds)]
        return cls(
            houses=Houses.of_seeds(seeds),
            walks=walks,
            blocks=torch.tensor([blocks for _, blocks in chosen]),
            kinds=tuple(kind for kind, _ in chosen),
        )

    def frames(self) -> Int[Tensor, "batch frames"]:
        """The numbers of the clips' pixel frames. The first block lacks those before `FIRST_FRAME`, as in any video."""
        frames = self.blocks[:, :, None] * FRAMES_PER_BLOCK + torch.arange(FRAMES_PER_BLOCK)
        return frames.flatten(1)[:, FIRST_FRAME:]

    def pixels(self) -> Float[Tensor, "batch 3 frames height width"]:
        """The frames, in -1 to 1: of five blocks 16 x 5 - 3 = 77."""
        return render(self.houses, self.walks, self.frames())

    def text(self) -> Float[Tensor, "batch blocks prompt_words text_width"]:
        """The embedding of each block's prompt."""
        return embed_walks(self.walks)[torch.arange(len(self.blocks))[:, None], self.blocks]


def _choose(draw: random.Random, walks: Walks, row: int, kind: str | None, length: int) -> tuple[str, list[int]]:
    """A kind of clip and its blocks, of a walk."""
    at = draw.random()
    kind = kind or KINDS[sum(at >= share for share in accumulate(_SHARES[:-1]))]
    starts = _starts(walks, row)
    if kind == "return":
        return kind, _return(draw, walks.segments(row), starts, length)
    if kind == "scattered":
        return kind, _scattered(draw, starts, length)
    first = 0 if draw.random() < _STARTS_AT_ZERO else _pick(draw, [s for s in starts if s <= walks.blocks - length])
    return kind, list(range(first, first + length))


def _starts(walks: Walks, row: int) -> list[int]:
    """Where a run of blocks can begin: not with a door or a curtain that moves, which show what was before."""
    moves = (walks.entered() | walks.opened() | walks.drawn())[row].tolist()
    return [block for block, moving in enumerate(moves) if not moving]


def _return(draw: random.Random, segments: Sequence[Segment], starts: Sequence[int], length: int) -> list[int]:
    """An anchor, blocks of what was seen before, one of them of what returns, the block before a return, the return."""
    usable = set(starts)
    returns = [nth for nth, segment in enumerate(segments) if _can_return(segments, nth, usable, length)]
    nth = _pick(draw, returns)
    comes = segments[nth]
    earlier = [s for s in segments[:nth] if s.room == comes.room]
    after = 2 if draw.random() < 0.6 and comes.end - comes.start >= 2 else 1
    tail = list(range(comes.start - 1, comes.start + after))
    known = [b for s in earlier for b in range(s.start, s.end) if b in usable and 0 < b < tail[0]]
    others = [b for b in usable if 0 < b < tail[0]]
    chosen = {0, _pick(draw, known)}
    while len(chosen) < length - len(tail):
        chosen.add(_pick(draw, [b for b in others if b not in chosen]))
    return [*sorted(chosen), *tail]


def _can_return(segments: Sequence[Segment], nth: int, usable: set[int], length: int) -> bool:
    """Whether a segment shows again what a block other than the first one shows, with room for a clip before it."""
    comes = segments[nth]
    before = sum(block < comes.start for block in usable)
    if comes.hidden_before is None or comes.start - 1 not in usable or before < length - 1:
        return False
    earlier = (s for s in segments[:nth] if s.room == comes.room)
    return any(b in usable for s in earlier for b in range(max(s.start, 1), s.end))


def _scattered(draw: random.Random, starts: Sequence[int], length: int) -> list[int]:
    """Single blocks and pairs from anywhere."""
    usable = sorted(starts)
    chosen = {0} if draw.random() < _STARTS_AT_ZERO else set()
    while len(chosen) < length:
        chosen.add(_pick(draw, [b for b in usable if b not in chosen]))
    return sorted(chosen)


def gaps(blocks: Sequence[int]) -> list[int]:
    """How many blocks were left out before each block but the first."""
    return [after - before - 1 for before, after in pairwise(blocks)]


def _pick(draw: random.Random, choices: Sequence[int]) -> int:
    return choices[int(draw.random() * len(choices))]
