"""Dynamic degree: do the things move that ought to?"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.reading import known
from kvtiers_packforcing.measures.recogniser import Sightings
from kvtiers_packforcing.measures.visits import STEP, block_count, clocks, readings_at, visits_of
from kvtiers_packforcing.tiny_world import Walks

_APART = 8
"""Frames between the two places of a thing: half a second."""

MOVES = 0.6
"""Pixels in half a second. A thing whose centre goes farther, on average, moves."""


def motion(
    pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks, *, seen: Sightings | None = None
) -> Mapping[str, Figure]:
    """Of the two things of every visit of 2 s and longer, while neither door nor curtain moves.

    * `dynamic_degree`: the share of things that go farther than 0.6 pixels in half a second, on average over the visit;
      0 to 1, higher is better, truth 1, a still picture 0.
    * `motion`: how far they go in half a second, in pixels; truth about 1.9, a still picture 0. What is far above
      truth is no merit: it is things that jump.

    Where nothing is seen that could move (probability below 1/2), nothing moves: it counts as 0. Noise and flicker are
    no motion, since it is centres that are followed.
    """
    blocks, readings = block_count(pixels, walks), known(pixels, seen)
    lengths: list[list[float]] = []
    for row in range(len(pixels)):
        lengths.append([])
        for visit in visits_of(walks, row, blocks):
            if visit.blocks > 1:
                path = readings.at(row, readings_at(visit, clocks(visit)))
                lag = _APART // STEP
                there = (path.present[lag:] > 0.5) & (path.present[:-lag] > 0.5)
                way = (path.centres[lag:] - path.centres[:-lag]).norm(dim=-1) * there
                lengths[-1] += way.mean(0).tolist()
    return {
        "dynamic_degree": Figure.of_events([float(length > MOVES) for length in video] for video in lengths),
        "motion": Figure.of_events(lengths),
    }
