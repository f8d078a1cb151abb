"""The picture of `kvtiers bench recall`: tokens attended against the perplexity of the text, and against keys found."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvtiers import MissingExtraError

_COLOURS = ("#444444", "#d55e00", "#0072b2", "#007a5a", "#aa3377", "#8a6d00")
"""Dark enough to be read on white, and told apart by colour-blind readers."""
_LINE = 0.075
"""Height of a line of a label, as a share of the panel's."""
_MIDDLE = 0.6
"""Dots within this share of the panel's width have their labels on the right, those beyond on the left."""


@attrs.frozen(kw_only=True)
class Point:
    """One policy: tokens attended, the perplexity of the text, and keys found."""

    label: str
    attended: int
    perplexity: float
    found: int


@attrs.frozen(kw_only=True)
class _Dot:
    """What one panel shows of a point."""

    at: tuple[float, float]
    label: str
    colour: str


def figure_class() -> Any:
    """Matplotlib's `Figure`. Raises `MissingExtraError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "a picture is drawn by matplotlib, which is not installed; run: pip install 'kvtiers[cli]', or leave out "
            "--picture"
        ) from error
    return Figure


def picture(points: Sequence[Point], *, asked: int, title: str) -> Any:
    """A figure of two panels, one point per policy; of one panel if no key was `asked` for."""
    figure = figure_class()(figsize=(9.6 if asked else 5, 3.9), layout="constrained")
    figure.suptitle(title)
    left, *right = figure.subplots(1, 2 if asked else 1, squeeze=False)[0]
    values = [point.perplexity for point in points]
    margin = 0.15 * (max(values) - min(values)) or 1.0
    left.set(title="perplexity of the text (lower is better)", ylim=(min(values) - margin, max(values) + margin))
    _panel(left, points, lambda point: point.perplexity, lambda point: f"{point.perplexity:.1f}")
    for panel in right:
        panel.set(title="keys found (higher is better)", ylim=(-0.08 * asked, 1.08 * asked))
        panel.set_yticks(range(0, asked + 1, max(asked // 3, 1)))
        _panel(panel, points, lambda point: point.found, lambda point: f"{point.found} of {asked}")
    return figure


def draw(points: Sequence[Point], *, asked: int, title: str, out: Path) -> None:
    """Write the picture to the file `out`."""
    picture(points, asked=asked, title=title).savefig(out, dpi=130)


def _panel(panel: Any, points: Sequence[Point], height: Callable[[Point], float], told: Callable[[Point], str]) -> None:
    """Draw `points` at their `height`, each with its name and what is `told` of it beside it."""
    widest = 1.1 * max(point.attended for point in points)
    panel.set(xlabel="tokens attended", xlim=(0, widest))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    dots = [
        _Dot(
            at=(float(point.attended), float(height(point))),
            label=point.label.replace(":", ":\n").replace(",", ",\n") + f"  {told(point)}",
            colour=_COLOURS[number % len(_COLOURS)],
        )
        for number, point in enumerate(points)
    ]
    for number, dot in enumerate(dots):
        size = 50 + 110 * sum(other.at == dot.at for other in dots[number + 1 :])  # of dots at one place one sees rings
        panel.scatter(*dot.at, s=size, color=dot.colour, edgecolors="white", linewidths=1, zorder=3)
    _write(panel, [dot for dot in dots if dot.at[0] <= _MIDDLE * widest], to_left=False)
    _write(panel, [dot for dot in dots if dot.at[0] > _MIDDLE * widest], to_left=True)


def _write(panel: Any, dots: Sequence[_Dot], *, to_left: bool) -> None:
    """Write the labels of `dots` in a column to their left or right, each joined to its dot by a thin line."""
    if not dots:
        return
    (_, widest), (low, high) = panel.get_xlim(), panel.get_ylim()
    places = [dot.at[0] / widest for dot in dots]
    edge = min(places) - 0.06 if to_left else max(places) + 0.07
    sizes = [_LINE * (dot.label.count("\n") + 1) for dot in dots]
    for dot, centre in zip(dots, apart([(dot.at[1] - low) / (high - low) for dot in dots], sizes), strict=True):
        line = {"arrowstyle": "-", "color": dot.colour, "alpha": 0.4, "relpos": (to_left, 0.5), "shrinkB": 6}
        text = {"color": dot.colour, "fontsize": 9, "ha": "right" if to_left else "left", "va": "center"}
        panel.annotate(dot.label, dot.at, (edge, centre), textcoords="axes fraction", arrowprops=line, **text)


def apart(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Centres between 0 and 1 near those `wanted`, in their order, of labels of these `sizes`, none on another."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed, bottom, top = list(wanted), 0.0, 1.0
    for i in order:
        placed[i] = max(placed[i], bottom + sizes[i] / 2)
        bottom = placed[i] + sizes[i] / 2
    for i in reversed(order):
        placed[i] = min(placed[i], top - sizes[i] / 2)
        top = placed[i] - sizes[i] / 2
    return placed
