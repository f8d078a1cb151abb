"""`kvtiers bench recall`: what a policy remembers of a long document."""

from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import Policy, bytes_in
from kvtiers.presets import parse
from kvtiers_transformers.reading import (
    Needle,
    depths_option,
    document_option,
    encoded,
    encoder,
    keys_cells,
    keys_columns,
    keys_found,
    model_option,
    narrow_table,
    needles,
    numbers,
    read,
    seeds_option,
    tokens_option,
)
from kvtiers_transformers.recall_picture import Point, draw, figure_class
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.wrap import tiered

POLICIES = ("full", "sliding-window", "streaming", "archive", "packforcing-lm")
_PASSAGE, _FILLER = 512, 3072


@attrs.frozen(kw_only=True)
class Memory:
    """What one policy remembers. found: keys told, by depth; prose, again: perplexities."""

    policy: str
    found: dict[float, int]
    prose: float
    again: float
    attended: int
    device_bytes: int
    host_bytes: int


@click.command()
@model_option
@document_option
@tokens_option
@seeds_option(5)
@depths_option()
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the results to this file.")
@click.argument("policies", nargs=-1)
def recall(
    model: str, document: str, tokens: int, seeds: int, depths: str, picture: Path | None, policies: tuple[str, ...]
) -> None:
    """A key in a long text, the perplexity of the text, and of a passage that comes again after 3,072 other tokens.

    POLICIES are written `name` or `name:setting=value,...`, as in `archive:digest_bits=3,digest_tokens=1`.
    """
    console = Console()
    if picture is not None:
        _check_picture(picture)
    chosen = {spec: parse(spec) for spec in policies or POLICIES}
    loaded, tokenizer = load_model(model)
    text = encoded(document, tokenizer, least=max(tokens, _PASSAGE + _FILLER))
    tasks = needles(text, encoder(tokenizer), tokens=tokens, depths=numbers(depths), seeds=seeds)
    with Progress(console=console) as progress:
        bar = progress.add_task("reading", total=len(chosen) * (len(tasks) + 2))
        results = [
            remember(loaded, tokenizer, spec, policy, text, tasks, tokens=tokens, done=lambda: progress.advance(bar))
            for spec, policy in chosen.items()
        ]
    title = f"What is remembered of {tokens:,} tokens ({document})"
    console.print(memory_table(results, tasks, title))
    if picture is not None:
        draw([point(result) for result in results], asked=len(tasks), title=title, out=picture)
        console.print(f"The picture is in {picture}.")


def _check_picture(out: Path) -> None:
    """Refuse, before anything is measured, a picture that could not be drawn when all is."""
    figure_class()
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"--picture {out}: there is no folder {out.absolute().parent}; make it, or give another")


def point(result: Memory) -> Point:
    """What the picture shows of a result."""
    found = sum(result.found.values())
    return Point(label=result.policy, attended=result.attended, perplexity=result.prose, found=found)


def remember(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    label: str,
    policy: Policy,
    text: Sequence[int],
    tasks: Sequence[Needle],
    *,
    tokens: int,
    done: Callable[[], object] = lambda: None,
) -> Memory:
    """Ask `model` for the keys of `tasks` under `policy`, and let it read `tokens` tokens of `text`."""
    found, most = keys_found(model, tokenizer, policy, tasks, done)
    with tiered(model, policy) as cache:
        reading = read(model, text[:tokens], cache)
        held = cache.memory_usage()
        most = max(most, *cache.attended())
    done()
    passage = text[-_PASSAGE:]
    with tiered(model, policy) as cache:
        repeated = read(model, [*passage, *text[:_FILLER], *passage], cache)
    done()
    return Memory(
        policy=label,
        found=found,
        prose=reading.perplexity,
        again=float(repeated.losses[1 - len(passage) :].mean().exp()),
        attended=most,
        device_bytes=bytes_in(held, "device"),
        host_bytes=bytes_in(held, "host") + bytes_in(held, "disk"),
    )


def memory_table(results: Sequence[Memory], tasks: Sequence[Needle], title: str) -> Table:
    """One policy a row; the first is the reference of the relative perplexities."""
    made = narrow_table(title)
    made.add_column("policy", overflow="fold")
    for name in ("tokens\nattended", "device\nMB", "host\nMB"):
        made.add_column(name, justify="right")
    keys_columns(made, tasks)
    for name in ("ppl of\ntext", "beside\nrow 1", "ppl of\nrepeat"):
        made.add_column(name, justify="right")
    for result in results:
        made.add_row(
            result.policy,
            f"{result.attended:,}",
            f"{result.device_bytes / 1e6:.1f}",
            f"{result.host_bytes / 1e6:.1f}",
            *keys_cells(result.found, tasks),
            f"{result.prose:.2f}",
            f"{result.prose / results[0].prose - 1:+.1%}",
            f"{result.again:.2f}",
        )
    return made
