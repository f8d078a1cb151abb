"""Prompt agreement over time: does the picture show the room and the curtain that its prompt names?

The analogue of a CLIP score and of its drop. What a room's name means is up to the video, so a room is right if
it looks like the other visits of that name, more than like those of any other name.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.visits import Visit, block_count, visits_of
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, ROOMS, Houses, Walks, render
from kvtiers_packforcing.tiny_world.houses import CURTAIN_GAP
from kvtiers_packforcing.tiny_world.rendering import SWEEP_FRAMES

SEGMENT = 10
"""Seconds of a segment; the drop is from the first to the last whole one."""

_MARGIN = 8
"""Columns beside the gap that are left out, where a codec smears the curtain's edge."""

_FOLDS_ALIKE, _FOLDS_OFF = 0.7, 0.25


def prompt(pixels: Float[Tensor, "batch 3 frames height width"], walks: Walks) -> Mapping[str, Figure]:
    """Of every block, as it is when neither door nor curtain moves any more.

    * `curtain`: the share of blocks whose picture has a curtain where the prompt says `closed`, and none where it says
      `open`; truth 1. A curtain is seen where the means of the columns have its folds (correlation above 0.7) and its
      colour (within 0.25 of -1 to 1).
    * `room`: of the open blocks of rooms with several visits, where there are several such rooms: the share that is
      nearer (RMS of pixels averaged by 4 x 4) to the other visits of that name, on average, than to those of every
      other name; truth 1, by chance 1 / rooms, rooms that all look the same 0.
    * `prompt`: the share of blocks that are right in all that can be told of them; truth 1.
    * `prompt_drop`: `prompt` of the first 10 s less that of the last whole 10 s, of videos of 20 s and longer; -1 to 1,
      lower is better, truth 0. (The paper's CLIP drop is the same difference with its sign turned.)
    """
    blocks = block_count(pixels, walks)
    curtains, rooms, both, drops = [], [], [], []
    for row, video in enumerate(pixels):
        settled = settled_blocks(video, blocks)
        visits = visits_of(walks, row, blocks)
        right = (curtain_seen(settled) == walks.curtains[row, :blocks]).tolist()
        room = _rooms_right(settled, visits)
        curtains.append([float(one) for one in right])
        rooms.append([float(one) for one in room.values()])
        all_right = [float(one and room.get(block, True)) for block, one in enumerate(right)]
        both.append(all_right)
        last = blocks // SEGMENT * SEGMENT
        there = last >= 2 * SEGMENT
        drops.append([_mean(all_right[:SEGMENT]) - _mean(all_right[last - SEGMENT : last])] if there else [])
    return {
        "prompt": Figure.of_events(both),
        "prompt_drop": Figure.of_events(drops),
        "curtain": Figure.of_events(curtains),
        "room": Figure.of_events(rooms),
    }


def settled_blocks(
    video: Float[Tensor, "3 frames height width"], blocks: int
) -> Float[Tensor, "blocks 3 height width"]:
    """Of each block, the mean of its second half, -1 to 1, when nothing sweeps over the picture."""
    frames = torch.arange(blocks)[:, None] * FRAMES_PER_BLOCK - FIRST_FRAME
    frames = frames + torch.arange(SWEEP_FRAMES, FRAMES_PER_BLOCK, 2)
    return video[:, frames].clamp(-1, 1).mean(2).transpose(0, 1)


def curtain_seen(settled: Float[Tensor, "blocks 3 height width"]) -> Bool[Tensor, " blocks"]:
    """Whether there is a drawn curtain."""
    drawn = curtain_picture()[:, _MARGIN:]
    columns = settled[..., CURTAIN_GAP + _MARGIN :].mean(2)
    off = (columns - drawn).abs().mean((1, 2))
    shown, wanted = (part - part.mean(-1, keepdim=True) for part in (columns.mean(1), drawn.mean(0)))
    alike = (shown * wanted).sum(-1) / (shown.norm(dim=-1) * wanted.norm()).clamp(min=1e-6)
    seen: Tensor = (alike > _FOLDS_ALIKE) & (off < _FOLDS_OFF)
    return seen


def curtain_picture() -> Float[Tensor, "3 columns"]:
    """A drawn curtain, which is the same in every row: its columns from the gap to the right border, -1 to 1."""
    walk = Walks.written((ROOMS[0], 1, "closed"))
    picture = render(Houses.of_seeds(["curtain"]), walk, torch.tensor([[FRAMES_PER_BLOCK - 1]]))
    return picture[0, :, 0, 0, CURTAIN_GAP:]


def _rooms_right(settled: Tensor, visits: Sequence[Visit]) -> Mapping[int, bool]:
    """For the blocks where it can be told: whether the nearest name is their own."""
    small = avg_pool2d(settled, 4)
    by_room: dict[str, list[Visit]] = {}
    for visit in visits:
        by_room.setdefault(visit.room, []).append(visit)
    found: dict[int, bool] = {}
    for visit in visits:
        if len(by_room[visit.room]) < 2 or len(by_room) < 2:
            continue
        for block in range(visit.start, visit.end):
            off = {
                room: _mean([_off(small, block, visit, other) for other in named if other is not visit])
                for room, named in by_room.items()
            }
            own = off.pop(visit.room)
            found[block] = own < min(off.values())
    return found


def _off(small: Tensor, block: int, visit: Visit, other: Visit) -> float:
    """How far a block of a visit is from the same one, or the last, of another visit."""
    beside = min(other.start + block - visit.start, other.end - 1)
    return float((small[block] - small[beside]).square().mean().sqrt())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
