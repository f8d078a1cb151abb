"""From the figures of many videos to one, with an interval that says how sure it is."""

import itertools
import math
from collections.abc import Sequence

import attrs
import torch
from jaxtyping import Int
from torch import Tensor

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.seeding import generator_of

_DRAWS = 2000
_LEVEL = 0.95


@attrs.frozen(kw_only=True)
class Summary:
    """A mean over the events of all videos, and its 95% interval. All are NaN where nothing was measured.

    low and high are NaN too where fewer than two videos say anything.
    """

    mean: float
    low: float
    high: float
    videos: int
    events: int


def summarise(figures: Figure | Sequence[Figure], *, draws: int = _DRAWS) -> Summary:
    """The mean, and a bootstrap interval over videos: those of one video are no independent events.

    Nor are videos of one group: groups are drawn, and with each all of its videos. Percentiles of the means of `draws`
    sets of as many groups, drawn with replacement, always by the same seed.
    """
    parts = [figures] if isinstance(figures, Figure) else list(figures)
    whole = Figure.join(parts)
    there = whole.weights > 0
    values, weights = whole.values.nan_to_num().double(), whole.weights.double()
    owner = _owners(parts)[there]
    totals = torch.stack([torch.zeros(int(owner.max()) + 1 if len(owner) else 0, dtype=torch.float64)] * 2)
    totals = totals.index_add(1, owner, torch.stack((values * weights, weights))[:, there])
    totals = totals[:, totals[1] > 0]
    count, low, high = totals.shape[1], math.nan, math.nan
    if count > 1:
        drawn = torch.randint(count, (draws, count), generator=generator_of("bootstrap"))
        sums, events = totals[:, drawn].sum(2)
        ends = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
        low, high = (sums / events).quantile(ends).tolist()
    return Summary(mean=whole.mean(), low=low, high=high, videos=int(there.sum()), events=int(weights.sum()))


def _owners(figures: Sequence[Figure]) -> Int[Tensor, " batch"]:
    """A number for each video: the same for videos of one group."""
    known: dict[int, int] = {}
    found: list[int] = []
    following = itertools.count()
    for figure in figures:
        if figure.group is None:
            found += [next(following) for _ in figure.values]
        else:
            if figure.group not in known:
                known[figure.group] = next(following)
            found += [known[figure.group]] * len(figure.values)
    return torch.tensor(found, dtype=torch.int64)
