"""The prompts of a video by the second from which they hold."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from torch import Tensor

from kvtiers import GeometryError, PolicyError


def by_second(prompt: Any, embeds: Any, *, width: int, encoder: bool) -> dict[float, Any]:
    """The prompt, or its embedding, from each second on.

    width: of an embedding. encoder: whether there is a text encoder. Raises `PolicyError` or `GeometryError` for what
    is no prompt.
    """
    if (prompt is None) == (embeds is None):
        raise PolicyError("give prompt or prompt_embeds, one of them")
    given = embeds if prompt is None else prompt
    each = dict(given) if isinstance(given, Mapping) else {0.0: given}
    wrong = [second for second in each if not is_finite(second) or second < 0]
    if wrong:
        raise PolicyError(f"prompts change at finite numbers of seconds, 0 or more, got {wrong[0]!r}")
    if 0 not in each:
        raise PolicyError(f"a prompt that changes needs one from second 0, got {sorted(each)}")
    for one in each.values():
        if embeds is None:
            check_prompt(one, encoder=encoder)
        else:
            check_embeds("prompt_embeds", one, width)
    rows = {rows_of(one) for one in each.values()}
    if len(rows) > 1:
        raise GeometryError(f"prompts of one video are of one batch size, got {sorted(rows)}")
    return {float(second): each[second] for second in sorted(each)}


def negative(prompt: Any, embeds: Any, *, guided: bool, rows: int, width: int, encoder: bool) -> Any:
    """The negative prompt, or its embedding: one for all rows, or one each. None without guidance.

    With guidance and neither of them it is the empty prompt, as in diffusers. Raises `PolicyError` or `GeometryError`.
    """
    if not guided:
        name = next(
            (n for n, x in (("negative_prompt", prompt), ("negative_prompt_embeds", embeds)) if x is not None), None
        )
        if name is not None:
            raise PolicyError(
                f"got {name}, which acts only with a guidance_scale of more than 1; leave it out, or guide"
            )
        return None
    if prompt is not None and embeds is not None:
        raise PolicyError("give negative_prompt or negative_prompt_embeds, one of them")
    if embeds is not None:
        check_embeds("negative_prompt_embeds", embeds, width)
    elif prompt is None and not encoder:
        raise PolicyError(
            "guidance needs a negative prompt, the empty one if nothing else, and this pipeline has no text encoder; "
            "give negative_prompt_embeds"
        )
    else:
        check_prompt("" if prompt is None else prompt, encoder=encoder)
    found = embeds if embeds is not None else prompt or ""
    if rows_of(found) not in (1, rows):
        raise GeometryError(f"there are {rows} prompts and {rows_of(found)} negative ones; give one, or one for each")
    return found


def check_prompt(prompt: Any, *, encoder: bool) -> None:
    """Raise `PolicyError` unless `prompt` is one text, or a list of one for each row, that can be encoded."""
    words = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise PolicyError(f"a prompt is a string, or a list with one for each row, got {prompt!r}")
    if not encoder:
        raise PolicyError("this pipeline has no text encoder; give prompt_embeds, or load it with one")


def check_embeds(name: str, embeds: Any, width: int) -> None:
    """Raise `GeometryError` unless `embeds` are embeddings of prompts."""
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or embeds.shape[2] != width or not embeds.numel():
        raise GeometryError(f"{name} are [batch, words, {width}], got {described(embeds)}")


def rows_of(prompt: str | list[str] | Tensor) -> int:
    """How many videos `prompt` describes."""
    return 1 if isinstance(prompt, str) else len(prompt)


def since(texts: Mapping[float, Tensor], second: float) -> float:
    """Since when the text has been the one that it is at `second`."""
    return max(start for start in texts if start <= second + 1e-9)


def is_finite(got: Any) -> bool:
    """Whether `got` is a finite number."""
    return isinstance(got, int | float) and not isinstance(got, bool) and isfinite(got)


def described(got: Any) -> str:
    """The shape of a tensor, the type of anything else."""
    return str(tuple(got.shape)) if isinstance(got, Tensor) else f"a {type(got).__name__}"
