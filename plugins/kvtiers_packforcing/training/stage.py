"""What a stage of training has to say: its model, its loss at a step, and how well it does."""

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvtiers_packforcing.seeding import seed_of
from kvtiers_packforcing.training.config import TrainingConfig, TrainingConfigError

_CPU = torch.device("cpu")


class Stage(abc.ABC):
    """A model and its loss. All that is random depends on the run's seed and the step alone, so runs can be resumed."""

    name: ClassVar[str]
    model_config: ClassVar[type]
    phase_config: ClassVar[type]

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        torch.manual_seed(seed_of(config.run.seed, "weights"))  # modules of others draw their first weights from it
        self.device = self.place()
        self.model = self.make_model(config.model).to(self.device)

    @staticmethod
    def place() -> torch.device:
        """Where this process trains."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU

    @classmethod
    def preparation(cls, config: TrainingConfig) -> Callable[[], object]:
        """What one process does before any makes a stage, such as writing a file that all of them read.

        Every process asks, so that an error in the configuration ends them all.
        """
        return lambda: None

    @abc.abstractmethod
    def make_model(self, settings: Any) -> nn.Module:
        """The model with its first weights."""

    @classmethod
    def outline(cls, config: TrainingConfig) -> Any:
        """What a run would need, as an `Outline`, if its models are not on this machine; None if they are."""
        return None

    @property
    def origins(self) -> Mapping[str, Path]:
        """The folders of models that the run starts from, by field. A run goes on only while they hold the same."""
        return {}

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """What is trained, each with an optimiser of its own. `model` is averaged, evaluated and exported."""
        return {"model": self.model}

    def turn(self, step: int) -> str:
        """Which of the networks a step updates."""
        return "model"

    def peak_rate(self, network: str, phase: Any) -> float:
        """The highest learning rate of a network in a phase."""
        rate: float = phase.peak_rate
        return rate

    def betas(self, network: str) -> tuple[float, float]:
        """How slowly the optimiser of a network forgets gradients, and their squares."""
        return self.config.optimiser.betas

    def shard(self) -> None:
        """Cut the weights over all processes, as `[run] sharding` says."""
        raise TrainingConfigError(
            f"[run]: stage {self.name!r} cannot be cut into shards; its model is small: choose sharding = 'none'"
        )

    @abc.abstractmethod
    def loss(self, phase: Any, step: int, numbers: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The mean loss of some clips of a step, with its graph, and figures to log, without one.

        numbers: which of the step's clips. What is drawn for a clip depends on its own number, never on its companions,
        so that several processes can share a step.
        """

    def backward(self, phase: Any, step: int, numbers: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The same, after the gradients of the loss were added to those of the network whose turn it is."""
        loss, figures = self.loss(phase, step, numbers)
        loss.backward()
        return loss.detach(), figures

    @abc.abstractmethod
    def evaluate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Figures of the model as it is now. Pictures may be written to `folder`."""

    @abc.abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model as it is now, for use."""
