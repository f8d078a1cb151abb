"""Prompts and their embeddings. A prompt names the room and its curtain, and nothing that is in it."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers.errors import KVTiersError, suggest
from kvtiers_packforcing.tiny_world.vocabulary import ROOMS
from kvtiers_packforcing.tiny_world.walks import Walks

TEXT_WIDTH = 64
WORDS = (*ROOMS, "curtain", "open", "closed")
PROMPT_WORDS = 3
_SEED = "kvtiers: the text table of the tiny world"


class PromptError(KVTiersError, ValueError):
    """When a prompt has a word that the tiny world does not know, or is not a room and its curtain."""


def text_table() -> Float[Tensor, "words text_width"]:
    """A vector of signs for each of `WORDS`: fixed, and nearly orthogonal to one another."""
    draw = random.Random(_SEED)
    return torch.tensor([[1.0 if draw.random() < 0.5 else -1.0 for _ in range(TEXT_WIDTH)] for _ in WORDS])


def prompt_of(room: str, curtain: bool) -> str:
    """As in `hall, curtain open`."""
    return f"{room}, curtain {'closed' if curtain else 'open'}"


def prompts_of(walks: Walks, row: int = 0) -> list[str]:
    """The prompt of every block of a walk."""
    pairs = zip(walks.rooms[row].tolist(), walks.curtains[row].tolist(), strict=True)
    return [prompt_of(ROOMS[room], curtain) for room, curtain in pairs]


def embed(prompts: Sequence[str]) -> Float[Tensor, "prompts prompt_words text_width"]:
    """What a model is given for each prompt, before its own text projection."""
    return text_table()[torch.tensor([_words(prompt) for prompt in prompts], dtype=torch.int64)]


def embed_walks(walks: Walks) -> Float[Tensor, "batch blocks prompt_words text_width"]:
    """The embedding of every block's prompt."""
    curtain = torch.full_like(walks.rooms, WORDS.index("curtain"))
    state = torch.where(walks.curtains, WORDS.index("closed"), WORDS.index("open"))
    return text_table()[torch.stack((walks.rooms, curtain, state), -1)]


def _words(prompt: str) -> list[int]:
    words = prompt.replace(",", " ").split()
    for word in words:
        if word not in WORDS:
            raise PromptError(
                f"{prompt!r} has an unknown word {word!r}; known are {', '.join(WORDS)}.{suggest(word, WORDS)}"
            )
    found = [WORDS.index(word) for word in words]
    if (
        len(words) != PROMPT_WORDS
        or words[0] not in ROOMS
        or words[1] != "curtain"
        or words[2] not in ("open", "closed")
    ):
        raise PromptError(f"a prompt is a room and its curtain, as in {prompt_of(ROOMS[0], False)!r}; got {prompt!r}")
    return found
