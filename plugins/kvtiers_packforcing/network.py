"""The HR branch of `dual-branch`, as a diffusers model: `from_pretrained`, `save_pretrained`."""

from collections.abc import Sequence
from itertools import pairwise

from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm

_EPSILON = 1e-6


class HighResolution(ModelMixin, ConfigMixin):
    """Latents to tokens by 3D convolutions: one halves time, three halve height and width, the last makes the width.

    channels: of the latents. width: of the transformer's tokens. widths: channels between.

    normalise: whether each cell of what the last convolution is given is divided by its root mean square, so that
    tokens stay about as long as the transformer's own. A transformer's layers see only the direction of a token, so
    without this nothing in training bounds its length, and what the layers add to a very long one (prompt, attention)
    is lost. The paper does not say.

    Source: PackForcing (arXiv 2603.25730) section 3.2. Kernels are 4 on strided axes, so that an odd length is cut as
    the patch embedding of the LR branch cuts it, and 3 on the others.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # (diffusers says little about its types)
    def __init__(
        self,
        channels: int = 16,
        width: int = 1536,
        widths: Sequence[int] = (32, 128, 512, 2048),
        normalise: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv3d(channels, widths[0], (4, 3, 3), (2, 1, 1), 1), nn.SiLU()]
        for before, after in pairwise(widths):
            layers += [nn.Conv3d(before, after, (3, 4, 4), (1, 2, 2), 1), nn.SiLU()]
        last = nn.Conv3d(widths[-1], width, 1)
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
        self.normalise = normalise
        self.layers = nn.Sequential(*layers, last)

    def forward(
        self, latents: Float[Tensor, "batch channels frames height width"]
    ) -> Float[Tensor, "batch token_width cells_frames cells_height cells_width"]:
        """Reduce a block of clean latents."""
        hidden = self.layers[:-1](latents)
        if self.normalise:
            hidden = rms_norm(hidden.movedim(1, -1), hidden.shape[1:2], eps=_EPSILON).movedim(-1, 1)
        reduced: Tensor = self.layers[-1](hidden)
        return reduced
