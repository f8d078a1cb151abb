"""`Clips`: the clips of a video that is being made, one after the other."""

from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import Any

import torch

from kvtiers import InterruptedForwardError


class Clips(Iterator[Any]):
    """What `CausalWanPipeline.stream` gives: each `next()` makes the clip of one more block.

    fps: frames a second, which `write_video` gives the file. A list made of the clips does not have it.

    If making one fails, the video is over: whoever asks for more gets `InterruptedForwardError`, and not the end of the
    video as if it were whole. `close()` ends it early and gives the model back.
    """

    def __init__(self, made: Generator[Any, None, None], fps: Fraction) -> None:
        self.fps = fps
        self._made = made
        self._failed: BaseException | None = None

    def __next__(self) -> Any:
        if self._failed is not None:
            raise InterruptedForwardError(
                f"this video failed ({type(self._failed).__name__}) and cannot go on; begin another with stream(), "
                "from a clip of what was made if you like"
            ) from self._failed
        try:
            with torch.no_grad():
                return next(self._made)
        except StopIteration:
            raise
        except BaseException as error:
            self._failed = error
            raise

    def close(self) -> None:
        """Make no more, and give the model back as it was."""
        self._made.close()
