"""`kvtiers bench codec`: how small archived keys and values can be written, and what is lost by it."""

from collections.abc import Callable, Sequence

import attrs
import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvtiers
from kvtiers import Codec, Policy
from kvtiers.presets import parse
from kvtiers_transformers.cache import TransformersCache
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
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.wrap import tiered

CODECS = ("exact", "int8", "int4")


@attrs.frozen(kw_only=True)
class Written:
    """What one codec saves and loses.

    archived: bytes that the archive holds. errors: of keys and of values read back, as a share of their own size (root
    mean square over every archived block of all layers). found: keys told, by depth.
    """

    codec: str
    archived: int
    errors: tuple[float, float]
    found: dict[float, int]
    perplexity: float


@click.command()
@model_option
@document_option
@tokens_option
@seeds_option(3)
@depths_option()
@click.option("--policy", "spec", default="archive:archive=host", show_default=True, help="Whose archive it is.")
@click.argument("codecs", nargs=-1)
def codec(model: str, document: str, tokens: int, seeds: int, depths: str, spec: str, codecs: tuple[str, ...]) -> None:
    """Bytes that the archive holds, the error of what is read back, keys found, and the perplexity of the text.

    CODECS are names (exact, int8 and int4 if none is given), with options as in `int4,codec.group=4`.
    """
    console = Console()
    base = spec if ":" in spec else f"{spec}:"
    chosen = {name: parse(f"{base},codec={name}") for name in codecs or CODECS}
    loaded, tokenizer = load_model(model)
    text = encoded(document, tokenizer, least=tokens)
    tasks = needles(text, encoder(tokenizer), tokens=tokens, depths=numbers(depths), seeds=seeds)
    with Progress(console=console) as progress:
        bar = progress.add_task("reading", total=1 + len(chosen) * (len(tasks) + 1))
        results = measure(loaded, tokenizer, chosen, text[:tokens], tasks, lambda: progress.advance(bar))
    console.print(codec_table(results, tasks, f"What is archived of {tokens:,} tokens ({document}), by codec"))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policies: dict[str, Policy],
    text: Sequence[int],
    tasks: Sequence[Needle],
    done: Callable[[], object] = lambda: None,
) -> list[Written]:
    """Read `text`, and ask for the keys of `tasks`, under policies that differ in their codec."""
    with tiered(model, kvtiers.policy(next(iter(policies.values())), codec="exact")) as cache:
        read(model, text, cache)
        errors = {name: errors_of(policy.codec, cache) for name, policy in policies.items()}
    done()
    results = []
    for name, policy in policies.items():
        found, _ = keys_found(model, tokenizer, policy, tasks, done)
        with tiered(model, policy) as cache:
            perplexity, archived = read(model, text, cache).perplexity, archived_bytes(cache)
        done()
        results.append(Written(codec=name, archived=archived, errors=errors[name], found=found, perplexity=perplexity))
    return results


@torch.inference_mode()
def errors_of(codec: Codec, cache: TransformersCache) -> tuple[float, float]:
    """What `codec` would change of the keys and values that `cache` archived exactly. See `Written.errors`."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for layer in cache.core.every_layer():
        history = layer.history
        if not history.count:
            raise click.UsageError("nothing was archived; read more --tokens, or take a --policy that archives")
        everything = torch.arange(history.count).expand(*history.wide, -1)
        exact = history.parts(next(iter(history.stores)), everything.to(cache.device))
        back = codec.decode(codec.encode(*exact), exact[0].dtype)
        for row, (x, y) in enumerate(zip(exact, back, strict=True)):
            sums[row] += torch.stack([(x.double() - y.double()).square().sum(), x.double().square().sum()]).cpu()
    of_keys, of_values = (sums[:, 0] / sums[:, 1]).sqrt().tolist()
    return of_keys, of_values


def archived_bytes(cache: TransformersCache) -> int:
    """Bytes of every archived block, wherever they are."""
    stores = [store for layer in cache.core.every_layer() for store in layer.history.stores.values()]
    return sum(sum(store.bytes_by_location().values()) for store in stores)


def codec_table(results: Sequence[Written], tasks: Sequence[Needle], title: str) -> Table:
    """One codec a row; the first is the reference of the relative numbers."""
    made = narrow_table(title)
    made.caption = "errors: root mean square, of all that is archived"
    made.add_column("codec", overflow="fold")
    for name in ("archive\nMB", "beside\nrow 1", "error of\nkeys", "error of\nvalues"):
        made.add_column(name, justify="right")
    keys_columns(made, tasks)
    for name in ("ppl of\ntext", "beside\nrow 1"):
        made.add_column(name, justify="right")
    for result in results:
        made.add_row(
            result.codec,
            f"{result.archived / 1e6:.1f}",
            f"{result.archived / results[0].archived:.1%}",
            *(f"{error:.2%}" for error in result.errors),
            *keys_cells(result.found, tasks),
            f"{result.perplexity:.2f}",
            f"{result.perplexity / results[0].perplexity - 1:+.2%}",
        )
    return made
