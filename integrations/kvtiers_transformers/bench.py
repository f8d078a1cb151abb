"""`kvtiers bench`: decoding speed beside transformers' own caches, and what each policy still remembers."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import Policy, PolicyError, bytes_in, resolve
from kvtiers_transformers.document import read_document
from kvtiers_transformers.reading import answer, encoder, needle, read
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.wrap import disable, enable, new_cache, tiered

RECALL = ("full", "sliding-window", "streaming", "archive", "packforcing-lm")
SPEED = (
    "full",
    "sliding-window:recent=511",
    "streaming:recent=476",
    "archive:recent=96,top_k=11",
    "packforcing-lm:recent=96,top_k=11",
)
_PASSAGE, _FILLER = 512, 3072

model_option = click.option(
    "--model", default="smollm2", show_default=True, help="`smollm2`, a hub id, or a local path."
)


@click.group()
def bench() -> None:
    """Measure speed and memory on this machine."""


def parse(spec: str) -> Policy:
    """`name` or `name:setting=value,...`, as in `archive:top_k=8,retriever=recency`."""
    name, _, settings = spec.partition(":")
    changes: dict[str, Any] = {}
    for part in filter(None, settings.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise PolicyError(f"{spec!r}: settings are written key=value, got {part!r}")
        changes[key.strip()] = int(value) if value.strip().lstrip("-").isdigit() else value.strip()
    return resolve(name, layers=[0], **changes)[0]


@attrs.frozen(kw_only=True)
class Memory:
    """What one policy remembers. found: keys recalled, by depth; prose, again: perplexities."""

    policy: str
    found: dict[float, int]
    asked: int
    prose: float
    again: float
    attended: int
    device_bytes: int
    host_bytes: int


@bench.command()
@model_option
@click.option(
    "--tokens",
    default=4096,
    show_default=True,
    type=click.IntRange(min=256),
    help="Length of each document, in tokens.",
)
@click.option(
    "--seeds", default=5, show_default=True, type=click.IntRange(min=1), help="Passages and keys tried at each depth."
)
@click.option("--depths", default="0.1,0.5,0.9", show_default=True, help="Where keys are planted.")
@click.argument("policies", nargs=-1)
def recall(model: str, tokens: int, seeds: int, depths: str, policies: tuple[str, ...]) -> None:
    """A key in long prose, the perplexity of prose, and a passage that comes again after 3,000 other tokens.

    POLICIES are written `name` or `name:setting=value,...`.
    """
    console = Console()
    loaded, tokenizer = load_model(model)
    places = [float(depth) for depth in depths.split(",")]
    specs = list(policies or RECALL)
    chosen = [parse(spec) for spec in specs]
    with Progress(console=console) as progress:
        bar = progress.add_task("reading", total=len(specs) * (len(places) * seeds + 2))
        results = [
            remember(
                loaded, tokenizer, spec, policy, tokens=tokens, depths=places, seeds=seeds,
                done=lambda: progress.advance(bar),
            )
            for spec, policy in zip(specs, chosen, strict=True)
        ]  # fmt: skip
    console.print(memory_table(results, tokens))


def remember(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    label: str,
    policy: Policy,
    *,
    tokens: int,
    depths: Sequence[float],
    seeds: int,
    done: Callable[[], object] = lambda: None,
) -> Memory:
    """Measure what `policy` remembers with `model`."""
    encode = encoder(tokenizer)
    prose = encode(read_document())
    found = dict.fromkeys(depths, 0)
    most = 0
    for depth in depths:
        for seed in range(seeds):
            task = needle(prose, encode, tokens=tokens, depth=depth, seed=seed)
            with tiered(model, policy) as cache, torch.inference_mode():
                model(torch.tensor([task.document]), past_key_values=cache, logits_to_keep=1)
                said, _ = answer(model, tokenizer, task.question, cache)
                found[depth] += task.found_in(said)
                most = max(most, *cache.attended())
            done()
    with tiered(model, policy) as cache:
        reading = read(model, prose[:tokens], cache)
        held = cache.held()
    done()
    passage = prose[-_PASSAGE:]
    with tiered(model, policy) as cache:
        repeated = read(model, [*passage, *prose[:_FILLER], *passage], cache)
    done()
    return Memory(
        policy=label,
        found=found,
        asked=seeds,
        prose=reading.perplexity,
        again=float(repeated.losses[1 - len(passage) :].mean().exp()),
        attended=most,
        device_bytes=bytes_in(held, "device"),
        host_bytes=bytes_in(held, "host") + bytes_in(held, "disk"),
    )


def memory_table(results: list[Memory], tokens: int) -> Table:
    """One policy a row; the first is the reference of the relative perplexities."""
    made = Table(title=f"What is remembered of {tokens:,} tokens")
    made.add_column("policy", overflow="fold")
    depths = list(results[0].found)
    for name in (
        "tokens\nattended", "device\nMB", "host\nMB", *(f"key at\n{depth:.0%}" for depth in depths),
        "keys\nfound", "perplexity\nof prose", "against\nfirst row", "perplexity\nof repeat",
    ):  # fmt: skip
        made.add_column(name, justify="right")
    for result in results:
        total = sum(result.found.values())
        made.add_row(
            result.policy,
            f"{result.attended:,}",
            f"{result.device_bytes / 1e6:.1f}",
            f"{result.host_bytes / 1e6:.1f}",
            *(f"{result.found[depth]}/{result.asked}" for depth in depths),
            f"{total}/{result.asked * len(depths)}",
            f"{result.prose:.2f}",
            f"{result.prose / results[0].prose - 1:+.1%}",
            f"{result.again:.2f}",
        )
    return made


@bench.command()
@model_option
@click.option("--contexts", default="512,2048,4096,8000", show_default=True, help="Context lengths, in tokens.")
@click.option(
    "--tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens decoded at each length."
)
@click.argument("policies", nargs=-1)
def text(model: str, contexts: str, tokens: int, policies: tuple[str, ...]) -> None:
    """Time per decoded token at growing context, beside DynamicCache, all in one run.

    POLICIES are written `name` or `name:setting=value,...`.
    """
    console = Console()
    loaded, tokenizer = load_model(model)
    lengths = [int(length) for length in contexts.split(",")]
    specs = list(policies or SPEED)
    console.print(f"{torch.get_num_threads()} threads, {loaded.dtype}, {loaded.device}; medians, ms per token")
    results = speed(loaded, tokenizer, specs, lengths, tokens, console)
    made = Table(title="Decoding, ms per token at a context of ...")
    made.add_column("cache", overflow="fold")
    for length in lengths:
        made.add_column(f"{length:,}", justify="right")
        made.add_column("attended", justify="right", style="dim")
    for label, row in results.items():
        made.add_row(label, *(cell for ms, seen in row for cell in (f"{ms:.1f}", f"{seen:,}")))
    console.print(made)


def speed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    specs: list[str],
    lengths: list[int],
    tokens: int,
    console: Console,
) -> dict[str, list[tuple[float, int]]]:
    """Median milliseconds per decoded token and tokens attended, by cache and context length.

    The caches take turns token by token, so that a busy moment of the machine falls on all of them alike.
    """
    prose = encoder(tokenizer)(read_document())
    results: dict[str, list[tuple[float, int]]] = {label: [] for label in ("DynamicCache", *specs)}
    with Progress(console=console) as progress:
        bar = progress.add_task("decoding", total=len(lengths) * (len(results) + tokens))
        for length in lengths:
            document = torch.tensor([prose[:length]])
            caches: dict[str, Cache] = {"DynamicCache": DynamicCache(config=model.config)}
            tiers = {spec: new_cache(model, parse(spec)) for spec in specs}
            caches |= tiers
            enable(model)
            try:
                with torch.inference_mode():
                    for cache in caches.values():
                        model(document, past_key_values=cache, logits_to_keep=1)
                        progress.advance(bar)
                    times = _take_turns(model, caches, prose[length : length + tokens], lambda: progress.advance(bar))
            finally:
                disable(model)
            for label in caches:
                seen = max(tiers[label].attended()) if label in tiers else length + tokens
                results[label].append((sorted(times[label])[tokens // 2] * 1e3, seen))
    return results


def _take_turns(
    model: PreTrainedModel, caches: dict[str, Cache], ids: Sequence[int], done: Callable[[], object]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {label: [] for label in caches}
    for token in ids:
        piece = torch.tensor([[token]])
        for label, cache in caches.items():
            began = time.perf_counter()
            model(piece, past_key_values=cache)
            times[label].append(time.perf_counter() - began)
        done()
    return times
