"""What video models of the tiny world are shown when they are evaluated: returns of rooms, and a walk to go on from."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvtiers_packforcing.tiny_world import (
    FRAMES_PER_BLOCK,
    Clips,
    Houses,
    LinearCodec,
    Walks,
    contact_sheet,
    embed_walks,
    render,
)
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES

_WALK = (("hall", 2), ("attic", 3), ("hall", 2), ("cellar", 3), ("attic", 2))
"""What is rolled out for the picture: the first block of each room is given, and what returns is not."""
_GIVEN = 5


def draw_rollout(path: Path, codec: LinearCodec, go_on: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Go on from the first blocks of a walk: rows of truth, and of what a model makes.

    go_on: makes the latents of a video from those of its first blocks, and the prompts of all.
    """
    seeds = ["evaluation a", "evaluation b"]
    houses, walk = Houses.of_seeds(seeds), Walks.written(*_WALK)
    walks = Walks(rooms=walk.rooms.expand(2, -1), curtains=walk.curtains.expand(2, -1))
    pixels = render(houses, walks, torch.arange(3, walks.blocks * FRAMES_PER_BLOCK).expand(2, -1))
    made = go_on(codec.encode(pixels)[:, :, : _GIVEN * BLOCK_FRAMES], embed_walks(walks))
    shown = torch.arange(8, pixels.shape[2], FRAMES_PER_BLOCK)
    contact_sheet(torch.stack((pixels, codec.decode(made)), 1).flatten(0, 1)[:, :, shown], path)


def returns_beyond_the_sink(count: int) -> Clips:
    """Clips in which a room returns that the first block of the walk does not show."""
    seeds = [f"evaluation {nth}" for nth in range(4 * count)]
    clips, found = Clips.of_seeds(seeds, "return"), []
    for row, seed in enumerate(seeds):
        rooms = clips.walks.rooms[row, clips.blocks[row]]
        if rooms[clips.returns(row) or 0] != rooms[0]:
            found.append(seed)
    return Clips.of_seeds(found[:count], "return")
