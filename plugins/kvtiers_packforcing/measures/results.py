"""The figures of several named rows (policies, truth, damages), as a table and as JSON, with the codec's ceiling."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvtiers_packforcing.measures.clip_scores import CLIP_SCALES, ClipScores
from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.measuring import SCALES, SECONDS, measure_lengths
from kvtiers_packforcing.measures.scale import Scale, plain
from kvtiers_packforcing.measures.summary import Summary, summarise
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, Walks

COST_SCALES: Mapping[str, Scale] = {
    "device_mb": plain("KV on the device", "MB", better="lower", truth=None, main=True, paper="4 GB, flat ↓"),
    "host_mb": plain("KV on the host", "MB", better="lower", truth=None, main=True),
    "block_seconds": plain("time of a block", "s", better="lower", truth=None, digits=3, main=True),
}
"""What a video cost to make. Known for videos that this command made."""
ALL_SCALES: Mapping[str, Scale] = {**SCALES, **CLIP_SCALES, **COST_SCALES}
_LABELS, _PAPER, _COLUMN = 34, 22, 13
"""How wide are the first column, the one of the paper, and each further one."""
_WIDE = 100
"""In a narrower terminal the paper's column makes room for a row."""
_ARROWS = {"higher": "↑", "lower": "↓", "truth": "="}


class Results:
    """What was measured so far. Add a row's videos one by one, or in batches; several rows may grow side by side."""

    def __init__(
        self, *, seconds: Iterable[int] = SECONDS, ceiling: str = "codec", scores: ClipScores | None = None
    ) -> None:
        self.seconds = tuple(sorted(set(seconds)))
        self.ceiling = ceiling
        self.scores = scores
        self.rows: dict[str, dict[int, dict[str, list[Figure]]]] = {}

    def add(
        self,
        row: str,
        pixels: Float[Tensor, "batch 3 frames height width"],
        walks: Walks,
        *,
        group: int | None = None,
    ) -> None:
        """Measure videos of a row at each of `seconds` that they last, and keep the figures, not the pixels.

        group: of videos that are not independent, such as those of one walk. None: each is independent of all others.
        """
        lengths = self.rows.setdefault(row, {})
        for length, measures in measure_lengths(pixels, walks, self.seconds).items():
            figures = dict(measures.figures())
            if self.scores is not None:
                figures |= self.scores.figures(pixels[:, :, : length * FRAMES_PER_BLOCK - FIRST_FRAME], walks)
            kept = lengths.setdefault(length, {})
            for name, figure in figures.items():
                kept.setdefault(name, []).append(attrs.evolve(figure, group=group))

    def note(self, row: str, figures: Mapping[int, Mapping[str, Figure]]) -> None:
        """Add figures that are not measured on pixels, at each length, by the names of `COST_SCALES`."""
        lengths = self.rows.setdefault(row, {})
        for length, named in figures.items():
            kept = lengths.setdefault(length, {})
            for name, figure in named.items():
                kept.setdefault(name, []).append(figure)

    def take(self, other: "Results") -> None:
        """Add all figures of other results to these."""
        for row, lengths in other.rows.items():
            self.note(row, {})
            for length, named in lengths.items():
                for name, figures in named.items():
                    self.rows[row].setdefault(length, {}).setdefault(name, []).extend(figures)

    def summaries(self, row: str, seconds: int) -> Mapping[str, Summary]:
        """The figures of a row's videos at a length, by name."""
        kept = self.rows.get(row, {}).get(seconds, {})
        return {name: summarise(figures) for name, figures in kept.items()}

    def lengths(self) -> list[int]:
        """The lengths at which something was measured."""
        return sorted({length for lengths in self.rows.values() for length in lengths})

    def write(self, path: Path) -> None:
        """Write all of it as JSON. What was not measured is null."""
        rows = [
            {
                "name": row,
                "ceiling": row == self.ceiling,
                "seconds": {str(n): {k: _plain(s) for k, s in self.summaries(row, n).items()} for n in sorted(lengths)},
            }
            for row, lengths in self.rows.items()
        ]
        measures = {name: attrs.asdict(scale) for name, scale in ALL_SCALES.items()}
        beside = path.with_name(f"{path.name}.part")
        beside.write_text(json.dumps({"measures": measures, "rows": rows}, indent=1, allow_nan=False), encoding="utf-8")
        beside.replace(path)  # it may be written again and again while more is measured

    def print(self, console: Console, *, everything: bool = False) -> None:
        """Tables for each length: a line for each measure, a column for each row, the codec's first in every table."""
        others = [row for row in self.rows if row != self.ceiling]
        paper = console.width >= _WIDE
        fit = max(1, (console.width - _LABELS - paper * _PAPER) // _COLUMN - 1)
        for seconds in self.lengths():
            for first in range(0, max(1, len(others)), fit):
                shown = others[first : first + fit]
                console.print(self.table(seconds, shown, everything=everything, paper=paper))
        console.print(
            "↑ higher is better, ↓ lower, = nearest to truth. ± is half of the 95% interval over videos. "
            f"{self.ceiling}: the true videos, passed through the codec, which no model can be expected to exceed. "
            "-: nothing of the kind happens.",
            style="dim",
        )

    def table(self, seconds: int, rows: Iterable[str], *, everything: bool = False, paper: bool = True) -> Table:
        """The figures of some rows at one length, beside the ceiling. Without `everything`: the main measures.

        paper: whether a column says what PackForcing reports of the kind.
        """
        shown = [row for row in (self.ceiling, *rows) if seconds in self.rows.get(row, {})]
        found = {row: self.summaries(row, seconds) for row in shown}
        videos = max((summary["flicker"].videos for summary in found.values()), default=0)
        title = f"{seconds} s, {videos} video{'s' if videos > 1 else ''} a row"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("measure", no_wrap=True)
        if paper:
            table.add_column("in the paper", overflow="fold", style="dim")
        for row in shown:
            table.add_column(row, justify="right", overflow="fold", style="dim" if row == self.ceiling else None)
        for name, scale in ALL_SCALES.items():
            cells = [_cell(scale, found[row][name]) if name in found[row] else "" for row in shown]
            if (scale.main or everything) and any(cells):
                label = f"{scale.label}, {scale.unit} {_ARROWS[scale.better]}"
                table.add_row(label, *([scale.paper] if paper else []), *cells)
        return table


def _cell(scale: Scale, summary: Summary) -> str:
    if math.isnan(summary.mean):
        return "-"
    sure = "" if math.isnan(summary.low) else f" ±{scale.shown((summary.high - summary.low) / 2)}"
    return scale.shown(summary.mean) + sure


def _plain(summary: Summary) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in attrs.asdict(summary).items()}
