"""`kvtiers demo text`: read a long document under every policy, then ask for a fact that was planted early."""

from pathlib import Path

import attrs
import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import policy
from kvtiers_transformers.document import read_document
from kvtiers_transformers.reading import Reading, answer, encoder, model_option, narrow_table, needle, read
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.wrap import tiered

POLICIES = ("full", "sliding-window", "streaming", "archive", "packforcing-lm")
PARTS = 4


@attrs.frozen(eq=False, kw_only=True)
class Row:
    """What one policy made of the document."""

    policy: str
    reading: Reading
    said: str
    recalled: bool
    attended: int
    decode_seconds: float


@click.command()
@model_option
@click.option(
    "--tokens", default=6000, show_default=True, type=click.IntRange(min=256), help="Length of the document, in tokens."
)
@click.option("--policies", default=",".join(POLICIES), show_default=True, help="Presets, separated by commas.")
@click.option(
    "--depth",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Where the fact is planted: 0 is the start, 1 the end.",
)
@click.option("--out", default="kvtiers-demo.png", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
def text(model: str, tokens: int, policies: str, depth: float, out: Path) -> None:
    """Read a long document under each policy with a real model, then ask for a fact planted early in it."""
    console = Console()
    names = [name.strip() for name in policies.split(",") if name.strip()]
    for name in names:  # an unknown one is told before anything is loaded
        policy(name)
    console.print(f"Loading {model} ...")
    loaded, tokenizer = load_model(model)
    rows = compare(loaded, tokenizer, names, tokens=tokens, depth=depth, console=console)
    console.print(table(rows))
    plot(rows, out)
    console.print(f"Memory and perplexity over position: {out}")


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policies: list[str],
    *,
    tokens: int,
    depth: float,
    console: Console,
) -> list[Row]:
    """Read the same document under each policy, with a progress bar, and ask for the fact."""
    encode = encoder(tokenizer)
    task = needle(encode(read_document()), encode, tokens=tokens, depth=depth, seed=0)
    console.print(
        f"{len(task.document):,} tokens of Northanger Abbey; at {depth:.0%} of it: "
        f'"The secret key is {task.key}." Asked for at the end. {torch.get_num_threads()} threads, {model.dtype}.'
    )
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console) as progress:
        for name in policies:
            bar = progress.add_task(name, total=len(task.document))
            with tiered(model, name) as cache:
                reading = read(model, task.document, cache, advance=lambda n, bar=bar: progress.advance(bar, n))  # type: ignore[misc]
                said, seconds = answer(model, tokenizer, task.question, cache, tokens=16)
                row = Row(
                    policy=name,
                    reading=reading,
                    said=said,
                    recalled=task.found_in(said),
                    attended=max(cache.attended()),
                    decode_seconds=seconds,
                )
            rows.append(row)
    return rows


def table(rows: list[Row]) -> Table:
    """The comparison, one policy a row."""
    made = narrow_table("What each policy remembers")
    made.add_column("policy")
    for name in ("tokens\nattended", "device\nMB", "host\nMB", f"perplexity of each\n1/{PARTS} of the text"):
        made.add_column(name, justify="right")
    made.add_column("fact\nkept")
    made.add_column("prefill\ntok/s", justify="right")
    made.add_column("decode\ntok/s", justify="right")
    for row in rows:
        reading = row.reading
        made.add_row(
            row.policy,
            f"{row.attended:,}",
            f"{reading.device_bytes[-1] / 1e6:.1f}",
            f"{reading.host_bytes[-1] / 1e6:.1f}",
            " ".join(f"{value:.1f}" for value in reading.parts(PARTS)),
            "[green]yes[/]" if row.recalled else "[red]no[/]",
            f"{(len(reading.losses) + 1) / reading.seconds:.0f}",
            f"{1 / row.decode_seconds:.1f}",
        )
    return made


def plot(rows: list[Row], out: Path) -> None:
    """Draw device memory and perplexity over position to `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, quality) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for row in rows:
        reading = row.reading
        (line,) = memory.plot(
            reading.positions, [size / 1e6 for size in reading.device_bytes], marker=".", label=row.policy
        )
        if max(reading.host_bytes):
            memory.plot(
                reading.positions,
                [size / 1e6 for size in reading.host_bytes],
                linestyle=":",
                color=line.get_color(),
                label=f"{row.policy} (host)",
            )
        width = 500
        parts = reading.losses.split(width)
        middle = [width * (at + 0.5) for at in range(len(parts))]
        quality.plot(middle, [float(part.mean().exp()) for part in parts], marker=".", label=row.policy)
    memory.set(ylabel="cache, MB (device; dotted: host)", title="What each policy holds, and what it costs")
    memory.legend(fontsize=8)
    quality.set(xlabel="position (tokens)", ylabel="perplexity, per 500 tokens")
    quality.legend(fontsize=8)
    for axes in (memory, quality):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    plt.close(figure)
