"""Writing a video to a file block by block, as it is made."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kvtiers import GeometryError


def write_video(path: str | Path, clips: Iterable[Any], *, fps: int = 16, row: int = 0) -> int:
    """Write row `row` of each of `clips` (`stream`'s output as "np" or "pt") to an H.264 file; returns its frames.

    Frames are from 0 to 1, [batch, frames, height, width, 3] (arrays) or [batch, frames, 3, height, width] (tensors),
    of even height and width.
    """
    import av

    written = 0
    with av.open(str(path), "w") as file:
        stream: Any = None
        for clip in clips:
            frames = clip[row].float().permute(0, 2, 3, 1).cpu().numpy() if isinstance(clip, Tensor) else clip[row]
            for frame in np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8):
                if stream is None:
                    height, width = frame.shape[:2]
                    if height % 2 or width % 2:
                        raise GeometryError(f"a video file needs an even height and width, got {height} x {width}")
                    stream = file.add_stream("libx264", rate=Fraction(fps))
                    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
                written += 1
        if stream is not None:
            file.mux(stream.encode())
    return written
