"""What a video compressor that works before the model hands to the integration that runs the model.

The integration asks for it by these names (`kvtiers_diffusers.reducing`); nothing of it is known to kvtiers' core.
"""

from collections.abc import Callable

import attrs
from jaxtyping import Float
from torch import Tensor


@attrs.frozen(eq=False, kw_only=True)
class Reduced:
    """Input tokens of the transformer that stand for one block at reduced resolution.

    make: gives `tokens`, when they are read, which is while the model runs.
    offsets: [tokens, axes], positions from the start of the block; span: steps it occupies when placed.
    """

    make: Callable[[], Float[Tensor, "batch tokens channels"]]
    offsets: Float[Tensor, "tokens axes"]
    span: int

    @property
    def tokens(self) -> Float[Tensor, "batch tokens channels"]:
        """What the patch embedding would have yielded."""
        return self.make()
