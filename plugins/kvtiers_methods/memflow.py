"""Compressor `memflow`: a small bank of frames, chosen by how much the prompt attends them.

Source: MemFlow (arXiv 2512.14699) section 3.2, narrative adaptive memory: of a block only the first frame is kept
(redundant removal); when the bank is full, all but one of its frames stay, those that the prompt attends most (semantic
retrieval, equation 1), and the new one joins them. As in the authors' code, the prompt asks with the keys of the
layer's own cross-attention, all heads choose together, and keys are compared as they are held. Deviations: the softmax
of equation 1 is over the whole bank (over one frame its mean is always the same; the code has none); a frame joins when
its block leaves recent (the paper: while it is recent too), by the prompt of the block that was made last (the paper:
by that of the next). Without a prompt, as on text and in passes with gradients, the newest frames stay.
Sparse activation (3.3) chooses among all that is attended with every query; nothing here does that to a bank, and the
authors' configuration has it off. Where a realigner closes up, the frames of the bank lie one behind the other.
"""

from typing import ClassVar

import attrs
import torch
from attrs import validators as v
from torch import Tensor

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry
from kvtiers.slots import Compressor, Moment
from kvtiers_methods.whole_past import Past


@attrs.frozen(kw_only=True)
class MemFlow(Compressor):
    """Mid is `frames` frames: the newest, and those before it that the prompt attends most."""

    rewrites: ClassVar[bool] = True
    frames: int = attrs.field(default=3, validator=[v.instance_of(int), v.ge(1)])

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        raise PolicyError("memflow rewrites all of mid; it does not age blocks")

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        frame, past = moment.geometry.tokens_per_step, Past.of(leaving, mid)
        batch, heads, count = *past.keys.shape[:2], 0 if mid is None else mid.tokens // frame
        bank = torch.arange(count, device=moment.device).expand(batch, -1)
        for block in range(leaving.count):
            if bank.shape[1] == self.frames:
                best = self.scores(past, bank, moment).topk(self.frames - 1, -1).indices.sort(-1).values
                bank = bank.gather(1, best)
            first = torch.full((batch, 1), count + block * leaving.span, device=moment.device)
            bank = torch.cat([bank, first], 1)
        made = past.block(_tokens(bank, frame)[:, None].expand(-1, heads, -1), close_up=False)
        if moment.keys_rotated:
            return made
        span = bank.shape[1]
        offsets = moment.geometry.positions(0, span, moment.device)[None, None, None]
        start = leaving.starts[-1:] + (leaving.span - span)
        return attrs.evolve(made, offsets=offsets, offsets_differ=False, span=span, starts=start)

    def scores(self, past: Past, bank: Tensor, moment: Moment) -> Tensor:
        """The mean share of the prompt's attention that each frame of the bank gets, [batch, frames]."""
        frame, asked = moment.geometry.tokens_per_step, moment.prompt_keys
        if asked is None:
            return bank.float()
        keys = past.keys.take_along_dim(_tokens(bank, frame)[:, None, :, None], 2).float()
        grouped = asked.float().unflatten(1, (keys.shape[1], -1))
        shares = (grouped @ keys[:, :, None].mT / keys.shape[-1] ** 0.5).softmax(-1)
        found: Tensor = shares.mean((1, 2, 3)).unflatten(-1, (-1, frame)).mean(-1)
        return found

    def compressed_tokens(self, tokens: int) -> int:
        return tokens

    def mid_tokens(self, geometry: Geometry) -> int:
        return self.frames * geometry.tokens_per_step


def _tokens(frames: Tensor, per_frame: int) -> Tensor:
    """The tokens of frames by number, [batch, frames * per_frame]."""
    within = torch.arange(per_frame, device=frames.device)
    return (frames[..., None] * per_frame + within).flatten(1)
