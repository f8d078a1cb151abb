"""Measures of videos of the tiny world: does what was hidden come back the same, and does it hold together?

`measure_video(pixels, walks)` measures videos against their prompts, since a generated video has no true house.
`kvtiers eval video` does it for files, and for true and deliberately damaged videos.
"""

from kvtiers_packforcing.measures.agreement import agreement
from kvtiers_packforcing.measures.damages import DAMAGES
from kvtiers_packforcing.measures.drift import drift
from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.ground import ground
from kvtiers_packforcing.measures.identity import identity
from kvtiers_packforcing.measures.measuring import SCALES, SECONDS, Measures, measure_lengths, measure_video
from kvtiers_packforcing.measures.motion import motion
from kvtiers_packforcing.measures.prompt import prompt
from kvtiers_packforcing.measures.reading import read
from kvtiers_packforcing.measures.recogniser import Recogniser, Sightings, recognise
from kvtiers_packforcing.measures.scale import Scale
from kvtiers_packforcing.measures.steadiness import flicker, jumps
from kvtiers_packforcing.measures.summary import Summary, summarise
from kvtiers_packforcing.measures.visits import MeasureError, Visit, visits_of

__all__ = [
    "DAMAGES",
    "Figure",
    "MeasureError",
    "Measures",
    "Recogniser",
    "SCALES",
    "SECONDS",
    "Scale",
    "Sightings",
    "Summary",
    "Visit",
    "agreement",
    "drift",
    "flicker",
    "ground",
    "identity",
    "jumps",
    "measure_lengths",
    "measure_video",
    "motion",
    "prompt",
    "read",
    "recognise",
    "summarise",
    "visits_of",
]
