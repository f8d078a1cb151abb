"""What a video begins with: an image, the frames of a clip, or its latents."""

from typing import Any

import attrs
import torch
from torch import Tensor

from kvtiers import GeometryError, NotFiniteError, PolicyError
from kvtiers_diffusers.encoding import encoded
from kvtiers_diffusers.pictures import as_tensor, in_unit
from kvtiers_diffusers.texts import described


@attrs.frozen(eq=False, kw_only=True)
class Beginning:
    """A clip that is committed before a video goes on from it.

    latents: normalised, [rows, channels, frames, height, width]; None if they are still to be encoded.
    pixels: from -1 to 1, [rows, 3, pixel frames, height, width]; None if latents were given.
    lengths: latent frames of each block. even: whether all are whole blocks; if not, the first one is shorter.
    """

    latents: Tensor | None
    pixels: Tensor | None
    lengths: list[int]
    even: bool

    def blocks(self, vae: Any, device: Any, dtype: torch.dtype) -> list[Tensor]:
        """The latents of each block, on `device`."""
        found = self.latents
        if found is None and self.pixels is not None:
            found = encoded(vae, self.pixels.to(device))
        return [] if found is None else list(found.to(device, dtype).split(self.lengths, 2))

    @property
    def frames(self) -> int:
        """Latent frames of it."""
        return sum(self.lengths)


def beginning(image: Any, clip: Any, shape: tuple[int, ...], scale: tuple[int, int]) -> Beginning | None:
    """What `stream` was given to begin with; None for nothing.

    shape: of a block of latents. scale: frames and pixels that one latent stands for. Raises `PolicyError`,
    `GeometryError` or `NotFiniteError` for what is no beginning of such a video.
    """
    if image is not None and clip is not None:
        raise PolicyError("give image or clip, one of them; an image is a clip of one frame")
    if image is None and clip is None:
        return None
    size = tuple(side * scale[1] for side in shape[3:])
    latents = pixels = None
    if image is not None:
        pixels = _frames(image, "an image", shape[0], size, axes=3)
    elif isinstance(clip, Tensor) and clip.dim() == 5 and (clip.shape[1], *clip.shape[3:]) == (shape[1], *shape[3:]):
        latents = clip
    elif isinstance(clip, Tensor) and (clip.dim() != 5 or clip.shape[2] != 3):
        raise GeometryError(
            f"a clip is latents [{shape[0]}, {shape[1]}, n, {shape[3]}, {shape[4]}], or pixels "
            f"[{shape[0]}, n, 3, {size[0]}, {size[1]}] from 0 to 1, got {described(clip)}"
        )
    else:
        pixels = _frames(clip, "a clip", shape[0], size, axes=4)
    given = pixels if latents is None else latents
    if given is None or not given.shape[2]:
        raise GeometryError(f"a clip has one or more frames, got {described(clip)}")
    if given.shape[0] not in (1, shape[0]):
        raise GeometryError(
            f"there are {shape[0]} rows of prompts and {given.shape[0]} of clips; give one, or one for each"
        )
    frames = given.shape[2]
    if latents is None:
        if (frames - 1) % scale[0]:
            raise GeometryError(
                f"a clip of pixels has 1 + {scale[0]}n frames, of which latents are made, got {frames}; cut it to "
                f"{frames - (frames - 1) % scale[0]}"
            )
        frames = 1 + (frames - 1) // scale[0]
    elif not bool(given.isfinite().all()):
        raise NotFiniteError("the latents of this clip hold NaN or infinity")
    rest, whole = frames % shape[2], frames // shape[2]
    lengths = [*([rest] if rest else []), *[shape[2]] * whole]
    latents, pixels = (None if x is None else x.expand(shape[0], *x.shape[1:]) for x in (latents, pixels))
    return Beginning(latents=latents, pixels=pixels, lengths=lengths, even=not rest)


def _frames(given: Any, what: str, rows: int, size: tuple[int, ...], *, axes: int) -> Tensor:
    """Pixels from -1 to 1, [rows, 3, frames, height, width]. axes: of one image or clip alone, without rows."""
    found = _stacked(given, what)
    if found.dim() == axes:
        found = found[None]
    if found.dim() != axes + 1:
        raise GeometryError(f"{what} has {axes} axes, or {axes + 1} with rows, got {tuple(found.shape)}")
    if axes == 3:
        found = found[:, None]
    # tensors have their colours before height and width, arrays and images behind
    found = found.permute(0, 2, 1, 3, 4) if _is_tensor(given) else found.permute(0, 4, 1, 2, 3)
    if found.shape[1] != 3 or tuple(found.shape[3:]) != size:
        raise GeometryError(
            f"{what} for this video has 3 colours, height and width {size}, got {found.shape[1]} colours, "
            f"{tuple(found.shape[3:])}; resize it, or give stream() its height and width"
        )
    return in_unit(found, f"the pixels of {what}") * 2 - 1


def _stacked(given: Any, what: str) -> Tensor:
    """Images, in lists or not, as one tensor."""
    if isinstance(given, list):
        if not given:
            raise GeometryError(f"{what} has one or more frames, got an empty list")
        parts = [_stacked(one, what) for one in given]
        if len({(part.shape, part.dtype) for part in parts}) > 1:
            raise GeometryError(f"the frames of {what} are of one shape, got {sorted({tuple(p.shape) for p in parts})}")
        return torch.stack(parts)
    return as_tensor(given, f"the frames of {what}")


def _is_tensor(given: Any) -> bool:
    """Whether tensors are given, in lists or not."""
    return _is_tensor(given[0]) if isinstance(given, list) and given else isinstance(given, Tensor)
