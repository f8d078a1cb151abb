"""Layouts: which blocks of a clip each block attends, and in which form, as the cache of a policy has it."""

from collections.abc import Mapping
from typing import Literal

import attrs
import torch
from jaxtyping import Bool
from torch import Tensor

from kvtiers_packforcing.training.config import one_of, whole, yes_or_no

Form = Literal["full", "compressed"]


@attrs.frozen(kw_only=True)
class Layout:
    """Sink and recent blocks are attended in full; what lies between compressed, in full or not at all.

    PackForcing is `Layout()`. A full history is `mid="full"`, a window is `mid="none"`, a rolling one has no sink.
    itself: noisy blocks attend their own clean block too, compressed. No cache does this. It teaches a compressor and
    what reads its tokens, since every block then needs them.
    """

    sink_blocks: int = whole(0, default=1)
    recent_blocks: int = whole(0, default=1)
    mid: str = one_of("compressed", "full", "none", default="compressed")
    itself: bool = yes_or_no(default=False)

    def history(self, block: int) -> list[tuple[int, Form]]:
        """The blocks that `block` attends besides itself, oldest first."""
        found: list[tuple[int, Form]] = []
        for past in range(block):
            if past < self.sink_blocks or past >= block - self.recent_blocks or self.mid == "full":
                found.append((past, "full"))
            elif self.mid == "compressed":
                found.append((past, "compressed"))
        return found

    def forms(self, blocks: int) -> Bool[Tensor, "blocks earlier"]:
        """Which earlier blocks each block of a clip attends compressed."""
        every = range(blocks)
        seen = [dict(self.history(block)) for block in every]
        return torch.tensor([[forms.get(past) == "compressed" for past in every] for forms in seen])

    def compressed(self, blocks: int) -> list[int]:
        """The blocks of a clip that some block attends compressed."""
        if self.itself:
            return list(range(blocks))
        return sorted({past for block in range(blocks) for past, form in self.history(block) if form == "compressed"})


LAYOUTS: Mapping[str, Layout] = {
    "packforcing": Layout(),
    "sink_window": Layout(mid="none"),
    "window": Layout(sink_blocks=0, mid="none"),
    "compressed_past": Layout(sink_blocks=0, recent_blocks=0),
    "compressed_self": Layout(sink_blocks=0, recent_blocks=0, mid="none", itself=True),
    "no_sink": Layout(sink_blocks=0),
    "full": Layout(mid="full"),
}
"""What stage `student` trains with, by name. Of five blocks, a full history is what a window of five has."""
