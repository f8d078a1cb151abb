"""Models that other stages exported, read from their folders. A folder without one is refused by name."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn

from kvtiers_packforcing.network import HighResolution
from kvtiers_packforcing.training.config import TrainingConfigError

_PARTS = {"transformer": WanTransformer3DModel, "compressor": HighResolution}


def check_student(field: str, folder: str) -> None:
    """Raise `TrainingConfigError` unless a folder holds what stage `student` exports. Loads nothing."""
    for part in _PARTS:
        if not (Path(folder) / part / "config.json").is_file():
            raise TrainingConfigError(
                f"[model]: {field}: {folder} holds no {part} (no {part}/config.json); give the export folder of a run "
                "of stage 'student' (kvtiers train STUDENT.toml --export writes it)"
            )


def load_student(folder: str) -> nn.ModuleDict:
    """The transformer and the compressor that stage `student` exported."""
    parts: dict[str, Any] = {name: kind.from_pretrained(Path(folder) / name) for name, kind in _PARTS.items()}
    return nn.ModuleDict(parts)


def check_autoencoder(folder: str | None) -> None:
    """Raise `TrainingConfigError` unless a folder holds an autoencoder, or there is none to be."""
    if folder is not None and not (Path(folder) / "config.json").is_file():
        raise TrainingConfigError(f"[model]: autoencoder: {folder} holds no autoencoder; train one, or leave it out")


def frozen_autoencoder(folder: str | None, device: torch.device) -> Any:
    """An autoencoder that is not trained, or None if there is none to be."""
    check_autoencoder(folder)
    if folder is None:
        return None
    return AutoencoderKLWan.from_pretrained(folder).eval().requires_grad_(False).to(device)


def digest_of(folder: Path) -> str:
    """A SHA-256 of all files of a folder and their names."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
