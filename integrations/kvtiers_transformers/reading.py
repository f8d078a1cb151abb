"""Reading a long document with a model under a policy, and asking about it: what the demo and the benchmarks share."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import bytes_in
from kvtiers_transformers.cache import TransformersCache

STRIDE = 512
"""Tokens fed at once: small enough for a progress bar, and on every policy's chunk grid."""


@attrs.frozen(eq=False, kw_only=True)
class Reading:
    """What it took to read a document.

    losses: nats per token, the first token excepted. positions: tokens read when the sizes beside were taken.
    device_bytes, host_bytes (disk included): held then. seconds: of the forwards alone.
    """

    losses: Tensor
    positions: list[int]
    device_bytes: list[int]
    host_bytes: list[int]
    seconds: float

    @property
    def perplexity(self) -> float:
        """Of the whole document."""
        return float(self.losses.mean().exp())

    def parts(self, count: int) -> list[float]:
        """Perplexity of `count` equal parts of the document."""
        return [float(part.mean().exp()) for part in self.losses.chunk(count)]


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    ids: Sequence[int],
    cache: TransformersCache,
    *,
    stride: int = STRIDE,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Reading:
    """Stream `ids` through `model`, `stride` tokens at a time; `advance` is told how many tokens were just read."""
    tokens = torch.tensor([list(ids)], device=model.device)
    losses, positions, device, host = [], [], [], []
    seconds, last = 0.0, None
    for start in range(0, tokens.shape[1], stride):
        piece = tokens[:, start : start + stride]
        began = time.perf_counter()
        logits = model(piece, past_key_values=cache).logits[0].float()
        seconds += time.perf_counter() - began
        guesses = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
        targets = piece[0, 1:] if last is None else piece[0]
        losses.append(torch.nn.functional.cross_entropy(guesses, targets, reduction="none").cpu())
        last = logits[-1:]
        held = cache.memory_usage()
        positions.append(start + piece.shape[1])
        device.append(bytes_in(held, "device"))
        host.append(bytes_in(held, "host") + bytes_in(held, "disk"))
        advance(piece.shape[1])
    return Reading(losses=torch.cat(losses), positions=positions, device_bytes=device, host_bytes=host, seconds=seconds)


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Sequence[int],
    cache: TransformersCache,
    *,
    tokens: int = 8,
) -> tuple[str, float]:
    """Feed `question` and continue greedily by `tokens` tokens; returns the text and the seconds per decoded token."""
    logits = model(torch.tensor([list(question)], device=model.device), past_key_values=cache, logits_to_keep=1).logits
    said: list[int] = []
    began = time.perf_counter()
    for _ in range(tokens):
        best = logits[0, -1].argmax()
        said.append(int(best))
        logits = model(best[None, None], past_key_values=cache, logits_to_keep=1).logits
    return str(tokenizer.decode(said)), (time.perf_counter() - began) / tokens


@attrs.frozen(kw_only=True)
class Needle:
    """A document with a five-digit key in it, and the question for it, as token ids."""

    document: list[int]
    question: list[int]
    key: str

    def found_in(self, text: str) -> bool:
        return self.key in text.replace(" ", "")


def needle(prose: Sequence[int], encode: Callable[[str], list[int]], *, tokens: int, depth: float, seed: int) -> Needle:
    """Plant a key in `tokens` tokens of `prose`, `depth` of the way in; `seed` picks the key and the passage.

    The question comes after the document and is not known while it is read.
    """
    dice = random.Random(seed)
    key = str(dice.randint(10_000, 99_999))
    plant = encode(f"\n\nThe secret key is {key}. Remember it: the secret key is {key}.\n\n")
    question = encode("\n\nQuestion: What is the secret key mentioned in the text?\nAnswer: The secret key is")
    length = tokens - len(plant) - len(question)
    first = dice.randrange(0, max(1, len(prose) - length))
    passage = list(prose[first : first + length])
    at = int(len(passage) * depth)
    return Needle(document=passage[:at] + plant + passage[at:], question=question, key=key)


def narrow_table(title: str) -> Table:
    """A table that fits a terminal of 80 columns."""
    return Table(title=title, box=box.SIMPLE_HEAD, padding=0)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Text to ids, without special tokens."""

    def encode(text: str) -> list[int]:
        ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    return encode
