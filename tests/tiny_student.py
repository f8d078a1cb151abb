"""A tiny student as stage `student` exports it, and a stage `distill` that starts from it."""

from pathlib import Path
from typing import Any

import torch

from kvtiers_packforcing.training import config_of
from kvtiers_packforcing.training.distill import DistillStage
from kvtiers_packforcing.training.student import StudentStage

SMALL = {"width": 24, "layers": 2, "heads": 2, "ffn_width": 32}


def export_student(folder: Path, seed: int = 0) -> Path:
    """Random weights in every layer, also in those that begin at zero."""
    table = {
        "run": {"stage": "student", "folder": "nowhere", "seed": seed},
        "model": SMALL,
        "phases": [{"steps": 1, "peak_rate": 1e-3, "clips": 1}],
    }
    made = StudentStage(config_of(table, StudentStage.model_config, StudentStage.phase_config))
    torch.manual_seed(seed)
    for last in (made.transformer.proj_out, made.compressor.layers[-1]):
        torch.nn.init.normal_(last.weight, std=0.1)
    made.export(folder)
    return folder


def distill_table(start: Path, folder: Any = "nowhere", **changes: dict[str, Any]) -> dict[str, Any]:
    """The tables of a configuration. Changes are by table: run, optimiser, model, phase."""
    phase = {"steps": 6, "peak_rate": 1e-3, "critic_rate": 2e-3, "clips": 2}
    return {
        "run": {"stage": "distill", "folder": str(folder), "seed": 1, "log_every": 1} | changes.get("run", {}),
        "optimiser": {"betas": [0.0, 0.999], "warmup_steps": 0} | changes.get("optimiser", {}),
        "model": {"start": str(start), "critic_updates": 2, "timesteps": [1000, 500]} | changes.get("model", {}),
        "phases": [phase | changes.get("phase", {})],
    }


def distill_stage(start: Path, **changes: Any) -> DistillStage:
    """The stage of such a configuration."""
    table = distill_table(start, **changes)
    return DistillStage(config_of(table, DistillStage.model_config, DistillStage.phase_config))


def moved(made: DistillStage) -> DistillStage:
    """A stage whose generator and critic are no longer the teacher."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for networks in (made.model, made.critic):
            for weight in networks.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return made
