"""Checkpoints: one safetensors file with all that a run needs to go on, bit for bit. It is there whole or not at all.

The file holds the weights (`model.`), their average (`average.`) and the two moments of AdamW (`first.`, `second.`),
all in their own dtype, and the same of a second network behind its name (`critic.model.`), except that it has no
average. Its metadata is JSON: the step, the updates of each network if there are several, the configuration, what
wrote it, and digests of the folders that the run started from. Nothing random is kept, since all that is random is
drawn from the seed and the step.

Tensors are whole, also those of a run whose weights are in shards; so a run can go on in another number of processes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtiers.errors import KVTiersError
from kvtiers_packforcing.training.averaging import Average
from kvtiers_packforcing.training.config import TrainingConfig, TrainingConfigError, config_of
from kvtiers_packforcing.training.learner import Learner
from kvtiers_packforcing.training.sharding import put, whole

_FORMAT = "kvtiers training checkpoint 1"


class CheckpointError(KVTiersError, ValueError):
    """When a checkpoint cannot be read, or belongs to another run than the one that is to go on from it."""


def save_checkpoint(
    path: Path,
    *,
    step: int,
    config: TrainingConfig,
    learners: Sequence[Learner],
    average: Average,
    writes: bool = True,
    origins: Mapping[str, str] | None = None,
) -> None:
    """Write everything to `path`, in one move.

    writes: whether this process is the one that writes; the others only give their shards. origins: a digest of each
    folder that the run started from, by field.
    """
    parts = {f"average.{name}": weight for name, weight in average.weights.items()}
    for learner in learners:
        parts |= learner.tensors()
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():  # one by one, so that no device holds all of a model that is in shards
        full = whole(part)
        if writes:
            tensors[name] = full.cpu()
    if not writes:
        return
    said = {"format": _FORMAT, "step": step, "torch": torch.__version__, "config": described(config)}
    if origins:
        said["origins"] = dict(origins)
    if len(learners) > 1:
        said["updates"] = {learner.name: learner.updates for learner in learners}
    beside = path.with_name(f"{path.name}.part")
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(held, beside, {"kvtiers": json.dumps(said)})
    beside.replace(path)
    _settle(path.parent)


def load_checkpoint(
    path: Path,
    *,
    config: TrainingConfig,
    learners: Sequence[Learner],
    average: Average,
    origins: Mapping[str, str] | None = None,
) -> int:
    """Put everything back and return the step.

    The configuration must say the same, except where and when to write, and the folders that the run started from must
    hold the same.
    """
    said, tensors = read_checkpoint(path)
    if (mine := _binding(described(config))) != (theirs := _binding(_now(said["config"], config, path))):
        other = [f"{table}.{key}" for table in mine for key in _other(mine[table], theirs.get(table))]
        raise CheckpointError(
            f"{path} was made with another configuration ({', '.join(other)}); choose another folder, or delete the "
            "file to begin anew"
        )
    was = said.get("origins", {})  # an older checkpoint says nothing of them
    if changed := [name for name, digest in (origins or {}).items() if was.get(name, digest) != digest]:
        raise CheckpointError(
            f"{path} was made when the folder of {', '.join(changed)} held other files; put those back, choose another "
            "folder for the run, or delete the file to begin anew"
        )
    step = int(said["step"])
    for learner in learners:
        learner.restore(tensors, int(said.get("updates", {}).get(learner.name, step)))
    for name, weight in average.weights.items():
        put(weight, tensors[f"average.{name}"])
    return step


def read_checkpoint(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """What a checkpoint says, and its tensors."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get("kvtiers", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint that can be read: {error}") from error
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no training checkpoint of kvtiers")
    return said, tensors


def described(config: TrainingConfig) -> dict[str, Any]:
    """A configuration as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(attrs.asdict(config)))
    return plain


def _now(said: Any, config: TrainingConfig, path: Path) -> dict[str, Any]:
    """What a checkpoint says of its configuration, with today's defaults for fields that did not exist then."""
    try:
        return described(config_of(said, type(config.model), type(config.phases[0])))
    except TrainingConfigError as error:
        raise CheckpointError(f"{path} was made with a configuration that is no longer known: {error}") from error


def _binding(said: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration changes the result: not the folder, and not when something is written."""
    run = {key: value for key, value in said["run"].items() if key in ("stage", "seed", "precision", "compile")}
    return {**said, "run": run}


def _other(mine: Any, theirs: Any) -> list[str]:
    if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
        return ["..."] if mine != theirs else []
    return [key for key in mine if mine[key] != theirs.get(key)]


def _settle(folder: Path) -> None:
    """Have the file system write down that the file has its new name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
