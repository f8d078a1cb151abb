"""Reading a long document with a model under a policy, and asking about it: what the demo and the benchmarks share."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import click
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import Policy, bytes_in
from kvtiers_transformers.cache import TransformersCache
from kvtiers_transformers.document import DOCUMENTS, read_document
from kvtiers_transformers.plain_cache import PlainCache
from kvtiers_transformers.tasks import ASKS_FOR_THE_KEY, passkey, plant
from kvtiers_transformers.versions import CACHE
from kvtiers_transformers.wrap import tiered

STRIDE = 512
"""Tokens fed at once: small enough for a progress bar, and on every policy's chunk grid."""

model_option = click.option(
    "--model", default="smollm2", show_default=True, help="`smollm2`, a hub id, or a local path."
)
document_help = f"What is read: {', '.join(DOCUMENTS)}, or a text file."
document_option = click.option("--document", default="novel", show_default=True, help=document_help)
tokens_option = click.option(
    "--tokens",
    default=4096,
    show_default=True,
    type=click.IntRange(min=256),
    help="Length of each document, in tokens.",
)


def depths_option(default: str = "0.1,0.5,0.9") -> Callable[[Any], Any]:
    """Where in a document keys are planted."""
    return click.option("--depths", default=default, show_default=True, help="Where keys are planted.")


def seeds_option(default: int, *, least: int = 0) -> Callable[[Any], Any]:
    """How many keys are tried at each depth."""
    about = "Keys tried at each depth, each in a passage of its own."
    return click.option("--seeds", default=default, show_default=True, type=click.IntRange(min=least), help=about)


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
    cache: TransformersCache | PlainCache,
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
        logits = model(piece, **{CACHE: cache}).logits[0].float()
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
    cache: TransformersCache | PlainCache,
    *,
    tokens: int = 8,
) -> tuple[str, float]:
    """Feed `question` and continue greedily by `tokens` tokens; returns the text and the seconds per decoded token."""
    logits = model(torch.tensor([list(question)], device=model.device), **{CACHE: cache}, logits_to_keep=1).logits
    said: list[int] = []
    began = time.perf_counter()
    for _ in range(tokens):
        best = logits[0, -1].argmax()
        said.append(int(best))
        logits = model(best[None, None], **{CACHE: cache}, logits_to_keep=1).logits
    return str(tokenizer.decode(said)), (time.perf_counter() - began) / tokens


@attrs.frozen(kw_only=True)
class Needle:
    """A document with a five-digit key in it, `depth` of the way in, and the question for it, as token ids."""

    document: list[int]
    question: list[int]
    key: str
    depth: float

    def found_in(self, text: str) -> bool:
        return self.key in text.replace(" ", "")


def needle(prose: Sequence[int], encode: Callable[[str], list[int]], *, tokens: int, depth: float, seed: int) -> Needle:
    """Plant a key in `tokens` tokens of `prose`, `depth` of the way in; `seed` picks the key and the passage.

    The question comes after the document and is not known while it is read.
    """
    dice = random.Random(seed)
    key = str(dice.randint(10_000, 99_999))
    planted, question = encode(passkey(key)), encode(ASKS_FOR_THE_KEY)
    length = tokens - len(planted) - len(question)
    first = dice.randrange(0, max(1, len(prose) - length))
    document, _ = plant(prose[first : first + length], [(depth, planted)])
    return Needle(document=document, question=question, key=key, depth=depth)


def needles(
    prose: Sequence[int], encode: Callable[[str], list[int]], *, tokens: int, depths: Sequence[float], seeds: int
) -> list[Needle]:
    """`seeds` needles at each depth."""
    return [needle(prose, encode, tokens=tokens, depth=at, seed=seed) for at in depths for seed in range(seeds)]


@torch.inference_mode()
def keys_found(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    tasks: Sequence[Needle],
    done: Callable[[], object] = lambda: None,
) -> tuple[dict[float, int], int]:
    """How many keys are told after reading, by depth, and the most tokens that were attended."""
    found, most = dict.fromkeys([task.depth for task in tasks], 0), 0
    for task in tasks:
        with tiered(model, policy) as cache:
            model(torch.tensor([task.document], device=model.device), **{CACHE: cache}, logits_to_keep=1)
            said, _ = answer(model, tokenizer, task.question, cache)
            found[task.depth] += task.found_in(said)
            most = max(most, *cache.attended())
        done()
    return found, most


def keys_columns(made: Table, tasks: Sequence[Needle]) -> None:
    """The two columns that `keys_cells` fills: keys found by depth, and altogether."""
    depths = dict.fromkeys(f"{task.depth:.0%}" for task in tasks)
    made.add_column(f"keys at\n{' '.join(depths)}", justify="right")
    made.add_column("keys\nfound", justify="right")


def keys_cells(found: dict[float, int], tasks: Sequence[Needle]) -> tuple[str, str]:
    """Keys found by depth, and altogether; empty if none was asked for."""
    if not tasks:
        return "", ""
    return "   ".join(map(str, found.values())) + " ", f"{sum(found.values())}/{len(tasks)}"


def narrow_table(title: str) -> Table:
    """A table that fits a terminal of 80 columns."""
    return Table(title=title, box=box.SIMPLE_HEAD, padding=0)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Text to ids, without special tokens."""

    def encode(text: str) -> list[int]:
        ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    return encode


def encoded(document: str, tokenizer: PreTrainedTokenizerBase, *, least: int) -> list[int]:
    """The token ids of a document. Raises `click.UsageError` if it cannot be read or has fewer than `least`."""
    try:
        ids = encoder(tokenizer)(read_document(document))
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(
            f"document {document!r} cannot be read: {error}; give {', '.join(DOCUMENTS)}, or a text file"
        ) from error
    if len(ids) < least:
        raise click.UsageError(f"the document {document!r} has {len(ids):,} tokens; {least:,} are needed")
    return ids


def numbers(listed: str) -> list[float]:
    """Numbers that are separated by commas."""
    try:
        return [float(part) for part in listed.split(",")]
    except ValueError as error:
        raise click.UsageError(f"{listed!r} is no list of numbers separated by commas") from error
