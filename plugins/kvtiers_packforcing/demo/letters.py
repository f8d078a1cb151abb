"""What the pictures of the demonstration share: colours of rooms and memories, letters, and pictures of frames."""

from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageFont
from torch import Tensor

ROOM_COLOURS = {
    "hall": "#4e79a7",
    "attic": "#f28e2b",
    "cellar": "#59a14f",
    "kitchen": "#e15759",
    "study": "#b07aa1",
    "porch": "#edc948",
}
MEMORY_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999")
"""Of lines in a plot, in the order in which memories were named."""


@cache
def letters(size: int, *, bold: bool = False) -> Any:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def clock(seconds: int) -> str:
    """As in `1:05`."""
    return f"{seconds // 60}:{seconds % 60:02}"


def enlarged(frame: Tensor, scale: int) -> Any:
    """A frame, [3, height, width] in 0 to 255, as a picture `scale` times as large."""
    picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
