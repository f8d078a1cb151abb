"""Drift: what became of contrast, saturation and detail, in the last 15% of a video against its first 15%?"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.pictures import blur, luminance
from kvtiers_packforcing.measures.visits import block_count
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, Walks

SHARE = 0.15
_MOMENTS = (9, 13)
"""Frames of a block that are looked at: when neither door nor curtain moves."""
_FLOOR = 1e-3
_STATISTICS = ("_brightness", "_contrast", "_saturation", "_detail")


def drift(pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks) -> Mapping[str, Figure]:
    """Logarithms to base 2 of the last 15% of a video's open blocks against the first 15% (one block at least).

    * `drift_brightness` (mean), `drift_contrast` (standard deviation of brightness), `drift_saturation` (largest less
      smallest of the three colours) and `drift_detail` (RMS of brightness less itself blurred by 1.5 pixels): 1 is
      twice as much at the end, -1 half as much; 0 is best. Rooms differ, so a true video has up to 1 of
      either sign, and the mean of many about 0: read these as means.
    * `drift`: the largest of the four without its sign; lower is better. Since rooms differ, truth has about 0.7;
      saturated noise has 2 and more, and a picture that never changes 0.

    Curtains are left out. Videos with fewer than two open blocks say nothing.
    """
    blocks = block_count(pixels, walks)
    found: dict[str, list[list[float]]] = {name: [] for name in ("", *_STATISTICS)}
    for row, video in enumerate(pixels):
        open_blocks = (~walks.curtains[row, :blocks]).nonzero().flatten()
        count = max(1, round(SHARE * len(open_blocks)))
        if len(open_blocks) < 2:
            for events in found.values():
                events.append([])
            continue
        first, last = (_statistics(video, some) for some in (open_blocks[:count], open_blocks[-count:]))
        change = {name: math.log2((last[name] + _FLOOR) / (first[name] + _FLOOR)) for name in first}
        for name, value in change.items():
            found[name].append([value])
        found[""].append([max(abs(value) for value in change.values())])
    return {f"drift{name}": Figure.of_events(events) for name, events in found.items()}


def _statistics(video: Tensor, blocks: Tensor) -> Mapping[str, float]:
    frames = (blocks[:, None] * FRAMES_PER_BLOCK + torch.tensor(_MOMENTS)).flatten() - FIRST_FRAME
    shown = (video[:, frames].clamp(-1, 1) + 1) / 2
    light = luminance(shown)
    return {
        "_brightness": float(light.mean()),
        "_contrast": float(light.std((1, 2)).mean()),
        "_saturation": float((shown.amax(0) - shown.amin(0)).mean()),
        "_detail": float((light - blur(light, 1.5)).square().mean((1, 2)).sqrt().mean()),
    }
