"""Videos from files, and the walks that they show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers.errors import MissingExtraError
from kvtiers_packforcing.measures.visits import MeasureError
from kvtiers_packforcing.tiny_world import (
    FIRST_FRAME,
    FRAMES_PER_BLOCK,
    HEIGHT,
    ROOMS,
    WIDTH,
    PromptError,
    Walks,
    embed,
)

SUFFIX = ".mp4"


def files_of(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The videos of each row: a folder is a row of all that it holds, a file a row of its own."""
    rows: dict[str, list[Path]] = {}
    for path in paths:
        if not path.exists():
            raise MeasureError(f"there is no {path}; give {SUFFIX} files, or folders of them")
        files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        wrong = [file for file in files if file.suffix != SUFFIX]
        if not files or wrong:
            raise MeasureError(
                f"{path} {'holds no' if not files else 'is no'} {SUFFIX} file; give one, or a folder of them"
            )
        name = path.name if path.is_dir() else path.stem
        if name in rows:
            raise MeasureError(f"two rows are named {name!r}, the second by {path}; rename one")
        rows[name] = files
    return rows


def walk_in(path: Path) -> Walks:
    """The walk in a text file: one prompt a line, as in `hall, curtain open`, for one second each."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise MeasureError(f"{path} has no prompts; write one a line, as in 'hall, curtain open', for one second each")
    try:
        embed(lines)
    except PromptError as error:
        raise MeasureError(f"{path}: {error}") from error
    words = [line.replace(",", " ").split() for line in lines]
    return Walks(
        rooms=torch.tensor([[ROOMS.index(room) for room, _, _ in words]]),
        curtains=torch.tensor([[state == "closed" for _, _, state in words]]),
    )


def video_in(path: Path) -> Float[Tensor, "1 3 frames height width"]:
    """The frames of a file, in -1 to 1, as many whole blocks as there are."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError(f"reading video files needs {error.name}; pip install 'kvtiers[diffusers]'") from error
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            if (stream.height, stream.width) != (HEIGHT, WIDTH):
                raise MeasureError(
                    f"{path} is {stream.height} x {stream.width}; videos of the tiny world are {HEIGHT} x {WIDTH}"
                )
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    except (av.FFmpegError, IndexError) as error:
        raise MeasureError(f"{path} is no video that can be read ({error}); write it with write_video") from error
    whole = (len(frames) + FIRST_FRAME) // FRAMES_PER_BLOCK * FRAMES_PER_BLOCK - FIRST_FRAME
    if whole < 1:
        raise MeasureError(f"{path} has {len(frames)} frames; a video of one block has 13")
    pixels = torch.from_numpy(np.stack(frames[:whole])).permute(3, 0, 1, 2)[None]
    return pixels.float() / 127.5 - 1
