"""What stage `student` is told."""

import math
from collections.abc import Mapping
from typing import Any

import attrs
from attrs import validators as v

from kvtiers.errors import suggest
from kvtiers_packforcing.tiny_world import CLIP_BLOCKS
from kvtiers_packforcing.training.config import Phase, TrainingConfigError, number, whole, yes_or_no
from kvtiers_packforcing.training.layout import LAYOUTS

_SHARES = {"packforcing": 0.5, "sink_window": 0.1, "compressed_past": 0.25, "no_sink": 0.05, "full": 0.1}


@attrs.frozen(kw_only=True)
class StudentConfig:
    """The size of the transformer and its compressor, and what clips are like.

    start: what another run of this stage exported, with whose weights this one begins; None: random ones.
    match_prompts: whether those weights are changed first, so that the model tells rooms apart by name and attends
    earlier blocks of the same name more.
    match_weight: of a loss that asks the queries of noisy blocks to like the keys of earlier blocks of the same room
    more than those of other rooms; 0: there is none.
    autoencoder: the folder of a trained one, for the compressor's low-resolution branch; None: its other branch alone.
    compressor_width: channels after the first convolution of the compressor's HR branch; each later one doubles them.
    clean_noise: the most noise that the clean past is given, as a share. position_gap_share: how often a clip's blocks
    are placed with gaps of up to `position_gap_blocks` blocks, so that positions beyond a clip's length are trained.
    prompt_drop_share: how often a noisy stream is told no prompt, so that sampling can be guided away from what the
    model makes without one.
    """

    start: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))
    match_prompts: bool = yes_or_no(default=False)
    match_weight: float = number(0.0, default=0.0)
    autoencoder: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))
    width: int = whole(12, default=128)
    layers: int = whole(1, default=4)
    heads: int = whole(1, default=4)
    ffn_width: int = whole(1, default=384)
    compressor_width: int = whole(1, default=16)
    clean_noise: float = number(0.0, 1.0, default=0.15)
    position_gap_share: float = number(0.0, 1.0, default=0.3)
    position_gap_blocks: int = whole(1, default=4)
    prompt_drop_share: float = number(0.0, 1.0, default=0.0)

    def __attrs_post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2 or self.width // self.heads < 6:
            raise TrainingConfigError(
                f"width must be heads times an even number of at least 6, got {self.width} and {self.heads} heads"
            )
        if self.match_weight and self.layers < 2:
            raise TrainingConfigError(
                f"match_weight needs at least 2 layers, got {self.layers}: the first one knows no prompt yet"
            )
        if self.match_prompts and (self.layers < 2 or self.width // self.heads < 12):
            raise TrainingConfigError(
                "match_prompts needs at least 2 layers and heads of 12 channels, got "
                f"{self.layers} and {self.width // self.heads}; change the size, or leave it out"
            )


@attrs.frozen(kw_only=True)
class StudentPhase(Phase):
    """How long clips are, how many noisy versions of each a step has, and how often each layout of the past is drawn.

    clip_blocks: 5 to 32. Longer clips have more compressed blocks to choose from, as a video has.
    layouts: by name, see `LAYOUTS`; numbers in proportion to which a step's layout is drawn.
    """

    clip_blocks: int = whole(CLIP_BLOCKS, 32, default=CLIP_BLOCKS)
    noisy_streams: int = whole(1, default=3)
    layouts: Mapping[str, float] = attrs.field(factory=_SHARES.copy)

    @layouts.validator
    def _check_layouts(self, _: object, shares: Any) -> None:
        if not isinstance(shares, Mapping) or not shares:
            raise TrainingConfigError(f"layouts must be a table of numbers by layout, got {shares!r}")
        for name, share in shares.items():
            if name not in LAYOUTS:
                raise TrainingConfigError(
                    f"layouts: {name!r} is no layout; choose from {', '.join(LAYOUTS)}.{suggest(name, LAYOUTS)}"
                )
            if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share < math.inf:
                raise TrainingConfigError(f"layouts: {name} must be a number of at least 0, got {share!r}")
        if not sum(shares.values()):
            raise TrainingConfigError("layouts: give at least one layout a number above 0")
