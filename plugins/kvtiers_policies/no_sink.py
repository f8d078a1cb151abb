"""Sink `none`: no anchors, as in a plain sliding window (Longformer, arXiv 2004.05150, section 3.1)."""

import attrs

from kvtiers.blocks import Extent
from kvtiers.slots import Sink


@attrs.frozen(kw_only=True)
class NoSink(Sink):
    """No block is an anchor, whatever `sink` says."""

    def is_anchor(self, block: Extent, sink: int) -> bool:
        return False
