"""The stages by name, and how a configuration file finds its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtiers.errors import suggest
from kvtiers_packforcing.training.autoencoder import AutoencoderStage
from kvtiers_packforcing.training.config import TrainingConfig, TrainingConfigError, config_of, read_table
from kvtiers_packforcing.training.distill import DistillStage
from kvtiers_packforcing.training.sharing import once
from kvtiers_packforcing.training.stage import Stage
from kvtiers_packforcing.training.student import StudentStage
from kvtiers_packforcing.training.wan import WanDistillStage

_ALL: tuple[type[Stage], ...] = (AutoencoderStage, StudentStage, DistillStage, WanDistillStage)
STAGES: Mapping[str, type[Stage]] = {stage.name: stage for stage in _ALL}


def load_config(path: Path | str) -> TrainingConfig:
    """The configuration in a TOML file. Loads no model."""
    table = read_table(path)
    try:
        return config_of(table, *_classes(table))
    except TrainingConfigError as error:
        raise TrainingConfigError(f"{path}: {error}") from error


def make_stage(config: TrainingConfig) -> Stage:
    """The stage that a configuration names, with its model. Every process calls it at the same time."""
    kind = STAGES[config.run.stage]
    once(kind.preparation(config))
    return kind(config)


def _classes(table: Mapping[str, Any]) -> tuple[type, type]:
    run = table.get("run", {})
    name = run.get("stage") if isinstance(run, Mapping) else None
    if not isinstance(name, str) or name not in STAGES:
        raise TrainingConfigError(
            f"[run]: stage must be one of {', '.join(STAGES)}, got {name!r}.{suggest(name, STAGES)}"
        )
    return STAGES[name].model_config, STAGES[name].phase_config
