"""Makes the demonstration's video and draws its pictures, and says what each memory held and kept."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from kvtiers_diffusers import write_video
from kvtiers_packforcing.demo.film import Film
from kvtiers_packforcing.demo.plot import Told, draw_plot
from kvtiers_packforcing.demo.returns import of_strangers, returns_of
from kvtiers_packforcing.demo.sheet import draw_sheet
from kvtiers_packforcing.tiny_world.making import MadeBlock, make_videos
from kvtiers_packforcing.tiny_world.sampling import Sampler
from kvtiers_packforcing.tiny_world.variants import BLOCK_TOKENS, Variant
from kvtiers_packforcing.tiny_world.vocabulary import FIRST_FRAME, FRAMES_PER_BLOCK, HEIGHT, WIDTH
from kvtiers_packforcing.tiny_world.walks import Walks
from kvtiers_packforcing.tiny_world.weights import Models

VIDEO, SHEET, PLOT = "video.mp4", "contact-sheet.png", "memory-and-returns.png"


@attrs.define(eq=False, kw_only=True)
class Recording:
    """What one memory has made so far: frames in 0 to 255, and the figures of each block."""

    frames: Tensor
    length: int = 0
    figures: list[MadeBlock] = attrs.field(factory=list)

    @classmethod
    def of(cls, walks: Walks) -> "Recording":
        """Nothing yet, and room for a video of this walk."""
        count = walks.blocks * FRAMES_PER_BLOCK - FIRST_FRAME
        return cls(frames=torch.zeros(count, 3, HEIGHT, WIDTH, dtype=torch.uint8))

    def add(self, block: MadeBlock) -> None:
        """Take in the next block, of a single row."""
        frames = ((block.pixels[0].transpose(0, 1) + 1) * 127.5).round().byte()
        self.frames[self.length : self.length + len(frames)] = frames
        self.length += len(frames)
        self.figures.append(attrs.evolve(block, latents=block.latents[:0], pixels=block.pixels[:0]))

    def told(self, walks: Walks) -> Told:
        """What is told of it, once it is whole."""
        return Told(
            device_bytes=[block.device_bytes for block in self.figures],
            host_bytes=[block.host_bytes for block in self.figures],
            attended=self.figures[-1].attended,
            seconds=sum(block.seconds for block in self.figures) / len(self.figures),
            returns=returns_of(self.frames, walks),
            strangers=of_strangers(self.frames, walks),
        )


def show(
    models: Models,
    chosen: Sequence[Variant],
    walks: Walks,
    folder: Path,
    *,
    seed: int,
    sampler: Sampler,
    advance: Callable[[], object] = lambda: None,
) -> Mapping[str, Told]:
    """Write the video, the contact sheet and the plot of a single walk to `folder`. advance: called for every block."""
    recordings = {variant.name: Recording.of(walks) for variant in chosen}
    film = Film(names=list(recordings), walks=walks)
    made = make_videos(models, chosen, walks, seeds=[seed], sampler=sampler)

    def clips() -> Iterator[Tensor]:
        for number, blocks in enumerate(ahead(made)):
            for name, block in blocks.items():
                recordings[name].add(block)
            yield film.block(number, [recording.frames for recording in recordings.values()])[None]
            advance()

    write_video(folder / VIDEO, clips(), fps=FRAMES_PER_BLOCK)
    told = {name: recording.told(walks) for name, recording in recordings.items()}
    videos = {name: recording.frames for name, recording in recordings.items()}
    draw_sheet(folder / SHEET, videos, {name: _about(one) for name, one in told.items()}, walks)
    draw_plot(folder / PLOT, told, walks, block_bytes=_block_bytes(models.transformer))
    return told


def ahead(made: Generator[Mapping[str, MadeBlock]]) -> Iterator[Mapping[str, MadeBlock]]:
    """The same blocks. While one is drawn and written, a second thread makes the next."""
    with ThreadPoolExecutor(1) as pool:
        try:
            coming = pool.submit(next, made, None)
            while (blocks := coming.result()) is not None:
                coming = pool.submit(next, made, None)
                yield blocks
        finally:
            pool.submit(made.close).result()  # where it ran, since it gives the transformer back


def _about(told: Told) -> str:
    """What stands below a memory's name in the contact sheet."""
    alike = "" if told.identity is None else f"\nreturns: {told.identity:.1f} dB alike"
    return f"{told.device_bytes[-1] / 1e6:.1f} MB on the device{alike}"


def _block_bytes(transformer: Any) -> int:
    """Keys and values of a block in all layers, in float32."""
    config = transformer.config
    return 2 * 4 * int(BLOCK_TOKENS * config.num_layers * config.num_attention_heads * config.attention_head_dim)
