"""Realigner `unrotated`: blocks stay where they were, and keys are held unrotated and turned there when attended.

It places as `original` does, and as ShadowKV (arXiv 2410.21465) does, whose keys are of low rank before rotation.
"""

from typing import ClassVar

import attrs

from kvtiers_policies.original import Original


@attrs.frozen(kw_only=True)
class Unrotated(Original):
    """Leave a gap where blocks are not attended. For a codec or a compressor that wants keys before rotation."""

    rotates: ClassVar[bool] = True
