"""What a plugin tells `kvtiers plan` of a model (the hook `kvtiers_shapes`)."""

import attrs

from kvtiers.geometry import Geometry


@attrs.frozen(kw_only=True)
class Shape:
    """A model and how much of it is wanted.

    layers: how many are tiered; geometry: of each. steps: history wanted, in steps of the time axis.
    growth_steps, growth_unit: the stretch for which the growth of the archive is told, as in 960 frames, "minute".
    """

    name: str
    layers: int
    geometry: Geometry
    steps: int
    growth_steps: int
    growth_unit: str

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.steps * self.geometry.tokens_per_step

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layers * self.geometry.token_bytes
