"""Training for PackForcing: a loop that resumes bit for bit, and the stages that it runs."""

from kvtiers_packforcing.training.checkpoint import CheckpointError
from kvtiers_packforcing.training.config import TrainingConfig, TrainingConfigError, config_of
from kvtiers_packforcing.training.stage import Stage
from kvtiers_packforcing.training.stages import STAGES, load_config, make_stage
from kvtiers_packforcing.training.trainer import Trainer

__all__ = [
    "CheckpointError",
    "STAGES",
    "Stage",
    "Trainer",
    "TrainingConfig",
    "TrainingConfigError",
    "config_of",
    "load_config",
    "make_stage",
]
