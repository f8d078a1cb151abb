"""What `kvtiers compare` found, as Markdown, CSV and a picture."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from kvtiers_transformers.recall_picture import figure_class
from kvtiers_transformers.tasks import PERPLEXITIES

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
"""Student's t for a two-sided 95% interval, by degrees of freedom from 1 on."""

_COLUMNS = ("policy", "task", "texts", "score", "low", "high", "attended", "device_bytes", "host_bytes",
            "read_per_second", "seconds_per_token")  # fmt: skip
"""Of `table.csv`: scores are shares from 0 to 1, or perplexities, with their 95% interval."""


@attrs.frozen(kw_only=True)
class Row:
    """One policy on one task with one seed.

    score: the share of answers that were given, or a perplexity. attended: the most tokens of a layer's last step.
    read_per_second: tokens of the text. seconds_per_token: of an answer; None where nothing was asked.
    """

    policy: str
    task: str
    seed: int
    score: float
    attended: int
    device_bytes: int
    host_bytes: int
    read_per_second: float
    seconds_per_token: float | None


def interval(values: Sequence[float], *, shares: bool = False) -> tuple[float, float, float]:
    """The mean and its 95% interval; that is the mean itself for fewer than two values.

    By Student's t; of `shares` of answers by Wilson's score. Each text counts as one observation, because its questions
    are not independent.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, mean, mean
    if shares:
        z = statistics.NormalDist().inv_cdf(0.975)
        middle, root = mean + z * z / (2 * count), z * (mean * (1 - mean) / count + z * z / (4 * count**2)) ** 0.5
        low, high = ((middle + sign * root) / (1 + z * z / count) for sign in (-1, 1))
        return mean, max(0.0, low), min(1.0, high)
    half = _T[min(count - 1, len(_T)) - 1] * statistics.stdev(values) / count**0.5
    return mean, mean - half, mean + half


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A line for each policy: its scores by task, and what it cost in the mean over tasks."""
    tasks, policies = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("task", "policy"))
    header = ["policy", *(f"{task} (ppl)" if task in PERPLEXITIES else task for task in tasks)]
    header += ["tokens attended", "device MB", "host MB", "read tokens/s", "ms a token"]
    lines = []
    for policy in policies:
        mine = [row for row in rows if row.policy == policy]
        cells = [_score(task, [row.score for row in mine if row.task == task]) for task in tasks]
        spoken = [row.seconds_per_token for row in mine if row.seconds_per_token is not None]
        costs = [
            f"{max(row.attended for row in mine):,}",
            f"{statistics.fmean(row.device_bytes for row in mine) / 1e6:.1f}",
            f"{statistics.fmean(row.host_bytes for row in mine) / 1e6:.1f}",
            f"{statistics.median(row.read_per_second for row in mine):,.0f}",
            f"{1000 * statistics.median(spoken):.1f}" if spoken else "",
        ]
        lines.append([policy, *cells, *costs])
    return header, lines


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    header, lines = table(rows)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def write_report(folder: Path, tables: Mapping[str, Sequence[Row]], title: str) -> None:
    """Write `table.md`, `table.csv` and `picture.png`. tables: rows by size, which heads a table or fills a column."""
    about = "Scores are the share of answers given, in percent, or perplexities (ppl)"
    if any(len({row.seed for row in rows}) > 1 for rows in tables.values()):
        about += ", with 95% intervals over texts"
    parts = [f"### {size}\n\n{markdown(rows)}\n" for size, rows in tables.items()]
    (folder / "table.md").write_text("\n".join([f"{title}. {about}.\n", *parts]), encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(["size", *_COLUMNS])
        csv.writer(file).writerows([size, *line] for size, rows in tables.items() for line in figures(rows))
    _draw(tables, title, folder / "picture.png")


def figures(rows: Sequence[Row]) -> list[list[object]]:
    """A line of plain numbers for each policy and task, as `_COLUMNS` heads them: costs are means over texts."""
    lines: list[list[object]] = []
    for policy, task in dict.fromkeys((row.policy, row.task) for row in rows):
        mine = [row for row in rows if (row.policy, row.task) == (policy, task)]
        spoken = [row.seconds_per_token for row in mine if row.seconds_per_token is not None]
        costs = [
            max(row.attended for row in mine),
            round(statistics.fmean(row.device_bytes for row in mine)),
            round(statistics.fmean(row.host_bytes for row in mine)),
            statistics.median(row.read_per_second for row in mine),
            statistics.median(spoken) if spoken else "",
        ]
        score = interval([row.score for row in mine], shares=task not in PERPLEXITIES)
        lines.append([policy, task, len(mine), *score, *costs])
    return lines


def _score(task: str, scores: Sequence[float]) -> str:
    if not scores:
        return ""
    scale, digits = (1, 2) if task in PERPLEXITIES else (100, 0)
    found = interval(scores, shares=task not in PERPLEXITIES)
    mean, low, high = (f"{scale * one:.{digits}f}" for one in found)
    return mean if len(scores) < 2 else f"{mean} ({low} to {high})"


def _draw(tables: Mapping[str, Sequence[Row]], title: str, out: Path) -> None:
    """One square for each policy, task with questions and size: how many answers were given."""
    every = [row for rows in tables.values() for row in rows]
    tasks = [task for task in dict.fromkeys(row.task for row in every) if task not in PERPLEXITIES]
    policies = list(dict.fromkeys(row.policy for row in every))
    if not tasks:
        out.unlink(missing_ok=True)  # of another set of tasks
        return
    size = (2.5 + 1.1 * len(tasks) * len(tables), 1.7 + 0.4 * len(policies))
    figure = figure_class()(figsize=size, layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        means = [
            [_mean([row.score for row in rows if (row.policy, row.task) == (policy, task)]) for task in tasks]
            for policy in policies
        ]
        axes.imshow(means, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        axes.set_yticks(range(len(policies)), policies if not axes.get_subplotspec().colspan.start else [])
        for y, line in enumerate(means):
            for x, mean in enumerate(line):
                if mean == mean:  # measured at this size
                    axes.text(x, y, f"{mean:.0%}", ha="center", va="center", color="white" if mean > 0.7 else "black")
        axes.set_title(name, fontsize="medium")
    figure.suptitle(f"Answers given: {title}", fontsize="medium")
    figure.savefig(out, dpi=120)


def _mean(scores: Sequence[float]) -> float:
    return statistics.fmean(scores) if scores else float("nan")
