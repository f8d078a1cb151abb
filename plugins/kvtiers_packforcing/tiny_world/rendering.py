"""Frames of walks, drawn with tensors. Every frame costs the same, and depends on no other frame."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers_packforcing.tiny_world.houses import CURTAIN_GAP, Houses
from kvtiers_packforcing.tiny_world.vocabulary import FRAMES_PER_BLOCK, HEIGHT, RGB, THINGS_PER_ROOM, WIDTH
from kvtiers_packforcing.tiny_world.walks import Walks

SWEEP_FRAMES = 8
"""Frames that a door, or a curtain, takes to move: half a second, from the beginning of a block."""

DOOR_WIDTH = 32
"""Of the panel that sweeps over the picture when a room is entered, in pixels."""

_PALETTE = torch.tensor(RGB)
_BRIGHT, _DIM = 0.50, 0.28
"""How bright the two colours of a ground are, beside those of things."""
_DARK = 0.22
_STRIPE = 9.0
_CORE = 0.42
_PATCH = 28
"""Side of the square that a thing is drawn in; a thing has a radius of 12 pixels at most."""


def render(
    houses: Houses, walks: Walks, frames: Int[Tensor, "batch frames"]
) -> Float[Tensor, "batch 3 frames height width"]:
    """The given frames of each walk, in -1 to 1.

    frames: numbers of the world's frames, in any order: block b of a walk has 16 b to 16 b + 15.
    """
    blocks = walks.block_of(frames)
    rows = torch.arange(len(frames))[:, None].expand_as(frames)
    within = (frames - blocks * FRAMES_PER_BLOCK).flatten()
    rows, blocks = rows.flatten(), blocks.flatten()
    grounds = _grounds(houses)
    clock = frames.flatten() - walks.revealed()[rows, blocks] * FRAMES_PER_BLOCK
    picture = _room(houses, grounds, rows, walks.rooms[rows, blocks], clock, curtain_cover(walks, rows, blocks, within))
    swept = (walks.entered()[rows, blocks] & (within < SWEEP_FRAMES)).nonzero().flatten()
    if len(swept):
        rows, blocks, within = rows[swept], blocks[swept], within[swept]
        clock = frames.flatten()[swept] - walks.revealed()[rows, blocks - 1] * FRAMES_PER_BLOCK
        before = _room(
            houses, grounds, rows, walks.rooms[rows, blocks - 1], clock, walks.curtains[rows, blocks - 1].float()
        )
        picture[swept] = _through_door(before, picture[swept], within)
    video: Tensor = picture.unflatten(0, frames.shape).transpose(1, 2).mul(2).sub(1)
    return video.contiguous()


def door_edge(within: Int[Tensor, "*frames"]) -> Float[Tensor, "*frames"]:
    """The leading edge of the door, in pixels from the left, so many frames after the beginning of the block."""
    edge: Tensor = (within + 1).float() * ((WIDTH + DOOR_WIDTH) / SWEEP_FRAMES)
    return edge


def curtain_cover(
    walks: Walks, rows: Int[Tensor, "*frames"], blocks: Int[Tensor, "*frames"], within: Int[Tensor, "*frames"]
) -> Float[Tensor, "*frames"]:
    """How far the curtain is drawn: 0 is open, 1 is closed."""
    moved = ((within + 1).float() / SWEEP_FRAMES).clamp(max=1)
    closed = torch.where(walks.drawn()[rows, blocks], moved, 1.0)
    opened = torch.where(walks.opened()[rows, blocks], 1 - moved, 0.0)
    return torch.where(walks.curtains[rows, blocks], closed, opened)


def curtain_edge(cover: Float[Tensor, "*frames"]) -> Float[Tensor, "*frames"]:
    """The left edge of a curtain that is drawn so far, in pixels. It comes from the right and leaves a gap."""
    return WIDTH - cover * (WIDTH - CURTAIN_GAP)


def _room(
    houses: Houses,
    grounds: Float[Tensor, "batch rooms 3 height width"],
    rows: Int[Tensor, " frames"],
    rooms: Int[Tensor, " frames"],
    clock: Int[Tensor, " frames"],
    cover: Float[Tensor, " frames"],
) -> Float[Tensor, "frames 3 height width"]:
    """A room, its things and its curtain, in 0 to 1."""
    picture = grounds[rows, rooms]
    centres = houses.positions(rows, rooms, clock).float()
    for nth in range(THINGS_PER_ROOM):
        _draw_thing(picture, houses, rows, rooms, nth, centres[:, nth])
    drawn = cover > 0
    if drawn.any():
        x = torch.arange(WIDTH) + 0.5
        alpha = (x - curtain_edge(cover[drawn])[:, None] + 0.5).clamp(0, 1)[:, None, None]
        folds = 0.55 + 0.12 * torch.sin(x * (2 * math.pi / 16)) + torch.zeros(3, HEIGHT, 1)
        picture[drawn] = torch.lerp(picture[drawn], folds * torch.tensor([1.0, 0.95, 0.85])[:, None, None], alpha)
    return picture


def _through_door(
    before: Float[Tensor, "frames 3 height width"],
    after: Float[Tensor, "frames 3 height width"],
    within: Int[Tensor, " frames"],
) -> Float[Tensor, "frames 3 height width"]:
    """The room that is entered left of the door, the room that is left right of it."""
    x, y = torch.arange(WIDTH) + 0.5, torch.arange(HEIGHT) + 0.5
    edge = door_edge(within)[:, None, None, None]
    planks = 0.8 + 0.2 * torch.sin(y * (2 * math.pi / 16)).sign()
    wood = torch.tensor([0.42, 0.26, 0.12])[:, None, None] * planks[:, None].expand(-1, WIDTH)
    picture = torch.where(x < edge - DOOR_WIDTH, after, before)
    return torch.where((x >= edge - DOOR_WIDTH) & (x < edge), wood, picture)


def _grounds(houses: Houses) -> Float[Tensor, "batch rooms 3 height width"]:
    """The ground of every room: a pattern between two colours."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    angle, period = houses.angle.float()[..., None, None], houses.period.float()[..., None, None]
    offset = houses.offset.float()[..., None, None]
    turn = 2 * math.pi / period
    along = (x * angle.cos() + y * angle.sin()) * turn + offset[:, :, 0]
    across = (y * angle.cos() - x * angle.sin()) * turn + offset[:, :, 1]
    fields = (
        along.sin(),
        along.sin() * across.sin(),
        (along + 1.2 * (0.7 * across).sin()).sin(),
        (0.8 * along).cos() + (0.6 * across + (0.5 * along).sin()).cos(),
    )
    pattern = houses.pattern[..., None, None]
    field = sum(torch.where(pattern == kind, values, 0.0) for kind, values in enumerate(fields))
    mix = torch.sigmoid(4 * torch.as_tensor(field))[:, :, None]
    bright, dim = _PALETTE[houses.ground_colours].unbind(2)
    return bright[..., None, None] * _BRIGHT * mix + dim[..., None, None] * _DIM * (1 - mix)


