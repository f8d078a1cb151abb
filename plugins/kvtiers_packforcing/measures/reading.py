"""Read the names in every fourth frame of videos, once, for all measures that need them."""

import attrs
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvtiers_packforcing.measures.recogniser import Recogniser, Sightings, recognise
from kvtiers_packforcing.measures.visits import STEP
from kvtiers_packforcing.tiny_world import FIRST_FRAME


def read(pixels: Float[Tensor, "batch 3 frames height width"], net: Recogniser | None = None) -> Sightings:
    """What frames 4, 8, 12, ... of the world show. [batch, frames // 4, ...]"""
    chosen = pixels[:, :, STEP - FIRST_FRAME :: STEP]
    batch, count = chosen.shape[0], chosen.shape[2]
    flat = recognise(chosen.transpose(1, 2).flatten(0, 1), net)
    parts = {f.name: getattr(flat, f.name).unflatten(0, (batch, count)) for f in attrs.fields(Sightings)}
    return Sightings(**parts)


def first_readings(seen: Sightings, frames: int) -> Sightings:
    """The readings of a video's first frames."""
    count = (frames + FIRST_FRAME - 1) // STEP
    return Sightings(**{f.name: getattr(seen, f.name)[:, :count] for f in attrs.fields(Sightings)})


def known(pixels: Float[Tensor, "batch 3 frames height width"], seen: Sightings | None) -> Sightings:
    """The readings that were given, or new ones."""
    return read(pixels) if seen is None else seen


def outside_things(seen: Sightings, reach: float, height: int, width: int) -> Bool[Tensor, "height width"]:
    """The pixels farther than `reach` from the centre of everything that is probably there.

    seen: readings of the frames (any number of them) whose things to leave out. [frames, halves, ...]
    """
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    centres = seen.centres[seen.present > 0.5]
    away = (x - centres[:, 0, None, None]) ** 2 + (y - centres[:, 1, None, None]) ** 2
    free: Tensor = (away > reach * reach).all(0)
    return free
