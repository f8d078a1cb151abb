"""Layouts: which blocks of a clip each block attends, and in which form, as the cache of a policy has it."""

from typing import Literal

import attrs

from kvtiers_packforcing.training.config import one_of, whole

Form = Literal["full", "compressed"]


@attrs.frozen(kw_only=True)
class Layout:
    """Sink and recent blocks are attended in full; what lies between compressed, in full or not at all.

    PackForcing is `Layout()`. A full history is `mid="full"`, a window is `mid="none"`, a rolling one has no sink.
    """

    sink_blocks: int = whole(0, default=1)
    recent_blocks: int = whole(0, default=1)
    mid: str = one_of("compressed", "full", "none", default="compressed")

    def history(self, block: int) -> list[tuple[int, Form]]:
        """The blocks that `block` attends besides itself, oldest first."""
        found: list[tuple[int, Form]] = []
        for past in range(block):
            if past < self.sink_blocks or past >= block - self.recent_blocks or self.mid == "full":
                found.append((past, "full"))
            elif self.mid == "compressed":
                found.append((past, "compressed"))
        return found

    def compressed(self, blocks: int) -> list[int]:
        """The blocks of a clip that some later block attends compressed."""
        return sorted({past for block in range(blocks) for past, form in self.history(block) if form == "compressed"})
