"""Compressor `deep-forcing`: between a deep sink and recent, the tokens stay that the queries of late frames like best.

Source: Deep Forcing (arXiv 2512.05081) section 4. Participative compression (4.3, equations 7 to 11): of all candidates
the C with the largest sum of q . k over the queries of the newest R frames; they are placed between sink and recent.
The deep sink (4.2) is a matter of the preset: about half of the window, placed right before what follows by a realigner
that closes up. Deviations: only queries of finished frames vote (the paper also asks the first denoise step of the
next block; its table 5 has both), whenever a block leaves recent and not when 21 frames are full. The paper does not
say whether heads choose together (here each KV head chooses its own), nor where in its block a token that stays lies:
here tokens fill its frames in order of origin, each at its own height and width. Equation 5 would put the last frame
of the sink on the first one that follows; here it lies one step before. Under `original` all stay where they were.
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
from kvtiers_methods.whole_past import Past, best


@attrs.frozen(kw_only=True)
class DeepForcing(Compressor):
    """Mid is as many tokens as `frames` frames have; `late_frames` are asked which."""

    rewrites: ClassVar[bool] = True
    frames: int = attrs.field(default=2, validator=[v.instance_of(int), v.ge(1)])
    late_frames: int = attrs.field(default=4, validator=[v.instance_of(int), v.ge(1)])

    def window_queries(self, geometry: Geometry) -> int:
        return self.late_frames * geometry.tokens_per_step

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        raise PolicyError("deep-forcing rewrites all of mid; it does not age blocks")

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        past, frame = Past.of(leaving, mid), moment.geometry.tokens_per_step
        made = past.block(best(self.scores(past, moment), self.frames * frame), close_up=False)
        if moment.keys_rotated:
            return made
        span = -(-made.tokens // frame)
        time = torch.arange(made.tokens, device=moment.device)[:, None] // frame
        offsets = torch.cat([time.expand_as(made.offsets[..., :1]).to(made.offsets), made.offsets[..., 1:]], -1)
        return attrs.evolve(made, offsets=offsets, span=span, starts=leaving.starts[-1:] + (leaving.span - span))

    def scores(self, past: Past, moment: Moment) -> Tensor:
        """The sum of q . k over the queries, [batch, kv_heads, tokens]."""
        if moment.queries is None:
            raise PolicyError("no queries were noted; a compressor says in `window_queries` how many it needs")
        keys, queries, geometry = past.keys.float(), moment.queries.float(), moment.geometry
        if not moment.keys_rotated and moment.rotary is not None:
            steps = -(-queries.shape[2] // geometry.tokens_per_step)
            were = geometry.positions(moment.step - steps, moment.step, moment.device)[-queries.shape[2] :]
            keys, queries = moment.rotary.rotate(keys, past.offsets), moment.rotary.rotate(queries, were)
        asked = queries.sum(2).unflatten(1, (keys.shape[1], -1)).sum(2)  # query heads of one KV head
        liked: Tensor = (keys @ asked[..., None])[..., 0]
        return liked

    def compressed_tokens(self, tokens: int) -> int:
        return tokens

    def mid_tokens(self, geometry: Geometry) -> int:
        return self.frames * geometry.tokens_per_step
