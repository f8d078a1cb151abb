"""All measures of videos at once, at one or several lengths."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
from jaxtyping import Float
from torch import Tensor

from kvtiers_packforcing.measures.agreement import agreement
from kvtiers_packforcing.measures.drift import drift
from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.ground import ground
from kvtiers_packforcing.measures.identity import identity
from kvtiers_packforcing.measures.motion import motion
from kvtiers_packforcing.measures.prompt import prompt
from kvtiers_packforcing.measures.reading import first_readings, read
from kvtiers_packforcing.measures.recogniser import Sightings
from kvtiers_packforcing.measures.scale import Scale, percent, plain
from kvtiers_packforcing.measures.steadiness import flicker, jumps
from kvtiers_packforcing.measures.visits import MeasureError, block_count, cut
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, Walks

SECONDS = (5, 30, 60, 120)
"""Lengths at which a video is measured, as far as it is that long."""


def _figure(scale: Scale) -> Any:
    return attrs.field(validator=attrs.validators.instance_of(Figure), metadata={"scale": scale})


@attrs.frozen(eq=False, kw_only=True)
class Measures:
    """What is measured of a batch of videos of `seconds`: a `Figure` each. The measures' own docstrings define them."""

    seconds: int
    identity: Figure = _figure(percent("identity after absence", main=True, paper="subject consistency ↑"))
    identity_net: Figure = _figure(percent("... less that of other rooms", main=True))
    identity_5_15: Figure = _figure(percent("... absent 5 to 15 s", main=True))
    identity_15_60: Figure = _figure(percent("... absent 15 to 60 s", main=True))
    identity_first: Figure = _figure(percent("... as at the very first visit"))
    recognised: Figure = _figure(percent("recognised at first visit", main=True))
    colour: Figure = _figure(percent("colour after absence"))
    form: Figure = _figure(percent("form after absence"))
    texture: Figure = _figure(percent("texture after absence"))
    place: Figure = _figure(percent("place after absence", main=True))
    elsewhere: Figure = _figure(percent("same as in another room", better="lower", truth=0.01))
    return_psnr: Figure = _figure(plain("picture after absence", "dB", better="higher", truth=40.0, main=True))
    return_psnr_5_15: Figure = _figure(plain("... absent 5 to 15 s", "dB", better="higher", truth=40.0))
    return_psnr_15_60: Figure = _figure(plain("... absent 15 to 60 s", "dB", better="higher", truth=40.0))
    return_ssim: Figure = _figure(plain("picture after absence", "SSIM", better="higher", truth=1.0, digits=3))
    ground_return: Figure = _figure(percent("ground after absence", main=True, paper="subject consistency ↑"))
    ground_stay: Figure = _figure(percent("ground within a visit"))
    dynamic_degree: Figure = _figure(percent("dynamic degree", main=True, paper="dynamic degree ↑"))
    motion: Figure = _figure(plain("motion", "px / half s", better="truth", truth=1.9, digits=2))
    prompt: Figure = _figure(percent("prompt agreement", main=True, paper="overall consistency ↑"))
    prompt_drop: Figure = _figure(
        percent("... first 10 s less last", better="lower", truth=0.0, main=True, paper="CLIP drop, turned ↓")
    )
    curtain: Figure = _figure(percent("curtain as prompted"))
    room: Figure = _figure(percent("room as named"))
    drift: Figure = _figure(plain("drift, last 15% to first", "log2", better="lower", truth=0.7, digits=2, main=True))
    drift_brightness: Figure = _figure(plain("... of brightness", "log2", better="truth", truth=0.0, digits=2))
    drift_contrast: Figure = _figure(plain("... of contrast", "log2", better="truth", truth=0.0, digits=2))
    drift_saturation: Figure = _figure(plain("... of saturation", "log2", better="truth", truth=0.0, digits=2))
    drift_detail: Figure = _figure(plain("... of detail", "log2", better="truth", truth=0.0, digits=2))
    border_jump: Figure = _figure(
        plain("jump at block borders", "ratio", better="truth", truth=1.0, digits=2, main=True)
    )
    flicker: Figure = _figure(plain("flicker", "of 255", better="lower", truth=0.0, digits=2, main=True))

    def figures(self) -> Mapping[str, Figure]:
        """Each figure by its name."""
        return {name: getattr(self, name) for name in SCALES}

    @classmethod
    def join(cls, parts: Sequence["Measures"]) -> "Measures":
        """The measures of several batches of the same length as of one."""
        lengths = {part.seconds for part in parts}
        if len(lengths) != 1:
            raise MeasureError(f"only videos of one length are measured together, got {sorted(lengths)} s")
        return cls(
            seconds=lengths.pop(), **{name: Figure.join([part.figures()[name] for part in parts]) for name in SCALES}
        )


SCALES: Mapping[str, Scale] = {
    field.name: field.metadata["scale"] for field in attrs.fields(Measures) if "scale" in field.metadata
}
"""What every figure of `Measures` counts, and which way is better."""


def measure_video(
    pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks, *, seen: Sightings | None = None
) -> Measures:
    """Measure videos in -1 to 1, each against its own walk, which may be longer. `seen`: what `read(pixels)` gave."""
    blocks = block_count(pixels, walks)
    walks = cut(walks, blocks)
    readings = read(pixels) if seen is None else seen
    return Measures(
        seconds=blocks,
        **identity(pixels, walks, seen=readings),
        **agreement(pixels, walks),
        **ground(pixels, walks, seen=readings),
        **motion(pixels, walks, seen=readings),
        **prompt(pixels, walks),
        **drift(pixels, walks),
        **jumps(pixels, walks),
        **flicker(pixels, walks),
    )


def measure_lengths(
    pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks, seconds: Iterable[int] = SECONDS
) -> Mapping[int, Measures]:
    """The measures of the first `seconds` of these videos, for each of `seconds` that they last.

    Videos are causal: their beginning is what a shorter video would have been.
    """
    blocks, readings = block_count(pixels, walks), read(pixels)
    found = {}
    for length in sorted({length for length in seconds if length <= blocks}):
        frames = length * FRAMES_PER_BLOCK - FIRST_FRAME
        found[length] = measure_video(pixels[:, :, :frames], walks, seen=first_readings(readings, frames))
    return found
