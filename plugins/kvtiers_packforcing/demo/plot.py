"""Memory over time, and how alike what returns is to what was first seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from kvtiers_packforcing.demo.letters import MEMORY_COLOURS, ROOM_COLOURS
from kvtiers_packforcing.demo.returns import Return
from kvtiers_packforcing.tiny_world.vocabulary import ROOMS
from kvtiers_packforcing.tiny_world.walks import Walks


@attrs.frozen(kw_only=True)
class Told:
    """What is told of one memory. Bytes are by block; strangers: what a return is if nothing was kept, in dB;
    None if there is one room only.
    """

    device_bytes: Sequence[int]
    host_bytes: Sequence[int]
    attended: int
    seconds: float
    returns: Sequence[Return]
    strangers: float | None

    @property
    def identity(self) -> float | None:
        """How alike returns are to first visits, on average, in dB; None without returns."""
        return sum(one.psnr for one in self.returns) / len(self.returns) if self.returns else None


def draw_plot(path: Path, told: Mapping[str, Told], walks: Walks, *, block_bytes: int) -> None:
    """Write the plot as a PNG. block_bytes: of the keys and values of a block that is kept whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    seconds = range(1, walks.blocks + 1)
    figure, (memory, alike) = plt.subplots(2, 1, figsize=(9, 7.5), sharex=True, layout="constrained")
    memory.plot(
        seconds, [block_bytes * n / 1e6 for n in seconds], color="0.6", linestyle="--", label="everything kept whole"
    )
    for (name, one), colour in zip(told.items(), MEMORY_COLOURS * len(told), strict=False):
        memory.plot(seconds, [size / 1e6 for size in one.device_bytes], color=colour, linewidth=2, label=name)
        if any(one.host_bytes):
            host = [size / 1e6 for size in one.host_bytes]
            memory.plot(seconds, host, color=colour, linestyle=":", linewidth=2, label=f"{name}, on the host")
        at, level = [one.start for one in one.returns], [one.psnr for one in one.returns]
        alike.plot(at, level, color=colour, marker="o", markersize=5, linewidth=1.2, label=name)
    strangers = [one.strangers for one in told.values() if one.strangers is not None]
    if strangers:
        alike.axhline(sum(strangers) / len(strangers), color="0.6", linestyle="--", label="different rooms")
    for block, (room, curtained) in enumerate(zip(walks.rooms[0].tolist(), walks.curtains[0].tolist(), strict=True)):
        colour = ROOM_COLOURS[ROOMS[room]]
        alike.axvspan(block, block + 1, ymax=0.015 if curtained else 0.04, color=colour, linewidth=0)
    shown = {ROOMS[room] for room in walks.rooms[0].tolist()}
    for room in (room for room in ROOMS if room in shown):
        alike.plot([], [], color=ROOM_COLOURS[room], linewidth=6, label=room)
    memory.set(yscale="log", ylim=(0.1, None), ylabel="keys and values, MB", title="Memory over time")
    memory.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    alike.set(
        xlabel="seconds", ylabel="PSNR of a return, dB", title="Is a room that returns the room that was first seen?"
    )
    alike.xaxis.set_major_locator(MultipleLocator(10) if walks.blocks > 20 else MultipleLocator(1))
    alike.set_xlim(0, walks.blocks)
    low, high = alike.get_ylim()
    alike.set_ylim(low - 0.08 * (high - low), high)
    for axes in (memory, alike):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
