"""What a policy's compressor must offer to reduce blocks before the model sees them, as PackForcing's does.

Source: PackForcing (arXiv 2603.25730) section 3.2. A compressor says `given = True` and has `bind`; nothing else of it
is known here, so that it may come from any plugin.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Reduced(Protocol):
    """Input tokens of the transformer that stand for one block at reduced resolution.

    offsets: [tokens, axes], positions from the start of the block. span: steps that it occupies when placed.
    """

    @property
    def tokens(self) -> Tensor:
        """[batch, tokens, channels], what the patch embedding would have yielded. Read once, while the model runs and
        before its first layer: what is kept elsewhere between passes, such as the patch embedding, is there then."""

    @property
    def offsets(self) -> Tensor: ...
    @property
    def span(self) -> int: ...


@runtime_checkable
class Reducer(Protocol):
    """A compressor at work on one model and one video."""

    needs_pixels: bool
    """Whether `reduce` must be given the pixels."""

    def reduce(self, latents: Tensor, pixels: Tensor | None) -> Reduced:
        """The reduced tokens of a clean block; called once per commit, in order, unless `skip` is. After a commit that
        failed, `restore` takes it back.

        latents: [batch, channels, frames, height, width]. pixels: [batch, 3, frames, height, width] from -1 to 1, what
        was streamed of the block; None if nobody decoded it.
        """

    def skip(self, latents: Tensor, pixels: Tensor | None) -> None:
        """A clean block goes by that is an anchor in every layer, so that nobody will ask for its reduced tokens."""

    def remembered(self) -> dict[str, Tensor]:
        """What later blocks depend on of those before; the tensors are not written in place afterwards."""

    def restore(self, remembered: Mapping[str, Tensor]) -> None:
        """Go on from what `remembered` gave."""

    def reset(self) -> None:
        """Another video begins."""


@runtime_checkable
class Reduces(Protocol):
    """A compressor whose compressed form the model itself projects to each layer's keys and values at commit."""

    given: bool

    def bind(self, model: Any, vae: Any, network: Any = None) -> Reducer:
        """What reduces blocks for `model`. vae: its autoencoder, or None; `PolicyError` is raised if it needs one.
        network: trained weights at hand, instead of those that the settings name."""
