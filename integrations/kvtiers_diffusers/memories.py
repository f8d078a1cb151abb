"""What a video remembers when more than one forward makes a step: guidance, and two transformers of Wan 2.2."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
from torch import Tensor

from kvtiers import bytes_in
from kvtiers_diffusers.causal_wan import CausalWan, tiered


@attrs.frozen(eq=False, kw_only=True)
class Memories:
    """One `CausalWan` for every transformer that takes part, and a second of each for the negative prompt.

    Every one of them remembers every clean block: keys and values are those of its own transformer and its own prompt.

    high: for timesteps from `boundary` on; low: for those below it. The same one where a single transformer makes all
    steps. high_negative, low_negative: those of the negative prompt; None without guidance.
    """

    high: CausalWan
    low: CausalWan
    boundary: float
    high_negative: CausalWan | None = None
    low_negative: CausalWan | None = None

    def denoise(
        self, block: Tensor, timestep: float, text: Tensor, negative: Tensor | None, scales: tuple[float, float]
    ) -> Tensor:
        """The flow at one timestep: negative + scale * (positive - negative).

        scales: of guidance, for high and low noise. At 1 the negative prompt is not asked.
        """
        high = self.is_high(timestep)
        wan, other = (self.high, self.high_negative) if high else (self.low, self.low_negative)
        scale = scales[0] if high else scales[1]
        flow = wan.denoise(block, timestep, text)
        if other is None or negative is None or scale == 1:
            return flow
        without = other.denoise(block, timestep, negative)
        return without + scale * (flow - without)

    def commit(self, block: Tensor, text: Tensor, negative: Tensor | None, pixels: Tensor | None) -> None:
        """Every memory takes the clean block in, each with its own prompt."""
        for wan in self.positive:
            wan.commit(block, text, pixels)
        for wan in self.negative:
            wan.commit(block, text if negative is None else negative, pixels)

    def forget_prompts(self) -> None:
        """Project prompts anew from here on, since weights were changed, such as adapters that were switched."""
        for wan in self.all:
            wan.forget_prompts()

    def is_high(self, timestep: float) -> bool:
        """Whether a step belongs to the transformer for high noise."""
        return timestep >= self.boundary

    @property
    def positive(self) -> list[CausalWan]:
        """Those that follow the prompt, one for each transformer."""
        return [self.high] if self.low is self.high else [self.high, self.low]

    @property
    def negative(self) -> list[CausalWan]:
        """Those that follow the negative prompt."""
        others = [self.high_negative] if self.low is self.high else [self.high_negative, self.low_negative]
        return [wan for wan in others if wan is not None]

    @property
    def all(self) -> list[CausalWan]:
        """Every memory of this video."""
        return [*self.positive, *self.negative]

    @property
    def needs_pixels(self) -> bool:
        """Whether a commit looks at the block's pixels."""
        return any(wan.needs_pixels for wan in self.all)

    def describe(self) -> str:
        """How much is attended and held, on one line."""
        attended = sum(max(wan.attended(), default=0) for wan in self.all)
        held = sum(bytes_in(wan.memory_usage(), "device") for wan in self.all)
        return f"{attended:,} tokens, {held / 1e9:.2f} GB"


@contextmanager
def remembering(
    transformers: Sequence[Any], *, boundary: float, guided: bool, networks: Sequence[Any], **options: Any
) -> Iterator[Memories]:
    """The memories of one video, over one transformer or two (high noise, low noise). All are restored at the end.

    networks: trained weights of the policy's compressor for each transformer, or None.
    """
    with ExitStack() as stack:
        made = [
            [
                stack.enter_context(tiered(transformer, compressor_network=network, **options))
                for transformer, network in zip(transformers, networks, strict=True)
            ]
            for _ in range(1 + guided)
        ]
        others = made[1] if guided else [None, None]
        yield Memories(
            high=made[0][0],
            low=made[0][-1],
            high_negative=others[0],
            low_negative=others[-1],
            boundary=boundary,
        )
