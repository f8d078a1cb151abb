"""What is true of every frame: the room, its things, where they are, and which of them can be seen whole."""

import attrs
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvtiers_packforcing.tiny_world.houses import Houses
from kvtiers_packforcing.tiny_world.rendering import DOOR_WIDTH, SWEEP_FRAMES, curtain_cover, curtain_edge, door_edge
from kvtiers_packforcing.tiny_world.vocabulary import COLOURS, FORMS, FRAMES_PER_BLOCK, PATTERNS, ROOMS, TEXTURES
from kvtiers_packforcing.tiny_world.walks import Walks


@attrs.frozen(kw_only=True)
class Thing:
    """A thing in a frame. Its centre (x, y) and its radius are in pixels; `whole`: nothing hides a part of it."""

    colour: str
    form: str
    texture: str
    centre: tuple[float, float]
    radius: float
    whole: bool


@attrs.frozen(kw_only=True)
class Scene:
    """A frame in words. `curtain`: how far it is drawn, 0 to 1; `door`: whether a door is sweeping over the picture."""

    room: str
    pattern: str
    ground_colours: tuple[str, str]
    curtain: float
    door: bool
    things: tuple[Thing, ...]


@attrs.frozen(eq=False, kw_only=True)
class Truth:
    """The same for many frames, as tensors. Rooms and what rooms hold are indices; see `Houses` for identities."""

    rooms: Int[Tensor, "batch frames"]
    curtain: Float[Tensor, "batch frames"]
    door: Bool[Tensor, "batch frames"]
    centres: Float[Tensor, "batch frames things 2"]
    whole: Bool[Tensor, "batch frames things"]


def truth_of(houses: Houses, walks: Walks, frames: Int[Tensor, "batch frames"]) -> Truth:
    """What is true of the given frames of each walk. Where a door sweeps, it is the room that is entered."""
    blocks = walks.block_of(frames)
    rows = torch.arange(len(frames))[:, None].expand_as(frames)
    within = frames - blocks * FRAMES_PER_BLOCK
    rooms = walks.rooms[rows, blocks]
    clock = frames - walks.revealed()[rows, blocks] * FRAMES_PER_BLOCK
    flat = (rows.flatten(), rooms.flatten())
    centres = houses.positions(*flat, clock.flatten()).float().unflatten(0, frames.shape)
    right_rims = centres[..., 0] + houses.radius.float()[flat].unflatten(0, frames.shape)
    cover = curtain_cover(walks, rows, blocks, within)
    door = walks.entered()[rows, blocks] & (within < SWEEP_FRAMES)
    free = torch.where(door, door_edge(within) - DOOR_WIDTH, torch.inf).minimum(curtain_edge(cover))
    return Truth(rooms=rooms, curtain=cover, door=door, centres=centres, whole=right_rims <= free[..., None])


def scene_of(houses: Houses, walks: Walks, frame: int, row: int = 0) -> Scene:
    """One frame of one walk, in words."""
    seen = truth_of(houses, walks, torch.full((len(houses), 1), frame))
    room = int(seen.rooms[row, 0])
    first, second = houses.ground_colours[row, room].tolist()
    things = tuple(
        Thing(
            colour=COLOURS[int(houses.colour[row, room, nth])],
            form=FORMS[int(houses.form[row, room, nth])],
            texture=TEXTURES[int(houses.texture[row, room, nth])],
            centre=(float(seen.centres[row, 0, nth, 0]), float(seen.centres[row, 0, nth, 1])),
            radius=float(houses.radius[row, room, nth]),
            whole=bool(seen.whole[row, 0, nth]),
        )
        for nth in range(houses.colour.shape[2])
    )
    return Scene(
        room=ROOMS[room],
        pattern=PATTERNS[int(houses.pattern[row, room])],
        ground_colours=(COLOURS[first], COLOURS[second]),
        curtain=float(seen.curtain[row, 0]),
        door=bool(seen.door[row, 0]),
        things=things,
    )
