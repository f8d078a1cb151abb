"""What the integrations know of models, for `kvtiers plan`. A model library is imported when it is asked for."""

from collections.abc import Callable, Mapping
from typing import Any

from kvtiers.hookspecs import hookimpl
from kvtiers.planning import Shape


@hookimpl
def kvtiers_shapes() -> Mapping[str, Callable[..., Shape | None]]:
    """Video models of diffusers, and language models of transformers."""
    return {"diffusers": _video, "transformers": _text}


def _video(model: str, **wanted: Any) -> Shape | None:
    """A Wan: wan2.1-t2v-1.3b, wan2.1-t2v-14b, or a folder."""
    from kvtiers_diffusers.shapes import shape

    return shape(model, **wanted)


def _text(model: str, **wanted: Any) -> Shape | None:
    """A language model: a hub id, a folder, or smollm2."""
    from kvtiers_transformers.shapes import shape

    return shape(model, **wanted)
