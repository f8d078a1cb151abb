"""Train the recogniser: `python -m kvtiers_packforcing.measures.recogniser_training FILE`.

The shipped weights were made by this command with nothing changed. Each
step renders frames of new houses, passes most of them through the linear codec, blurs some, adds noise to some, and
shows a few in which there is nothing to name: noise, two pictures in one, curtains.
"""

import math
from pathlib import Path

import click
import torch
from jaxtyping import Bool, Float, Int
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from kvtiers_packforcing.measures.pictures import blur
from kvtiers_packforcing.measures.recogniser import CELL, THING_NAMES, Recogniser
from kvtiers_packforcing.seeding import generator_of
from kvtiers_packforcing.tiny_world import (
    FRAMES_PER_BLOCK,
    HEIGHT,
    ROOMS,
    WIDTH,
    Houses,
    LinearCodec,
    Walks,
    render,
    truth_of,
)

HOUSES = 20
"""Of a step; two frames are shown of each of two rooms of every house."""

_FEW = 4
_WALK = tuple((room, 4) for room in ROOMS)
_CURTAINS = tuple(visit for room in ROOMS for visit in ((room, 1), (room, 2, "closed"), (room, 1)))
_RATE, _WARM, _DECAY = 4e-3, 50, 1e-4


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--steps", default=400, show_default=True, type=click.IntRange(min=2))
def train(out: Path, steps: int) -> None:
    """Train the recogniser and write its weights, float16, to OUT."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, codec = Recogniser(), LinearCodec.load()
    optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE, betas=(0.9, 0.99), weight_decay=_DECAY)
    for step in track(range(steps), "recogniser"):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1, (step + 1) / _WARM) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(net, codec, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    save_file({name: weight.detach().half().contiguous() for name, weight in net.state_dict().items()}, out)
    click.echo(f"{out}: {out.stat().st_size:,} bytes, last loss {float(loss.detach()):.3f}")


def loss_of(net: Recogniser, codec: LinearCodec, step: int) -> Tensor:
    """The loss of a step's frames: is there a thing, where, and what it is named."""
    generator = generator_of("recogniser", step)
    houses = Houses.of_seeds([f"recogniser {step} {nth}" for nth in range(HOUSES)])
    houses = _twice(houses)
    walks, frames = _moments(generator)
    pixels = render(houses, walks, frames)
    through = codec.decode(_disturbed(codec.encode(pixels), generator))
    by_codec = torch.rand(len(pixels), generator=generator) < 0.65
    pair = int(torch.randint(1, 3, (), generator=generator))
    shown = torch.where(by_codec[:, None, None, None, None], through, pixels)[:, :, pair::2]
    frames = frames[:, pair::2]
    rows = torch.arange(len(frames))[:, None].expand_as(frames).flatten()
    shown, nothing = _damaged(shown.transpose(1, 2).flatten(0, 1), generator)
    seen = truth_of(houses, walks, frames)
    rooms, whole, centres = seen.rooms.flatten(), seen.whole.flatten(0, 1), seen.centres.flatten(0, 1)
    names = torch.stack([getattr(houses, name)[rows, rooms] for name in THING_NAMES], -1)
    return _things_loss(net(shown), centres, whole, names, nothing)


