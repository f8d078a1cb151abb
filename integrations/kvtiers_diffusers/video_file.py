"""Writing a video to a file block by block, as it is made."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvtiers import GeometryError, PolicyError
from kvtiers_diffusers.clips import Clips
from kvtiers_diffusers.pictures import as_tensor, in_unit
from kvtiers_diffusers.rates import rate

_FPS = 16
"""What Wan makes a second."""


def write_video(path: str | Path, clips: Iterable[Any], *, fps: Any = None, row: int = 0) -> int:
    """Write row `row` of each of `clips` (`stream`'s output as "np" or "pt") to an H.264 file; returns its frames.

    Frames are from 0 to 1, or uint8 from 0 to 255: [batch, frames, height, width, 3] (arrays) or [batch, frames, 3,
    height, width] (tensors), all of one even height and width.
    fps: frames a second: a whole number, a float, a `Fraction`, or "24000/1001". None: those of `stream`, and 16 for
        clips that do not know theirs.

    Raises `GeometryError` for other frames and if there are none, `NotFiniteError` for NaN, and `PolicyError` for
    another fps than that of `stream`. If the first clip is refused, no file is made. What was written before a later
    error, or before Ctrl-C, stays in the file, which can be played.
    """
    import av

    if row < 0:
        raise PolicyError(f"rows are counted from 0, got {row}")
    speed = rate(_FPS if fps is None else fps)
    if isinstance(clips, Clips):
        if fps is not None and speed != clips.fps:
            raise PolicyError(
                f"these clips were made for {clips.fps} frames a second, got fps={fps!r}; leave fps out, or give "
                "stream() the same"
            )
        speed = clips.fps
    frames = _frames(clips, row)
    first = next(frames, None)
    if first is None:
        raise GeometryError("a video file needs at least one frame, got no clips; a stream can be written only once")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise GeometryError(f"a video file needs an even height and width, got {height} x {width}")
    written = 0
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=speed)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        try:
            for frame in chain([first], frames):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                written += 1
        finally:  # the encoder holds back the newest frames
            file.mux(stream.encode())
    return written


def _frames(clips: Iterable[Any], row: int) -> Iterator[Any]:
    """The frames of row `row`, [height, width, 3] each, from 0 to 255."""
    size: tuple[int, ...] | None = None
    for number, clip in enumerate(clips):
        shape = tuple(clip.shape) if isinstance(clip, Tensor | np.ndarray) else f"a {type(clip).__name__}"
        if isinstance(shape, str) or len(shape) != 5 or shape[2 if isinstance(clip, Tensor) else 4] != 3:
            raise GeometryError(
                "a video file needs clips of 3 channels, [batch, frames, height, width, 3] or, as tensors, "
                f"[batch, frames, 3, height, width], got {shape}; stream them as 'np' or 'pt', not 'latent'"
            )
        if row >= shape[0]:
            raise GeometryError(f"row {row} was asked for, and clip {number} has {shape[0]} rows, counted from 0")
        pixels = as_tensor(clip[row], "frames of a video file")
        if pixels.dtype != torch.uint8:
            pixels = (in_unit(pixels, f"frames of a video file (clip {number})") * 255).round().byte()
        pixels = pixels.permute(0, 2, 3, 1) if isinstance(clip, Tensor) else pixels
        found = tuple(pixels.shape[1:3])
        if size is not None and found != size:
            raise GeometryError(
                f"the frames of a video file are of one size, {size} so far, got {found} in clip {number}"
            )
        size = found
        yield from np.ascontiguousarray(pixels.cpu().numpy())
