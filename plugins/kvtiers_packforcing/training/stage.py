"""What a stage of training has to say: its model, its loss at a step, and how well it does."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvtiers_packforcing.training.config import TrainingConfig
from kvtiers_packforcing.training.seeding import seed_of


class Stage(abc.ABC):
    """A model and its loss. All that is random depends on the run's seed and the step alone, so runs can be resumed."""

    name: ClassVar[str]
    model_config: ClassVar[type]
    phase_config: ClassVar[type]

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        torch.manual_seed(seed_of(config.run.seed, "weights"))  # modules of others draw their first weights from it
        self.model = self.make_model(config.model)

    @abc.abstractmethod
    def make_model(self, settings: Any) -> nn.Module:
        """The model with its first weights."""

    @abc.abstractmethod
    def loss(self, phase: Any, step: int, numbers: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The mean loss of some clips of a step, with its graph, and figures to log, without one.

        numbers: which of the step's clips. What is drawn for a clip depends on its own number, never on its companions,
        so that several processes can share a step.
        """

    def backward(self, phase: Any, step: int, numbers: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The same, after the gradients of the loss were added to the model's."""
        loss, figures = self.loss(phase, step, numbers)
        loss.backward()
        return loss.detach(), figures

    @abc.abstractmethod
    def evaluate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Figures of the model as it is now. Pictures may be written to `folder`."""

    @abc.abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model as it is now, for use."""
