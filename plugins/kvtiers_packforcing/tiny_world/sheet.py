"""Contact sheets: rows of videos, columns of frames, as a PNG."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor


def contact_sheet(videos: Float[Tensor, "videos 3 frames height width"], path: Path | str, *, scale: int = 1) -> None:
    """Write the frames of each video (in -1 to 1) as a row."""
    from PIL import Image

    framed = torch.nn.functional.pad(videos, (0, 2, 0, 2), value=1.0)
    pixels = framed.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)
