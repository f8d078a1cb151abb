"""Rotary position embedding: rotate a key once, in float32, from its stored value to the position it has."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers.errors import RotaryError
from kvtiers.geometry import spread

Layout = Literal["half", "interleaved"]
_TABLES_KEPT = 8


class Rotary:
    """How one model rotates queries and keys.

    frequencies: inverse frequencies (radians per step), one tensor per axis (text: time; video: time, height, width).
    layout: `half` pairs channel i with i + n/2 (Llama); `interleaved` pairs 2i with 2i + 1 (GLM, Wan).
    scaling: what cos and sin are multiplied by (yarn's attention scaling).
    first: the first channel that is rotated. As many as twice the number of frequencies are, the others are not.

    Source: RoFormer (arXiv 2104.09864) equation 15; several axes: PackForcing (arXiv 2603.25730) section 3.4.
    """

    def __init__(
        self,
        frequencies: Sequence[Float[Tensor, " _"]],
        *,
        layout: Layout = "half",
        scaling: float = 1.0,
        first: int = 0,
        angle_dtype: torch.dtype = torch.float32,
    ) -> None:
        if layout not in ("half", "interleaved"):
            raise RotaryError(f"unknown rotary layout {layout!r}; allowed: 'half', 'interleaved'")
        if layout == "half" and len(frequencies) > 1:
            raise RotaryError(f"layout 'half' rotates one axis, got {len(frequencies)}; use layout='interleaved'")
        self.frequencies = tuple(f.detach().to(angle_dtype).clone() for f in frequencies)
        self._axes = torch.cat([torch.full((f.numel(),), i, device=f.device) for i, f in enumerate(self.frequencies)])
        """The axis that each frequency belongs to."""
        self.layout: Layout = layout
        self.scaling, self.first = float(scaling), first
        self.angle_dtype = angle_dtype
        self.fingerprint = (layout, self.scaling, first, angle_dtype, *(tuple(f.tolist()) for f in self.frequencies))
        """Rotary embeddings with equal fingerprints rotate alike."""
        self._tables: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()

    @property
    def axes(self) -> int:
        return len(self.frequencies)

    @property
    def width(self) -> int:
        """How many channels are rotated."""
        return 2 * sum(f.numel() for f in self.frequencies)

    def table(
        self, positions: Float[Tensor, "*batch tokens axes"], dtype: torch.dtype = torch.float32
    ) -> tuple[Float[Tensor, "*batch tokens width"], Float[Tensor, "*batch tokens width"]]:
        """Cosines and sines at `positions`, laid out for `apply`; the sine carries the pair's sign.

        dtype: of what will be rotated: float64 is rotated in float64, everything else in float32.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        axes = self._axes.to(positions.device)
        if not axes.is_meta:  # from there nothing comes back
            self._axes = axes
        frequencies = torch.cat(self.frequencies).to(positions.device)
        angles = positions.to(self.angle_dtype).index_select(-1, axes) * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1:
            cos, sin = cos * self.scaling, sin * self.scaling
        cos, sin = cos.to(wide), sin.to(wide)
        if self.layout == "half":
            return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)

    def run(
        self,
        start: int,
        steps: int,
        grid: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        most: int | None = None,
    ) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "tokens width"]]:
        """`table` of consecutive steps from `start`, remembered: all layers of a forward ask for the same few.

        most: of no more than so many of their tokens, evenly spaced.
        """

        def positions() -> Tensor:
            time = torch.arange(steps, dtype=torch.float64, device=device) + start
            axes = [time, *(torch.arange(n, dtype=torch.float64, device=device) for n in grid)]
            found = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2) if grid else time[:, None]
            return found if most is None else found.index_select(0, spread(most, len(found), device))

        return self._remembered((start, steps, grid, device, dtype == torch.float64, most), positions, dtype)

    def at(
        self, steps: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Float[Tensor, "rows 1 1 width"], Float[Tensor, "rows 1 1 width"]]:
        """`table` of one step for each row, remembered as that of `run` is."""

        def positions() -> Tensor:
            return torch.tensor(steps, dtype=torch.float64, device=device)[:, None, None, None]

        return self._remembered((steps, device, dtype == torch.float64), positions, dtype)

    def _remembered(self, key: Hashable, positions: Callable[[], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        found = self._tables.get(key)
        if found is None:
            with torch.inference_mode(False):  # a table made under it could not serve a pass with gradients later
                found = self._tables[key] = self.table(positions(), dtype)
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        return found

    def apply(
        self,
        x: Float[Tensor, "*batch tokens head_dim"],
        table: tuple[Float[Tensor, "*#batch tokens width"], Float[Tensor, "*#batch tokens width"]],
    ) -> Float[Tensor, "*batch tokens head_dim"]:
        """Rotate `x` by a table of `table` or `run`, in the table's dtype, and round once to the dtype of `x`."""
        cos, sin = table
        width, stop = cos.shape[-1], self.first + cos.shape[-1]
        whole = width == x.shape[-1]
        turned = x if whole else x[..., self.first : stop]
        turned = turned if turned.dtype == cos.dtype else turned.to(cos.dtype)
        if self.layout == "half":
            partner = turned.roll(width // 2, -1)
        else:
            partner = turned.unflatten(-1, (-1, 2)).roll(1, -1).flatten(-2)  # roll takes half the time of flip
        out = torch.addcmul(turned * cos, partner, sin)
        out = out if out.dtype == x.dtype else out.to(x.dtype)
        return out if whole else torch.cat([x[..., : self.first], out, x[..., stop:]], -1)

    def rotate(
        self,
        x: Float[Tensor, "*batch tokens head_dim"],
        positions: Float[Tensor, "*#batch tokens axes"],
    ) -> Float[Tensor, "*batch tokens head_dim"]:
        """Rotate `x` from position 0 to `positions` (in steps and grid cells, fractions allowed)."""
        return self.apply(x, self.table(positions, x.dtype))

    def advance(
        self, x: Float[Tensor, "*batch tokens head_dim"], steps: int
    ) -> Float[Tensor, "*batch tokens head_dim"]:
        """Rotate what is rotated (and scaled) already by `steps` more along the first axis."""
        further = torch.zeros(x.shape[-2], self.axes, dtype=torch.float64, device=x.device)
        further[:, 0] = steps
        cos, sin = self.table(further, x.dtype)
        return self.apply(x, (cos / self.scaling, sin / self.scaling))
