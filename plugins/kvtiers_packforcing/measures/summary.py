"""From the figures of many videos to one, with an interval that says how sure it is."""

import math

import attrs
import torch

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.seeds import generator_of

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


def summarise(figure: Figure, *, draws: int = _DRAWS) -> Summary:
    """The mean, and a bootstrap interval over videos: those of one video are no independent events.

    Percentiles of the means of `draws` sets of as many videos, drawn with replacement, always by the same seed.
    """
    there = figure.weights > 0
    values, weights = figure.values[there].double(), figure.weights[there].double()
    count, low, high = len(values), math.nan, math.nan
    if count > 1:
        drawn = torch.randint(count, (draws, count), generator=generator_of("bootstrap"))
        means = (values[drawn] * weights[drawn]).sum(1) / weights[drawn].sum(1)
        ends = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
        low, high = means.quantile(ends).tolist()
    return Summary(mean=figure.mean(), low=low, high=high, videos=count, events=int(weights.sum()))
