"""Damages on purpose, each of which some measure must notice, and the more the stronger it is.

They are what goes wrong with generated videos: a room is invented anew, things melt, noise grows, motion stops, ...
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from kvtiers_packforcing.measures.pictures import blur
from kvtiers_packforcing.measures.prompt import curtain_picture
from kvtiers_packforcing.measures.visits import Shot, block_count, clocks, frames_at, shots_of, visits_of
from kvtiers_packforcing.seeding import generator_of
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, Houses, Walks, render
from kvtiers_packforcing.tiny_world.houses import CURTAIN_GAP
from kvtiers_packforcing.tiny_world.rendering import SWEEP_FRAMES

T = TypeVar("T")
Video = Float[Tensor, "batch 3 frames height width"]


def invented(pixels: Video, walks: Walks, strength: float) -> Video:
    """A share `strength` of the returns after 5 s or longer shows what it never showed: another house's room."""
    shown, blocks = pixels.clone(), block_count(pixels, walks)
    for row in range(len(pixels)):
        returns = [visit for visit in visits_of(walks, row, blocks) if visit.returns]
        for visit in _some(returns, strength, "invented", row):
            frames = torch.arange(visit.start * FRAMES_PER_BLOCK + SWEEP_FRAMES, visit.end * FRAMES_PER_BLOCK)
            houses = Houses.of_seeds([f"invented {row} {visit.start}"])
            shown[row, :, frames - FIRST_FRAME] = render(houses, walks.row(row), frames[None])[0]
    return shown


def wrong_rooms(pixels: Video, walks: Walks, strength: float) -> Video:
    """A share `strength` of the returns after 5 s or longer shows another room that was seen before."""
    shown, blocks = pixels.clone(), block_count(pixels, walks)
    for row, video in enumerate(pixels):
        visits = visits_of(walks, row, blocks)
        returns = [v for v in visits if v.returns and any(o.room != v.room and o.start < v.start for o in visits)]
        for visit in _some(returns, strength, "rooms", row):
            other = next(other for other in visits if other.room != visit.room)
            clock = clocks(visit, step=1)
            shown[row, :, frames_at(visit, clock)] = video[
                :, frames_at(other, clock.clamp(max=int(clocks(other, step=1)[-1])))
            ]
    return shown


def blurred(pixels: Video, walks: Walks, strength: float) -> Video:
    """A Gaussian blur of `strength` pixels."""
    return blur(pixels, strength)


def noisier(pixels: Video, walks: Walks, strength: float) -> Video:
    """Noise that grows with time, to a standard deviation of `strength` (of -1 to 1)."""
    growing = torch.linspace(0, strength, pixels.shape[2])[:, None, None]
    return pixels + growing * torch.randn(pixels.shape, generator=generator_of("noisier"))


