"""What a video compressor that works before the model hands to the integration that runs the model.

The integration asks for it by these names (`kvtiers_diffusers.reducing`); nothing of it is known to kvtiers' core.
"""

import attrs
from jaxtyping import Float
from torch import Tensor


@attrs.frozen(eq=False, kw_only=True)
class Reduced:
    """Input tokens of the transformer that stand for one block at reduced resolution.

    tokens: [batch, tokens, channels], what the patch embedding would have yielded.
    offsets: [tokens, axes], positions from the start of the block; span: steps it occupies when placed.
    """

    tokens: Float[Tensor, "batch tokens channels"]
    offsets: Float[Tensor, "tokens axes"]
    span: int
