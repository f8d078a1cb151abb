"""Figures of a run, one JSON object a line. A run that is resumed leaves the file as if it had never stopped."""

import json
from collections.abc import Mapping
from pathlib import Path


class Metrics:
    """The file. Lines after `step` are dropped when it is opened: the run makes them again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            beside = path.with_name(f"{path.name}.part")
            beside.write_text("".join(kept), encoding="utf-8")
            beside.replace(path)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{key: _short(value) for key, value in figures.items()}}) + "\n")


def _short(value: float) -> float:
    return float(f"{value:.6g}")
