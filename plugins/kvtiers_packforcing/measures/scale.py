"""How a figure is to be read: its unit, which way is better, and what a true video has."""

from typing import Literal

import attrs

Better = Literal["higher", "lower", "truth"]


@attrs.frozen(kw_only=True)
class Scale:
    """How a figure is shown.

    better: `higher`, `lower`, or `truth`: what is nearest to a true video's figure. truth: that figure, if it is known.
    paper: what PackForcing reports that is of this kind, and which way is better there. main: whether the short table
    shows it.
    """

    label: str
    unit: str
    better: Better
    truth: float | None
    factor: float = 1.0
    digits: int = 1
    paper: str = ""
    main: bool = False

    def shown(self, value: float) -> str:
        """As in a table, without the unit."""
        return f"{value * self.factor:.{self.digits}f}"


def percent(label: str, *, better: Better = "higher", truth: float = 1.0, paper: str = "", main: bool = False) -> Scale:
    """A share, or a correlation, shown in percent."""
    return Scale(label=label, unit="%", better=better, truth=truth, factor=100.0, paper=paper, main=main)


def plain(
    label: str, unit: str, *, better: Better, truth: float | None, digits: int = 1, paper: str = "", main: bool = False
) -> Scale:
    """A figure that is shown as it is."""
    return Scale(label=label, unit=unit, better=better, truth=truth, digits=digits, paper=paper, main=main)