def _draw_thing(
    picture: Float[Tensor, "frames 3 height width"],
    houses: Houses,
    rows: Int[Tensor, " frames"],
    rooms: Int[Tensor, " frames"],
    nth: int,
    centres: Float[Tensor, "frames 2"],
) -> None:
    """Draw thing `nth` of each room over `picture`, in a small square around its centre."""
    corner = (centres - _PATCH / 2).round().long()
    corner = corner.clamp(torch.tensor(0), torch.tensor([WIDTH - _PATCH, HEIGHT - _PATCH]))
    ahead = torch.arange(_PATCH)
    xs, ys = corner[:, :1] + ahead, corner[:, 1:] + ahead
    dx = (xs + 0.5 - centres[:, :1])[:, None, :].expand(-1, _PATCH, -1)
    dy = (ys + 0.5 - centres[:, 1:])[:, :, None].expand(-1, -1, _PATCH)

    def of(values: Tensor) -> Tensor:
        return values[rows, rooms, nth][:, None, None]

    alpha, shade = thing_mask(
        dx, dy, of(houses.form), of(houses.texture), of(houses.radius.float()), of(houses.tilt.float())
    )
    colour = _PALETTE[houses.colour[rows, rooms, nth]][:, :, None, None] * shade[:, None]
    at = (ys[:, :, None] * WIDTH + xs[:, None, :]).flatten(1)[:, None].expand(-1, 3, -1)
    flat = picture.flatten(2)
    flat.scatter_(2, at, torch.lerp(flat.gather(2, at), colour.flatten(2), alpha[:, None].flatten(2)))


def thing_mask(
    dx: Float[Tensor, "*shape"],
    dy: Float[Tensor, "*shape"],
    form: Int[Tensor, "*#shape"],
    texture: Int[Tensor, "*#shape"],
    radius: Float[Tensor, "*#shape"],
    tilt: Float[Tensor, "*#shape"],
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Where a thing is (0 to 1), and how bright its colour is there, at offsets (dx, dy) from its centre."""
    away = (dx * dx + dy * dy).sqrt()
    outside = (
        away - radius,
        torch.maximum(dx.abs(), dy.abs()) - 0.86 * radius,
        torch.maximum(dy - 0.72 * radius, 0.87 * dx.abs() - 0.5 * (dy + radius)),
        torch.maximum(away - radius, torch.where(texture == 2, 0.65, 0.5) * radius - away),
    )
    distance = sum(torch.where(form == kind, values, 0.0) for kind, values in enumerate(outside))
    ring = form == len(outside) - 1
    core = 0.5 - (away - _CORE * radius)
    core = core.clamp(0, 1) * (texture == 2)
    inside = (0.5 - torch.as_tensor(distance)).clamp(0, 1)
    inside = torch.where(ring, torch.maximum(inside, core), inside)  # a ring's core is a dot of its own colour
    stripes = torch.sigmoid(5 * torch.sin((dx * tilt.cos() + dy * tilt.sin()) * (2 * math.pi / _STRIPE)))
    dark = torch.where(texture == 1, stripes, torch.where(ring, 0.0, core))
    return inside, 1 - (1 - _DARK) * dark
