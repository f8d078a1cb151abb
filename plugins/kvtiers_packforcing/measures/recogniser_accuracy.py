"""How often the recogniser is right: `python -m kvtiers_packforcing.measures.recogniser_accuracy`.

On true frames and on what a codec makes of them. Houses are others than those that it was trained on.
"""

from pathlib import Path

import attrs
import click
import torch
from jaxtyping import Int
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvtiers_packforcing.measures.reading import read
from kvtiers_packforcing.measures.recogniser import SHIPPED, THING_NAMES, Recogniser, load
from kvtiers_packforcing.measures.rows import codec, drawn
from kvtiers_packforcing.measures.visits import clocks, readings_at, visits_of
from kvtiers_packforcing.tiny_world import FRAMES_PER_BLOCK, ROOMS, Houses, Walks, truth_of

_WALK = Walks.written(*((room, 2) for room in ROOMS))


@attrs.frozen(kw_only=True)
class Accuracy:
    """Shares of things in true houses: named right in a frame, each name alone, named right over a visit, recognised.

    off: how far centres are from the true ones, in pixels, on average.
    """

    in_a_frame: float
    colour: float
    form: float
    texture: float
    over_a_visit: float
    recognised: float
    off: float


def accuracy_of(net: Recogniser, autoencoder: Path | str | None, houses: int) -> Accuracy:
    """The accuracy on videos passed through an autoencoder, the linear codec (None), or on true ones ("truth")."""
    through = codec(autoencoder if isinstance(autoencoder, Path) else None)
    single, visit, found, off = [], [], [], []
    for nth in range(houses):
        seed = f"accuracy {nth}"
        pixels = drawn(seed, _WALK) if autoencoder == "truth" else torch.cat(list(through.make(seed, _WALK)), 2)
        seen, house = read(pixels, net), Houses.of_seeds([seed])
        for each in visits_of(_WALK, 0, _WALK.blocks):
            clock = clocks(each)
            readings = seen.at(0, readings_at(each, clock))
            wanted = _names(house, ROOMS.index(each.room))
            true = truth_of(house, _WALK, clock[None] + each.start * FRAMES_PER_BLOCK).centres[0]
            single.append(readings.thing_names() == wanted)
            visit.append((readings.over_time().thing_names() == wanted).all(-1))
            found.append(readings.recognised())
            off.append((readings.centres - true).norm(dim=-1))
    names = torch.cat(single).float()
    alone = dict(zip(THING_NAMES, names.mean((0, 1)).tolist(), strict=True))
    return Accuracy(
        in_a_frame=float(names.amin(-1).mean()),
        over_a_visit=float(torch.cat(visit).float().mean()),
        recognised=float(torch.cat(found).float().mean()),
        off=float(torch.cat(off).mean()),
        **alone,
    )


def _names(house: Houses, room: int) -> Int[Tensor, "things names"]:
    return torch.stack([getattr(house, name)[0, room] for name in THING_NAMES], -1)


@click.command()
@click.option("--weights", default=SHIPPED, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--autoencoder", multiple=True, type=click.Path(path_type=Path, file_okay=False), help="Of diffusers.")
@click.option("--houses", default=40, show_default=True, type=click.IntRange(min=1), help="Of six rooms each.")
def accuracy(weights: Path, autoencoder: tuple[Path, ...], houses: int) -> None:
    """Print how often names are right."""
    net, table = load(weights), Table(box=box.SIMPLE_HEAD)
    for column in ("pictures", *(field.name.replace("_", " ") for field in attrs.fields(Accuracy))):
        table.add_column(column)
    for name, how in [("truth", "truth"), ("linear codec", None), *((str(folder), folder) for folder in autoencoder)]:
        figures = attrs.asdict(accuracy_of(net, how, houses))
        off = figures.pop("off")
        table.add_row(name, *(f"{share:.1%}" for share in figures.values()), f"{off:.2f} px")
    Console().print(table)


if __name__ == "__main__":
    accuracy()
