"""`kvtiers bench text` and `recall`: decoding speed beside transformers' own, and what a policy remembers."""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import attrs
import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import Policy, bytes_in
from kvtiers.cli import parse
from kvtiers_transformers.document import read_document
from kvtiers_transformers.reading import answer, encoder, narrow_table, needle, read
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.wrap import disable, enable, new_cache, tiered

RECALL = ("full", "sliding-window", "streaming", "archive", "packforcing-lm")
SPEED = (
    "full",
    "sliding-window:recent=511",
    "streaming:recent=476",
    "archive:recent=240,top_k=16",
    "packforcing-lm:recent=240,top_k=16",
)
_PASSAGE, _FILLER, _WINDOW = 512, 3072, 512

model_option = click.option(
    "--model", default="smollm2", show_default=True, help="`smollm2`, a hub id, or a local path."
)
document_option = click.option(
    "--document",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A text file to read instead of the novel that kvtiers ships.",
)


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


@click.command()
@model_option
@click.option(
    "--tokens",
    default=4096,
    show_default=True,
    type=click.IntRange(min=256),
    help="Length of each document, in tokens.",
)
@click.option(
    "--seeds",
    default=5,
    show_default=True,
    type=click.IntRange(min=0),
    help="Passages and keys tried at each depth; 0 measures perplexity alone.",
)
@click.option("--depths", default="0.1,0.5,0.9", show_default=True, help="Where keys are planted.")
@document_option
@click.argument("policies", nargs=-1)
def recall(model: str, tokens: int, seeds: int, depths: str, document: Path | None, policies: tuple[str, ...]) -> None:
    """A key in long prose, the perplexity of prose, and a passage that comes again after 3,000 other tokens.

    POLICIES are written `name` or `name:setting=value,...`.
    """
    console = Console()
    loaded, tokenizer = load_model(model)
    places = [float(depth) for depth in depths.split(",")]
    prose = encoder(tokenizer)(read_document(document))
    if len(prose) < max(tokens, _PASSAGE + _FILLER):
        raise click.UsageError(
            f"the document has {len(prose):,} tokens; {max(tokens, _PASSAGE + _FILLER):,} are needed"
        )
    specs = list(policies or RECALL)
    chosen = [parse(spec) for spec in specs]
    with Progress(console=console) as progress:
        bar = progress.add_task("reading", total=len(specs) * (len(places) * seeds + 2))
        results = [
            remember(
                loaded, tokenizer, spec, policy, prose, tokens=tokens, depths=places, seeds=seeds,
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
    prose: Sequence[int],
    *,
    tokens: int,
    depths: Sequence[float],
    seeds: int,
    done: Callable[[], object] = lambda: None,
) -> Memory:
    """Measure what `policy` remembers of `prose` with `model`."""
    encode = encoder(tokenizer)
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
        held = cache.memory_usage()
        most = max(most, *cache.attended())
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
    made = narrow_table(f"What is remembered of {tokens:,} tokens")
    made.add_column("policy", overflow="fold")
    depths = list(results[0].found)
    for name in (
        "tokens\nattended", "device\nMB", "host\nMB", f"keys at\n{' '.join(f'{depth:.0%}' for depth in depths)}",
        "keys\nfound", "ppl of\nprose", "beside\nrow 1", "ppl of\nrepeat",
    ):  # fmt: skip
        made.add_column(name, justify="right")
    for result in results:
        total = sum(result.found.values())
        made.add_row(
            result.policy,
            f"{result.attended:,}",
            f"{result.device_bytes / 1e6:.1f}",
            f"{result.host_bytes / 1e6:.1f}",
            "   ".join(str(result.found[depth]) for depth in depths) + " " if result.asked else "",
            f"{total}/{result.asked * len(depths)}" if result.asked else "",
            f"{result.prose:.2f}",
            f"{result.prose / results[0].prose - 1:+.1%}",
            f"{result.again:.2f}",
        )
    return made


@click.command()
@model_option
@click.option("--contexts", default="512,2048,4096,8000", show_default=True, help="Context lengths, in tokens.")
@click.option(
    "--tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens decoded at each length."
)
@click.argument("policies", nargs=-1)
def text(model: str, contexts: str, tokens: int, policies: tuple[str, ...]) -> None:
    """Time per decoded token at growing context, beside transformers' own caches, all in one run.

    POLICIES are written `name` or `name:setting=value,...`.
    """
    console = Console()
    loaded, tokenizer = load_model(model)
    lengths = [int(length) for length in contexts.split(",")]
    specs = list(policies or SPEED)
    results = speed(loaded, tokenizer, specs, lengths, tokens, console)
    where = f"{torch.get_num_threads()} threads, {loaded.dtype}, {loaded.device}"
    made = narrow_table(f"Decoding, ms per token at a context of ... ({where})")
    made.caption = f"median of {tokens} tokens, and their mean, which archiving and recalling raise"
    made.add_column("cache", overflow="fold")
    made.add_column("tokens\nattended", justify="right")
    for length in lengths:
        made.add_column(f"{length:,}", justify="right")
    for label, row in results.items():
        made.add_row(label, f"{row[-1].attended:,}", *(f"{at.median:.1f} ({at.mean:.1f})" for at in row))
    console.print(made)


@attrs.frozen(kw_only=True)
class Speed:
    """Milliseconds per decoded token of one cache at one context length."""

    median: float
    mean: float
    attended: int


def speed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    specs: list[str],
    lengths: list[int],
    tokens: int,
    console: Console,
) -> dict[str, list[Speed]]:
    """How fast `tokens` tokens are decoded, by cache and context length.

    The caches take turns token by token, so that a busy moment of the machine falls on all of them alike.
    """
    prose = encoder(tokenizer)(read_document())
    own: dict[str, Callable[..., Cache]] = {
        "DynamicCache": DynamicCache,
        f"DynamicCache, window of {_WINDOW}": _sliding,
    }
    results: dict[str, list[Speed]] = {label: [] for label in (*own, *specs)}
    with Progress(console=console) as progress:
        bar = progress.add_task("decoding", total=len(lengths) * (len(results) + tokens))
        for length in lengths:
            document = torch.tensor([prose[:length]], device=model.device)
            tiers = {spec: new_cache(model, parse(spec)) for spec in specs}
            caches: dict[str, Cache] = {label: make(config=model.config) for label, make in own.items()} | tiers
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
                taken = [seconds * 1e3 for seconds in times[label]]
                seen = max(tiers[label].attended()) if label in tiers else length + tokens
                attended = seen if label in tiers or label == "DynamicCache" else min(seen, _WINDOW)
                results[label].append(Speed(median=median(taken), mean=fmean(taken), attended=attended))
    return results


def _sliding(config: Any) -> DynamicCache:
    """transformers' own cache of a model whose layers all attend a sliding window."""
    sliding = copy.deepcopy(config)
    sliding.sliding_window, sliding.layer_types = _WINDOW, ["sliding_attention"] * config.num_hidden_layers
    return DynamicCache(config=sliding)


def _take_turns(
    model: PreTrainedModel, caches: dict[str, Cache], ids: Sequence[int], done: Callable[[], object]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {label: [] for label in caches}
    for token in ids:
        piece = torch.tensor([[token]], device=model.device)
        for label, cache in caches.items():
            began = time.perf_counter()
            model(piece, past_key_values=cache)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            times[label].append(time.perf_counter() - began)
        done()
    return times
