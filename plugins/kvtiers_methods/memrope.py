"""Compressor `memrope`: all that left recent is two frames of running means, one that forgets slowly and one fast.

Source: MemRoPE (arXiv 2603.12513), memory tokens and online RoPE indexing: keys are averaged unrotated, then rotated to
where the two frames are placed by a realigner that closes up. Under `original` they lie where the last steps were that
left. As in the authors' code, a mean is taken over all tokens that leave, so the tokens of a frame differ by their
places alone. Deviation: the means are kept in the dtype of the keys; in bfloat16 the slow one takes up no change below
a few thousandths.
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
from kvtiers_methods.whole_past import fraction, positions_of, turned, unturned


@attrs.frozen(kw_only=True)
class MemRoPE(Compressor):
    """Mid is two steps: exponential moving averages of the blocks that left recent.

    slow, fast: how much of a new block's mean enters the first and the second of them.
    """

    rewrites: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    slow: float = fraction(0.01, v.gt(0), v.le(1))
    fast: float = fraction(0.1, v.gt(0), v.le(1))

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        raise PolicyError("memrope rewrites all of mid; it does not age blocks")

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        geometry = moment.geometry
        frame = geometry.tokens_per_step
        span = 2 if mid is not None else min(2, leaving.count * leaving.span)  # one step has room for one mean
        old_keys = old_values = None
        if mid is not None:
            old_keys = unturned(mid.keys, positions_of(mid), moment)[:, :, 0, ::frame]
            old_values = mid.values[:, :, 0, ::frame]
        new_keys = unturned(leaving.keys, positions_of(leaving), moment)
        keys, values = (
            self._averaged(new, old)[:, :, :span].repeat_interleave(frame, 2)[:, :, None].to(new.dtype)
            for new, old in ((new_keys, old_keys), (leaving.values, old_values))
        )
        made = attrs.evolve(
            leaving,
            keys=keys,
            values=values,
            offsets=geometry.positions(0, span, moment.device)[None, None, None],
            starts=leaving.starts[-1:] + (leaving.span - span),
            span=span,
            offsets_differ=False,
            rotated=None,
            attention=None,
            bias=None,
        )
        return attrs.evolve(made, keys=turned(keys, positions_of(made), moment))

    def compressed_tokens(self, tokens: int) -> int:
        return tokens

    def mid_tokens(self, geometry: Geometry) -> int:
        return 2 * geometry.tokens_per_step

    def _averaged(self, new: Tensor, old: Tensor | None) -> Tensor:
        """The slow mean and the fast one, [batch, kv_heads, 2, width]. new: blocks, in order; old: what they were."""
        means = new.float().mean(3).unbind(2)
        slow, fast = (means[0], means[0]) if old is None else (old[:, :, 0].float(), old[:, :, -1].float())
        for mean in means[1:] if old is None else means:
            slow, fast = torch.lerp(slow, mean, self.slow), torch.lerp(fast, mean, self.fast)
        return torch.stack((slow, fast), 2)