def collapsed(pixels: Video, walks: Walks, strength: float) -> Video:
    """The picture turns into saturated noise in patches of 8 x 8: at the end by 2 `strength`, at most wholly."""
    _, _, frames, height, width = pixels.shape
    generator = generator_of("collapsed")
    patches = torch.randn(len(pixels), 3, frames // FRAMES_PER_BLOCK + 1, height // 8, width // 8, generator=generator)
    noise = interpolate(4 * patches, (frames, height, width))
    share = (torch.linspace(0, 2, frames) * strength).clamp(max=1)[:, None, None]
    return torch.lerp(pixels, noise.clamp(-1, 1), share)


def frozen(pixels: Video, walks: Walks, strength: float) -> Video:
    """In a share `strength` of the shots the first frame after the door stays to the end."""
    still, blocks = pixels.clone(), block_count(pixels, walks)
    for row in range(len(pixels)):
        for shot in _some(shots_of(walks, row, blocks), strength, "frozen", row):
            frames = shot.frames()
            still[row, :, frames.start : frames.stop] = pixels[row, :, frames.start, None]
    return still


def one_picture(pixels: Video, walks: Walks, strength: float) -> Video:
    """From a share 1 - `strength` of the video on, the frame of that moment stays to the end."""
    still = pixels.clone()
    at = min(pixels.shape[2] - 1, round((1 - strength) * pixels.shape[2]))
    still[:, :, at:] = pixels[:, :, at, None]
    return still


def brighter(pixels: Video, walks: Walks, strength: float) -> Video:
    """Brightness drifts, by `strength` (of -1 to 1) at the end."""
    return pixels + torch.linspace(0, strength, pixels.shape[2])[:, None, None]


def greyer(pixels: Video, walks: Walks, strength: float) -> Video:
    """A share `strength` of contrast and colour is lost by the end."""
    return pixels * (1 - torch.linspace(0, strength, pixels.shape[2]))[:, None, None]


def jumping(pixels: Video, walks: Walks, strength: float) -> Video:
    """Every other block is `strength` brighter (of -1 to 1)."""
    numbers = (torch.arange(pixels.shape[2]) + FIRST_FRAME) // FRAMES_PER_BLOCK
    return pixels + strength * (numbers % 2)[:, None, None]


def flickering(pixels: Video, walks: Walks, strength: float) -> Video:
    """Every other frame is `strength` brighter (of -1 to 1)."""
    return pixels + strength * (torch.arange(pixels.shape[2]) % 2)[:, None, None]


def wrong_curtains(pixels: Video, walks: Walks, strength: float) -> Video:
    """In a share `strength` of the shots the curtain is the other way round; an open one shows a still room."""
    shown, blocks = pixels.clone(), block_count(pixels, walks)
    for row in range(len(pixels)):
        for shot in _some(shots_of(walks, row, blocks), strength, "curtains", row):
            _turn_curtain(shown[row], pixels[row], shot)
    return shown


def curtains_lost(pixels: Video, walks: Walks, strength: float) -> Video:
    """From a share 1 - `strength` of the video on, no curtain is drawn any more: a still room is shown."""
    shown, blocks = pixels.clone(), block_count(pixels, walks)
    for row in range(len(pixels)):
        for shot in shots_of(walks, row, blocks):
            if shot.curtain:
                _turn_curtain(shown[row], pixels[row], shot, round((1 - strength) * pixels.shape[2]))
    return shown


def _turn_curtain(shown: Tensor, video: Tensor, shot: Shot, since: int = 0) -> None:
    """Show a shot from frame `since` on with its curtain the other way round; an open one shows a still room."""
    frames = slice(max(shot.frames().start, since), max(shot.frames().stop, since))
    if shot.curtain:
        shown[:, frames] = video[:, max(0, shot.start * FRAMES_PER_BLOCK - FIRST_FRAME - 1), None]
    else:
        shown[:, frames, :, CURTAIN_GAP:] = curtain_picture()[:, None, None]


def _some(items: Sequence[T], share: float, name: str, row: int) -> list[T]:
    """A share of them. What is chosen for a larger share has all that is chosen for a smaller one."""
    order = torch.randperm(len(items), generator=generator_of(name, row)).tolist()
    return [items[nth] for nth in sorted(order[: round(share * len(items))])]


DAMAGES: Mapping[str, tuple[Callable[[Video, Walks, float], Video], tuple[float, ...]]] = {
    "invented": (invented, (0.25, 0.5, 1.0)),
    "wrong-rooms": (wrong_rooms, (0.25, 0.5, 1.0)),
    "wrong-curtains": (wrong_curtains, (0.2, 0.5, 1.0)),
    "curtains-lost": (curtains_lost, (0.4, 0.5, 0.6)),
    "blurred": (blurred, (2.5, 3.0, 4.0)),
    "noisier": (noisier, (0.25, 0.5, 1.0)),
    "collapsed": (collapsed, (0.15, 0.3, 0.5)),
    "frozen": (frozen, (0.25, 0.5, 1.0)),
    "one-picture": (one_picture, (0.6, 0.8, 1.0)),
    "brighter": (brighter, (0.2, 0.5, 1.0)),
    "greyer": (greyer, (0.3, 0.6, 0.9)),
    "jumping": (jumping, (0.02, 0.05, 0.1)),
    "flickering": (flickering, (0.02, 0.05, 0.1)),
}
"""Each damage by name, and three strengths of it, the weakest first."""
