"""Figures that are kept in a file as they come, so that a long table goes on where it was stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.results import Results
from kvtiers_packforcing.measures.visits import MeasureError


class Kept:
    """A file of one JSON line for each row and walk: what it was made with, and the figures of its videos.

    A line that was not written whole is left out. made_with: settings of all lines. What was made with others does not
    count, and stays in the file.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        self.path, self.made_with = path, dict(made_with)
        self._lines: dict[str, Any] = {}
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise MeasureError(
                f"{path} cannot be read as figures that were kept: {error}; name another file"
            ) from error
        for line in text.splitlines():
            try:
                said = json.loads(line)
                self._lines[_key(said["of"])] = said["figures"]
            except (ValueError, TypeError, KeyError):
                continue

    def find(self, row: str, of: Mapping[str, Any]) -> Results | None:
        """What was kept of a row that was made of `of`, if anything was."""
        figures = self._lines.get(_key({**self.made_with, "row": row, **of}))
        return None if figures is None else _read(row, figures)

    def keep(self, row: str, of: Mapping[str, Any], results: Results) -> None:
        """Write the figures of a row for good."""
        figures = {
            str(length): {
                name: [[f.values.tolist(), f.weights.tolist(), f.group] for f in several]
                for name, several in named.items()
            }
            for length, named in results.rows[row].items()
        }
        line = {"of": {**self.made_with, "row": row, **of}, "figures": figures}
        self._lines[_key(line["of"])] = figures
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps(line) + "\n")


def _key(of: Mapping[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)


def _read(row: str, figures: Mapping[str, Any]) -> Results:
    found = Results(seconds=map(int, figures))
    found.rows[row] = {
        int(length): {
            name: [
                Figure(values=torch.tensor(values), weights=torch.tensor(weights), group=group)
                for values, weights, group in several
            ]
            for name, several in named.items()
        }
        for length, named in figures.items()
    }
    return found
