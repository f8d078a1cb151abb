"""How a block is made of noise, step by step, through the cache."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeVar

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor

from kvtiers_diffusers.schedule import clean, noised
from kvtiers_packforcing.guidance import guided

KINDS = ("euler", "multistep", "renoise")
_SHIFT = 5.0
Sigma = TypeVar("Sigma", Tensor, float)


def shifted(sigma: Sigma, shift: float = _SHIFT) -> Sigma:
    """Wan's shift of noise levels: more of them are high."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@attrs.frozen(kw_only=True)
class Sampler:
    """How many steps a block takes, and what a step does.

    shift: Wan's shift of the evenly spaced noise levels: beyond 1, more of them are high.
    kind: `euler` goes along the flow to the next noise level. `multistep` extrapolates from this flow and that of the
        step before (the method of Adams and Bashforth of second order, for steps of unequal length). It asks the model
        as often, and errs less. `renoise` tells the clean block at every step and adds fresh noise to the next
        level, as models do that were distilled to few steps (Self-Forcing, arXiv 2506.08009).
    guidance: how far a step goes on from the prompt's flow, away from that without a prompt: prompt + guidance *
        (prompt - without). 0 looks at the prompt alone and takes half the time.
    """

    steps: int = attrs.field(default=4, validator=[v.instance_of(int), v.ge(1)])
    shift: float = attrs.field(default=_SHIFT, validator=[v.instance_of((int, float)), v.gt(0), v.lt(float("inf"))])
    kind: Literal["euler", "multistep", "renoise"] = attrs.field(default="euler", validator=v.in_(KINDS))
    guidance: float = attrs.field(default=0.0, validator=[v.instance_of((int, float)), v.ge(0)])

    @property
    def noises(self) -> int:
        """How often noise is drawn for a block."""
        return self.steps if self.kind == "renoise" else 1

    def sigmas(self) -> list[float]:
        """Noise levels, from 1 down to 0: one more than there are steps."""
        line = torch.linspace(1, 0, self.steps + 1)
        levels: list[float] = shifted(line, self.shift).tolist()
        return levels

    def denoise(
        self,
        wan: Any,
        noises: Sequence[Float[Tensor, "batch channels frames height width"]],
        text: Float[Tensor, "#batch prompt_words text_width"],
    ) -> Float[Tensor, "batch channels frames height width"]:
        """A clean block. It is not committed. wan: a `CausalWan`. noises: as many as `noises` says."""
        block, without = noises[0], torch.zeros_like(text) if self.guidance else None
        last: tuple[Tensor, float] | None = None
        for nth, (before, after) in enumerate(pairwise(self.sigmas()), 1):
            tell = partial(wan.denoise, block, before * 1000)
            flow, length = guided(tell, text, without, self.guidance), after - before
            if self.kind == "renoise":
                block = clean(block, flow, before * 1000)
                block = noised(block, noises[nth], after * 1000) if after else block
                continue
            bend = 0.0 if last is None or self.kind == "euler" else (flow - last[0]) * (length / last[1] / 2)
            block, last = block + length * (flow + bend), (flow, length)
        return block
