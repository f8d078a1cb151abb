"""Writing a video to a file block by block, as it is made."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kvtiers import GeometryError


def write_video(path: str | Path, clips: Iterable[Any], *, fps: int = 16, row: int = 0) -> int:
    """Write row `row` of each of `clips` (`stream`'s output as "np" or "pt") to an H.264 file; returns its frames.

    Frames are from 0 to 1, [batch, frames, height, width, 3] (arrays) or [batch, frames, 3, height, width] (tensors),
    of even height and width. Raises `GeometryError` for others, and if there are none; then no file is made.
    """
    import av

    frames = _frames(clips, row)
    first = next(frames, None)
    if first is None:
        raise GeometryError("a video file needs at least one frame, got no clips; a stream can be written only once")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise GeometryError(f"a video file needs an even height and width, got {height} x {width}")
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        written = 0
        for frame in chain([first], frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            written += 1
        file.mux(stream.encode())
    return written


def _frames(clips: Iterable[Any], row: int) -> Iterator[Any]:
    """The frames of row `row`, [height, width, 3] each, from 0 to 255."""
    for clip in clips:
        shape = tuple(clip.shape) if isinstance(clip, Tensor | np.ndarray) else f"a {type(clip).__name__}"
        if isinstance(shape, str) or len(shape) != 5 or shape[2 if isinstance(clip, Tensor) else 4] != 3:
            raise GeometryError(
                "a video file needs clips of 3 channels, [batch, frames, height, width, 3] or, as tensors, "
                f"[batch, frames, 3, height, width], got {shape}; stream them as 'np' or 'pt', not 'latent'"
            )
        pixels = clip[row].float().permute(0, 2, 3, 1).cpu().numpy() if isinstance(clip, Tensor) else clip[row]
        yield from np.ascontiguousarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))
