"""What stage `student` is told."""

import attrs
from attrs import validators as v

from kvtiers_packforcing.training.config import Phase, TrainingConfigError, number, whole

_SHARES = ("packforcing_share", "sink_window_share", "compressed_past_share", "no_sink_share", "full_share")


@attrs.frozen(kw_only=True)
class StudentConfig:
    """The size of the transformer and its compressor. Shares say how often a layout is drawn; the rest is a window.

    autoencoder: the folder of a trained one, for the compressor's low-resolution branch; none: its other branch alone.
    compressor_width: channels after the first convolution of the compressor's HR branch; each later one doubles them.
    clean_noise: the most noise that the clean past is given, as a share. position_gap_share: how often a clip's blocks
    are placed with gaps of up to `position_gap_blocks` blocks, so that positions beyond a clip's length are trained.
    """

    autoencoder: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))
    width: int = whole(12, default=128)
    layers: int = whole(1, default=4)
    heads: int = whole(1, default=4)
    ffn_width: int = whole(1, default=384)
    compressor_width: int = whole(1, default=16)
    packforcing_share: float = number(0.0, 1.0, default=0.5)
    sink_window_share: float = number(0.0, 1.0, default=0.1)
    compressed_past_share: float = number(0.0, 1.0, default=0.25)
    no_sink_share: float = number(0.0, 1.0, default=0.05)
    full_share: float = number(0.0, 1.0, default=0.1)
    clean_noise: float = number(0.0, 1.0, default=0.15)
    position_gap_share: float = number(0.0, 1.0, default=0.3)
    position_gap_blocks: int = whole(1, default=4)

    def __attrs_post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2 or self.width // self.heads < 6:
            raise TrainingConfigError(
                f"width must be heads times an even number of at least 6, got {self.width} and {self.heads} heads"
            )
        if sum(getattr(self, name) for name in _SHARES) > 1:
            raise TrainingConfigError(f"{', '.join(_SHARES)} must not be more than 1 together")


@attrs.frozen(kw_only=True)
class StudentPhase(Phase):
    """How many noisy versions of each clip a step has."""

    noisy_streams: int = whole(1, default=3)
