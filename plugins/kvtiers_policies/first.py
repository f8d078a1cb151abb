"""Sink `first`: the first steps are anchors (StreamingLLM, arXiv 2309.17453; PackForcing, arXiv 2603.25730)."""

import attrs

from kvtiers.blocks import Extent
from kvtiers.slots import Sink


@attrs.frozen(kw_only=True)
class FirstSteps(Sink):
    """A block is an anchor if it starts within the first `sink` steps."""

    def is_anchor(self, block: Extent, sink: int) -> bool:
        return block.start < sink

    def steps(self, sink: int, block: int = 1) -> int:
        return -(-sink // block) * block
