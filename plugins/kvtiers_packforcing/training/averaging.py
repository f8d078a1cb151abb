"""An exponential moving average of a model's weights (EMA), and the model with it put in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average. It forgets quickly at first: after n steps its decay is at most (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, steps: int) -> None:
        """Take in the weights after `steps` steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        for name, weight in model.named_parameters():
            self.weights[name].lerp_(weight, 1 - decay)

    @contextmanager
    def put_in(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside of the block, and its own again after it."""
        own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        try:
            _copy(self.weights, model)
            yield
        finally:
            _copy(own, model)


@torch.no_grad()
def _copy(weights: dict[str, Tensor], model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        weight.copy_(weights[name])
