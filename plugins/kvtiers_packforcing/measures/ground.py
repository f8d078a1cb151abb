"""Ground consistency: does a room keep its ground, while it is in sight and while it is not?"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.pictures import correlation
from kvtiers_packforcing.measures.reading import known, outside_things
from kvtiers_packforcing.measures.recogniser import Sightings
from kvtiers_packforcing.measures.visits import Visit, block_count, clocks, frames_at, readings_at, visits_of
from kvtiers_packforcing.tiny_world import Walks

_REACH = 15.0
"""Pixels around a thing's centre that are not ground: a radius of 12 at most, and what a codec smears."""


def ground(
    pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks, *, seen: Sightings | None = None
) -> Mapping[str, Figure]:
    """Of the pixels that are farther than 15 from the centre of every thing.

    * `ground_return`: their correlation with those of the last visit before, at the same moments, of every return after
      5 to 60 s; -1 to 1, higher is better, truth 1, flat pictures 0.
    * `ground_stay`: the correlation of a visit's last frame with its first one, of visits of 2 s and longer; truth 1.

    seen: what `read(pixels)` gave, if it is at hand.
    """
    blocks, readings = block_count(pixels, walks), known(pixels, seen)
    returning, staying = [], []
    for row, video in enumerate(pixels):
        visits = visits_of(walks, row, blocks)
        pairs = [(visit, visits[visit.earlier or 0]) for visit in visits if visit.returns]
        returning.append([_alike(video, readings, row, *pair) for pair in pairs])
        staying.append([_kept(video, readings, row, visit) for visit in visits if visit.blocks > 1])
    return {
        "ground_return": Figure.of_events(returning),
        "ground_stay": Figure.of_events(staying),
    }


def _alike(video: Tensor, readings: Sightings, row: int, visit: Visit, earlier: Visit) -> float:
    """At the first, the middle and the last moment that both visits show."""
    clock = clocks(visit, earlier)
    clock = clock[[0, len(clock) // 2, -1]]
    found = []
    for moment in clock:
        one, other = (readings_at(v, moment[None]) for v in (visit, earlier))
        where = outside_things(readings.at(row, one.new_tensor([*one, *other])), _REACH, *video.shape[2:])
        now, then = (video[:, frames_at(v, moment[None])[0]] for v in (visit, earlier))
        found.append(correlation(now, then, where))
    return sum(found) / len(found)


def _kept(video: Tensor, readings: Sightings, row: int, visit: Visit) -> float:
    ends = clocks(visit)[[0, -1]]
    first, last = frames_at(visit, ends)
    where = outside_things(readings.at(row, readings_at(visit, ends)), _REACH, *video.shape[2:])
    return correlation(video[:, last], video[:, first], where)