def _things_loss(
    cells: Float[Tensor, "frames outputs rows columns"],
    centres: Float[Tensor, "frames things 2"],
    whole: Bool[Tensor, "frames things"],
    names: Int[Tensor, "frames things 3"],
    nothing: Bool[Tensor, " frames"],
) -> Tensor:
    """Of a thing that is hidden in part nothing is asked: the cells around it do not count."""
    columns, rows = WIDTH // CELL, HEIGHT // CELL
    cell = (centres / CELL).floor().long()
    at = cell[..., 1].clamp(0, rows - 1) * columns + cell[..., 0].clamp(0, columns - 1)
    asked = whole & ~nothing[:, None]
    wanted, counts = torch.zeros(len(cells), rows * columns), torch.ones(len(cells), rows * columns)
    x = (torch.arange(columns) + 0.5) * CELL
    y = (torch.arange(rows) + 0.5) * CELL
    for nth in range(centres.shape[1]):
        away = ((x - centres[:, nth, :1])[:, None] ** 2 + (y - centres[:, nth, 1:])[:, :, None] ** 2).flatten(1)
        counts[(away < 3 * CELL * 3 * CELL) & ~whole[:, nth, None] & ~nothing[:, None]] = 0
        counts[(away < 1.5 * CELL * 1.5 * CELL) & asked[:, nth, None]] = 0  # a neighbour of the right cell is no error
    wanted.scatter_(1, at, asked.float())
    counts = counts.scatter(1, at, torch.where(asked | nothing[:, None], 1.0, counts.gather(1, at)))
    flat = cells.flatten(2)
    loss = functional.binary_cross_entropy_with_logits(flat[:, 0], wanted, counts, reduction="sum") / len(cells)
    if not asked.any():
        return loss
    found = flat.gather(2, at[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)[asked]
    loss = loss + 4 * functional.l1_loss(found[:, 1:3].sigmoid(), (centres / CELL - cell)[asked])
    for logits, right in zip(found[:, 3:].split(list(THING_NAMES.values()), 1), names[asked].unbind(1), strict=True):
        loss = loss + functional.cross_entropy(logits, right)
    return loss


def _twice(houses: Houses) -> Houses:
    """Each house in two rows."""
    return type(houses)(**{name: torch.cat((values, values)) for name, values in _fields(houses).items()})


def _fields(houses: Houses) -> dict[str, Tensor]:
    return {name: getattr(houses, name) for name in Houses.__annotations__}


def _moments(generator: torch.Generator) -> tuple[Walks, Int[Tensor, "batch frames"]]:
    """Walks, a quarter with curtains, and five frames of each: one before, and the four of a latent frame."""
    plain, curtained = Walks.written(*_WALK), Walks.written(*_CURTAINS)
    rows, with_curtains = 2 * HOUSES, HOUSES // 2
    walks = Walks(
        rooms=torch.cat((plain.rooms.expand(rows - with_curtains, -1), curtained.rooms.expand(with_curtains, -1))),
        curtains=torch.cat(
            (plain.curtains.expand(rows - with_curtains, -1), curtained.curtains.expand(with_curtains, -1))
        ),
    )
    latents = walks.blocks * FRAMES_PER_BLOCK // _FEW
    first = torch.randint(1, latents, (rows,), generator=generator) * _FEW
    return walks, first[:, None] + torch.arange(-1, _FEW)


def _disturbed(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Latents with noise, as those of a model that is not perfect: none in half of the clips."""
    strength = (torch.rand(len(latents), generator=generator) * 0.5 - 0.25).clamp(min=0)
    noise = torch.randn(latents.shape, generator=generator)
    return latents + strength[:, None, None, None, None] * noise


def _damaged(
    frames: Float[Tensor, "frames 3 height width"], generator: torch.Generator
) -> tuple[Float[Tensor, "frames 3 height width"], Bool[Tensor, " frames"]]:
    """Blur, noise, other brightness and contrast; and in which frames nothing can be named any more."""

    def draw() -> Tensor:
        return torch.rand(len(frames), generator=generator)[:, None, None, None]

    shown = frames.clone()
    some = (draw() < 0.3).flatten()
    shown[some] = blur(frames[some], 0.6 + 1.0 * float(torch.rand((), generator=generator)))
    shown = shown * (1 + 0.3 * (draw() - 0.5)) + 0.2 * (draw() - 0.5)
    shown = shown + torch.randn(shown.shape, generator=generator) * (0.5 * draw() - 0.25).clamp(min=0)
    kind = draw()
    mixed = torch.lerp(shown, shown.roll(5, 0), 0.4 + 0.2 * draw())
    spots = torch.randn(len(frames), 3, HEIGHT // 8, WIDTH // 8, generator=generator)
    noise = functional.interpolate(spots, scale_factor=8, mode="bilinear") + torch.randn(
        shown.shape, generator=generator
    )
    shown = torch.where(kind < 0.06, mixed, torch.where(kind < 0.1, noise * 3 * draw(), shown))
    some = ((kind >= 0.1) & (kind < 0.13)).flatten()
    shown[some] = blur(shown[some], 6.0)
    return shown, (kind < 0.13).flatten()


if __name__ == "__main__":
    train()
