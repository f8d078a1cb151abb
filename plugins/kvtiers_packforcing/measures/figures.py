"""What a measure gives: a figure of each video, with the number of events that it is the mean of."""

from collections.abc import Iterable, Sequence

import attrs
import torch
from jaxtyping import Float
from torch import Tensor


@attrs.frozen(eq=False, kw_only=True)
class Figure:
    """A figure of each video of a batch.

    values: means over the events of a video (returns, borders, ...). weights: how many events there were. Where there
    was none the weight is 0 and the value is NaN: the video says nothing. group: the videos of figures with the same
    group are not independent of each other; those without one are.
    """

    values: Float[Tensor, " batch"]
    weights: Float[Tensor, " batch"]
    group: int | None = None

    @classmethod
    def of_events(cls, videos: Iterable[Sequence[float]]) -> "Figure":
        """The means of each video's events."""
        rows = [torch.tensor(list(events), dtype=torch.float64) for events in videos]
        return cls(
            values=torch.stack([row.mean() for row in rows]).float(),
            weights=torch.tensor([float(len(row)) for row in rows]),
        )

    @classmethod
    def join(cls, figures: Sequence["Figure"]) -> "Figure":
        """The figures of several batches as of one."""
        return cls(
            values=torch.cat([figure.values for figure in figures]),
            weights=torch.cat([figure.weights for figure in figures]),
        )

    def mean(self) -> float:
        """Over all events of all videos; NaN if there are none."""
        there = self.weights > 0
        weights = self.weights[there].double()
        return float((self.values[there].double() * weights).sum() / weights.sum())
