"""`kvtiers bench digests`: how small the digests of archived blocks can be, and still lead to the right ones.

A document is read once with everything attended. Then the question is asked of copies of that cache which keep other
digests, and attend only the blocks that these choose. So a row of the table differs from the next in the choice alone.
The kinds of text are `kvtiers_transformers.document`'s: what serves one may not serve another.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import attrs
import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import Geometry, Policy, PolicyError
from kvtiers.presets import parse
from kvtiers_transformers.cache import TransformersCache
from kvtiers_transformers.reading import (
    Needle,
    answer,
    depths_option,
    document_help,
    encoded,
    encoder,
    model_option,
    narrow_table,
    needles,
    numbers,
    seeds_option,
    tokens_option,
)
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.versions import CACHE
from kvtiers_transformers.wrap import new_cache, tiered

DIGESTS = ("8x32", "4x32", "2x32", "2x8", "2x4", "1x32", "1x8", "1x4", "1x3", "1x2", "1x1")
_READ = ("novel", "past", "entries")
EVERYTHING = "all"


@attrs.frozen(kw_only=True)
class Told:
    """One answer. found: whether the key was told. loss: nats that its digits cost as the answer."""

    found: bool
    loss: float


@click.command()
@model_option
@click.option("--document", "documents", default=_READ, show_default=True, multiple=True, help=document_help)
@tokens_option
@seeds_option(3, least=1)
@depths_option("0.1,0.4,0.7")  # no further: the newest 476 tokens are attended anyway
@click.option("--policy", "spec", default="archive", show_default=True, help="Whose retriever is varied.")
@click.argument("digests", nargs=-1)
def digests(
    model: str,
    documents: tuple[str, ...],
    tokens: int,
    seeds: int,
    depths: str,
    spec: str,
    digests: tuple[str, ...],
) -> None:
    """Keys found by digests of growing size, and what they weigh beside the keys and values that they stand for.

    DIGESTS are written `keys x bits`, as in 2x4: a digest for every two keys, of four bits a channel; 32 bits are
    float32.
    """
    console = Console()
    base = parse(spec)
    policies = {kind: with_digests(base, kind) for kind in digests or DIGESTS}
    loaded, tokenizer = load_model(model)
    tasks = {
        name: needles(
            encoded(name, tokenizer, least=tokens),
            encoder(tokenizer),
            tokens=tokens,
            depths=numbers(depths),
            seeds=seeds,
        )
        for name in documents
    }
    asked = sum(map(len, tasks.values()))
    with Progress(console=console) as progress:
        bar = progress.add_task("reading", total=asked * (len(policies) + 2))
        results = {
            name: [ask(loaded, tokenizer, policies, task, lambda: progress.advance(bar)) for task in of_text]
            for name, of_text in tasks.items()
        }
    shares = {kind: share_of(policy, new_cache(loaded, policy).core.geometries[0]) for kind, policy in policies.items()}
    console.print(digests_table(results, shares, f"A key in {tokens:,} tokens, by what chooses the blocks attended"))


def with_digests(policy: Policy, kind: str) -> Policy:
    """The policy with digests as `kind` says, such as `2x8`."""
    keys, _, bits = kind.partition("x")
    if not (keys.isdigit() and bits.isdigit()):
        raise click.UsageError(f"digests are written keys x bits, as in 2x4, got {kind!r}")
    judge: Any = policy.retriever
    try:
        judge = attrs.evolve(judge, digest_tokens=int(keys), digest_bits=None if bits == "32" else int(bits))
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{type(judge).__name__} makes no digests {kind!r}: {error.args[0]}") from error
    return attrs.evolve(policy, retriever=judge)


def share_of(policy: Policy, geometry: Geometry) -> float:
    """Bytes of a block's digests as a share of its keys and values."""
    per_head = attrs.evolve(geometry, batch=1, kv_heads=1, query_heads=1)
    of_block = policy.retriever.digest_bytes(policy.block_size, per_head)
    return of_block / (policy.block_size * per_head.token_bytes)


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policies: Mapping[str, Policy],
    task: Needle,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Told]:
    """What is told under each policy, after a reading that attended everything.

    Under `EVERYTHING` the question attends everything too.
    """
    first = next(iter(policies.values()))
    most = (len(task.document) + len(task.question)) // first.block_size + 1
    whole = attrs.evolve(first, top_k=most)
    with tiered(model, whole) as cache:
        model(torch.tensor([task.document], device=model.device), **{CACHE: cache}, logits_to_keep=1)
        done()
        told = {}
        for kind, policy in ({EVERYTHING: whole} | dict(policies)).items():
            asked = cache.fork()
            if kind != EVERYTHING:
                asked.swap(policy)
            loss = key_loss(model, tokenizer, task, asked.fork())
            said, _ = answer(model, tokenizer, task.question, asked)
            told[kind] = Told(found=task.found_in(said), loss=loss)
            done()
    return told


@torch.inference_mode()
def key_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Needle, cache: TransformersCache
) -> float:
    """Nats that the digits of the key cost as the answer to its question."""
    digits = torch.tensor([encoder(tokenizer)(f" {task.key}")], device=model.device)
    question = torch.tensor([task.question], device=model.device)
    first = model(question, **{CACHE: cache}, logits_to_keep=1).logits[0]
    rest = model(digits, **{CACHE: cache}).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(torch.cat([first, rest]).float(), digits[0], reduction="sum"))


def digests_table(
    results: Mapping[str, Sequence[Mapping[str, Told]]], shares: Mapping[str, float], title: str
) -> Table:
    """One kind of digest a row; the first row attends everything."""
    made = narrow_table(title)
    made.caption = "loss: nats that the digits of the key cost, on average"
    made.add_column("digests\nkeys x bits")
    made.add_column("bytes,\nof K/V", justify="right")
    for name in results:
        made.add_column(f"{name}:\nkeys found", justify="right")
        made.add_column("loss", justify="right")
    for kind in (EVERYTHING, *shares):
        cells = []
        for answers in results.values():
            told = [one[kind] for one in answers]
            cells += [f"{sum(one.found for one in told)}/{len(told)}", f"{fmean(one.loss for one in told):.2f}"]
        made.add_row(kind, f"1/{1 / shares[kind]:.1f}" if kind in shares else "", *cells)
    return made
