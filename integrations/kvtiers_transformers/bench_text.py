"""`kvtiers bench text`: decoding speed beside transformers' own caches, of one text and of a batch."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any

import attrs
import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvtiers import Policy
from kvtiers.presets import parse
from kvtiers_transformers.cache import TransformersCache
from kvtiers_transformers.reading import encoded, model_option, narrow_table, numbers
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.versions import CACHE
from kvtiers_transformers.wrap import disable, enable, new_cache

POLICIES = (
    "full",
    "sliding-window:recent=511",
    "streaming:recent=476",
    "archive:recent=240,top_k=16",
    "packforcing-lm:recent=240,top_k=16",
)
OF_BATCH = ("full", "streaming:recent=476", "archive:recent=240,top_k=16")
_WINDOW = 512
_SHORTEST, _LONGEST = 200, 700


@attrs.frozen(kw_only=True)
class Speed:
    """Milliseconds per decoded step of one cache."""

    median: float
    mean: float
    attended: int


@click.command()
@model_option
@click.option("--contexts", default="512,2048,4096,8000", show_default=True, help="Context lengths, in tokens.")
@click.option(
    "--tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens decoded at each length."
)
@click.option(
    "--batch",
    default=16,
    show_default=True,
    type=click.IntRange(min=0),
    help=f"Prompts of the batch, of {_SHORTEST} to {_LONGEST} tokens; 0 leaves it out.",
)
@click.argument("policies", nargs=-1)
def text(model: str, contexts: str, tokens: int, batch: int, policies: tuple[str, ...]) -> None:
    """Time per decoded token at growing context, and of a batch, beside transformers' own caches, all in one run.

    POLICIES are written `name` or `name:setting=value,...`.
    """
    console = Console()
    one = {spec: parse(spec) for spec in policies or POLICIES}
    many = {spec: parse(spec) for spec in policies or OF_BATCH}
    lengths = [int(length) for length in numbers(contexts)]
    prompts = batch_lengths(batch) if batch else {}
    loaded, tokenizer = load_model(model)
    novel = encoded("novel", tokenizer, least=max([0, *lengths, *(_LONGEST for _ in prompts)]) + tokens)
    where = f"{torch.get_num_threads()} threads, {loaded.dtype}, {loaded.device}"
    with Progress(console=console) as progress:
        bar = progress.add_task("decoding", total=(len(lengths) + len(prompts)) * tokens)

        def done() -> None:
            progress.advance(bar)

        alone = {f"{n:,}": speed(loaded, one, novel, [n], tokens, done, window=_WINDOW) for n in lengths}
        together = {name: speed(loaded, many, novel, rows, tokens, done) for name, rows in prompts.items()}
    console.print(length_table(alone, tokens, f"Decoding, ms per token at a context of ... ({where})"))
    if together:
        console.print(batch_table(together, tokens, f"Decoding {batch} prompts at once, ms per step ({where})"))


def batch_lengths(batch: int) -> dict[str, list[int]]:
    """Two batches of `batch` prompts and nearly as many tokens: of different lengths, and of one."""
    lengths = torch.linspace(_SHORTEST, _LONGEST, batch).int().tolist()
    even = sum(lengths) // batch
    different = f"{lengths[0]} to {lengths[-1]} tokens,\npadded on the left"
    return {different: lengths, f"{even} tokens\neach": [even] * batch}


def speed(
    model: PreTrainedModel,
    policies: Mapping[str, Policy],
    ids: Sequence[int],
    lengths: Sequence[int],
    tokens: int,
    done: Callable[[], object] = lambda: None,
    *,
    window: int | None = None,
) -> dict[str, Speed]:
    """How fast `tokens` steps are decoded after a batch of prompts of these lengths, all from the beginning of `ids`.

    The caches take turns step by step, so that a busy moment of the machine falls on all of them alike. window: try
    also transformers' own cache of a model that attends so many tokens.
    """
    mask = torch.tensor([[0] * (max(lengths) - length) + [1] * length for length in lengths], device=model.device)
    rows = [[0] * (max(lengths) - length) + list(ids[:length]) for length in lengths]
    prompt, coming = torch.tensor(rows, device=model.device), ids[max(lengths) : max(lengths) + tokens]
    sliding = f"DynamicCache, window of {window}"
    with _enabled(model), torch.inference_mode():
        caches: dict[str, Cache] = {"DynamicCache": DynamicCache(config=model.config)}
        if window is not None:
            caches[sliding] = DynamicCache(config=_sliding(model.config, window))
        caches |= {spec: new_cache(model, policy) for spec, policy in policies.items()}
        for cache in caches.values():
            model(**_inputs(prompt, mask), **{CACHE: cache}, logits_to_keep=1)
        times = _take_turns(model, caches, coming, mask, done)
    made = {}
    for label, cache in caches.items():
        attended = mask.shape[1] + len(coming)
        if isinstance(cache, TransformersCache):
            attended = max(cache.attended())
        elif window is not None and label == sliding:
            attended = min(attended, window)
        milliseconds = [seconds * 1e3 for seconds in times[label]]
        made[label] = Speed(median=median(milliseconds), mean=fmean(milliseconds), attended=attended)
    return made


@contextmanager
def _enabled(model: PreTrainedModel) -> Iterator[None]:
    enable(model)
    try:
        yield
    finally:
        disable(model)


def _sliding(config: Any, window: int) -> Any:
    """The configuration of a model whose layers all attend a sliding window."""
    sliding = copy.deepcopy(config)
    sliding.sliding_window, sliding.layer_types = window, ["sliding_attention"] * config.num_hidden_layers
    return sliding


def _inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What `generate` gives a model for the newest columns, `ids`, of a batch; of a single text it is the ids alone."""
    if mask.all():
        return {"input_ids": ids}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _take_turns(
    model: PreTrainedModel,
    caches: Mapping[str, Cache],
    ids: Sequence[int],
    mask: Tensor,
    done: Callable[[], object],
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {label: [] for label in caches}
    for token in ids:
        piece = torch.full((mask.shape[0], 1), token, device=model.device)
        mask = torch.cat([mask, torch.ones_like(piece)], dim=1)
        inputs = _inputs(piece, mask)
        for label, cache in caches.items():
            began = time.perf_counter()
            model(**inputs, **{CACHE: cache})
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            times[label].append(time.perf_counter() - began)
        done()
    return times


def length_table(results: Mapping[str, Mapping[str, Speed]], tokens: int, title: str) -> Table:
    """One cache a row, one context length a column."""
    made = narrow_table(title)
    made.caption = f"median of {tokens} tokens, and their mean, which archiving and recalling raise"
    made.add_column("cache", overflow="fold")
    made.add_column("tokens\nattended", justify="right")
    for length in results:
        made.add_column(length, justify="right")
    for label, last in list(results.values())[-1].items():
        row = [of_length[label] for of_length in results.values()]
        made.add_row(label, f"{last.attended:,}", *(f"{at.median:.1f} ({at.mean:.1f})" for at in row))
    return made


def batch_table(results: Mapping[str, Mapping[str, Speed]], tokens: int, title: str) -> Table:
    """One cache a row, one batch a pair of columns; the first row is the reference."""
    made = narrow_table(title)
    made.caption = f"median of {tokens} steps, and their mean; the ratio of the medians"
    made.add_column("cache", overflow="fold")
    for name in results:
        made.add_column(name, justify="right")
        made.add_column("beside\nrow 1", justify="right")
    for label in next(iter(results.values())):
        cells = []
        for rows in results.values():
            cells += [
                f"{rows[label].median:.1f} ({rows[label].mean:.1f})",
                f"{rows[label].median / next(iter(rows.values())).median:.2f}",
            ]
        made.add_row(label, *cells)
    return made
