"""Identity after absence: is what comes back the same form, colour and texture, in the same place?

The things of a returning room are named beside those of its last visit before, at the same moments of the room's
clock. A model that is given prompts only invents what a room holds, so a video is compared with itself alone.

What was never painted so that it can be named counts as not kept; it is not left out. `recognised` says how much of
the first visits can be named. And what is the same in all rooms is no memory: `elsewhere` says how often a thing that
comes back is also that of another room, and `identity_net` takes that off.
"""

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.reading import known
from kvtiers_packforcing.measures.recogniser import Sightings
from kvtiers_packforcing.measures.visits import Visit, block_count, clocks, readings_at, visits_of
from kvtiers_packforcing.tiny_world import Walks

SPANS = {"5_15": (5, 15), "15_60": (15, 61)}
"""Lengths of absence that are told apart, in seconds: from the first number up to, not including, the second."""

NEAR = 6.0
"""Pixels. Things whose centres are no farther apart, on average, are in the same place."""


@attrs.frozen(eq=False, kw_only=True)
class _Return:
    """What is found of one return: for each of the two things, whether it agrees with an earlier visit."""

    hidden: int
    agree: Bool[Tensor, "halves names"]
    near: Bool[Tensor, " halves"]
    with_first: Bool[Tensor, " halves"]
    elsewhere: list[float]


def identity(
    pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks, *, seen: Sightings | None = None
) -> Mapping[str, Figure]:
    """Shares of 0 to 1, of the things that come back after 5 to 60 s (two for each return).

    A thing is recognised if the probabilities, averaged over the frames compared, are above 1/2 that it is there, and
    for one colour, one form and one texture. What is not recognised in both visits counts as lost in all of these.

    * `identity`: all three names are those of the last visit before; higher is better, truth 1. `identity_5_15` and
      `identity_15_60`: the same for absences of so many seconds. `colour`, `form`, `texture`: one name alone.
    * `place`: its centre is at most 6 pixels from where it was at the same moments, on average; truth 1.
    * `identity_first`: all three names are those of the room's very first visit; truth 1.
    * `elsewhere`: all three names are those of another room's first visit, in the same half; lower is better; truth
      about 0.01, a frozen picture 1.
    * `identity_net`: (identity - elsewhere) / (1 - elsewhere) of a video, 0 where elsewhere is 1; truth 1. By chance 0.
    * `recognised`: of the things of every room's first visit, what share is recognised; truth 1.

    seen: what `read(pixels)` gave, if it is at hand.
    """
    blocks, readings = block_count(pixels, walks), known(pixels, seen)
    videos, recognised = [], []
    for row in range(len(pixels)):
        visits = visits_of(walks, row, blocks)
        videos.append([_found(readings, row, visits, visit) for visit in visits if visit.returns])
        firsts = [readings.at(row, readings_at(v, clocks(v))).over_time() for v in visits if v.first is None]
        recognised.append([float(half) for first in firsts for half in first.recognised()])
    found: dict[str, Figure] = {"identity": _share(videos, lambda r: r.agree.all(-1))}
    for name, (least, end) in SPANS.items():
        some = [[r for r in returns if least <= r.hidden < end] for returns in videos]
        found[f"identity_{name}"] = _share(some, lambda r: r.agree.all(-1))
    found["colour"] = _share(videos, lambda r: r.agree[:, 0])
    found["form"] = _share(videos, lambda r: r.agree[:, 1])
    found["texture"] = _share(videos, lambda r: r.agree[:, 2])
    found["place"] = _share(videos, lambda r: r.near)
    found["identity_first"] = _share(videos, lambda r: r.with_first)
    found["elsewhere"] = Figure.of_events([one for r in returns for one in r.elsewhere] for returns in videos)
    found["identity_net"] = _net(found["identity"], found["elsewhere"])
    found["recognised"] = Figure.of_events(recognised)
    return found


def _found(readings: Sightings, row: int, visits: Sequence[Visit], visit: Visit) -> _Return:
    def at(other: Visit, *with_: Visit) -> Sightings:
        return readings.at(row, readings_at(other, clocks(other, *with_)))

    earlier, first = visits[visit.earlier or 0], visits[visit.first or 0]
    now, then = at(visit, earlier), at(earlier, visit)
    near = (now.centres - then.centres).norm(dim=-1).mean(0) <= NEAR
    now, then, whole = now.over_time(), then.over_time(), at(visit).over_time()
    both = now.recognised() & then.recognised()
    others = [v for v in visits if v.first is None and v.start < visit.start and v.room != visit.room]
    return _Return(
        hidden=visit.hidden or 0,
        agree=(now.thing_names() == then.thing_names()) & both[:, None],
        near=near & both,
        with_first=_same(at(visit, first).over_time(), at(first, visit).over_time()),
        elsewhere=[float(half) for other in others for half in _same(whole, at(other).over_time())],
    )


def _same(one: Sightings, other: Sightings) -> Bool[Tensor, " halves"]:
    """Whether both are recognised and named alike."""
    alike: Tensor = (one.thing_names() == other.thing_names()).all(-1) & one.recognised() & other.recognised()
    return alike


def _share(videos: Sequence[Sequence[_Return]], of: Callable[[_Return], Tensor]) -> Figure:
    return Figure.of_events([float(half) for r in returns for half in of(r)] for returns in videos)


def _net(same: Figure, elsewhere: Figure) -> Figure:
    """Without other rooms to compare with, or where all rooms are the same, nothing is told apart."""
    there = (same.weights > 0) & (elsewhere.weights > 0)
    room = 1 - elsewhere.values
    values = torch.where(room > 0, (same.values - elsewhere.values) / room.clamp(min=1e-6), 0.0)
    return Figure(values=torch.where(there, values, torch.nan), weights=same.weights * there)
