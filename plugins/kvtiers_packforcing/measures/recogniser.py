"""A small convnet that names what a frame shows: a thing in each half, its colour, form, texture and place.

It needs no true positions, so it works on generated frames. Its weights come with the package; `recogniser_training`
says how they are made, and `recogniser_accuracy` how often names are right.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import attrs
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from kvtiers_packforcing.tiny_world import COLOURS, FORMS, TEXTURES, WIDTH
from kvtiers_packforcing.tiny_world.houses import CURTAIN_GAP

SHIPPED = Path(__file__).parent / "recogniser.safetensors"
CELL = 4
"""Pixels of a cell: the net says for each cell whether the centre of a thing is in it."""

HALVES = ((CURTAIN_GAP, (CURTAIN_GAP + WIDTH) // 2), ((CURTAIN_GAP + WIDTH) // 2, WIDTH))
"""The columns of pixels in which the first and the second thing of a room live."""

RECOGNISED = 0.5
"""How probable a thing and each of its names must be to count as recognised."""

_BATCH = 64
_WIDTHS = (24, 40, 56)
THING_NAMES = {"colour": len(COLOURS), "form": len(FORMS), "texture": len(TEXTURES)}
"""What a thing is named by, and how many names there are of each kind."""
_SIZES = list(THING_NAMES.values())


class Recogniser(nn.Module):
    """The net: 89,000 weights, four pixels to a cell, each cell sees 39 x 39 pixels."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = _WIDTHS
        self.trunk = nn.Sequential(
            *_layer(3, first, 5, 2), *_layer(first, second, 3, 2), *_layer(second, third), *_layer(third, third)
        )
        last = nn.Conv2d(third, 3 + sum(THING_NAMES.values()), 1)
        rare = torch.zeros(last.out_channels)
        rare[0] = -5.0  # most cells hold no centre
        last.bias = nn.Parameter(rare)
        self.things = nn.Sequential(*_layer(third, third), last)

    def forward(self, frames: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames outputs rows columns"]:
        """For each cell: whether it holds a centre (logit), where in it (x, y; logits), and the names' logits."""
        cells: Tensor = self.things(self.trunk(frames.clamp(-1, 1)))
        return cells


def _layer(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> Sequence[nn.Module]:
    return (
        nn.Conv2d(inputs, outputs, size, stride, size // 2),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


@attrs.frozen(eq=False, kw_only=True)
class Sightings:
    """What is named in frames.

    names: probabilities of colour, form and texture, in this order, of the most probable thing in each half.
    centres: (x, y) in pixels. present: how probable it is that there is a thing.
    """

    present: Float[Tensor, "*frames halves"]
    centres: Float[Tensor, "*frames halves 2"]
    names: Float[Tensor, "*frames halves thing_names"]

    def at(self, row: int, frames: Int[Tensor, " chosen"]) -> "Sightings":
        """Some frames of one video."""
        return Sightings(**{f.name: getattr(self, f.name)[row, frames] for f in attrs.fields(Sightings)})

    def over_time(self) -> "Sightings":
        """One sighting of what several frames show: the mean of their probabilities."""
        return Sightings(**{f.name: getattr(self, f.name).mean(0) for f in attrs.fields(Sightings)})

    def thing_names(self) -> Int[Tensor, "*frames halves 3"]:
        """The most probable colour, form and texture."""
        return torch.stack([part.argmax(-1) for part in self.names.split(_SIZES, -1)], -1)

    def recognised(self) -> Bool[Tensor, "*frames halves"]:
        """Whether a thing is there, and each of its names is more probable than all others together."""
        sure = torch.stack([part.amax(-1) for part in self.names.split(_SIZES, -1)], -1)
        found: Tensor = (self.present > RECOGNISED) & (sure > RECOGNISED).all(-1)
        return found


@cache
def shipped() -> Recogniser:
    """The recogniser that comes with kvtiers."""
    return load(SHIPPED)


def load(path: Path | str) -> Recogniser:
    """The recogniser whose weights are in a file."""
    net = Recogniser()
    net.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return net.eval().requires_grad_(False)


@torch.no_grad()
def recognise(frames: Float[Tensor, "frames 3 height width"], net: Recogniser | None = None) -> Sightings:
    """Name what frames in -1 to 1 show."""
    model = shipped() if net is None else net
    parts = [_sightings(model(some)) for some in frames.split(_BATCH)]
    return Sightings(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in attrs.fields(Sightings)})


def _sightings(cells: Tensor) -> Sightings:
    """The most probable cell of each half."""
    columns = cells.shape[3]
    chosen = []
    for left, right in HALVES:
        inside = cells[:, :1, :, left // CELL : right // CELL].flatten(2).argmax(2)
        width = right // CELL - left // CELL
        chosen.append(inside // width * columns + inside % width + left // CELL)
    at = torch.cat(chosen, 1)
    found = cells.flatten(2).gather(2, at[:, None].expand(-1, cells.shape[1], -1)).transpose(1, 2)
    corner = torch.stack((at % columns, at // columns), -1)
    return Sightings(
        present=found[..., 0].sigmoid(),
        centres=(corner + found[..., 1:3].sigmoid()) * CELL,
        names=torch.cat([part.softmax(-1) for part in found[..., 3:].split(_SIZES, -1)], -1),
    )
